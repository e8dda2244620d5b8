"""Tests train.tasks and its reader of files: loaded tasks and the messages of refused ones."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train import tasks

GOOD = [("a fine film", "pos"), ("a dull film", "neg"), ("fine", "pos")]


def write(path, columns):
    """Writes columns of Python values in the format of the file's suffix."""
    names = list(columns)
    records = list(zip(*columns.values(), strict=True))
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, record, strict=True))) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        delimiter = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [delimiter.join(map(str, record)) for record in [names, *records]]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def train_file(tmp_path):
    sentences, labels = zip(*GOOD, strict=True)
    return write(tmp_path / "train.csv", {"sentence": list(sentences), "label": list(labels)})


@pytest.mark.parametrize(
    ("name", "sizes", "positive"),
    [
        ("movie", (7431, 1036, 1077), 3698),
        ("product", (2583, 380, 354), 1501),
        ("tweet", (2982, 406, 410), 2053),
        ("editorial", (3637, 518, 488), 1539),
    ],
)
def test_built_in_tasks(name, sizes, positive):
    task = tasks.load_task(name)
    assert (task.name, task.kind, task.metric) == (name, "classification", "accuracy")
    assert task.label_names == ("negative", "positive")
    assert task.num_labels == 2
    assert list(task.splits) == ["train", "validation", "test"]
    assert tuple(len(split) for split in task.splits.values()) == sizes
    assert task.splits["train"].column_names == ["sentence", "label"]
    assert sum(task.splits["train"]["label"][:]) == positive


def test_built_in_regression_predicts_the_score():
    task = tasks.load_task("tweet", regression=True, splits=["test"])
    assert (task.kind, task.metric, task.label_names) == ("regression", "pearson", ())
    assert task.num_labels == 1
    assert list(task.splits) == ["test"]
    labels = tasks.load_task("tweet", splits=["test"]).splits["test"]["label"][:]
    scores = np.array(task.splits["test"]["score"][:])
    assert scores.min() >= -4
    assert scores.max() <= 4
    np.testing.assert_array_equal(scores > 0, np.array(labels) == 1)


def test_a_file_replaces_a_built_in_split(tmp_path):
    path = write(tmp_path / "mine.csv", {"sentence": ["good", "bad"], "label": ["positive", 0]})
    task = tasks.load_task("movie", test_file=path)
    assert len(task.splits["train"]) == 7431
    assert task.splits["test"].to_dict() == {"sentence": ["good", "bad"], "label": [1, 0]}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
def test_user_files_of_every_format(tmp_path, suffix):
    sentences, labels = zip(*GOOD, strict=True)
    columns = {"id": [1, 2, 3], "sentence": sentences, "sentence2": sentences, "label": labels}
    task = tasks.load_task(
        train_file=write(tmp_path / f"train{suffix}", columns),
        validation_file=write(tmp_path / f"validation{suffix}", columns),
    )
    assert (task.name, task.label_names) == ("custom", ("neg", "pos"))
    assert list(task.splits) == ["train", "validation"]
    assert task.splits["train"].to_dict() == {
        "sentence": list(sentences),
        "sentence2": list(sentences),
        "label": [1, 0, 1],
    }


def test_scores_without_labels_are_regression(tmp_path):
    path = write(tmp_path / "t.csv", {"sentence": ["a", "b"], "score": ["-1.5", "2e1"]})
    task = tasks.load_task("stars", train_file=path)
    assert (task.name, task.kind) == ("stars", "regression")
    assert task.splits["train"]["score"][:] == [-1.5, 20.0]


