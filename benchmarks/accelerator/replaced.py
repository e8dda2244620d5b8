"""Checks of section `fast` that time this package with one of its parts replaced."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compacter_jax as cj
from benchmarks.accelerator import switches
from benchmarks.accelerator.programs import METHOD, adapted, in_dtype
from benchmarks.accelerator.scale import Scale
from benchmarks.accelerator.section import Checks
from benchmarks.contest import LEARNING_RATE, Size, batch_of
from benchmarks.jax_worker import training_step
from benchmarks.turns import alternate, seconds_of, spread

OWN, REPLACED = "own", "replaced"
# Largest relative difference of the first loss; low precision rounds in other places.
_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
_TURN_SECONDS = 0.1


def checks(scale: Scale) -> Checks:
    """Returns the checks, by worth."""
    (size, *_) = scale.timed
    return {
        f"{size.name}, {METHOD}, attention of JAX": functools.partial(attention, scale, size),
        "an adapter in one kernel": functools.partial(adapter, scale),
    }


def attention(scale: Scale, size: Size) -> dict[str, Any]:
    """Times a step whose attention is `jax.nn.dot_product_attention` beside one with our own."""
    backbone, model, params = adapted(size)
    model, trained, frozen = in_dtype(model, params, scale.dtype)
    params = cj.merge(trained, frozen)
    labels = cj.label_params(params, model.method)
    batch = batch_of(size, backbone.config.vocab_size, shortest=0.5)
    runs, losses = {}, {}
    for name in (OWN, REPLACED):
        runs[name] = training_step(model, params, labels, batch, size, LEARNING_RATE)
        with switches.library_attention() if name == REPLACED else contextlib.nullcontext():
            losses[name] = float(runs[name]())  # traces
    difference = abs(losses[REPLACED] / losses[OWN] - 1)
    return {
        **_timed(runs, scale.rounds),
        "losses": losses,
        "passed": difference <= _LOSS[scale.dtype],
    }


def adapter(scale: Scale) -> dict[str, Any]:
    """Times the forward pass of one adapter in one kernel beside the products of this package."""
    (size, *_) = scale.timed
    width = size.config["d_model"]
    tokens = 64 if scale.is_toy else size.rows * size.length
    dtype = jnp.dtype(scale.dtype)
    method = cj.preset(METHOD)
    assert isinstance(method, cj.PHMBottleneckConfig)
    given = switches.random_adapter(
        jax.random.key(0), width, method.bottleneck_width(width), method.phm_dim, dtype
    )
    x, skip = (
        jax.random.normal(key, (tokens, width)).astype(dtype)
        for key in jax.random.split(jax.random.key(1))
    )
    interpret = jax.default_backend() == "cpu"
    functions = {
        OWN: functools.partial(switches.plain_adapter, activation=method.non_linearity),
        REPLACED: functools.partial(
            switches.fused_adapter, activation=method.non_linearity, interpret=interpret
        ),
    }
    compiled = {name: jax.jit(function) for name, function in functions.items()}
    found = {name: np.asarray(f(x, skip, given), np.float32) for name, f in compiled.items()}
    distance = float(np.linalg.norm(found[REPLACED] - found[OWN]) / np.linalg.norm(found[OWN]))
    runs = {name: functools.partial(f, x, skip, given) for name, f in compiled.items()}
    return {
        **_timed(runs, scale.rounds),
        "largest_difference": distance,
        "passed": distance <= _LOSS[scale.dtype],
    }


def _timed(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Times functions in turns; the ratio is below 1 where the replacement is faster."""

    def several(run: Callable[[], Any], times: int) -> float:
        def all_of_them() -> None:
            for _ in range(times):
                result = run()
            jax.block_until_ready(result)

        return seconds_of(all_of_them) / times

    once = max(several(run, 1) for run in runs.values())
    times = max(1, round(_TURN_SECONDS / once))
    seconds = alternate({n: functools.partial(several, r, times) for n, r in runs.items()}, rounds)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": spread(np.divide(seconds[REPLACED], seconds[OWN])),
    }
