"""Tests `predict` with a file whose rows name their adapters."""

import csv
import json
import shutil

import hub_data
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.train.cli.test_cli import BAD, GOOD, fit_flags, refusal, write_splits
from train.__main__ import main
from train.inference import folders

NAMES = ("bad", "fine", "good")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("files"), {"train": 60, "validation": 20})


def three_labels(folder):
    """Writes the files of a task with three named labels."""
    generator = np.random.default_rng(9)
    paths = {}
    for split, rows in {"train": 60, "validation": 20}.items():
        labels = generator.integers(0, 3, rows)
        words = [(BAD, BAD + GOOD, GOOD)[label] for label in labels]
        sentences = [" ".join(generator.choice(w, generator.integers(2, 12))) for w in words]
        paths[split] = folder / f"three-{split}.parquet"
        names = [NAMES[label] for label in labels]
        pq.write_table(pa.table({"sentence": sentences, "label": names}), paths[split])
    return paths


@pytest.fixture(scope="module")
def adapters(tiny_backbone, files, tmp_path_factory):
    """Returns a folder of three adapters: two seeds of one task, and one for three labels."""
    folder = tmp_path_factory.mktemp("adapters")
    both = fit_flags(tiny_backbone, files, folder, epochs=1)
    assert main(["fit", *both, "--seeds", "0,1"]) == 0
    three = three_labels(tmp_path_factory.mktemp("three"))
    assert main(["fit", *fit_flags(tiny_backbone, three, folder / "three", epochs=1)]) == 0
    return folder


def mixed_rows(rows, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {
            "adapter": str(generator.choice(["three", "seed-1", "seed-0"])),
            "sentence": " ".join(generator.choice(BAD + GOOD, generator.integers(1, 25))),
            "number": i,
        }
        for i in range(rows)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def predict(adapter, source, target, *flags):
    flags = ["--adapter", adapter, "--input", source, "--output", target, *flags]
    assert main(["predict", *map(str, flags)]) == 0
    return read_jsonl(target)


def check_as_alone(folder, rows, tmp_path, capsys, *flags):
    """Checks that each row gets the prediction of its adapter alone."""
    flags = ["--eval-batch-size", "16", *flags]
    found = predict(
        folder, write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", *flags
    )
    for row, of_file in zip(found, rows, strict=True):
        assert {name: row[name] for name in of_file} == of_file
    printed = capsys.readouterr().out
    for name in sorted({row["adapter"] for row in rows}):
        own = [i for i, row in enumerate(rows) if row["adapter"] == name]
        assert f"{name}: {len(own)} rows" in printed
        alone = write_jsonl(tmp_path / "alone.jsonl", [rows[i] for i in own])
        wanted = predict(folder / name / "adapter", alone, tmp_path / "wanted.jsonl", *flags)
        for row, of_one in zip([found[i] for i in own], wanted, strict=True):
            assert row.keys() == of_one.keys()
            assert row["prediction"] == of_one["prediction"]
            if "probability" in row:
                assert row["probability"] == pytest.approx(of_one["probability"], abs=1e-6)
            if "logits" in row:
                np.testing.assert_allclose(row["logits"], of_one["logits"], atol=1e-5)
    return found


def test_every_row_has_the_prediction_of_its_adapter(adapters, tmp_path, capsys):
    found = check_as_alone(adapters, mixed_rows(70), tmp_path, capsys, "--logits")
    assert {len(row["logits"]) for row in found if row["adapter"] == "three"} == {3}
    assert {row["prediction"] for row in found if row["adapter"] == "three"} <= set(NAMES)


@pytest.mark.slow
def test_tasks_with_columns_of_their_own(adapters, tiny_backbone, tmp_path, capsys):
    """The rows of a benchmark with sentence pairs are mixed with single sentences."""
    folder = tmp_path / "adapters"
    shutil.copytree(adapters / "three", folder / "three")
    hub_data.write(tmp_path / "data", "mnli")
    flags = {"task": "mnli", "epochs": 1, "data-dir": tmp_path / "data"}
    assert main(["fit", *fit_flags(tiny_backbone, {}, folder / "mnli", **flags)]) == 0
    rows = [row for row in mixed_rows(20) if row["adapter"] == "three"]
    for i, row in enumerate(mixed_rows(12, seed=1)):
        pair = {"premise": row["sentence"], "hypothesis": "the film was dull"}
        rows.insert(2 * i, {"adapter": "mnli", **pair, "number": 100 + i})
    check_as_alone(folder, rows, tmp_path, capsys, "--logits")
    rows[2]["hypothesis"] = None
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = ["--adapter", folder, "--input", source, "--output", tmp_path / "bad.jsonl"]
    assert main(["predict", *map(str, flags)]) == 2
    assert "row 3: hypothesis is missing (null)" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_parts_of_texts_in_several_windows(tiny_backbone, tmp_path, capsys):
    hub_data.write(tmp_path / "data", "squad")
    folder, flags = tmp_path / "adapters", {"task": "squad", "data-dir": tmp_path / "data"}
    flags |= {"epochs": 1, "seeds": "0,1", "max-length": 32}
    assert main(["fit", *fit_flags(tiny_backbone, {}, folder, **flags)]) == 0
    rows = []
    for i, row in enumerate(mixed_rows(14)):
        context = "the plot was dull. " * (1 + i % 3 * 6) + row["sentence"]
        name = ("seed-0", "seed-1")[i // 2 % 2]
        rows.append({"adapter": name, "question": "what was it", "context": context})
    check_as_alone(folder, rows, tmp_path, capsys)


@pytest.mark.slow
def test_labels_of_a_t5(tiny_t5, files, tmp_path, capsys):
    """Labels are scored by the likelihood of their text; one task has two, the other three."""
    folder, flags = tmp_path / "adapters", {"epochs": 1, "max-length": 16}
    own = fit_flags(tiny_t5, files, folder / "movie", task="movie", **flags)
    assert main(["fit", *own]) == 0
    three = three_labels(tmp_path)
    assert main(["fit", *fit_flags(tiny_t5, three, folder / "three", task="three", **flags)]) == 0
    rows = mixed_rows(24)
    for i, row in enumerate(rows):
        row["adapter"] = ("three", "movie")[i % 3 % 2]
    found = check_as_alone(folder, rows, tmp_path, capsys, "--logits")
    assert {len(row["logits"]) for row in found if row["adapter"] == "three"} == {3}


def test_texts_that_a_t5_writes(tiny_t5, tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["sentence,target", *(f"{word},{word} very" for word in GOOD + BAD)]))
    folder, flags = tmp_path / "adapters", {"epochs": 8, "max-length": 16, "seeds": "0,1"}
    paths = {"train": path, "validation": path}
    own = fit_flags(tiny_t5, paths, folder, task="copy", **flags)
    assert main(["fit", *own, "--max-target-length", "6"]) == 0
    rows = mixed_rows(12)
    for i, row in enumerate(rows):
        row["adapter"] = f"seed-{i % 2}"
    check_as_alone(folder, rows, tmp_path, capsys)
    capsys.readouterr()
    source = tmp_path / "in.jsonl"
    flags = ["--adapter", folder, "--input", source, "--output", tmp_path / "o.csv", "--logits"]
    assert "--logits needs a task with labels" in refusal(capsys, "predict", *flags)


def test_a_csv_keeps_its_columns(adapters, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(f"adapter,sentence\nthree,{GOOD[0]}\nseed-0,{BAD[0]}\n")
    command = ["predict", "--adapter", adapters, "--input", source, "--output", target]
    assert main([str(part) for part in command]) == 0
    with target.open() as file:
        header, *lines = csv.reader(file)
    assert header == ["adapter", "sentence", "prediction", "label_id", "probability"]
    assert [line[:2] for line in lines] == [["three", GOOD[0]], ["seed-0", BAD[0]]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"adapter": "none", "sentence": "good"}, {"adapter": "seed-7", "sentence": "good"}],
            "names adapters that do not exist: none, seed-7; use seed-0, seed-1, three",
        ),
        ([{"sentence": "good"}], "no column 'adapter'"),
        ([], "is empty (0 bytes)"),
        (
            [{"adapter": "three", "sentence": "good"}, {"adapter": "", "sentence": "good"}],
            "row 2: adapter names no adapter; name one",
        ),
        (
            [{"adapter": "three", "sentence": "good"}, {"adapter": None, "sentence": "good"}],
            "row 2: adapter names no adapter; name one",
        ),
        (
            [{"adapter": "three", "sentence": "good"}, {"adapter": 3, "sentence": "good"}],
            "row 2: adapter is 3, not text",
        ),
        ([{"adapter": "three", "sentence": " "}], "row 1: sentence is empty"),
        (
            [{"adapter": "three", "sentence": "good", "prediction": 1}],
            "already has a column 'prediction'",
        ),
    ],
)
def test_rows_that_are_refused(rows, message, adapters, tmp_path, capsys):
    source, target = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["--adapter", adapters, "--input", source, "--output", target]
    assert main(["predict", *map(str, flags)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not target.exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["three"] * 1049 + [""] + ["three"] * 50, "row 1050: adapter names no adapter; name one"),
        (list(range(1100)), "row 1: adapter is 0, not text"),
    ],
)
def test_a_row_of_a_later_chunk_is_refused_by_its_number(
    names, message, adapters, tmp_path, capsys
):
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"adapter": names, "sentence": ["good"] * len(names)}), source)
    flags = ["--adapter", adapters, "--input", source, "--output", target]
    assert message in refusal(capsys, "predict", *flags)
    assert not target.exists()


