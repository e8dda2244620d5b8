"""Tests train.objectives.spans: windows cover every character, and the best span is found."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from train.data import tokens as data_tokens
from train.objectives import spans
from train.objectives.span_extraction import ExtractiveQA

CONTEXT = "the film was Very good, we loved it.  the plot was not very dull, it was fine and great"


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return data_tokens.load_tokenizer(
        tiny_backbone, vocab_size=23, max_position_embeddings=64, max_length=24
    )


def rows(*answers, question=" what was it "):
    """Returns rows with the same context for each answer."""
    return {
        "question": [question] * len(answers),
        "context": [CONTEXT] * len(answers),
        "answers": [{"text": [text], "answer_start": [start]} for text, start in answers],
    }


def answer(text):
    return text, CONTEXT.index(text)


def test_windows_hold_the_question_and_every_word_of_the_context(tokenizer):
    encoded = spans.encode(rows(answer("fine"), answer("film")), tokenizer, 16)
    assert np.diff(encoded.offsets).max() == 16
    assert encoded.groups.tolist() == sorted(encoded.groups.tolist())
    of_first = encoded.groups == 0
    assert of_first.sum() > 2
    covered = np.zeros(len(CONTEXT), bool)
    shared = 0
    for window in np.flatnonzero(of_first):
        tokens = slice(*encoded.offsets[window : window + 2])
        ids, places = encoded.input_ids[tokens], encoded.spans[tokens]
        # [CLS] question [SEP] context [SEP], with token types and places to match.
        assert ids[:4].tolist() == tokenizer("what was it")["input_ids"][:4]
        inside = places[:, 0] >= 0
        np.testing.assert_array_equal(inside, np.r_[[False] * 5, [True] * (len(ids) - 6), False])
        assert encoded.token_type_ids[tokens].tolist() == [0] * 5 + [1] * (len(ids) - 5)
        for token, (start, end) in zip(ids[inside], places[inside], strict=True):
            alone = tokenizer(CONTEXT[start:end], add_special_tokens=False)["input_ids"]
            assert alone == [token]
            shared += covered[start]
            covered[start:end] = True
    assert "".join(itertools.compress(CONTEXT, ~covered)).strip() == ""
    assert shared == (of_first.sum() - 1) * ((16 - 3) // 3)


def test_targets_are_the_tokens_of_the_answer_where_a_window_holds_it(tokenizer):
    wanted = ["the film", "Very good", "loved it", "not very dull", "great"]
    encoded = spans.encode(rows(*map(answer, wanted)), tokenizer, 16)
    found = dict.fromkeys(range(len(wanted)), 0)
    for window, (first, last) in enumerate(encoded.targets):
        row = encoded.groups[window]
        places = encoded.spans[slice(*encoded.offsets[window : window + 2])]
        inside = places[places[:, 0] >= 0]
        start, text = answer(wanted[row])[1], wanted[row]
        holds = inside[0, 0] <= start and inside[-1, 1] >= start + len(text)
        if holds:
            assert CONTEXT[places[first, 0] : places[last, 1]] == text
            found[row] += 1
        else:
            assert (first, last) == (0, 0)
    assert all(found.values())


def test_an_answer_that_is_part_of_a_token_gets_the_token(tokenizer):
    text, start = answer("love")
    (window,) = spans.encode(rows((text, start)), tokenizer, 48).targets
    assert window[0] == window[1]


def test_answers_are_cut_from_the_context_over_all_windows(tokenizer):
    encoded = spans.encode(rows(answer("fine"), answer("Very good")), tokenizer, 16)
    logits = np.zeros((len(encoded), 16, 2), np.float32)
    for window, targets in enumerate(encoded.targets):
        for end, token in enumerate(targets):
            logits[window, token, end] = 5 if token else 0.5
    assert spans.answers(logits, encoded) == ["fine", "Very good"]
    # Tokens outside the context are never an answer, however likely they are.
    logits[:, :5] = 99
    assert spans.answers(logits, encoded) == ["fine", "Very good"]


def test_contexts_without_words_have_no_answer(tokenizer):
    encoded = spans.encode({"question": ["what"], "context": [" "]}, tokenizer, 16)
    assert encoded.targets is None
    assert spans.answers(np.zeros((1, 16, 2)), encoded) == [""]


def test_best_span_is_the_best_of_all():
    generator = np.random.default_rng(0)
    for length, longest in [(1, 3), (7, 1), (12, 4), (9, 30)] * 10:
        logits = generator.normal(size=(length, 2))
        allowed = generator.random(length) < 0.7
        allowed[generator.integers(length)] = True
        pairs = [
            (logits[i, 0] + logits[j, 1], i, j)
            for i in range(length)
            for j in range(i, min(i + longest, length))
            if allowed[i] and allowed[j]
        ]
        score, first, last = max(pairs)
        assert spans.best_span(logits, allowed, longest) == (first, last, pytest.approx(score))
    assert spans.best_span(np.zeros((3, 2)), np.zeros(3, bool))[2] == -np.inf


def test_long_questions_are_cut_and_counted(tokenizer):
    long = "was it very very very very good"
    encoded = spans.encode(rows(answer("fine"), question=long), tokenizer, 16)
    assert encoded.num_truncated == 1
    tokens = encoded.input_ids[: encoded.offsets[1]]
    expected = tokenizer("was it very very", add_special_tokens=False)["input_ids"]
    assert tokens[1:6].tolist() == [*expected, tokenizer.sep_token_id]


def test_what_cannot_be_windows(tokenizer):
    with pytest.raises(ValueError, match=r"max_length=8 leaves no room for windows; use 16"):
        spans.encode(rows(answer("fine")), tokenizer, 8)
    message = "row 2: the answer 'fine' is not at character 3 of its context"
    with pytest.raises(ValueError, match=re.escape(message)):
        spans.encode(rows(answer("fine"), ("fine", 3)), tokenizer, 16)


def test_the_loss_of_positions_that_are_not_there_is_nan():
    logits = jnp.arange(12.0).reshape(2, 3, 2)
    loss = ExtractiveQA(None, None, 16, None).loss
    whole = loss(logits, jnp.array([[0, 2], [1, 1]]))
    start, end = np.moveaxis(np.asarray(logits), 2, 0)
    expected = [
        np.mean([special.logsumexp(start[0]) - start[0, 0], special.logsumexp(end[0]) - end[0, 2]]),
        np.mean([special.logsumexp(start[1]) - start[1, 1], special.logsumexp(end[1]) - end[1, 1]]),
    ]
    np.testing.assert_allclose(whole, expected, rtol=1e-6)
    for wrong in (-1, -3, 3, 100):
        for place in ([wrong, 1], [1, wrong]):
            for run in (loss, jax.jit(loss)):
                each = run(logits, jnp.array([[1, 1], place]))
                assert np.isfinite(each[0])
                assert np.isnan(each[1])
