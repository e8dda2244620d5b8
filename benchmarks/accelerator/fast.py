"""Section `fast`: speed and memory, beside the peers and beside the device's matrix products."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compacter_jax as cj
from benchmarks import limits, peers
from benchmarks.accelerator import replaced
from benchmarks.accelerator.programs import METHOD, in_dtype
from benchmarks.accelerator.scale import Scale
from benchmarks.accelerator.section import Checks
from benchmarks.contest import LEARNING_RATE, Size, batch_of
from benchmarks.jax_worker import INPUTS, loss_function, module_of, quick_key
from benchmarks.turns import seconds_of
from compacter_jax.models.loading import Backbone
from train.compute import compute, step

_TIMED_STEPS = 3


def checks(scale: Scale) -> Checks:
    """Returns the checks of this section."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    first, *others = scale.timed
    rates = functools.cache(lambda: limits.Rates(jnp.dtype(scale.dtype), scale.square_side))

    def add(size: Size, method: str, work: str) -> None:
        name = f"{size.name}, {size.rows} rows, {method}, {work}"
        found[name] = functools.partial(timed, scale, rates, size, method, work)

    for method in scale.methods:
        add(first, method, "step")
    for dtype in (scale.dtype, "int8"):
        name = f"largest batch of {scale.largest.name}, {dtype}"
        found[name] = functools.partial(largest_batch, scale, dtype)
    for size, method in itertools.product(others, scale.methods):
        add(size, method, "step")
    add(first, METHOD, "forward")
    for rows in scale.generating_rows:
        add(dataclasses.replace(scale.generating, rows=rows), METHOD, "generate")
    return {**found, **replaced.checks(scale)}


@functools.cache
def _inputs() -> peers.Inputs:
    """Returns the backbones and adapters of all cases, which end with this process."""
    folder = tempfile.mkdtemp(prefix="peers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return peers.Inputs(Path(folder))


def timed(
    scale: Scale, rates: Callable[[], limits.Rates], size: Size, method: str, work: str
) -> dict[str, Any]:
    """Times one case in turns with its peers, or alone where they are not installed."""
    settings = peers.Settings(
        repeats=scale.rounds,
        threads=None,
        dtypes=(scale.dtype,),
        generated=scale.generated,
        beside=not scale.is_toy or work == "step",
        alone=True,
        in_process=scale.is_toy,
    )
    (case,) = peers.measure([(size, method, work)], settings, inputs=_inputs())
    ours = case["sides"][peers.OURS]
    result = {
        "examples_per_second": {
            name: size.rows / side["median_seconds"] for name, side in case["sides"].items()
        },
        "peak_bytes": {
            name: side["device_peak"] or side["peak"] for name, side in case["sides"].items()
        },
        "first_call_seconds": {
            name: side["first_call_seconds"] for name, side in case["sides"].items()
        },
        "noise": {name: side["noise"] for name, side in case["sides"].items()},
        "ratios": case["ratios"],
        "failures": case["failures"],
    }
    if work == "step":
        flops = flops_of_step(size, method)
        result["flops"] = flops
        result["matrix_product_rate"] = rates().square
        result["of_matrix_product_rate"] = flops / ours["median_seconds"] / rates().square
    return result


def flops_of_step(size: Size, method: str) -> int:
    """Returns the operations that a step needs, from shapes alone."""
    backbone = shapes_of(size)
    model = cj.Adapted(backbone.module, cj.preset(method))
    params = backbone.params if method == "full" else _adapter_shapes(model, backbone)
    batch = batch_of(size, backbone.config.vocab_size)
    labels = cj.label_params(params, model.method)
    return limits.need_of_step(model, params, labels, batch, size).flops


def shapes_of(size: Size) -> Backbone:
    """Returns a backbone whose parameters are shapes."""
    module = module_of(size)
    shapes = jax.eval_shape(
        lambda key: module.init(key, *module.dummy_inputs())["params"], jax.random.key(0)
    )
    return Backbone(module, shapes, module.config, size.name)


def _adapter_shapes(model: cj.Adapted, backbone: Backbone) -> Any:
    def init(params: Any) -> Any:
        filled = dataclasses.replace(backbone, params=params)
        return cj.init_adapters(model, filled, jax.random.key(1))

    return jax.eval_shape(init, backbone.params)


def largest_batch(scale: Scale, dtype: str) -> dict[str, Any]:
    """Doubles the rows of a step until they do not fit, and times each that does."""
    size = scale.largest
    model, trained, frozen = prepared(size, dtype, scale.dtype)
    labels = cj.label_params(cj.merge(trained, frozen), model.method)
    made = compute.make_compute(
        step.apply_function(model, INPUTS[size.family]),
        loss_function(size),
        cj.optimizer(optax.adamw(LEARNING_RATE), labels),
        seed=0,
        devices=jax.local_devices()[:1],
    )
    state, frozen = made.init_state(trained), made.place(frozen)
    rows, last = scale.largest_rows
    done: list[dict[str, Any]] = []
    ended = f"{last} rows fit"
    while rows <= last:
        batch = batch_of(dataclasses.replace(size, rows=rows), size.config.get("vocab_size", 32128))
        try:
            state, seconds, compiled = _few_steps(made, state, frozen, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            ended = str(error).splitlines()[0][:300]
            break
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        done.append(
            {
                "rows": rows,
                "examples_per_second": rows / seconds,
                "first_call_seconds": compiled,
                "peak_bytes": peak,
            }
        )
        rows *= 2
    return {"batches": done, "ended": ended, "passed": bool(done)}


def prepared(size: Size, dtype: str, computed_in: str) -> tuple[cj.Adapted, Any, Any]:
    """Returns a rematerialised model with random weights, and both halves of its parameters.

    Args:
      size: the size of the backbone.
      dtype: the dtype of the frozen weights, `computed_in` or int8.
      computed_in: the dtype of the computation.
    """
    module = module_of(size).clone(remat="full")
    # Drawn in the dtype that is kept, so that float32 is never on the device.
    stored = jnp.dtype("bfloat16" if computed_in == "bfloat16" else "float32")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: _small(rng, leaf.shape, stored) if leaf.ndim > 1 else jnp.ones(leaf.shape),
        shapes_of(size).params,
    )
    model = cj.Adapted(module, cj.preset(METHOD))
    backbone = Backbone(module, params, module.config, size.name)
    params = cj.init_adapters(model, backbone, quick_key(1))
    model, trained, frozen = in_dtype(model, params, computed_in)
    return model, trained, cj.cast_frozen(frozen, "int8") if dtype == "int8" else frozen


def _small(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns small random weights with equal rows, since drawing billions takes minutes."""
    row = rng.normal(0, 0.02, shape[-1]).astype(np.float32)
    return jax.jit(lambda row: jnp.broadcast_to(row, shape).astype(dtype))(row)


def _few_steps(
    made: compute.Compute, state: Any, frozen: Any, batch: Any
) -> tuple[Any, float, float]:
    """Returns the state, the seconds of a step, and those of the first, which compiles."""

    def run(times: int) -> None:
        nonlocal state
        for _ in range(times):
            state, metrics = made.step(state, frozen, batch)
        jax.block_until_ready(metrics)

    compiled = seconds_of(lambda: run(1))
    seconds = seconds_of(lambda: run(_TIMED_STEPS)) / _TIMED_STEPS
    return state, seconds, compiled
