"""Saves and loads models with a compressed decoder, and refuses weights that do not fit."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax.models.loading import module_from_config
from compacter_jax.models.seq2seq.checkpoint import seq2seq_to_hugging_face
from tests.seq2seq_models import small_backbone, tiny

COMPRESSED = {"decoder_layer": "compressed", "decoder_value_dim": 36}


def saved(folder, **changes):
    """Writes a small model, and returns it."""
    transformers = pytest.importorskip("transformers")
    ours = small_backbone(tiny("m2m_100", **changes))
    fields = dataclasses.asdict(ours.module.config)
    names = {f.name for f in dataclasses.fields(ours.module.config)}
    own = {n: v for n, v in fields.items() if n in names and n != "model_type" and v is not None}
    cj.save_backbone(folder, ours.module, ours.params, transformers.M2M100Config(**own))
    return ours


def change(folder, **fields):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(settings))


def test_a_saved_model_is_loaded_again(tmp_path):
    """Configuration and weights come back as they were, with both fields in config.json."""
    ours = saved(tmp_path, **COMPRESSED)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert {name: settings[name] for name in COMPRESSED} == COMPRESSED
    loaded = cj.load_backbone(tmp_path)
    assert loaded.module.config.value_features == 36
    flat = flatten_dict(loaded.params, sep="/")
    own = flatten_dict(ours.params, sep="/")
    assert flat.keys() == own.keys()
    assert all(np.asarray(flat[p]).tobytes() == np.asarray(own[p]).tobytes() for p in own)
    names = seq2seq_to_hugging_face(ours.params)
    assert "model.decoder.layers.0.encoder_attn.encoder_v_proj.weight" in names


def test_weights_of_the_other_decoder_are_refused(tmp_path):
    """The message gives the reason why a standard decoder cannot become a compressed one."""
    saved(tmp_path / "standard")
    change(tmp_path / "standard", decoder_layer="compressed", decoder_value_dim=36)
    with pytest.raises(
        ValueError, match=r"of a standard decoder, which cannot be converted: .*two"
    ):
        cj.load_backbone(tmp_path / "standard")
    saved(tmp_path / "compressed", **COMPRESSED)
    change(tmp_path / "compressed", decoder_layer="standard", decoder_value_dim=None)
    with pytest.raises(ValueError, match="of a compressed decoder; set decoder_layer to 'compress"):
        cj.load_backbone(tmp_path / "compressed")
    change(tmp_path / "compressed", decoder_layer="thin")
    with pytest.raises(ValueError, match="decoder_layer='thin' must be"):
        cj.load_backbone(tmp_path / "compressed")


def test_a_t5_has_no_compressed_layers(tmp_path):
    """A T5's configuration with the field is refused by file and field."""
    transformers = pytest.importorskip("transformers")
    settings = {"model_type": "t5", "decoder_layer": "compressed"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config.json: decoder_layer='compressed', but only the"):
        cj.load_backbone(tmp_path)
    config = transformers.T5Config(decoder_value_dim=8)
    with pytest.raises(ValueError, match="decoder_value_dim=8, but only the encoder-decoders of"):
        module_from_config(config, head="conditional_generation")


def test_an_adapter_is_saved_and_loaded(tmp_path):
    """An adapter of a compressed decoder comes back bit for bit."""
    ours = small_backbone(tiny("m2m_100", **COMPRESSED))
    model = cj.Adapted(ours.module, cj.preset("compacter", reduction_factor=4, phm_dim=3))
    params = cj.init_adapters(model, ours, jax.random.key(0))
    cj.save_adapter(tmp_path, model, params)
    again = types.SimpleNamespace(module=ours.module, params=ours.params)
    _, loaded = cj.load_adapter(tmp_path, again)
    for one, other in zip(*map(jax.tree.leaves, (params, loaded)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_peft_knows_no_compressed_decoder(tmp_path):
    """An adapter on a compressed decoder is neither exported to PEFT nor read from it."""
    pytest.importorskip("transformers")
    standard, ours = (small_backbone(tiny("m2m_100", **fields)) for fields in ({}, COMPRESSED))
    for backbone in (standard, ours):
        model = cj.Adapted(backbone.module, cj.LoRAConfig(sites=("query",), rank=2))
        params = cj.init_adapters(model, backbone, jax.random.key(0))
        if backbone is standard:
            cj.export_peft(tmp_path, model, params)
    with pytest.raises(ValueError, match="has none with decoder_layer='compressed'"):
        cj.export_peft(tmp_path / "new", model, params)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="has none with decoder_layer='compressed'"):
        cj.import_peft(tmp_path, ours)
