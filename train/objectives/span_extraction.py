"""Objective of extractive question answering."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from train.compute import step
from train.data import tokens
from train.objectives import learning_rates as objectives_learning_rates
from train.objectives import spans
from train.objectives.base import Objective, mean_loss, refuse_logits, targets_of
from train.tasks import metrics
from train.tasks.benchmark import Benchmark

# Logit of an excluded token; finite, so that no sum with it is NaN.
_LEAST = -1e30


@dataclasses.dataclass(frozen=True)
class ExtractiveQA(Objective):
    """Part of a context that answers a question, by the logits of its first and last token.

    Attributes:
      model: a module of an encoder's inputs that returns `[batch, length, 2]` logits.
      tokenizer: the tokenizer of the encoder, which joins pairs and knows the position of tokens in
        text.
      max_length: the maximum length in tokens of a window on a context, question included.
      benchmark: the benchmark whose rows are read.
      may_be_none: whether an answer may be "", which holds if some training questions have none.
    """

    learning_rates: ClassVar = objectives_learning_rates.CLASSIFIER
    model: Any
    tokenizer: Any
    max_length: int
    benchmark: Benchmark
    may_be_none: bool = False

    @property
    def loss(self) -> step.LossFunction:
        """Mean of the cross-entropies of first and last token over the window."""
        return _span_loss

    @property
    def apply(self) -> step.ApplyFunction:
        """Model that masks the logits of padding, so that its length has no effect."""
        apply = super().apply

        def masked(params: step.Params, batch: step.Batch, dropout_key: Array | None) -> Array:
            logits = apply(params, batch, dropout_key).astype(jnp.float32)
            return jnp.where(batch["attention_mask"][..., None] != 0, logits, _LEAST)

        return masked

    def outputs(self, params: step.Params, batch: step.Batch) -> Array:
        """Computes `[batch, max_length, 2]` float32 logits."""
        logits = self.apply(params, batch, None)
        more = self.max_length - logits.shape[1]
        return jnp.pad(logits, ((0, 0), (0, more), (0, 0)), constant_values=_LEAST)

    def encode(self, rows: Any) -> tokens.Encoded:
        """Tokenises questions with windows on their contexts."""
        return spans.encode(self.benchmark.named(rows), self.tokenizer, self.max_length)

    def scores(self, outputs: np.ndarray, encoded: tokens.Encoded) -> dict[str, float]:
        """Returns the benchmark's metrics of the answers, and the mean loss of a window."""
        targets_of(encoded)
        metrics.check_finite(outputs)
        return {
            **self.with_benchmark({}, self.predictions(outputs, encoded), encoded),
            "loss": mean_loss(self.loss, outputs, encoded),
        }

    def predictions(self, outputs: np.ndarray, encoded: tokens.Encoded) -> list[str]:
        """Returns the answers, as they are spelled in their contexts."""
        return spans.answers(outputs, encoded, may_be_none=self.may_be_none)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the benchmark, with `may_be_none` if it is set."""
        settings = super().settings
        if self.may_be_none:
            settings["benchmark"]["may_be_none"] = True
        return settings

    def check_predicts(self, *, logits: bool) -> None:
        """Raises ValueError for `logits`, which parts of a text do not have."""
        if logits:
            refuse_logits(self.benchmark)


def _span_loss(logits: Array, labels: Array) -> Array:
    """Returns `[batch]` losses of `[batch, length, 2]` logits; NaN for a label out of range."""
    return step.cross_entropy(jnp.swapaxes(logits, 1, 2), labels).mean(-1)
