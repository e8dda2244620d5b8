"""`predict` with a file whose rows name their adapters."""

import csv
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import BAD, GOOD, fit_flags, refusal, write_examples

from train import banked
from train.__main__ import main

NAMES = ("bad", "fine", "good")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        split: write_examples(folder / f"{split}.parquet", rows, seed=seed)
        for seed, (split, rows) in enumerate({"train": 60, "validation": 20}.items())
    }


def three_labels(folder):
    """Files of a task with three labels, named."""
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
    """A folder of three adapters: two seeds of one task, and one of a task with three labels."""
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


def test_every_row_has_the_prediction_of_its_adapter(adapters, tmp_path, capsys):
    rows = mixed_rows(70)
    source, target = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    flags = ["--eval-batch-size", "16", "--logits"]
    command = ["predict", "--adapter", adapters, "--input", source, "--output", target, *flags]
    assert main([str(part) for part in command]) == 0
    found = read_jsonl(target)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    printed = capsys.readouterr().out
    for name in ("seed-0", "seed-1", "three"):
        own = [i for i, row in enumerate(rows) if row["adapter"] == name]
        assert f"{name}: {len(own)} rows" in printed
        alone = write_jsonl(tmp_path / "alone.jsonl", [rows[i] for i in own])
        command = ["predict", "--adapter", adapters / name / "adapter", "--input", alone]
        command += ["--output", tmp_path / "wanted.jsonl", *flags]
        assert main([str(part) for part in command]) == 0
        for i, wanted in zip(own, read_jsonl(tmp_path / "wanted.jsonl"), strict=True):
            row = found[i]
            assert (row["prediction"], row["label_id"]) == (
                wanted["prediction"],
                wanted["label_id"],
            )
            assert row["probability"] == pytest.approx(wanted["probability"], abs=1e-6)
            np.testing.assert_allclose(row["logits"], wanted["logits"], atol=1e-5)
    assert {len(row["logits"]) for row in found if row["adapter"] == "three"} == {3}
    assert {row["prediction"] for row in found if row["adapter"] == "three"} <= set(NAMES)


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
            "names adapters that there are not: none, seed-7; there are seed-0, seed-1, three",
        ),
        ([{"sentence": "good"}], "no column 'adapter'"),
        (
            [{"adapter": "three", "sentence": "good"}, {"adapter": "", "sentence": "good"}],
            "row 2: adapter names no adapter",
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


def test_adapters_that_do_not_go_together(adapters, tmp_path, capsys):
    folder = tmp_path / "adapters"
    for name in ("seed-0", "three"):
        shutil.copytree(adapters / name / "adapter", folder / name)
    assert banked.members_of(folder) == {name: folder / name for name in ("seed-0", "three")}
    config = folder / "three" / "adapter_config.json"
    config.write_text(config.read_text().replace('"max_length": 40', '"max_length": 32'))
    rows = [{"adapter": name, "sentence": "good"} for name in ("seed-0", "three")]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = ["--adapter", folder, "--input", source, "--output", tmp_path / "out.jsonl"]
    message = "must share their max_length: seed-0 has 40, three has 32"
    assert message in refusal(capsys, "predict", *flags)


def test_one_adapter_is_no_bank(adapters, tmp_path):
    assert banked.members_of(adapters / "three" / "adapter") == {}
    assert banked.members_of(adapters / "three") == {}  # the folder of a run
    assert banked.members_of(tmp_path / "nothing") == {}
    assert list(banked.members_of(adapters)) == ["seed-0", "seed-1", "three"]
