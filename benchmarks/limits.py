"""Distance of this package from the limits of the machine, and the share of adapters in a step.

    python -m benchmarks.limits --case "minilm/*" --json limits.json
    python -m benchmarks.limits --case "t5-base/*/step" --rows 64 --dtype bfloat16  # on a GPU

A case is SIZE/METHOD/WORK, as in `benchmarks.peers`, but with trained layer norms, as in the paper.
Two limits are computed for each case:

- Matrix products: those of the forward pass, of the gradients of activations down to the lowest
  trained layer, and of the gradients of trained parameters. Each of their shapes is timed by
  itself, on contiguous operands; the limit is the sum of these times.
- Memory traffic: weights, once for each product that reads them; activations stored for the
  backward pass, written and read; gradients and the state of the optimizer. The bytes are converted
  to time by the measured bandwidth of the memory. If this time is longer than that of the products,
  it is the limit.

"of limit" is the limit as a fraction of the measured time.

"no adapters" is a step of the same backbone without adapters and with a gradient of the same depth:
layer norms and head are trained, as they are with adapters. The share of the adapters is the
additional time of a step. The time relative to full fine-tuning is also reported. Steps of one size
take turns, and each ratio is between steps next to each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import path_aware_map

import compacter_jax as cj
from benchmarks import jax_worker
from benchmarks.contest import LEARNING_RATE, METHODS, SIZES, Size, batch_of, choose, command, write
from benchmarks.turns import alternate, noise, processor, seconds_of, spread
from compacter_jax.models.loading import Backbone
from compacter_jax.params import FREEZE, TRAIN, group_of
from train.compute import memory, step
from train.compute.program import Program, gradient_program, traced

FULL, WITHOUT = "full", "no adapters"
_BESIDE = (*METHODS, WITHOUT)
_TRAINED_BESIDE = ("layer norms", "head")
WORKS = ("step", "forward")
# A rate is the best of several measurements, each with a minimum duration in seconds.
_TRIES, _TRY_SECONDS = 3, 0.05
# Shapes with a smaller share of the operations in total are not timed; they get the mean rate.
_NEGLIGIBLE = 1e-3
_STREAM_BYTES = 2**28
_SIDES = {"cpu": 2048}  # side of the square matrices; 8192 on other devices
# Operations that only change the shape or the type of values.
_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "copy", "convert_element_type")


@dataclasses.dataclass(frozen=True)
class Need:
    """Required work of a case, counted.

    Attributes:
      products: sizes `(batch, m, k, n)` of a matrix product -> number of products.
      weight_bytes: the bytes of weights, once for each operation that reads them.
      kept_bytes: the bytes of activations that the forward pass writes and the backward pass reads.
      update_bytes: the bytes of gradients, trained parameters and optimizer state.
    """

    products: Mapping[tuple[int, int, int, int], int]
    weight_bytes: int
    kept_bytes: int = 0
    update_bytes: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the products."""
        return sum(count * 2 * math.prod(size) for size, count in self.products.items())

    @property
    def bytes(self) -> int:
        """Sum of all bytes."""
        return self.weight_bytes + self.kept_bytes + self.update_bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurements, prints a row for each case, and writes JSON if requested.

    Raises:
      SystemExit: if no case matches; the message says which.
    """
    options = _parser().parse_args(arguments)
    try:
        cases = choose(options.case, _BESIDE, WORKS)
    except ValueError as error:
        sys.exit(f"error: {error}")
    rates = Rates(jnp.dtype(options.dtype))
    print(
        f"{jax.devices()[0].device_kind} ({processor()}), JAX {jax.__version__}: "
        f"{rates.bandwidth / 1e9:.1f} GB/s, {rates.square / 1e9:,.0f} GFLOP/s of products of "
        f"{rates.side} x {rates.side} in {options.dtype}\n{_HEADING}"
    )
    report: dict[str, Any] = {
        "settings": vars(options),
        "device": {"kind": jax.devices()[0].device_kind, "processor": processor()},
        "bandwidth": rates.bandwidth,
        "square_product_rate": rates.square,
        "cases": [],
    }
    together: dict[tuple[str, str], list[str]] = {}
    for size, method, work in cases:
        together.setdefault((size.name, work), []).append(method)
    for (size_name, work), methods in together.items():
        size = SIZES[size_name]
        if options.rows is not None:
            size = dataclasses.replace(size, rows=options.rows)
        for case in measure(size, work, methods, rates, options.repeats):
            report["cases"].append(case)
            print(_row(case), flush=True)
        write(options.json, report)


# --- what must be done --------------------------------------------------------------------------


def need_of_step(
    model: Any, params: Any, labels: Any, batch: Mapping[str, Any], size: Size
) -> Need:
    """Returns the need of a training step with AdamW; `params` may be shapes."""
    trained, frozen = cj.partition(params, labels)
    apply = step.apply_function(model, jax_worker.INPUTS[size.family])
    program = gradient_program(apply, jax_worker.loss_function(size), trained, frozen, batch)
    _, kept = memory.at_peak(program)
    moments = memory.size(jax.eval_shape(optax.adamw(LEARNING_RATE).init, trained))
    return Need(
        products=_products(program),
        weight_bytes=_weight_bytes(program, (trained, frozen)),
        kept_bytes=2 * kept,
        # Gradients, parameters and moments are written and read.
        update_bytes=2 * (2 * memory.size(trained) + moments),
    )


def need_of_forward(model: Any, params: Any, batch: Mapping[str, Any], size: Size) -> Need:
    """Returns the need of the logits without dropout; `params` may be shapes."""
    apply = step.apply_function(model, jax_worker.INPUTS[size.family])
    program = traced(lambda params, batch: apply(params, batch, None), params, batch)
    return Need(products=_products(program), weight_bytes=_weight_bytes(program, params))


def _products(program: Program) -> Counter[tuple[int, int, int, int]]:
    return Counter(o.product for o in program.operations if o.product is not None)


def _weight_bytes(program: Program, params: Any) -> int:
    """Returns the bytes of parameters, once for each operation that reads them.

    An embedding counts with the rows that are looked up.

    Args:
      program: the program, whose first arguments are the parameters.
      params: trees of arrays or shapes.
    """
    sizes = [memory.size(leaf) for leaf in jax.tree.leaves(params)]
    # Arrays are numbered in the order of their appearance: constants come before arguments.
    inputs = sorted(program.inputs)
    starts = range(len(inputs) - len(sizes) + 1)
    bytes_of = [program.bytes[array] for array in inputs]
    start = next(i for i in starts if bytes_of[i : i + len(sizes)] == sizes)
    origin = {array: array for array in inputs[start : start + len(sizes)]}
    total = 0
    for operation in program.operations:
        read = [origin[array] for array in operation.inputs if array in origin]
        if not read:
            continue
        if operation.name in _VIEWS:
            origin |= dict.fromkeys(operation.outputs, read[0])
        elif operation.name == "gather":
            total += sum(program.bytes[array] for array in operation.outputs)
        else:
            total += sum(program.bytes[array] for array in read)
    return total


# --- what the machine can do --------------------------------------------------------------------


class Rates:
    """Rates of this machine, measured on first use.

    Attributes:
      bandwidth: the memory bandwidth in bytes per second.
      side: the side of the square matrices of `square`.
      square: the operations per second of a product of large square matrices.

    Args:
      dtype: the dtype of the products.
      side: the side of the square matrices; None chooses it by the device.
    """

    def __init__(self, dtype: Any, side: int | None = None):
        self.dtype = jnp.dtype(dtype)
        self.side = side or _SIDES.get(jax.default_backend(), 8192)
        self._seconds: dict[tuple[int, int, int, int], float] = {}

    @functools.cached_property
    def bandwidth(self) -> float:
        x = jnp.ones(_STREAM_BYTES // 4, jnp.float32)
        # The best of a sum, which reads, and of a scaling, which reads and writes.
        read = _best_seconds(jax.jit(jnp.sum), x)
        both = _best_seconds(jax.jit(lambda x: 2 * x), x)
        return max(x.nbytes / read, 2 * x.nbytes / both)

    @functools.cached_property
    def square(self) -> float:
        return 2 * self.side**3 / self.product_seconds((1, self.side, self.side, self.side))

    def product_seconds(self, size: tuple[int, int, int, int]) -> float:
        """Returns the seconds of one product `[batch, m, k] @ [batch, k, n]`."""
        if size not in self._seconds:
            batch, m, k, n = size
            batched = (batch,) if batch > 1 else ()
            left, right = (jnp.ones((*batched, *shape), self.dtype) for shape in ((m, k), (k, n)))
            self._seconds[size] = _best_seconds(jax.jit(jnp.matmul), left, right)
        return self._seconds[size]

    def seconds_of(self, need: Need) -> float:
        """Returns the seconds of all products, each at the rate of its shape."""
        of_size = {size: n * 2 * math.prod(size) for size, n in need.products.items()}
        largest = sorted(of_size, key=lambda size: of_size[size], reverse=True)
        seconds, timed = 0.0, 0
        for size in largest:
            if timed >= (1 - _NEGLIGIBLE) * need.flops:
                break
            seconds += need.products[size] * self.product_seconds(size)
            timed += of_size[size]
        return seconds * need.flops / timed


def _best_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the seconds of one call among many queued ones, the best of several tries."""
    jax.block_until_ready(function(*arguments))
    once = seconds_of(lambda: jax.block_until_ready(function(*arguments)))
    times = max(1, math.ceil(_TRY_SECONDS / once))

    def run() -> None:
        for _ in range(times):
            result = function(*arguments)
        jax.block_until_ready(result)

    return min(seconds_of(run) for _ in range(_TRIES)) / times


