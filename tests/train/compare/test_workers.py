"""Processes side by side."""

import os
import subprocess
import sys
import time

import pytest

from train.compare.workers import shares, side_by_side

CHILD = """
import os, sys, time
path, seconds, code = sys.argv[1:]
with open(path, "w") as file:
    file.write(" ".join(map(str, sorted(os.sched_getaffinity(0)))))
time.sleep(float(seconds))
sys.exit(int(code))
"""
linux = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="the system, such as macOS, cannot pin processes"
)


def starter(folder):
    def start(work):
        name, seconds, code = work
        command = [sys.executable, "-S", "-c", CHILD, folder / name, seconds, code]
        return subprocess.Popen([str(part) for part in command])

    return start


@linux
def test_each_has_processors_of_its_own(tmp_path):
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one processor has no two shares")
    works = [("slow", 1.5, 0), ("quick", 0.1, 3), ("last", 0.1, 0)]
    ends = list(side_by_side(works, starter(tmp_path), 2))
    assert ends == [(works[1], 3), (works[2], 0), (works[0], 0)]
    assert os.sched_getaffinity(0) == before
    had = {name: {int(n) for n in (tmp_path / name).read_text().split()} for name, _, _ in works}
    assert had["slow"] | had["quick"] == before
    assert had["slow"].isdisjoint(had["quick"])
    assert had["last"] == had["quick"]  # whose place it took


@linux
def test_one_at_a_time_has_all_processors(tmp_path):
    works = [("one", 0, 0), ("two", 0, 1)]
    assert list(side_by_side(works, starter(tmp_path), 1)) == [(works[0], 0), (works[1], 1)]
    for name, _, _ in works:
        assert {int(n) for n in (tmp_path / name).read_text().split()} == os.sched_getaffinity(0)


@linux
def test_shares_of_few_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 7})
    assert shares(1) == [{4, 5, 7}]
    assert shares(2) == [{4, 7}, {5}]
    assert shares(4) == [{4, 5, 7}] * 4


def test_what_runs_ends_with_the_caller(tmp_path):
    started = []

    def start(work):
        started.append(starter(tmp_path)(work))
        return started[-1]

    begun = time.monotonic()
    ends = side_by_side([("a", 0, 0), ("b", 60, 0), ("c", 60, 0)], start, 2)
    assert next(ends) == (("a", 0, 0), 0)
    with pytest.raises(KeyboardInterrupt):
        ends.throw(KeyboardInterrupt)
    assert time.monotonic() - begun < 30
    assert [process.returncode for process in started] == [0, -15]
