"""Tasks whose directions may each have an adapter: translation of text and of speech."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.cli.speech import SpeechOptions
from train.tasks import parallel, speech

if TYPE_CHECKING:
    from train import tasks
    from train.fit.options import FitOptions
    from train.inference.options import EvaluateOptions

KINDS = (parallel.KIND, speech.KIND)


def resolved(options: FitOptions) -> FitOptions:
    """Returns the options with the names of all directions, if the task has several.

    Raises:
      FileNotFoundError, ValueError: as `parallel.resolved` and `speech.resolved`; or for flags of
        speech and a task without.
    """
    if options.parallel_files is None and speech.is_of_speech(options.train_file):
        return speech.resolved(options)
    for field in dataclasses.fields(SpeechOptions):
        if getattr(options, field.name) != field.default:
            raise ValueError(
                f"--{field.name.replace('_', '-')} is for speech; give a --train-file with the "
                f"columns {speech.AUDIO} (or {speech.SAMPLES}), target and {speech.LANGUAGE}"
            )
    return parallel.resolved(options)


def load_task(options: FitOptions) -> tasks.Task:
    """Reads the splits of a run whose options are `resolved`, and have directions."""
    if options.parallel_files is None and speech.is_of_speech(options.train_file):
        return speech.load_task(options)
    return parallel.load_task(options)


def load_split(options: EvaluateOptions, kind: str, known: Sequence[str]) -> tasks.Task:
    """Reads one split to evaluate an adapter on.

    Args:
      options: the options of `evaluate`.
      kind: the kind of task of the adapter.
      known: the names of its directions.
    """
    load: Any = {parallel.KIND: parallel.load_split, speech.KIND: speech.load_split}[kind]
    found: tasks.Task = load(options, known)
    return found


def names_of(rows: Any) -> list[str]:
    """Returns the name of each row's direction."""
    if "source_language" not in rows.column_names:
        return list(rows[speech.LANGUAGE][:])
    return parallel.names_of(rows)
