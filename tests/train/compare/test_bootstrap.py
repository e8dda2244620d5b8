"""The paired bootstrap: its metrics against scikit-learn's and SciPy's, and its intervals."""

import itertools

import numpy as np
import pytest
from scipy import stats

from train.compare.bootstrap import Scored, difference, weighted
from train.tasks.metrics import compute_metrics, label_metrics

NAMES = np.array(["no", "perhaps", "yes", "never drawn"])


def drawn(generator, examples, resamples):
    """Rows of each resample, and how often each example is among them."""
    rows = generator.integers(examples, size=(resamples, examples))
    return rows, np.stack([np.bincount(row, minlength=examples) for row in rows])


OF_LABELS = ("accuracy", "matthews_correlation", "macro_f1")


@pytest.mark.parametrize(
    ("metric", "labels"), [*itertools.product(OF_LABELS, (2, 3)), ("f1", 2)], ids=str
)
def test_metrics_of_labels_are_those_of_the_drawn_rows(metric, labels):
    generator = np.random.default_rng(labels)
    targets = generator.integers(labels, size=41)
    logits = generator.normal(size=(41, labels)) + 1.5 * np.eye(labels)[targets]
    rows, weights = drawn(generator, 41, 9)
    wanted = [compute_metrics("classification", logits[i], targets[i])[metric] for i in rows]
    found = weighted(metric, NAMES[logits.argmax(-1)], NAMES[targets], weights, NAMES[:labels])
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_correlations_are_those_of_the_drawn_rows(metric):
    generator = np.random.default_rng(0)
    targets = generator.normal(size=37).round(1)  # with ties
    found = (targets + generator.normal(size=37)).round(1)
    rows, weights = drawn(generator, 37, 9)
    wanted = [compute_metrics("regression", found[i], targets[i])[metric] for i in rows]
    np.testing.assert_allclose(weighted(metric, found, targets, weights), wanted, rtol=1e-12)


def test_several_metrics_count_by_their_mean():
    generator = np.random.default_rng(1)
    targets, found = generator.normal(size=(2, 20))
    _, weights = drawn(generator, 20, 5)
    each = [weighted(name, found, targets, weights) for name in ("pearson", "spearman")]
    both = weighted("pearson_and_spearman", found, targets, weights)
    np.testing.assert_allclose(both, np.mean(each, 0))


def test_constants_and_absent_labels_count_nothing():
    targets, weights = np.array(["no", "yes", "no"]), np.array([[1, 1, 1], [2, 0, 1]])
    constant = np.array(["no"] * 3)
    for metric in ("f1", "matthews_correlation"):
        assert weighted(metric, constant, targets, weights, ("no", "yes")).tolist() == [0, 0]
    zeros = weighted("pearson", np.zeros(3), np.array([1.0, 2.0, 3.0]), weights)
    assert zeros.tolist() == [0, 0]
    texts = np.array(["a  b", "c", "d"])
    match = weighted("exact_match", texts, np.array(["a b", "d", "d"]), weights)
    np.testing.assert_allclose(match, [2 / 3, 1])


def test_a_prediction_that_is_no_label_is_wrong_and_no_label():
    """A decoder generates texts; `macro_f1` has no label for it."""
    generator = np.random.default_rng(3)
    targets, found = generator.integers(3, size=30), generator.integers(-1, 3, size=30)
    rows, weights = drawn(generator, 30, 9)
    texts = np.array([None if label < 0 else NAMES[label] for label in found])
    for metric in OF_LABELS:
        wanted = [label_metrics(found[i], targets[i], 3)[metric] for i in rows]
        values = weighted(metric, texts, NAMES[targets], weights, NAMES[:3])
        np.testing.assert_allclose(values, wanted, rtol=1e-12)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_constant_is_one_up_to_rounding(metric):
    """The mean of equal numbers is not always that number."""
    _, weights = drawn(np.random.default_rng(0), 30, 50)
    targets = np.random.default_rng(1).normal(size=30)
    assert not weighted(metric, np.full(30, 0.1), targets, weights).any()
    near = 0.1 + 1e-6 * targets
    np.testing.assert_allclose(weighted(metric, near, targets, weights), 1, rtol=1e-6)


def test_the_ranks_of_many_examples_need_little_memory():
    """A table of examples by examples would have 7 GB."""
    generator = np.random.default_rng(0)
    targets, found = generator.normal(size=(2, 30_000))
    (value,) = weighted("spearman", found, targets, np.ones((1, 30_000), int))
    assert value == pytest.approx(stats.spearmanr(found, targets).statistic)


def side(rates, *, examples=400, seed=0, known=True):
    """Runs that are right about each example with the given chances, one for each seed."""
    generator = np.random.default_rng(seed)
    targets = np.random.default_rng(99).choice(NAMES[:2], examples)
    wrong = np.where(targets == NAMES[0], NAMES[1], NAMES[0])
    found = {
        i: np.where(generator.random(examples) < rate, targets, wrong)
        for i, rate in enumerate(rates)
    }
    scores = {i: float((predictions == targets).mean()) for i, predictions in found.items()}
    return Scored(scores, found if known else {}, targets if known else None)


