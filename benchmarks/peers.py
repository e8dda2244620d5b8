"""Comparison of this package with the libraries for PyTorch on the same work, in turns.

    python -m benchmarks.peers                                # every case, about two hours
    python -m benchmarks.peers --case minilm/compacter++/step --case "t5-*/lora/*" --json peers.json
    python -m benchmarks.peers --case "t5-base/*/step" --rows 64 --threads 0       # on a GPU

A case is SIZE/METHOD/WORK: a training step (AdamW), a forward pass, or greedy generation. The peers
are transformers for full fine-tuning, PEFT for LoRA and AdapterHub's `adapters` for the other
methods; on a GPU, each is also compiled by torch.compile. Every side runs in its own process, new
for each case, with the same number of threads and processors. The sides take turns, and sleep in
between.

All sides get the same random weights, adapter and batch, and no dropout. All ask for huge pages, as
`python -m train` does on Linux. First a check makes sure that they do the same: they train equally
many parameters, and their losses agree to TOLERANCES (for a step the losses of several updates; for
generation the tokens). A disagreement is an error.

A ratio is this package's seconds divided by the peer's in the same round, below 1 where this
package is faster; its median and quartiles are printed. "memory" is the peak resident memory of a
process during the timed runs (on a GPU: the peak allocation since its start), libraries and weights
included. "first" is the first call, which compiles. "noise" is the interquartile range of the
seconds relative to their median, for the side where it is larger.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import plot_peers
from benchmarks.contest import GENERATED, Size, Task, choose, command, write
from benchmarks.turns import (
    InProcess,
    Worker,
    WorkerError,
    noise,
    processor,
    spread,
    take_turns,
)
from train.cli import huge_pages

OURS = "compacter_jax"
_PEERS = {"full": "transformers", "lora": "peft"}  # `adapters` for the other methods
COMPILED = "torch.compile"
# Largest relative difference from the peer of the first loss, and of the losses after updates;
# smallest fraction of equal generated tokens. Random weights in bfloat16 give other tokens.
TOLERANCES = {
    "float32": {"loss": 1e-4, "later losses": 1e-3, "tokens": 0.9},
    "bfloat16": {"loss": 2e-2, "later losses": 5e-2, "tokens": 0.0},
}
_WARM_UPS = 3
# Minimum seconds of a turn: on a GPU a step takes milliseconds, so that a turn has several.
_TURN_SECONDS = 0.1
_VERSIONS = ("jax", "flax", "optax", "torch", "transformers", "adapters", "peft")
_ENVIRONMENT = {
    # No cached compilation, no preallocated memory, no requests to the hub, no warnings.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Attributes:
      repeats: the number of rounds after the warm-up.
      threads: the number of threads of each side; None leaves the defaults of the libraries.
      dtypes: the dtypes of the computation.
      compiled: whether to measure compiled peers, too; None does on a GPU.
      shortest: the fraction of `benchmarks.contest.Task.shortest`.
      generated: the number of generated tokens.
      beside: whether to measure the peers.
      alone: whether to measure this package where the peer cannot be measured, instead of failing.
      method_changes: method -> changed fields of its preset.
      in_process: whether this package runs in the measuring process where no peer is beside it, and
        writes its inputs there: for a rehearsal.
    """

    repeats: int = 15
    threads: int | None = 2
    dtypes: tuple[str, ...] | None = None
    compiled: bool | None = None
    shortest: float = 1.0
    generated: int = GENERATED
    beside: bool = True
    alone: bool = False
    method_changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    in_process: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurements, prints a row for each case, and writes JSON and a figure if requested.

    Raises:
      SystemExit: if no case matches, or two sides do not do the same; the message says why.
    """
    options = _parser().parse_args(arguments)
    settings = Settings(
        repeats=options.repeats,
        threads=options.threads or None,
        dtypes=tuple(TOLERANCES) if options.dtype == "both" else options.dtype and (options.dtype,),
        compiled={"auto": None, "on": True, "off": False}[options.torch_compile],
        shortest=options.shortest,
    )
    report: dict[str, Any] = {"settings": dataclasses.asdict(settings), "machine": _machine()}
    report["settings"]["rows"] = options.rows
    report["cases"] = []
    try:
        cases = choose(options.case)
        print(_heading(report["machine"], settings))
        for case in measure(cases, settings, rows=options.rows):
            report["cases"].append(case)
            print(_row(case), flush=True)
            write(options.json, report)  # results are written after every case
    except (ValueError, WorkerError) as error:
        sys.exit(f"error: {error}")
    if options.plot:
        plot_peers.plot(report, Path(options.plot))


# --- measuring ----------------------------------------------------------------------------------


class Inputs:
    """Backbones and adapters of cases, each written once into a folder.

    Args:
      folder: the folder, which exists.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._platforms: dict[str, str] = {}

    def written(
        self, size: Size, method: str, settings: Settings
    ) -> tuple[Path, tuple[str, str] | tuple[None, None], str]:
        """Writes what is missing of a case, in one process that then ends and frees its memory.

        Returns:
          The folder of the backbone; the folders of one adapter, in our format and the peer's, or
          twice None for full fine-tuning; the platform of JAX.
        """
        backbone = self._folder / size.name
        ours, theirs = (f"{backbone}-{method}-{side}" for side in ("ours", "peer"))
        lacks_adapter = method != "full" and not Path(ours).exists()
        if size.name not in self._platforms or lacks_adapter:
            with _worker(OURS, settings) as worker:
                if size.name not in self._platforms:
                    wanted = {"size": dataclasses.asdict(size), "folder": str(backbone)}
                    answer = worker.ask("write_backbone", **wanted)
                    self._platforms[size.name] = answer["platform"]
                if lacks_adapter:
                    changes = dict(settings.method_changes.get(method, {}))
                    names = {"folder": str(backbone), "method": method}
                    names |= {"ours": ours, "peers": theirs}
                    worker.ask("write_adapter", changes=changes, **names)
        adapters = (None, None) if method == "full" else (ours, theirs)
        return backbone, adapters, self._platforms[size.name]


