"""Tests rows cast as text, scores rounded to a step, and labels that tokenizers can distinguish."""

import math
import re
from fractions import Fraction

import datasets
import numpy as np
import pytest

from train.data import tokens as data_tokens
from train.tasks import text_format


@pytest.fixture(scope="module")
def tokenizer(tiny_t5):
    return data_tokens.load_tokenizer(
        tiny_t5, vocab_size=96, max_position_embeddings=None, max_length=16
    )


def text_format_of(kind="classification", **fields):
    fields = {"prefix": "movie", "label_names": ("negative", "positive"), **fields}
    return text_format.TextFormat(kind=kind, **fields)


def test_classification_as_in_the_papers_appendix():
    rows = datasets.Dataset.from_dict({"sentence": ["a film", "dull"], "label": [1, 0]})
    assert text_format_of().inputs(rows) == ["movie sentence: a film", "movie sentence: dull"]
    assert text_format_of().targets(rows) == ["positive", "negative"]
    pairs = {"sentence": ["a"], "sentence2": ["b c"]}
    assert text_format_of(prefix="mrpc").inputs(pairs) == ["mrpc sentence1: a sentence2: b c"]
    assert text_format_of(prefix="mrpc").targets(pairs) is None
    assert text_format_of(prefix="").inputs(rows)[0] == "sentence: a film"


def test_own_targets_are_taken_as_they_are():
    rows = {"sentence": ["a film"], "target": [" der Film"]}
    cast = text_format_of("text", prefix="translate English to German", label_names=())
    assert cast.inputs(rows) == ["translate English to German: a film"]
    assert cast.targets(rows) == [" der Film"]
    assert text_format_of("text", prefix="").inputs(rows) == ["a film"]


def test_scores_are_cast_as_multiples():
    rows = {"sentence": ["a", "b"], "score": [2.57, -0.04]}
    assert text_format_of("regression", label_names=()).targets(rows) == ["2.6", "0.0"]
    assert text_format_of("regression", label_names=(), score_step=0.5).targets(rows) == [
        "2.5",
        "0.0",
    ]


@pytest.mark.parametrize(
    ("score", "step", "expected"),
    [
        (0, 0.2, "0.0"),
        (2.57, 0.2, "2.6"),
        (-2.57, 0.2, "-2.6"),
        (-0.05, 0.2, "0.0"),  # not "-0.0"
        (0.3, 0.2, "0.4"),  # a tie, though 0.3 / 0.2 < 1.5 in floating point
        (0.1, 0.2, "0.0"),
        (0.5, 0.2, "0.4"),
        (-0.3, 0.2, "-0.4"),
        (-0.5, 0.2, "-0.4"),
        (2.7, 0.2, "2.8"),
        (float(np.float32(2.7)), 0.2, "2.8"),  # as in GLUE's STS-B
        (float(np.float32(2.3)), 0.2, "2.4"),
        (np.nextafter(2.7, 0), 0.2, "2.6"),
        (5.0, 0.2, "5.0"),
        (0.125, 0.25, "0.00"),
        (0.375, 0.25, "0.50"),
        (1.13, 0.25, "1.25"),
        (7.3, 1, "7"),
        (1234, 10, "1230"),
        (26, 20.0, "20"),
        (0.00012, 1e-4, "0.0001"),
        (1e300, 0.2, "1" + "0" * 300),
        (1e-320, 0.2, "0.0"),
    ],
)
def test_format_score(score, step, expected):
    assert text_format.format_score(score, step) == expected


@pytest.mark.parametrize("step", [0.2, 0.25, 0.1, 0.3, 3.0])
def test_format_score_is_nearest_and_read_back(step):
    unit = Fraction(str(step))
    for score in np.random.default_rng(0).normal(0, 4, 300):
        written = text_format.format_score(float(score), step)
        multiple = Fraction(written) / unit
        assert multiple.denominator == 1
        assert abs(Fraction(written) - Fraction(float(score))) <= unit / 2
        assert text_format.parse_score(written) == float(written)


