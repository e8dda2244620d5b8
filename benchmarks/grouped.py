"""Rows of a batch through their own dense bottlenecks: gathered weights, or a grouped product.

    python -m benchmarks.grouped --json benchmarks/results/grouped_cpu.json

A bottleneck `up(relu(down(x)))` of width `d / 2` for each of `members` directions, and a batch
whose rows belong to random members. One way gathers the weights of each row and multiplies row by
row, as a bank does. The other sorts the rows by member, multiplies all tokens of a member by its
weights in one grouped product (`jax.lax.ragged_dot`), and puts the rows back. Measured are the
gradients of the weights and of the input, that is a forward and a backward pass. Both ways take
turns; the ratio is between runs next to each other in time, and below 1 where the grouped product
is faster. The temporary bytes are those of the compiled programs.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.contest import write
from benchmarks.turns import alternate, processor, seconds_of, spread

Weights = dict[str, Array]


def gathered(weights: Weights, x: Array, members: Array) -> Array:
    """Returns the outputs of the rows' members, whose weights are gathered.

    Args:
      weights: `down` `[size, d, r]` and `up` `[size, r, d]`.
      x: `[rows, length, d]`.
      members: `[rows]` integers.

    Returns:
      `[rows, length, d]`.
    """
    down, up = weights["down"][members], weights["up"][members]
    hidden = jax.nn.relu(jnp.einsum("rld,rdb->rlb", x, down))
    return jnp.einsum("rlb,rbd->rld", hidden, up)


def grouped(weights: Weights, x: Array, members: Array) -> Array:
    """Returns the same as `gathered`, by grouped products of rows that are sorted by member."""
    rows, length, width = x.shape
    order = jnp.argsort(members)
    sizes = length * jnp.bincount(members, length=weights["down"].shape[0])
    tokens = x[order].reshape(rows * length, width)
    hidden = jax.nn.relu(jax.lax.ragged_dot(tokens, weights["down"], sizes))
    out = jax.lax.ragged_dot(hidden, weights["up"], sizes)
    return out.reshape(x.shape)[jnp.argsort(order)]


WAYS: dict[str, Callable[[Weights, Array, Array], Array]] = {
    "gathered": gathered,
    "grouped": grouped,
}


def gradients(way: Callable[..., Array], weights: Weights, x: Array, members: Array) -> Any:
    """Returns the gradients of the squared outputs with respect to weights and input."""
    return jax.grad(lambda weights, x: (way(weights, x, members) ** 2).sum(), (0, 1))(weights, x)


def arguments_of(rows: int, length: int, width: int, members: int) -> tuple[Weights, Array, Array]:
    """Draws weights, a batch and the members of its rows."""
    rng = np.random.default_rng(0)
    shapes = {"down": (members, width, width // 2), "up": (members, width // 2, width)}
    drawn = {name: rng.normal(0, width**-0.5, shape) for name, shape in shapes.items()}
    weights = {name: jnp.asarray(array, jnp.float32) for name, array in drawn.items()}
    x = jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32)
    return weights, x, jnp.asarray(rng.integers(0, members, rows))


def measured(rows: int, length: int, width: int, members: int, rounds: int) -> dict[str, Any]:
    """Measures both ways at one size; returns seconds, their ratio and bytes, JSON-ready."""
    given = arguments_of(rows, length, width, members)
    compiled = {
        name: jax.jit(functools.partial(gradients, way)).lower(*given).compile()
        for name, way in WAYS.items()
    }
    runs = {
        name: functools.partial(lambda run: jax.block_until_ready(run(*given)), program)
        for name, program in compiled.items()
    }
    for run in runs.values():
        run()
    timed = {name: functools.partial(seconds_of, run) for name, run in runs.items()}
    seconds = alternate(timed, rounds)
    temporary = {}
    for name, program in compiled.items():
        analysis: Any = program.memory_analysis()
        temporary[name] = int(analysis.temp_size_in_bytes)
    return {
        "width": width,
        "members": members,
        "rows": rows,
        "length": length,
        # Forward, and twice that for both gradients; two products.
        "flops": 3 * 2 * 2 * rows * length * width * (width // 2),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": spread(np.divide(seconds["grouped"], seconds["gathered"])),
        "temporary_bytes": temporary,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurements, prints them, and writes JSON if requested."""
    options = _parser().parse_args(arguments)
    report: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "sizes": [],
    }
    for width in options.widths:
        for members in options.members:
            found = measured(options.rows, options.length, width, members, options.rounds)
            report["sizes"].append(found)
            print(_text(found), flush=True)
    write(options.json, report)


def _text(found: dict[str, Any]) -> str:
    times = {name: 1000 * values["median"] for name, values in found["seconds"].items()}
    megabytes = {name: size / 1e6 for name, size in found["temporary_bytes"].items()}
    ratio = found["ratio"]
    return (
        f"d {found['width']}, {found['members']} members: gathered {times['gathered']:.1f} ms, "
        f"grouped {times['grouped']:.1f} ms; ratio {ratio['median']:.2f} "
        f"({ratio['first_quartile']:.2f} to {ratio['third_quartile']:.2f}); temporary "
        f"{megabytes['gathered']:.1f} and {megabytes['grouped']:.1f} MB"
    )


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouped", description=description)
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 256, 512])
    parser.add_argument("--members", type=int, nargs="+", default=[2, 12, 24])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    main()