def test_labels_win_over_scores_unless_asked(tmp_path):
    columns = {"sentence": ["a", "b"], "label": ["x", "y"], "score": [0.5, 1.5]}
    path = write(tmp_path / "t.jsonl", columns)
    assert tasks.load_task(train_file=path).label_names == ("x", "y")
    task = tasks.load_task(train_file=path, regression=True)
    assert task.splits["train"].to_dict() == {"sentence": ["a", "b"], "score": [0.5, 1.5]}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_text_columns_stay_text(tmp_path, suffix):
    sentences = ["null", "NA", "007", "1e3", "True", "nan", " padded "]
    labels = ["NA", "007", "null", "NA", "NA", "NA", "NA"]
    path = write(tmp_path / f"t{suffix}", {"sentence": sentences, "label": labels})
    task = tasks.load_task(train_file=path)
    assert task.splits["train"]["sentence"][:] == sentences
    assert task.label_names == ("007", "NA", "null")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, -1], ("-1", "9", "10")),
        (["b", "10", "9"], ("10", "9", "b")),
        ([1.0, 0.0, 1.0], ("0", "1")),  # integers in pandas, if some were once missing
        ([True, False, True], ("False", "True")),
    ],
)
def test_order_of_label_names(tmp_path, labels, names):
    columns = {"sentence": ["a", "b", "c"], "label": labels}
    path = write(tmp_path / "t.parquet", columns)
    task = tasks.load_task(train_file=path)
    assert task.label_names == names
    numbers = [str(int(x) if isinstance(x, float) else x) for x in labels]
    assert task.splits["train"]["label"][:] == [names.index(number) for number in numbers]


