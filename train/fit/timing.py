"""What a run costs: seconds of a step, memory of the process and of its device."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

# Enough for a median, and little beside a checkpoint.
_KEPT = 1000


class StepClock:
    """Seconds from the end of one step to the end of the next, where nothing was compiled between.

    Attributes:
      seconds: of the last steps.
    """

    def __init__(self, seconds: list[float]):
        self.seconds = seconds
        self._shapes: set[Any] = set()
        self._mark = 0.0
        self._compiled = self._dispatched = False

    def start(self) -> None:
        """What came before is not part of the next step."""
        self._mark = time.perf_counter()

    def dispatched(self, batch: Mapping[str, Any], program: int = 0) -> None:
        """A step has been given to the device; a program's first of its shapes was compiled."""
        self._dispatched = True
        shapes = (program, *(array.shape for array in batch.values()))
        self._compiled |= shapes not in self._shapes
        self._shapes.add(shapes)

    def finished(self) -> float | None:
        """The result of the oldest step under way has been read; returns its seconds.

        None where something was compiled; or where no step was given to the device since the last
        one was finished: a device that computes at once has finished both together.
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
    """JSON-ready, of a process that began its work at `started` of `time.perf_counter`.

    Returns:
      `step_seconds`, the median or None; `seconds`; `peak_memory_bytes` of the process; and
      `peak_device_memory_bytes` where the first device has a memory of its own that it reports on.
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
    """Bytes that this process had resident at most."""
    # Not `ru_maxrss` where it can be helped: on Linux exec does not reset it, so a process starts
    # with what the one had that started it.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
