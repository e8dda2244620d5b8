"""A short run of the fuzzer; the long one is `python -m benchmarks.fuzz`."""

import random
from pathlib import Path

import pytest

from benchmarks import fuzz, mutations


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return fuzz.Assets(tmp_path_factory.mktemp("sound"))


def test_what_is_damaged_is_refused_in_one_line_or_sound(assets):
    """Reads two inputs of nearly every kind; the seed makes them the same in every run."""
    counts, findings = fuzz.fuzz(assets, inputs=70, seconds=50, seed=2026)
    assert findings == {}
    total = sum(sum(own.values()) for own in counts.values())
    accepted = sum(own["accepted"] for own in counts.values())
    assert 0 < accepted < total


def test_a_finding_is_counted_and_kept(assets, tmp_path, monkeypatch):
    def broken(assets, r, folder):
        (folder / "input").write_text("x")
        return fuzz.Case("broken", lambda: {}["missing"])

    def unsound(assets, r, folder):
        return fuzz.Case("unsound", lambda: None, lambda result: "accepted NaN")

    def slow(assets, r, folder):
        return fuzz.Case("slow", lambda: sum(0 for _ in iter(int, 1)))

    def wordy(assets, r, folder):
        return fuzz.Case("wordy", lambda: Path("x" * 1000).read_text())

    kinds = {make.__name__: fuzz.Kind(make) for make in (broken, unsound, slow, wordy)}
    monkeypatch.setattr(fuzz, "KINDS", kinds)
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 0.2)
    counts, findings = fuzz.fuzz(assets, inputs=8, seconds=50, seed=0, keep=tmp_path)
    assert all(sum(own.values()) == 2 for own in counts.values())
    found = sorted(name.partition(": ")[2].partition(" at ")[0] for name in findings)
    assert found == sorted(
        ["KeyError", "accepted NaN", "more than 0 s", "a message of more than 500 characters"]
    )
    assert (tmp_path / "0" / "input").read_text() == "x"
    assert "| all | 8 | 0 | 0 | 0 | 8 |" in fuzz.table(counts)


def test_numbers_that_no_float_holds_are_damaged_too():
    for seed in range(200):
        mutations.mutated_json(random.Random(seed), {"a": 10**400, "b": float("nan")})


def test_an_input_depends_on_its_seed_alone(assets, tmp_path):
    """A finding can be reproduced from its seed."""
    for name, kind in fuzz.KINDS.items():
        done = []
        for i in range(2):
            folder = tmp_path / name.replace(" ", "") / str(i)
            folder.mkdir(parents=True)
            done.append(kind.make(assets, random.Random(f"{name} 7"), folder).what)
        assert done[0] == done[1]
