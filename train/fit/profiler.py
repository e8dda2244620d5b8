"""Profiler: a trace of a few steps of a run, for Perfetto, or for TensorBoard with xprof."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

import jax

from train.compute import distributed

PROFILE_NAME = "profile"
# The first steps compile, and fill the caches.
_LEFT_OUT, _TRACED = 10, 5


class Profiler:
    """Trace of steps 11 to 15 of the first process, written into a folder; a context manager.

    Args:
      folder: the folder of the run, in which `profile` is created; None disables the trace.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder if distributed.is_first() else None
        self._begun = 0
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()
        elif self._folder is not None and self._begun <= _LEFT_OUT:
            print(
                f"no profile was written: it begins after {_LEFT_OUT} steps, but the run had only "
                f"{self._begun}"
            )

    def step(self, number: int) -> AbstractContextManager[object]:
        """Returns a context manager for the call that hands step `number` to the device."""
        if self._folder is None:
            return contextlib.nullcontext()
        if self._begun == _LEFT_OUT:
            jax.profiler.start_trace(self._folder / PROFILE_NAME)
            self._tracing = True
        elif self._begun == _LEFT_OUT + _TRACED:
            self._stop()
        self._begun += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
