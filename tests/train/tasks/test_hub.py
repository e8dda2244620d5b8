"""Tests train.tasks.hub: sources of benchmarks, their splits, and refused data."""

import re
import shutil

import datasets
import hub_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train import tasks
from train.tasks import benchmarks, hub


def load(name, folder, **keywords):
    return tasks.load_task(name, data_dir=folder, **keywords)


def texts(task, split, column="sentence"):
    return task.splits[split][column][:]


def rewrite(folder, name, change, split="validation"):
    """Replaces the table of a split by `change(table)`."""
    path = folder / name / f"{split}-00000-of-00001.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    return path


# --- splits -------------------------------------------------------------------------------------


def test_paper_protocol_halves_the_validation_of_small_sets(tmp_path):
    hub_data.write(tmp_path, "cola", train=8, validation=7)
    official, paper = load("cola", tmp_path), load("cola", tmp_path, split_protocol="paper")
    assert list(official.splits) == ["train", "validation"]
    assert list(paper.splits) == ["train", "validation", "test"]
    assert texts(paper, "train") == texts(official, "train")
    halves = texts(paper, "validation"), texts(paper, "test")
    assert [len(half) for half in halves] == [3, 4]
    assert sorted(halves[0] + halves[1]) == sorted(texts(official, "validation"))
    again = load("cola", tmp_path, split_protocol="paper", splits=["test"])
    assert texts(again, "test") == halves[1]


def test_paper_protocol_holds_out_training_examples_of_large_sets(tmp_path, monkeypatch):
    assert (hub._LARGE, hub._HELD_OUT) == (10_000, 1000)
    monkeypatch.setattr(hub, "_LARGE", 9)
    monkeypatch.setattr(hub, "_HELD_OUT", 2)
    hub_data.write(tmp_path, "sst2", train=9, validation=5)
    official, paper = load("sst2", tmp_path), load("sst2", tmp_path, split_protocol="paper")
    assert texts(paper, "test") == texts(official, "validation")
    held_out, rest = texts(paper, "validation"), texts(paper, "train")
    assert (len(held_out), len(rest)) == (2, 7)
    assert sorted(held_out + rest) == sorted(texts(official, "train"))
    assert rest == [x for x in texts(official, "train") if x in rest]  # in their original order


def test_paper_protocol_of_mnli(tmp_path):
    hub_data.write(tmp_path, "mnli")
    official, paper = load("mnli", tmp_path), load("mnli", tmp_path, split_protocol="paper")
    assert list(paper.splits) == ["train", "validation", "test"]
    for split, other in [("validation", "validation_mismatched"), ("test", "validation")]:
        assert texts(paper, split, "premise") == texts(official, other, "premise")


