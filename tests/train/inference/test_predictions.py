"""Tests train.inference.prediction_files: rows are kept as they are, or nothing is written."""

import csv
import datetime
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data.rows import read_rows
from train.data.writing import write_rows
from train.inference.prediction_files import predict_file

NAMES = ("negative", "positive")


def predict(columns):
    """Returns logits [0, number of characters - 4], which are exact in any precision."""
    lengths = [len(sentence) for sentence in columns["sentence"]]
    if "sentence2" in columns:
        pairs = zip(lengths, columns["sentence2"], strict=True)
        lengths = [n + 10 * len(other) for n, other in pairs]
    return np.stack([np.zeros(len(lengths)), np.array(lengths) - 4], axis=1).astype(np.float32)


def write_all(path, chunks):
    with write_rows(path) as write:
        for chunk in chunks:
            write(chunk)


def probability(logit):
    return 1 / (1 + np.exp(-abs(logit)))


def test_parquet_keeps_columns_types_and_metadata(tmp_path):
    table = pa.table(
        {
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "sentence": pa.array(["good film", "bad", "four"], pa.large_string()),
            "when": pa.array([0, None, 1], pa.timestamp("ms", tz="UTC")),
            "tags": pa.array([["a"], [], None], pa.list_(pa.string())),
            "nested": pa.array([{"a": 1, "b": [2.5]}, None, {"a": None, "b": []}]),
            "small": pa.array([1, 2, 3], pa.uint8()),
            "amount": pa.array([datetime.timedelta(seconds=1)] * 3, pa.duration("us")),
        }
    ).replace_schema_metadata({"owner": "me"})
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(table, source)
    count = predict_file(
        source, target, predict, label_names=NAMES, write_logits=True, chunk_rows=2
    )
    assert count == 3
    result = pq.read_table(target)
    assert result.select(table.column_names).equals(table)
    assert result.schema.metadata[b"owner"] == b"me"
    assert result.column_names[7:] == ["prediction", "label_id", "probability", "logits"]
    assert result.schema.types[7:] == [
        pa.string(),
        pa.int64(),
        pa.float64(),
        pa.list_(pa.float32()),
    ]
    assert result["prediction"].to_pylist() == ["positive", "negative", "negative"]
    assert result["label_id"].to_pylist() == [1, 0, 0]
    np.testing.assert_allclose(
        result["probability"].to_pylist(), probability(np.array([5, -1, 0])), rtol=1e-14
    )
    assert result["logits"].to_pylist() == [[0, 5], [0, -1], [0, 0]]


