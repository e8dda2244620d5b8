"""Tests rows without an answer: SQuAD v2 by its official rules; other tasks refuse such rows."""

import collections
import re
import string

import datasets
import hub_data
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data import tokens
from train.objectives import spans
from train.objectives.span_extraction import ExtractiveQA
from train.tasks import load_task, metrics
from train.tasks.benchmarks import BENCHMARKS, find

CONTEXT = "the film was very good and it was not dull, we loved the plot and hated the film"
NONE = {"text": [], "answer_start": []}


def found(*texts):
    return {"text": list(texts), "answer_start": [CONTEXT.index(text) for text in texts]}


def squad_rows(*answers):
    number = len(answers)
    return {
        "question": ["was it"] * number,
        "context": [CONTEXT] * number,
        "answers": list(answers),
    }


def official(predictions, answers):
    """Computes exact match and F1 like SQuAD's evaluate-v2.0.py, in a second implementation."""

    def words(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(gold, predicted):
        if not gold or not predicted:
            return float(gold == predicted)
        common = sum((collections.Counter(gold) & collections.Counter(predicted)).values())
        if not common:
            return 0.0
        precision, recall = common / len(predicted), common / len(gold)
        return 2 * precision * recall / (precision + recall)

    exact, overlap = [], []
    for prediction, texts in zip(predictions, answers, strict=True):
        golds = [text for text in texts if words(text)] or [""]
        exact.append(max(words(gold) == words(prediction) for gold in golds))
        overlap.append(max(f1(words(gold), words(prediction)) for gold in golds))
    values = {"exact_match": np.mean(exact), "f1": np.mean(overlap)}
    if all(answers):
        return values
    for name, wanted in (("HasAns", True), ("NoAns", False)):
        of_kind = [row for row, texts in enumerate(answers) if bool(texts) is wanted]
        if of_kind:
            values[f"{name}_exact"] = sum(exact[row] for row in of_kind) / len(of_kind)
            values[f"{name}_f1"] = sum(overlap[row] for row in of_kind) / len(of_kind)
    return values


@pytest.mark.parametrize(
    ("predictions", "answers"),
    [
        # No answer, an answer where there is none, and only an article.
        (["", "good", "the"], [[], [], []]),
        (["film", "", "A!"], [["film"], ["film"], []]),
        (["a", "the film"], [["the", "film"], []]),  # nothing is left of one answer
        (["good film", "bad"], [["very good film", "plot"], []]),
    ],
)
def test_questions_without_an_answer_by_the_official_rules(predictions, answers):
    rows = {"answers": [{"text": texts, "answer_start": [0] * len(texts)} for texts in answers]}
    expected = official(predictions, answers)
    assert BENCHMARKS["squad"].scores(predictions, rows) == pytest.approx(expected)


def test_random_answers_by_the_official_rules():
    generator = np.random.default_rng(0)
    parts = ["the", "A", "film,", "plot", "Good", "!", "it's"]

    def text():
        return " ".join(generator.choice(parts, generator.integers(0, 4)))

    for _ in range(200):
        predictions = [text() for _ in range(3)]
        answers = [[text() for _ in range(generator.integers(0, 3))] for _ in range(2)]
        answers.append([])
        assert metrics.answer_metrics(predictions, answers) == pytest.approx(
            official(predictions, answers)
        )


def test_where_every_question_has_an_answer_the_rules_are_those_of_version_1():
    # evaluate-v1.1.py finds no common word between two empty answers.
    assert metrics.answer_metrics(["A"], [["the"]]) == {"exact_match": 1.0, "f1": 0.0}
    assert metrics.answer_metrics(["A", ""], [["the"], []])["f1"] == 1.0


def test_questions_with_and_without_an_answer_are_reported_apart():
    predictions, answers = ["good film", "plot", "", "dull"], [["film"], ["plot"], [], []]
    assert metrics.answer_metrics(predictions, answers) == pytest.approx(
        {
            "exact_match": 0.5,
            "f1": (2 / 3 + 1 + 1 + 0) / 4,
            "HasAns_exact": 0.5,
            "HasAns_f1": 5 / 6,
            "NoAns_exact": 0.5,
            "NoAns_f1": 0.5,
        }
    )
    # Like the official script, but only for the kinds of questions that occur.
    assert metrics.answer_metrics([""], [[]]) == {
        "exact_match": 1.0,
        "f1": 1.0,
        "NoAns_exact": 1.0,
        "NoAns_f1": 1.0,
    }


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return tokens.load_tokenizer(
        tiny_backbone, vocab_size=23, max_position_embeddings=64, max_length=24
    )


@pytest.mark.parametrize("none", [NONE, None, {"text": [""], "answer_start": [0]}, {"text": None}])
def test_without_an_answer_every_window_points_at_cls(tokenizer, none):
    rows = squad_rows(none, found("very good"), {"text": ["", "dull"], "answer_start": [0, 38]})
    encoded = spans.encode(rows, tokenizer, 16)
    assert (encoded.targets[encoded.groups == 0] == 0).all()
    assert (encoded.groups == 0).sum() > 1
    assert encoded.targets[encoded.groups == 1].any()
    assert encoded.targets[encoded.groups == 2].any()  # the first window that contains it
    assert BENCHMARKS["squad"].unanswered(rows) == 1
    decoded = BENCHMARKS["squad"].for_decoder(rows)
    assert decoded["target"] == ["", "very good", "dull"]


def test_no_answer_is_found_where_all_windows_say_so(tokenizer):
    rows = squad_rows(NONE, found("very good"), NONE)
    encoded = spans.encode(rows, tokenizer, 16)
    logits = np.zeros((len(encoded), 16, 2), np.float32)
    for window, row in enumerate(encoded.groups):
        token = np.flatnonzero(encoded.spans[encoded.offsets[window] :][:16, 0] >= 0)[0]
        logits[window, token] = 1.0  # the sum of both is 2, the best in its window
        logits[window, 0] = (2.0, 0.5, 1.0)[row]
    # In the third question, [CLS] of one window is as likely as its span, and the answer stays.
    assert [bool(text) for text in spans.answers(logits, encoded)] == [True, True, True]
    answers = spans.answers(logits, encoded, may_be_none=True)
    assert [bool(text) for text in answers] == [False, True, True]
    # A single window with an answer is enough.
    logits[np.flatnonzero(encoded.groups == 0)[-1], 0] = 0.0
    assert spans.answers(logits, encoded, may_be_none=True)[0]


def test_an_adapter_knows_whether_there_may_be_none(tokenizer):
    made = ExtractiveQA(None, tokenizer, 16, BENCHMARKS["squad"])
    assert made.settings == {"benchmark": {"name": "squad"}}
    made = ExtractiveQA(None, tokenizer, 16, BENCHMARKS["squad"], may_be_none=True)
    assert made.settings == {"benchmark": {"name": "squad", "may_be_none": True}}
    assert BENCHMARKS["squad"].user_messages() == []


def test_an_empty_target_is_the_end_alone(tiny_t5):
    tokenizer = tokens.load_tokenizer(
        tiny_t5, vocab_size=96, max_position_embeddings=None, max_length=16
    )
    texts = ["", "film"]
    encoded = tokens.tokenize_texts(texts, tokenizer, 8, what="target", may_be_empty=True)
    assert encoded.offsets.tolist() == [0, 1, 3]
    assert encoded.ids[0] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="row 1: the tokenizer returns no tokens for the target"):
        tokens.tokenize_texts(texts, tokenizer, 8, what="target")
    with pytest.raises(ValueError, match="row 1: the tokenizer returns no tokens for the target"):
        tokens.tokenize_texts(["\u200b"], tokenizer, 8, what="target", may_be_empty=True)


