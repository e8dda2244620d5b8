"""Features of recordings: log-mel energies as the backbone's feature extractor computes them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compacter_jax.files import expanded, is_there, read_json, replace_file
from compacter_jax.messages import quote, reason_of
from train.report import write_json
from train.speech.audio import Recording, resampled

PREPROCESSOR = "preprocessor_config.json"
# Written once into the folder of a cache.
SETTINGS = "features.json"


@dataclasses.dataclass(frozen=True)
class Channels:
    """Counts of recordings, and of those with several channels, of which the first is read.

    Attributes:
      recordings: the number of recordings.
      several: the number of those with several channels.
    """

    recordings: int = 0
    several: int = 0

    def __add__(self, other: Channels) -> Channels:
        return Channels(self.recordings + other.recordings, self.several + other.several)

    def user_messages(self) -> list[str]:
        """Returns a line if there are recordings with several channels."""
        if not self.several:
            return []
        return [
            f"{self.several} of {self.recordings} recordings have several channels; the first is "
            "read"
        ]


@dataclasses.dataclass(frozen=True)
class Frames:
    """Features of the recordings of examples; several examples may be of one recording.

    Attributes:
      values: `[frames, width]` float32 of all recordings, one after the other.
      starts: `[examples]` int64, the first frame of each example.
      lengths: `[examples]` int64, the number of frames of each example.
      channels: counts of the recordings by their channels.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    channels: Channels = Channels()

    @classmethod
    def of(cls, recordings: Sequence[np.ndarray], which: Sequence[int], several: int = 0) -> Frames:
        """Joins the features of recordings.

        Args:
          recordings: `[frames, width]` of each recording.
          which: the recording of each example.
          several: the number of recordings with several channels.
        """
        lengths = np.array([len(each) for each in recordings], np.int64)
        starts = np.cumsum(lengths) - lengths
        chosen = np.asarray(which, np.int64)
        channels = Channels(len(recordings), several)
        return cls(np.concatenate(recordings), starts[chosen], lengths[chosen], channels)

    @property
    def offsets(self) -> np.ndarray:
        """`[examples + 1]` int64: ends of the examples if they lay one after the other."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    def taken(self, positions: np.ndarray) -> Frames:
        """Returns the examples at `positions`."""
        return dataclasses.replace(
            self, starts=self.starts[positions], lengths=self.lengths[positions]
        )

    def padded(self, positions: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Returns examples `[rows, frames, width]`, with zeros at the right and below.

        Args:
          positions: the examples.
          shape: numbers of rows and frames.
        """
        filled = np.zeros((*shape, self.values.shape[1]), np.float32)
        for row, position in enumerate(positions):
            start, length = self.starts[position], self.lengths[position]
            filled[row, :length] = self.values[start : start + length]
        return filled