def test_parquet_of_datasets_stays_readable_by_datasets(tmp_path):
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])}
    )
    rows = {"sentence": ["good film", "bad"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(source)
    predict_file(source, target, predict, label_names=NAMES)
    result = datasets.Dataset.from_parquet(str(target), cache_dir=str(tmp_path / "cache"))
    assert result.features["label"] == features["label"]
    assert result["prediction"][:] == ["positive", "negative"]


def test_jsonl_keeps_nulls_nesting_numbers_and_missing_keys(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        '{"id": 12345678901234567890123, "sentence": "schöne 映画 😀", "meta": {"b": [1, null]}}',
        '{"sentence": "bad", "x": null, "id": "007", "y": 1.0, "z": [true, {}]}',
        '{"sentence": "a\\u2028b\\nc d", "id": 1, "note": "half \\ud83d"}',
    ]
    source.write_text("\n".join(lines), encoding="utf-8")
    assert predict_file(source, target, predict, label_names=NAMES, write_logits=True) == 3
    written = target.read_text(encoding="utf-8").split("\n")
    assert written[3:] == [""]
    for line, result, logit in zip(lines, written, [7, -1, 3], strict=False):
        added = {
            "prediction": NAMES[logit > 0],
            "label_id": int(logit > 0),
            "probability": pytest.approx(probability(logit), rel=1e-14),
            "logits": [0.0, logit],
        }
        assert json.loads(result) == json.loads(line) | added
        assert list(json.loads(result)) == [*json.loads(line), *added]
    assert written[0].startswith(lines[0].removesuffix("}"))
    assert written[1].startswith(lines[1].removesuffix("}"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_fields_come_back_as_they_were(tmp_path, suffix):
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    delimiter = {".csv": ",", ".tsv": "\t"}[suffix]
    rows = [
        ["id", "sentence", "note, of\tmine"],
        ["007", "good film", "NA"],
        ["", 'she said "no", twice\tand left', "null"],
        ["1e5", "two, or three", " padded "],
        ["1.10", "schöne 映画 😀", "null"],
    ]
    if suffix == ".csv":  # a row of a .tsv is one line
        rows[3][1], rows[4][2] = "two\r\nlines\nor three", "carriage\rreturn"
    with source.open("w", newline="", encoding="utf-8") as file:
        csv.writer(
            file, delimiter=delimiter, lineterminator="\r\n", quoting=csv.QUOTE_ALL
        ).writerows(rows)
    count = predict_file(
        source, target, predict, label_names=NAMES, write_logits=True, chunk_rows=3
    )
    assert count == 4
    with target.open(newline="", encoding="utf-8") as file:
        result = list(csv.reader(file, delimiter=delimiter, strict=True))
    assert [row[:3] for row in result] == rows
    assert result[0][3:] == ["prediction", "label_id", "probability", "logits"]
    assert result[1][3:5] == ["positive", "1"]
    assert float(result[1][5]) == pytest.approx(probability(5), rel=1e-14)
    assert json.loads(result[1][6]) == [0.0, 5.0]


@pytest.mark.parametrize("broken", ["two\nlines", "two\rlines", "end\r\n"])
def test_a_line_break_is_not_written_to_a_tsv(tmp_path, broken):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.tsv"
    rows = [{"sentence": "good", "note": "a"}, {"sentence": "bad", "note": broken}]
    source.write_text("\n".join(map(json.dumps, rows)))
    target.write_text("kept")
    with pytest.raises(ValueError, match=r".") as caught:
        predict_file(source, target, predict, label_names=NAMES, chunk_rows=1)
    assert str(caught.value) == (
        f"{target}: row 2 of the input holds a line break in the column 'note', which a .tsv "
        "cannot; write .csv or .jsonl instead"
    )
    assert target.read_text() == "kept"
    # Both formats that the message names can store it.
    for suffix in (".csv", ".jsonl"):
        predict_file(source, target.with_suffix(suffix), predict, label_names=NAMES)
        again = [row for rows in read_rows(target.with_suffix(suffix)) for row in rows]
        assert again[1]["note"] == broken
    source.write_text(json.dumps({"sentence": "good", broken: "a"}))
    with pytest.raises(ValueError, match=r"out\.tsv: the header holds a line break in the column"):
        predict_file(source, target, predict, label_names=NAMES)
    # The message names the row even if the text is a prediction and not part of the input.
    source.write_text(json.dumps({"sentence": "good"}))
    with pytest.raises(ValueError, match=r"row 1 of the input holds .* the column 'prediction'"):
        predict_file(source, target, lambda columns: [broken], label_names=())


def test_plain_csv_is_written_plainly(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(b"sentence,id\r\nfour,007\r\n")
    predict_file(source, target, predict, label_names=NAMES)
    assert target.read_text() == (
        "sentence,id,prediction,label_id,probability\nfour,007,negative,0,0.5\n"
    )


def test_regression_writes_one_number(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"sentence": "good"}\n')

    def score(columns):
        return np.full((len(columns["sentence"]), 1), 2.5, np.float32)

    target = tmp_path / "out.jsonl"
    predict_file(source, target, score, label_names=(), write_logits=True)
    assert json.loads(target.read_text()) == {
        "sentence": "good",
        "prediction": 2.5,
        "logits": [2.5],
    }


def test_pairs_reach_the_model_as_pairs(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("sentence2,sentence\nabc,a\nb,bb\n")
    predict_file(source, target, predict, label_names=NAMES, write_logits=True)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["logits"][1] for row in rows] == [1 + 30 - 4, 2 + 10 - 4]


@pytest.mark.parametrize("source_suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("target_suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
def test_formats_may_differ(tmp_path, source_suffix, target_suffix):
    source, target = tmp_path / f"in{source_suffix}", tmp_path / f"out{target_suffix}"
    write_all(source, [[{"sentence": "good film", "n": "1"}, {"sentence": "bad", "n": "2"}]])
    predict_file(source, target, predict, label_names=NAMES, chunk_rows=1)
    again = tmp_path / "again.jsonl"
    with pytest.raises(ValueError, match="already has a column 'prediction'"):
        predict_file(target, again, predict, label_names=NAMES)
    if target_suffix == ".parquet":
        rows = pq.read_table(target).to_pylist()
    elif target_suffix == ".jsonl":
        rows = [json.loads(line) for line in target.read_text().splitlines()]
    else:
        delimiter = {".csv": ",", ".tsv": "\t"}[target_suffix]
        rows = list(csv.DictReader(target.read_text().splitlines(), delimiter=delimiter))
    assert [(row["sentence"], row["n"], row["prediction"]) for row in rows] == [
        ("good film", "1", "positive"),
        ("bad", "2", "negative"),
    ]
    assert [int(row["label_id"]) for row in rows] == [1, 0]


def test_values_of_other_types_in_csv(tmp_path):
    table = pa.table(
        {
            "sentence": ["a"],
            "none": pa.array([None], pa.string()),
            "flag": [True],
            "tags": [["a", "ü"]],
            "day": pa.array([datetime.date(2024, 2, 29)]),
        }
    )
    write_all(tmp_path / "out.csv", [table])
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == (
        'sentence,none,flag,tags,day\na,,true,"[""a"", ""ü""]",2024-02-29\n'
    )


def test_records_that_a_table_would_change_are_refused(tmp_path):
    parquet, text = tmp_path / "out.parquet", tmp_path / "out.csv"
    for path, first, second, problem in [
        (
            parquet,
            {"n": 1},
            {"n": "one"},
            "cannot be stored as parquet: Table schema does not match",
        ),
        (parquet, {"n": 1}, {"n": 1.5}, "cannot be stored as parquet: Table schema does not match"),
        (parquet, {"n": {"a": 1}}, {"n": {"b": 1}}, "cannot be stored as parquet: Table schema"),
        (parquet, {"n": 1}, {"n": 2**70}, "cannot be stored as parquet: "),
        (parquet, {"n": 1}, {"m": 1}, "the first rows have no column 'm'; write .jsonl instead"),
        (text, {"n": 1}, {"m": 1}, "the first rows have no column 'm'; write .jsonl instead"),
        (text, {"n": 1}, {"n": b"1"}, "column 'n' has bytes, which only a .parquet can hold"),
        (tmp_path / "out.jsonl", {"n": 1}, {"n": b"1"}, "column 'n' has bytes, which only a"),
    ]:
        with pytest.raises(ValueError, match=problem):
            write_all(path, [[first], [second]])
    assert list(tmp_path.iterdir()) == []


def test_records_with_gaps_fit_in_parquet(tmp_path):
    path = tmp_path / "out.parquet"
    write_all(
        path, [[{"n": 1, "s": "a"}, {"n": None, "s": "b"}], [{"s": "c"}], [{"n": 4, "s": ""}]]
    )
    assert pq.read_table(path).to_pydict() == {"n": [1, None, None, 4], "s": ["a", "b", "c", ""]}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_many_rows_stream(tmp_path, suffix):
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    sentences = [f"sentence {i}" for i in range(50_000)]
    write_all(source, [pa.table({"sentence": sentences, "id": list(range(50_000))})])
    sizes, steps, partial = [], [], []

    def counting(columns):
        assert list(columns) == ["sentence"]
        chunk = columns["sentence"]
        assert chunk == sentences[sum(sizes) : sum(sizes) + len(chunk)]
        sizes.append(len(chunk))
        partial.append(sum(path.stat().st_size for path in tmp_path.glob(".*.tmp")))
        return predict(columns)

    count = predict_file(source, target, counting, label_names=NAMES, progress=steps.append)
    assert count == sum(sizes) == 50_000
    assert max(sizes) == 1024
    assert sizes == steps
    assert partial[40] > partial[20] > 0  # rows reach the disk long before the last one is read
    assert not list(tmp_path.glob(".*"))
    if suffix == ".parquet":
        result = pq.read_table(target)
        assert result["sentence"].to_pylist() == sentences
        assert result["id"].to_pylist() == list(range(50_000))
        return
    lines = target.read_text().splitlines()[suffix == ".csv" :]
    if suffix == ".jsonl":
        assert [json.loads(line)["id"] for line in lines] == list(range(50_000))
    else:
        assert [int(line.split(",")[1]) for line in lines] == list(range(50_000))


def test_probabilities_of_huge_logits(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("sentence,id\ngood film,1\nbad,2\n")

    def huge(columns):
        return np.array([[1e30, -1e30], [-1e4, -1e4]], np.float32)

    predict_file(source, target, huge, label_names=NAMES)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["prediction"], row["probability"]) for row in rows] == [
        ("negative", 1.0),
        ("negative", 0.5),
    ]


def test_predictions_that_are_text_or_numbers_themselves(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"sentence": "good"}\n{"sentence": "bad"}\n')
    for predictions in (["gut", ""], [1.5, None], [None, None]):
        predict_file(source, target, lambda *_, made=predictions: made, label_names=())
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert [row["prediction"] for row in rows] == predictions
        assert set(rows[0]) == {"sentence", "prediction"}
    write_all(source := tmp_path / "in.parquet", [pa.table({"sentence": ["a", "b"]})])
    predict_file(source, tmp_path / "out.parquet", lambda *_: [None, None], label_names=())
    assert pq.read_schema(tmp_path / "out.parquet").field("prediction").type == pa.float64()