def write(folder, name, split, rows):
    """Writes one split of a benchmark with the given rows."""
    made = datasets.Dataset.from_list(rows, features=datasets.Features(hub_data.FEATURES[name]))
    table = made.with_format("arrow")[:].replace_schema_metadata(
        made.features.arrow_schema.metadata
    )
    pq.write_table(table, folder / hub_data.CONFIGURATIONS.get(name, name) / f"{split}-0.parquet")


def changed(folder, name, change, *, split="train", row=2):
    """Writes a benchmark with one row, counted from 1, changed by a function."""
    hub_data.write(folder, name)
    for path in (folder / hub_data.CONFIGURATIONS.get(name, name)).glob(f"{split}-*"):
        path.unlink()
    rows = hub_data.rows(name, 6).to_list()
    rows[row - 1] = change(rows[row - 1])
    write(folder, name, split, rows)
    return folder


def test_squad_with_some_rows_without_an_answer_is_loaded_and_told(tmp_path):
    folder = changed(tmp_path, "squad", lambda row: {**row, "answers": NONE})
    task = load_task("squad", data_dir=folder)
    assert task.user_messages() == ["questions without an answer (train, validation): 1, 0"]
    assert task.benchmark.unanswered(task.splits["train"]) == 1


@pytest.mark.parametrize("none", [NONE, None, {"text": [""], "answer_start": [-1]}])
def test_a_test_split_whose_answers_are_all_empty_is_hidden(tmp_path, none):
    hub_data.write(tmp_path, "squad")
    rows = [{**row, "answers": none} for row in hub_data.rows("squad", 3).to_list()]
    write(tmp_path, "squad", "test", rows)
    assert list(load_task("squad", data_dir=tmp_path).splits) == ["train", "validation"]
    with pytest.raises(ValueError, match="squad has no split 'test' whose answers are published"):
        load_task("squad", data_dir=tmp_path, splits=["test"])


