"""Section `why`: the kernels that a step spends its time in, from a trace of the profiler."""

from __future__ import annotations

import collections
import functools
import gzip
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

import compacter_jax as cj
from benchmarks.accelerator.programs import METHOD, adapted, in_dtype
from benchmarks.accelerator.scale import Scale
from benchmarks.accelerator.section import Checks
from benchmarks.contest import LEARNING_RATE, Size, batch_of
from benchmarks.jax_worker import training_step

_STEPS = 3
_LONGEST = 10


def checks(scale: Scale) -> Checks:
    """Returns the checks of this section."""
    return {
        f"{size.name}, {METHOD}": functools.partial(kernels_of_step, size, scale.dtype)
        for size in scale.timed
    }


def kernels_of_step(size: Size, dtype: str) -> dict[str, Any]:
    """Traces some steps; returns the longest kernels and their share of all kernels' time."""
    backbone, model, params = adapted(size)
    model, trained, frozen = in_dtype(model, params, dtype)
    params = cj.merge(trained, frozen)
    labels = cj.label_params(params, model.method)
    batch = batch_of(size, backbone.config.vocab_size)
    run = training_step(model, params, labels, batch, size, LEARNING_RATE)
    for _ in range(2):
        jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_STEPS):
                jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    return {"steps": _STEPS, **longest(events)}


def longest(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Reduces the events of a trace to the longest kernels.

    On a GPU these are the events of the device's streams. On a CPU they are those of operations of
    a compiled program.

    Args:
      events: events in the trace event format, with times in microseconds.

    Returns:
      "kernel_seconds" of all kernels, and "kernels": name, count, seconds and share of the longest,
      in descending order.
    """
    events = list(events)
    named = [event for event in events if event.get("ph") == "M"]
    devices = {
        event["pid"]
        for event in named
        if event["name"] == "process_name" and "/device:" in event["args"]["name"]
    }
    streams = {
        (event["pid"], event["tid"])
        for event in named
        if event["name"] == "thread_name" and event["args"]["name"].startswith("Stream")
    }

    def on_a_stream(event: Mapping[str, Any]) -> bool:
        return event["pid"] in devices and (event["pid"], event["tid"]) in streams

    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    kernels = [event for event in timed if on_a_stream(event)]
    kernels = kernels or [event for event in timed if "hlo_op" in event.get("args", {})]
    seconds: collections.Counter[str] = collections.Counter()
    for event in kernels:
        seconds[event["name"]] += event["dur"] / 1e6
    counts = collections.Counter(event["name"] for event in kernels)
    total = sum(seconds.values())
    return {
        "kernel_seconds": total,
        "kernels": [
            {"name": name, "count": counts[name], "seconds": taken, "share": taken / total}
            for name, taken in seconds.most_common(_LONGEST)
        ],
    }
