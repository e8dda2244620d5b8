"""Spoken numbers: recordings of digits, joined to numbers, with their names in eight languages.

The recordings are those of the Free Spoken Digit Dataset (Jackson et al., 2018, CC BY-SA 4.0,
doi:10.5281/zenodo.1342401), as tables with the columns digit, speaker, take and pcm16. The names of
numbers are by num2words (PyPI), which is needed for this benchmark alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from train.speech.audio import as_pcm16, write_wave

RATE = 8_000
# The target languages of MuST-C.
LANGUAGES = ("de", "es", "fr", "it", "nl", "pt", "ro", "ru")
ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_DIGITS = 4
# Seconds of silence between two digits.
_PAUSE = (0.05, 0.15)
# Parts of the numbers, by their hash: a tenth each for validation and test.
_PARTS = {0: "test", 1: "validation"}
# Split -> the table of recordings, the part of the numbers, and the parts of the table's takes.
SPLITS: Mapping[str, tuple[str, str, tuple[int, ...] | None]] = {
    "train": ("train", "train", None),
    "validation": ("validation", "validation", (0, 1)),
    "known": ("validation", "test", (2, 3, 4)),
    "new": ("test", "test", None),
}
"""The split `known` is of the speakers of training, `new` of another; both of other numbers."""

Spell = Callable[[int, str], str]


def part_of(number: int) -> str:
    """Returns the part of a number, "train", "validation" or "test", by its hash.

    Example:
      >>> sorted({part_of(number) for number in range(100)})
      ['test', 'train', 'validation']
    """
    digest = hashlib.sha256(str(number).encode()).digest()
    return _PARTS.get(int.from_bytes(digest[:4], "big") % 10, "train")


def numbers_of(part: str) -> list[list[int]]:
    """Returns the numbers of a part, a list for each count of digits from 1 to 4."""
    found: list[list[int]] = [[] for _ in range(MOST_DIGITS)]
    for number in range(10**MOST_DIGITS):
        if part_of(number) == part:
            found[len(str(number)) - 1].append(number)
    return [numbers for numbers in found if numbers]


def spell(number: int, language: str) -> str:
    """Returns the name of a number by num2words; raises ImportError without this package."""
    from num2words import num2words  # noqa: PLC0415 - an optional package

    return str(num2words(number, lang=language))


def recordings_of(path: Path, takes: tuple[int, ...] | None) -> dict[str, dict[int, list[Any]]]:
    """Returns speaker -> digit -> samples of its recordings, `[samples]` int16.

    Args:
      path: a table of the data set.
      takes: the takes to use; None for all.
    """
    found: dict[str, dict[int, list[Any]]] = {}
    for row in pq.read_table(path).to_pylist():
        if takes is None or row["take"] in takes:
            of_speaker = found.setdefault(row["speaker"], {})
            of_speaker.setdefault(row["digit"], []).append(np.frombuffer(row["pcm16"], "<i2"))
    return found


def utterances(
    recordings: Mapping[str, Mapping[int, list[Any]]], part: str, count: int, seed: int
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields speakers, numbers and their sounds, `[samples]` float32.

    The count of digits is drawn first, so that short numbers are as frequent as long ones; then the
    number, the speaker, a recording of each digit, and the pauses.

    Args:
      recordings: result of `recordings_of`.
      part: part of the numbers.
      count: number of utterances.
      seed: the seed of the draw.
    """
    generator = np.random.default_rng(seed)
    numbers, speakers = numbers_of(part), sorted(recordings)
    for _ in range(count):
        of_length = numbers[generator.integers(len(numbers))]
        number = of_length[generator.integers(len(of_length))]
        speaker = speakers[generator.integers(len(speakers))]
        pieces: list[np.ndarray] = []
        for digit in str(number):
            if pieces:
                pieces.append(np.zeros(round(generator.uniform(*_PAUSE) * RATE), np.int16))
            takes = recordings[speaker][int(digit)]
            pieces.append(takes[generator.integers(len(takes))])
        yield speaker, number, (np.concatenate(pieces) / 2.0**15).astype(np.float32)


def write_splits(
    data: Path, folder: Path, counts: Mapping[str, int], spell: Spell = spell
) -> dict[str, Path]:
    """Writes recordings and a file with a row for each utterance in each language.

    Args:
      data: folder of the tables.
      folder: the folder to write; what it has is used again.
      counts: split -> number of utterances.
      spell: `(number, language) -> its name`.

    Returns:
      Split -> its file.
    """
    paths = {}
    for seed, (split, (table, part, takes)) in enumerate(SPLITS.items()):
        paths[split] = path = folder / f"{split}.jsonl"
        if path.exists():
            continue
        recordings = recordings_of(data / f"{table}.parquet", takes)
        sounds = folder / split
        sounds.mkdir(parents=True, exist_ok=True)
        rows = []
        found = utterances(recordings, part, counts[split], seed)
        for i, (speaker, number, samples) in enumerate(found):
            write_wave(sounds / f"{i}.wav", samples, RATE)
            row = {
                "audio": f"{split}/{i}.wav",
                "source": " ".join(ENGLISH[int(digit)] for digit in str(number)),
                "speaker": speaker,
                "number": number,
            }
            rows += [
                {**row, "target": spell(number, language), "target_language": language}
                for language in LANGUAGES
            ]
        # Written last, under its name at once: a folder without it is not finished.
        temporary = path.with_suffix(".tmp")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(path)
    return paths


def as_table(samples: Mapping[tuple[int, str, int], np.ndarray]) -> list[dict[str, Any]]:
    """Returns rows of a table of recordings, for tests.

    Args:
      samples: (digit, speaker, take) -> `[samples]` floats.
    """
    return [
        {"digit": digit, "speaker": speaker, "take": take, "pcm16": as_pcm16(sound)}
        for (digit, speaker, take), sound in samples.items()
    ]
