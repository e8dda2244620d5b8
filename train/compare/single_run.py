"""One run of a comparison: its folder, its flags, and what it has left there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compacter_jax.files import parse_json, read_json
from train.compare.bootstrap import Scored
from train.data.files import read_chunks
from train.data.words import of_rows
from train.fit.run_folder import clear
from train.fit.run_record import (
    FLAGS_NAME,
    OUTPUT_NAME,
    PREDICTIONS_NAME,
    RUN_NAME,
    possibly_written,
)

# Fields of metrics.json that are compared.
_OF_RESULT = {
    **{"metric": str, "learning_rate": float, "train_examples": int, "steps": int},
    **dict.fromkeys(("trained_parameters", "total_parameters", "adapter_bytes"), int),
    **{
        "best_epoch": int,
        "validation": dict[str, float],
        "test": dict[str, float],
        "measured": dict[str, Any],
    },
}
_OPTIONAL = {"label_names": list[str]}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of `fit`.

    Attributes:
      task: the task to learn.
      size: the number of training examples; None is all.
      method: the preset or variant.
      seed: the seed of the run.
      folder: its `--output-dir`.
      flags: its other flags.
      rate: learning rate of a grid; None for the method's own.
    """

    task: str
    size: int | None
    method: str
    seed: int
    folder: Path
    flags: tuple[str, ...]
    rate: float | None = None

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        size = "" if self.size is None else f", {self.size:,} examples"
        rate = "" if self.rate is None else f", learning rate {self.rate:g}"
        return f"{self.task}{size}, {self.method}{rate}, seed {self.seed}"

    @property
    def point(self) -> tuple[Any, ...]:
        """Everything but the seed."""
        return self.task, self.size, self.method, self.rate

    def finished(self) -> bool:
        """Returns True if the result exists, with any flags."""
        return (self.folder / "metrics.json").exists()

    def same_flags(self) -> bool:
        """Returns True if the run was last started with these flags."""
        path = self.folder / FLAGS_NAME
        with self._again():
            return path.exists() and parse_json(path.read_bytes(), str(path)) == list(self.flags)

    def clear(self) -> None:
        """Removes the outputs of an earlier start of the run, and nothing else."""
        settings = {"task": self.task, "method": self.method}
        clear(self.folder, possibly_written(settings))
        for name in (RUN_NAME, FLAGS_NAME, OUTPUT_NAME):
            (self.folder / name).unlink(missing_ok=True)

    def record(self) -> dict[str, Any]:
        """Returns the fields of `metrics.json` that are compared; raises ValueError as `result`."""
        result = self.result()
        kept = ["metric", "learning_rate", "train_examples", "steps", "best_epoch"]
        kept += ["trained_parameters", "total_parameters", "adapter_bytes"]
        return {
            "task": self.task,
            "train_size": self.size,
            "method": self.method,
            "seed": self.seed,
            **{name: result[name] for name in kept},
            "validation": result["validation"],
            "test": result["test"],
            **_shares(result["measured"]),
        }

    def result(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`.

        Raises:
          ValueError: if the file is damaged; the message tells how to train the run again.
        """
        path = self.folder / "metrics.json"
        with self._again():
            found = read_json(
                path, _OF_RESULT | _OPTIONAL, required=_OF_RESULT, what="the result of a run"
            )
            measured = ("step_seconds", "seconds", "peak_memory_bytes")
            scores = (str(found["metric"]),)
            parts = {"measured": measured, "validation": scores, "test": scores}
            for part, names in parts.items():
                if missing := [name for name in names if name not in found[part]]:
                    raise ValueError(f"{path}: {part} has no {missing[0]}")
        return found

    def predictions(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the predictions on the test split and the targets, None if there are none.

        Raises:
          ValueError: if the file is damaged; the message tells how to train the run again.
        """
        path, names = self.folder / PREDICTIONS_NAME, ("prediction", "target")
        if not path.exists():
            return None
        with self._again():
            rows = [row for chunk in read_chunks(path, 4096) for row in chunk]
            of_words = bool(rows) and isinstance(rows[0].get(names[0]), list)
            for number, row in enumerate(rows, 1):
                if any(not _is_valid(row.get(name, {}), of_words=of_words) for name in names):
                    raise ValueError(f"{path}, row {number}: no prediction or no target")
        made = of_rows if of_words else np.array
        predictions, targets = (made([row[name] for row in rows]) for name in names)
        return predictions, targets

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Adds to a ValueError of the block how to train the run again."""
        try:
            yield
        except ValueError as error:
            raise ValueError(
                f"{error}; remove {self.folder} and give the same command to train the run again"
            ) from None


def _is_valid(value: Any, *, of_words: bool) -> bool:
    """Returns True for a recorded label, score or text, or with `of_words` for a list of tags."""
    if of_words:
        return isinstance(value, list) and all(isinstance(tag, str) for tag in value)
    return not isinstance(value, dict | list)


def scored(runs: Sequence[Run], metric: str) -> Scored:
    """Returns the finished runs of a point, with those predictions that have the same targets."""
    finished = {run.seed: run for run in runs if run.finished()}
    found = {seed: run.predictions() for seed, run in finished.items()}
    known = {seed: pair for seed, pair in found.items() if pair is not None}
    first: Any = next((targets for _, targets in known.values()), None)
    return Scored(
        scores={seed: run.record()["test"][metric] for seed, run in finished.items()},
        predictions={
            seed: predictions
            for seed, (predictions, targets) in known.items()
            if np.array_equal(targets, first)
        },
        targets=first,
    )


def _shares(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the measurements of a process with its times divided by its number of runs."""
    runs = measured.get("runs_at_once", 1)
    times = {name: measured[name] for name in ("step_seconds", "seconds")}
    return measured | {name: value and value / runs for name, value in times.items()}