def test_the_interval_of_one_run_is_that_of_paired_examples():
    """With one seed the bootstrap is that of a mean of differences, whose deviation is known."""
    one, other = side([0.8]), side([0.7], seed=1)
    found = difference(one, other, "accuracy", resamples=4000)
    each = (one.predictions[0] == one.targets) * 1.0 - (other.predictions[0] == other.targets)
    assert found.mean == pytest.approx(each.mean())
    half = stats.norm.ppf(0.975) * each.std() / np.sqrt(len(each))
    ends = np.array([found.low, found.high])
    np.testing.assert_allclose(ends - each.mean(), [-half, half], atol=0.004)
    assert (found.over_examples, found.seeds) == (True, 1)


def test_a_method_is_paired_with_itself():
    one = side([0.8, 0.6, 0.7])
    found = difference(one, one, "accuracy")
    assert (found.mean, found.low, found.high, found.verdict) == (0, 0, 0, "on par")


def test_seeds_widen_the_interval():
    """Among runs that differ much more than chance in the examples explains."""
    reference = side([0.7] * 4, seed=1)
    narrow = difference(side([0.8] * 4), reference, "accuracy")
    wide = difference(side([0.95, 0.65, 0.9, 0.7]), reference, "accuracy")
    assert wide.high - wide.low > 1.7 * (narrow.high - narrow.low)
    assert narrow.verdict == "ahead"


@pytest.mark.parametrize(
    ("rates", "verdict"), [([0.9] * 3, "ahead"), ([0.7] * 3, "on par"), ([0.5] * 3, "behind")]
)
def test_the_verdict(rates, verdict):
    assert difference(side(rates), side([0.7] * 3, seed=1), "accuracy").verdict == verdict


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    """Runs differ in examples alone; the share of 60 within 95 % has a deviation of 0.03."""
    held = 0
    for seed in range(60):
        one, other = side([0.8] * 2, seed=2 * seed), side([0.75] * 2, seed=2 * seed + 1)
        found = difference(one, other, "accuracy", resamples=300)
        held += found.low <= 0.05 <= found.high
    assert 0.85 <= held / 60 <= 1


def test_seeds_alone_are_drawn_where_examples_cannot_be():
    one, other = side([0.8, 0.6, 0.7]), side([0.7] * 3, seed=1)
    plain = [one.scores[i] - other.scores[i] for i in range(3)]
    unknown = difference(side([0.8, 0.6, 0.7], known=False), other, "accuracy")
    assert (unknown.over_examples, unknown.mean) == (False, pytest.approx(np.mean(plain)))
    assert min(plain) - 1e-12 <= unknown.low < unknown.high <= max(plain) + 1e-12
    assert not difference(one, other, "bleu").over_examples
    shorter = side([0.7] * 3, examples=300)
    assert not difference(one, shorter, "accuracy").over_examples
    alone = difference(side([0.8], known=False), other, "accuracy")
    assert not alone.known


NUMBERS = np.arange(400) / 7


@pytest.mark.parametrize(
    ("metric", "predictions", "labels"),
    [
        ("accuracy", lambda p: np.roll(p, 1), ()),  # not those of the score
        ("accuracy", lambda p: p[:-1], ()),
        ("accuracy", lambda p: p[:0], ()),
        ("f1", lambda p: p, ()),  # whose second label is unknown
        ("pearson", lambda p: p, ()),
        ("exact_match", lambda p: NUMBERS, ()),
    ],
)
def test_predictions_that_do_not_have_the_score_are_left_out(metric, predictions, labels):
    other, one = side([0.7] * 3, seed=1), side([0.8, 0.6, 0.7])
    known = difference(one, other, "accuracy")
    assert known.over_examples
    found = {**one.predictions, 1: predictions(one.predictions[1])}
    changed = Scored(one.scores, found, one.targets)
    assert not difference(changed, other, metric, labels).over_examples


@pytest.mark.parametrize(("labels", "over_examples"), [(50, True), (100, False)])
def test_examples_are_not_drawn_for_very_many_labels(labels, over_examples):
    """A table of labels by labels grows with the square of their number."""
    generator = np.random.default_rng(0)
    targets, found = generator.integers(labels, size=(2, 1000))
    score = label_metrics(found, targets, labels)["macro_f1"]
    runs = Scored({0: score}, {0: found.astype(str)}, targets.astype(str))
    assert difference(runs, runs, "macro_f1").over_examples == over_examples


def test_a_metric_over_groups_of_examples_is_left_out():
    """MultiRC's `exact_match` counts questions; its predictions are of the answers."""
    one, other = side([0.8] * 2), side([0.7] * 2, seed=1)
    halves = [
        Scored(
            {seed: score / 2 for seed, score in each.scores.items()}, each.predictions, each.targets
        )
        for each in (one, other)
    ]
    assert difference(one, other, "exact_match").over_examples
    assert not difference(*halves, "exact_match").over_examples


def test_only_seeds_in_common_count():
    one = side([0.8, 0.6])
    found = difference(one, side([0.7] * 3, seed=1), "accuracy")
    assert found.seeds == 2
    assert difference(Scored({5: 0.8}, {}, None), one, "accuracy") is None
