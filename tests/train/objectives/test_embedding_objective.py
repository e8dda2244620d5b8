"""Tests train.objectives.embedding: what is a negative, on one and on four devices, and scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.tasks.test_similarity import plain_ranks
from train.compute.compute import make_compute
from train.data import batching, tokens
from train.objectives.embedding import Embedder, EmbeddingSettings, in_batch_loss

SETTINGS = EmbeddingSettings("mean", False, False, "multiple-negatives", 20.0, 0.5)
MAX_LENGTH = 20
TRIPLETS = [
    ("the film", "it was good", "it was not"),
    ("a plot", "very dull", "hated it"),
    ("the film", "we loved it and it was very very very very very very good", "dull"),
    ("the plot", "it was good", "bad"),  # the positive of the first row
    ("bad", "awful", "it was good"),  # whose negative is the positive of others
    ("fine", "great", "hated it"),
    ("we", "it", "not"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return tokens.load_tokenizer(
        tiny_backbone, vocab_size=100, max_position_embeddings=64, max_length=MAX_LENGTH
    )


def columns(rows, scores=None):
    named = zip(("sentence1", "sentence2", "negative"), zip(*rows, strict=True), strict=False)
    found = {name: list(values) for name, values in named}
    return found if scores is None else found | {"score": scores}


def embedder(tokenizer, **changes):
    return Embedder(None, tokenizer, MAX_LENGTH, dataclasses.replace(SETTINGS, **changes))


class OfIds(Embedder):
    """An embedder whose embedding is the mean of the rows of a table, by the ids."""

    @property
    def apply(self):
        def embed(params, batch, dropout_key):
            mask = batch["attention_mask"][..., None]
            return (params["table"][batch["input_ids"]] * mask).sum(-2) / mask.sum(-2)

        return embed


def of_ids(tokenizer, **changes):
    return OfIds(None, tokenizer, MAX_LENGTH, dataclasses.replace(SETTINGS, **changes))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plain_loss(embedded, texts, scale):
    """Returns the loss of each row; neither its positive nor one of its anchor is a negative."""
    embedded, found = unit(embedded.astype(np.float64)), []
    for row, (anchor, positive, *_) in enumerate(texts):
        logits = [scale * embedded[row, 0] @ embedded[row, 1]]
        logits += [
            scale * embedded[row, 0] @ embedded[i, column]
            for i, other in enumerate(texts)
            for column, text in enumerate(other[1:], 1)
            if text != positive and (column != 1 or other[0] != anchor)
        ]
        found.append(np.log(np.exp(logits).sum()) - logits[0])
    return np.array(found)


def test_each_text_is_padded_in_its_place(tokenizer):
    encoded = embedder(tokenizer).encode(columns(TRIPLETS))
    assert len(encoded) == 7
    assert encoded.num_truncated == 0
    seen = set()
    for batch in batching.batches(encoded, 4, shuffle=True, seed=0):
        assert batch["input_ids"].shape[:2] == batch["labels"].shape == (4, 3)
        for row, index in enumerate(batch["indices"]):
            assert (batch["labels"][row] > 0).all() == (index >= 0) == batch["weights"][row]
            texts = TRIPLETS[index] if index >= 0 else []
            seen.add(int(index))
            for column, text in enumerate(texts):
                alone = tokenizer(text)["input_ids"]
                kept = batch["attention_mask"][row, column] == 1
                assert batch["input_ids"][row, column][kept].tolist() == alone
    assert seen == {*range(7), -1}
    labels = encoded.targets
    assert labels[0, 1] == labels[3, 1] == labels[4, 2]
    assert len(np.unique(labels)) == len({text for row in TRIPLETS for text in row})


def test_equal_texts_and_filling_rows_are_no_negatives(tokenizer):
    for width in (2, 3):
        rows = [row[:width] for row in TRIPLETS]
        ids = embedder(tokenizer).encode(columns(rows)).targets
        drawn = np.random.default_rng(width).normal(size=(9, width, 6)).astype(np.float32)
        for row in range(1, 7):  # equal texts have equal embeddings
            for column in range(width):
                same = np.argwhere(ids == ids[row, column])[0]
                drawn[row, column] = drawn[tuple(same)]
        filled = np.concatenate([ids, np.zeros((2, width), np.int32)])
        found = np.asarray(in_batch_loss(jnp.asarray(drawn), jnp.asarray(filled), 20.0))
        wanted = plain_loss(drawn[:7], rows, 20.0)
        np.testing.assert_allclose(found[:7], wanted, rtol=1e-6, atol=2e-6)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("loss", ["multiple-negatives", "triplet"])
def test_four_devices_and_a_mesh_have_the_negatives_of_one(loss, tokenizer):
    """A batch is one pool of negatives however it is divided; its last rows may be filling."""
    objective = of_ids(tokenizer, loss=loss, dimensions=(6, 2))
    encoded = objective.encode(columns(TRIPLETS * 2 + TRIPLETS[:3]))
    batches = list(batching.batches(encoded, 8, shuffle=True, seed=3))
    assert sorted(batch["weights"].sum() for batch in batches) == [1, 8, 8]
    table = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)

    def trained(devices, mesh=None):
        compute = make_compute(
            objective.apply,
            objective.loss,
            optax.sgd(1e-2),
            seed=0,
            devices=jax.local_devices()[:devices],
            mesh=mesh,
        )
        state, frozen = compute.init_state({"table": table}), compute.place({"table": None})
        losses = []
        for batch in batches:
            state, metrics = compute.step(state, frozen, batch)
            losses.append([float(metrics.loss), float(metrics.gradient_norm)])
        return np.array(losses), np.asarray(compute.host_state(state).trained["table"])

    losses, moved = trained(1)
    assert np.abs(moved - table).max() > 1e-3
    for other in (trained(4), trained(4, "data=4,model=1")):
        np.testing.assert_allclose(other[0], losses, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(other[1], moved, atol=2e-6)


def test_scores_are_those_of_a_plain_count(tokenizer):
    outputs = np.random.default_rng(4).normal(size=(7, 3, 6)).astype(np.float32)
    objective = embedder(tokenizer, dimensions=(6, 2))
    encoded = objective.encode(columns(TRIPLETS))
    known = {}
    for row, texts in enumerate(TRIPLETS):  # a text has one embedding
        for column, text in enumerate(texts):
            outputs[row, column] = known.setdefault(text, outputs[row, column].copy())
    found = objective.scores(outputs, encoded)
    for prefix, width in (("", 6), ("2/", 2)):
        ranks = plain_ranks(outputs[..., :width].astype(np.float64), TRIPLETS)
        assert found[f"{prefix}accuracy_at_1"] == np.mean(ranks == 1)
        assert found[f"{prefix}mrr"] == pytest.approx(np.mean(1 / ranks), abs=1e-12)
    losses = [plain_loss(outputs[..., :width], TRIPLETS, 20.0).mean() for width in (6, 2)]
    assert found["loss"] == pytest.approx(sum(losses), rel=1e-5)
    assert "6/mrr" not in found
    assert objective.predictions_and_targets(outputs, encoded) is None
    # A split with scores has the loss of cosines, whatever was trained.
    scores = [0.5, -1, 0, 1, 0.25, 0.3, 0.1]
    scored = objective.encode(columns([row[:2] for row in TRIPLETS], scores))
    found = objective.scores(outputs[:, :2], scored)
    cosines = (unit(outputs[:, 0]) * unit(outputs[:, 1])).sum(-1)
    predicted, targets = objective.predictions_and_targets(outputs[:, :2], scored)
    np.testing.assert_allclose(predicted, cosines, atol=1e-6)
    np.testing.assert_allclose(targets, scores, atol=1e-7)
    assert list(found) == ["spearman", "pearson", "2/spearman", "2/pearson", "loss"]
    alone = embedder(tokenizer).scores(outputs[:, :2], scored)
    assert alone["loss"] == pytest.approx(np.mean((cosines - scores) ** 2), rel=1e-5)


def test_what_an_embedder_cannot_do_is_refused(tokenizer):
    objective = embedder(tokenizer)
    single = objective.encode({"sentence": ["it", "a film"]})
    assert objective.predictions(np.ones((2, 1, 3)), single) == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match="these texts have no second text to compare with"):
        objective.scores(np.ones((2, 1, 3)), single)
    bad = np.ones((2, 1, 3))
    bad[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match="the embeddings of 1 texts are not finite"):
        objective.predictions(bad, single)
    with pytest.raises(ValueError, match="there is no column 'sentence' to embed; the columns are"):
        objective.encode({"text": ["a"]})
    with pytest.raises(ValueError, match="--logits needs a task with labels or scores of rows"):
        objective.check_predicts(logits=True)
    lower = embedder(tokenizer, lower_case=True).encode({"sentence": ["THE Film"]})
    plain = objective.encode({"sentence": ["the film"]})
    assert lower.input_ids.tolist() == plain.input_ids.tolist()