# --- what it does -------------------------------------------------------------------------------


def measure(
    size: Size, work: str, methods: Iterable[str], rates: Rates, repeats: int
) -> Iterable[dict[str, Any]]:
    """Measures cases of one size in turns, together with the steps that they are compared with.

    Args:
      size: the size of the backbone and the batch.
      work: one of `WORKS`.
      methods: methods of `benchmarks.contest.METHODS`, or "no adapters".
      rates: the rates of this machine, in the dtype of the computation.
      repeats: the number of rounds.

    Returns:
      For each method, JSON-ready: "need"; "limit_seconds" of products and of bytes; the measured
      "seconds"; "of_limit". For a step also "of_full", the spread of its ratios to full
      fine-tuning, and "adapters_share", the spread of its additional time relative to a step
      without adapters.
    """
    names = list(methods)
    beside = [name for name in (FULL, WITHOUT) if work == "step" and name not in names]
    backbone = jax_worker.random_backbone(size)
    if rates.dtype != jnp.float32:
        module = backbone.module.clone(dtype=rates.dtype)
        backbone = dataclasses.replace(backbone, module=module)
    batch = batch_of(size, backbone.config.vocab_size)
    needs: dict[str, Need] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name in (*names, *beside):
        needs[name], runs[name] = _prepared(backbone, name, work, size, batch, rates)
    for run in runs.values():
        for _ in range(2):
            jax.block_until_ready(run())
    waited = {
        name: lambda run=run: seconds_of(lambda: jax.block_until_ready(run()))
        for name, run in runs.items()
    }
    seconds = {name: np.array(found) for name, found in alternate(waited, repeats).items()}
    return [_case(name, size, work, needs[name], seconds, rates) for name in names]