@pytest.mark.parametrize(
    ("written", "value"),
    [("2.6", 2.6), (" -0.4 ", -0.4), ("+3", 3.0), ("3.", 3.0), (".5", 0.5), ("007", 7.0)],
)
def test_parse_score(written, value):
    assert text_format.parse_score(written) == value


@pytest.mark.parametrize("written", ["", " ", "-", "2,6", "1e3", "nan", "inf", "1_0", "2.6 2", "٣"])
def test_text_that_is_no_score(written):
    assert math.isnan(text_format.parse_score(written))


def test_reading_predictions():
    assert text_format_of().read(["positive", " negative\n", "Positive", "", "pos"]).tolist() == [
        1,
        0,
        -1,
        -1,
        -1,
    ]
    assert text_format_of(label_names=("not good", "good")).read(["not  good"]).tolist() == [0]
    scores = text_format_of("regression").read([" 2.6", "good"])
    assert scores[0] == 2.6
    assert np.isnan(scores[1])
    assert text_format_of("text").read([" a  b "]).tolist() == ["a b"]


def test_json_has_the_format_but_for_kind_and_labels():
    cast = text_format_of(score_step=0.25, num_beams=3, evaluate_by="generation")
    values = text_format.to_json(cast)
    assert "kind" not in values
    assert text_format.from_json(values, "classification", ["negative", "positive"]) == cast


def test_label_tokens_end_with_the_end(tokenizer):
    tokens = text_format.label_tokens(("negative", "not good", "0"), tokenizer, 4)
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in tokens]
    assert pieces == [["▁negative", "</s>"], ["▁not", "▁good", "</s>"], ["▁", "0", "</s>"]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("映画", "音楽"),
            "cannot tell the labels '映画' and '音楽' apart: their tokens are [27, 2, 1]",
        ),
        (("good", "good  "), "the labels 'good' and 'good  ' differ only in white space"),
        (("good", "good</s> film"), "tokens are [13, 1] and [13, 1, "),
        (("good", "a very very very good film"), "1 labels are longer than max_target_length=4"),
        (("good", ""), "row 2: the tokenizer returns no tokens for the label ''"),
    ],
)
def test_labels_that_do_not_do(tokenizer, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        text_format.label_tokens(names, tokenizer, 4)


def test_decoding_leaves_out_special_tokens(tokenizer):
    # Start, "▁not", "▁good", end, and leftovers of beam search; one token from the padding only.
    ids = np.array([[0, 10, 13, 1, 1, 1], [0, 27, 28, 1, 0, 0], [0, 1, 0, 0, 0, 95]])
    assert text_format.decode(ids, tokenizer) == ["not good", "0", ""]


def test_tokenize_texts_ends_cuts_and_counts(tokenizer):
    encoded = data_tokens.tokenize_texts(
        ["good film", "a very good film", "dull"], tokenizer, 4, what="input"
    )
    good, film, a, very, dull = (
        tokenizer.get_vocab()[f"▁{w}"] for w in ["good", "film", "a", "very", "dull"]
    )
    assert encoded.ids.tolist() == [good, film, 1, a, very, good, 1, dull, 1]
    assert encoded.offsets.tolist() == [0, 3, 7, 9]
    assert (encoded.num_truncated, encoded.max_length) == (1, 4)
    assert encoded.ids.dtype == np.int32
    # The same end as in a text from the tokenizer.
    assert tokenizer("good film")["input_ids"] == [good, film, 1]


def test_texts_without_tokens_are_refused(tokenizer):
    with pytest.raises(ValueError, match="row 2: the tokenizer returns no tokens for the input ''"):
        data_tokens.tokenize_texts(["good", ""], tokenizer, 4, what="input")
    with pytest.raises(
        ValueError, match="a maximum target length of 1 tokens leaves no room for a word; use 2"
    ):
        data_tokens.tokenize_texts(["good"], tokenizer, 1, what="target")
