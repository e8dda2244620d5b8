"""Tests train.objectives.tagging: tags line up with words, and only first tokens count."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.data import batching, tokens
from train.data.words import WordCounts
from train.objectives.tagging import Tagger

NAMES = ("B-ART", "I-ART", "O", "X")
MAX_LENGTH = 20
SEVEN = "a.the.film.plot"  # of seven tokens: the tokenizer divides at punctuation
# Words of one and of seven tokens, words that the tokenizer drops, and sentences that are too long.
SENTENCES = [
    ["the", "film", "was", "good"],
    [SEVEN, "good", SEVEN],
    ["\u200b", "a", "\u200b", SEVEN, "\u200b"],
    ["\u200b", ""],
    ["a"] * 30,
    ["film", SEVEN, SEVEN, SEVEN, "bad", "\u200b", "bad"],
]


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return tokens.load_tokenizer(
        tiny_backbone, vocab_size=100, max_position_embeddings=64, max_length=MAX_LENGTH
    )


def first_tokens(tokenizer, words):
    """Returns the place of each word's first token among those that fit, None without one."""
    places, end = [], 1  # behind [CLS]
    for word in words:
        length = len(tokenizer(word, add_special_tokens=False)["input_ids"])
        places.append(end if length and end < MAX_LENGTH - 1 else None)
        end += length
    return places


def random_tags(seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(len(NAMES), size=len(words)).tolist() for words in SENTENCES]


def tagger(tokenizer):
    return Tagger(None, tokenizer, MAX_LENGTH, NAMES)


def test_each_word_has_the_tag_of_its_first_token(tokenizer):
    encoded = tagger(tokenizer).encode({"tokens": SENTENCES})
    by_token = np.random.default_rng(1).integers(len(NAMES), size=(len(SENTENCES), MAX_LENGTH))
    found = tagger(tokenizer).predictions({"tags": by_token, "loss": None}, encoded)
    for row, words in enumerate(SENTENCES):
        places = first_tokens(tokenizer, words)
        wanted = [None if place is None else NAMES[by_token[row, place]] for place in places]
        assert found[row] == wanted
    # 12 words of the one long sentence, 2 of the other, whose last word of seven tokens is kept in
    # part, and so counts.
    assert encoded.word_counts == WordCounts(51, 12 + 2, 6)
    assert encoded.num_truncated == 2
    assert encoded.user_messages("test")[-2:] == [
        "14 of 51 words of the test sentences are cut off by max_length=20, and have no tag",
        "6 of 51 words of the test sentences are dropped by the tokenizer, and have no tag",
    ]


def test_labels_of_a_batch_are_at_first_tokens_alone(tokenizer):
    tags = random_tags()
    encoded = tagger(tokenizer).encode({"tokens": SENTENCES, "tags": tags})
    seen = 0
    for batch in batching.batches(encoded, 4, shuffle=True, seed=0):
        for row, index in enumerate(batch["indices"]):
            wanted = np.full(batch["input_ids"].shape[1], tokens.IGNORED)
            if index >= 0:
                places = first_tokens(tokenizer, SENTENCES[index])
                for place, tag in zip(places, tags[index], strict=True):
                    if place is not None:
                        wanted[place] = tag
                seen += 1
            np.testing.assert_array_equal(batch["labels"][row], wanted)
            count = max(np.count_nonzero(wanted != tokens.IGNORED), 1)  # of dropped words alone
            assert batch["weights"][row] == (count if index >= 0 else 0)
    assert seen == len(SENTENCES)


class OfIds:
    """A model whose logits are a table of the ids, four of them and a fifth of a wider bank."""

    def __init__(self, table):
        self.table, self.backbone = jnp.asarray(table), types.SimpleNamespace()

    def __call__(self, params, batch, dropout_key):
        return self.table[batch["input_ids"]]


class WithLogits(Tagger):
    """A tagger with the logits of a table, `model`."""

    @property
    def apply(self):
        return self.model


def outputs_of(objective, encoded):
    """Returns the outputs of all examples, in order, and the mean loss of a training batch."""
    (batch,) = batching.batches(encoded, 8, shuffle=True, seed=0)
    found = jax.device_get(objective.outputs(None, batch))
    order = np.argsort(batch["indices"])[-len(encoded) :]
    losses = objective.loss(objective.apply(None, batch, None)[..., : len(NAMES)], batch["labels"])
    mean = jnp.sum(losses * batch["weights"]) / batch["weights"].sum()
    return {name: each[order] for name, each in found.items()}, float(mean)


def test_loss_and_metrics_are_means_over_words(tokenizer):
    table = np.random.default_rng(2).normal(size=(30, 5)).astype(np.float32)
    table[:, 4] += 100  # the logit of another member of a bank, which counts nowhere
    objective = WithLogits(OfIds(table), tokenizer, MAX_LENGTH, NAMES)
    tags = random_tags(3)
    encoded = objective.encode({"tokens": SENTENCES, "tags": tags})
    losses, right = [], []
    for words, of_words in zip(SENTENCES, tags, strict=True):
        ids = tokenizer(words, is_split_into_words=True)["input_ids"]
        for place, tag in zip(first_tokens(tokenizer, words), of_words, strict=True):
            if place is not None:
                logits = table[ids[place], :4].astype(np.float64)
                losses.append(np.log(np.exp(logits).sum()) - logits[tag])
                right.append(logits.argmax() == tag)
    outputs, trained = outputs_of(objective, encoded)
    found = objective.scores(outputs, encoded)
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["accuracy"] == np.mean(right)
    # In training, the sentence without a token of a word counts as one word with a loss of 0.
    assert trained == pytest.approx(np.sum(losses) / (len(losses) + 1), abs=1e-5)
    predictions, targets = objective.predictions_and_targets(outputs, encoded)
    pairs = [
        pair for row in zip(predictions, targets, strict=True) for pair in zip(*row, strict=True)
    ]
    assert np.mean([a == b for a, b in pairs]) == np.mean(right)
    assert sum(map(len, targets)) == len(losses)


def test_logits_that_are_not_finite_are_refused(tokenizer):
    table = np.zeros((30, 4), np.float32)
    table[tokenizer("film", add_special_tokens=False)["input_ids"][0], 2] = np.nan
    objective = WithLogits(OfIds(table), tokenizer, MAX_LENGTH, NAMES)
    encoded = objective.encode({"tokens": SENTENCES, "tags": random_tags()})
    outputs, _ = outputs_of(objective, encoded)
    for refused in (objective.scores, objective.predictions):
        # "film" begins no word of several tokens.
        with pytest.raises(ValueError, match="the logits of 2 words are not finite"):
            refused(outputs, encoded)


def test_what_a_tagger_cannot_do_is_refused(tokenizer):
    objective = tagger(tokenizer)
    with pytest.raises(ValueError, match="leaves no room for a word; use 3 or more"):
        Tagger(None, tokenizer, 2, NAMES).encode({"tokens": SENTENCES})
    with pytest.raises(
        ValueError, match="of a column 'tokens', lists of text, but the columns are s"
    ):
        objective.encode({"sentence": ["a"]})
    with pytest.raises(ValueError, match="--logits needs a task with one label for each row"):
        objective.check_predicts(logits=True)
    encoded = objective.encode({"tokens": [["a"]]})
    with pytest.raises(ValueError, match="these sentences have no tags to compare with"):
        objective.scores({"tags": np.zeros((1, MAX_LENGTH), int), "loss": np.zeros(1)}, encoded)
