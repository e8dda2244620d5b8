"""Base classes of benchmarks: their columns, metrics, and how their rows become text."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from train.data.tokens import columns_of

if TYPE_CHECKING:
    from datasets import Dataset


# "choice" predicts one of a row's own candidates, "span" a part of the context, "tagging" a tag of
# every word, "embedding" a vector for every text.
Kind: TypeAlias = Literal[
    "classification",
    "regression",
    "choice",
    "span",
    "tagging",
    "embedding",
    "text",
    "span_corruption",
    "masked_lm",
    "translation",
    "speech",
]


Rows: TypeAlias = "Dataset | Mapping[str, Sequence[Any]]"


Columns: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Benchmark of sentences or pairs, with a label or a score; subclasses override the rest.

    Attributes:
      name: the name of the task.
      repository: the hub id of the data set.
      configuration: the part of the data set; the name of its folder.
      columns: input column -> type of its values. The first two are the first and second sentence
        for an encoder.
      kind: the kind of prediction.
      metrics: the metrics whose mean selects the best epoch.
      validation: the names of the hub's validation splits; the first selects the best epoch.
      highest_score: the highest score of similarity that a pair can have; None for other rows.
    """

    name: str
    repository: str
    configuration: str
    columns: Mapping[str, type]
    kind: Kind = "classification"
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    highest_score: float | None = None

    @property
    def wanted(self) -> str:
        """Column with the values to predict."""
        return "label"

    @property
    def metric(self) -> str:
        """Metric that selects the best epoch; larger is better."""
        return "_and_".join(self.metrics)

    @property
    def prefix(self) -> str:
        """Beginning of the input of an encoder-decoder."""
        return self.name

    def named(self, rows: Rows) -> Rows:
        """Returns `rows`; columns `sentence` and `sentence2` are renamed to the benchmark's own.

        Raises:
          ValueError: if rows have neither all of these columns nor all of the hub's.
        """
        found = columns_of(rows)
        missing = [name for name in self.columns if name not in found]
        if not missing:
            return rows
        generic = ("sentence", "sentence2")[: len(self.columns)]
        if len(self.columns) > 2 or not set(generic) <= set(found):
            raise ValueError(
                f"rows of {self.name} need {', '.join(self.columns)}, but have no {missing[0]!r}; "
                f"their columns are {', '.join(found)}"
            )
        renamed = dict(zip(generic, self.columns, strict=True))
        return {renamed.get(name, name): rows[name] for name in found}

    def for_encoder(self, rows: Rows) -> Columns:
        """Returns `sentence`, optionally `sentence2`, and any `label` or `score`."""
        inputs = zip(("sentence", "sentence2"), self.columns, strict=False)
        return {column: rows[name][:] for column, name in inputs} | self.targets(rows)

    def for_decoder(self, rows: Rows) -> Columns:
        """Returns `text` without the prefix, and any `label`, `score` or `target`."""
        names = sorted(self.columns)
        parts = zip(*(rows[name][:] for name in names), strict=True)
        texts = [keyed(dict(zip(names, values, strict=True))) for values in parts]
        return {"text": texts, **self.targets(rows)}

    def targets(self, rows: Rows) -> Columns:
        """Returns the column `label` or `score`, if there is one."""
        column = "score" if self.kind == "regression" else "label"
        return {column: rows[column][:]} if column in columns_of(rows) else {}

    def questions(self, rows: Rows) -> list[Hashable] | None:
        """Returns the question to which each row belongs; None if every row is a question."""
        return None

    def usable(self, rows: Rows) -> list[bool] | None:
        """Returns, for each row, whether it can be used for training; None if all rows can."""
        return None

    def check(self, rows: Rows) -> None:
        """Checks rows for training or scoring beyond the types of their columns.

        Raises:
          ValueError: if a row is invalid; the message names it, counted from 1.
        """
        return

    def unanswered(self, rows: Rows) -> int:
        """Returns the number of rows without an answer, for benchmarks with answers."""
        return 0

    def user_messages(self) -> list[str]:
        """Returns lines about the metrics for the user."""
        return []

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """Returns metrics beyond those of the kind, from labels or texts, one for each row."""
        return {}

    def with_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Returns `values` and, if several metrics select the best epoch, their mean."""
        chosen = [values[name] for name in self.metrics]
        return {self.metric: sum(chosen) / len(chosen), **values}


class Choice(Benchmark, abc.ABC):
    """Choice of the likeliest of several candidates, which an encoder scores separately."""

    @abc.abstractmethod
    def candidates(self, rows: Rows) -> list[list[str]]:
        """Returns the candidates of each row."""

    @abc.abstractmethod
    def pairs(self, rows: Rows) -> list[list[tuple[str, str]]]:
        """Returns, for each row, the sentence and second sentence of each candidate."""

    @abc.abstractmethod
    def right(self, rows: Rows) -> list[list[bool]] | None:
        """Returns, for each row, whether each candidate is right; None if that is unknown."""

    def for_encoder(self, rows: Rows) -> Columns:
        """Returns a pair for each candidate, with label 1 if it is right, and its `row`."""
        pairs, right = self.pairs(rows), self.right(rows)
        flat = list(itertools.chain.from_iterable(pairs))
        columns: Columns = {
            "sentence": [first for first, _ in flat],
            "sentence2": [second for _, second in flat],
            "row": [row for row, of_row in enumerate(pairs) for _ in of_row],
        }
        if right is not None:
            columns["label"] = [int(value) for of_row in right for value in of_row]
        return columns


def keyed(parts: Mapping[str, str]) -> str:
    """Formats `{"premise": "a", "hypothesis": "b"}` as `premise: a hypothesis: b`."""
    return " ".join(f"{name}: {text}" for name, text in parts.items())