def measure(
    cases: Sequence[tuple[Size, str, str]],
    settings: Settings,
    rows: int | None = None,
    inputs: Inputs | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures cases one after the other.

    Args:
      cases: size, method and work of each case.
      settings: the settings of all cases.
      rows: the number of rows of the batches, in place of each size's own.
      inputs: backbones and adapters to share with other calls; by default they are removed at the
        end.

    Yields:
      The result of `_compare` for each case and dtype.

    Raises:
      ValueError: if two sides do not do the same.
      WorkerError: if this package, or a peer that is not compiled, fails.
    """
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        inputs = inputs or Inputs(Path(folder))
        for size, method, work in cases:
            if rows is not None:
                size = dataclasses.replace(size, rows=rows)  # noqa: PLW2901
            backbone, (ours, theirs), platform = inputs.written(size, method, settings)
            on_gpu = platform != "cpu"
            dtypes = settings.dtypes or (("float32", "bfloat16") if on_gpu else ("float32",))
            for dtype in dtypes:
                task = Task(
                    *(size, method, work, str(backbone), ours, dtype, settings.shortest),
                    generated=settings.generated,
                )
                compiled = on_gpu if settings.compiled is None else settings.compiled
                yield _compare(task, theirs, settings, compiled)


def _worker(name: str, settings: Settings) -> Worker | InProcess:
    if settings.in_process and name == OURS:
        from benchmarks import jax_worker  # noqa: PLC0415 - the measuring process needs no JAX

        return InProcess(name, jax_worker.ACTIONS)
    module = "benchmarks.jax_worker" if name == OURS else "benchmarks.torch_worker"
    # This package needs no PyTorch, which transformers would otherwise load. The peers do, even if
    # the measuring process was started without.
    environment = _ENVIRONMENT | huge_pages.environment()
    environment["USE_TORCH"] = "0" if name == OURS else "1"
    return Worker(name, module, threads=settings.threads, environment=environment)


def _compare(
    task: Task, peers_adapter: str | None, settings: Settings, compiled: bool
) -> dict[str, Any]:
    """Returns the result of one case, JSON-ready: times and memory of each side, and the ratios."""
    peer = _PEERS.get(task.method, "adapters")
    of_peer = dataclasses.replace(task, adapter=peers_adapter)
    tasks = {OURS: task}
    settings = dataclasses.replace(settings, in_process=settings.in_process and not settings.beside)
    if settings.beside:
        tasks[peer] = of_peer
    if settings.beside and compiled:
        tasks[f"{peer}, {COMPILED}"] = dataclasses.replace(of_peer, compiled=True)
    sides: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name, of_side in tasks.items():
            worker = stack.enter_context(_worker(name, settings))
            try:
                sides[name] = _prepared(worker, of_side)
            except WorkerError as error:
                if name == OURS or not (of_side.compiled or settings.alone):
                    raise
                failures[name] = str(error)  # a failure of torch.compile is a result, too
                continue
            if name != OURS:
                check_same(task, sides[OURS], sides[name], name)
            workers.append(worker)
        for worker in workers:
            sides[worker.name] |= worker.ask("start_peak")
        fastest = min(min(side["warm_up_seconds"]) for side in sides.values())
        times = math.ceil(_TURN_SECONDS / fastest)
        for name, answers in take_turns(workers, settings.repeats, times).items():
            sides[name] |= _timed(answers)
        for worker in workers:
            sides[worker.name] |= worker.ask("memory")
    peers = [name for name in sides if name != OURS]
    return {
        "case": f"{task.size.name}/{task.method}/{task.work}",
        "size": dataclasses.asdict(task.size),
        "dtype": task.dtype,
        "runs_per_turn": times,
        "sides": sides,
        "ratios": {name: _ratios(sides[OURS], sides[name]) for name in peers},
        "failures": failures,
    }


def _prepared(worker: Worker | InProcess, task: Task) -> dict[str, Any]:
    """Loads the task and runs it until it is warm."""
    prepared = worker.ask("prepare", task=dataclasses.asdict(task))
    first, *others = [worker.ask("run", times=1) for _ in range(1 + _WARM_UPS)]
    return {
        "trained": prepared["trained"],
        "platform": prepared["platform"],
        "load_seconds": prepared["seconds"],
        "first_call_seconds": first["seconds"],
        "warm_up_seconds": [answer["seconds"] for answer in others],
        "values": [answer["value"] for answer in (first, *others)],
    }


def _timed(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("seconds", "cpu_seconds", "kernel_seconds")
    columns = {name: [answer[name] for answer in answers] for name in names}
    medians = {f"median_{name}": float(np.median(values)) for name, values in columns.items()}
    return {**columns, **medians, "noise": noise(columns["seconds"])}


def _ratios(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ratios to the peer: spreads over neighbouring runs, and of peak memory."""
    ratios: dict[str, Any] = {
        name: spread(np.divide(ours[name], peer[name])) for name in ("seconds", "cpu_seconds")
    }
    kind = "device_peak" if ours["device_peak"] else "peak"
    if ours[kind] and peer[kind]:
        ratios["memory"] = ours[kind] / peer[kind]
    return ratios


def check_same(task: Task, ours: Mapping[str, Any], peer: Mapping[str, Any], name: str) -> None:
    """Checks that two sides do the same.

    Args:
      task: the task of both.
      ours: "platform", "trained" and "values" of this package's first runs.
      peer: "platform", "trained" and "values" of the peer's first runs.
      name: the name of the peer.

    Raises:
      ValueError: if they do not; the message has the difference.
    """
    case = f"{task.size.name}/{task.method}/{task.work} in {task.dtype}"
    tolerances = TOLERANCES[task.dtype]
    for what in ("platform", "trained"):
        if ours[what] != peer[what]:
            meaning = {"platform": "runs on", "trained": "trains"}[what]
            raise ValueError(
                f"{case}: {OURS} {meaning} {ours[what]} and {name} {peer[what]}; they must be equal"
            )
    if task.work == "generate":
        own, others = np.asarray(ours["values"][0]), np.asarray(peer["values"][0])
        same = float(np.mean(own == others)) if own.shape == others.shape else 0.0
        if own.shape != others.shape or same < tolerances["tokens"]:
            raise ValueError(
                f"{case}: {OURS} generates {own.shape} tokens and {name} {others.shape}, of which "
                f"{same:.1%} are equal; at least {tolerances['tokens']:.0%} must be"
            )
        return
    for i, (own, others) in enumerate(zip(ours["values"], peer["values"], strict=True)):
        tolerance = tolerances["later losses" if i and task.work == "step" else "loss"]
        if not abs(own - others) <= tolerance * abs(others):
            when = f"after {i} updates" if task.work == "step" else "of the logits"
            raise ValueError(
                f"{case}: the loss {when} is {own:.7g} in {OURS} and {others:.7g} in {name}; they "
                f"may differ by {tolerance:.0e} of it"
            )


# --- what is printed ----------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_before": os.getloadavg()[0],
        "huge_pages": bool(huge_pages.environment()),
        "versions": found,
    }


