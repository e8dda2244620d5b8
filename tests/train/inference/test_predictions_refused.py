"""Tests train.inference.prediction_files: what is refused, and that the old output stays."""

import numpy as np
import pytest

from tests.train.inference.test_predictions import NAMES, predict
from train.inference.prediction_files import predict_file


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("sentence,id\ngood film,1\nbad,2\n")
    return path


def refusal(source, target, function=predict, **keywords):
    """Returns the error message of predict_file; no file next to `target` may change."""
    before = {path: path.read_bytes() for path in target.parent.glob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError)) as caught:
        predict_file(source, target, function, label_names=NAMES, **keywords)
    after = {path: path.read_bytes() for path in target.parent.glob("*") if path.is_file()}
    assert before == after
    assert "\n" not in str(caught.value)
    return str(caught.value)


def never(columns):
    raise AssertionError("no prediction should be asked for")


def test_input_that_is_the_output(source, tmp_path):
    link = tmp_path / "link.csv"
    link.symlink_to(source)
    for target in (source, link, tmp_path / ".." / tmp_path.name / "in.csv"):
        assert "is the input file" in refusal(source, target, never)


@pytest.mark.parametrize("name", ["prediction", "label_id", "probability", "logits"])
def test_columns_that_exist_already(tmp_path, name):
    source = tmp_path / "in.csv"
    source.write_text(f"sentence,{name}\na,b\n")
    if name == "logits":
        assert predict_file(source, tmp_path / "fine.csv", predict, label_names=NAMES) == 1
    message = refusal(source, tmp_path / "out.csv", never, write_logits=True)
    assert message.startswith(
        f"{source} already has a column {name!r}, which is reserved for predictions"
    )


def test_output_that_cannot_be_written(source, tmp_path):
    assert "there is no folder" in refusal(source, tmp_path / "no" / "o.csv", never)
    assert "there is no folder" in refusal(source, source / "out.csv", never)
    assert "unsupported file type '.txt'" in refusal(source, tmp_path / "out.txt", never)
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert refusal(source, folder, never) == f"{folder} is a directory, not a file"


def test_output_folder_without_permission(source, tmp_path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    target = tmp_path / "out.csv"
    monkeypatch.setattr(type(target), "open", refuse)
    with pytest.raises(ValueError, match=r"out\.csv cannot be written: Permission denied"):
        predict_file(source, target, never, label_names=NAMES)


def test_bad_rows_leave_the_old_output(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    target.write_text("old")
    good = '{"sentence": "fine"}\n'
    for bad, problem in [
        ('{"sentence": ""}', "row 3: sentence is empty"),
        ('{"text": "x"}', "row 3: sentence is missing (null)"),
        ('{"sentence": 3}', "row 3: sentence is int, not text"),
        ('{"sentence": "12345678"}', "row 3: sentence has 8 characters, over the limit of 7"),
        ('{"sentence": "a"', "line 3 is not valid JSON"),
        (
            '{"sentence": "a", "sentence2": "b"}',
            "the rows after row 2 have a sentence2, but the rows before have none",
        ),
        ('{"sentence": "a", "prediction": "b"}', "already has a column 'prediction'"),
    ]:
        source.write_text(good + good + bad + "\n")
        message = refusal(source, target, chunk_rows=1, max_characters=7)
        assert message.startswith(str(source))
        assert problem in message
    assert target.read_text() == "old"


def test_files_that_cannot_be_read(tmp_path):
    target = tmp_path / "out.csv"
    assert refusal(tmp_path / "none.csv", target, never).endswith("none.csv does not exist")
    for content, problem in [
        (b"", "is empty (0 bytes)"),
        (b"sentence\n", "has no rows"),
        (b"text,id\na,1\n", "has no column 'sentence'; its columns are text, id"),
        (b"sentence\ncaf\xe9\n", "is not UTF-8 (byte 0xe9); convert it to UTF-8"),
    ]:
        source = tmp_path / "in.csv"
        source.write_bytes(content)
        assert refusal(source, target, never) == f"{source} {problem}"


def test_logits_are_checked(source, tmp_path):
    target = tmp_path / "out.csv"
    message = refusal(source, target, lambda columns: np.zeros((len(columns["sentence"]), 3)))
    assert message == "logits have shape (2, 3), not (2, 2)"
    message = refusal(
        source, target, lambda columns: np.full((len(columns["sentence"]), 2), np.nan)
    )
    assert message == "logits are not finite; the adapter or the backbone is damaged"


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_an_interruption_leaves_the_old_output(source, tmp_path, interruption, suffix):
    target = tmp_path / f"out{suffix}"
    target.write_text("old")
    calls = []

    def interrupted(columns):
        calls.append(columns)
        if len(calls) == 2:
            raise interruption
        return predict(columns)

    with pytest.raises(interruption):
        predict_file(source, target, interrupted, label_names=NAMES, chunk_rows=1)
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", f"out{suffix}"]
