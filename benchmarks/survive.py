"""Kills a run again and again, resumes it, and compares its adapter with that of one never killed.

The arguments after `--` are flags of `python -m train fit`:

    python -m benchmarks.survive --output-dir runs/survive --kills 10 -- --backbone DIR --task movie
        --train-size 1000 --epochs 2 --checkpoint-steps 5

Every second kill happens while a checkpoint or an adapter is being written, the others at random.
The tests kill at three chosen moments; a release requires ten kills at random.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.report import table

# Slow imports happen once, before the process is forked.
_PRELOADED = ["train.fit.run", "train.fit.job", "transformers", "datasets", "matplotlib.figure"]
_POLL_SECONDS = 0.002
_TIMEOUT_SECONDS = 600
# Aim -> method of the trainer, and the number of its call at which a process kills itself: while
# the previous step is computing, or between two batches of a validation.
_FATAL_CALLS = {"step": ("_dispatch", 9), "evaluation": ("_check_stop", 2)}


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill and its consequences.

    Attributes:
      aimed: "writing", "random", "step" or "evaluation".
      step: the last step in log.csv.
      writing: the names with a temporary suffix that were being written at that moment.
      resumed: the step from which the next run continued; None if from the beginning.
    """

    aimed: str
    step: int
    writing: tuple[str, ...]
    resumed: int | None


