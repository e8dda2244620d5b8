"""Base class of the objectives."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array

from compacter_jax.models.families import family_of_module
from train.compute import step
from train.data import batching, tokens
from train.tasks.benchmark import Benchmark

# Logits `[rows, num_labels]`, or the predictions themselves, None where there is no prediction.
Predicted: TypeAlias = np.ndarray | list[str] | list[float | None] | list[list[str | None]]
# Predictions of one model, or name -> predictions of several.
Predictions: TypeAlias = Predicted | Mapping[str, Predicted]


class LabelLogits(NamedTuple):
    """Two functions whose composition is `Objective.outputs`.

    Attributes:
      compute: function of parameters and a batch that computes the logits of labels, `[batch,
        labels]` or `[batch, length, labels]` float32.
      outputs: function of these logits and the batch that returns the outputs.
    """

    compute: Callable[[step.Params, step.Batch], Array]
    outputs: Callable[[Array, step.Batch], Any]


class Objective(abc.ABC):
    """Interface of a task on a backbone, for training, evaluation and prediction.

    Attributes:
      learning_rates: preset -> default peak of the schedule.
      model: the adapted module.
      tokenizer: the tokenizer of the backbone.
      has_row_labels: True if the labels, where the task has some, are those of rows.
      benchmark: how the rows of the task are put to a backbone; None for other tasks.
    """

    learning_rates: ClassVar[Mapping[str, float]]
    has_row_labels: ClassVar[bool] = True
    model: Any
    tokenizer: Any
    benchmark: Benchmark | None = None

    @property
    def label_logits(self) -> LabelLogits | None:
        """Logits of labels and the outputs made of them; None for tasks without probabilities."""
        return None

    @property
    @abc.abstractmethod
    def loss(self) -> step.LossFunction:
        """Loss that a step minimises."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Keys of a batch that are the model's positional arguments."""
        return family_of_module(self.model.backbone).inputs

    @property
    def columns(self) -> Mapping[str, type]:
        """Columns of a file of inputs, with the types of their values, for `read_rows`."""
        return {} if self.benchmark is None else self.benchmark.columns

    @property
    def apply(self) -> step.ApplyFunction:
        """Function of the parameters that a step differentiates."""
        return step.apply_function(self.model, self.inputs)

    @abc.abstractmethod
    def outputs(self, params: step.Params, batch: step.Batch) -> Any:
        """Computes a tree of `[batch, …]` arrays to score a split by (`step.OutputsFunction`)."""

    @abc.abstractmethod
    def encode(self, rows: Any) -> tokens.Encoded:
        """Tokenises one split of a task, or columns of inputs without a target."""

    @abc.abstractmethod
    def scores(self, outputs: Any, encoded: tokens.Encoded) -> dict[str, float]:
        """Returns the metrics of a split from its outputs, and its loss as `loss`.

        Raises:
          ValueError: if the examples have no targets.
        """

    @abc.abstractmethod
    def predictions(self, outputs: Any, encoded: tokens.Encoded) -> Predictions:
        """Returns the predictions that `predict_file` writes, one for each row."""

    def predictions_and_targets(
        self, outputs: Any, encoded: tokens.Encoded
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns what the metrics compare, row by row, from the outputs of a split.

        Returns:
          `[rows]` predictions and `[rows]` targets: labels, scores, texts or tuples of tags; None
          where a row is not compared with a single target.
        """
        del outputs, encoded
        return None

    def user_messages(self) -> list[str]:
        """Returns lines about the labels for the user."""
        return []

    def check_predicts(self, *, logits: bool) -> None:  # noqa: B027 - most can do everything
        """Raises ValueError if there are no predictions, or no `logits` if they are requested."""

    @property
    def settings(self) -> dict[str, Any]:
        """Metadata of a saved adapter, JSON-ready, beyond the fields of all objectives."""
        return {} if self.benchmark is None else {"benchmark": {"name": self.benchmark.name}}

    def of_file(self, path: Path, folder: Path) -> Objective:
        """Returns the objective for a file of inputs; names in it are relative to `folder`."""
        del path, folder
        return self

    def save_processors(self, folder: Path) -> None:
        """Writes what turns inputs into arrays beside a backbone: the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def with_benchmark(
        self, values: Mapping[str, float], predictions: Any, encoded: tokens.Encoded
    ) -> dict[str, float]:
        """Returns `values` with the benchmark's own metrics of `[rows]` labels, scores or texts."""
        if self.benchmark is None:
            return dict(values)
        own = self.benchmark.scores(predictions, encoded.rows)
        return self.benchmark.with_mean({**values, **own})

    def encode_all(self, splits: Mapping[str, Any]) -> dict[str, batching.Examples]:
        """Tokenises the splits of a run, training and validation at least.

        Raises:
          ValueError: if a split cannot be tokenised; the message names it.
        """
        encoded: dict[str, batching.Examples] = {}
        for split, rows in splits.items():
            try:
                encoded[split] = self.encode(rows)
            except ValueError as error:
                raise ValueError(f"{split}: {error}") from error
        return encoded


def targets_of(encoded: tokens.Encoded) -> np.ndarray:
    """Returns the targets of examples; raises ValueError if they are unknown."""
    if encoded.targets is None:
        raise ValueError("these examples have no label, score or target to compare with")
    return encoded.targets


def mean_loss(loss: step.LossFunction, outputs: np.ndarray, encoded: tokens.Encoded) -> float:
    """Returns the mean loss of the outputs over all rows."""
    return float(jnp.mean(loss(jnp.asarray(outputs), jnp.asarray(targets_of(encoded)))))


def refuse_logits(benchmark: Benchmark) -> None:
    """Raises ValueError: the predictions of a benchmark are no labels, and have no logits."""
    raise ValueError(
        f"--logits needs a task with labels, and {benchmark.name} predicts none; leave it out"
    )
