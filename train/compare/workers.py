"""Processes side by side, each on processors of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.05


def side_by_side(
    works: Sequence[T], start: Callable[[T], subprocess.Popen[bytes]], most: int
) -> Iterator[tuple[T, int]]:
    """Starts a process for each work, in order, `most` at once; yields works as they end.

    Where there are several, each is kept on its share of the processors: as many threads as a
    library starts by itself would otherwise be in each other's way. When the caller stops, or is
    interrupted, those that run are terminated and waited for.

    Yields:
      A work and its process's exit code, as `subprocess.Popen.returncode` tells it.
    """
    waiting = list(works)
    free = shares(most)
    running: dict[subprocess.Popen[bytes], tuple[T, frozenset[int]]] = {}
    try:
        while waiting or running:
            while waiting and free:
                work, share = waiting.pop(0), free.pop(0)
                with _on(share):
                    running[start(work)] = work, share
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                work, share = running.pop(process)
                free.append(share)
                yield work, process.returncode
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def shares(count: int) -> list[frozenset[int]]:
    """The processors there are, dealt to `count`; to each all of them, if there are too few."""
    if not hasattr(os, "sched_getaffinity"):  # not on macOS, where nothing can be pinned
        return [frozenset()] * count
    processors = sorted(os.sched_getaffinity(0))
    if count > len(processors):
        return [frozenset(processors)] * count
    return [frozenset(processors[at::count]) for at in range(count)]


@contextlib.contextmanager
def _on(processors: frozenset[int]) -> Iterator[None]:
    """Keeps this thread, and so what it starts, on `processors`."""
    if not processors:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
