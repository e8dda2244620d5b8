"""Examples of several directions, of which small ones are drawn more often than their share."""

from __future__ import annotations

import dataclasses

import numpy as np

from train.data.tokens import Encoded, Texts

# A third seed beside the seed and the direction, so that no other draw uses the same stream.
_STREAM = 0x646972


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Examples that are drawn by direction; implements `train.data.batching.Examples`.

    An epoch has as many examples as there are. The share of direction i with n_i examples is
    proportional to `n_i ** (1 / temperature)`. Within a direction all examples are seen equally
    often, up to one: the epochs go through one shuffle of them after another.

    Attributes:
      encoded: all examples, with routes.
      temperature: 1 takes every example once; larger values favour small directions.
      seed: the seed of the draw.

    References:
      Arivazhagan et al., Massively Multilingual Neural Machine Translation in the Wild, 2019,
      arXiv:1907.05019, section 4.2.
    """

    encoded: Encoded
    temperature: float
    seed: int

    def __len__(self) -> int:
        return len(self.encoded)

    def of_epoch(self, epoch: int) -> Encoded:
        """Returns the examples of an epoch, a function of `epoch` alone."""
        if self.temperature == 1:
            return self.encoded
        assert self.encoded.routes is not None
        of_direction = self.encoded.routes.directions
        sizes = np.bincount(of_direction)
        drawn = [
            self._drawn(np.flatnonzero(of_direction == direction), direction, count, epoch)
            for direction, count in enumerate(quotas(sizes, self.temperature))
        ]
        return taken(self.encoded, np.concatenate(drawn))

    def _drawn(self, positions: np.ndarray, direction: int, count: int, epoch: int) -> np.ndarray:
        """Returns the `count` examples of a direction that follow those of earlier epochs."""
        places = np.arange(epoch * count, (epoch + 1) * count)
        rounds = places // max(len(positions), 1)
        found = np.zeros(0, np.int64)
        for each in np.unique(rounds):
            generator = np.random.default_rng([self.seed, int(each), direction, _STREAM])
            shuffled = generator.permutation(positions)
            found = np.append(found, shuffled[places[rounds == each] % len(positions)])
        return found

    def user_messages(self, split: str) -> list[str]:
        """Returns the lines of all examples."""
        return self.encoded.user_messages(split)


def quotas(sizes: np.ndarray, temperature: float) -> np.ndarray:
    """Returns how many examples of each direction an epoch has.

    Args:
      sizes: `[directions]`, the number of examples of each direction.
      temperature: the exponent is its inverse.

    Returns:
      `[directions]` int64, whose sum is that of `sizes`. The shares are rounded down, and those
      with the largest remainders get the rest.
    """
    # Dividing by the largest size keeps the power from overflowing.
    rates = (sizes / max(sizes.max(initial=0), 1)) ** (1 / temperature)
    exact = rates / max(rates.sum(), 1e-300) * sizes.sum()
    whole = np.floor(exact).astype(np.int64)
    rest = int(sizes.sum() - whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:rest]] += 1
    return whole


def taken(encoded: Encoded, positions: np.ndarray) -> Encoded:
    """Returns the examples of an encoder-decoder at `positions`, in this order."""
    targets, texts, routes = encoded.targets, encoded.target_texts, encoded.routes
    frames = None if encoded.frames is None else encoded.frames.taken(positions)
    if frames is None:
        flat, offsets = _gathered(encoded.input_ids, encoded.offsets, positions)
    else:
        flat, offsets = encoded.input_ids, frames.offsets
    if texts is not None:
        ids, ends = _gathered(texts.ids, texts.offsets, positions)
        texts = Texts(ids, ends, texts.max_length, given=texts.given)
    return dataclasses.replace(
        encoded,
        input_ids=flat,
        offsets=offsets,
        targets=None if targets is None else targets[positions],
        target_texts=texts,
        routes=None if routes is None else routes.taken(positions),
        frames=frames,
    )


def _gathered(
    flat: np.ndarray, offsets: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the texts at `positions` one after the other, and their offsets."""
    lengths = np.diff(offsets)[positions]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    shift = np.repeat(offsets[positions] - ends[:-1], lengths)
    return flat[np.arange(ends[-1]) + shift], ends
