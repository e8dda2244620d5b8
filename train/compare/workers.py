"""Processes in parallel, each on its own processors."""

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
    """Starts a process for each work, in order, at most `most` at once.

    If there are several processes, each is pinned to its share of the processors: otherwise the
    threads that a library starts by default would compete. When the caller stops or is interrupted,
    running processes are terminated and waited for.

    Args:
      works: the works.
      start: starts the process of a work.
      most: the maximum number of processes at once.

    Yields:
      A work that ended, and the exit code of its process as `subprocess.Popen.returncode`.
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
    """Divides the processors into `count` shares; each is all of them if they are too few."""
    if not hasattr(os, "sched_getaffinity"):  # macOS cannot pin processes
        return [frozenset()] * count
    processors = sorted(os.sched_getaffinity(0))
    if count > len(processors):
        return [frozenset(processors)] * count
    return [frozenset(processors[at::count]) for at in range(count)]


@contextlib.contextmanager
def _on(processors: frozenset[int]) -> Iterator[None]:
    """Pins this thread, and thus the processes that it starts, to `processors`."""
    if not processors:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
