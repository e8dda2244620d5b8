"""Logs of a run: every step and every evaluation, as CSV and for TensorBoard."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from compacter_jax.files import replace_file
from compacter_jax.messages import shorten
from train.compute import distributed

STEPS_NAME, EVALUATIONS_NAME, TENSORBOARD_NAME = "log.csv", "evaluations.csv", "tensorboard"
QUANTITIES = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "examples_per_second",
    "model_flops_utilisation",
)
_STEP_COLUMNS = ("step", *QUANTITIES)
_EVALUATION_COLUMNS = ("step", "split", "metric", "value")


class Log:
    """Log of a run, written by its first process only; a context manager.

    `log.csv` has a row for each step and `evaluations.csv` a row for each metric of each
    evaluation. The folder `tensorboard`, if requested, has both. A run that resumes at a checkpoint
    discards later records, so that every step is recorded once. For this, call `flush` before a
    checkpoint is written.

    Args:
      folder: the existing folder of the run.
      tensorboard: whether to write for TensorBoard, too.
      resume_step: the step of the checkpoint to resume from; 0 for a new run.
      evaluated: whether the evaluations at this step were complete when the checkpoint was written.
      evaluations: the number of evaluations before the checkpoint.

    Raises:
      ValueError: if records from before the checkpoint are missing or damaged.
      OSError: if a file cannot be written, here and in every method.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        resume_step: int = 0,
        evaluated: bool = True,
        evaluations: int = 0,
    ):
        self._tables: dict[str, _Table] = {}
        self._writer: Any = None
        if not distributed.is_first():
            return
        steps = _steps_until(folder / STEPS_NAME, resume_step)
        last = resume_step - (not evaluated)
        evaluated_before = _evaluations_until(folder / EVALUATIONS_NAME, last, evaluations)
        for name, rows in (
            (STEPS_NAME, [_STEP_COLUMNS, *steps]),
            (EVALUATIONS_NAME, [_EVALUATION_COLUMNS, *evaluated_before]),
        ):
            self._tables[name] = _Table(folder / name, rows)
        if tensorboard:
            from tensorboardX import SummaryWriter  # noqa: PLC0415 - only where it is wanted

            self._writer = SummaryWriter(
                str(folder / TENSORBOARD_NAME),
                purge_step=resume_step + 1,
                # File names have the second as their time, and a file of the same name is replaced.
                filename_suffix=f".{resume_step}",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(
        self,
        number: int,
        *,
        loss: float,
        learning_rate: float,
        gradient_norm: float,
        examples_per_second: float | None = None,
        model_flops_utilisation: float | None = None,
    ) -> None:
        """Records a step, numbered from 1; values that are not known are None."""
        values = (
            loss,
            learning_rate,
            gradient_norm,
            examples_per_second,
            model_flops_utilisation,
        )
        self._add(STEPS_NAME, number, *values)
        for name, value in zip(QUANTITIES, values, strict=True):
            if value is not None:
                self._show(f"train/{name}", value, number)

    def evaluation(self, number: int, split: str, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a split after step `number`."""
        for name, value in metrics.items():
            self._add(EVALUATIONS_NAME, number, split, name, value)
            self._show(f"{split}/{name}", value, number)

    def flush(self) -> None:
        """Writes all records to disk, so that they survive a stop of the process or the machine."""
        for table in self._tables.values():
            table.file.flush()
            os.fsync(table.file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Closes the log; later writes are an error."""
        for table in self._tables.values():
            table.file.close()
        if self._writer is not None:
            self._writer.close()

    def _add(self, name: str, *row: Any) -> None:
        if self._tables:
            self._tables[name].rows.writerow(row)

    def _show(self, tag: str, value: float, number: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, number)


class _Table:
    """A CSV file that is continued after `rows`, whose first row names the columns."""

    def __init__(self, path: Path, rows: Sequence[Sequence[str]]):
        with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.file = path.open("a", encoding="utf-8")
        self.rows = csv.writer(self.file, lineterminator="\n")


def _steps_until(path: Path, last: int) -> list[list[str]]:
    """Returns the rows of the steps up to `last`, each of which must exist."""
    rows = _rows_until(path, _STEP_COLUMNS, last)
    steps = [int(row[0]) for row in rows]
    if steps != list(range(1, last + 1)):
        missing = next(step for step in range(1, last + 2) if step not in steps[step - 1 : step])
        raise ValueError(
            f"{path} must have each of the recorded steps 1 to {last} once, in order, but step "
            f"{missing} is not in its place; put the file back, or start anew with --overwrite"
        )
    return rows


def _evaluations_until(path: Path, last: int, number: int) -> list[list[str]]:
    """Returns the rows of the evaluations up to step `last`; there must be `number` evaluations."""
    rows = _rows_until(path, _EVALUATION_COLUMNS, last)
    if (found := len({int(row[0]) for row in rows})) < number:
        raise ValueError(
            f"{path} has {found} evaluations up to step {last}, but the run had recorded "
            f"{number}; put the file back, or start anew with --overwrite"
        )
    return rows


def _rows_until(path: Path, columns: Sequence[str], last: int) -> list[list[str]]:
    """Returns the rows of a file, if it exists, up to a step; damage after that is ignored."""
    if last < 1 or not path.exists():
        return []
    kept = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in itertools.islice(csv.reader(file), 1, None):
                if len(row) != len(columns) or int(row[0]) > last:
                    break
                if columns == _STEP_COLUMNS:
                    _numbers(row)
                kept.append(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged after row {len(kept)}: {shorten(str(error), 200)}; put it back, or "
            "start anew with --overwrite"
        ) from None
    return kept


def _numbers(row: Sequence[str]) -> list[float]:
    return [float(text or "nan") for text in row]


def read_steps(folder: Path) -> dict[str, np.ndarray]:
    """Returns the columns of `log.csv`: `step` and `QUANTITIES`, `[steps]` float64, NaN if unknown.

    Raises:
      ValueError: if a row does not consist of numbers; the message names the file.
    """
    path = folder / STEPS_NAME
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [_numbers(row) for row in itertools.islice(csv.reader(file), 1, None)]
        values = np.array(rows, np.float64).reshape(-1, len(_STEP_COLUMNS))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {shorten(str(error), 200)}") from None
    return dict(zip(_STEP_COLUMNS, values.T, strict=True))
