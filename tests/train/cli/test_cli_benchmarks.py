"""Runs benchmarks on the command line: fit, evaluate and predict, with the columns of the hub."""

import json

import hub_data
import pytest

from train.__main__ import main


def run(command, **flags):
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return main([command, *(word.replace("_", "-", word.startswith("--")) for word in words)])


def fit(backbone, folder, name, output, **flags):
    hub_data.write(folder, name)
    flags = {"epochs": 1, "batch_size": 8, "eval_batch_size": 8, "max_length": 64, **flags}
    flags |= {"backbone": backbone, "task": name, "data_dir": folder, "output_dir": output}
    assert run("fit", method="bitfit", **flags) == 0
    return json.loads((output / "metrics.json").read_text())


def refused(capsys, *arguments):
    """Returns the last line, after the progress bar, of a command that must fail."""
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def predicted(adapter, rows, folder, **flags):
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("predict", adapter=adapter, input=source, output=target, **flags) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]


def evaluated(adapter, data, name, split):
    assert run("evaluate", adapter=adapter, task=name, data_dir=data, split=split) == 0
    return json.loads((adapter / f"evaluation_{name}_{split}.json").read_text())["metrics"]


@pytest.mark.slow
def test_mnli_on_an_encoder(tiny_backbone, tmp_path, capsys):
    result = fit(tiny_backbone, tmp_path / "glue", "mnli", tmp_path / "run")
    assert result["metric"] == "accuracy"
    adapter = tmp_path / "run" / "adapter"
    for split in ("validation", "validation_mismatched"):
        scores = evaluated(adapter, tmp_path / "glue", "mnli", split)
        assert scores.pop("loss") == pytest.approx(result[split].pop("loss"), rel=1e-5)
        assert scores == pytest.approx(result[split])
    pair = {"premise": "we loved the film", "hypothesis": "the film was dull"}
    generic = dict(zip(("sentence", "sentence2"), pair.values(), strict=True))
    (of_hub,) = predicted(adapter, [pair], tmp_path)
    (of_pair,) = predicted(adapter, [generic], tmp_path)
    assert of_hub["prediction"] in ("entailment", "neutral", "contradiction")
    assert of_hub["probability"] == of_pair["probability"]
    source = tmp_path / "in.jsonl"
    source.write_text('{"premise": "we loved the film"}\n')
    flags = ["--adapter", adapter, "--input", source, "--output", tmp_path / "out.jsonl"]
    assert "has no column 'sentence', and not all of premise, hypothesis; its columns" in refused(
        capsys, "predict", *flags
    )
    hub_data.write(tmp_path / "glue", "rte")
    flags = ["--adapter", adapter, "--data-dir", tmp_path / "glue", "--split", "validation"]
    assert "the labels of rte are entailment, not_entailment" in refused(
        capsys, "evaluate", "--task", "rte", *flags
    )


def test_squad_on_an_encoder(tiny_backbone, tmp_path, capsys):
    result = fit(tiny_backbone, tmp_path / "data", "squad", tmp_path / "run", max_length=32)
    assert result["metric"] == "exact_match_and_f1"
    adapter = tmp_path / "run" / "adapter"
    scores = evaluated(adapter, tmp_path / "data", "squad", "validation")
    assert scores == pytest.approx(result["validation"], rel=1e-5)
    context = "the plot was dull. " * 12 + "We loved   the film"
    rows = [{"id": 7, "question": "what was it", "context": context}]
    (row,) = predicted(adapter, rows, tmp_path)
    assert row["prediction"]
    assert row["prediction"] in context
    assert set(row) == {"id", "question", "context", "prediction"}
    flags = ["--adapter", adapter, "--input", tmp_path / "in.jsonl"]
    assert "--logits needs a task with labels, and squad predicts none" in refused(
        capsys, "predict", "--logits", *flags, "--output", tmp_path / "out.jsonl"
    )


@pytest.mark.slow
def test_record_on_a_t5(tiny_t5, tmp_path, capsys):
    flags = {"max_target_length": 12, "split_protocol": "paper"}
    result = fit(tiny_t5, tmp_path / "data", "record", tmp_path / "run", **flags)
    assert result["metric"] == "exact_match_and_f1"
    assert set(result["validation"]) == set(result["test"])
    adapter = tmp_path / "run" / "adapter"
    (row,) = hub_data.rows("record", 1)
    kept = {name: row[name] for name in ("passage", "query", "entities")}
    (with_prediction,) = predicted(adapter, [kept], tmp_path)
    assert isinstance(with_prediction["prediction"], str)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({**kept, "entities": "film, plot"}) + "\n")
    flags = ["--adapter", adapter, "--input", source, "--output", tmp_path / "out.jsonl"]
    assert "in.jsonl, row 1: entities is str, not list" in refused(capsys, "predict", *flags)
    source.write_text('{"sentence": "a film"}\n')
    assert "rows of record need passage, query, entities, but have no 'passage'" in refused(
        capsys, "predict", *flags
    )
