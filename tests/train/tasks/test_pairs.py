"""Tests files of pairs for embeddings: every format gives the same task, and bad rows are named."""

import json

import hub_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train import tasks
from train.tasks import pairs

PAIRS = [{"anchor": "a film", "positive": "it was good"}, {"anchor": "we", "positive": "a plot"}]
TRIPLETS = [row | {"negative": "not it"} for row in PAIRS]
SCORED = [
    {"sentence1": "a film", "sentence2": "it was good", "score": 0.25},
    {"sentence1": "we", "sentence2": "a plot", "score": -1.0},
]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [mark.join(rows[0]), *(mark.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


def refused(path, **more):
    """Returns the message that refuses a training file."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers compare the message
        tasks.load_task(train_file=path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize(
    ("rows", "kind", "metric"),
    [(PAIRS, "pairs", "mrr"), (TRIPLETS, "triplets", "mrr"), (SCORED, "scored pairs", "spearman")],
)
def test_every_format_gives_the_same_task(suffix, rows, kind, metric, tmp_path):
    path = write(tmp_path / f"train{suffix}", rows)
    task = tasks.load_task(train_file=path, validation_file=path)
    assert (task.kind, task.label_names, task.metric) == ("embedding", (), metric)
    assert pairs.class_of(task.splits["train"]) == kind
    found = task.splits["train"]
    texts = [list(row.values()) for row in rows]
    assert [list(row.values()) for row in found] == texts
    assert found.column_names[:2] == ["sentence1", "sentence2"]


def test_the_validation_file_decides_the_metric(tmp_path):
    train = write(tmp_path / "train.jsonl", TRIPLETS)
    scored = write(tmp_path / "valid.jsonl", SCORED)
    assert tasks.load_task(train_file=train, validation_file=scored).metric == "spearman"
    message = refused(train, validation_file=scored, test_file=train)
    assert message.startswith(f"{scored} has scored pairs, but {train} has triplets")


def test_files_of_regression_become_pairs_where_embeddings_are_asked_for(tmp_path):
    rows = [
        {"sentence": row["sentence1"], "sentence2": row["sentence2"], "score": row["score"]}
        for row in SCORED
    ]
    path = write(tmp_path / "train.jsonl", rows)
    assert tasks.load_task(train_file=path).kind == "regression"
    task = tasks.load_task(train_file=path, embedding=True)
    assert task.kind == "embedding"
    assert task.splits["train"]["sentence1"][:] == ["a film", "we"]


def test_stsb_has_scores_divided_by_their_highest(tmp_path):
    hub_data.write(tmp_path, "stsb")
    hub_data.write(tmp_path, "cola")
    plain = tasks.load_task("stsb", data_dir=tmp_path)
    task = tasks.load_task("stsb", data_dir=tmp_path, embedding=True)
    assert (plain.kind, task.kind, task.metric) == ("regression", "embedding", "spearman")
    assert task.benchmark is None
    for split, rows in plain.splits.items():
        found = task.splits[split]
        assert found["sentence1"][:] == rows["sentence1"][:]
        assert found["sentence2"][:] == rows["sentence2"][:]
        assert found["score"][:] == pytest.approx([score / 5 for score in rows["score"][:]])
    with pytest.raises(ValueError, match="cola has no pairs with scores of their similarity"):
        tasks.load_task("cola", data_dir=tmp_path, embedding=True)


@pytest.mark.parametrize(
    ("rows", "change", "told"),
    [
        (PAIRS, {"anchor": " "}, "row 3: anchor is empty; remove or fill the row"),
        (PAIRS, {"positive": None}, "row 3: positive is missing (null)"),
        (TRIPLETS, {"negative": ""}, "row 3: negative is empty"),
        (PAIRS, {"anchor": 4}, "row 3: anchor is int, not text"),
        (SCORED, {"sentence2": ""}, "row 3: sentence2 is empty"),
        (SCORED, {"score": float("nan")}, "row 3: score 'nan' is not a finite number"),
        (SCORED, {"score": None}, "row 3: score 'None' is not a finite number"),
        (SCORED, {"score": "high"}, "row 3: score 'high' is not a finite number"),
        (SCORED, {"score": True}, "row 3: score 'True' is not a finite number"),
        (SCORED, {"score": 4.2}, "row 3: score 4.2 is not from -1 to 1, as the cosine of two emb"),
        (SCORED, {"score": -1.001}, "row 3: score -1.001 is not from -1 to 1"),
    ],
)
def test_bad_rows_are_named(rows, change, told, tmp_path):
    path = write(tmp_path / "train.jsonl", [*rows, rows[0] | change])
    assert refused(path).startswith(f"{path}, {told}")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"sentence1": "a", "sentence2": "b", "label": "x"},
            "has a column 'label' of pairs, which",
        ),
        (
            {"sentence1": "a", "sentence2": "b", "anchor": "a", "positive": "b"},
            "has two pairs of texts, anchor and positive as well as sentence1 and sentence2",
        ),
        (
            {"anchor": "a", "positive": "b", "score": 1},
            "has a column 'score' beside anchor, positive; scored pairs have",
        ),
        (
            {"sentence1": "a", "sentence2": "b", "negative": "c"},
            "has a column 'negative' beside sentence1 and sentence2; call these anchor and",
        ),
        (
            {"anchor": "a", "positive": "b", "negative_1": "c"},
            "has the column 'negative_1'; one negative is read in each row",
        ),
        ({"anchor": "a", "label": "x"}, "has no column 'sentence'; its columns are anchor, label"),
    ],
)
def test_columns_that_are_not_clear_are_refused(row, told, tmp_path):
    path = write(tmp_path / "train.jsonl", [row])
    assert refused(path).startswith(f"{path} {told}")


def test_files_of_two_kinds_are_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", PAIRS)
    other = write(tmp_path / "test.jsonl", [{"sentence": "a", "label": "x"}])
    message = refused(path, test_file=other)
    assert message.startswith(f"{other} has no pairs of texts: it needs the columns anchor and pos")
    both = write(tmp_path / "both.jsonl", [{"sentence": w, "label": w} for w in "ab"])
    assert refused(both, test_file=path) == (
        f"{path} has no column 'sentence'; its columns are anchor, positive"
    )
    mixed = write(tmp_path / "mixed.jsonl", [*PAIRS * 600, TRIPLETS[0]])
    assert refused(mixed).startswith(f"{mixed}: the rows after row 1024 have a negative, but")
    mixed = write(tmp_path / "mixed.jsonl", [*TRIPLETS * 512, *PAIRS])
    assert refused(mixed).startswith(f"{mixed}: the rows after row 1024 have no negative, but")
    mixed = write(tmp_path / "mixed.jsonl", [*TRIPLETS, *PAIRS])
    assert refused(mixed).startswith(f"{mixed}, row 3: negative is missing (null)")
