"""Objectives of pre-training, whose splits are text files and whose noise is new in every epoch."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from train.data import batching, corpus, tokens
from train.objectives.base import Objective, Predicted

# Fraction of a corpus that is held out if there is no validation file.
_HELD_OUT = 0.02


# Evaluation noise and held-out text are the same for every seed, so that runs are comparable.
_FIXED_SEED = 0


class OnText(Objective):
    """Base of the objectives of pre-training; the splits are paths of text files.

    Attributes:
      name: the task, and the key of the settings of the noise.
      seed: the seed of the noise in training.
    """

    name: ClassVar[str]
    seed: int

    @abc.abstractmethod
    def read(self, path: Path) -> corpus.Segments:
        """Tokenises a text file and divides it into segments."""

    @abc.abstractmethod
    def noised(self, segments: corpus.Segments, seed: int, epoch: int) -> tokens.Encoded:
        """Returns the segments with the noise of an epoch."""

    def encode(self, rows: Path) -> tokens.Encoded:
        """Tokenises a text file, with fixed noise."""
        return self._fixed(self.read(rows))

    def encode_all(self, splits: Mapping[str, Path]) -> dict[str, batching.Examples]:
        """Tokenises the text files of a run; training text gets new noise in every epoch.

        Without a validation file, a part of the training text is held out.
        """
        encoded: dict[str, batching.Examples] = {
            split: self.encode(path) for split, path in splits.items() if split != "train"
        }
        segments = self.read(splits["train"])
        if "validation" not in splits:
            held_out, segments = _held_out(segments, splits["train"])
            encoded["validation"] = self._fixed(held_out)
        return {"train": Corpus(self, segments, self.seed), **encoded}

    def predictions(self, outputs: Any, encoded: tokens.Encoded) -> Predicted:
        """Raises ValueError: there is nothing to predict."""
        raise ValueError(self._predicts_nothing())

    def check_predicts(self, *, logits: bool) -> None:
        """Raises ValueError: there is nothing to predict."""
        raise ValueError(self._predicts_nothing())

    def _predicts_nothing(self) -> str:
        return (
            f"an adapter of {self.name} cannot predict; fit a task on the backbone that it was "
            "trained with, or, after --method full, on the folder backbone/ of its run"
        )

    def _fixed(self, segments: corpus.Segments) -> tokens.Encoded:
        made = Corpus(self, segments, _FIXED_SEED)
        return dataclasses.replace(made.of_epoch(0), unknown=made.unknown())


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Segments of text that are corrupted anew in every epoch; implements `batching.Examples`.

    Attributes:
      objective: the objective, which has the noise.
      segments: the text.
      seed: the seed of the noise.
    """

    objective: OnText
    segments: corpus.Segments
    seed: int

    def __len__(self) -> int:
        return len(self.segments)

    def of_epoch(self, epoch: int) -> tokens.Encoded:
        """Returns the segments with the noise of an epoch."""
        return self.objective.noised(self.segments, self.seed, epoch)

    def user_messages(self, split: str) -> list[str]:
        """Returns lines about the amount of text and its unknown tokens."""
        size = f"{split}: {len(self.segments.tokens):,} tokens in {len(self):,} segments"
        return [size, *self.unknown().user_messages(f"{split} segments")]

    def unknown(self) -> tokens.Unknown:
        """Counts the tokens of the segments that are unknown to the tokenizer."""
        segments = self.segments
        return tokens.count_unknown(segments.tokens, segments.offsets, self.objective.tokenizer)


def _held_out(segments: corpus.Segments, path: Path) -> tuple[corpus.Segments, corpus.Segments]:
    """Splits off a small part of the segments for validation, and prints its size."""
    if len(segments) < 2:
        raise ValueError(
            f"{path}: a single segment leaves none for validation; give more text or "
            "--validation-file"
        )
    order = np.random.default_rng(_FIXED_SEED).permutation(len(segments))
    size = max(1, round(_HELD_OUT * len(segments)))
    print(f"{size} of {len(segments)} segments are held out for validation")
    return _taken(segments, order[:size]), _taken(segments, order[size:])


def _taken(segments: corpus.Segments, indices: np.ndarray) -> corpus.Segments:
    """Returns some of the segments, in the order of the text."""
    chosen = [segments[int(i)] for i in np.sort(indices)]
    return corpus.Segments(
        np.concatenate(chosen), np.cumsum([0, *map(len, chosen)], dtype=np.int64)
    )
