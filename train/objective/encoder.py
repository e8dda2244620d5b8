"""Objectives of an encoder: a label or a score, one of several candidates, a part of a text."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from train import data, metrics, spans, step
from train import learning_rates as rates
from train.objective.base import Objective, targets_of
from train.predictions import Predictions
from train.tasks.benchmarks import Benchmark, Choice

# Logit of a token that cannot be: finite, so that no sum with it is NaN.
_LEAST = -1e30


@dataclasses.dataclass(frozen=True)
class Classifier(Objective):
    """Labels or scores from the head of an encoder.

    Attributes:
      model: takes ids, mask and token types; returns `[batch, num_labels]` logits.
      tokenizer: joins pairs as the encoder wants them.
      kind: "classification" or "regression".
      max_length: longest input in tokens.
      benchmark: whose rows are read, if any.
    """

    inputs: ClassVar = ("input_ids", "attention_mask", "token_type_ids")
    learning_rates: ClassVar = rates.CLASSIFIER
    model: Any
    tokenizer: Any
    kind: Any
    max_length: int
    benchmark: Benchmark | None = None

    @property
    def loss(self) -> step.LossFunction:
        """Cross-entropy or squared error."""
        return step.loss_function(self.kind)

    def outputs(self, params: step.Params, batch: step.Batch) -> Array:
        """`[batch, num_labels]` float32 logits."""
        return step.logits_of(self.apply)(params, batch)

    def encode(self, rows: Any) -> data.Encoded:
        """Tokenises sentences or pairs."""
        if self.benchmark is None:
            return data.tokenize(rows, self.tokenizer, self.max_length)
        rows = self.benchmark.named(rows)
        columns = self.benchmark.for_encoder(rows)
        encoded = data.tokenize(columns, self.tokenizer, self.max_length)
        return dataclasses.replace(encoded, rows=rows, groups=data.groups_of(columns))

    def scores(self, outputs: np.ndarray, encoded: data.Encoded) -> dict[str, float]:
        """The metrics of `compute_metrics` and of the benchmark, and the mean loss."""
        values = metrics.compute_metrics(self.kind, outputs, targets_of(encoded))
        return {
            **self.with_benchmark(values, outputs.argmax(-1), encoded),
            "loss": _mean_loss(self.loss, outputs, encoded),
        }

    def predictions(self, outputs: np.ndarray, encoded: data.Encoded) -> Predictions:
        """The logits."""
        return outputs


@dataclasses.dataclass(frozen=True)
class ParallelClassifier(Classifier):
    """Classifiers beside each other, of a model that returns a tuple of their logits.

    What is trained is the mean of their losses; the metrics are those of each, as
    `NAME/accuracy`, and their means.

    Attributes:
      names: of the classifiers.
    """

    names: tuple[str, ...] = ()

    @property
    def loss(self) -> step.LossFunction:
        """The mean over the classifiers."""
        of_one = super().loss

        def mean(logits: Any, labels: Array) -> Array:
            return jnp.mean(jnp.stack([of_one(each, labels) for each in logits]), axis=0)

        return mean

    def outputs(self, params: step.Params, batch: step.Batch) -> Any:
        """A tuple of `[batch, num_labels]` float32 logits."""
        return tuple(each.astype(jnp.float32) for each in self.apply(params, batch, None))

    def scores(self, outputs: Any, encoded: data.Encoded) -> dict[str, float]:
        """Those of each classifier, and under the metrics' own names their means."""
        alone = Classifier(self.model, self.tokenizer, self.kind, self.max_length, self.benchmark)
        each = [alone.scores(logits, encoded) for logits in outputs]
        means = {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
        named = zip(self.names, each, strict=True)
        own = {f"{who}/{name}": value for who, found in named for name, value in found.items()}
        return means | own

    def predictions(self, outputs: Any, encoded: data.Encoded) -> dict[str, Any]:
        """Name -> logits."""
        return dict(zip(self.names, outputs, strict=True))


@dataclasses.dataclass(frozen=True)
class Chooser(Classifier):
    """One of the candidates of a row, each of which the classifier judges by itself."""

    benchmark: Choice

    def scores(self, outputs: np.ndarray, encoded: data.Encoded) -> dict[str, float]:
        """The benchmark's metrics of what is chosen, and the mean loss of a candidate."""
        targets_of(encoded)
        metrics.check_finite(outputs)
        chosen, values = self.predictions(outputs, encoded), {}
        if isinstance(chosen, np.ndarray):
            values = metrics.compute_metrics("classification", chosen, encoded.rows["label"][:])
        return {
            **self.with_benchmark(values, chosen, encoded),
            "loss": _mean_loss(self.loss, outputs, encoded),
        }

    def predictions(self, outputs: np.ndarray, encoded: data.Encoded) -> Predictions:
        """What is chosen; where candidates are labels, `[rows, labels]` logits of them.

        A candidate's logit is by how much it is rather right than wrong.
        """
        assert encoded.groups is not None
        ends = np.flatnonzero(np.diff(encoded.groups)) + 1
        chances = np.split(outputs[:, 1] - outputs[:, 0], ends)
        if self.benchmark.kind == "classification":
            return np.stack(chances)
        pairs = zip(self.benchmark.candidates(encoded.rows), chances, strict=True)
        return [names[chance.argmax()] for names, chance in pairs]

    def check_predicts(self, *, logits: bool) -> None:
        """Rows with candidates of their own have no logits of labels."""
        if logits and self.benchmark.kind != "classification":
            _refuse_logits(self.benchmark)


@dataclasses.dataclass(frozen=True)
class SpanExtractor(Objective):
    """The part of a context that answers a question, from the logits of its first and last token.

    Attributes:
      model: takes ids, mask and token types; returns `[batch, length, 2]` logits.
      tokenizer: joins pairs as the encoder wants them, and knows where tokens stand in the text.
      max_length: longest window on a context in tokens, question included.
      benchmark: whose rows are read.
      may_be_none: whether an answer may be "", as where some questions of training have none.
    """

    inputs: ClassVar = ("input_ids", "attention_mask", "token_type_ids")
    learning_rates: ClassVar = rates.CLASSIFIER
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
        """Logits, of padding the least there are, so that they do not depend on its length."""
        apply = super().apply

        def masked(params: step.Params, batch: step.Batch, dropout_key: Array | None) -> Array:
            logits = apply(params, batch, dropout_key).astype(jnp.float32)
            return jnp.where(batch["attention_mask"][..., None] != 0, logits, _LEAST)

        return masked

    def outputs(self, params: step.Params, batch: step.Batch) -> Array:
        """`[batch, max_length, 2]` float32 logits."""
        logits = self.apply(params, batch, None)
        more = self.max_length - logits.shape[1]
        return jnp.pad(logits, ((0, 0), (0, more), (0, 0)), constant_values=_LEAST)

    def encode(self, rows: Any) -> data.Encoded:
        """Windows on the contexts, behind their questions."""
        return spans.encode(self.benchmark.named(rows), self.tokenizer, self.max_length)

    def scores(self, outputs: np.ndarray, encoded: data.Encoded) -> dict[str, float]:
        """The benchmark's metrics of the answers, and the mean loss of a window."""
        targets_of(encoded)
        metrics.check_finite(outputs)
        return {
            **self.with_benchmark({}, self.predictions(outputs, encoded), encoded),
            "loss": _mean_loss(self.loss, outputs, encoded),
        }

    def predictions(self, outputs: np.ndarray, encoded: data.Encoded) -> list[str]:
        """The answers, as they stand in their contexts."""
        return spans.answers(outputs, encoded, may_be_none=self.may_be_none)

    @property
    def settings(self) -> dict[str, Any]:
        """The benchmark, and whether an answer may be none where it may."""
        settings = super().settings
        if self.may_be_none:
            settings["benchmark"]["may_be_none"] = True
        return settings

    def check_predicts(self, *, logits: bool) -> None:
        """Parts of a text have no logits of labels."""
        if logits:
            _refuse_logits(self.benchmark)


def _mean_loss(loss: step.LossFunction, outputs: np.ndarray, encoded: data.Encoded) -> float:
    return float(jnp.mean(loss(jnp.asarray(outputs), jnp.asarray(targets_of(encoded)))))


def _span_loss(logits: Array, labels: Array) -> Array:
    """`[batch, length, 2]`, `[batch, 2]` -> `[batch]`, NaN for a position that is not there."""
    return step.cross_entropy(jnp.swapaxes(logits, 1, 2), labels).mean(-1)


def _refuse_logits(benchmark: Benchmark) -> None:
    raise ValueError(
        f"--logits: the predictions of {benchmark.name} are no labels, and have none; leave it out"
    )
