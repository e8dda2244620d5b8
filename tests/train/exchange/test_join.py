"""Tests backbones of the encoder of one checkpoint and the decoder of another, and runs of them."""

import json
import shutil
import wave

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax.traverse_util import flatten_dict
from transformers import Speech2TextFeatureExtractor

import compacter_jax as cj
from tests.parallel_data import SIZES, write_jsonl
from tests.speech_data import speech_flags, write_files, write_speech_model, write_split
from tests.tones import RATE, tone
from tests.train.cli.test_cli import refusal
from train.__main__ import main
from train.exchange.join import join_backbones
from train.speech.audio import as_pcm16, write_wave


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns the folders of a recogniser and of a text model of the same width.

    The recogniser forces tokens of its own vocabulary; the text model forces a last one alone.
    """
    folder = tmp_path_factory.mktemp("two")
    speech = write_speech_model(folder, seed=3, forced_bos_token_id=7, forced_eos_token_id=9)
    config = folder / "m2m" / "config.json"
    settings = json.loads(config.read_text()) | {"forced_eos_token_id": 5}
    assert settings.get("forced_bos_token_id") is None
    config.write_text(json.dumps(settings))
    return speech, folder / "m2m"


def test_each_half_is_what_it_was(folders, tmp_path):
    """The encoder computes as in the one checkpoint, the decoder as in the other."""
    speech, text = folders
    join_backbones(str(speech), str(text), tmp_path / "joined")
    joined = cj.load_backbone(tmp_path / "joined", head="auto")
    recogniser, translator = (cj.load_backbone(path, head="auto") for path in (speech, text))
    assert joined.module.config.mask_between_convolutions
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = [getattr(one.module.config, name) for one in (recogniser, translator, joined)]
        assert forced == ([7, None, None] if name == "forced_bos_token_id" else [9, 5, 5])
    generator = np.random.default_rng(0)
    features = jnp.asarray(generator.normal(size=(2, 21, 12)), jnp.float32)
    mask = (np.arange(21) < np.array([[21], [13]])).astype(np.int32)
    states = [
        one.module.apply({"params": one.params}, features, mask, method="encode")
        for one in (joined, recogniser)
    ]
    np.testing.assert_array_equal(*states)
    ids = jnp.asarray(generator.integers(2, SIZES["vocab_size"], (2, 5)), jnp.int32)
    shorter = joined.module.mask_of_states(mask)
    logits = [
        one.module.apply({"params": one.params}, ids, states[0], of, method="decode")
        for one, of in ((joined, mask), (translator, shorter))
    ]
    np.testing.assert_allclose(*logits, atol=1e-6)
    paths = flatten_dict(joined.params, sep="/")
    assert not any(path.startswith("shared") for path in paths)
    assert (tmp_path / "joined" / "tokenizer.json").exists()


def test_a_joined_folder_is_used_again_and_no_other_is_touched(folders, tmp_path):
    """The same two checkpoints leave the folder as it is; others are refused."""
    speech, text = map(str, folders)
    join_backbones(speech, text, tmp_path / "joined")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "joined").iterdir()}
    join_backbones(speech, text, tmp_path / "joined")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "joined").iterdir()}
    with pytest.raises(ValueError, match="it holds something else; name a new folder"):
        join_backbones(speech, text, folders[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 24}, "do not fit: d_model is 16 of the first and 24 of the second"),
        ({"activation_function": "gelu"}, "activation_function is 'relu' of the first and 'gelu'"),
        ({"pad_token_id": 2}, "do not fit: pad_token_id is 0 of the first and 2 of the second"),
        ({"model_type": "mbart"}, "is of model_type 'mbart'; give one of m2m_100"),
    ],
)
def test_checkpoints_that_do_not_fit(change, message, folders, tmp_path, capsys):
    """The command names the field with both values, or the type, and writes nothing."""
    speech, text = folders
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((text / "config.json").read_text()) | change
    (other / "config.json").write_text(json.dumps(config))
    files = {"train": write_split(tmp_path, "train", 2)}
    flags = {"encoder_from": speech, "decoder_from": other}
    flags = speech_flags(tmp_path / "joined", files, tmp_path / "run", tmp_path, **flags)
    assert message in refusal(capsys, "fit", *flags)
    assert not (tmp_path / "joined").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [{}, {"seeds": "0,1"}])
def test_bad_input_ends_the_command_before_joining(more, folders, tmp_path, capsys):
    """A language without rows is told before the joined backbone is written."""
    files = {"train": write_split(tmp_path, "train", 2)}
    flags = {"encoder_from": folders[0], "decoder_from": folders[1], "directions": "es", **more}
    flags = speech_flags(tmp_path / "joined", files, tmp_path / "run", tmp_path, **flags)
    assert "has no row of the language 'es'" in refusal(capsys, "fit", *flags)
    assert not (tmp_path / "joined").exists()


def test_one_checkpoint_alone(folders, tmp_path, capsys):
    """Both checkpoints are needed."""
    files = {"train": write_split(tmp_path, "train", 2)}
    flags = speech_flags("x", files, tmp_path / "run", tmp_path, encoder_from=folders[0])
    told = refusal(capsys, "fit", *flags)
    assert "name the two checkpoints of which --backbone is joined; give both" in told


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "features"


@pytest.fixture(scope="module")
def run(folders, files, cache, tmp_path_factory):
    """Returns the joined backbone and the folder of a run of `fit` on it."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {"encoder_from": folders[0], "decoder_from": folders[1]}
    flags = speech_flags(folder / "joined", files, folder / "run", cache, **flags)
    assert main(["fit", *flags]) == 0
    return folder / "joined", folder / "run"


