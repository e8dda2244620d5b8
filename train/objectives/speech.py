"""Objective of speech: recordings into text of many languages, each with or without its adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from train.compute import step
from train.data import languages
from train.data import tokens as data_tokens
from train.data.routes import Routes
from train.objectives.to_languages import ToLanguages
from train.speech.audio import Recording, from_pcm16, read_audio
from train.speech.features import Extractor, Frames
from train.speech.spec_augment import SpecAugment
from train.speech.word_errors import word_error_rate
from train.tasks import metrics, text_format
from train.tasks import speech as of_speech

# Frames of features in a second.
_FRAMES = 100
# Number of recordings from which on a bar shows the progress.
_MANY = 200
# Folded into the key of dropout, which then stays what it is without masks.
_OF_MASKS = 0x73706563


@dataclasses.dataclass(frozen=True)
class Speech(ToLanguages):
    """Recordings to write in the language of each row.

    The token of the language is the first of the target, which the decoder is given.

    Attributes:
      max_seconds: the longest recording that is read.
      sampling_rate: samples a second of recordings that are bytes; None if there are none.
      extractor: the extractor of features; None only until `with_audio` is called.
      spec_augment: masks of the features in training; None for none.
      folder: folder that names of files are relative to; None if they are whole.
      column: column of the recordings in a file of inputs.
    """

    max_seconds: float = 30.0
    sampling_rate: int | None = None
    extractor: Extractor | None = None
    spec_augment: SpecAugment | None = None
    folder: Path | None = None
    column: str = of_speech.AUDIO

    @property
    def columns(self) -> Mapping[str, type]:
        """Columns of a file of recordings."""
        kind: type = bytes if self.column == of_speech.SAMPLES else str
        return {self.column: kind, of_speech.LANGUAGE: str}

    @property
    def apply(self) -> step.ApplyFunction:
        """Function of the parameters that a step differentiates; features are masked with a key."""
        plain, augment = super().apply, self.spec_augment
        if augment is None:
            return plain

        def apply(params: step.Params, batch: step.Batch, dropout_key: Array | None) -> Array:
            if dropout_key is not None:
                key = jax.random.fold_in(dropout_key, _OF_MASKS)
                features = augment(batch["input_features"], batch["attention_mask"], key)
                batch = {**batch, "input_features": features}
            return plain(params, batch, dropout_key)

        return apply

    def encode(self, rows: Any) -> data_tokens.Encoded:
        """Computes the features of recordings, and tokenises targets behind their language.

        Raises:
          FileNotFoundError, ValueError: for a language without an adapter or a token, or a
            recording that cannot be read; the message names the row or the file.
        """
        to_each = list(rows[of_speech.LANGUAGE][:])
        directions = self.places(to_each)
        ids = languages.language_tokens(dict.fromkeys(to_each), self.tokenizer).ids
        first = np.array([ids[language] for language in to_each], np.int32)
        targets = data_tokens.targets_of(rows)
        texts = None if targets is None else self.target_texts(targets, first)
        frames = self._frames(rows)
        none = data_tokens.Texts(
            np.zeros(0, np.int32), frames.offsets, math.ceil(_FRAMES * self.max_seconds)
        )
        return dataclasses.replace(
            self.encoded(none, texts, targets),
            frames=frames,
            routes=Routes(directions, self.members_of(directions), first),
            rows=(to_each, to_each),
        )

    def _frames(self, rows: Any) -> Frames:
        """Computes the features of rows; those of a recording in several rows once."""
        assert self.extractor is not None
        names = data_tokens.columns_of(rows)
        column = of_speech.SAMPLES if of_speech.SAMPLES in names else of_speech.AUDIO
        place: dict[Any, int] = {}
        found: list[np.ndarray] = []
        which, too_long, several = [], [], 0
        values = rows[column][:]
        places = rows[of_speech.WHERE][:] if of_speech.WHERE in names else None
        for i, value in enumerate(tqdm(values, "features", disable=len(values) < _MANY)):
            key = hashlib.sha256(value).digest() if isinstance(value, bytes) else value
            if key not in place:
                at = f"row {i + 1}: {of_speech.SAMPLES}" if places is None else places[i]
                recording, where = self._read(value, at)
                place[key] = len(found)
                if recording.seconds > self.max_seconds:
                    too_long.append(f"{where} with {recording.seconds:.1f} s")
                    found.append(np.zeros((0, 0), np.float32))
                else:
                    found.append(self.extractor.features(recording, where))
                several += recording.channels > 1
            which.append(place[key])
        if too_long:
            raise ValueError(
                f"{len(too_long)} of {len(found)} recordings are longer than --max-seconds "
                f"{self.max_seconds:g}, the first {too_long[0]}; cut or leave them out, or give a "
                "larger --max-seconds"
            )
        return Frames.of(found, which, several)

    def _read(self, value: Any, where: str) -> tuple[Recording, str]:
        """Returns a recording, and its name for errors, which is `where` if it has no file."""
        if isinstance(value, bytes):
            if self.sampling_rate is None:
                raise ValueError(
                    f"{where} has bytes, which do not say their rate; give --sampling-rate"
                )
            return from_pcm16(value, self.sampling_rate, where), where
        path = Path(value) if self.folder is None else self.folder / value
        return read_audio(path), str(path)

    def names_of(self, columns: Mapping[str, Sequence[str]]) -> list[str]:
        """Returns the language to write of each row."""
        return list(columns[of_speech.LANGUAGE])

    def of_file(self, path: Path, folder: Path) -> ToLanguages:
        """Returns the objective for a file of inputs, after a look at all its rows.

        Args:
          path: the file.
          folder: folder that names of recordings are relative to.

        Raises:
          ValueError: for a language without an adapter, or a file that cannot be read; the message
            names the file and the row.
        """
        own = dataclasses.replace(self, folder=folder, column=of_speech.column_of(path))
        return ToLanguages.of_file(own, path, folder)

    def compared(
        self, said: Sequence[str], wanted: Sequence[str], language: str
    ) -> dict[str, float]:
        """Returns BLEU, chrF, the fraction of exact matches and the word error rate."""
        return {
            **super().compared(said, wanted, language),
            **metrics.text_metrics(said, wanted),
            "word_error_rate": word_error_rate(said, text_format.as_said(said, wanted)),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a saved adapter has."""
        names = ("max_seconds", "sampling_rate")
        own = {name: getattr(self, name) for name in names}
        return {of_speech.KIND: {**self.own_settings(), **own}}

    def save_processors(self, folder: Path) -> None:
        """Writes the tokenizer, and the settings of the features."""
        super().save_processors(folder)
        if self.extractor is not None:
            self.extractor.save(folder)
