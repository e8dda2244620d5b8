"""Measurements in turns, so that a busy machine slows all contenders alike.

Contenders that run in their own processes communicate over pipes in lines of JSON: the measuring
process asks (`Worker`), the others answer (`serve`) and sleep between their turns.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

ROOT = Path(__file__).parents[1]
# Idle threads of a pool spin for a few milliseconds before they sleep.
_PAUSE = 0.03
_STATUS = Path("/proc/self/status")

T = TypeVar("T")


# --- in one process -----------------------------------------------------------------------------


def alternate(
    runs: Mapping[str, Callable[[], T]], repeats: int, pause: float = 0.0
) -> dict[str, list[T]]:
    """Runs several functions in turns and returns all their results.

    The order changes, so that a drift favours none of them.

    Args:
      runs: name -> function.
      repeats: the number of calls of each.
      pause: the seconds before each call.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(repeats):
        first = i % len(names)
        for name in (*names[first:], *names[:first]):
            time.sleep(pause)
            results[name].append(runs[name]())
    return results


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Returns minimum, quartiles, median and maximum."""
    names = ("lowest", "first_quartile", "median", "third_quartile", "highest")
    return dict(zip(names, np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist(), strict=True))


def noise(values: Sequence[float] | np.ndarray) -> float:
    """Returns the interquartile range relative to the median."""
    found = spread(values)
    return (found["third_quartile"] - found["first_quartile"]) / found["median"]


def processor() -> str:
    """Returns the operating system's name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- the process that measures ------------------------------------------------------------------


class WorkerError(RuntimeError):
    """Failure of a worker; the message has its output."""


class Worker:
    """Process that answers requests and sleeps in between; a context manager.

    Args:
      name: the name in messages.
      module: the module to run with `python -m`, which calls `serve`.
      threads: the number of threads of its pools, and of its processors; None leaves both as they
        are.
      environment: variables in addition to those of this process.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *,
        threads: int | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **_thread_variables(threads), **(environment or {})},
            cwd=ROOT,
        )
        if threads is not None and hasattr(os, "sched_setaffinity"):
            # Set before the process has threads, which inherit it.
            os.sched_setaffinity(self._process.pid, processors(threads))

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer to a request.

        Raises:
          WorkerError: if the worker could not answer, or has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has ended
            self._process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            written = "".join(self._errors.readlines()[-20:])
            raise WorkerError(f"{self.name} ended with code {code} at {action!r}:\n{written}")
        return _checked(self.name, action, json.loads(line))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # it has no state to clean up
        self._process.communicate()
        self._errors.close()


class InProcess:
    """Stand-in for a `Worker` that answers in this process, where times mean nothing.

    Args:
      name: the name in messages.
      actions: those of `Answers`.
    """

    def __init__(self, name: str, actions: Mapping[str, Callable[..., Any]]):
        self.name = name
        self._answers = Answers(actions)

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer to a request; raises WorkerError if there is none."""
        return _checked(self.name, action, self._answers(action, **arguments))

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        """Has nothing to end."""


def _checked(name: str, action: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Returns an answer; raises WorkerError if it has an error."""
    if "error" in answer:
        raise WorkerError(f"{name} failed at {action!r}: {answer['error']}")
    return answer


def processors(threads: int) -> list[int]:
    """Returns `threads` of the processors that this process may use, or all if there are fewer."""
    return sorted(os.sched_getaffinity(0))[:threads]


def _thread_variables(threads: int | None) -> dict[str, str]:
    """Returns variables of OpenMP and BLAS libraries, and NPROC, XLA's number of processors."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
    return {} if threads is None else dict.fromkeys(names, str(threads))


def take_turns(
    workers: Sequence[Worker | InProcess], repeats: int, times: int
) -> dict[str, list[dict[str, Any]]]:
    """Asks each worker to "run", in turns; a turn runs the work once untimed, and `times` times.

    While a process waits for its turn, a virtual machine may return the memory that the process
    freed to the host; to get it back takes up to a third of a training step. A training loop does
    not wait between steps, so that this is no part of what it takes.
    """
    asked = {
        worker.name: lambda worker=worker: worker.ask("run", times=times, untimed=1)
        for worker in workers
    }
    return alternate(asked, repeats, _PAUSE)


# --- the processes that are measured ------------------------------------------------------------


class Work(NamedTuple):
    """Work that a worker has prepared.

    Attributes:
      run: a function that starts the work once; its result may still be computing.
      wait: a function that waits until a result is computed.
      value: a function that converts a result for JSON.
      trained: the number of trained parameters.
      platform: the platform, "cpu" or "gpu".
      device_peak: a function that returns the peak allocation in bytes of a device with its own
        memory; None without one.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    value: Callable[[Any], Any]
    trained: int
    platform: str
    device_peak: Callable[[], int | None]


class Answers:
    """Answers to requests, which may refer to the work that an earlier one prepared.

    Args:
      actions: name -> function of a request's arguments. It returns a dict for JSON, or a `Work`,
        which the following requests "run", "start_peak" and "memory" refer to.
    """

    def __init__(self, actions: Mapping[str, Callable[..., Any]]):
        self._actions = actions
        self._work: Work | None = None

    def __call__(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer to a request; after a failure it has its "error"."""
        try:
            if action not in self._actions:
                return _OF_WORK[action](self._work, **arguments)
            start = time.perf_counter()
            answer = self._actions[action](**arguments)
            if isinstance(answer, Work):
                self._work = answer
                answer = {"trained": answer.trained, "platform": answer.platform}
            return {**answer, "seconds": time.perf_counter() - start}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}


def serve(actions: Mapping[str, Callable[..., Any]]) -> None:
    """Answers requests on standard input until it is closed; `actions` are those of `Answers`."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not an answer
    answers = Answers(actions)
    for line in sys.stdin:
        print(json.dumps(answers(**json.loads(line))), file=channel, flush=True)


def _run(work: Work, times: int, untimed: int = 0) -> dict[str, Any]:
    for _ in range(untimed):
        work.wait(work.run())
    start, cpu_start = time.perf_counter(), time.process_time()
    in_kernel = os.times().system
    for _ in range(times):
        result = work.run()
    work.wait(result)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "seconds": seconds / times,
        "cpu_seconds": cpu / times,
        "kernel_seconds": (os.times().system - in_kernel) / times,
        "value": work.value(result),
    }


def _start_peak(work: Work) -> dict[str, Any]:
    peak = peak_memory()
    # Memory that libraries freed after loading does not count towards the work.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return {"peak_before": peak, "resident_before": peak_memory()}


def _memory(work: Work) -> dict[str, Any]:
    return {"peak": peak_memory(), "device_peak": work.device_peak()}


_OF_WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "run": _run,
    "start_peak": _start_peak,
    "memory": _memory,
}


def peak_memory() -> int | None:
    """Returns the peak resident bytes of this process since "start_peak"; None if not on Linux."""
    if not _STATUS.exists():
        return None
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return 1024 * int(fields["VmHWM"].split()[0])