def test_fit_joins_two_checkpoints_and_trains_adapters_on_them(run, folders):
    """Trains adapters on a backbone whose halves are those of the two, bit for bit."""
    made = flatten_dict(cj.load_backbone(run[0], head="auto").params, sep="/")
    speech, text = (
        flatten_dict(cj.load_backbone(path, head="auto").params, sep="/") for path in folders
    )
    text["decoder_embed_tokens/embedding"] = text["shared/embedding"]
    for path, leaf in made.items():
        of = speech if path.startswith("encoder") else text
        np.testing.assert_array_equal(leaf, of[path], err_msg=path)
    joined, found = cj.load_backbone(run[0]), {}
    for language in ("de", "fr"):
        folder = run[1] / language / "adapter"
        model, params = cj.load_adapter(folder, joined)  # compares the hash of all other leaves
        assert model.method == cj.preset("st", reduction_factor=4)
        found[language] = flatten_dict(params, sep="/")
    biases = [path for path in found["de"] if path.endswith("adapter/down/bias")]
    assert len(biases) == 2
    for path in biases:  # zero at the start
        assert found["de"][path].any(), path
        assert (found["de"][path] != found["fr"][path]).any(), path


# --- bad recordings -------------------------------------------------------------------------------


def write_header(path):
    """Writes a .wav that has a header, and no samples behind it."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
    return path


def test_features_of_another_width_than_the_model_s(folders, files, tmp_path, capsys):
    """Refuses a preprocessor_config.json of another width by both numbers, and writes nothing."""
    backbone = shutil.copytree(folders[0], tmp_path / "backbone")
    Speech2TextFeatureExtractor(feature_size=40, num_mel_bins=40).save_pretrained(backbone)
    flags = speech_flags(backbone, files, tmp_path / "run", tmp_path / "cache")
    told = refusal(capsys, "fit", *flags)
    assert "the features have 40 numbers a frame" in told
    assert "but the model reads 12" in told
    assert not (tmp_path / "run").exists()


def test_a_file_without_samples(folders, files, cache, tmp_path, capsys):
    """Refuses a .wav that ends behind its header by name, and writes nothing."""
    audio = write_header(tmp_path / "header.wav")
    rows = [{"audio": str(audio), "target": "sch", "target_language": "de"}]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    flags = speech_flags(folders[0], {**files, "train": train}, tmp_path / "run", cache)
    assert f"{audio} is empty: it has no samples" in refusal(capsys, "fit", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("samples", "message"),
    [(b"", "is empty: it has no samples"), (b"abc", "has 3 bytes, which are no samples of 16 b")],
    ids=["empty", "odd"],
)
def test_bytes_that_are_no_samples(samples, message, folders, files, cache, tmp_path, capsys):
    """Refuses a row of bytes without samples, or with half a one, by its number."""
    good = as_pcm16(tone(300))
    rows = [
        {"pcm16": data, "target": "sch", "target_language": "de"} for data in (good, samples, good)
    ]
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    flags = {"sampling_rate": RATE}
    flags = speech_flags(folders[0], {**files, "train": file}, tmp_path / "run", cache, **flags)
    assert f"row 2: pcm16 {message}" in refusal(capsys, "fit", *flags)
    assert not (tmp_path / "run").exists()


BAD = {
    "no audio": (lambda path: path.write_bytes(b"RIFF, but no audio"), "is no .wav of integers"),
    "empty": (lambda path: path.write_bytes(b""), "is empty (0 bytes), not audio"),
    "no samples": (write_header, "is empty: it has no samples"),
    "too short": (lambda path: write_wave(path, tone(300, 0.02), RATE), "has 20 ms, which is too"),
    "too long": (
        lambda path: write_wave(path, tone(300, 1.5), RATE),
        "1 of 1 recordings are longer than --max-seconds 1, the first",
    ),
}


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_recordings_that_predict_cannot_read(write, message, run, cache, tmp_path, capsys):
    """Names the recording of a folder in one line, and writes no predictions."""
    folder, target = tmp_path / "recordings", tmp_path / "out.jsonl"
    folder.mkdir()
    write(folder / "bad.wav")
    flags = ["--adapter", run[1], "--input", folder, "--output", target]
    flags += ["--feature-cache", cache, "--max-seconds", 1]
    capsys.readouterr()
    assert main(["predict", *map(str, flags)]) == 2
    *bar, told = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("predict: 0row") for line in bar)  # nothing was read
    assert told.startswith("error: ")
    assert message in told
    assert str(folder / "bad.wav") in told
    assert not target.exists()
