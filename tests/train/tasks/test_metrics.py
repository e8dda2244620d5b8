"""Compares train.tasks.metrics with formulas in NumPy and with values computed by hand."""

import numpy as np
import pytest

from train.tasks.metrics import (
    all_of_group,
    answer_metrics,
    bleu,
    compute_metrics,
    label_metrics,
    score_metrics,
    text_metrics,
)


def one_hot(predictions, num_labels):
    return np.eye(num_labels, dtype=np.float32)[predictions]


def test_two_classes_by_hand():
    # For label 1: 2 true positives, 1 false positive, 1 false negative, 2 true negatives.
    values = compute_metrics(
        "classification", one_hot([1, 1, 1, 0, 0, 0], 2), np.array([1, 1, 0, 1, 0, 0])
    )
    assert values == pytest.approx(
        {"accuracy": 4 / 6, "f1": 2 / 3, "macro_f1": 2 / 3, "matthews_correlation": 3 / 9}
    )


def test_f1_is_of_label_one():
    values = compute_metrics("classification", one_hot([1, 1, 1, 1], 2), np.array([0, 1, 1, 1]))
    assert values["f1"] == pytest.approx(6 / 7)
    assert values["macro_f1"] == pytest.approx(3 / 7)


def test_many_classes_against_numpy():
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(size=(200, 4)), generator.integers(0, 4, 200)
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (targets, logits.argmax(-1)), 1)
    true, predicted, right = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    matthews = (right.sum() * 200 - true @ predicted) / np.sqrt(
        (200**2 - predicted @ predicted) * (200**2 - true @ true)
    )
    assert compute_metrics("classification", logits, targets) == pytest.approx(
        {
            "accuracy": right.sum() / 200,
            "macro_f1": np.mean(2 * right / (true + predicted)),
            "matthews_correlation": matthews,
        }
    )


@pytest.mark.parametrize("label", [0, 1])
def test_one_predicted_class_has_no_correlation(label):
    values = compute_metrics("classification", one_hot([label] * 4, 2), np.array([0, 0, 0, 1]))
    assert values["matthews_correlation"] == 0.0
    assert values["accuracy"] == [0.75, 0.25][label]
    same = compute_metrics("classification", one_hot([label], 2), np.array([label]))
    assert same == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "matthews_correlation": 0.0,
        "f1": float(label),
    }


def test_regression_against_numpy():
    generator = np.random.default_rng(1)
    targets = generator.normal(size=50).astype(np.float32)
    predictions = (0.5 * targets + generator.normal(size=50)).astype(np.float32)
    values = compute_metrics("regression", predictions[:, None], targets)
    ranks = [np.argsort(np.argsort(x)) for x in (predictions, targets)]
    assert values == pytest.approx(
        {
            "pearson": np.corrcoef(predictions, targets)[0, 1],
            "spearman": np.corrcoef(*ranks)[0, 1],
            "mse": np.mean((predictions - targets) ** 2),
            "mae": np.mean(np.abs(predictions - targets)),
        },
        rel=1e-5,
    )


def test_spearman_shares_the_rank_of_ties():
    values = compute_metrics("regression", np.array([1.0, 2.0, 2.0, 9.0]), np.arange(4.0))
    ranks = np.array([1, 2.5, 2.5, 4])
    assert values["spearman"] == pytest.approx(np.corrcoef(ranks, np.arange(4))[0, 1])
    assert values["mse"] == pytest.approx((1 + 1 + 0 + 36) / 4)
    assert values["mae"] == pytest.approx((1 + 1 + 0 + 6) / 4)


@pytest.mark.parametrize(
    "constant", [np.full(5, 0.1, np.float32), 1e6 + 1e-9 * np.arange(5), np.zeros(5)]
)
def test_correlation_with_a_constant_is_zero(constant):
    for pair in ((constant, np.arange(5.0)), (np.arange(5.0), constant)):
        values = compute_metrics("regression", *pair)
        assert values["pearson"] == 0.0
        assert values["spearman"] == 0.0
        assert values["mse"] > 0


def test_correlations_of_one_and_two_examples():
    assert compute_metrics("regression", np.array([1.0]), np.array([2.0]))["pearson"] == 0.0
    values = compute_metrics("regression", np.array([0.1, 0.3]), np.array([0.2, 0.1]))
    assert values["pearson"] == pytest.approx(-1.0)
    assert values["pearson"] >= -1.0


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(kind, bad):
    logits = np.array([[0.0, 1.0], [bad, 0.0]]) if kind == "classification" else np.array([1, bad])
    with pytest.raises(ValueError, match=rf"1 of {logits.size} logits are not finite"):
        compute_metrics(kind, logits, np.array([0, 1]))


