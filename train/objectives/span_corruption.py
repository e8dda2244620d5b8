"""Objective of pre-training by span corruption."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from train import tasks
from train.compute import step
from train.data import batching, tokens
from train.data import corpus as data_corpus
from train.objectives import noise as objectives_noise
from train.objectives.base import Predicted
from train.objectives.text_to_text import Seq2Seq, mean_token_loss, num_tokens

# Fraction of a corpus that is held out if there is no validation file.
_HELD_OUT = 0.02


# Evaluation noise and held-out text are the same for every seed, so that runs are comparable.
_FIXED_SEED = 0


_PREDICTS_NOTHING = (
    f"an adapter of {tasks.SPAN_CORRUPTION} cannot predict; fit a task on the backbone that it "
    "was trained with, or, after --method full, on the folder backbone/ of its run"
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Segments of text that are corrupted anew in every epoch; implements `batching.Examples`.

    Attributes:
      objective: the objective, which has the noise.
      segments: the text.
      seed: the seed of the noise.
    """

    objective: SpanCorruption
    segments: data_corpus.Segments
    seed: int

    def __len__(self) -> int:
        return len(self.segments)

    def of_epoch(self, epoch: int) -> tokens.Encoded:
        """Returns the segments with the noise of an epoch."""
        corruption = self.objective.corruption
        inputs, targets = objectives_noise.corrupted(
            self.segments, corruption, seed=self.seed, epoch=epoch
        )
        return self.objective.encoded(
            tokens.Texts(inputs.tokens, inputs.offsets, corruption.input_length),
            tokens.Texts(targets.tokens, targets.offsets, corruption.target_length),
        )

    def user_messages(self, split: str) -> list[str]:
        """Returns lines about the amount of text and its unknown tokens."""
        size = f"{split}: {len(self.segments.tokens):,} tokens in {len(self):,} segments"
        return [size, *self.unknown().user_messages(f"{split} segments")]

    def unknown(self) -> tokens.Unknown:
        """Counts the tokens of the segments that are unknown to the tokenizer."""
        segments = self.segments
        return tokens.count_unknown(segments.tokens, segments.offsets, self.objective.tokenizer)


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Seq2Seq):
    """Pre-training of T5; the splits are paths of text files.

    Attributes:
      model: an encoder-decoder with logits.
      tokenizer: the tokenizer of the backbone, with sentinels.
      config: the configuration of the module.
      corruption: the noise.
      seed: the seed of the noise in training.
    """

    model: Any
    tokenizer: Any
    config: Any
    corruption: objectives_noise.SpanCorruption
    seed: int = 0

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Computes `loss` and `correct` of each row."""
        return self.teacher_forced(params, batch)

    def encode(self, rows: Path) -> tokens.Encoded:
        """Tokenises a text file, with fixed noise."""
        return self._fixed(self._read(rows))

    def encode_all(self, splits: Mapping[str, Path]) -> dict[str, batching.Examples]:
        """Tokenises the text files of a run; training text gets new noise in every epoch.

        Without a validation file, a part of the training text is held out.
        """
        encoded: dict[str, batching.Examples] = {
            split: self.encode(path) for split, path in splits.items() if split != "train"
        }
        segments = self._read(splits["train"])
        if "validation" not in splits:
            held_out, segments = _held_out(segments, splits["train"])
            encoded["validation"] = self._fixed(held_out)
        return {"train": Corpus(self, segments, self.seed), **encoded}

    def scores(self, outputs: dict[str, np.ndarray], encoded: tokens.Encoded) -> dict[str, float]:
        """Returns `token_accuracy` and `loss` under teacher forcing."""
        accuracy = outputs["correct"].sum() / num_tokens(encoded).sum()
        return {"token_accuracy": float(accuracy), "loss": mean_token_loss(outputs, encoded)}

    def predictions(self, outputs: Any, encoded: tokens.Encoded) -> Predicted:
        """Raises ValueError: there is nothing to predict."""
        raise ValueError(_PREDICTS_NOTHING)

    def check_predicts(self, *, logits: bool) -> None:
        """Raises ValueError: there is nothing to predict."""
        raise ValueError(_PREDICTS_NOTHING)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the noise."""
        noise = self.corruption
        names = ("noise_density", "mean_span_length")
        return {tasks.SPAN_CORRUPTION: {name: getattr(noise, name) for name in names}}

    def _read(self, path: Path) -> data_corpus.Segments:
        return data_corpus.read_segments(path, self.tokenizer, self.corruption.segment_length)

    def _fixed(self, segments: data_corpus.Segments) -> tokens.Encoded:
        corpus = Corpus(self, segments, _FIXED_SEED)
        return dataclasses.replace(corpus.of_epoch(0), unknown=corpus.unknown())


def _held_out(
    segments: data_corpus.Segments, path: Path
) -> tuple[data_corpus.Segments, data_corpus.Segments]:
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


def _taken(segments: data_corpus.Segments, indices: np.ndarray) -> data_corpus.Segments:
    """Returns some of the segments, in the order of the text."""
    chosen = [segments[int(i)] for i in np.sort(indices)]
    return data_corpus.Segments(
        np.concatenate(chosen), np.cumsum([0, *map(len, chosen)], dtype=np.int64)
    )
