"""Tests how often the examples of directions of different size are drawn."""

import numpy as np
import pytest

from train.data.batching import batches
from train.data.routes import Routes
from train.data.sampled import Sampled, quotas, taken
from train.data.tokens import Encoded, Texts

SIZES = (2, 30, 8)


def encoded(sizes=SIZES, seed=0):
    """Returns examples whose first token is their number, in a random order of directions."""
    rng = np.random.default_rng(seed)
    directions = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int32)
    number = len(directions)
    lengths = rng.integers(1, 6, number)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(100, 200, offsets[-1]).astype(np.int32)
    ids[offsets[:-1]] = np.arange(number)
    targets = np.array([f"text {i}" for i in range(number)], object)
    routes = Routes(directions, 10 + directions, 20 + directions)
    texts = Texts(ids + 1, offsets, 8)
    return Encoded(ids, None, offsets, targets, 8, 0, 0, target_texts=texts, routes=routes)


def numbers(examples):
    return examples.input_ids[examples.offsets[:-1]]


def test_taken_examples_are_those_at_the_positions():
    """Inputs, targets and routes of each taken example are those of the original."""
    whole, positions = encoded(), np.array([3, 0, 3, 17])
    part = taken(whole, positions)
    assert numbers(part).tolist() == positions.tolist()
    assert part.targets.tolist() == [f"text {i}" for i in positions]
    for i, position in enumerate(positions):
        for mine, theirs in ((part, whole), (part.target_texts, whole.target_texts)):
            ids = getattr(mine, "input_ids", None) if mine is part else mine.ids
            wanted = theirs.input_ids if theirs is whole else theirs.ids
            np.testing.assert_array_equal(
                ids[mine.offsets[i] : mine.offsets[i + 1]],
                wanted[theirs.offsets[position] : theirs.offsets[position + 1]],
            )
    np.testing.assert_array_equal(part.routes.adapter_ids, whole.routes.adapter_ids[positions])
    np.testing.assert_array_equal(part.routes.first_tokens, whole.routes.first_tokens[positions])


@pytest.mark.parametrize("temperature", [1, 2, 5, 100])
def test_shares_are_powers_of_the_sizes(temperature):
    """An epoch has `n ** (1 / T)` examples of each direction, in proportion, to one."""
    sizes = np.array([3, 4000, 700, 0, 51])
    found = quotas(sizes, temperature)
    assert found.sum() == sizes.sum()
    rates = np.float64(sizes) ** (1 / temperature)
    rates[sizes == 0] = 0
    np.testing.assert_allclose(found, rates / rates.sum() * sizes.sum(), atol=1)


def test_temperature_one_takes_every_example_once():
    """Nothing is drawn again or left out."""
    whole = encoded()
    assert Sampled(whole, 1.0, 0).of_epoch(3) is whole


def test_epochs_go_through_all_examples_of_a_direction():
    """Over the epochs the examples of a direction are seen equally often, up to one."""
    whole = encoded()
    drawn = Sampled(whole, 3.0, seed=7)
    share = quotas(np.array(SIZES), 3.0)
    seen = np.zeros(len(whole), int)
    for epoch in range(5):
        examples = drawn.of_epoch(epoch)
        assert len(examples) == len(whole)
        np.testing.assert_array_equal(numbers(examples), numbers(drawn.of_epoch(epoch)))
        np.add.at(seen, numbers(examples), 1)
        counts = np.bincount(examples.routes.directions, minlength=3)
        np.testing.assert_array_equal(counts, share)
    for direction in range(3):
        of_direction = seen[whole.routes.directions == direction]
        assert of_direction.sum() == 5 * share[direction]
        assert np.ptp(of_direction) <= 1
    other = numbers(Sampled(whole, 3.0, seed=8).of_epoch(0))
    assert (other != numbers(drawn.of_epoch(0))).any()


def test_batches_have_the_routes_of_their_rows():
    """Each row of a batch has the member and first token of its example; filling rows have 0."""
    whole = encoded()
    for batch in batches(whole, 16, shuffle=True, seed=1):
        real = batch["indices"] >= 0
        rows = batch["indices"][real]
        np.testing.assert_array_equal(batch["adapter_ids"][real], whole.routes.adapter_ids[rows])
        np.testing.assert_array_equal(batch["first_tokens"][real], whole.routes.first_tokens[rows])
        assert not batch["adapter_ids"][~real].any()
        assert batch["adapter_ids"].dtype == np.int32
