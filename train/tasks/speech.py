"""Speech into text: files of recordings with what to write in each language."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import datasets

from compacter_jax.files import is_there
from compacter_jax.messages import listing
from train import tasks
from train.data import rows as data_rows
from train.data.files import read_chunks
from train.tasks.parallel import left_out

if TYPE_CHECKING:
    from train.fit.options import FitOptions
    from train.inference.options import EvaluateOptions

KIND: Final = "speech"
AUDIO, SAMPLES, LANGUAGE = "audio", "pcm16", "target_language"
# Column of the rows that are read: the file and the row of a recording without a name.
WHERE: Final = "where"
ALL = "all"
_LONGEST = 100_000


class Target(NamedTuple):
    """A language to write, which is all that the direction of a task of speech says.

    Attributes:
      target: the language.
    """

    target: str

    @property
    def name(self) -> str:
        """Name of the language."""
        return self.target


def is_of_speech(path: Path | None) -> bool:
    """Returns True if a file has a column of recordings."""
    if path is None or path.suffix.lower() not in data_rows.SUFFIXES or not path.is_file():
        return False
    return not {AUDIO, SAMPLES}.isdisjoint(data_rows.first_columns(path))


def column_of(path: Path) -> str:
    """Returns the column of recordings of a file, names of files or bytes.

    Raises:
      ValueError: if the file has neither of the two columns, or both.
    """
    names = data_rows.first_columns(path)
    found = [name for name in (AUDIO, SAMPLES) if name in names]
    if len(found) != 1:
        what = "both columns" if found else "neither column"
        raise ValueError(
            f"{path} has {what} {AUDIO} (names of files) and {SAMPLES} (bytes); give one; its "
            f"columns are {listing(names)}"
        )
    return found[0]


def recordings_of(path: Path) -> dict[str, Path]:
    """Returns name -> file, for the recordings that a file names and that exist.

    A file that cannot be read names none; whoever reads it as data says why.
    """
    try:
        if not is_of_speech(path) or column_of(path) == SAMPLES:
            return {}
        chunks = (data_rows.column_values(rows, AUDIO) for rows in read_chunks(path, 1024))
        names = dict.fromkeys(name for values in chunks for name in values if isinstance(name, str))
    except (ValueError, OSError):
        return {}
    found = {name: path.parent / name for name in names}
    return {name: file for name, file in found.items() if is_there(file) and file.is_file()}


def resolved(options: FitOptions) -> FitOptions:
    """Returns the options of a task of speech with the names of all languages in `directions`.

    Raises:
      FileNotFoundError, ValueError: if a file cannot be read, flags contradict each other, or a
        language has no training row.
    """
    assert options.train_file is not None
    if options.transcribe is not None:
        there = [options.transcribe]
    else:
        there = sorted({row[LANGUAGE] for row in _rows(options.train_file, None)})
    wanted = there if options.directions in (None, ALL) else _parsed(options.directions or "")
    if lacking := [name for name in wanted if name not in there]:
        raise ValueError(
            f"{options.train_file} has no row of the language {lacking[0]!r:.100}; it has "
            f"{listing(there)}; leave it out of --directions"
        )
    return dataclasses.replace(options, directions=",".join(wanted))


def _parsed(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"--directions {text!r:.100} must be different languages with commas between them; "
            "speech has no source"
        )
    return names


def load_task(options: FitOptions) -> tasks.Task:
    """Reads the splits of a run whose options are `resolved`.

    Raises:
      FileNotFoundError, ValueError: if a file cannot be read, or has no row of the languages; the
        message names the file and the row.
    """
    wanted = [Target(name) for name in (options.directions or "").split(",")]
    files = {split: getattr(options, f"{split}_file") for split in tasks.SPLITS}
    splits = {}
    for split, path in files.items():
        if path is not None:
            _check_rate(path, options.sampling_rate)
            splits[split] = _dataset(path, wanted, options.transcribe)
    return _task(options.task, wanted, splits)


def load_split(options: EvaluateOptions, known: Sequence[str]) -> tasks.Task:
    """Reads one split to evaluate an adapter on.

    Args:
      options: the options of `evaluate`.
      known: the languages of the adapter; by default the split has them all, as far as the file has
        rows of them.

    Raises:
      FileNotFoundError, ValueError: as `load_task`; or if a language that is asked for has no row.
    """
    path = getattr(options, f"{options.split}_file", None)
    if path is None:
        raise ValueError(
            f"the adapter in {options.adapter} reads speech; give --{options.split}-file with the "
            f"columns {AUDIO} or {SAMPLES}, target and {LANGUAGE}"
        )
    there = sorted({row[LANGUAGE] for row in _rows(path, options.transcribe)})
    wanted = [name for name in there if name in known]
    notes: tuple[str, ...] = ()
    if options.directions not in (None, ALL):
        wanted = _parsed(options.directions or "")
    else:
        notes = left_out(path, [name for name in there if name not in known], "languages")
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(f"{path} has no row of {missing[0]}; leave it out of --directions")
    if not wanted:
        raise ValueError(
            f"{path} has no row of the languages of the adapter, {listing(known)}; it has "
            f"{listing(there)}"
        )
    targets = [Target(name) for name in wanted]
    rows = _dataset(path, targets, options.transcribe)
    return _task(options.task, targets, {options.split: rows}, notes)


def _task(
    name: str, targets: Sequence[Target], splits: dict[str, Any], notes: tuple[str, ...] = ()
) -> tasks.Task:
    counted = [Counter(rows[LANGUAGE][:]) for rows in splits.values()]
    lines = [f"{name}: speech into {len(targets)} languages; rows of {', '.join(splits)}:"]
    for target in targets:
        numbers = ", ".join(f"{counts[target.name]:,}" for counts in counted)
        lines.append(f"  {target.name}: {numbers}")
    return tasks.Task(name, KIND, (), splits, notes=(*notes, *lines), directions=tuple(targets))


def _rows(path: Path, transcribe: str | None) -> list[dict[str, Any]]:
    """Reads and checks the columns of a file.

    Args:
      path: the file.
      transcribe: the language that is spoken, to write the column `source`; None for `target`.
    """
    audio, text = column_of(path), "target" if transcribe is None else "source"
    needed = [audio, text] + ([] if transcribe else [LANGUAGE])
    for name in needed:
        data_rows.require_column(path, data_rows.first_columns(path), name)
    found: list[dict[str, Any]] = []
    first = 1
    for rows in read_chunks(path, 1024):
        numbers = range(first, first + len(rows))
        values = {name: data_rows.column_values(rows, name) for name in needed}
        for name, column in values.items():
            if name == SAMPLES:
                _check_bytes(path, column, numbers)
            else:
                data_rows.check_texts(path, name, column, numbers, _LONGEST)
            if name == LANGUAGE:
                data_rows.check_languages(path, name, column, numbers)
        languages = values.get(LANGUAGE) or [transcribe] * len(rows)
        recordings = values[audio]
        if audio == AUDIO:
            recordings = [str(path.parent / name) for name in recordings]
        for row, (recording, target, language) in enumerate(
            zip(recordings, values[text], languages, strict=True), first
        ):
            found.append({audio: recording, "target": target, LANGUAGE: language})
            if audio == SAMPLES:
                found[-1][WHERE] = f"{path}, row {row}: {SAMPLES}"
        first += len(rows)
    return found


def _check_bytes(path: Path, values: Sequence[Any], numbers: Sequence[int]) -> None:
    for row, value in zip(numbers, values, strict=True):
        if value is None:
            raise ValueError(
                f"{path}, row {row}: {SAMPLES} is missing (null); remove or fill the row"
            )
        if not isinstance(value, bytes):
            raise ValueError(
                f"{path}, row {row}: {SAMPLES} is {type(value).__name__}, not bytes of samples; "
                "give a .parquet with a column of type binary"
            )


def _check_rate(path: Path, rate: int | None) -> None:
    if column_of(path) == SAMPLES and rate is None:
        raise ValueError(
            f"{path} has recordings as bytes ({SAMPLES}), which do not say their rate; give "
            "--sampling-rate"
        )


def _dataset(path: Path, targets: Sequence[Target], transcribe: str | None) -> datasets.Dataset:
    """Returns the rows of some languages; those of a transcription without repetitions."""
    audio = column_of(path)
    wanted = {target.name for target in targets}
    rows = [row for row in _rows(path, transcribe) if row[LANGUAGE] in wanted]
    if transcribe is not None:
        rows = list({(row[audio], row["target"]): row for row in rows}.values())
    if not rows:
        raise ValueError(f"{path} has no row of {listing([each.name for each in targets])}")
    kinds = {audio: "binary" if audio == SAMPLES else "string"}
    kinds |= dict.fromkeys(("target", LANGUAGE), "string")
    kinds |= {WHERE: "string"} if audio == SAMPLES else {}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    return datasets.Dataset.from_list(rows, features=features)
