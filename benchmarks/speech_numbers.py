"""Spoken numbers: recordings of digits, joined to numbers, with their names in eight languages.

The recordings are those of the Free Spoken Digit Dataset (Jackson et al., 2018, CC BY-SA 4.0,
doi:10.5281/zenodo.1342401), as tables with the columns digit, speaker, take and pcm16. The names of
numbers are by num2words (PyPI), which is needed for this benchmark alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq

from benchmarks.speech_data import SpeechData
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


def spell(number: int, language: str) -> str:
    """Returns the name of a number by num2words; raises ImportError without this package."""
    from num2words import num2words  # noqa: PLC0415 - an optional package

    return str(num2words(number, lang=language))


@dataclasses.dataclass(frozen=True)
class Digits(SpeechData):
    """Numbers of one to four digits, to be written in the eight languages of MuST-C.

    Attributes:
      spell: `(number, language) -> its name`.
    """

    spell: Spell = spell
    title: ClassVar[str] = "Recordings of English digits, joined to numbers; names by num2words."
    languages: ClassVar[tuple[str, ...]] = LANGUAGES
    tests: ClassVar[Mapping[str, str]] = {
        "known": "new numbers, speakers of training",
        "new": "new numbers, a new speaker",
    }
    metrics: ClassVar[Mapping[str, str]] = {"exact_match": "exact matches in %", "chrf": "chrF"}

    def utterances(
        self, split: str, count: int, folder: Path
    ) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        """Yields numbers that a speaker says digit by digit; see the base class."""
        table, part, takes = SPLITS[split]
        recordings = recordings_of(self.source / f"{table}.parquet", takes)
        found = utterances(recordings, part, count, list(SPLITS).index(split))
        for i, (speaker, number, samples) in enumerate(found):
            name = f"{split}/{i}.wav"
            write_wave(folder / name, samples, RATE)
            source = " ".join(ENGLISH[int(digit)] for digit in str(number))
            row = {"audio": name, "source": source, "speaker": speaker, "number": number}
            yield row, {language: self.spell(number, language) for language in LANGUAGES}


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


def as_table(samples: Mapping[tuple[int, str, int], np.ndarray]) -> list[dict[str, Any]]:
    """Returns rows of a table of recordings, for tests.

    Args:
      samples: (digit, speaker, take) -> `[samples]` floats.
    """
    return [
        {"digit": digit, "speaker": speaker, "take": take, "pcm16": as_pcm16(sound)}
        for (digit, speaker, take), sound in samples.items()
    ]
