"""Tests SpecAugment's masks of time and frequency."""

import jax
import jax.numpy as jnp
import numpy as np

from train.speech.spec_augment import SpecAugment


def masked(augment, lengths, width=80, padded=120, seed=0):
    """Returns which features are masked, `[rows, frames, width]`, within the lengths."""
    features = jnp.ones((len(lengths), padded, width))
    mask = (np.arange(padded) < np.array(lengths)[:, None]).astype(np.int32)
    return np.asarray(augment(features, jnp.asarray(mask), jax.random.key(seed))) == 0


def runs(row):
    """Returns the number of stretches of True."""
    return int(np.sum(np.diff(np.concatenate([[0], row.astype(int)])) == 1))


def test_masks_are_stretches_within_their_bounds():
    """Whole frames and whole bands are masked, in no more and no longer stretches than allowed."""
    augment = SpecAugment()
    lengths = [100, 60, 7, 120]
    found_time, found_bands = [], []
    for seed in range(40):
        hidden = masked(augment, lengths, seed=seed)
        for row, length in zip(hidden, lengths, strict=True):
            frames, bands = row.all(1), row.all(0)
            np.testing.assert_array_equal(row, frames[:, None] | bands[None])
            assert not frames[length:].any()
            assert runs(frames) <= 2
            assert runs(bands) <= 2
            assert frames.sum() <= 2 * int(0.2 * length)
            assert bands.sum() <= 2 * 27
            found_time.append(frames.sum() / length)
            found_bands.append(bands.sum())
    # The mean width of a mask is half its largest.
    assert 0.1 < np.mean(found_time[::4]) < 0.22
    assert 18 < np.mean(found_bands) < 32


def test_masks_do_not_depend_on_padding():
    """The same rows with more padding have the same masks."""
    short = masked(SpecAugment(), [50, 30], padded=50)
    long = masked(SpecAugment(), [50, 30], padded=96)
    np.testing.assert_array_equal(long[:, :50], short)


def test_masks_depend_on_key_and_row():
    """Other keys and other rows have other masks, the same key the same."""
    first, again = (masked(SpecAugment(), [100, 100], seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    assert (first != masked(SpecAugment(), [100, 100], seed=2)).any()


def test_without_masks_features_stay():
    """No masks, and masks of no width, leave every feature, in its dtype."""
    features = jax.random.normal(jax.random.key(0), (2, 9, 24), jnp.bfloat16)
    mask = jnp.ones((2, 9), jnp.int32)
    for augment in (
        SpecAugment(time_masks=0, frequency_masks=0),
        SpecAugment(most_frames=0, most_bands=0),
    ):
        found = augment(features, mask, jax.random.key(1))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, features)


def test_bands_are_scaled_to_the_width():
    """A mask covers at most 27 of 80 features, and 8 of 24."""
    for seed in range(20):
        hidden = masked(SpecAugment(frequency_masks=1), [100], width=24, seed=seed)
        assert hidden[0].all(0).sum() <= 8