def test_paper_protocol_keeps_the_answers_of_a_question_together(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_LARGE", 5)  # counts the 4 questions, not the 8 answers
    hub_data.write(tmp_path, "multirc", train=8, validation=12)
    task = load("multirc", tmp_path, split_protocol="paper")
    questions = [set(texts(task, split, "paragraph")) for split in ("validation", "test")]
    assert [len(found) for found in questions] == [3, 3]
    assert not questions[0] & questions[1]
    assert [len(task.splits[split]) for split in ("validation", "test")] == [6, 6]


def test_hidden_labels_are_no_test_split(tmp_path):
    hub_data.write(tmp_path, "rte")
    hub_data.write(tmp_path, "record")
    for name in ("rte", "record"):
        with pytest.raises(ValueError, match=f"{name} has no split 'test' whose answers are publ"):
            load(name, tmp_path, splits=["test"])
    with pytest.raises(ValueError, match=r"official has train, validation, test$"):
        load("rte", tmp_path, splits=["validation_mismatched"])


# --- places -------------------------------------------------------------------------------------


def test_files_of_all_layouts_that_the_hub_has_had(tmp_path):
    hub_data.write(tmp_path / "now", "mnli")
    expected = load("mnli", tmp_path / "now")
    original = tmp_path / "now" / "mnli"
    (tmp_path / "shards" / "mnli").mkdir(parents=True)
    for path in original.iterdir():
        split = path.name.partition("-")[0]
        (tmp_path / "converted" / "mnli" / split).mkdir(parents=True)
        shutil.copy(path, tmp_path / "converted" / "mnli" / split / "0000.parquet")
        (tmp_path / "named" / "mnli").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "named" / "mnli" / f"glue-{split}.parquet")
        table = pq.read_table(path)
        for i in range(2):
            part = table.slice(i * len(table) // 2, (len(table) + 1) // 2)
            pq.write_table(part, tmp_path / "shards" / "mnli" / f"{split}-0000{i}-of-00002.parquet")
    for layout in ("converted", "named", "shards"):
        found = load("mnli", tmp_path / layout)
        assert {s: rows.to_dict() for s, rows in found.splits.items()} == {
            s: rows.to_dict() for s, rows in expected.splits.items()
        }


@pytest.mark.contract
def test_the_hub_is_read_by_id_and_configuration(tmp_path, monkeypatch):
    """A folder with a repository's card replaces the hub."""
    hub_data.write(tmp_path / "glue", "cola")
    parts = "".join(
        f"  - split: {split}\n    path: cola/{split}-*\n"
        for split in ("train", "validation", "test")
    )
    card = f"---\nconfigs:\n- config_name: cola\n  data_files:\n{parts}---\n"
    (tmp_path / "glue" / "README.md").write_text(card)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read, load_dataset = [], datasets.load_dataset

    def from_folder(repository, configuration, *, trust_remote_code):
        read.append((repository, configuration))
        assert trust_remote_code is False
        return load_dataset(str(tmp_path / "glue"), configuration)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    task = tasks.load_task("cola")
    assert read == [("nyu-mll/glue", "cola")]
    expected = load("cola", tmp_path / "glue")
    assert task.label_names == expected.label_names == ("unacceptable", "acceptable")
    assert list(task.splits) == ["train", "validation"]
    for split, rows in task.splits.items():
        assert rows.to_dict() == expected.splits[split].to_dict()


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"^cannot load nyu-mll/glue") as caught:
        tasks.load_task("mnli")  # tests have no network
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(
        "without a network give --data-dir, a folder laid out as "
        "https://huggingface.co/datasets/nyu-mll/glue: mnli/ with train-*.parquet, "
        "validation_matched-*.parquet, validation_mismatched-*.parquet"
    )


@pytest.mark.parametrize(
    ("name", "repository", "configuration", "prefix"),
    [
        ("wmt16-ro-en", "wmt/wmt16", "ro-en", "translate Romanian to English"),
        ("wmt16-en-ro", "wmt/wmt16", "ro-en", "translate English to Romanian"),
        ("wmt14-en-de", "wmt/wmt14", "de-en", "translate English to German"),
        ("wmt19-fr-de", "wmt/wmt19", "fr-de", "translate French to German"),
    ],
)
def test_translations_by_name(name, repository, configuration, prefix):
    found = benchmarks.find(name)
    assert (found.repository, found.configuration) == (repository, configuration)
    assert found.prefix == prefix


# --- what is refused ----------------------------------------------------------------------------


