"""Cost of a run: seconds per step, and memory of the process and of its device."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

# Enough for a median, and small compared with a checkpoint.
_KEPT = 1000


class StepClock:
    """Clock of the seconds between the ends of two steps, if nothing was compiled between them.

    Attributes:
      seconds: the durations of the most recent steps.
    """

    def __init__(self, seconds: list[float]):
        self.seconds = seconds
        self._shapes: set[Any] = set()
        self._mark = 0.0
        self._compiled = self._dispatched = False

    def start(self) -> None:
        """Starts the clock: earlier time does not count towards the next step."""
        self._mark = time.perf_counter()

    def dispatched(self, batch: Mapping[str, Any], program: int = 0) -> None:
        """Notes that a step was handed to the device.

        The first step of a program with new shapes is compiled, and not timed.
        """
        self._dispatched = True
        shapes = (program, *(array.shape for array in batch.values()))
        self._compiled |= shapes not in self._shapes
        self._shapes.add(shapes)

    def finished(self) -> float | None:
        """Notes that the result of the oldest pending step was read; returns its seconds or None.

        The result is None if something was compiled. It is also None if no step was dispatched
        since the last call: a device that computes synchronously has then finished both steps
        together.
        """
        now = time.perf_counter()
        seconds = now - self._mark if self._dispatched and not self._compiled else None
        if seconds is not None:
            self.seconds.append(seconds)
            del self.seconds[:-_KEPT]
        self._compiled = self._dispatched = False
        self._mark = now
        return seconds


def cost(step_seconds: list[float], started: float) -> dict[str, Any]:
    """Returns the cost of a run, JSON-ready.

    Args:
      step_seconds: the seconds of single steps.
      started: the start of the process's work, as `time.perf_counter` gives it.

    Returns:
      `step_seconds`, the median or None; `seconds`; `peak_memory_bytes` of the process; and
      `peak_device_memory_bytes` if the first device has its own memory and reports it.
    """
    values: dict[str, Any] = {
        "step_seconds": statistics.median(step_seconds) if step_seconds else None,
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
    }
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        values["peak_device_memory_bytes"] = stats["peak_bytes_in_use"]
    return values


def peak_memory() -> int:
    """Returns the peak resident memory of this process in bytes."""
    # VmHWM instead of `ru_maxrss` where there is one: on Linux exec does not reset the latter, so
    # that a process inherits the peak of its parent.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