_COLUMNS = "{:<36}{:>18}{:>18}{:>22}{:>8}{:>16}{:>8}{:>14}{:>8}"


def _heading(machine: Mapping[str, Any], settings: Settings) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f"{settings.threads} threads" if settings.threads else "threads as they come"
    columns = _COLUMNS.format(
        *("case, peer", "seconds", "CPU seconds", "ratio (quartiles)", "CPU"),
        *("memory, MB", "ratio", "first, s", "noise"),
    )
    return (
        f"{machine['processor']}, {machine['processors']} processors, load "
        f"{machine['load_before']:.1f}; {versions}\n"
        f"{threads} on each side, median of {settings.repeats} rounds; in pairs: ours, the peer's\n"
        f"{columns}"
    )


def _row(case: Mapping[str, Any]) -> str:
    """Returns a line for each peer."""
    lines = [f"{case['case']} {case['dtype']}, {name}: {text}" for name, text in _failed(case)]
    ours = case["sides"][OURS]
    memory = "device_peak" if ours["device_peak"] else "peak"
    for name, ratio in case["ratios"].items():
        peer, seconds = case["sides"][name], ratio["seconds"]
        dtype = "" if case["dtype"] == "float32" else f" {case['dtype']}"
        pairs = [
            f"{ours[column]:.4g} {peer[column]:.4g}"
            for column in ("median_seconds", "median_cpu_seconds")
        ]
        measured = "memory" in ratio
        cells = [
            f"{case['case']}{dtype}, {name}",
            *pairs,
            f"{seconds['median']:.3f} "
            f"({seconds['first_quartile']:.3f}-{seconds['third_quartile']:.3f})",
            f"{ratio['cpu_seconds']['median']:.3f}",
            f"{ours[memory] / 1e6:,.0f} {peer[memory] / 1e6:,.0f}" if measured else "",
            f"{ratio['memory']:.3f}" if measured else "",
            f"{ours['first_call_seconds']:.1f} {peer['first_call_seconds']:.1f}",
            f"{max(ours['noise'], peer['noise']):.1%}",
        ]
        lines.append(_COLUMNS.format(*cells))
    return "\n".join(lines)


def _failed(case: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, text.splitlines()[0]) for name, text in case["failures"].items()]


def _parser() -> argparse.ArgumentParser:
    parser = command("benchmarks.peers", __doc__)
    parser.add_argument("--threads", type=int, default=2, help="of each side; 0: as they come")
    parser.add_argument("--dtype", choices=[*TOLERANCES, "both"], help="on a GPU: both")
    parser.add_argument("--torch-compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--shortest", type=float, default=1.0, help="row, as part of the longest")
    parser.add_argument("--plot", metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
