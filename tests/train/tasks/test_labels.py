"""Tests labels of files: their names, labels that look like missing ones, and integer labels."""

import collections
import dataclasses

import datasets
import numpy as np
import pytest

from train import tasks
from train.data import tokens
from train.data.writing import write_rows
from train.exchange import convert
from train.fit import options as fit_options
from train.inference import commands, saved
from train.inference import options as inference_options
from train.tasks import labels

FORMATS = (".parquet", ".jsonl", ".csv", ".tsv")


def file_of(path, values, **columns):
    """Writes a file of any format with these labels."""
    columns = {"sentence": [f"film {i}" for i in range(len(values))], "label": values, **columns}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    with write_rows(path) as write:
        write(rows)
    return path


def refused(**keywords):
    """Returns the one-line error message of `load_task`."""
    with pytest.raises(ValueError, match=r".") as caught:
        tasks.load_task(**keywords)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 500
    return message


MISSING = {
    "SNLI's integers": (
        [0, 1, 2, -1] * 2,
        "-1 (2) next to 0, 1, 2 looks like rows without a label",
    ),
    "PyTorch's index that is ignored": ([1, -100, 0], "-100 (1) next to 1, 0 looks like"),
    "one integer beside names": (["yes", "no", "-1"], "-1 (1) next to yes, no looks like"),
    "SNLI's text": (["yes", "-", "no", "maybe"], "- (1) next to yes, no, maybe looks like"),
    "a long dash": (["yes", "no", "\u2014"], "\u2014 (1) next to yes, no looks like"),
    "a blank at the end": (
        ["pos", "neg", "pos "],
        "labels 'pos', 'pos ' differ only in case, white",
    ),
    "a blank that is not seen": (
        ["pos", "neg", "pos\u00a0"],
        "differ only in case, white space or Unicode form",
    ),
    "nothing that is seen": (
        ["pos", "neg", "neg\u200b"],
        "differ only in case, white space or Unicode form",
    ),
    "capitals": (
        ["Positive", "neg", "positive"],
        "labels 'Positive', 'positive' differ only in case",
    ),
    "two forms of an accent": (
        ["caf\u00e9", "cafe\u0301", "x"],
        "differ only in case, white space",
    ),
    "two ways to write a number": (["1", "1.0", "0"], "labels '1', '1.0' differ only in case"),
    "pandas' numbers": (
        ["0.0", "1.0", "-1.0"],
        "-1.0 (1) next to 0.0, 1.0 looks like rows without",
    ),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("case", MISSING)
def test_labels_that_look_like_missing_ones_are_refused(tmp_path, suffix, case):
    values, problem = MISSING[case]
    path = file_of(tmp_path / f"t{suffix}", values)
    message = refused(train_file=path)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert "in --label-names" in message
    # Stated names are kept in their order.
    stated = list(dict.fromkeys(map(str, values)))[::-1]
    assert tasks.load_task(train_file=path, stated_names=stated).label_names == tuple(stated)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("value", ["", " \t", "\u200b", None])
def test_empty_labels_are_missing(tmp_path, suffix, value):
    path = file_of(tmp_path / f"t{suffix}", ["a", "b", value])
    assert refused(train_file=path) == f"{path}, row 3: the label is missing"


def test_a_class_label_made_of_such_labels_is_no_better(tmp_path):
    made = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": ["-", "no", "yes"]})
    made.class_encode_column("label").to_parquet(tmp_path / "t.parquet")
    assert "- (1) next to no, yes looks like" in refused(train_file=tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "values", [["+", "-"], [-1, 1], [-2, -1, 0, 1, 2], [10, 9, -1], ["a", "b", "B#"], ["007", "8"]]
)
def test_labels_that_are_labels(tmp_path, values):
    path = file_of(tmp_path / "t.csv", values)
    task = tasks.load_task(train_file=path)
    assert set(task.label_names) == set(map(str, values))
    assert task.notes == ()


def test_words_for_none_are_told_of(tmp_path):
    path = file_of(tmp_path / "t.csv", ["NA", "yes", "no", "NA", "None"])
    (note,) = tasks.load_task(train_file=path).notes
    assert note == (
        f"{path} has labels that often stand for a missing label: NA (2), None (1); if they do "
        "here, remove these rows"
    )


def test_every_label_is_told_with_its_rows_in_the_order_of_the_outputs(tmp_path):
    train = file_of(tmp_path / "t.csv", ["b", "a", "b", "10"])
    validation = file_of(tmp_path / "v.csv", ["a", "a"])
    task = tasks.load_task("mine", train_file=train, validation_file=validation)
    assert task.user_messages() == [
        "labels (mine, rows of train, validation): 10 (1, 0), a (1, 2), b (2, 0)"
    ]
    task = tasks.load_task(train_file=train, stated_names=["b", "10", "a"])
    assert task.user_messages() == ["labels (custom, rows of train): b (2), 10 (1), a (1)"]
    (line,) = tasks.load_task("movie", splits=["test"]).user_messages()
    assert line == "labels (movie, rows of test): negative (566), positive (511)"
    scores = tmp_path / "s.csv"
    scores.write_text("sentence,score\na,1\n")
    assert tasks.load_task(train_file=scores).user_messages() == []


def test_a_line_of_many_long_labels_is_short():
    names = [f"{'x' * 500}{i}" for i in range(1000)]
    line = labels.told(names, [[1] * 1000], "rows of train")
    assert line.endswith(" and 950 more")
    assert len(line) < 50 * 80


NAMES = ("contradiction", "entailment", "neutral")
HUB = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize("suffix", FORMATS)
def test_integers_are_read_in_a_stated_order_alone(tmp_path, suffix):
    path = file_of(tmp_path / f"t{suffix}", [0, 1, 2, 0])
    message = refused(test_file=path, label_names=NAMES)
    assert message.startswith(
        f"{path}, row 1: label 0 is a number, but the labels have names, whose order is unknown; "
    )
    assert "give --label-names" in message
    assert message.endswith("contradiction, entailment, neutral")
    task = tasks.load_task(test_file=path, label_names=NAMES, stated_names=HUB)
    assert task.label_names == NAMES
    assert task.splits["test"]["label"][:] == [1, 2, 0, 1]
    note, line = task.user_messages()
    assert note == (f"labels 0, 1, 2 of {path} are read as entailment, neutral, contradiction")
    assert line == "labels (custom, rows of test): contradiction (1), entailment (2), neutral (1)"


def test_a_validation_file_of_integers_beside_names(tmp_path):
    train = file_of(tmp_path / "t.csv", list(HUB))
    validation = file_of(tmp_path / "v.csv", [0, 1, 2])
    assert f"{validation}, row 1: label 0 is a number" in refused(
        train_file=train, validation_file=validation
    )
    task = tasks.load_task(train_file=train, validation_file=validation, stated_names=HUB)
    assert task.label_names == HUB
    assert task.splits["validation"]["label"][:] == [0, 1, 2]


def test_orders_that_data_state(tmp_path):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=list(HUB))}
    )
    rows = {"sentence": ["a", "b", "c"], "label": [0, 1, 2]}
    path = tmp_path / "named.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    # The names in the file decide, whatever the order in the adapter.
    task = tasks.load_task(test_file=path, label_names=NAMES)
    assert task.splits["test"]["label"][:] == [1, 2, 0]
    # The names in a training file also apply to the other files.
    validation = file_of(tmp_path / "v.csv", [2, "neutral"])
    task = tasks.load_task(train_file=path, validation_file=validation)
    assert task.splits["validation"]["label"][:] == [2, 1]
    assert task.notes == (f"labels 2 of {validation} are read as contradiction",)
    # The names of a built-in task or of the adapter's benchmark apply as well.
    numbers = file_of(tmp_path / "n.csv", [2, 0])
    task = tasks.load_task(test_file=numbers, label_names=HUB, are_numbered=True)
    assert task.splits["test"]["label"][:] == [2, 0]
    assert task.notes == (f"labels 0, 2 of {numbers} are read as entailment, contradiction",)
    task = tasks.load_task(
        test_file=numbers, label_names=HUB, are_numbered=True, stated_names=NAMES
    )
    assert task.splits["test"]["label"][:] == [1, 2]
    mine = file_of(tmp_path / "mine.csv", [1, 0])
    task = tasks.load_task("movie", test_file=mine, splits=["test"])
    assert task.splits["test"]["label"][:] == [1, 0]
    assert task.notes == (f"labels 0, 1 of {mine} are read as negative, positive",)


