"""A benchmark: its columns, metrics and how its rows become text."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from train.data.tokens import columns_of

if TYPE_CHECKING:
    from datasets import Dataset


# "choice" is of one of a row's own candidates, "span" of a part of the context.
Kind: TypeAlias = Literal[
    "classification", "regression", "choice", "span", "text", "span_corruption"
]


Rows: TypeAlias = "Dataset | Mapping[str, Sequence[Any]]"


Columns: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Sentences, or pairs of them, with a label or a score; what is otherwise is in subclasses.

    Attributes:
      name: of the task.
      repository: hub id of the data set.
      configuration: the part of it; the name of its folder.
      columns: column -> type of its values, of what inputs are made of. The first two are an
        encoder's first and second sentence.
      kind: what is predicted.
      metrics: those whose mean chooses the best epoch.
      validation: names of the hub's validation splits; the first chooses the best epoch.
    """

    name: str
    repository: str
    configuration: str
    columns: Mapping[str, type]
    kind: Kind = "classification"
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def wanted(self) -> str:
        """The column of what is to be predicted."""
        return "label"

    @property
    def metric(self) -> str:
        """The metric, larger is better, that chooses the best epoch."""
        return "_and_".join(self.metrics)

    @property
    def prefix(self) -> str:
        """What the input of an encoder-decoder begins with."""
        return self.name

    def named(self, rows: Rows) -> Rows:
        """`rows`, or, where they have `sentence` and maybe `sentence2`, these under their names.

        Raises:
          ValueError: if there are neither all of these columns nor all of the hub's.
        """
        found = columns_of(rows)
        missing = [name for name in self.columns if name not in found]
        if not missing:
            return rows
        generic = ("sentence", "sentence2")[: len(self.columns)]
        if len(self.columns) > 2 or not set(generic) <= set(found):
            raise ValueError(
                f"rows of {self.name} need {', '.join(self.columns)}, and have no {missing[0]!r}; "
                f"their columns are {', '.join(found)}"
            )
        renamed = dict(zip(generic, self.columns, strict=True))
        return {renamed.get(name, name): rows[name] for name in found}

    def for_encoder(self, rows: Rows) -> Columns:
        """`sentence`, maybe `sentence2`, and, where there are any, `label` or `score`."""
        inputs = zip(("sentence", "sentence2"), self.columns, strict=False)
        return {column: rows[name][:] for column, name in inputs} | self.targets(rows)

    def for_decoder(self, rows: Rows) -> Columns:
        """`text` without the prefix, and, where there are any, `label`, `score` or `target`."""
        names = sorted(self.columns)
        parts = zip(*(rows[name][:] for name in names), strict=True)
        texts = [keyed(dict(zip(names, values, strict=True))) for values in parts]
        return {"text": texts, **self.targets(rows)}

    def targets(self, rows: Rows) -> Columns:
        """The column `label` or `score`, if there is one."""
        column = "score" if self.kind == "regression" else "label"
        return {column: rows[column][:]} if column in columns_of(rows) else {}

    def questions(self, rows: Rows) -> list[Hashable] | None:
        """To which question each row belongs; None where every row is one."""
        return None

    def usable(self, rows: Rows) -> list[bool] | None:
        """Whether a row can be learned from; None where all can."""
        return None

    def check(self, rows: Rows) -> None:
        """Checks what the types of columns do not say of rows to learn from or to score by.

        Raises:
          ValueError: names the row, counted from 1.
        """
        return

    def unanswered(self, rows: Rows) -> int:
        """Returns how many rows have no answer, where that is one."""
        return 0

    def user_messages(self) -> list[str]:
        """Returns what the user should know of the metrics, a line each."""
        return []

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """Metrics beside those of the kind; predictions are labels or texts, one for each row."""
        return {}

    def with_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """`values` and, where several metrics choose the best epoch, their mean."""
        chosen = [values[name] for name in self.metrics]
        return {self.metric: sum(chosen) / len(chosen), **values}


class Choice(Benchmark, abc.ABC):
    """One of several candidates; an encoder judges each by itself, and the likeliest is taken."""

    @abc.abstractmethod
    def candidates(self, rows: Rows) -> list[list[str]]:
        """What may be chosen, for each row."""

    @abc.abstractmethod
    def pairs(self, rows: Rows) -> list[list[tuple[str, str]]]:
        """Sentence and second sentence of each candidate, for each row."""

    @abc.abstractmethod
    def right(self, rows: Rows) -> list[list[bool]] | None:
        """Whether each candidate is right, for each row; None where that is unknown."""

    def for_encoder(self, rows: Rows) -> Columns:
        """A pair for each candidate with label 1 where it is right; `row` is whose it is."""
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
    """`{"premise": "a", "hypothesis": "b"}` -> `premise: a hypothesis: b`."""
    return " ".join(f"{name}: {text}" for name, text in parts.items())
