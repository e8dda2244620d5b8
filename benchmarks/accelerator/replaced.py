"""Checks of section `fast` that time this package with one of its parts replaced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compacter_jax as cj
from benchmarks.accelerator import scanned, switches
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
# Parts of the words of T5, 32,128, and of the toy, 256.
_PARTS = 8


def checks(scale: Scale) -> Checks:
    """Returns the checks, by worth."""
    (size, *_) = scale.timed
    few, many = size.rows * size.target_length, size.rows * size.length
    return {
        f"{size.name}, {METHOD}, attention of JAX": functools.partial(attention, scale, size),
        "an adapter in one kernel": functools.partial(adapter, scale),
        "a scan over layers": functools.partial(layers, scale),
        f"cross-entropy of {few} tokens in parts": functools.partial(words, scale, few),
        f"cross-entropy of {many} tokens in parts": functools.partial(words, scale, many),
        "batches on the device ahead of the step": functools.partial(placed_ahead, scale, size),
    }


def attention(scale: Scale, size: Size) -> dict[str, Any]:
    """Times a step whose attention is `jax.nn.dot_product_attention` beside one with our own."""
    model, params, labels, batch = _prepared(size, scale.dtype)
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


def layers(scale: Scale) -> dict[str, Any]:
    """Times a step, and its first call, of a BERT that scans over its layers beside a loop."""
    size = scale.bank
    if scale.is_toy:  # its only layer is the last, which is not scanned
        deeper = {**size.config, "num_hidden_layers": 3}
        size = dataclasses.replace(size, name="deeper tiny bert", config=deeper)
    model, params, labels, batch = _prepared(size, scale.dtype)
    trees = {
        OWN: (params, labels),
        REPLACED: (
            scanned.stack_layers(params),
            scanned.stack_layers(labels, stack=lambda names: names[0]),
        ),
    }
    runs, losses, first_calls = {}, {}, {}
    for name, tree in trees.items():
        runs[name] = training_step(model, *tree, batch, size, LEARNING_RATE)
        with scanned.scanned_layers() if name == REPLACED else contextlib.nullcontext():
            start = time.perf_counter()
            first = float(runs[name]())
            first_calls[name] = time.perf_counter() - start
        losses[name] = [first, float(runs[name]())]
    difference = float(np.max(np.abs(np.divide(losses[REPLACED], losses[OWN]) - 1)))
    return {
        **_timed(runs, scale.rounds),
        "first_call_seconds": first_calls,
        "losses": losses,
        "passed": difference <= _LOSS[scale.dtype],
    }


def words(scale: Scale, tokens: int) -> dict[str, Any]:
    """Times losses of words with their gradient, the logits in parts beside all at once."""
    (size, *_) = scale.timed
    width, count = size.config["d_model"], size.config.get("vocab_size", 32128)
    dtype = jnp.dtype(scale.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.random.normal(keys[0], (tokens, width)).astype(dtype)
    table = (jax.random.normal(keys[1], (count, width)) / width**0.5).astype(dtype)
    labels = jax.random.randint(keys[2], (tokens,), 0, count)
    functions: dict[str, Callable[..., Any]] = {
        OWN: switches.plain_cross_entropy,
        REPLACED: functools.partial(switches.cross_entropy_in_parts, parts=_PARTS),
    }

    def gradient_of(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda *given: function(*given).mean())

    compiled = {
        name: jax.jit(gradient_of(function)).lower(states, table, labels).compile()
        for name, function in functions.items()
    }
    runs = {name: functools.partial(f, states, table, labels) for name, f in compiled.items()}
    (loss, gradient), (own_loss, own_gradient) = (
        jax.tree.map(lambda x: np.asarray(x, np.float32), runs[name]()) for name in (REPLACED, OWN)
    )
    distance = float(np.linalg.norm(gradient - own_gradient) / np.linalg.norm(own_gradient))
    difference = max(float(abs(loss / own_loss - 1)), distance)
    memory: dict[str, Any] = {name: f.memory_analysis() for name, f in compiled.items()}
    return {
        **_timed(runs, scale.rounds),
        "temporary_bytes": {name: found.temp_size_in_bytes for name, found in memory.items()},
        "largest_difference": difference,
        "passed": difference <= _LOSS[scale.dtype],
    }


def placed_ahead(scale: Scale, size: Size) -> dict[str, Any]:
    """Times a step whose batch was put on the device before it beside one that puts its own."""
    model, params, labels, batch = _prepared(size, scale.dtype)
    ready = jax.device_put(batch)
    own, step = (
        training_step(model, params, labels, given, size, LEARNING_RATE) for given in (batch, ready)
    )

    def ahead() -> Any:
        loss = step()
        ready.update(jax.device_put(batch))  # while the step is computing
        return loss

    runs = {OWN: own, REPLACED: ahead}
    losses = {name: float(run()) for name, run in runs.items()}
    return {
        **_timed(runs, scale.rounds),
        "losses": losses,
        "passed": losses[OWN] == losses[REPLACED],
    }


def _prepared(size: Size, dtype: str) -> tuple[cj.Adapted, Any, Any, dict[str, np.ndarray]]:
    """Returns a model that computes in a dtype, its parameters, their labels and a batch."""
    backbone, model, params = adapted(size)
    model, trained, frozen = in_dtype(model, params, dtype)
    params = cj.merge(trained, frozen)
    labels = cj.label_params(params, model.method)
    return model, params, labels, batch_of(size, backbone.config.vocab_size, shortest=0.5)


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