def test_names_for_an_adapter_of_integers(tmp_path):
    path = file_of(tmp_path / "t.csv", ["neutral", "entailment", "2"])
    assert "row 1: label 'neutral' is not one of '0', '1', '2'" in refused(
        test_file=path, label_names=["0", "1", "2"]
    )
    task = tasks.load_task(test_file=path, label_names=["0", "1", "2"], stated_names=HUB)
    assert task.splits["test"]["label"][:] == [1, 0, 2]


def test_orders_that_cannot_be(tmp_path):
    path = file_of(tmp_path / "t.csv", [0, 1, 2, 3])
    given = {"test_file": path, "label_names": NAMES}
    assert "--label-names: none is not one of the adapter's labels, which are contradiction, " in (
        refused(**given, stated_names=["neutral", "none"])
    )
    assert "--label-names: neutral occurs twice" in refused(
        **given, stated_names=["neutral", "neutral"]
    )
    assert "--label-names: name 2 is empty" in refused(**given, stated_names=["neutral", " "])
    assert "row 4: label '3' is not one of" in refused(**given, stated_names=HUB)
    assert "leave --label-names out" in refused(name="mnli", stated_names=HUB)
    scores = tmp_path / "s.csv"
    scores.write_text("sentence,score\na,1\n")
    assert "span_corruption has no labels; leave --label-names out" in refused(
        name="span_corruption", train_file=path, stated_names=HUB
    )
    assert "--label-names needs a task with labels" in refused(
        train_file=scores, regression=True, stated_names=HUB
    )


