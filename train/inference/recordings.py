"""Folders of recordings as inputs of `predict`."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compacter_jax.messages import listing
from train.data import rows as data_rows
from train.tasks import speech

if TYPE_CHECKING:
    from train.inference.adapter import LoadedAdapter
    from train.inference.options import PredictOptions

SUFFIXES = (".wav", ".flac")


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def check(options: PredictOptions) -> None:
    """Checks a folder of inputs, and the name of the output, before anything slow happens.

    Raises:
      ValueError: if there are no recordings, or the output cannot be written.
    """
    if not _files_in(options.input):
        raise ValueError(
            f"{options.input} is a folder without {' or '.join(SUFFIXES)} files; give a file of "
            "rows, or a folder of recordings"
        )
    data_rows.check_suffix(options.output)
    if options.output.is_dir() or not options.output.parent.is_dir():
        raise ValueError(f"{options.output} is a directory, or is in none that exists")


def _languages(given: str | None, settings: Mapping[str, Any]) -> list[str]:
    """Returns the languages to write recordings in.

    Raises:
      ValueError: if a language is empty, named twice, or has no adapter.
    """
    known: list[str] = settings["directions"]
    if given is None:
        return known
    names = [name.strip() for name in given.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"--target-languages {given!r:.100} must be different languages with commas between "
            "them"
        )
    if not settings["is_open"] and (lacking := [name for name in names if name not in known]):
        raise ValueError(
            f"--target-languages: there is no adapter for {lacking[0]!r:.100}; there are those of "
            f"{listing(known)}"
        )
    return names


@contextlib.contextmanager
def as_file(options: PredictOptions, adapter: LoadedAdapter) -> Iterator[tuple[Path, Path]]:
    """Lists the recordings of a folder, each once for every language to write it in.

    Yields:
      A file of rows, and the folder that names of recordings in it are relative to; for an input
      that is a file, this file and its folder.

    Raises:
      ValueError: if the input is a folder and the adapter does not read speech; or for languages
        and an input that is a file.
    """
    if not options.input.is_dir():
        if options.target_languages is not None:
            raise ValueError(
                "--target-languages is for a folder of recordings; rows of a file have the column "
                f"{speech.LANGUAGE}"
            )
        yield options.input, options.input.parent
        return
    kind = adapter.settings["kind"]
    if kind != speech.KIND:
        raise ValueError(
            f"{options.input} is a folder, but the adapter in {options.adapter} is for tasks of "
            f"kind {kind}; give a file of rows"
        )
    languages = _languages(options.target_languages, adapter.settings[kind])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recordings.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for recording in _files_in(options.input):
                for language in languages:
                    row = {speech.AUDIO: recording.name, speech.LANGUAGE: language}
                    file.write(json.dumps(row) + "\n")
        yield path, options.input