def test_a_sentence_of_a_later_chunk_is_refused_by_its_number(adapters, tmp_path, capsys):
    sentences = ["good"] * 1100
    sentences[1049] = " "
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"adapter": ["three"] * 1100, "sentence": sentences}), source)
    flags = ["--adapter", adapters, "--input", source, "--output", target]
    assert main(["predict", *map(str, flags)]) == 2
    message = "row 1050: sentence is empty; remove or fill the row"
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not target.exists()


def test_adapters_that_do_not_go_together(adapters, tmp_path, capsys):
    folder = tmp_path / "adapters"
    for name in ("seed-0", "three"):
        shutil.copytree(adapters / name / "adapter", folder / name)
    assert folders.members_of(folder) == {name: folder / name for name in ("seed-0", "three")}
    config = folder / "three" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"max_length": 32}))
    rows = [{"adapter": name, "sentence": "good"} for name in ("seed-0", "three")]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = ["--adapter", folder, "--input", source, "--output", tmp_path / "out.jsonl"]
    before = settings["max_length"]
    message = f"must share their max_length: seed-0 has {before}, but three has 32"
    assert message in refusal(capsys, "predict", *flags)


def test_one_adapter_is_no_bank(adapters, tmp_path):
    assert folders.members_of(adapters / "three" / "adapter") == {}
    assert folders.members_of(adapters / "three") == {}  # this is the folder of a single run
    assert folders.members_of(tmp_path / "nothing") == {}
    assert list(folders.members_of(adapters)) == ["seed-0", "seed-1", "three"]
