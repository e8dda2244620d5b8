"""Objective of pre-training by span corruption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jax import Array

from train import tasks
from train.compute import step
from train.data import corpus, tokens
from train.objectives import noise as objectives_noise
from train.objectives.on_text import OnText
from train.objectives.text_to_text import Seq2Seq, mean_token_loss, num_tokens


@dataclasses.dataclass(frozen=True)
class SpanCorruption(OnText, Seq2Seq):
    """Pre-training of T5; the splits are paths of text files.

    Attributes:
      model: an encoder-decoder with logits.
      tokenizer: the tokenizer of the backbone, with sentinels.
      config: the configuration of the module.
      corruption: the noise.
      seed: the seed of the noise in training.
    """

    name: ClassVar[str] = tasks.SPAN_CORRUPTION
    model: Any
    tokenizer: Any
    config: Any
    corruption: objectives_noise.SpanCorruption
    seed: int = 0

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Computes `loss` and `correct` of each row."""
        return self.teacher_forced(params, batch)

    def read(self, path: Path) -> corpus.Segments:
        """Tokenises a text file and divides it into segments."""
        return corpus.read_segments(path, self.tokenizer, self.corruption.segment_length)

    def noised(self, segments: corpus.Segments, seed: int, epoch: int) -> tokens.Encoded:
        """Returns inputs and targets of the segments with the noise of an epoch."""
        inputs, targets = objectives_noise.corrupted(
            segments, self.corruption, seed=seed, epoch=epoch
        )
        return self.encoded(
            tokens.Texts(inputs.tokens, inputs.offsets, self.corruption.input_length),
            tokens.Texts(targets.tokens, targets.offsets, self.corruption.target_length),
        )

    def scores(self, outputs: dict[str, np.ndarray], encoded: tokens.Encoded) -> dict[str, float]:
        """Returns `token_accuracy` and `loss` under teacher forcing."""
        accuracy = outputs["correct"].sum() / num_tokens(encoded).sum()
        return {"token_accuracy": float(accuracy), "loss": mean_token_loss(outputs, encoded)}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the noise."""
        noise = self.corruption
        names = ("noise_density", "mean_span_length")
        return {self.name: {name: getattr(noise, name) for name in names}}
