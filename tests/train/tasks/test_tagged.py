"""Tests files of words with tags: every format gives the same task, and bad rows are named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train import tasks

ROWS = [
    {"tokens": ["the", "film", "was", "good"], "tags": ["O", "B-ART", "O", "O"]},
    {"tokens": ["a", "b c"], "tags": ["I-ART", "I-ART"]},
    {"tokens": ["#", "."], "tags": ["B-ART", "O"]},
]
NAMES = ("B-ART", "I-ART", "O")


def write(path, rows):
    """Writes rows in the format of a suffix; the last sentence of a text has no blank line."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [
            "\n".join(f"{a}\t{b}" for a, b in zip(row["tokens"], row["tags"], strict=True))
            for row in rows
        ]
        path.write_text("\n\n\n".join(lines).replace("\n", "\r\n"))
    return path


def refused(path, **more):
    """Returns the message that refuses a training file."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers compare the message
        tasks.load_task(train_file=path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".conll", ".txt"])
def test_every_format_gives_the_same_task(suffix, tmp_path):
    path = write(tmp_path / f"train{suffix}", ROWS)
    task = tasks.load_task(train_file=path, test_file=path)
    assert (task.kind, task.label_names, task.metric, task.num_labels) == (
        "tagging",
        NAMES,
        "f1",
        3,
    )
    assert task.splits["test"]["tokens"][:] == [row["tokens"] for row in ROWS]
    assert task.splits["train"]["tags"][:] == [[2, 0, 2, 2], [1, 1], [0, 2]]
    inside, labels = task.user_messages()
    assert inside == (
        f"1 entities of {path} begin with I instead of B, which is not IOB2; they count as "
        "entities, as in conlleval"
    )
    assert labels == "labels (custom, words of train, test): B-ART (2, 2), I-ART (2, 2), O (4, 4)"


def test_spaces_separate_words_from_tags_where_there_is_no_tab(tmp_path):
    path = tmp_path / "train.conll"
    path.write_text("\ufeffthe   DET\n film NOUN \n\t\n\u00a0 X\n", encoding="utf-8")
    task = tasks.load_task(train_file=path)
    assert task.splits["train"]["tokens"][:] == [["the", "film"], ["\u00a0"]]
    assert (task.label_names, task.metric) == (("DET", "NOUN", "X"), "accuracy")


def test_stated_tags_need_not_occur(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    names = ("O", "B-ART", "I-ART", "B-ANIMAL")
    task = tasks.load_task(train_file=path, stated_names=names)
    assert task.label_names == names
    assert task.splits["train"]["tags"][:] == [[0, 1, 0, 0], [2, 2], [1, 0]]
    # The tags of an adapter take precedence; the training file is not read.
    test = tasks.load_task(
        train_file=tmp_path / "none.jsonl",
        test_file=path,
        splits=("test",),
        label_names=names,
        tagging=True,
    )
    assert test.label_names == names


def test_files_with_sentences_are_read_as_before(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"sentence": word, "tokens": [word], "label": word} for word in ("yes", "no")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tasks.load_task(train_file=path).kind == "classification"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tags": ["O"]}, "row 4: 2 tokens, but 1 tags; give every token one tag"),
        ({"tags": ["O"] * 3}, "row 4: 2 tokens, but 3 tags; give every token one tag"),
        (
            {"tokens": [], "tags": []},
            "row 4: tokens is a list without words; remove or fill the row",
        ),
        ({"tags": []}, "row 4: tags is a list without words; remove or fill the row"),
        ({"tags": ["O", " "]}, "row 4: tag 2 is empty; give every token a tag"),
        ({"tags": ["O", 3]}, "row 4: tags has 3 as word 2, which is not text"),
        ({"tokens": ["a", None]}, "row 4: tokens has None as word 2, which is not text"),
        (
            {"tokens": "a b"},
            "row 4: tokens is str, not a list of words; use .jsonl or .parquet, or ",
        ),
        ({"tokens": None}, "row 4: tokens is NoneType, not a list of words"),
        ({"tokens": ["a", "\ud800"]}, "row 4: tokens holds half a surrogate pair in word 2, which"),
        (
            {"tokens": ["a", "b" * 100_000]},
            "row 4: tokens has 100001 characters, over the limit of",
        ),
    ],
)
def test_bad_rows_are_named(row, told, tmp_path):
    whole = {"tokens": ["a", "b"], "tags": ["O", "O"]} | row
    path = write(tmp_path / "train.jsonl", [*ROWS, whole])
    assert refused(path).startswith(f"{path}, {told}")


def test_bad_files_are_named(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    other = write(tmp_path / "test.jsonl", [ROWS[0], {"tokens": ["a"], "tags": ["B-SHIP"]}])
    assert refused(path, test_file=other) == (
        f"{other}, row 2: tag 'B-SHIP' is not one of the training tags B-ART, I-ART, O"
    )
    assert refused(path, stated_names=("O", "B-ART")) == (
        f"{path}, row 2: tag 'I-ART' is not one of the training tags O, B-ART"
    )
    alone = write(tmp_path / "alone.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "O"]}])
    assert refused(alone) == f"{alone}: every tag is 'O'; training needs at least two tags"
    untagged = write(tmp_path / "untagged.jsonl", [{"tokens": ["a", "b"]}])
    assert refused(untagged) == f"{untagged} has no column 'tags'; its columns are tokens"
    with pytest.raises(ValueError, match="without a training file the tags are unknown"):
        tasks.load_task(test_file=path)
    assert refused(path, text=True).startswith(f"{path} has no column 'sentence'")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\tO\nb\tO\tX\n", "line 2 has 3 columns; a .conll file has a word in each line, in all "),
        ("a b c d\n", "line 1 has 4 columns"),
        ("a\tO\n\nb\n", "line 3 has 1 columns"),
        ("\n\n", "has no rows"),
        ("a\nb\n", "has no column 'tags'; its columns are tokens"),
        ("a\t\nb\tO\n", "row 1: tag 1 is empty"),
    ],
)
def test_bad_text_is_refused(text, told, tmp_path):
    path = tmp_path / "train.conll"
    path.write_text(text)
    assert refused(path).replace(f"{path}, ", "").replace(f"{path} ", "").startswith(told)
