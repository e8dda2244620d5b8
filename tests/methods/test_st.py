"""Tests the adapters of speech translation: their layer, equations, count, start and merging."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.models.seq2seq.model import Seq2Seq
from compacter_jax.models.speech_to_text.model import SpeechToText
from tests.helpers import adapted_shapes, quick_jit, quick_key, random_tree
from tests.reference import Reference
from tests.seq2seq_models import CONFIGS, inputs_of
from tests.speech_models import (
    speech_backbone,
    speech_inputs,
    tiny_speech,
    torch_speech_config,
)
from train.__main__ import main

NAMES = ("st", "compacter-st")
SPEECH = tiny_speech(mask_between_convolutions=True)


def preset(name, **overrides):
    return cj.preset(name, **({"phm_dim": 3} if name.startswith("compacter") else {}), **overrides)


# --- the layer ------------------------------------------------------------------------------------


def layer_and_gradients(params, f, cotangent):
    """Computes `f + up(relu(down(LN f)))` and its gradients, by hand in float64 NumPy.

    The authors' code is not at hand, and no values of it were recorded: these are the equations of
    arXiv:2106.01463, section 3.2, with the norm, the activation and the biases of its adapters.
    """
    scale, offset = (params[f"layer_norm_before/{name}"] for name in ("scale", "bias"))
    down, up = params["down/kernel"], params["up/kernel"]
    centred = f - f.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normal = centred / deviation
    h = normal * scale + offset
    inner = np.maximum(h @ down + params["down/bias"], 0)
    y = f + inner @ up + params["up/bias"]
    d_inner = (cotangent @ up.T) * (inner > 0)
    dh = d_inner @ down.T
    d_normal = dh * scale
    own = d_normal - d_normal.mean(-1, keepdims=True)
    df = cotangent + (own - normal * (d_normal * normal).mean(-1, keepdims=True)) / deviation
    flat = [array.reshape(-1, array.shape[-1]) for array in (h, inner, d_inner, cotangent)]
    gradients = {
        "down/kernel": flat[0].T @ flat[2],
        "down/bias": flat[2].sum(0),
        "up/kernel": flat[1].T @ flat[3],
        "up/bias": flat[3].sum(0),
        "layer_norm_before/scale": (dh * normal).sum((0, 1)),
        "layer_norm_before/bias": dh.sum((0, 1)),
    }
    return y, gradients, df


def test_the_layer_and_its_gradients_equal_numpy():
    """The layer of `st` and all its gradients are those of NumPy to 1e-10 in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        layer = cj.Bottleneck(cj.preset("st"), param_dtype=jnp.float64)
        f, cotangent = rng.normal(size=(2, 3, 5, 14)) * 1.7 + 0.3
        shapes = jax.eval_shape(layer.init, jax.random.key(0), f)["params"]
        params = random_tree(shapes, seed=1)

        def objective(params, f):
            y = layer.apply({"params": params}, f)
            return jnp.sum(y * cotangent), y

        grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (_, y), (gradient, df) = quick_jit(grad)(params, f)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    expected, gradients, expected_df = layer_and_gradients(flat, f, cotangent)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, expected, atol=1e-10, rtol=0)
    np.testing.assert_allclose(df, expected_df, atol=1e-10, rtol=0)
    gradient = flatten_dict(gradient, sep="/")
    assert gradient.keys() == gradients.keys()
    for path, leaf in gradients.items():
        np.testing.assert_allclose(gradient[path], leaf, atol=1e-10, rtol=0, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backbone", ["speech", "m2m_100", "bart"])
def test_logits_equal_the_equations_in_float64(name, backbone):
    """On a speech model, an M2M-100 and a BART, the logits are those of NumPy to 1e-12."""
    module, inputs = Seq2Seq, None
    if backbone == "speech":
        module, inputs = SpeechToText(SPEECH), speech_inputs(SPEECH, 4, dtype=np.float64)
    else:
        module, inputs = Seq2Seq(CONFIGS[backbone]), tuple(inputs_of(CONFIGS[backbone], 4)[:3])
    module = module.clone(param_dtype=jnp.float64)
    with jax.enable_x64(True):
        model = cj.Adapted(module, preset(name))
        params = random_tree(adapted_shapes(model), seed=9)
        logits = quick_jit(lambda p: model.apply({"params": p}, *inputs))(params)
        assert logits.dtype == jnp.float64
        expected = Reference(module, model.method, params)(*inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-12 * np.abs(expected).max(), rtol=0)


# --- count and start ------------------------------------------------------------------------------


def test_the_count_of_trained_parameters(tmp_path, capsys):
    """`params` prints the table's 4.8 million, 4,750,848 at width 512 with 12 + 6 layers."""
    config = dataclasses.replace(
        tiny_speech(),
        d_model=512,
        encoder_layers=12,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
    )
    settings = json.loads(torch_speech_config(config).to_json_string(use_diff=False))
    settings["architectures"] = ["Speech2TextForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    flags = ["params", "--backbone-config", str(tmp_path), "--method", "st", "--json"]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    d, r = 512, 256
    assert (12 + 6) * (2 * d + 2 * d * r + r + d) == 4_750_848
    assert found["trained"] == found["groups"]["adapters"]["total"] == 4_750_848


def test_a_fresh_adapter_changes_logits_by_less_than_its_weights_allow():
    """The change of each logit is within the bound that norms and initial weights give.

    An adapter behind the last feed-forward network adds at most `|up| |down| sqrt(d)` to a state,
    in the 2-norm, since the norm of its own gives at most `sqrt(d)` to `down`, and a relu and zero
    biases add nothing. With c the centred state and u this bound, the last norm changes by at most
    `max |scale| u / sqrt((|c| - u)^2 / d + eps)`, and a logit by that times the largest row of the
    embeddings.
    """
    config = dataclasses.replace(SPEECH, encoder_layers=1, decoder_layers=2)
    backbone = speech_backbone(config, seed=3)
    model = cj.Adapted(backbone.module, cj.preset("st", leave_out=(0,)))
    params = cj.init_adapters(model, backbone, quick_key(5))
    places = [path for path in flatten_dict(params, sep="/") if path.endswith("adapter/up/kernel")]
    assert places == ["decoder/layers/1/fc2/adapter/up/kernel"]
    inputs = speech_inputs(config, 7)
    plain, kept = backbone.module.apply(
        {"params": backbone.params},
        *inputs,
        capture_intermediates=lambda module, _: module.path == ("decoder", "layers"),
        mutable=["intermediates"],
    )
    states = np.asarray(kept["intermediates"]["decoder"]["layers"]["__call__"][0][0])
    own, d = params["decoder"]["layers"]["1"]["fc2"]["adapter"], config.d_model
    up, down = (np.linalg.norm(own[name]["kernel"], 2) for name in ("up", "down"))
    u = up * down * np.sqrt(d)
    c = np.linalg.norm(states - states.mean(-1, keepdims=True), axis=-1)
    scale = np.abs(backbone.params["decoder"]["layer_norm"]["scale"]).max()
    rows = np.linalg.norm(backbone.params["decoder_embed_tokens"]["embedding"], axis=1).max()
    bound = rows * scale * u / np.sqrt(np.maximum(c - u, 0) ** 2 / d + 1e-5)
    changed = np.abs(model.apply({"params": params}, *inputs) - plain).max(-1)
    assert (changed <= bound).all()
    assert changed.max() > 1e-4
    assert bound.max() < 0.1 * np.abs(plain).max()


@pytest.mark.parametrize("name", NAMES)
def test_a_merge_is_refused_by_name(name):
    """The non-linearity between `down` and `up` is no weight of the backbone."""
    backbone = speech_backbone(SPEECH)
    model = cj.Adapted(backbone.module, preset(name))
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=2))
    params = unflatten_dict({**drawn, **flatten_dict(backbone.params)})
    with pytest.raises(ValueError, match="its adapters have a non-linearity, which weights"):
        cj.merge_adapter(model, params)


@pytest.mark.parametrize(
    "method", [cj.preset("lora", rank=2), cj.preset("parallel")], ids=["lora", "parallel"]
)
def test_what_can_be_merged_into_a_speech_model(method):
    """LoRA becomes weights, and a bottleneck beside feed-forward a wider network."""
    backbone = speech_backbone(SPEECH)
    model = cj.Adapted(backbone.module, method)
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=2))
    params = unflatten_dict({**drawn, **flatten_dict(backbone.params)})
    inputs = speech_inputs(SPEECH, 8)
    expected = model.apply({"params": params}, *inputs)
    merged = model.merged_module().apply({"params": cj.merge_adapter(model, params)}, *inputs)
    np.testing.assert_allclose(merged, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