def refusal(name, folder, **keywords):
    with pytest.raises(ValueError, match=r".") as caught:
        load(name, folder, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_that_do_not_go_together(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("sentence,label\na,0\n")
    assert refusal("mnli", tmp_path, train_file=path) == (
        "mnli is the name of a benchmark; use another --task name for your own files"
    )
    assert refusal("mnli", tmp_path, regression=True) == (
        "mnli is a task of kind classification, not regression; choose another task"
    )
    assert refusal("films", tmp_path, train_file=path) == (
        "--data-dir works only with benchmarks such as mnli, not with your own files"
    )
    assert "unknown language 'xx'; use cs, de, en" in refusal("wmt16-xx-en", tmp_path)
    hub_data.write(tmp_path, "rte")
    assert refusal("rte", tmp_path, label_names=["positive", "negative"]) == (
        "the labels of rte are entailment, not_entailment, but those of the adapter are positive, "
        "negative"
    )


def test_folders_without_the_data(tmp_path):
    assert refusal("wsc", tmp_path).startswith(
        f"{tmp_path / 'wsc.fixed'} holds no parquet files; --data-dir must be a folder laid out as "
        "https://huggingface.co/datasets/aps/super_glue: wsc.fixed/ with train-*.parquet, valid"
    )
    hub_data.write(tmp_path, "wsc")
    (tmp_path / "wsc.fixed" / "validation-00000-of-00001.parquet").unlink()
    for protocol in ("official", "paper"):
        message = refusal("wsc", tmp_path, split_protocol=protocol)
        assert message.startswith("wsc has no split 'validation' whose answers are published")
    (tmp_path / "wsc.fixed" / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    assert "train-00000-of-00001.parquet is not a readable parquet file" in refusal("wsc", tmp_path)


def test_columns_and_types_that_do_not_fit(tmp_path):
    hub_data.write(tmp_path, "qnli")
    path = rewrite(
        tmp_path, "qnli", lambda table: table.rename_columns(["q", *table.column_names[1:]])
    )
    assert refusal("qnli", tmp_path) == (
        f"{path} has no column 'question'; qnli needs question, sentence, label, but the columns "
        f"are "
        "q, sentence, label, idx"
    )
    hub_data.write(tmp_path, "qnli")
    rewrite(tmp_path, "qnli", lambda table: table.set_column(1, "sentence", pa.array([1] * 6)))
    assert refusal("qnli", tmp_path) == f"{path}: column 'sentence' holds int, not str"
    hub_data.write(tmp_path, "qnli")
    rewrite(tmp_path, "qnli", lambda table: table.slice(0, 0))
    assert refusal("qnli", tmp_path) == f"{path} has no rows"
    hub_data.write(tmp_path, "qnli")
    rewrite(tmp_path, "qnli", lambda table: table.replace_schema_metadata(None))
    assert refusal("qnli", tmp_path) == (
        f"{path}: column 'label' has the type int64, but must be a ClassLabel, which stores the "
        f"names of the labels; "
        "copy the files of the hub, or write yours with `datasets`"
    )
    hub_data.write(tmp_path, "stsb")
    path = rewrite(
        tmp_path, "stsb", lambda table: table.set_column(2, "label", pa.array(["a"] * 6))
    )
    assert refusal("stsb", tmp_path) == f"{path}: column 'label' has the type string, not float32"


def test_labels_that_are_missing_or_others(tmp_path):
    hub_data.write(tmp_path, "rte")

    def without_one(table):
        labels = table["label"].to_pylist()
        column = pa.array([*labels[:2], -1, *labels[3:]], pa.int64())
        return table.set_column(table.column_names.index("label"), "label", column)

    rewrite(tmp_path, "rte", without_one)
    assert refusal("rte", tmp_path) == "rte, validation, row 3: the label is missing"
    hub_data.write(tmp_path, "rte")
    hub_data.write(tmp_path, "wnli")
    source = tmp_path / "wnli" / "validation-00000-of-00001.parquet"
    shutil.copy(source, tmp_path / "rte" / "validation-00000-of-00001.parquet")
    assert refusal("rte", tmp_path) == (
        "rte: the labels of validation are not_entailment, entailment, but those of the other "
        "splits are entailment, "
        "not_entailment"
    )


def test_sentences_aligned_with_nothing_are_left_out(tmp_path, capsys):
    name = "wmt16-ro-en"
    hub_data.write(tmp_path, name)
    path = tmp_path / "ro-en" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    pairs = table["translation"].to_pylist()
    pairs[2]["en"] = " "
    changed = table.set_column(0, "translation", pa.array(pairs, table.schema.field(0).type))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    task = load(name, tmp_path)
    assert task.splits["train"]["translation"][:] == [*pairs[:2], *pairs[3:]]
    assert re.search(
        "train.*: 1 of 8 rows have an empty text and are left out", capsys.readouterr().out
    )
