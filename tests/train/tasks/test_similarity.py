"""Compares metrics of embeddings with SciPy and with a plain count of ranks."""

import numpy as np
import pytest
from scipy import stats

from train.tasks.similarity import cosines, retrieval_metrics, score_metrics


def plain_ranks(embeddings, texts):
    """Returns the rank of each distinct anchor, counted candidate by candidate."""
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    vector = {text: unit[r, c] for r, row in enumerate(texts) for c, text in enumerate(row)}
    candidates = {text for row in texts for text in row[1:]}
    ranks = {}
    for anchor in dict.fromkeys(row[0] for row in texts):
        right = {row[1] for row in texts if row[0] == anchor}
        similarity = {text: float(vector[anchor] @ vector[text]) for text in candidates}
        best = max(similarity[text] for text in right)
        ranks[anchor] = 1 + sum(similarity[text] >= best for text in candidates - right)
    return np.array(list(ranks.values()))


def embedded(texts, width=6, seed=0):
    """Returns random embeddings `[rows, texts, width]`, equal for equal texts."""
    generator = np.random.default_rng(seed)
    vectors = {text: generator.normal(size=width) for text in sorted({t for r in texts for t in r})}
    return np.array([[vectors[text] for text in row] for row in texts], np.float32)


@pytest.mark.parametrize("number", [2, 3])
def test_ranks_are_those_of_a_plain_count(number):
    generator = np.random.default_rng(1)
    texts = [
        [
            f"anchor {generator.integers(9)}",
            *(f"text {i}" for i in generator.integers(0, 14, number - 1)),
        ]
        for _ in range(30)
    ]
    embeddings = embedded(texts)
    ranks = plain_ranks(embeddings.astype(np.float64), texts)
    assert len(ranks) == 9
    found = retrieval_metrics(embeddings, texts)
    assert found["accuracy_at_1"] == np.mean(ranks == 1)
    assert found["mrr"] == pytest.approx(np.mean(1 / ranks), abs=1e-12)
    assert 0 < found["accuracy_at_1"] < found["mrr"] < 1
    assert ("triplet_accuracy" in found) == (number == 3)
    if number == 3:
        near, far = (cosines(embeddings[:, 0], embeddings[:, i]) for i in (1, 2))
        assert found["triplet_accuracy"] == np.mean(near > far)


def test_duplicates_are_neither_wrong_nor_counted_twice():
    texts = [["q", "right"], ["q", "also right"], ["q", "right"], ["p", "wrong"]]
    vectors = {"q": [1, 0.1], "right": [0, 1], "also right": [1, 0], "wrong": [1, 1], "p": [1, 1]}
    embeddings = np.array([[vectors[text] for text in row] for row in texts], float)
    assert retrieval_metrics(embeddings, texts) == {"accuracy_at_1": 1.0, "mrr": 1.0}
    vectors["q"] = [0.8, 0.9]  # nearest to `wrong`
    embeddings = np.array([[vectors[text] for text in row] for row in texts], float)
    assert retrieval_metrics(embeddings, texts) == {"accuracy_at_1": 0.5, "mrr": 0.75}


def test_equal_embeddings_of_all_texts_are_no_retrieval():
    texts = [[f"q{i}", f"a{i}"] for i in range(4)]
    found = retrieval_metrics(np.ones((4, 2, 3)), texts)
    assert found == {"accuracy_at_1": 0.0, "mrr": 0.25}


def test_correlations_are_those_of_scipy():
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=(2, 40, 5))
    first[0] = 0
    scores = generator.integers(0, 6, 40) / 5  # with ties
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    wanted = (first * second).sum(1) / np.where(norms > 0, norms, 1)
    np.testing.assert_allclose(cosines(first, second), wanted, atol=1e-12)
    found = score_metrics(first, second, scores)
    assert found["spearman"] == pytest.approx(stats.spearmanr(wanted, scores)[0], abs=1e-12)
    assert found["pearson"] == pytest.approx(stats.pearsonr(wanted, scores)[0], abs=1e-12)
