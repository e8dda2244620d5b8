"""Tests dropout and its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compacter_jax.nn.dropout import Dropout, dropout_mask

RNG = np.random.default_rng(5)


def threefry(key, high, low):
    """Computes one block of Threefry-2x32 with 20 rounds, as in Random123 (Salmon et al., 2011)."""
    word = 2**32
    keys = [int(key[0]), int(key[1]), int(key[0]) ^ int(key[1]) ^ 0x1BD11BDA]
    x = [(high + keys[0]) % word, (low + keys[1]) % word]
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    for block in range(5):
        for by in rotations[block % 2]:
            x[0] = (x[0] + x[1]) % word
            x[1] = (x[1] << by | x[1] >> 32 - by) % word ^ x[0]
        x[0] = (x[0] + keys[(block + 1) % 3]) % word
        x[1] = (x[1] + keys[(block + 2) % 3] + block + 1) % word
    return x


@pytest.mark.contract
def test_a_mask_is_that_of_the_counters():
    key, rate = jax.random.key(7), 0.3
    pair = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    kept = round(0.7 * 65536)
    mask = np.asarray(dropout_mask(key, (3, 5, 10), rate))
    scores = np.asarray(dropout_mask(key, (2, 6, 4, 7), rate))
    for batch, row, column in [(0, 0, 0), (2, 4, 9), (1, 3, 5), (2, 1, 2)]:
        words = threefry(pair, batch << 16 | row, column % 3)  # 10 columns: 3 words of 4 values
        half = words[column // 3 // 2] >> 16 * (column // 3 % 2) & 0xFFFF
        assert mask[batch, row, column] == (half < kept)
    for batch, head, query, target in [(0, 0, 0, 0), (1, 5, 3, 6), (1, 2, 1, 4)]:
        words = threefry(pair, batch << 16 | query, (head % 2) << 16 | target)
        half = words[head // 2 // 2] >> 16 * (head // 2 % 2) & 0xFFFF
        assert scores[batch, head, query, target] == (half < kept)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_a_mask_keeps_as_many_as_it_should_whatever_their_neighbours(rate):
    mask = np.asarray(dropout_mask(jax.random.key(1), (40, 50, 64), rate))
    deviation = mask - (1 - rate)
    variance, bound = rate * (1 - rate), 5 / np.sqrt(mask.size)
    assert abs(deviation.mean()) < bound * np.sqrt(variance)
    for axis in range(3):
        ahead, behind = (
            np.take(deviation, np.arange(mask.shape[axis] - 1) + i, axis) for i in (1, 0)
        )
        assert abs((ahead * behind).mean()) < 1.1 * bound * variance
    # Entries that share a hash are uncorrelated.
    assert abs((deviation[..., :16] * deviation[..., 16:32]).mean()) < 2.1 * bound * variance


def test_a_mask_does_not_depend_on_rows_and_padding():
    key = jax.random.key(2)
    long = dropout_mask(key, (6, 33, 22), 0.2)
    np.testing.assert_array_equal(dropout_mask(key, (4, 20, 22), 0.2), long[:4, :20])
    scores = dropout_mask(key, (6, 5, 33, 40), 0.2)
    np.testing.assert_array_equal(dropout_mask(key, (3, 5, 7, 9), 0.2), scores[:3, :, :7, :9])
    rows = dropout_mask(key, (6, 22), 0.2)
    np.testing.assert_array_equal(dropout_mask(key, (4, 22), 0.2), rows[:4])


def test_masks_of_several_keys_at_once_are_those_of_each():
    keys = jax.random.split(jax.random.key(3), 4)
    masks = jax.vmap(lambda key: dropout_mask(key, (2, 3, 9), 0.4))(keys)
    for key, mask in zip(keys, masks, strict=True):
        np.testing.assert_array_equal(dropout_mask(key, (2, 3, 9), 0.4), mask)
    assert not np.array_equal(masks[0], masks[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_scales_what_it_keeps_and_its_gradient(dtype):
    layer, x = Dropout(0.25), jnp.asarray(RNG.standard_normal((4, 6, 10)), dtype)
    key = jax.random.key(0)

    def run(x):
        return layer.apply({}, x, deterministic=False, rngs={"dropout": key})

    y, gradient = run(x), jax.grad(lambda x: run(x).sum())(x)
    assert y.dtype == gradient.dtype == dtype
    dropped = np.asarray(y == 0)
    assert 0.1 < dropped.mean() < 0.4
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    expected = np.where(dropped, 0, np.float64(x) / 0.75)
    np.testing.assert_allclose(np.float64(y), expected, rtol=tolerance)
    np.testing.assert_allclose(np.float64(gradient), ~dropped / 0.75, rtol=tolerance)
    np.testing.assert_array_equal(layer.apply({}, x, deterministic=True), x)


def test_dropout_of_one_axis_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\) has 1 axes"):
        dropout_mask(jax.random.key(0), (3,), 0.1)
