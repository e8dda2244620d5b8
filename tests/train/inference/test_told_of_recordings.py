"""Tests what `evaluate` and `predict` say of recordings that they read in part, or not at all."""

import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.parallel_data import write_jsonl
from tests.speech_data import as_bytes, speech_flags, write_speech_model, write_split
from tests.tones import RATE, tone
from tests.train.cli.test_cli import refusal
from train.__main__ import main
from train.data.files import read_chunks
from train.speech.audio import as_pcm16, write_wave


def write_samples(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Returns a folder with an adapter for German that was trained on samples, and with rows."""
    folder = tmp_path_factory.mktemp("setting")
    (rows,) = read_chunks(write_split(folder, "train", 4, languages=("de",)), 100)
    files = {
        split: write_samples(folder / f"{split}.parquet", as_bytes(rows))
        for split in ("train", "validation")
    }
    backbone, flags = write_speech_model(folder), {"sampling_rate": RATE, "adapters": "per_target"}
    flags = speech_flags(backbone, files, folder / "run", folder / "cache", **flags)
    assert main(["fit", *flags]) == 0
    return folder, as_bytes(rows)


def flags_of(setting, *more):
    folder, _ = setting
    cache = folder / "cache"
    return ["--adapter", folder / "run", "--feature-cache", cache, *more]


def test_samples_have_the_rate_of_training(setting, tmp_path, capsys):
    """The adapter knows it, so that it need not be given; other languages are named."""
    _, rows = setting
    others = [{**row, "target_language": "en"} for row in rows[:1]]
    file = write_samples(tmp_path / "test.parquet", [*rows, *others])
    flags = flags_of(setting, "--test-file", file, "--output", tmp_path / "metrics.json")
    assert main(["evaluate", *map(str, flags)]) == 0
    assert f"{file}: rows of the languages en are left out" in capsys.readouterr().out


def test_errors_of_samples_name_the_file_and_its_row(setting, tmp_path, capsys):
    """The row is that of the file, also behind rows of languages that are left out."""
    _, rows = setting
    broken = {**rows[0], "pcm16": b"\0"}
    others = [{**row, "target_language": "en"} for row in rows[:2]]
    file = write_samples(tmp_path / "test.parquet", [*others, *rows, broken])
    flags = flags_of(setting, "--test-file", file, "--output", tmp_path / "metrics.json")
    assert f"{file}, row {len(rows) + 3}: pcm16" in refusal(capsys, "evaluate", *map(str, flags))


def test_predict_says_which_channel_is_taken(setting, tmp_path, capsys):
    """A folder with a recording of two channels is read, and a line says how."""
    both = np.stack([tone(300, 0.3), tone(500, 0.3)], -1)
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(as_pcm16(both))
    write_wave(tmp_path / "mono.wav", tone(400, 0.3), RATE)
    flags = flags_of(setting, "--input", tmp_path, "--output", tmp_path / "said.jsonl")
    assert main(["predict", *map(str, flags)]) == 0
    told = "1 of 2 recordings have several channels; the first is read"
    assert told in capsys.readouterr().out


def test_predict_looks_at_all_languages_first(setting, tmp_path, capsys):
    """A language without an adapter is refused by its row, though a row before has no file."""
    rows = [{"audio": "missing.wav", "target_language": name} for name in ("de", "xx")]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = flags_of(setting, "--input", source, "--output", tmp_path / "said.jsonl")
    told = f"{source}, row 2: there is no adapter for 'xx'; there are those of de"
    assert told in refusal(capsys, "predict", *map(str, flags))