def test_labels_of_thousands_of_digits_are_text(tmp_path):
    values = ["1" * 5000, "-" + "2" * 5000, "7"]
    path = file_of(tmp_path / "t.csv", values)
    assert tasks.load_task(train_file=path).label_names == tuple(sorted(values))
    assert len(tasks.load_task(train_file=path).user_messages()[0]) < 400
    assert "is not one of" in refused(test_file=path, label_names=["a", "b"])


def test_one_class_is_said_of_the_training_file(tmp_path):
    train = file_of(tmp_path / "t.csv", ["positive", "positive"])
    validation = file_of(tmp_path / "v.csv", ["negative", "positive"])
    message = f"{train}: every label is 'positive'; training needs at least two classes"
    assert refused(train_file=train, validation_file=validation) == message
    both = file_of(tmp_path / "b.csv", ["positive", "1"])  # one class in two spellings
    assert "every label is 'positive'" in refused(name="movie", train_file=both)


HEAD = "sequence_classification"


@pytest.mark.parametrize(
    ("names", "changes", "problem"),
    [
        (["a"], {}, "num_labels=2 must be 1"),
        (["a", "b", "c"], {}, "num_labels=2 must be 3"),
        ([], {}, "must be names for kind='classification'"),
        (["a", "a"], {}, "label_names: a occurs twice"),
        (["a", " "], {}, "label_names: name 2 is empty"),
        (["a", "\u200b"], {}, "label_names: name 2 is empty"),
        (
            ["a", "b"],
            {"kind": "regression", "num_labels": 1},
            "must be empty for kind='regression'",
        ),
        ([], {"head": "conditional_generation", "num_labels": None}, "must be names"),
    ],
)
def test_label_names_that_do_not_fit_the_head(names, changes, problem):
    settings = {"kind": "classification", "num_labels": 2, "head": HEAD, **changes}
    with pytest.raises(ValueError, match="label_names") as caught:
        saved._check_labels("FILE", {**settings, "label_names": names})
    assert str(caught.value).startswith("FILE: ")
    assert problem in str(caught.value)