def _prepared(
    backbone: Backbone,
    name: str,
    work: str,
    size: Size,
    batch: Mapping[str, np.ndarray],
    rates: Rates,
) -> tuple[Need, Callable[[], Any]]:
    """Returns the need of a case, and a function that runs it."""
    plain = name in (FULL, WITHOUT)
    method = cj.preset(FULL) if plain else cj.preset(name, train_layer_norms=True)
    model = cj.Adapted(backbone.module, method)
    params = backbone.params if plain else cj.init_adapters(model, backbone, jax.random.key(1))
    labels = labels_without(params) if name == WITHOUT else cj.label_params(params, method)
    if rates.dtype != jnp.float32:
        trained, frozen = cj.partition(params, labels)
        params = cj.merge(trained, cj.cast_frozen(frozen, rates.dtype))
    if work == "forward":
        need = need_of_forward(model, params, batch, size)
        return need, jax_worker.forward(model, params, batch, size)
    need = need_of_step(model, params, labels, batch, size)
    return need, jax_worker.training_step(model, params, labels, batch, size, LEARNING_RATE)


def labels_without(params: Any) -> Any:
    """Returns labels of a backbone without adapters, trained where one with adapters is."""
    return path_aware_map(
        lambda path, _: TRAIN if group_of("/".join(map(str, path))) in _TRAINED_BESIDE else FREEZE,
        params,
    )


