"""The settings of a generation, a static argument of one compiled program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

# One decoding step: (tokens [rows], self-attention cache, position) -> (logits [rows, vocab],
# cache).
Step = Callable[[Array, Any, Array], tuple[Array, Any]]


# The token that stands for logits with NaN; no vocabulary has it.
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All static arguments of `generate`; equal settings have equal hashes and compile once.

    Attributes:
      start: start token.
      pad: token after the end of a sequence.
      eos: tokens that end a sequence.
      first: token that follows the start token, None for any.
      last: token at the largest length, None for any.
      never: tokens that are never generated.
    """

    max_new_tokens: int
    min_new_tokens: int
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    start: int
    pad: int | None
    eos: tuple[int, ...]
    first: int | None = None
    last: int | None = None
    never: tuple[int, ...] = ()

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for a value that is out of range or would have no effect."""
        self._check_lengths()
        for name, token in (
            ("decoder_start_token_id", self.start),
            ("pad_token_id", self.pad),
            ("forced_bos_token_id", self.first),
            ("forced_eos_token_id", self.last),
            *(("eos_token_id", token) for token in self.eos),
        ):
            if token is not None and not 0 <= token < vocab_size:
                hint = "; () never ends a sequence early" if name == "eos_token_id" else ""
                raise ValueError(
                    f"{name}={token} is not in the vocabulary; use 0 to {vocab_size - 1}{hint}"
                )
        if self.num_beams < 1 or self.num_beams > vocab_size:
            raise ValueError(
                f"num_beams={self.num_beams} is out of range; use 1 (no beam search) to the size "
                f"of the vocabulary, {vocab_size}"
            )
        self._check_beams()
        self._check_sampling()
        self._check_copies()

    def _check_lengths(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is too few; use 1 or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is out of range; use 0 to "
                f"max_new_tokens={self.max_new_tokens}"
            )

    def _check_beams(self) -> None:
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f'early_stopping={self.early_stopping!r} is unknown; use True, False or "never"'
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty} is not finite; use 1.0")
        if self.num_beams > 1:
            return
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is used only in beam search; set num_beams "
                    f"to 2 or more, or leave {name} out"
                )

    def _check_sampling(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} is not positive; for greedy search, which is the "
                "limit at 0, use do_sample=False"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} keeps no token; use 1 or more, or None for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is out of range; use 0 < top_p <= 1, 1 for all")
        if self.do_sample:
            if self.num_beams > 1:
                raise ValueError(
                    f"num_beams={self.num_beams} with do_sample=True is not supported; choose "
                    "beam search or sampling"
                )
            return
        for name, neutral in (("temperature", 1.0), ("top_k", None), ("top_p", 1.0)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)} is used only in sampling; set do_sample=True, "
                    f"or leave {name} out"
                )

    def _check_copies(self) -> None:
        copies = self.num_return_sequences
        if copies < 1 or (not self.do_sample and copies > self.num_beams):
            raise ValueError(
                f"num_return_sequences={copies} is out of range; use 1 to "
                f"num_beams={self.num_beams}, or sample with do_sample=True"
            )


def is_end(tokens: Array, settings: Settings) -> Array:
    """Returns True for each token that ends a sequence."""
    return (tokens[..., None] == jnp.asarray(settings.eos, jnp.int32)).any(-1)


def constrain(scores: Array, index: Array, settings: Settings) -> Array:
    """Sets the tokens that cannot come next to -inf in `[rows, vocab]`, in transformers' order.

    A forced token has the score 0, so that it changes no hypothesis' score.

    Args:
      scores: logits or log probabilities, `[rows, vocab]`.
      index: number of tokens before the next one, without the start token.
      settings: the tokens that never come, that end a sequence, and that are forced.
    """
    tokens = jnp.arange(scores.shape[-1])
    for token in settings.never:
        scores = jnp.where(tokens == token, -jnp.inf, scores)
    if settings.min_new_tokens > 0:
        ends = is_end(tokens, settings)
        scores = jnp.where(ends & (index < settings.min_new_tokens), -jnp.inf, scores)
    forced = ((settings.first, 0), (settings.last, settings.max_new_tokens - 1))
    for only_token, place in forced:
        if only_token is not None:
            only = jnp.where(tokens == only_token, 0.0, -jnp.inf).astype(scores.dtype)
            scores = jnp.where(index == place, only, scores)
    return scores
