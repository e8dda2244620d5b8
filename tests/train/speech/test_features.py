"""Tests the features of speech against transformers' extractor, and their cache."""

import json
import sys

import numpy as np
import pytest
from transformers import Speech2TextFeatureExtractor

from tests.tones import RATE, tone
from train.speech import features as speech_features
from train.speech.audio import Recording, resampled
from train.speech.features import Extractor, Frames


def recording(seed=0, seconds=0.4):
    generator = np.random.default_rng(seed)
    return Recording(tone(generator.uniform(150, 900), seconds, seed=seed), RATE)


@pytest.mark.parametrize("width", [80, 24])
def test_features_are_those_of_the_extractor(width, tmp_path):
    """Features, computed and from the cache, equal those of transformers' extractor."""
    extractor = Extractor(tmp_path, width, tmp_path / "cache")
    oracle = Speech2TextFeatureExtractor(feature_size=width, num_mel_bins=width)
    for seed in range(3):
        spoken = recording(seed, 0.2 + 0.137 * seed)
        samples = resampled(spoken, 16_000)
        wanted = oracle(samples, sampling_rate=16_000)["input_features"][0]
        for _ in ("computed", "cached"):
            found = extractor.features(spoken, "a.wav")
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, wanted)
        assert len(found) == 1 + (len(samples) - 400) // 160
        np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(found.std(0), 1, atol=1e-3)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


def test_features_of_a_batch_equal_the_padded_ones_of_the_extractor(tmp_path):
    """Rows of several lengths are padded as the extractor pads them."""
    extractor = Extractor(tmp_path, 80, tmp_path / "cache")
    spoken = [recording(seed, 0.2 + 0.1 * seed) for seed in range(3)]
    oracle = Speech2TextFeatureExtractor()
    wanted = oracle(
        [resampled(each, 16_000) for each in spoken],
        sampling_rate=16_000,
        padding=True,
        return_tensors="np",
    )
    found = Frames.of([extractor.features(each, "") for each in spoken], range(3))
    padded = found.padded(np.arange(3), wanted["input_features"].shape[:2])
    # The extractor normalises padded rows in another order of sums.
    np.testing.assert_allclose(padded, wanted["input_features"], atol=1e-4)
    np.testing.assert_array_equal(found.lengths, wanted["attention_mask"].sum(1))


def test_the_cache_is_keyed_by_content(tmp_path, monkeypatch):
    """Features are computed once for the same samples at the same rate, and then read."""
    extractor = Extractor(tmp_path, 80, tmp_path / "cache")
    spoken = recording()
    wanted = extractor.features(spoken, "a.wav")
    calls = []
    monkeypatch.setattr(
        extractor, "computed", lambda *args: calls.append(args) or np.ones((2, 80), np.float32)
    )
    np.testing.assert_array_equal(extractor.features(spoken, "b.wav"), wanted)
    assert not calls
    extractor.features(spoken._replace(rate=RATE + 1), "a.wav")
    extractor.features(recording(1), "a.wav")
    assert len(calls) == 2


def test_a_damaged_entry_is_computed_again(tmp_path):
    """A file of the cache that was cut short is replaced."""
    extractor = Extractor(tmp_path, 80, tmp_path / "cache")
    wanted = extractor.features(recording(), "a.wav")
    (path,) = (tmp_path / "cache").glob("*.npy")
    path.write_bytes(path.read_bytes()[:200])
    np.testing.assert_array_equal(extractor.features(recording(), "a.wav"), wanted)
    np.testing.assert_array_equal(np.load(path), wanted)


def test_a_cache_of_other_settings_is_refused(tmp_path):
    """The message names the folder and the first setting that differs."""
    Extractor(tmp_path, 80, tmp_path / "cache")
    with pytest.raises(ValueError, match="features of other settings: num_mel_bins is 80, not 40"):
        Extractor(tmp_path, 40, tmp_path / "cache")
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "mine.npy", np.zeros(2))
    with pytest.raises(ValueError, match=r"no features\.json, so it is no cache"):
        Extractor(tmp_path, 80, other)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, not a folder for a cache of features"):
        Extractor(tmp_path, 80, tmp_path / "file")


def test_the_default_cache_is_that_of_the_settings(tmp_path, monkeypatch):
    """Without a folder, features of each setting have their own in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Extractor(tmp_path, 80)
    Extractor(tmp_path, 40)
    assert len(list((tmp_path / "compacter_jax").glob("features-*/features.json"))) == 2


def test_features_of_another_width_than_the_model_s(tmp_path):
    """A preprocessor_config.json that does not fit the model is refused, and another's, too."""
    path = tmp_path / speech_features.PREPROCESSOR
    Speech2TextFeatureExtractor(feature_size=40, num_mel_bins=40).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"have 40 numbers a frame .* but the model reads 80"):
        Extractor(tmp_path, 80, tmp_path / "cache")
    assert Extractor(tmp_path, 40, tmp_path / "cache").settings["num_mel_bins"] == 40
    path.write_text(json.dumps({"feature_extractor_type": "WhisperFeatureExtractor"}))
    with pytest.raises(ValueError, match="is of a 'WhisperFeatureExtractor'"):
        Extractor(tmp_path, 80, tmp_path / "cache")


def test_recordings_without_features(tmp_path):
    """Recordings that are too short, or silent, are refused by name."""
    extractor = Extractor(tmp_path, 80, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"a\.wav has 30 ms, which is too short"):
        extractor.features(recording(seconds=0.03), "a.wav")
    silence = Recording(np.zeros(RATE, np.float32), RATE)
    with pytest.raises(ValueError, match=r"a\.wav is silent"):
        extractor.features(silence, "a.wav")


def test_examples_of_one_recording_share_its_frames():
    """Examples are taken and padded by their recordings, which are stored once."""
    generator = np.random.default_rng(0)
    each = [generator.normal(size=(n, 3)).astype(np.float32) for n in (4, 2, 5)]
    frames = Frames.of(each, [2, 0, 2, 1])
    assert frames.values.shape == (11, 3)
    np.testing.assert_array_equal(frames.offsets, [0, 5, 9, 14, 16])
    taken = frames.taken(np.array([3, 0]))
    found = taken.padded(np.array([0, 1]), (3, 6))
    np.testing.assert_array_equal(found[0, :2], each[1])
    np.testing.assert_array_equal(found[1, :5], each[2])
    assert not found[0, 2:].any()
    assert not found[1, 5:].any()
    assert not found[2].any()


def test_features_are_the_same_with_torchaudio(tmp_path, monkeypatch):
    """An extractor that would take torchaudio is not asked to compute anything."""
    wanted = Extractor(tmp_path, 80, tmp_path / "cache").features(recording(), "a.wav")
    module = sys.modules[Speech2TextFeatureExtractor.__module__]
    monkeypatch.setattr(module, "is_speech_available", lambda: True)
    there = Extractor(tmp_path, 80, tmp_path / "another")
    assert not hasattr(there._extractor, "mel_filters")
    np.testing.assert_array_equal(there.features(recording(), "a.wav"), wanted)
