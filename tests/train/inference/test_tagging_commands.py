"""Tests the commands on words with tags: what fit scores, evaluate and predict repeat."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import WORDS
from tests.train.cli.test_cli import GOOD, fit_flags, refusal
from train.__main__ import main
from train.compare.single_run import Run
from train.tasks.entities import tag_metrics

TAGS = {"film": "B-ART", "plot": "I-ART"} | dict.fromkeys(GOOD, "B-GOOD")
NAMES = ("B-ART", "B-GOOD", "I-ART", "O")
SEVEN = "a.the.film.plot"


def sentences(rows, seed, longest=14):
    generator = np.random.default_rng(seed)
    return [
        generator.choice([*WORDS, SEVEN], generator.integers(1, longest)).tolist()
        for _ in range(rows)
    ]


def write(path, of_words, tag_of=TAGS):
    rows = [{"tokens": each, "tags": [tag_of.get(word, "O") for word in each]} for each in of_words]
    if path.suffix == ".conll":
        text = ["".join(f"{a} {b}\n" for a, b in zip(*row.values(), strict=True)) for row in rows]
        path.write_text("\n".join(text))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagged")
    return {
        "train": write(folder / "train.jsonl", sentences(80, 0)),
        "validation": write(folder / "validation.conll", sentences(20, 1)),
        "test": write(folder / "test.jsonl", sentences(30, 2)),
    }


@pytest.fixture(scope="module")
def fitted(tiny_backbone, files, tmp_path_factory):
    """Returns a folder with two taggers: one that learned `TAGS`, and one of two other tags."""
    folder = tmp_path_factory.mktemp("taggers")
    flags = fit_flags(tiny_backbone, files, folder / "art", epochs=12)
    assert main(["fit", *flags]) == 0
    parts = {
        split: write(path.with_name(f"is-word-{split}.jsonl"), sentences(20, seed), {SEVEN: "X"})
        for seed, (split, path) in enumerate(files.items())
    }
    flags = fit_flags(tiny_backbone, parts, folder / "is-word", epochs=1)
    assert main(["fit", *flags]) == 0
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *arguments):
    """Returns the last line of a command that fails with exit code 2, behind its progress bar."""
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_fit_learns_tags_and_writes_the_predictions_that_it_scores(fitted):
    result = json.loads((fitted / "art" / "metrics.json").read_text())
    assert (result["kind"], result["metric"]) == ("tagging", "f1")
    assert result["test"]["f1"] > 0.9
    assert result["label_names"] == list(NAMES)
    best = result["history"][result["best_epoch"] - 1]
    assert best["f1"] == max(record["f1"] for record in result["history"])
    predictions, targets = Run("custom", None, "compacter++", 0, fitted / "art", ()).predictions()
    values = tag_metrics(predictions, targets, NAMES)
    assert result["test"] == pytest.approx(values | {"loss": result["test"]["loss"]})
    assert list(values) == [
        *("accuracy", "precision", "recall", "f1"),
        *(f"{kind}/{name}" for kind in ("ART", "GOOD") for name in ("precision", "recall", "f1")),
    ]
    # Tags that mark no entities are scored by accuracy alone.
    other = json.loads((fitted / "is-word" / "metrics.json").read_text())
    assert other["metric"] == "accuracy"
    assert other["test"].keys() == {"accuracy", "loss"}


def test_evaluate_gives_the_metrics_of_fit_and_a_table_of_several_files(
    fitted, files, tmp_path, capsys
):
    adapter, output = fitted / "art", tmp_path / "metrics.json"
    given = f"test={files['test']}, new={files['validation']}"
    flags = ["--adapter", adapter, "--test-files", given, "--output", output]
    assert main(["evaluate", *map(str, flags)]) == 0
    found = json.loads(output.read_text())
    metrics = json.loads((adapter / "metrics.json").read_text())
    assert found["files"]["test"]["metrics"] == pytest.approx(metrics["test"], abs=1e-6)
    assert found["files"]["new"]["metrics"] == pytest.approx(metrics["validation"], abs=1e-6)
    words = [word for row in rows_of(files["test"]) for word in row["tokens"]]
    assert found["files"]["test"]["words"] == len(words)
    assert found["files"]["test"]["cut_words"] > 0
    report = output.with_suffix(".md").read_text()
    assert report in capsys.readouterr().out
    head, _, *rows = [line.split(" | ") for line in report.splitlines() if line.startswith("|")]
    assert head[0] == "| file"
    assert [row[0] for row in rows] == ["| test", "| new", "| file", "| ---", "| test", "| new"]
    assert rows[0][head.index("f1")] == f"{metrics['test']['f1']:.4f}"
    assert head.index("cut words") == 3
    # One file alone.
    alone = ["--adapter", adapter, "--test-file", files["test"], "--output", output]
    assert main(["evaluate", *map(str, alone)]) == 0
    single = json.loads(output.read_text())
    assert single["metrics"] == found["files"]["test"]["metrics"]
    assert "test ART/f1: " in capsys.readouterr().out


LONG = ["\u200b", SEVEN, "good", "film", "bad", *["plot"] * 12]


def test_predict_writes_one_tag_for_every_word(fitted, files, tmp_path, capsys):
    source, output = tmp_path / "new.conll", tmp_path / "new.jsonl"
    source.write_text("\n\n".join("\n".join(words) for words in (["film"], LONG, ["the"])))
    flags = ["--adapter", fitted / "art", "--input", source, "--output", output]
    assert main(["predict", *map(str, flags)]) == 0
    first, long, last = rows_of(output)
    assert first == {"tokens": ["film"], "prediction": ["B-ART"]}
    assert (long["tokens"], last["tokens"]) == (LONG, ["the"])
    # 14 tokens: 7 of the second word, 3, and 4 of the last.
    assert [tag in NAMES for tag in long["prediction"]] == [False, *[True] * 8, *[False] * 8]
    assert long["prediction"].count(None) == 9
    said = capsys.readouterr().out
    assert "8 of 19 words of the inputs are cut off by max_length=16, and have no tag" in said
    assert "1 of 19 words of the inputs are dropped by the tokenizer, and have no tag" in said
    assert "1 of 3 rows were cut to 16 tokens" in said
    # A column of tags stays, and the type of a parquet file's new column is a list of text.
    parquet = tmp_path / "test.parquet"
    flags = ["--adapter", fitted / "art", "--input", files["test"], "--output", parquet]
    assert main(["predict", *map(str, flags)]) == 0
    found = pq.read_table(parquet).to_pylist()
    given = rows_of(files["test"])
    assert [{name: row[name] for name in ("tokens", "tags")} for row in found] == given
    assert all(len(row["prediction"]) == len(row["tokens"]) for row in found)
    scored = [row["prediction"] for row in rows_of(fitted / "art" / "test_predictions.jsonl")]
    assert [[tag for tag in row["prediction"] if tag] for row in found] == scored


def test_a_bank_of_taggers_predicts_as_each_alone(fitted, tmp_path):
    words = sentences(12, 8)
    names = [("art", "is-word")[i % 3 == 0] for i in range(12)]
    source, output = tmp_path / "mixed.jsonl", tmp_path / "out.jsonl"
    rows = [{"adapter": a, "tokens": b} for a, b in zip(names, words, strict=True)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input", source, "--output", output]
    assert main(["predict", "--adapter", str(fitted), *map(str, flags)]) == 0
    mixed = [row["prediction"] for row in rows_of(output)]
    for name in ("art", "is-word"):
        assert main(["predict", "--adapter", str(fitted / name), *map(str, flags)]) == 0
        for row, alone in enumerate(rows_of(output)):
            if names[row] == name:
                assert mixed[row] == alone["prediction"]


def test_bad_input_gives_one_line(fitted, files, tiny_backbone, tmp_path, capsys, tiny_t5):
    adapter = ("--adapter", fitted / "art")
    bad = write(tmp_path / "bad.jsonl", [["good"], ["bad"]], {"bad": "B-SHIP"})
    line = refusal(capsys, "evaluate", *adapter, "--test-file", bad)
    assert f"{bad}, row 2: tag 'B-SHIP' is not one of the training tags B-ART, B-GOOD" in line
    bad.write_text('{"tokens": ["a"]}\n{"tokens": []}\n')
    flags = ("--input", bad, "--output", tmp_path / "out.jsonl")
    line = refused(capsys, "predict", *adapter, *flags)
    assert f"{bad}, row 2: tokens is a list without words" in line
    line = refused(capsys, "predict", *adapter, *flags, "--logits")
    assert "--logits needs a task with one label for each row" in line
    bad.write_text('{"sentence": "a"}\n')
    line = refused(capsys, "predict", *adapter, *flags)
    assert "of a column 'tokens', lists of text, but the columns are sentence" in line
    line = refusal(capsys, "evaluate", *adapter, "--test-file", bad)
    assert f"{bad} has no column 'tokens'; its columns are sentence" in line
    bad.write_text('{"tokens": ["a", "b"], "tags": ["O"]}\n')
    train = fit_flags(tiny_backbone, files | {"train": bad}, tmp_path / "run")
    assert f"{bad}, row 1: 2 tokens, but 1 tags" in refusal(capsys, "fit", *train)
    line = refusal(capsys, "fit", *fit_flags(tiny_t5, files, tmp_path / "run"))
    assert "task 'custom' has tags of words, which needs an encoder such as BERT" in line
    for given, told in {
        "a": "'a' must be NAME=FILE",
        "=x": "'=x' must be NAME=FILE",
        "a=x,a=y": "names 'a' twice",
    }.items():
        assert told in refusal(capsys, "evaluate", *adapter, "--test-files", given)
    both = ("--test-files", f"a={bad}", "--test-file", bad)
    assert "--test-files gives the files of --split test" in refusal(
        capsys, "evaluate", *adapter, *both
    )
    report = ("--test-files", f"a={bad}", "--output", tmp_path / "metrics.md")
    assert "is a JSON file, beside which a report" in refusal(capsys, "evaluate", *adapter, *report)
    assert not (tmp_path / "run").exists()


def test_a_tagger_goes_to_another_library_and_back(tiny_backbone, files, tmp_path):
    ours, theirs, back = (tmp_path / name for name in ("ours", "theirs", "back"))
    method = ["--method", "houlsby", "--train-layer-norms", "False"]
    assert main(["fit", *fit_flags(tiny_backbone, files, ours, epochs=1), *method]) == 0

    def convert(source, folder, to, *more):
        flags = ["--from", source, folder, "--to", to, *more]
        return main(["convert", *map(str, flags)])

    assert convert("compacter_jax", ours / "adapter", theirs, "--to-format", "adapterhub") == 0
    given = ["--backbone", tiny_backbone, "--max-length", "16"]
    assert convert("adapterhub", theirs, back, *given) == 0
    assert json.loads((back / "adapter_config.json").read_text())["kind"] == "tagging"
    results = []
    for adapter in (ours / "adapter", back):
        flags = ["--adapter", adapter, "--test-file", files["test"]]
        output = tmp_path / f"{adapter.name}.json"
        assert main(list(map(str, ["evaluate", *flags, "--output", output]))) == 0
        results.append(json.loads(output.read_text())["metrics"])
    assert results[0] == results[1]
