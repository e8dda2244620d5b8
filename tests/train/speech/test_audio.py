"""Tests the reading of recordings."""

import struct
import sys
import wave

import numpy as np
import pytest

from tests.tones import tone
from train.speech import audio


def write_integers(path, samples, width, channels=1, rate=16_000):
    """Writes integers of `width` bytes, one frame after the other."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        shift = 128 if width == 1 else 0
        data = b"".join(int(s + shift).to_bytes(4, "little", signed=True)[:width] for s in samples)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_of_every_width(width, tmp_path):
    """Samples of 8 to 32 bits are read to the bit, scaled to -1 to 1."""
    top = 2 ** (8 * width - 1)
    wanted = np.array([0, 1, -1, top - 1, -top, top // 2])
    found = audio.read_audio(write_integers(tmp_path / "a.wav", wanted, width))
    np.testing.assert_array_equal(found.samples, (wanted / top).astype(np.float32))
    assert (found.rate, found.channels) == (16_000, 1)


def test_extensible_files_of_integers(tmp_path):
    """A file of integers whose kind stands in the extension of its header equals a plain one."""
    samples = np.array([0, 1, -1, 2**23 - 1, -(2**23)])
    plain = write_integers(tmp_path / "a.wav", samples, 3)
    wanted = audio.read_audio(plain)
    data = plain.read_bytes()
    # RIFF, size, WAVE; a chunk before the format; the format with its extension; the samples.
    kind = struct.pack("<HHIH", 22, 24, 4, 1) + bytes(14)
    head = struct.pack("<4sI", b"fmt ", 40) + struct.pack("<H", 0xFFFE) + data[22:36] + kind
    body = b"WAVE" + struct.pack("<4sI", b"odd ", 3) + bytes(4) + head + data[36:]
    extensible = tmp_path / "b.wav"
    extensible.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    found = audio.read_audio(extensible)
    np.testing.assert_array_equal(found.samples, wanted.samples)
    assert found[1:] == wanted[1:]
    kind = bytes.fromhex("0300")
    extensible.write_bytes(extensible.read_bytes().replace(b"\4\0\0\0\1\0", b"\4\0\0\0" + kind))
    with pytest.raises(ValueError, match=r"b\.wav is no \.wav of integers"):
        audio.read_audio(extensible)


def test_the_first_of_several_channels_is_taken(tmp_path):
    """The samples of a file of two channels are those of the first, and their number is kept."""
    path = write_integers(tmp_path / "a.wav", [100, -5, 200, -6, 300, -7], 2, channels=2)
    found = audio.read_audio(path)
    np.testing.assert_array_equal(found.samples * 2**15, [100, 200, 300])
    assert found.channels == 2


def test_bytes_are_the_samples_of_a_file(tmp_path):
    """A recording as bytes equals the same recording as a file."""
    samples = tone(440)
    audio.write_wave(tmp_path / "a.wav", samples, 8_000)
    from_file = audio.read_audio(tmp_path / "a.wav")
    from_bytes = audio.from_pcm16(audio.as_pcm16(samples), 8_000, "row 1")
    np.testing.assert_array_equal(from_file.samples, from_bytes.samples)
    np.testing.assert_allclose(from_file.samples, samples, atol=2**-16 + 1e-9)


@pytest.mark.parametrize(("rate", "wanted"), [(8_000, 16_000), (44_100, 16_000), (16_000, 16_000)])
def test_a_tone_stays_the_same_tone_at_another_rate(rate, wanted):
    """A resampled tone has its length and its pitch, and equals the tone made at the new rate."""
    times = np.arange(rate // 2) / rate
    recording = audio.Recording(np.sin(2 * np.pi * 440 * times).astype(np.float32), rate)
    found = audio.resampled(recording, wanted)
    assert found.dtype == np.float32
    assert len(found) == wanted // 2
    truth = np.sin(2 * np.pi * 440 * np.arange(wanted // 2) / wanted)
    middle = slice(wanted // 10, -wanted // 10)  # the filter starts and ends with silence
    np.testing.assert_allclose(found[middle], truth[middle], atol=2e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes), not audio"),
        (b"no audio at all, but a text", "is no .wav of integers"),
        (b"RIFF" + struct.pack("<I", 4) + b"WAVE", "is no .wav of integers"),
        (b"RIFF\x1e\0\0\0WAVEfmt \x10\0\0\0\1\0", "(it ends within its header)"),
    ],
)
def test_files_that_are_no_audio(content, message, tmp_path, monkeypatch):
    """Each is refused by name, and the package that other audio needs is named."""
    monkeypatch.setitem(sys.modules, "soundfile", None)
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.wav") as error:
        audio.read_audio(path)
    assert message in str(error.value)
    if content:
        assert "soundfile" in str(error.value)


def test_audio_without_samples(tmp_path):
    """A file, or bytes, without samples, or with half a sample, is refused."""
    path = write_integers(tmp_path / "a.wav", [], 2)
    with pytest.raises(ValueError, match="is empty: it has no samples"):
        audio.read_audio(path)
    with pytest.raises(ValueError, match="row 3 is empty"):
        audio.from_pcm16(b"", 8_000, "row 3")
    with pytest.raises(ValueError, match="3 bytes, which are no samples of 16 bits"):
        audio.from_pcm16(b"abc", 8_000, "row 3")
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        audio.read_audio(tmp_path / "missing.wav")


@pytest.fixture
def as_if_soundfile_read(tmp_path, monkeypatch):
    """Returns a function that puts samples `[samples, channels]` into what soundfile reads.

    It returns the path of a file that is no .wav.
    """

    def put(samples):
        class Reader:
            @staticmethod
            def read(path, dtype, always_2d):
                assert (dtype, always_2d) == ("float32", True)
                return np.array(samples, np.float32), 22_050

        monkeypatch.setitem(sys.modules, "soundfile", Reader)
        path = tmp_path / "a.flac"
        path.write_bytes(b"fLaC and so on")
        return path

    return put


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_finite_numbers(value, as_if_soundfile_read):
    """They are refused by place and value, not called silence; another channel may have any."""
    path = as_if_soundfile_read([[0.5, 0.1], [value, 0.2], [value, 0.2]])
    message = rf"a\.flac has samples that are no finite numbers, such as number 2 \({value}\)"
    with pytest.raises(ValueError, match=message):
        audio.read_audio(path)
    assert len(audio.read_audio(as_if_soundfile_read([[0.5, value], [0.1, 0.2]])).samples) == 2


def test_other_audio_is_read_by_soundfile(as_if_soundfile_read):
    """A file that is no .wav of integers goes to soundfile, whose first channel is taken."""
    found = audio.read_audio(as_if_soundfile_read([[0.5, 0.1], [0.25, 0.2]]))
    np.testing.assert_array_equal(found.samples, np.array([0.5, 0.25], np.float32))
    assert (found.rate, found.channels) == (22_050, 2)
