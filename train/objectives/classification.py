"""Objectives with a classification head: labels, scores, and multiple choice."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from train.compute import step
from train.data import tokens
from train.objectives import learning_rates as objectives_learning_rates
from train.objectives.base import (
    LabelLogits,
    Objective,
    Predictions,
    mean_loss,
    refuse_logits,
    targets_of,
)
from train.tasks import metrics
from train.tasks.benchmark import Benchmark, Choice


@dataclasses.dataclass(frozen=True)
class Classifier(Objective):
    """Labels or scores from the head of an encoder.

    Attributes:
      model: a module of an encoder's inputs that returns `[batch, num_labels]` logits.
      tokenizer: the tokenizer of the encoder, which joins pairs.
      kind: "classification" or "regression".
      max_length: the maximum input length in tokens.
      benchmark: the benchmark whose rows are read, if any.
    """

    learning_rates: ClassVar = objectives_learning_rates.CLASSIFIER
    model: Any
    tokenizer: Any
    kind: Any
    max_length: int
    benchmark: Benchmark | None = None

    @property
    def label_logits(self) -> LabelLogits | None:
        """The outputs themselves, for labels."""
        if self.kind != "classification":
            return None
        return LabelLogits(self.outputs, lambda logits, batch: logits)

    @property
    def loss(self) -> step.LossFunction:
        """Cross-entropy or squared error."""
        return step.loss_function(self.kind)

    def outputs(self, params: step.Params, batch: step.Batch) -> Array:
        """Computes `[batch, num_labels]` float32 logits."""
        return step.logits_of(self.apply)(params, batch)

    def encode(self, rows: Any) -> tokens.Encoded:
        """Tokenises sentences or pairs."""
        if self.benchmark is None:
            return tokens.tokenize(rows, self.tokenizer, self.max_length)
        rows = self.benchmark.named(rows)
        columns = self.benchmark.for_encoder(rows)
        encoded = tokens.tokenize(columns, self.tokenizer, self.max_length)
        return dataclasses.replace(encoded, rows=rows, groups=tokens.groups_of(columns))

    def scores(self, outputs: np.ndarray, encoded: tokens.Encoded) -> dict[str, float]:
        """Returns the metrics of `compute_metrics` and of the benchmark, and the mean loss."""
        values = metrics.compute_metrics(self.kind, outputs, targets_of(encoded))
        return {
            **self.with_benchmark(values, outputs.argmax(-1), encoded),
            "loss": mean_loss(self.loss, outputs, encoded),
        }

    def predictions(self, outputs: np.ndarray, encoded: tokens.Encoded) -> Predictions:
        """Returns the logits."""
        return outputs

    def predictions_and_targets(
        self, outputs: Any, encoded: tokens.Encoded
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns labels or scores, and those of the rows."""
        found = outputs[:, 0] if self.kind == "regression" else outputs.argmax(-1)
        return found, targets_of(encoded)


@dataclasses.dataclass(frozen=True)
class ParallelClassifier(Classifier):
    """Several classifiers in one model that returns a tuple of their logits.

    The loss is the mean of their losses. The metrics are those of each classifier, as
    `NAME/accuracy`, and their means.

    Attributes:
      names: the names of the classifiers.
    """

    names: tuple[str, ...] = ()

    @property
    def label_logits(self) -> None:
        """None: each classifier has its own."""

    @property
    def loss(self) -> step.LossFunction:
        """Mean of the losses of the classifiers."""
        of_one = super().loss

        def mean(logits: Any, labels: Array) -> Array:
            return jnp.mean(jnp.stack([of_one(each, labels) for each in logits]), axis=0)

        return mean

    def outputs(self, params: step.Params, batch: step.Batch) -> Any:
        """Computes a tuple of `[batch, num_labels]` float32 logits."""
        return tuple(each.astype(jnp.float32) for each in self.apply(params, batch, None))

    def scores(self, outputs: Any, encoded: tokens.Encoded) -> dict[str, float]:
        """Returns the metrics of each classifier, and their means under the plain names."""
        alone = Classifier(self.model, self.tokenizer, self.kind, self.max_length, self.benchmark)
        each = [alone.scores(logits, encoded) for logits in outputs]
        means = {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
        named = zip(self.names, each, strict=True)
        own = {f"{who}/{name}": value for who, found in named for name, value in found.items()}
        return means | own

    def predictions(self, outputs: Any, encoded: tokens.Encoded) -> dict[str, Any]:
        """Returns name -> logits."""
        return dict(zip(self.names, outputs, strict=True))

    def predictions_and_targets(self, outputs: Any, encoded: tokens.Encoded) -> None:
        """Returns None: a row has a prediction of each classifier."""
        del outputs, encoded


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Classifier):
    """Choice of one of the candidates of a row; the classifier scores each candidate separately."""

    benchmark: Choice

    @property
    def label_logits(self) -> None:
        """None: those of a row are divided over its candidates."""

    def scores(self, outputs: np.ndarray, encoded: tokens.Encoded) -> dict[str, float]:
        """Returns the benchmark's metrics of the choices, and the mean loss of a candidate."""
        targets_of(encoded)
        metrics.check_finite(outputs)
        chosen, values = self.predictions(outputs, encoded), {}
        if isinstance(chosen, np.ndarray):
            values = metrics.compute_metrics("classification", chosen, encoded.rows["label"][:])
        return {
            **self.with_benchmark(values, chosen, encoded),
            "loss": mean_loss(self.loss, outputs, encoded),
        }

    def predictions(self, outputs: np.ndarray, encoded: tokens.Encoded) -> Predictions:
        """Returns the choices; if candidates are labels, their `[rows, labels]` logits instead.

        The logit of a candidate is the difference between its logits for right and for wrong.
        """
        assert encoded.groups is not None
        ends = np.flatnonzero(np.diff(encoded.groups)) + 1
        chances = np.split(outputs[:, 1] - outputs[:, 0], ends)
        if self.benchmark.kind == "classification":
            return np.stack(chances)
        pairs = zip(self.benchmark.candidates(encoded.rows), chances, strict=True)
        return [names[chance.argmax()] for names, chance in pairs]

    def predictions_and_targets(
        self, outputs: Any, encoded: tokens.Encoded
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns labels and those of the rows; None where the candidates are no labels."""
        chosen = self.predictions(outputs, encoded)
        if not isinstance(chosen, np.ndarray):
            return None
        return chosen.argmax(-1), np.asarray(encoded.rows["label"][:])

    def check_predicts(self, *, logits: bool) -> None:
        """Raises ValueError for `logits` if the candidates of a row are no labels."""
        if logits and self.benchmark.kind != "classification":
            refuse_logits(self.benchmark)
