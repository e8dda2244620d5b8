"""What a run records while it goes: every step and every evaluation, as CSV and for TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from compacter_jax.files import replace_file
from train import hosts

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

    Raises:
      OSError: if a file cannot be written, here and in every method.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        resume_step: int = 0,
        evaluated: bool = True,
    ):
        self._tables: dict[str, _Table] = {}
        self._writer: Any = None
        if not hosts.is_first():
            return
        for name, columns, last in (
            (STEPS_NAME, _STEP_COLUMNS, resume_step),
            (EVALUATIONS_NAME, _EVALUATION_COLUMNS, resume_step - (not evaluated)),
        ):
            self._tables[name] = _Table(folder / name, columns, last)
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
        """Whatever was recorded is on disk, should the process be killed now."""
        for table in self._tables.values():
            table.file.flush()
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
    """A CSV file that goes on behind the rows up to a step."""

    def __init__(self, path: Path, columns: Sequence[str], last_step: int):
        rows = [columns, *_rows_until(path, len(columns), last_step)]
        with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.file = path.open("a", encoding="utf-8")
        self.rows = csv.writer(self.file, lineterminator="\n")


def _rows_until(path: Path, width: int, last_step: int) -> list[list[str]]:
    """Rows of a file, if there is one, up to a step; a row that a kill cut off is none."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [row for row in rows if len(row) == width and int(row[0]) <= last_step]


def read_steps(folder: Path) -> dict[str, np.ndarray]:
    """The columns of `log.csv`, `[steps]` float64 each: `step` and `QUANTITIES`, NaN if unknown."""
    with (folder / STEPS_NAME).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in _STEP_COLUMNS}
