"""Recordings: .wav and other audio files, or bytes of samples, as samples at one rate."""

from __future__ import annotations

import io
import math
import struct
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import signal

from compacter_jax.messages import reason_of

# Width of a sample in bytes -> type of the integers; 24 bits have none.
_INTEGERS = {1: "u1", 2: "<i2", 4: "<i4"}
# Tags of the chunk "fmt " of a .wav: integers, and a longer chunk that has the tag further behind.
_PCM, _EXTENSIBLE = 1, 0xFFFE
# Rates of recorders, in samples a second. Other numbers are mistakes, such as a rate in kHz.
LEAST_RATE, MOST_RATE = 1_000, 1_000_000


class Recording(NamedTuple):
    """Sound of one channel.

    Attributes:
      samples: `[samples]` float32 from -1 to 1.
      rate: samples a second.
      channels: number of channels of the file, of which the first was taken.
    """

    samples: np.ndarray
    rate: int
    channels: int = 1

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate


def read_audio(path: Path) -> Recording:
    """Reads the first channel of an audio file.

    The standard library reads a .wav of integers, the extensible ones of recorders too; the extra
    soundfile reads a .wav of other numbers, .flac, and whatever else it knows.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is no audio, is empty, has samples that are NaN or infinite, or needs
        soundfile, which is not installed; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file; it should be audio")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes), not audio")
    try:
        found = _read_wave(path)
    except wave.Error as error:
        found = _read_others(path, reason_of(error))
    except EOFError:
        found = _read_others(path, "it ends within its header")
    if not len(found.samples):
        raise ValueError(f"{path} is empty: it has no samples")
    if not LEAST_RATE <= found.rate <= MOST_RATE:
        raise ValueError(
            f"{path} says {found.rate} samples a second; it must be from {LEAST_RATE:,} to "
            f"{MOST_RATE:,}"
        )
    return found


def _read_wave(path: Path) -> Recording:
    with wave.open(io.BytesIO(_with_plain_tag(path.read_bytes())), "rb") as file:
        width, channels = file.getsampwidth(), file.getnchannels()
        data = file.readframes(file.getnframes())
        rate = file.getframerate()
    frame = width * channels
    data = data[: len(data) // frame * frame]
    if width == 3:
        octets = np.frombuffer(data, "u1").reshape(-1, 3)
        # The three bytes become the upper ones of four.
        whole = np.pad(octets, ((0, 0), (1, 0))).copy().view("<i4")[:, 0]
        width = 4
    elif width in _INTEGERS:
        whole = np.frombuffer(data, _INTEGERS[width])
    else:
        raise ValueError(f"{path} has samples of {8 * width} bits; use 8, 16, 24 or 32")
    scale, middle = 2.0 ** (8 * width - 1), 128 if width == 1 else 0
    samples = (whole.reshape(-1, channels)[:, 0].astype(np.float64) - middle) / scale
    return Recording(samples.astype(np.float32), rate, channels)


def _with_plain_tag(data: bytes) -> bytes:
    """Returns a .wav whose chunk "fmt " has the tag of integers if it is extensible and says so.

    The module wave of Python 3.11 does not know extensible files, which many programs write for 24
    bits or several channels.
    """
    start = 12
    while data[:4] == b"RIFF" and start + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, start)
        content = start + 8
        if name == b"fmt ":
            if size >= 26 and content + 26 <= len(data):
                (tag,), (inner,) = (
                    struct.unpack_from("<H", data, content + place) for place in (0, 24)
                )
                if (tag, inner) == (_EXTENSIBLE, _PCM):
                    return data[:content] + struct.pack("<H", _PCM) + data[content + 2 :]
            break
        start = content + size + size % 2
    return data


def _read_others(path: Path, reason: str) -> Recording:
    """Reads a file by soundfile; `reason` says why the standard library did not read it."""
    try:
        import soundfile  # noqa: PLC0415 - an optional package
    except ImportError:
        raise ValueError(
            f"{path} is no .wav of integers ({reason}); other audio, such as .flac, needs the "
            "package soundfile (pip install 'compacter_jax[speech]')"
        ) from None
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is no audio that can be read: {reason_of(error)}") from None
    first = np.ascontiguousarray(samples[:, 0])
    if len(bad := np.flatnonzero(~np.isfinite(first))):
        raise ValueError(
            f"{path} has samples that are no finite numbers, such as number {bad[0] + 1:,} "
            f"({first[bad[0]]}); write the recording again"
        )
    return Recording(first, int(rate), samples.shape[1])


def from_pcm16(data: bytes, rate: int, where: str) -> Recording:
    """Returns a recording of little-endian signed 16-bit samples of one channel.

    Args:
      data: the bytes.
      rate: samples a second.
      where: place of the bytes, for errors.

    Raises:
      ValueError: if there are no samples, or half a sample.
    """
    if not data:
        raise ValueError(f"{where} is empty: it has no samples")
    if len(data) % 2:
        raise ValueError(f"{where} has {len(data)} bytes, which are no samples of 16 bits")
    return Recording((np.frombuffer(data, "<i2") / 2.0**15).astype(np.float32), rate)


def write_wave(path: Path, samples: np.ndarray, rate: int) -> None:
    """Writes a .wav of one channel and 16 bits.

    Args:
      path: the file.
      samples: `[samples]` floats; those outside of -1 to 1 are clipped.
      rate: samples a second.
    """
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(as_pcm16(samples))


def as_pcm16(samples: np.ndarray) -> bytes:
    """Returns samples from -1 to 1 as little-endian signed 16-bit integers."""
    return np.clip(np.round(samples * 2.0**15), -(2**15), 2**15 - 1).astype("<i2").tobytes()


def resampled(recording: Recording, rate: int) -> np.ndarray:
    """Returns the samples at another rate, `[samples]` float32.

    A polyphase filter (`scipy.signal.resample_poly`) removes what the lower of the two rates cannot
    hold.
    """
    if recording.rate == rate:
        return recording.samples
    common = math.gcd(recording.rate, rate)
    up, down = rate // common, recording.rate // common
    return signal.resample_poly(recording.samples, up, down).astype(np.float32)