class Extractor:
    """The feature extractor of a backbone, with a cache on disk.

    The features are those that transformers' `Speech2TextFeatureExtractor` computes with NumPy.
    Where torchaudio is installed, the extractor itself would take that, and round otherwise; here
    they are the same on every machine.

    Args:
      backbone: folder or hub id of the backbone; its preprocessor_config.json, if there is one, has
        the settings.
      width: width of the features that the model reads.
      cache: folder of the cache; None for the user's cache folder.

    Attributes:
      rate: samples a second of the extractor's input.
      settings: all that the features depend on, JSON-ready.

    Raises:
      ValueError: if the features have another width than the model reads, or the cache holds
        features of other settings.
    """

    def __init__(self, backbone: str | Path, width: int, cache: Path | None = None):
        self._extractor = _load(backbone, width)
        self.rate = int(self._extractor.sampling_rate)
        own = self._extractor.num_mel_bins
        if own != width:
            raise ValueError(
                f"{backbone}: the features have {own} numbers a frame ({PREPROCESSOR}), but the "
                f"model reads {width} (input_feat_per_channel); use the model's own "
                f"{PREPROCESSOR}"
            )
        names = (
            *("num_mel_bins", "sampling_rate", "dither"),
            *("do_ceptral_normalize", "normalize_means", "normalize_vars"),
        )
        self.settings: dict[str, Any] = {name: getattr(self._extractor, name) for name in names}
        self.settings["computed_by"] = "numpy"
        self._folder = cache if cache is not None else _default_cache(self.settings)
        self._open()

    def _open(self) -> None:
        path = self._folder / SETTINGS
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(
                f"{self._folder} is a file, not a folder for a cache of features; choose another "
                "--feature-cache"
            )
        if not path.exists():
            if self._folder.is_dir() and any(self._folder.glob("*.npy")):
                raise ValueError(
                    f"{self._folder} has .npy files but no {SETTINGS}, so it is no cache of "
                    "features; choose another --feature-cache"
                )
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self.settings)
            return
        found = read_json(path)
        differing = [
            f"{name} is {quote(found.get(name), 40)}, not {quote(value, 40)}"
            for name, value in self.settings.items()
            if found.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{self._folder} is a cache of features of other settings: {differing[0]}; choose "
                "another --feature-cache"
            )

    def save(self, folder: Path) -> None:
        """Writes preprocessor_config.json into the folder of a backbone."""
        self._extractor.save_pretrained(folder)

    def features(self, recording: Recording, where: str) -> np.ndarray:
        """Returns the features of a recording, `[frames, width]` float32.

        They are read from the cache if it has them, or computed and put there.

        Args:
          recording: the recording, of any rate.
          where: name of the recording, for errors.

        Raises:
          ValueError: if the recording is too short for two frames, or has a feature without
            variance, as silence has, which cannot be normalised.
        """
        key = hashlib.sha256(f"{recording.rate}\n".encode())
        key.update(np.ascontiguousarray(recording.samples).tobytes())
        path = self._folder / f"{key.hexdigest()}.npy"
        if (found := _read(path, self._extractor.num_mel_bins)) is not None:
            return found
        found = self.computed(recording, where)
        with replace_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, found)
        return found

    def computed(self, recording: Recording, where: str) -> np.ndarray:
        """Returns the features of a recording without the cache; otherwise as `features`."""
        samples = resampled(recording, self.rate)
        # Frames of 25 ms every 10 ms; a single one has no variance.
        if len(samples) < round(0.035 * self.rate):
            raise ValueError(
                f"{where} has {1000 * recording.seconds:.0f} ms, which is too short; features need "
                "35 ms or more"
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            found = _log_mel(samples, self._extractor)
        if not np.isfinite(found).all():
            raise ValueError(
                f"{where} is silent: its features do not vary, so they cannot be normalised"
            )
        return found


def _log_mel(samples: np.ndarray, extractor: Any) -> np.ndarray:
    """Computes the features of samples as an extractor without torchaudio does.

    Args:
      samples: `[samples]` float32 at the extractor's rate.
      extractor: the extractor, of which the settings are read.

    Returns:
      `[frames, bins]` float32: log-mel energies of 25 ms every 10 ms, after Kaldi; normalised by
      mean and variance over the frames as far as the settings say so.
    """
    # Slow to import.
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function  # noqa: PLC0415

    filters = mel_filter_bank(
        num_frequency_bins=257,
        num_mel_filters=extractor.num_mel_bins,
        min_frequency=20,
        max_frequency=extractor.sampling_rate // 2,
        sampling_rate=extractor.sampling_rate,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    energies = spectrogram(
        np.asarray(samples, np.float32) * 2**15,  # Kaldi's scale, that of 16-bit integers
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        dither=extractor.dither,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=float(np.finfo(np.float32).eps),
        remove_dc_offset=True,
    ).T
    # In this order of numbers the means have the extractor's rounding, too.
    found = np.ascontiguousarray(energies, np.float32)
    return extractor.normalize([found])[0] if extractor.do_ceptral_normalize else found


def _load(backbone: str | Path, width: int) -> Any:
    """Loads transformers' feature extractor of a backbone, or one with the usual settings.

    Raises:
      ValueError: if preprocessor_config.json is damaged, or is another extractor's.
    """
    from transformers import Speech2TextFeatureExtractor  # noqa: PLC0415 - slow to import

    folder = expanded(backbone)
    if not is_there(folder) or not folder.is_dir():
        try:
            return Speech2TextFeatureExtractor.from_pretrained(
                str(backbone), trust_remote_code=False
            )
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"cannot load a feature extractor from {quote(backbone, 120)}: {reason_of(error)}"
            ) from None
    path = folder / PREPROCESSOR
    if not path.exists():
        return Speech2TextFeatureExtractor(feature_size=width, num_mel_bins=width)
    settings = read_json(path)
    kind = settings.get("feature_extractor_type", Speech2TextFeatureExtractor.__name__)
    if kind != Speech2TextFeatureExtractor.__name__:
        raise ValueError(
            f"{path} is of a {quote(kind, 60)}; speech is read by a "
            f"{Speech2TextFeatureExtractor.__name__}"
        )
    try:
        return Speech2TextFeatureExtractor.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {reason_of(error)}") from None


def _default_cache(settings: dict[str, Any]) -> Path:
    """Returns the folder of these settings in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    return Path(root) / "compacter_jax" / f"features-{digest[:16]}"


def _read(path: Path, width: int) -> np.ndarray | None:
    """Returns features from the cache; None if they are not there, or damaged."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = found.ndim == 2 and found.shape[1] == width and found.dtype == np.float32
    return found if fits and len(found) and np.isfinite(found).all() else None
