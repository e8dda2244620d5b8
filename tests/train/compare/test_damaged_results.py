"""Results of runs that are damaged or edited by hand."""

import json

import numpy as np
import pytest

from train.compare.single_run import Run, scored

RESULT = {
    "metric": "accuracy",
    "learning_rate": 1e-3,
    "train_examples": 40,
    "steps": 6,
    "best_epoch": 1,
    "trained_parameters": 10,
    "total_parameters": 1000,
    "adapter_bytes": 99,
    "label_names": ["no", "yes"],
    "validation": {"accuracy": 0.5},
    "test": {"accuracy": 0.5},
    "measured": {"step_seconds": None, "seconds": 9.0, "peak_memory_bytes": 10**9},
}


def lines(*targets):
    return "".join(json.dumps({"prediction": "yes", "target": t}) + "\n" for t in targets)


@pytest.fixture
def finished(tmp_path):
    """Two finished runs that differ in the seed."""
    runs = [Run("own", None, "lora", seed, tmp_path / f"seed-{seed}", ()) for seed in (0, 1)]
    for run in runs:
        run.folder.mkdir()
        (run.folder / "metrics.json").write_text(json.dumps(RESULT))
        (run.folder / "test_predictions.jsonl").write_text(lines("yes", "no"))
    return runs


def test_whole_results(finished):
    found = scored(finished, "accuracy")
    assert found.scores == {0: 0.5, 1: 0.5}
    assert {seed: values.tolist() for seed, values in found.predictions.items()} == {
        0: ["yes", "yes"],
        1: ["yes", "yes"],
    }
    assert found.targets.tolist() == ["yes", "no"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", json.dumps(RESULT)[:-9], "is not valid JSON"),
        ("metrics.json", "", "is not valid JSON"),
        ("metrics.json", "[]", "must hold the result of a run, a JSON object"),
        ("metrics.json", '{"metric": "accuracy"}', "it has no learning_rate"),
        ("metrics.json", json.dumps({**RESULT, "test": {}}), "test has no accuracy"),
        ("metrics.json", json.dumps({**RESULT, "test": {"accuracy": "0.5"}}), "must be"),
        ("metrics.json", json.dumps({**RESULT, "measured": {}}), "measured has no step_seconds"),
        ("test_predictions.jsonl", lines("yes", "no")[:-9], "test_predictions.jsonl, line 2"),
        ("test_predictions.jsonl", '{"prediction": "yes"}', "row 1: no prediction or no target"),
        ("test_predictions.jsonl", lines("no", [1]), "row 2: no prediction or no target"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(name, text, message, finished):
    (finished[1].folder / name).write_text(text)
    with pytest.raises(ValueError, match=r"to train the run again$") as error:
        scored(finished, "accuracy")
    told = str(error.value)
    assert message in told
    assert str(finished[1].folder / name) in told
    assert f"remove {finished[1].folder} and give the same command" in told


def test_damaged_flags(finished):
    run = finished[0]
    (run.folder / "flags.json").write_text("[")
    with pytest.raises(ValueError, match=r"flags\.json is not valid JSON.*train the run again$"):
        run.same_flags()
    (run.folder / "flags.json").write_text("[]")
    assert run.same_flags()


def test_predictions_on_other_rows_are_left_out(finished):
    (finished[1].folder / "test_predictions.jsonl").write_text(lines("yes"))
    found = scored(finished, "accuracy")
    assert set(found.predictions) == {0}
    assert set(found.scores) == {0, 1}
    (finished[0].folder / "test_predictions.jsonl").unlink()
    found = scored(finished, "accuracy")
    assert set(found.predictions) == {1}
    np.testing.assert_array_equal(found.targets, ["yes"])