def test_shapes_and_nothing_to_evaluate():
    with pytest.raises(ValueError, match=r"logits \(3, 2\) and targets \(2,\) do not fit"):
        compute_metrics("classification", np.zeros((3, 2)), np.zeros(2, int))
    with pytest.raises(ValueError, match=r"logits \(2, 2\) and targets \(2,\) do not fit regress"):
        compute_metrics("regression", np.zeros((2, 2)), np.zeros(2))
    with pytest.raises(ValueError, match="no examples"):
        compute_metrics("classification", np.zeros((0, 2)), np.zeros(0, int))


def test_generated_labels_that_are_none_are_wrong():
    values = label_metrics(np.array([1, 1, -1, 0, 0, -1]), np.array([1, 0, 1, 0, 0, 0]), 2)
    # For label 1: 1 true positive, 1 false positive, 1 false negative; for label 0: 2, 0 and 2.
    assert values == pytest.approx(
        {
            "accuracy": 3 / 6,
            "f1": 1 / 2,
            "macro_f1": (1 / 2 + 2 / 3) / 2,
            "matthews_correlation": values["matthews_correlation"],
            "invalid": 2,
        }
    )
    # The predictions have three classes; the formula is that of the confusion matrix.
    assert values["matthews_correlation"] == pytest.approx((3 * 6 - 12) / np.sqrt(24 * 16))
    assert isinstance(values["invalid"], int)
    nothing = label_metrics(np.array([-1, -1]), np.array([0, 1]), 2)
    assert nothing == {
        "accuracy": 0.0,
        "macro_f1": 0.0,
        "matthews_correlation": 0.0,
        "f1": 0.0,
        "invalid": 2,
    }


def test_generated_scores_that_are_none_are_the_mean():
    targets = np.array([1.0, 2.0, 6.0])
    values = score_metrics(np.array([1.5, np.nan, 6.0]), targets, fallback=3.0)
    assert values == {
        **compute_metrics("regression", np.array([1.5, 3.0, 6.0]), targets),
        "invalid": 1,
    }
    assert score_metrics(np.full(3, np.nan), targets, fallback=3.0)["pearson"] == 0.0


def test_exact_match_ignores_white_space_alone():
    assert text_metrics(["a  b", "a b", "A"], [" a b\n", "ab", "a"]) == {"exact_match": 1 / 3}


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Plot!", ["plot"], 1, 1),  # case, punctuation and articles do not count
        ("an  awful film", ["awful film"], 1, 1),
        ("a very good film", ["the good film", "dull"], 0, 4 / 5),  # 2 of 3 and 2 words are shared
        ("good good film", ["good plot"], 0, 2 / 5),  # a word counts as often as it is in both
        ("film", ["plot", "film", "the film was"], 1, 1),  # the best of several answers
        ("", ["film"], 0, 0),
        ("well-known", ["well known"], 0, 0),  # punctuation is removed, not replaced
        ("theatre", ["atre"], 0, 0),  # articles are whole words
    ],
)
def test_answers_by_hand(prediction, answers, exact, f1):
    assert answer_metrics([prediction], [answers]) == pytest.approx(
        {"exact_match": exact, "f1": f1}
    )


def test_answers_against_another_implementation():
    oracle = pytest.importorskip("transformers.data.metrics.squad_metrics")
    generator = np.random.default_rng(0)
    parts = ["the", "A", "film,", "plot", "plot", "Good", "not-good", "it's", "1.5"]
    for _ in range(200):
        prediction, *answers = (
            " ".join(generator.choice(parts, generator.integers(1, 6))) + " film" for _ in range(3)
        )
        assert answer_metrics([prediction], [answers]) == pytest.approx(
            {
                "exact_match": max(oracle.compute_exact(a, prediction) for a in answers),
                "f1": max(oracle.compute_f1(a, prediction) for a in answers),
            }
        )


def test_answers_are_averaged_over_questions():
    values = answer_metrics(["film", "dull plot"], [["the film"], ["plot", "dull"]])
    assert values == pytest.approx({"exact_match": 1 / 2, "f1": (1 + 2 / 3) / 2})


def test_a_group_counts_when_all_of_it_is_right():
    right = [True, True, False, True, True, False]
    assert all_of_group(right, ["a", "b", "a", "c", "b", "d"]) == 2 / 4


def test_bleu_by_hand():
    # The target shares 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples.
    predictions = ["we loved the plot not film"]
    targets = ["we loved the plot and film"]
    precisions = [5 / 6, 3 / 5, 2 / 4, 1 / 3]
    assert bleu(predictions, targets) == pytest.approx(100 * np.prod(precisions) ** (1 / 4))
    # Shorter than the target: everything is shared, but there is a brevity penalty.
    assert bleu(["we loved the plot"], ["we loved the plot not"]) == pytest.approx(
        100 * np.exp(1 - 5 / 4)
    )
    # Counts are summed over the corpus, not averaged over sentences.
    both = bleu([*predictions, "it was good it"], [*targets, "it was good it"])
    summed = [(5 + 4) / (6 + 4), (3 + 3) / (5 + 3), (2 + 2) / (4 + 2), (1 + 1) / (3 + 1)]
    assert both == pytest.approx(100 * np.prod(summed) ** (1 / 4))
