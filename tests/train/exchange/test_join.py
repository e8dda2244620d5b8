"""Tests backbones of the encoder of one checkpoint and the decoder of another."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from tests.parallel_data import SIZES
from tests.speech_data import speech_flags, write_speech_model, write_split
from tests.train.cli.test_cli import refusal
from train.exchange.join import join_backbones


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns the folders of a recogniser and of a text model of the same width."""
    folder = tmp_path_factory.mktemp("two")
    speech = write_speech_model(folder, seed=3)
    return speech, folder / "m2m"


def test_each_half_is_what_it_was(folders, tmp_path):
    """The encoder computes as in the one checkpoint, the decoder as in the other."""
    speech, text = folders
    join_backbones(str(speech), str(text), tmp_path / "joined")
    joined = cj.load_backbone(tmp_path / "joined", head="auto")
    recogniser, translator = (cj.load_backbone(path, head="auto") for path in (speech, text))
    assert joined.module.config.mask_between_convolutions
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
