"""Flags of tasks of speech."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.cli.options import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """Recordings of speech.

    Attributes:
      sampling_rate: samples a second of recordings in a column pcm16; files say their own.
      max_seconds: longest recording that is read; by default 30, or that of training.
      feature_cache: folder of the features that were computed before, for this and later commands;
        by default one in the user's cache folder.
    """

    sampling_rate: int | None = None
    max_seconds: float | None = None
    feature_cache: Path | None = None

    def check_audio(self) -> None:
        """Raises ValueError for a number out of range."""
        rate, seconds = self.sampling_rate, self.max_seconds
        wanted = {
            "sampling_rate": (
                rate is None or 1_000 <= rate <= 1_000_000,
                "from 1000 to 1000000 samples a second",
            ),
            "max_seconds": (seconds is None or 0.035 <= seconds <= 3_600, "from 0.035 to 3600"),
        }
        check(self, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechOptions(AudioOptions):
    """Training on speech.

    Attributes:
      transcribe: language that is spoken, to write what is said: the column source instead of
        target, each recording once.
      spec_augment: mask two stretches of time and two bands of frequency of every recording in
        training, new in every step.
      encoder_from: checkpoint of a speech_to_text whose encoder the backbone takes. It is joined
        with decoder_from in the folder that backbone names, unless it is there already.
      decoder_from: checkpoint of an m2m_100 whose decoder and tokenizer the backbone takes.
    """

    transcribe: str | None = None
    spec_augment: bool = True
    encoder_from: str | None = None
    decoder_from: str | None = None
