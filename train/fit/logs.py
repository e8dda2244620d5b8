"""What a run records while it goes: every step and every evaluation, as CSV and for TensorBoard."""

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
    """The record of a run, written by its first process alone; a context manager.

    `log.csv` has a row for each step, `evaluations.csv` one for each metric of each evaluation, and
    the folder `tensorboard`, if wanted, has both. A run that resumes at a checkpoint takes back
    what was recorded after it, so that every step is there once: `flush` before a checkpoint is
    written.

    Args:
      folder: of the run; exists.
      tensorboard: whether to write for TensorBoard, too.
      resume_step: step of the checkpoint that the run goes on from, 0 for a new run.
      evaluated: whether evaluations at that step were over when it was written.
      evaluations: how many there had been by then.

    Raises:
      ValueError: if what was recorded before the checkpoint is not there, or damaged.
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
                # Files are named by the second, and one of the same name would be replaced.
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
        """Records a step, the first is 1; None is what is not known of it."""
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
        """Whatever was recorded is on disk, should the process, or the machine, stop now."""
        for table in self._tables.values():
            table.file.flush()
            os.fsync(table.file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Ends the record; what is written afterwards is an error."""
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
    """A CSV file that goes on behind `rows`, the first of which names the columns."""

    def __init__(self, path: Path, rows: Sequence[Sequence[str]]):
        with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.file = path.open("a", encoding="utf-8")
        self.rows = csv.writer(self.file, lineterminator="\n")


def _steps_until(path: Path, last: int) -> list[list[str]]:
    """The rows of the steps up to `last`, each of which must be there."""
    rows = _rows_until(path, _STEP_COLUMNS, last)
    steps = [int(row[0]) for row in rows]
    if steps != list(range(1, last + 1)):
        missing = next(step for step in range(1, last + 2) if step not in steps[step - 1 : step])
        raise ValueError(
            f"{path} has not the steps 1 to {last}, each once, that the run had recorded: step "
            f"{missing} is not where it should be; put the file back, or start anew with "
            "--overwrite"
        )
    return rows


def _evaluations_until(path: Path, last: int, number: int) -> list[list[str]]:
    """The rows of the evaluations up to step `last`, of which there must be `number`."""
    rows = _rows_until(path, _EVALUATION_COLUMNS, last)
    if (found := len({int(row[0]) for row in rows})) < number:
        raise ValueError(
            f"{path} has {found} evaluations up to step {last}, and the run had recorded {number}; "
            "put the file back, or start anew with --overwrite"
        )
    return rows


def _rows_until(path: Path, columns: Sequence[str], last: int) -> list[list[str]]:
    """Rows of a file, if there is one, up to a step; what a kill left after that is no matter."""
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
      ValueError: if a row is not one of numbers; names the file.
    """
    path = folder / STEPS_NAME
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [_numbers(row) for row in itertools.islice(csv.reader(file), 1, None)]
        values = np.array(rows, np.float64).reshape(-1, len(_STEP_COLUMNS))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {shorten(str(error), 200)}") from None
    return dict(zip(_STEP_COLUMNS, values.T, strict=True))
