"""Noise of T5's pre-training task: spans cut out of text, and the targets that restore them."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import KW_ONLY, dataclass

import numpy as np

from train.data.corpus import Segments, joined


@dataclass(frozen=True)
class SpanCorruption:
    """Span corruption: removes spans from a segment of text and makes them the target.

    Of `n` tokens `round(noise_density * n)` are noise, in `round(noise / mean_span_length)` spans;
    both numbers are at least one. Spans of text and of noise alternate, the first is text and the
    last is noise; all divisions of this form are equally likely. In the inputs the first span of
    noise is replaced by the first sentinel, the second by the second, and so on. The targets
    consist of the same sentinels, each followed by its span. Both end with the end-of-sequence
    token. Figure 2 of the paper ends the targets with one more sentinel. The released code, which
    trained the checkpoints, does not, since a segment never ends in text; this class follows the
    code.

    Attributes:
      input_length: the maximum number of input tokens, sentinels and the end of the sequence
        included.
      noise_density: the fraction of the tokens to remove.
      mean_span_length: the mean number of tokens per span of noise.
      eos_token_id: the end-of-sequence token.
      sentinel_ids: the tokens that replace the first span, the second, …; see `sentinel_ids`.

    Raises:
      ValueError: if a value is out of its range, or there are fewer sentinels than spans.

    References:
      Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
      Transformer, JMLR 2020, arXiv:1910.10683, sections 3.1.4 and 3.3.4.
    """

    input_length: int
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    _: KW_ONLY
    eos_token_id: int
    sentinel_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        wanted = {
            "input_length": (
                self.input_length >= 3,
                "at least 3 (a token, a sentinel and the end-of-sequence token)",
            ),
            # Above this, hardly any text is left in the inputs, and segments grow without bound.
            "noise_density": (0 < self.noise_density <= 0.9, "above 0 and at most 0.9"),
            "mean_span_length": (1 <= self.mean_span_length < math.inf, "at least 1"),
            "eos_token_id": (self.eos_token_id >= 0, "at least 0"),
        }
        for name, (holds, want) in wanted.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {want}")
        ids = (self.eos_token_id, *self.sentinel_ids)
        if len(set(ids)) < len(ids) or min(ids) < 0:
            raise ValueError(
                f"sentinel_ids={self.sentinel_ids} must be distinct, and none of them may be "
                f"negative or eos_token_id={self.eos_token_id}"
            )
        self._check_sentinels()

    @functools.cached_property  # `corrupt` reads it for every segment
    def segment_length(self) -> int:
        """Number of text tokens that give `input_length` inputs, or the largest with fewer."""
        # Above this limit even the remaining text would not fit.
        limit = math.ceil(self.input_length / (1 - self.noise_density)) + 1
        return bisect.bisect_right(range(limit), self.input_length, key=self._num_inputs) - 1

    @property
    def target_length(self) -> int:
        """Number of target tokens of a segment of `segment_length`, the maximum of all segments."""
        return sum(self._num_noise(self.segment_length)) + 1

    def corrupt(
        self, tokens: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and targets of one segment.

        Args:
          tokens: `[n]` integers, `2 <= n <= segment_length`, without sentinels.
          generator: the source of the noise; segments of the same length consume the same amount.

        Returns:
          Inputs `[n - noise + spans + 1]` and targets `[noise + spans + 1]`, int32.

        Raises:
          ValueError: if there are too few or too many tokens.
        """
        if not 2 <= len(tokens) <= self.segment_length:
            raise ValueError(
                f"a segment of {len(tokens)} tokens cannot be corrupted with "
                f"input_length={self.input_length}; it must have 2 to {self.segment_length} tokens"
            )
        noise, spans = self._num_noise(len(tokens))
        noise_lengths = _random_lengths(noise, spans, generator)
        text_lengths = _random_lengths(len(tokens) - noise, spans, generator)
        lengths = np.stack([text_lengths, noise_lengths], axis=1).ravel()
        is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
        starts = np.cumsum(lengths) - lengths
        inputs = self._replace_spans(tokens, is_noise, starts[1::2])
        targets = self._replace_spans(tokens, ~is_noise, starts[::2])
        return inputs, targets

    def _replace_spans(
        self, tokens: np.ndarray, dropped: np.ndarray, starts: np.ndarray
    ) -> np.ndarray:
        """Returns `tokens` with a sentinel for every span of `dropped`, and the end token."""
        tokens = np.append(tokens, self.eos_token_id).astype(np.int32)
        kept = np.append(~dropped, True)
        tokens[starts] = self.sentinel_ids[: len(starts)]
        kept[starts] = True
        return tokens[kept]

    def _num_noise(self, length: int) -> tuple[int, int]:
        """Returns the numbers of noise tokens and of spans, both monotonic in `length`."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = max(round(noise / self.mean_span_length), 1)
        return noise, min(spans, length - noise)

    def _num_inputs(self, length: int) -> int:
        if length < 2:
            return 0
        noise, spans = self._num_noise(length)
        return length - noise + spans + 1

    def _check_sentinels(self) -> None:
        have = len(self.sentinel_ids)
        length = self.segment_length
        if self._num_noise(length)[1] <= have:
            return
        fitting = bisect.bisect_right(range(2, length), have, key=lambda n: self._num_noise(n)[1])
        instead = (
            f"input_length={self._num_inputs(fitting + 1)} or less, or a longer mean_span_length"
            if fitting
            else "a tokenizer with sentinels"
        )
        raise ValueError(
            f"input_length={self.input_length} makes {self._num_noise(length)[1]} spans, but the "
            f"tokenizer has {have} sentinels; use {instead}"
        )


def corrupted(
    segments: Segments, corruption: SpanCorruption, *, seed: int, epoch: int
) -> tuple[Segments, Segments]:
    """Returns inputs and targets of every segment, with the noise of one epoch.

    The noise of a segment depends on `seed`, `epoch` and the segment's index alone.

    Args:
      segments: the text, as `read_segments` returns it.
      corruption: the span corruption; its `segment_length` is at least that of the segments.
      seed: the seed of the noise.
      epoch: the epoch; each has its own noise.

    Returns:
      `(inputs, targets)`, one segment each for every segment, in the same order.

    Raises:
      ValueError: if `seed` or `epoch` is negative, or a segment does not suit `corruption`.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed={seed} and epoch={epoch} must be at least 0 for span corruption")
    pairs = [
        corruption.corrupt(segments[i], np.random.default_rng([seed, epoch, i]))
        for i in range(len(segments))
    ]
    inputs, targets = zip(*pairs, strict=True) if pairs else ((), ())
    return joined(inputs), joined(targets)


def _random_lengths(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """Draws `[parts]` positive integers with sum `total`, uniformly over all possibilities."""
    bounds = np.zeros(parts + 1, np.int64)
    bounds[1:-1] = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    bounds[-1] = total
    return bounds[1:] - bounds[:-1]