def test_class_labels_of_datasets_keep_their_order(tmp_path):
    path = tmp_path / "t.parquet"
    label = datasets.ClassLabel(names=["zero", "one", "never"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": label})
    rows = {"sentence": ["a", "b"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    task = tasks.load_task(train_file=path)
    assert task.label_names == ("zero", "one", "never")
    assert task.splits["train"]["label"][:] == [1, 0]
    hidden = {"sentence": ["a", "b"], "label": [1, -1]}
    datasets.Dataset.from_dict(hidden, features=features).to_parquet(path)
    with pytest.raises(ValueError, match=r"row 2: the label is missing"):
        tasks.load_task(train_file=path)


def test_label_names_of_an_adapter_take_precedence(tmp_path):
    path = write(tmp_path / "t.csv", {"sentence": ["a", "b"], "label": ["pos", "neg"]})
    task = tasks.load_task(test_file=path, label_names=("pos", "neg", "neutral"))
    assert task.label_names == ("pos", "neg", "neutral")
    assert task.splits["test"]["label"][:] == [0, 1]


def test_integer_labels_are_names_before_they_are_positions(tmp_path):
    path = write(tmp_path / "t.csv", {"sentence": ["a", "b"], "label": [1, 2]})
    named = tasks.load_task(test_file=path, label_names=["2", "1"])
    assert named.splits["test"]["label"][:] == [1, 0]
    stated = {"label_names": ["a", "b", "c"], "stated_names": ["c", "b", "a"]}
    position = tasks.load_task(test_file=path, **stated)
    assert position.splits["test"]["label"][:] == [1, 0]
    assert position.notes == (f"labels 1, 2 of {path} are read as b, a",)


def test_built_in_labels_do_not_pass_as_those_of_another_adapter():
    with pytest.raises(
        ValueError, match=r"test.parquet, row 1: label '(nega|posi)tive' is not one"
    ):
        tasks.load_task("movie", splits=["test"], label_names=["anger", "joy", "fear"])


def test_label_names_come_from_a_training_file_not_asked_for(tmp_path, train_file):
    path = write(tmp_path / "test.csv", {"sentence": ["a"], "label": ["pos"]})
    task = tasks.load_task(train_file=train_file, test_file=path, splits=["test"])
    assert list(task.splits) == ["test"]
    assert task.splits["test"]["label"][:] == [1]


def test_an_edited_file_is_read_again(tmp_path, train_file):
    tasks.load_task(train_file=train_file)
    train_file.write_text("sentence,label\nnew,x\nnewer,y\n")
    assert tasks.load_task(train_file=train_file).label_names == ("x", "y")


def test_blank_lines_bom_and_crlf(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfsentence,label\r\n\r\n"one, ""two""\r\nthree",0\r\nfour,1\r\n')
    split = tasks.load_task(train_file=path).splits["train"]
    assert split["sentence"][:] == ['one, "two"\r\nthree', "four"]


def load_error(**keywords):
    """Returns the one-line error message of load_task."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        tasks.load_task(**keywords)
    assert type(caught.value) in (ValueError, FileNotFoundError)  # not an error of pyarrow
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_task_and_splits(train_file):
    assert load_error(name="films") == (
        "unknown task 'films'; use movie, product, tweet, editorial, cola, sst2, mrpc, qqp, stsb, "
        "mnli, qnli, rte, wnli, boolq, cb, copa, multirc, record, wic, wsc, squad, a translation "
        "such as wmt16-ro-en, or give files of your own, also of words with tags (NER, part of "
        "speech)"
    )
    assert load_error(name="moive").startswith("unknown task 'moive' (did you mean 'movie'?); use ")
    for name in (None, "custom"):  # a name that the user did not give
        error = load_error(name=name)
        assert error.startswith("no examples were given; for --task use movie, product, tweet, ")
        assert error.endswith(" or your own with --train-file, --validation-file or --test-file")
    assert load_error(train_file=train_file, splits=["dev"]) == (
        "there is no file for the split 'dev'; use one of train"
    )
    assert load_error(test_file=train_file) == (
        "without a training file the label names are unknown; give train_file or label_names"
    )


def test_missing_file_directory_and_suffix(tmp_path, train_file):
    missing = tmp_path / "none.csv"
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        tasks.load_task(train_file=missing)
    assert load_error(train_file=tmp_path) == f"{tmp_path} is a directory, not a file"
    text = tmp_path / "t.xls"
    text.write_text("sentence\n")
    assert load_error(train_file=text) == (
        f"{text} has the unsupported file type '.xls'; use .parquet, .jsonl, .csv, .tsv, .conll, "
        ".txt"
    )
    array = tmp_path / "t.json"
    array.write_text("[]")
    assert load_error(train_file=array).endswith("write one JSON object per line, as .jsonl")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
def test_empty_files(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    path.touch()
    assert load_error(train_file=path) == f"{path} is empty (0 bytes)"


def test_files_without_rows(tmp_path):
    header, lines, table = tmp_path / "t.csv", tmp_path / "t.jsonl", tmp_path / "t.parquet"
    header.write_text("sentence,label\n")
    lines.write_text("\n\n")
    pq.write_table(pa.table({"sentence": pa.array([], pa.string())}), table)
    for path in (header, lines, table):
        assert load_error(train_file=path) == f"{path} has no rows"


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
def test_missing_columns_are_listed(tmp_path, suffix):
    path = write(tmp_path / f"t{suffix}", {"text": ["a"], "label": [1]})
    assert load_error(train_file=path) == (
        f"{path} has no column 'sentence'; its columns are text, label"
    )
    write(path, {"sentence": ["a"], "class": [1]})
    assert load_error(train_file=path) == (
        f"{path} has no column 'label'; its columns are sentence, class"
    )
    assert "no column 'score'" in load_error(train_file=path, regression=True)


def test_label_outside_the_set(tmp_path, train_file):
    path = write(tmp_path / "v.csv", {"sentence": ["a", "b"], "label": ["pos", "positive"]})
    assert load_error(train_file=train_file, validation_file=path) == (
        f"{path}, row 2: label 'positive' is not one of 'neg', 'pos'"
    )
    path = write(tmp_path / "v.csv", {"sentence": ["a"], "label": [2]})
    assert "row 1: label '2' is not one of" in load_error(name="movie", test_file=path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_missing_label(tmp_path, suffix):
    labels = ["x", "" if suffix == ".csv" else None]
    path = write(tmp_path / f"t{suffix}", {"sentence": ["a", "b"], "label": labels})
    assert load_error(train_file=path) == f"{path}, row 2: the label is missing"


def test_labels_of_another_kind(tmp_path):
    path = write(tmp_path / "t.jsonl", {"sentence": ["a", "b"], "label": [0, 0.5]})
    assert load_error(train_file=path) == (
        f"{path}, row 2: label '0.5' is neither an integer nor text; "
        "a number to predict belongs in a column 'score'"
    )
    write(path, {"sentence": ["a", "b"], "label": [0, [1, 2]]})
    assert "row 2: label '[1, 2]'" in load_error(train_file=path)
    pandas_missing = write(tmp_path / "t.parquet", {"sentence": ["a"], "label": [float("nan")]})
    assert load_error(train_file=pandas_missing).endswith("row 1: the label is missing")


@pytest.mark.parametrize("score", [None, float("nan"), float("-inf"), "high", True, [1.0]])
def test_scores_that_are_no_numbers(tmp_path, score):
    path = write(tmp_path / "t.jsonl", {"sentence": ["a", "b"], "score": [1, score]})
    message = f"{path}, row 2: score {str(score)!r} is not a finite number"
    assert load_error(train_file=path, regression=True) == message


def test_long_sentence(tmp_path):
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = write(
            tmp_path / f"t{suffix}", {"sentence": ["a", "x" * 1_000_000], "label": ["0", "1"]}
        )
        assert load_error(train_file=path) == (
            f"{path}, row 2: sentence has 1000000 characters, over the limit of 100000; "
            "shorten or split it"
        )
        task = tasks.load_task(train_file=path, max_characters=1_000_000)
        assert len(task.splits["train"]["sentence"][1]) == 1_000_000


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        (None, "sentence is missing (null); remove or fill the row"),
        ("", "sentence is empty; remove or fill the row"),
        (" \t\n", "sentence is empty; remove or fill the row"),
        (7, "sentence is int, not text"),
        ("half \ud83d", "sentence holds half a surrogate pair, which is not a valid character"),
    ],
)
def test_sentences_that_are_no_text(tmp_path, sentence, problem):
    path = write(tmp_path / "t.jsonl", {"sentence": ["a", sentence], "label": [0, 1]})
    assert load_error(train_file=path) == f"{path}, row 2: {problem}"


def test_the_second_sentence_is_checked_too(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"sentence": "a", "sentence2": "b", "label": 0}\n{"sentence": "c"}\n')
    assert load_error(train_file=path).startswith(f"{path}, row 2: sentence2 is missing (null)")


def test_pairs_in_one_split_only(tmp_path, train_file):
    columns = {"sentence": ["a"], "sentence2": ["b"], "label": ["pos"]}
    path = write(tmp_path / "v.csv", columns)
    assert load_error(train_file=train_file, validation_file=path) == (
        f"{path} has a column 'sentence2', but {train_file} has none"
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_text_that_is_not_utf8(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    path.write_bytes("sentence\nun café\n".encode("latin-1"))
    assert load_error(train_file=path) == f"{path} is not UTF-8 (byte 0xe9); convert it to UTF-8"


def test_damaged_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 this is none PAR1")
    assert load_error(train_file=path).startswith(f"{path} is not a readable parquet file: ")
    pq.write_table(pa.table({"sentence": ["abc" * 1000 + str(i) for i in range(99)]}), path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    assert load_error(train_file=path).startswith(f"{path} is not a readable parquet file: ")
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"sentence": latin}), path)
    assert "Invalid UTF8" in load_error(train_file=path)


def test_broken_json_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"sentence": "a", "label": 0}\n\n{"sentence": "b", "label": 1\n')
    message = load_error(train_file=path)
    assert message.startswith(f"{path}, line 3 is not valid JSON: Expecting ',' delimiter")
    path.write_text('["a", 0]\n')
    assert load_error(train_file=path) == f'{path}, line 1 is not a JSON object: ["a", 0]'


def test_broken_csv(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("sentence,label\na,0\nb, c,1\n")
    assert load_error(train_file=path) == (
        f"{path}, row 2 has 3 fields, but the header has 2; quote fields that contain the delimiter"
    )
    path.write_text('sentence,label\na,0\n"b,1\nc,0\n')
    assert load_error(train_file=path).startswith(f"{path}, line 3: unexpected end of data; ")
    path.write_text('sentence,label\n"good" it said,0\n')
    assert load_error(train_file=path).startswith(f"{path}, line 2: ',' expected after '\"'; ")
    path.write_text("sentence,label,label\na,0,1\n")
    assert "two columns of the header have the same name" in load_error(train_file=path)


def test_one_class_in_training(tmp_path):
    path = write(tmp_path / "t.csv", {"sentence": ["a", "b"], "label": ["pos", "pos"]})
    message = f"{path}: every label is 'pos'; training needs at least two classes"
    assert load_error(train_file=path) == message
    assert load_error(train_file=path, label_names=["neg", "pos"]) == message


def test_subsample():
    dataset = datasets.Dataset.from_dict({"sentence": [str(i) for i in range(100)]})
    small, large = (tasks.subsample(dataset, n, seed=3)["sentence"][:] for n in (10, 40))
    assert len(set(small)) == 10
    assert set(small) < set(large)
    assert small == sorted(small, key=int)
    assert small == tasks.subsample(dataset, 10, seed=3)["sentence"][:]
    assert small != tasks.subsample(dataset, 10, seed=4)["sentence"][:]
    assert tasks.subsample(dataset, 100, seed=0)["sentence"][:] == dataset["sentence"][:]
    for size in (0, -1, 101):
        with pytest.raises(ValueError, match=f"cannot draw {size} of 100 examples; use 1 to 100"):
            tasks.subsample(dataset, size, seed=0)


def test_a_column_of_targets_is_text(tmp_path):
    columns = {"sentence": ["a", "b"], "target": ["x y", " z"], "score": [0.5, 1.5]}
    path = write(tmp_path / "t.jsonl", columns)
    assert tasks.load_task(train_file=path).kind == "regression"
    task = tasks.load_task("translate", train_file=path, text=True)
    assert (task.kind, task.metric, task.label_names) == ("text", "exact_match", ())
    assert task.splits["train"].to_dict() == {"sentence": ["a", "b"], "target": ["x y", " z"]}
    del columns["score"]
    path = write(tmp_path / "t.csv", columns)
    assert tasks.load_task(train_file=path).kind == "text"


@pytest.mark.parametrize(
    ("target", "problem"),
    [("", "row 2: target is empty"), (None, "row 2: target is missing"), (3, "is int, not text")],
)
def test_targets_that_are_no_text(tmp_path, target, problem):
    path = write(tmp_path / "t.jsonl", {"sentence": ["a", "b"], "target": ["x", target]})
    with pytest.raises(ValueError, match=problem):
        tasks.load_task(train_file=path)


def test_span_corruption_has_paths(tmp_path):
    path = tmp_path / "corpus.txt"
    with pytest.raises(FileNotFoundError, match=r"corpus\.txt does not exist"):
        tasks.load_task("span_corruption", train_file=path)
    path.write_text("a film")
    task = tasks.load_task("span_corruption", train_file=path)
    assert (task.kind, task.metric) == ("span_corruption", "token_accuracy")
    assert task.splits == {"train": path}
    with pytest.raises(ValueError, match="span_corruption needs a text file; give --train-file"):
        tasks.load_task("span_corruption")
    with pytest.raises(ValueError, match="takes its targets from the text itself"):
        tasks.load_task("span_corruption", train_file=path, regression=True)
