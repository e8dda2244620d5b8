"""Spoken captions: synthetic speech of English captions, with their translations by people.

The captions are those of Multi30k (Elliott et al., 2016 and 2017; Barrault et al., 2018), as
Parquet files with the columns en, de, fr and cs. The program espeak-ng speaks the English ones,
which is a package of that name in Debian and is needed for this benchmark alone. A voice of
training speaks in no other split, and no two splits have a speed in common.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.speech_data import SpeechData
from compacter_jax.files import replace_file
from compacter_jax.messages import quote
from train.speech.audio import read_audio, resampled, write_wave
from train.tasks.parallel import read_table

RATE = 16_000
PROGRAM = "espeak-ng"
# The British accent has the name `en`: `en-gb` with a variant is a voice in some versions only.
ACCENTS = ("en", "en-gb-scotland", "en-us")


class Part(NamedTuple):
    """Source and speakers of the captions of a split.

    Attributes:
      table: the name of the file, without its suffix.
      variants: the variants of each accent that speak.
      speeds: words a minute.
    """

    table: str
    variants: tuple[str, ...]
    speeds: tuple[int, ...]

    @property
    def voices(self) -> list[str]:
        """The names of the voices, accents with their variants."""
        return [f"{accent}+{variant}" for accent in ACCENTS for variant in self.variants]


SPLITS: Mapping[str, Part] = {
    "train": Part("train", ("m1", "m2", "m3", "m4", "f1", "f2"), (130, 150, 170, 190)),
    "validation": Part("validation", ("m5", "f3"), (140, 180)),
    "synthetic": Part("test_2016_flickr", ("m6", "m7", "f4"), (145, 165)),
}
"""Later splits come first in who keeps a caption that occurs twice."""


@dataclasses.dataclass(frozen=True)
class Captions(SpeechData):
    """Captions that espeak-ng speaks, to be written in German, French and Czech."""

    title: ClassVar[str] = (
        "Synthetic speech: espeak-ng speaks English captions of Multi30k; people translated them."
    )
    languages: ClassVar[tuple[str, ...]] = ("de", "fr", "cs")
    tests: ClassVar[Mapping[str, str]] = {"synthetic": "synthetic speech, new captions and voices"}
    metrics: ClassVar[Mapping[str, str]] = {"bleu": "BLEU", "chrf": "chrF"}

    def utterances(
        self, split: str, count: int, folder: Path
    ) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        """Yields captions, each by a voice and at a speed of the split; see the base class.

        Sounds that an interrupted call made are used again.
        """
        program, part, names = found_program(), SPLITS[split], list(SPLITS)
        captions = usable(self.source, split, self.languages)
        if count > len(captions):
            raise ValueError(
                f"{_path(self.source, split)} has {len(captions):,} captions to speak, not "
                f"{count:,}; ask for fewer utterances of {split}"
            )
        generator = np.random.default_rng(names.index(split))
        chosen = generator.permutation(len(captions))[:count]
        # Drawn for all captions, so that one has the same voice whatever the count is.
        voices = generator.choice(part.voices, len(captions))
        speeds = generator.choice(part.speeds, len(captions))
        for i in tqdm(chosen, f"{PROGRAM}, {split}", disable=None):
            caption, voice, speed = captions[i]["en"], str(voices[i]), int(speeds[i])
            key = hashlib.sha256(f"{voice}\n{speed}\n{caption}".encode()).hexdigest()[:20]
            name = f"{split}/{key}.wav"
            if not (folder / name).exists():
                speak(program, caption, voice, speed, folder / name)
            row = {"audio": name, "source": words(caption), "speaker": voice, "speed": speed}
            yield row, {language: captions[i][language] for language in self.languages}


def found_program() -> str:
    """Returns the path of espeak-ng; raises FileNotFoundError if it is not installed."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise FileNotFoundError(
            f"the program {PROGRAM} is not installed; it speaks the captions: install the system "
            f"package {PROGRAM} (Debian: apt install {PROGRAM})"
        )
    return found


def words(caption: str) -> str:
    """Returns what is heard of a caption: its words, in lower case and without punctuation.

    Example:
      >>> words("A man's T-shirt, in red.")
      "a man's t shirt in red"
    """
    return " ".join(re.findall(r"\w+(?:'\w+)*", caption.lower()))


def usable(source: Path, split: str, languages: Sequence[str]) -> list[dict[str, str]]:
    """Returns the captions of a split, `en` and its translations; prints how many are left out.

    Left out are captions without a word to speak or without a translation, and those that a later
    split has too.

    Args:
      source: the folder of the tables.
      split: a name in `SPLITS`.
      languages: the languages of the translations.

    Raises:
      OSError, ValueError: if a table cannot be read, or has not the columns.
    """
    later = list(SPLITS)[list(SPLITS).index(split) + 1 :]
    kept_there = {words(row["en"]) for name in later for row in _rows(source, name, ["en"])}
    rows = _rows(source, split, ["en", *languages])
    spoken = [row for row in rows if words(row["en"]) and all(map(str.strip, row.values()))]
    found = [row for row in spoken if words(row["en"]) not in kept_there]
    print(
        f"{_path(source, split)}: {len(found):,} captions; left out {len(rows) - len(spoken):,} "
        f"without words or translations, {len(spoken) - len(found):,} of validation or test"
    )
    return found


def _path(source: Path, split: str) -> Path:
    return source / f"{SPLITS[split].table}.parquet"


def _rows(source: Path, split: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Returns the rows of a table; a missing text is empty."""
    path = _path(source, split)
    table = read_table(path)
    for name in columns:
        if name not in table:
            raise ValueError(f"{path} has no column {name}; captions need {', '.join(columns)}")
    values = zip(*(table[name] for name in columns), strict=True)
    return [{name: text or "" for name, text in zip(columns, row, strict=True)} for row in values]


def speak(program: str, caption: str, voice: str, speed: int, path: Path) -> None:
    """Writes a caption as a .wav of 16 kHz, under its name only when it is whole.

    Args:
      program: the path of espeak-ng.
      caption: what to say.
      voice: the name of the voice.
      speed: words a minute.
      path: the file to write.

    Raises:
      ValueError: if espeak-ng fails, or says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "spoken.wav"
        command = [program, "-v", voice, "-s", str(speed), "-w", str(spoken), "--", caption]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not spoken.exists():
            reason = done.stderr.strip() or f"exit code {done.returncode}"
            raise ValueError(
                f"{PROGRAM} could not speak {quote(caption, 80)} with -v {voice} -s {speed}: "
                f"{reason}"
            )
        samples = resampled(read_audio(spoken), RATE)
    if not samples.any():
        raise ValueError(f"{PROGRAM} spoke {quote(caption, 80)} as silence, with -v {voice}")
    with replace_file(path) as temporary:
        write_wave(temporary, samples, RATE)