def text_of(column, value):
    return lambda row: {**row, column: value}


REFUSED = {
    "an answer without a place": (
        "squad",
        text_of("answers", {"text": ["it"], "answer_start": []}),
        "squad, train, row 2 of squad: 1 answers, but 0 positions in answer_start",
    ),
    "a question that is null": ("squad", text_of("question", None), "row 2: question is missing"),
    "a context that is null": ("squad", text_of("context", None), "row 2: context is missing"),
    "no answer of ReCoRD": ("record", text_of("answers", []), "row 2 of record has no answer"),
    "an empty answer": (
        "record",
        text_of("answers", ["film", ""]),
        "row 2 of record has no answer",
    ),
    "no entity": ("record", text_of("entities", []), "row 2 of record has no entities"),
    "an entity that is null": (
        "record",
        text_of("entities", ["film", None]),
        "row 2 of record has",
    ),
    "entities that are null": ("record", text_of("entities", None), "row 2: entities is missing"),
    "a sentence that is null": ("rte", text_of("sentence2", None), "row 2: sentence2 is missing"),
    "a label of some rows": (
        "rte",
        text_of("label", -1),
        "rte, train, row 2: the label is missing",
    ),
    "a label that is null": (
        "rte",
        text_of("label", None),
        "rte, train, row 2: the label is missing",
    ),
    "a score of some rows": ("stsb", text_of("label", -1.0), "row 2: the score is missing"),
    "a score that is null": ("stsb", text_of("label", None), "row 2: the score is missing"),
    "a choice that is null": ("copa", text_of("choice2", None), "row 2: choice2 is missing"),
    "a paragraph that is null": ("multirc", text_of("paragraph", None), "row 2: paragraph is miss"),
    "no translation": (
        "wmt16-ro-en",
        text_of("translation", None),
        "row 2: translation is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_lack_something_are_refused_by_number_before_training(tmp_path, case):
    name, change, message = REFUSED[case]
    with pytest.raises(ValueError, match=r".") as caught:
        load_task(name, data_dir=changed(tmp_path, name, change))
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 500


def test_a_word_that_wsc_does_not_have_is_of_a_row(tmp_path):
    folder = changed(tmp_path, "wsc", lambda row: {**row, "span2_index": 99})
    rows = load_task("wsc", data_dir=folder).splits["train"]
    with pytest.raises(ValueError, match="row 2 of wsc: there is no word 99 in the 8 words"):
        BENCHMARKS["wsc"].for_encoder(rows)


def test_sides_of_a_translation_that_are_null_or_blank_are_left_out(tmp_path, capsys):
    for missing in (None, " "):
        folder = tmp_path / repr(missing)
        changed(folder, "wmt16-ro-en", lambda row, x=missing: {"translation": {"ro": x, "en": "a"}})
        rows = load_task("wmt16-ro-en", data_dir=folder).splits["train"]
        assert len(rows) == 5
        assert "1 of 6 rows have an empty text and are left out" in capsys.readouterr().out
    task = find("wmt16-ro-en")
    some = {"translation": [{"ro": "a", "en": "b"}, {"ro": "c", "en": ""}]}
    with pytest.raises(
        ValueError, match="row 2 of wmt16-ro-en has no text in 'en', but other rows"
    ):
        task.for_decoder(some)
    table = pa.table({"translation": [{"de": "a", "en": "b"}]})
    with pytest.raises(ValueError, match="row 1 of wmt16-ro-en has no 'ro'; it has de, en"):
        task.usable(datasets.Dataset(table))


def test_a_split_with_nothing_to_halve_is_said(tmp_path):
    hub_data.write(tmp_path, "rte", validation=1)
    with pytest.raises(ValueError, match="rte has 1 rows or questions, too few for --split-prot"):
        load_task("rte", data_dir=tmp_path, split_protocol="paper")
    with pytest.raises(ValueError, match="no split of rte was selected; use one of train, valid"):
        load_task("rte", data_dir=tmp_path, splits=[])