def fit(flags: Sequence[str], log: Path, devices: int, cache: Path, aimed: str) -> None:
    """Runs `python -m train fit` in this process, which may kill itself; logs to `log`."""
    others = os.environ.get("XLA_FLAGS", "").split()
    count = "--xla_force_host_platform_device_count"
    own = [flag for flag in others if not flag.startswith(count)]
    os.environ["XLA_FLAGS"] = " ".join([*own, f"{count}={devices}"])
    import jax  # noqa: PLC0415 - looks at the flags when it is first asked for devices

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from train.__main__ import main  # noqa: PLC0415

    if aimed in _FATAL_CALLS:
        _kill_at(*_FATAL_CALLS[aimed])
    with (
        log.open("w", buffering=1) as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        code = main(["fit", *flags])
    sys.exit(code)


def _kill_at(name: str, number: int) -> None:
    """Makes this process kill itself at the n-th call of a method of the trainer."""
    from train.fit import trainer  # noqa: PLC0415

    method, calls = getattr(trainer.Trainer, name), itertools.count(1)

    def fatal(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments, **keywords)

    setattr(trainer.Trainer, name, fatal)


class Runs:
    """Launcher of runs with one or more processes.

    Args:
      folder: the folder of their logs, and of their compilation cache, unless
        JAX_COMPILATION_CACHE_DIR is set.
      processes: the number of processes of each run.
      devices: the number of devices of each process.
    """

    def __init__(self, folder: Path, processes: int, devices: int):
        self.folder, self.processes, self.devices = folder, processes, devices
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._started = 0

    def start(self, flags: Sequence[str], aimed: str = "") -> list[Any]:
        """Starts a run; `aimed` is the kind of kill, if the run is to kill itself."""
        self._started += 1
        hosts: list[list[str]] = [[]]
        if self.processes > 1:
            address = f"localhost:{_free_port()}"
            shared = ["--coordinator-address", address, "--num-processes", str(self.processes)]
            hosts = [[*shared, "--process-id", str(i)] for i in range(self.processes)]
        processes = [
            self._context.Process(
                target=fit,
                args=([*flags, *own], self.log(i), self.devices, self.folder / "compiled", aimed),
            )
            for i, own in enumerate(hosts)
        ]
        for process in processes:
            process.start()
        return processes

    def log(self, process: int = 0) -> Path:
        """Returns the path of the log of a process of the last run."""
        return self.folder / f"run-{self._started}-{process}.log"

    def finish(self, processes: Sequence[Any]) -> None:
        """Waits for a run; raises RuntimeError with its last output if it failed."""
        for i, process in enumerate(processes):
            process.join(_TIMEOUT_SECONDS)
            if process.exitcode != 0:
                kill(processes)
                said = self.log(i).read_text()
                raise RuntimeError(f"process {i} ended with {process.exitcode}: {said[-2000:]}")


def kill(processes: Sequence[Any]) -> None:
    """Sends SIGKILL to all processes."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def survive(
    flags: Sequence[str],
    folder: Path,
    *,
    kills: int,
    processes: int = 1,
    devices: int = 1,
    seed: int,
    aims: Sequence[str] = ("random", "writing"),
) -> list[Kill]:
    """Kills a run, resumes it until it ends, and compares it with one never killed.

    Args:
      flags: the flags of `fit`, without `--output-dir`.
      folder: the folder of both runs; it must not exist.
      kills: the number of kills.
      processes: the number of processes that train together.
      devices: the number of emulated devices of each process.
      seed: the seed of the moments.
      aims: the aims of the kills, repeated cyclically.

    Returns:
      The kills.

    Raises:
      RuntimeError: if a run fails, or ends with other bytes or other numbers.
    """
    folder.mkdir(parents=True)
    runs, generator = Runs(folder, processes, devices), random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    runs.finish(runs.start([*flags, "--output-dir", str(whole)]))
    steps = last_step(whole)
    done: list[Kill] = []
    own = [*flags, "--output-dir", str(killed), "--resume"]
    for i in range(kills):
        aimed = aims[i % len(aims)]
        running = runs.start(own, aimed)
        # In order, and before the end, so that the run is still active at every kill.
        step = round(0.9 * steps * generator.uniform(i, i + 1) / kills)
        _wait(running, runs, killed, step, aimed, generator.uniform(0, 0.2))
        kill(running)
        resumed = _resumed(runs.log())
        if done:
            done[-1] = dataclasses.replace(done[-1], resumed=resumed)
        done.append(Kill(aimed, last_step(killed), tuple(_unfinished(killed)), None))
    runs.finish(runs.start(own))
    if done:
        done[-1] = dataclasses.replace(done[-1], resumed=_resumed(runs.log()))
    _compare(whole, killed)
    return done


def _wait(
    processes: Sequence[Any], runs: Runs, folder: Path, step: int, aimed: str, seconds: float
) -> None:
    """Waits until a run has done `step` and is due to be killed, or until it killed itself."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    own = aimed in _FATAL_CALLS
    while (
        own or last_step(folder) < step or (aimed == "writing" and not _caught(processes, folder))
    ):
        if any(process.exitcode == 0 for process in processes):
            return  # the last step: the run is over
        if own and all(process.exitcode == -signal.SIGKILL for process in processes):
            return
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            kill(processes)
            raise RuntimeError(f"no step {step} in {folder}: {runs.log().read_text()[-2000:]}")
        time.sleep(_POLL_SECONDS)
    if aimed == "random":
        time.sleep(seconds)


def _caught(processes: Sequence[Any], folder: Path) -> bool:
    """Stops processes while they write; returns True if they had not finished writing."""
    if not _unfinished(folder):
        return False
    _send(processes, signal.SIGSTOP)
    if _unfinished(folder):
        return True
    _send(processes, signal.SIGCONT)
    return False


def _send(processes: Sequence[Any], signal_number: int) -> None:
    """Sends a signal to all processes that still run."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal_number)


def last_step(folder: Path) -> int:
    """Returns the last step of a run that has a checkpoint; 0 if there is none."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _unfinished(folder: Path) -> list[str]:
    """Returns the names that are being written."""
    found = [*folder.glob("checkpoints/*tmp*"), *folder.glob("adapter/*tmp*")]
    return sorted(str(path.relative_to(folder)).partition(".")[0] for path in found)


def _resumed(log: Path) -> int | None:
    """Returns the step from which a run says that it resumed; None without one."""
    for line in log.read_text().splitlines():
        if line.startswith("resumed at step "):
            return int(line.split()[3].rstrip(","))
    return None


def _compare(whole: Path, killed: Path) -> None:
    """Raises RuntimeError unless adapters, metrics and steps are the same."""
    names = sorted(path.name for path in (whole / "adapter").iterdir())
    for name in names:
        if (whole / "adapter" / name).read_bytes() != (killed / "adapter" / name).read_bytes():
            raise RuntimeError(f"adapter/{name} of {killed} differs from that of {whole}")
    left, right = map(_numbers, (whole, killed))
    if left != right:
        raise RuntimeError(f"the results of {killed} differ: {left} and {right}")


def _numbers(folder: Path) -> dict[str, Any]:
    """Returns all results of a run that do not depend on the clock."""
    result = json.loads((folder / "metrics.json").read_text())
    del result["measured"]
    for record in result["history"]:
        del record["examples_per_second"]
    rows = [line.split(",")[:4] for line in (folder / "log.csv").read_text().splitlines()]
    return {**result, "log": rows}


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def as_table(kills: Sequence[Kill]) -> str:
    """Returns the kills as a table in Markdown."""
    rows = [
        [
            str(i),
            kill.aimed,
            str(kill.step),
            ", ".join(kill.writing) or "-",
            "the beginning" if kill.resumed is None else str(kill.resumed),
        ]
        for i, kill in enumerate(kills, 1)
    ]
    return table(["kill", "aimed", "last checkpoint", "being written", "resumed at"], rows)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="emulated ones of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("fit", nargs="+", help="flags of fit")
    given = parser.parse_args()
    kills = survive(
        given.fit,
        given.output_dir,
        kills=given.kills,
        processes=given.processes,
        devices=given.devices,
        seed=given.seed,
    )
    print(as_table(kills))
    print("the adapter is that of a run never killed, byte for byte, and so is its log")


if __name__ == "__main__":
    main()
