"""Tests `fit`, `evaluate` and `predict` on recordings, with an adapter for each language."""

import hashlib
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import compacter_jax as cj
from tests.parallel_data import write_jsonl
from tests.speech_data import (
    said,
    speech_flags,
    utterances,
    write_files,
    write_speech_model,
    write_split,
)
from tests.tones import RATE, tone, write_spoken
from tests.train.cli.test_cli import refusal
from train.__main__ import main
from train.fit.run_record import read_record
from train.speech.audio import write_wave
from train.speech.word_errors import word_error_rate


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_speech_model(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "features"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def run(backbone, files, cache, tmp_path_factory):
    """Returns the folder of a run of two languages."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["fit", *speech_flags(backbone, files, output, cache)]) == 0
    return output


def predicted(adapter, source, cache, folder, *more):
    target = folder / "out.jsonl"
    flags = ["--adapter", adapter, "--input", source, "--output", target]
    flags += ["--feature-cache", cache, *more]
    assert main(["predict", *map(str, flags)]) == 0
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_language_has_a_folder_that_loads_alone(run, backbone):
    """The members differ, and each is an adapter with its language in its settings."""
    loaded = cj.load_backbone(backbone)
    found = {}
    for language in ("de", "fr"):
        folder = run / language / "adapter"
        model, _ = cj.load_adapter(folder, loaded)  # compares the hash of all other leaves
        assert model.method.kind == "bottleneck"
        settings = cj.read_adapter_config(folder)
        assert settings["kind"] == "speech"
        assert settings["speech"]["directions"] == [language]
        assert settings["speech"]["max_seconds"] == 30.0
        (path,) = folder.glob("*.safetensors")
        found[language] = load_file(path)
    assert all((found["de"][path] != leaf).any() for path, leaf in found["fr"].items())
    assert {"de/adapter", "fr/adapter"} < {*read_record(run).writes}


def test_rows_are_written_by_the_member_of_their_language(run, files, cache, tmp_path):
    """`predict` on the folder gives each row what the member's folder alone gives it."""
    rows = read(files["validation"])
    source = write_jsonl(files["validation"].parent / "in.jsonl", rows)
    found = predicted(run, source, cache, tmp_path)
    assert [row["speaker"] for row in found] == ["nobody"] * len(rows)
    for language in ("de", "fr"):
        own = [row for row in rows if row["target_language"] == language]
        source = write_jsonl(files["validation"].parent / f"{language}.jsonl", own)
        alone = predicted(run / language, source, cache, tmp_path)
        texts = [row["prediction"] for row in found if row["target_language"] == language]
        assert texts == [row["prediction"] for row in alone]


def test_metrics_of_each_language(run, files, cache, tmp_path):
    """The metrics of a language are those of its predictions, and the means are over languages."""
    output = tmp_path / "metrics.json"
    flags = ["--adapter", run, "--test-file", files["validation"], "--output", output]
    assert main(["evaluate", *map(str, [*flags, "--feature-cache", cache])]) == 0
    found = json.loads(output.read_text())["metrics"]
    rows = predicted(run, files["validation"], cache, tmp_path)
    for language in ("de", "fr"):
        own = [row for row in rows if row["target_language"] == language]
        texts, targets = ([row[name] for row in own] for name in ("prediction", "target"))
        assert found[f"word_error_rate_{language}"] == pytest.approx(
            word_error_rate(texts, targets)
        )
        exact = [a.split() == b.split() for a, b in zip(texts, targets, strict=True)]
        assert found[f"exact_match_{language}"] == pytest.approx(sum(exact) / len(exact))
    for name in ("bleu", "chrf", "exact_match", "word_error_rate"):
        each = [found[f"{name}_{language}"] for language in ("de", "fr")]
        assert found[name] == pytest.approx(sum(each) / 2)


def test_a_folder_of_recordings(run, cache, tmp_path, capsys):
    """Every recording of a folder is written in every language of the adapters, or in some."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i, symbols in enumerate(utterances(2, seed=7)):
        write_spoken(folder / f"{i}.wav", symbols)
    (folder / "notes.txt").write_text("no recording")
    rows = predicted(run, folder, cache, tmp_path)
    assert [(row["audio"], row["target_language"]) for row in rows] == [
        (f"{i}.wav", language) for i in range(2) for language in ("de", "fr")
    ]
    alone = predicted(run, folder, cache, tmp_path, "--target-languages", "fr")
    assert [row["prediction"] for row in alone] == [
        row["prediction"] for row in rows if row["target_language"] == "fr"
    ]
    flags = ["--adapter", run, "--input", folder, "--output", tmp_path / "out.jsonl"]
    capsys.readouterr()  # the progress bars
    for languages, told in (
        ("en", "--target-languages: there is no adapter for 'en'; there are those of de, fr"),
        ("de,de", "--target-languages 'de,de' must be different languages"),
        ("de,", "--target-languages 'de,' must be different languages"),
    ):
        wrong = [*map(str, flags), "--target-languages", languages]
        assert told in refusal(capsys, "predict", *wrong)
    empty = tmp_path / "empty"
    empty.mkdir()
    flags[3] = empty
    assert "is a folder without .wav or .flac files" in refusal(capsys, "predict", *map(str, flags))


@pytest.mark.slow
def test_a_recogniser_of_what_is_said(backbone, files, cache, tmp_path, capsys):
    """With --transcribe the column source is learned, each recording once, and masks can be off."""
    output = tmp_path / "run"
    flags = {"transcribe": "en", "adapters": "shared", "spec_augment": False}
    flags |= {"method": "full", "reduction_factor": None}
    assert main(["fit", *speech_flags(backbone, files, output, cache, **flags)]) == 0
    assert "en: 12, 4" in capsys.readouterr().out
    settings = cj.read_adapter_config(output / "adapter")
    assert settings["speech"]["directions"] == ["en"]
    made = cj.load_backbone(output / "backbone")
    assert made.module.config.mask_between_convolutions
    assert (output / "backbone" / "preprocessor_config.json").exists()
    metrics = tmp_path / "metrics.json"
    flags = ["--adapter", output, "--test-file", files["validation"], "--transcribe", "en"]
    flags += ["--feature-cache", cache, "--output", metrics]
    assert main(["evaluate", *map(str, flags)]) == 0
    assert {"word_error_rate", "exact_match_en"} < json.loads(metrics.read_text())["metrics"].keys()


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_recordings_only(backbone, tmp_path, capsys):
    """Recordings are among the inputs of a run: by content, so that a copy is as good."""
    data, output = tmp_path / "data", tmp_path / "run"
    files = {"train": write_split(data, "train", 4), "validation": write_split(data, "valid", 2)}
    flags = speech_flags(backbone, files, output, tmp_path / "features")
    assert main(["fit", *flags]) == 0
    capsys.readouterr()
    inputs = read_record(output).inputs
    recordings = inputs["recordings of --train-file"]
    assert set(recordings) == {f"train/{i}.wav" for i in range(4)}
    assert set(inputs["recordings of --validation-file"]) == {f"valid/{i}.wav" for i in range(2)}
    recording = data / "train" / "2.wav"
    before = recording.read_bytes()
    assert recordings["train/2.wav"]["sha256"] == hashlib.sha256(before).hexdigest()
    write_spoken(recording, [1, 1], seed=5)
    said = "recordings of --train-file: train/2.wav has changed"
    assert said in refusal(capsys, "fit", *flags, "--resume")
    recording.unlink()
    said = "recordings of --train-file: train/2.wav is missing"
    assert said in refusal(capsys, "fit", *flags, "--resume")
    recording.write_bytes(before)
    assert main(["fit", *flags, "--resume"]) == 0


def test_members_that_read_at_different_lengths(run, files, cache, tmp_path, capsys):
    """They are loaded together only with one limit for all."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    path = copy / "fr" / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"speech": {**settings["speech"], "max_seconds": 20.0}}))
    flags = ["evaluate", "--adapter", copy, "--test-file", files["validation"]]
    flags += ["--feature-cache", cache, "--output", tmp_path / "metrics.json"]
    assert "must share their max_seconds: de has 30.0, but fr" in refusal(capsys, *flags)
    assert main(list(map(str, [*flags, "--max-seconds", 10]))) == 0


def test_recordings_that_the_run_would_replace(run, backbone, files, cache, tmp_path, capsys):
    """A recording among the outputs of the run before is refused by name, and stays."""
    output, rows = tmp_path / "run", read(files["train"])
    shutil.copytree(run, output)
    spoken = output / "de" / "adapter" / "own.wav"
    write_spoken(spoken, [1, 2])
    for row in rows:
        row["audio"] = str(files["train"].parent / row["audio"])
    train = write_jsonl(tmp_path / "own.jsonl", [*rows, rows[0] | {"audio": str(spoken)}])
    flags = speech_flags(backbone, {**files, "train": train}, output, cache)
    said = refusal(capsys, "fit", *flags, "--overwrite")
    assert f"recordings of --train-file: {spoken} lies in {output / 'de' / 'adapter'}" in said
    assert spoken.is_file()


# --- bad input ------------------------------------------------------------------------------------


def with_row(files, folder, **changes):
    """Writes a file of one row more than that of training, with recordings of its own."""
    rows = read(files["train"])
    for row in rows:
        row["audio"] = str(files["train"].parent / row["audio"])
    return {**files, "train": write_jsonl(folder / "more.jsonl", [*rows, rows[0] | changes])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": "bad.wav"}, "bad.wav is no .wav of integers"),
        ({"audio": "empty.wav"}, "empty.wav is empty (0 bytes), not audio"),
        ({"audio": "missing.wav"}, "missing.wav does not exist"),
        ({"audio": ""}, "row 25: audio is empty"),
        ({"target": ""}, "row 25: target is empty"),
        ({"target_language": "de,fr"}, "row 25: target_language is 'de,fr'; the name of one"),
        ({"target_language": "xx"}, "no token for the language 'xx'"),
        ({"audio": "short.wav"}, "short.wav has 20 ms, which is too short"),
        ({"audio": "long.wav"}, "1 of 13 recordings are longer than --max-seconds 1, the first"),
    ],
)
def test_recordings_that_cannot_be(change, message, backbone, files, cache, tmp_path, capsys):
    """Each is refused in one line that names the file or the row, and nothing is written."""
    (tmp_path / "bad.wav").write_bytes(b"RIFF, but no audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    write_wave(tmp_path / "short.wav", tone(300, 0.02), RATE)
    write_spoken(tmp_path / "long.wav", [1] * 12)
    more = with_row(files, tmp_path, **change)
    output = tmp_path / "run"
    flags = speech_flags(backbone, more, output, cache, max_seconds=1)
    assert message in refusal(capsys, "fit", *flags)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"directions": "de,es"}, "has no row of the language 'es'; it has de, fr"),
        ({"directions": "de,de"}, "must be different languages"),
        ({"max_seconds": 0}, "max_seconds=0.0 must be from 0.035 to 3600"),
        ({"sampling_rate": 8}, "sampling_rate=8 must be from 1000"),
        (
            {"method": "full", "reduction_factor": None},
            "method 'full' cannot be a member of 'bank'",
        ),
        ({"transcribe": "xx"}, "no token for the language 'xx'"),
    ],
)
def test_flags_of_speech_that_cannot_be(flags, message, backbone, files, cache, tmp_path, capsys):
    """Each is refused in one line, before anything is written."""
    output = tmp_path / "run"
    assert message in refusal(capsys, "fit", *speech_flags(backbone, files, output, cache, **flags))
    assert not output.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 2: pcm16 is missing (null); remove or fill the row"),
        ([1, 2], "row 1: pcm16 is list, not bytes of samples; give a .parquet with a column of"),
    ],
)
def test_samples_that_are_no_bytes(value, message, backbone, files, cache, tmp_path, capsys):
    """A row without samples, or samples that are numbers, are refused by the row."""
    first = value if value is not None else b"\0\0"
    rows = [
        {"pcm16": samples, "target": "sch", "target_language": "de"} for samples in (first, value)
    ]
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    flags = {"sampling_rate": 16_000}
    flags = speech_flags(backbone, {**files, "train": file}, tmp_path / "run", cache, **flags)
    assert message in refusal(capsys, "fit", *flags)


def test_speech_and_text_are_told_apart(backbone, files, cache, tiny_t5, tmp_path, capsys):
    """A backbone that reads text, a task of text and a cache of other features are refused."""
    output = tmp_path / "run"
    flags = speech_flags(tiny_t5, files, output, cache, adapters="shared")
    assert "has recordings, but" in refusal(capsys, "fit", *flags)
    flags = ["--backbone", backbone, "--task", "movie", "--output-dir", output]
    flags += ["--reduction-factor", 4]
    flags = [*map(str, flags)]
    assert "has texts to read, but" in refusal(capsys, "fit", *flags)
    told = refusal(capsys, "fit", *flags, "--transcribe", "en")
    assert "--transcribe is for speech; give a --train-file with the columns audio" in told
    other = tmp_path / "other"
    other.mkdir()
    (other / "features.json").write_text(json.dumps({"num_mel_bins": 40}))
    flags = speech_flags(backbone, files, output, other)
    assert "is a cache of features of other settings: num_mel_bins is 40, not 12" in refusal(
        capsys, "fit", *flags
    )
    assert said([0, 1], "fr") == "oix eau"