def test_what_is_predicted_is_counted_by_label():
    counts = commands.LabelCounts(["no", "yes", "maybe"])
    counts.count_logits({"": np.array([[0, 1, 0], [3, 1, 0]])})
    counts.count_logits({"": np.array([[0, 1, 0]])})
    assert counts.lines() == ["labels (rows predicted): no (1), yes (2), maybe (0)"]
    counts = commands.LabelCounts({"a": ["no", "yes"], "b": []})
    counts.count_logits({"a": np.eye(2), "b": np.zeros((2, 1))})
    assert counts.lines() == ["labels (a, rows predicted): no (1), yes (1)"]


def test_names_given_to_convert_are_names():
    for names, problem in [(("a", "a"), "a occurs twice"), (("a", " "), "name 2 is empty")]:
        with pytest.raises(ValueError, match=f"--label-names: {problem}"):
            convert._check_names(names, 2)
    convert._check_names(("a", "b"), 2)


@pytest.fixture(scope="module")
def tokenizers(tiny_backbone, tiny_t5):
    limits = {"max_position_embeddings": None, "max_length": 16}
    return {
        "bert": tokens.load_tokenizer(tiny_backbone, vocab_size=23, **limits),
        "t5": tokens.load_tokenizer(tiny_t5, vocab_size=96, **limits),
    }


def test_unknown_tokens_are_counted_and_told_of_from_one_percent_on(tokenizers):
    """[CLS], [SEP] and </s> do not count as tokens of the text."""
    for texts, told in [
        (["the film"] * 49 + ["the film film", "映"], False),  # 1 of 102
        (["the film"] * 49 + ["film", "映"], True),  # 1 of 100
        (["the film", "映 was 画"], True),
        (["the film"], False),
    ]:
        encoded = tokens.tokenize({"sentence": texts}, tokenizers["bert"], 16)
        words = [word for text in texts for word in text.split()]
        unknown = [word for word in words if word in "映画"]
        rows = sum(any(c in "映画" for c in text) for text in texts)
        assert encoded.unknown == tokens.Unknown(len(unknown), len(words), rows)
        part = f"({100 * len(unknown) / len(words):.1f} %)"
        line = (
            f"{len(unknown)} of {len(words)} tokens of the train inputs {part}, in {rows} of them, "
            "are unknown to the tokenizer"
        )
        assert encoded.user_messages("train") == ([line] if told else [])


def test_unknown_tokens_of_inputs_and_of_targets_are_told_apart(tokenizers):
    tokenizer = tokenizers["t5"]
    inputs = tokens.tokenize_texts(["good", "映画"], tokenizer, 8, what="input")
    targets = tokens.tokenize_texts(["dull", "画 a"], tokenizer, 8, what="target")
    # Successive unknown characters are one token: ▁good ▁ <unk>; ▁dull ▁ <unk> ▁a.
    assert (inputs.unknown, targets.unknown) == (tokens.Unknown(1, 3, 1), tokens.Unknown(1, 4, 1))
    encoded = tokens.Encoded(
        inputs.ids, None, inputs.offsets, None, 8, 0, 0, targets, unknown=inputs.unknown
    )
    assert [line.partition(" (")[0] for line in encoded.user_messages("test")] == [
        "1 of 3 tokens of the test inputs",
        "1 of 4 tokens of the test targets",
    ]


def test_a_tokenizer_without_an_unknown_token_has_none():
    special = collections.namedtuple(
        "Tokenizer", "unk_token_id pad_token_id eos_token_id sep_token_id all_special_ids"
    )
    ids, offsets = np.array([5, 5, 7], np.int32), np.array([0, 3])
    for tokenizer in (special(None, 0, 1, 2, [0, 1, 2]), special(5, 0, 5, None, [0, 5])):
        assert tokens.count_unknown(ids, offsets, tokenizer) == tokens.Unknown()
    assert tokens.count_unknown(ids, offsets, special(7, 0, 5, None, [0, 5, 7])).tokens == 1


def test_a_run_from_before_the_flag_has_the_settings_of_now():
    """A field that run.json lacks and a flag that is not given are both None."""
    for made in (fit_options.FitOptions, inference_options.EvaluateOptions):
        assert {field.name: field.default for field in dataclasses.fields(made)}[
            "label_names"
        ] is None
