"""What whoever trains, evaluates or predicts knows of a task and its backbone."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax.numpy as jnp
import numpy as np

from train.compute import step
from train.data import batching, tokens
from train.tasks.benchmark import Benchmark

# Logits `[rows, num_labels]`, or the predictions themselves, None where there is none.
Predicted: TypeAlias = np.ndarray | list[str] | list[float | None]
# Of one model, or of several by name.
Predictions: TypeAlias = Predicted | Mapping[str, Predicted]


class Objective(abc.ABC):
    """See the module's docstring.

    Attributes:
      inputs: keys of a batch that are the model's positional arguments.
      learning_rates: preset -> default peak of the schedule.
      model: the adapted module.
      tokenizer: the backbone's.
      benchmark: how the task's rows are put to a backbone; None for other tasks.
    """

    inputs: ClassVar[tuple[str, ...]]
    learning_rates: ClassVar[Mapping[str, float]]
    model: Any
    tokenizer: Any
    benchmark: Benchmark | None = None

    @property
    @abc.abstractmethod
    def loss(self) -> step.LossFunction:
        """What a step minimises."""

    @property
    def apply(self) -> step.ApplyFunction:
        """What a step differentiates."""
        return step.apply_function(self.model, self.inputs)

    @abc.abstractmethod
    def outputs(self, params: step.Params, batch: step.Batch) -> Any:
        """What a split is scored by: a tree of `[batch, …]` arrays; see `step.OutputsFunction`."""

    @abc.abstractmethod
    def encode(self, rows: Any) -> tokens.Encoded:
        """Tokenises one split of a task, or columns of inputs without a target."""

    @abc.abstractmethod
    def scores(self, outputs: Any, encoded: tokens.Encoded) -> dict[str, float]:
        """Metrics of a split from its outputs, and its loss as `loss`.

        Raises:
          ValueError: if the examples have no targets.
        """

    @abc.abstractmethod
    def predictions(self, outputs: Any, encoded: tokens.Encoded) -> Predictions:
        """What `predict_file` writes, for each row."""

    def user_messages(self) -> list[str]:
        """Returns what the user should know of the labels, a line each."""
        return []

    def check_predicts(self, *, logits: bool) -> None:  # noqa: B027 - most can do everything
        """ValueError if there are no predictions, or no `logits` of them if these are wanted."""

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-ready, for the metadata of a saved adapter, beside what all objectives have."""
        return {} if self.benchmark is None else {"benchmark": {"name": self.benchmark.name}}

    def with_benchmark(
        self, values: Mapping[str, float], predictions: Any, encoded: tokens.Encoded
    ) -> dict[str, float]:
        """`values` and the benchmark's own metrics of `[rows]` labels, scores or texts."""
        if self.benchmark is None:
            return dict(values)
        own = self.benchmark.scores(predictions, encoded.rows)
        return self.benchmark.with_mean({**values, **own})

    def encode_all(self, splits: Mapping[str, Any]) -> dict[str, batching.Examples]:
        """Tokenises the splits of a run, training and validation at least.

        Raises:
          ValueError: names the split.
        """
        encoded: dict[str, batching.Examples] = {}
        for split, rows in splits.items():
            try:
                encoded[split] = self.encode(rows)
            except ValueError as error:
                raise ValueError(f"{split}: {error}") from error
        return encoded


def targets_of(encoded: tokens.Encoded) -> np.ndarray:
    """What predictions are compared with; ValueError if that is unknown."""
    if encoded.targets is None:
        raise ValueError("these examples have no label, score or target to compare with")
    return encoded.targets


def mean_loss(loss: step.LossFunction, outputs: np.ndarray, encoded: tokens.Encoded) -> float:
    """Returns the mean loss of outputs against the targets of all rows."""
    return float(jnp.mean(loss(jnp.asarray(outputs), jnp.asarray(targets_of(encoded)))))


def refuse_logits(benchmark: Benchmark) -> None:
    """Raises ValueError: the predictions of a benchmark are no labels, and have no logits."""
    raise ValueError(
        f"--logits: the predictions of {benchmark.name} are no labels, and have none; leave it out"
    )