def _case(
    name: str,
    size: Size,
    work: str,
    need: Need,
    seconds: Mapping[str, np.ndarray],
    rates: Rates,
) -> dict[str, Any]:
    own = seconds[name]
    limits = {"products": rates.seconds_of(need), "bytes": need.bytes / rates.bandwidth}
    limit = max(limits.values())
    case = {
        "case": f"{size.name}/{name}/{work}",
        "size": dataclasses.asdict(size),
        "need": {
            "flops": need.flops,
            **{
                field: getattr(need, field)
                for field in ("weight_bytes", "kept_bytes", "update_bytes")
            },
            "products": [[*shape, count] for shape, count in need.products.items()],
        },
        "limit_seconds": limits,
        "seconds": own.tolist(),
        "median_seconds": float(np.median(own)),
        "noise": noise(own),
        "of_limit": spread(limit / own),
        "flops_per_second": need.flops / float(np.median(own)),
    }
    if work == "step":
        case["of_full"] = spread(own / seconds[FULL])
        case["adapters_share"] = spread(1 - seconds[WITHOUT] / own)
    return case


# --- what is printed ----------------------------------------------------------------------------

_COLUMNS = "{:<32}{:>9}{:>11}{:>8}{:>9}{:>10}{:>22}{:>22}{:>24}{:>7}"
_HEADING = _COLUMNS.format(
    *("case", "GFLOP", "limit, s", "GB", "GB, s", "seconds", "of limit (quartiles)"),
    *("of full", "adapters' share", "noise"),
)


def _row(case: Mapping[str, Any]) -> str:
    need, limits = case["need"], case["limit_seconds"]
    moved = need["weight_bytes"] + need["kept_bytes"] + need["update_bytes"]
    of_adapters = case["case"].split("/")[1] not in (FULL, WITHOUT) and "adapters_share" in case
    return _COLUMNS.format(
        case["case"],
        f"{need['flops'] / 1e9:.2f}",
        f"{limits['products']:.4f}",
        f"{moved / 1e9:.3f}",
        f"{limits['bytes']:.4f}",
        f"{case['median_seconds']:.4f}",
        _spread_text(case["of_limit"]),
        _spread_text(case["of_full"]) if "of_full" in case else "",
        _spread_text(case["adapters_share"]) if of_adapters else "",
        f"{case['noise']:.1%}",
    )


def _spread_text(values: Mapping[str, float]) -> str:
    return f"{values['median']:.3f} ({values['first_quartile']:.3f}-{values['third_quartile']:.3f})"


def _parser() -> argparse.ArgumentParser:
    parser = command("benchmarks.limits", __doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser


if __name__ == "__main__":
    main()
