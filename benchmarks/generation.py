"""Cost of an adapter in text generation: greedy search with and without it.

    python -m benchmarks.generation --config t5-small --batch 8 --json generation.json

Weights are random, of a published size. No sequence ends early, so both models take the same number
of steps. Runs of the two alternate, and each ratio is between two runs next to each other.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.turns import alternate, seconds_of, spread
from compacter_jax.catalogue import preset
from compacter_jax.decode.generate import generate
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.models.loading import Backbone
from compacter_jax.models.t5.config import PUBLISHED, T5Config
from compacter_jax.models.t5.model import T5

LIMIT = 1.05  # ratio of the time with an adapter to the time without one


class Work(NamedTuple):
    """Work of one call of `generate`, counted and not measured."""

    flops: int
    bytes: int  # bytes of weights and caches read from memory; activations are left out


def main(arguments: list[str] | None = None) -> None:
    """Runs the measurements, prints them, and writes JSON if requested."""
    options = _parser().parse_args(arguments)
    report = measure(options)
    _print(report)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs both models and returns the report."""
    config = PUBLISHED[options.config]
    backbone = _random_backbone(config, jnp.dtype(options.dtype))
    model = Adapted(backbone.module, preset(options.method))
    params = init_adapters(model, backbone, jax.random.key(1))
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (options.batch, options.length))

    def run(model: Any, params: Any) -> Callable[[], Any]:
        return lambda: generate(
            model, params, ids, max_new_tokens=options.tokens, eos_token_id=()
        ).block_until_ready()

    runs = {"without": run(backbone.module, backbone.params), "with": run(model, params)}
    first = {name: seconds_of(run) for name, run in runs.items()}
    timed = {name: functools.partial(seconds_of, run) for name, run in runs.items()}
    seconds = alternate(timed, options.repeats)
    built = jax.eval_shape(lambda params: model.precomputed(params)[1], params)
    return {
        "settings": vars(options),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (jax, flax, np)},
        },
        "device": {"kind": jax.devices()[0].device_kind, "platform": jax.default_backend()},
        "first_call_seconds": first,
        "seconds": seconds,
        "median_seconds": {name: float(np.median(times)) for name, times in seconds.items()},
        "ratio": spread(np.divide(seconds["with"], seconds["without"])),
        "counted": {
            name: count_work(tree, config, options.batch, options.length, options.tokens)._asdict()
            for name, tree in (("without", backbone.params), ("with", built))
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", default="t5-small", choices=PUBLISHED, metavar="NAME")
    parser.add_argument("--method", default="compacter++")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="of the prompts, in tokens")
    parser.add_argument("--tokens", type=int, default=32, help="generated")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", metavar="FILE")
    return parser


def _random_backbone(config: T5Config, dtype: Any) -> Backbone:
    module = T5(config, dtype=dtype, param_dtype=dtype)
    init = jax.jit(lambda key: module.init(key, *module.dummy_inputs())["params"])
    return Backbone(module=module, params=init(jax.random.key(0)), config=config, name="random")


def count_work(params: Any, config: T5Config, batch: int, length: int, tokens: int) -> Work:
    """Counts multiplications and additions, and bytes of weights and caches, of greedy generation.

    Args:
      params: nested parameters or their shapes, with PHM weights precomputed.
      config: the configuration of the model.
      batch: the number of rows.
      length: the number of tokens of each prompt.
      tokens: the number of tokens generated in each row; every step reads the whole cache.
    """
    flops = size_in_bytes = 0
    head = "shared" if config.tie_word_embeddings else "lm_head"
    for path, leaf in flatten_dict(params, sep="/").items():
        once = path.startswith("encoder/") or path.endswith(
            ("EncDecAttention/k/kernel", "EncDecAttention/v/kernel")
        )
        if path.startswith("shared/") and head != "shared":
            continue  # an embedding is looked up, not multiplied
        passes, rows = (1, batch * length) if once else (tokens, batch)
        size_in_bytes += passes * leaf.size * leaf.dtype.itemsize
        flops += passes * rows * leaf.size * (2 if leaf.ndim == 2 else 1)
    inner = config.num_heads * config.d_kv
    itemsize = flatten_dict(params, sep="/")["shared/embedding"].dtype.itemsize
    decoder_layers = config.num_decoder_layers or config.num_layers
    # Each query has a product with every key and every value.
    flops += 4 * batch * inner * length * length * config.num_layers
    flops += 4 * batch * inner * (tokens + length) * tokens * decoder_layers
    size_in_bytes += 2 * batch * inner * (tokens + length) * tokens * decoder_layers * itemsize
    return Work(flops, size_in_bytes)


def _print(report: Mapping[str, Any]) -> None:
    settings, ratio, counted = report["settings"], report["ratio"], report["counted"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"{report['device']['kind']} ({report['device']['platform']}), {versions}")
    print(
        f"{settings['config']}, {settings['dtype']}, batch {settings['batch']}, "
        f"{settings['length']} tokens in, {settings['tokens']} generated, {settings['method']}"
    )
    for name in ("without", "with"):
        print(
            f"{name:>8}: {report['median_seconds'][name]:.4f} s (median of {settings['repeats']}), "
            f"first call {report['first_call_seconds'][name]:.1f} s, "
            f"{counted[name]['flops'] / 1e9:.2f} GFLOP, {counted[name]['bytes'] / 1e9:.3f} GB"
        )
    predicted = {unit: counted["with"][unit] / counted["without"][unit] for unit in Work._fields}
    print(
        f"predicted: {predicted['flops']:.4f} times the arithmetic, {predicted['bytes']:.4f} times "
        "the bytes"
    )
    print(
        f" measured: {ratio['median']:.4f} times the time, quartiles {ratio['first_quartile']:.4f} "
        f"to {ratio['third_quartile']:.4f}, range {ratio['lowest']:.4f} to {ratio['highest']:.4f}; "
        f"the limit is {LIMIT}"
    )


if __name__ == "__main__":
    main()
