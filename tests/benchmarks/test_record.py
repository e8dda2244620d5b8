"""The file of results that several commands of an experiment add to."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import commands, record

EMPTY = {"first": [], "runs": []}


def new_report():
    return {name: [] for name in EMPTY}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a made-up experiment."""

    condition: str
    folder: Path
    backbone: Path
    is_first: bool = False


def experiment(root, *names):
    """Returns a first stage and runs from it, `alone` from the random backbone."""
    write_weights(root / "random", "random")
    first = Run("first", root / "first", root / "random", is_first=True)
    starts = {"alone": root / "random"}
    return [
        first,
        *(
            Run(name, root / name / "seed-0", starts.get(name, root / "first/backbone"))
            for name in names
        ),
    ]


def write_weights(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(text)


@pytest.fixture
def fitted(monkeypatch):
    """Replaces `fit` by a function that writes a backbone of its first flag; lists the folders."""
    done = []

    def fit_once(folder, flags):
        done.append(folder.name if folder.name == "first" else folder.parent.name)
        write_weights(folder / "backbone", flags[0])

    monkeypatch.setattr(commands, "fit_once", fit_once)
    return done


def run_all(report, planned, root, weights="trained"):
    """Runs an experiment whose results are the conditions in capitals."""
    record.run_all(
        report,
        root / "results.json",
        planned,
        root,
        lambda run: [weights],
        lambda run: {"condition": run.condition, "told": run.condition.upper()},
    )
    return report


def test_only_what_is_missing_runs(tmp_path, fitted):
    """Results are written after each run; a first stage is trained if a run needs it."""
    report = run_all(new_report(), experiment(tmp_path, "a", "alone"), tmp_path)
    assert fitted == ["first", "a", "alone"]
    assert json.loads((tmp_path / "results.json").read_text()) == report
    trained = record.weights_hash(tmp_path / "first/backbone")
    random = record.weights_hash(tmp_path / "random")
    assert [(run["run"], run["start"], run["told"]) for run in report["runs"]] == [
        ("a/seed-0", trained, "A"),
        ("alone/seed-0", random, "ALONE"),
    ]
    assert report["first"][0]["weights"] == trained
    fitted.clear()
    assert record.missing(report, experiment(tmp_path, "a", "alone"), tmp_path) == []
    run_all(report, experiment(tmp_path, "a", "alone"), tmp_path)
    assert fitted == []
    run_all(report, experiment(tmp_path, "a", "b", "alone"), tmp_path)
    assert fitted == ["first", "b"]
    assert len(report["first"]) == 1
    assert record.started_elsewhere(report) == []
    fitted.clear()
    run_all(new_report(), experiment(tmp_path, "alone"), tmp_path)
    assert fitted == ["alone"]


def test_runs_of_another_first_stage_are_named(tmp_path, fitted):
    """A first stage that was trained again to other bits is told, and those of no stage are not."""
    report = run_all(new_report(), experiment(tmp_path, "a", "alone"), tmp_path)
    run_all(report, experiment(tmp_path, "b"), tmp_path, weights="other bits")
    assert [run["run"] for run in report["runs"]] == ["a/seed-0", "alone/seed-0", "b/seed-0"]
    assert record.started_elsewhere(report) == ["a/seed-0"]
    alone = run_all(new_report(), experiment(tmp_path, "alone"), tmp_path)
    assert record.started_elsewhere(alone) == []


def test_a_run_that_fails_keeps_the_results_before_it(tmp_path, fitted, monkeypatch):
    report, fit = new_report(), commands.fit_once

    def failing(folder, flags):
        if folder.parent.name == "b":
            raise RuntimeError("no space")
        fit(folder, flags)

    monkeypatch.setattr(commands, "fit_once", failing)
    with pytest.raises(RuntimeError, match="no space"):
        run_all(report, experiment(tmp_path, "a", "b"), tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [run["run"] for run in written["runs"]] == ["a/seed-0"]


def test_results_of_other_settings_are_refused(tmp_path):
    """Settings that leave a run as it is may differ; the message names the flag."""
    path = tmp_path / "results.json"
    assert record.opened(path, {"d_model": "8"}, record.FREE, EMPTY) is EMPTY
    path.write_text(json.dumps({"settings": {"d_model": "8", "seeds": "[0]"}, **EMPTY}))
    same = {"d_model": "8", "seeds": "[1]", "new": "1"}
    assert record.opened(path, same, record.FREE, EMPTY)["runs"] == []
    with pytest.raises(ValueError, match=r"results\.json has results with --d-model 8, not 9"):
        record.opened(path, {"d_model": "9"}, record.FREE, EMPTY)
    with pytest.raises(ValueError, match=r"results\.json has no cells; give another --json"):
        record.opened(path, same, record.FREE, {"cells": {}})
    for text in ("{", "[]", "{}", '"text"', "1", '{"settings": 1}', '{"settings": "text"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"results\.json is no file of results; give another"):
            record.opened(path, same, record.FREE, EMPTY)
    with pytest.raises(ValueError, match="is no file of results; give another --json"):
        record.opened(tmp_path, same, record.FREE, EMPTY)


def test_a_seed_counts_with_all_its_scores():
    """Scores of several runs of a seed are joined; conditions are compared on common seeds."""
    runs = [
        {"condition": "one", "seed": 1, "scores": {"x": 3.0, "y": 4.0}},
        {"condition": "one", "seed": 0, "scores": {"x": 1.0, "y": 2.0}},
        {"condition": "two", "seed": 1, "scores": {"x": 5.0}},
        {"condition": "two", "seed": 1, "scores": {"y": 6.0}},
        {"condition": "two", "seed": 2, "scores": {"x": 7.0}},
        {"condition": "three", "seed": 0, "scores": {"y": 8.0}},
    ]
    found = record.by_condition(runs, ["x", "y"], lambda run: run["scores"])
    assert {name: list(of_seeds) for name, of_seeds in found.items()} == {"one": [0, 1], "two": [1]}
    one, two = record.paired(found["one"], found["two"])
    np.testing.assert_array_equal(one, [[3, 4]])
    np.testing.assert_array_equal(two, [[5, 6]])
    np.testing.assert_array_equal(record.paired(found["one"])[0], [[1, 2], [3, 4]])


def test_a_plan_keeps_the_rows_of_earlier_commands():
    before = [{"condition": "first", "runs": 1}, {"condition": "a", "runs": 3}]
    now = [*before[:1], {"condition": "a", "runs": 1}, {"condition": "b", "runs": 2}]
    assert record.merged_plan(before, now) == now
    assert record.merged_plan(before, now[2:]) == [*before, now[2]]
