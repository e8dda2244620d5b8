"""Tests the adapters of speech translation: their layer, equations, count, start and merging."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.models.seq2seq.model import Seq2Seq
from compacter_jax.models.speech_to_text.model import SpeechToText
from tests.helpers import (
    adapted_shapes,
    output_and_gradients,
    quick_jit,
    quick_key,
    random_tree,
)
from tests.reference import Reference
from tests.seq2seq_models import CONFIGS, inputs_of
from tests.speech_models import (
    speech_backbone,
    speech_inputs,
    tiny_speech,
    torch_speech_config,
)
from train.__main__ import main

RECORDED = Path(__file__).parents[1] / "recorded" / "st_layer.json"
NAMES = ("st", "compacter-st")
SPEECH = tiny_speech(mask_between_convolutions=True)


def preset(name, **overrides):
    return cj.preset(name, **({"phm_dim": 3} if name.startswith("compacter") else {}), **overrides)


# --- the layer ------------------------------------------------------------------------------------


def layer_and_gradients(params, f, cotangent):
    """Computes `f + up(relu(down(LN f)))` and its gradients, by hand in float64 NumPy.

    These are the equations of arXiv:2106.01463, section 3.2, with the norm, the activation and the
    biases of its adapters; values of the authors' code itself are in `tests/recorded`.
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


def test_the_layer_and_its_gradients_equal_the_recorded_values():
    """Compares the layer with values that the authors' code gave in float64, to 1e-10.

    They are those of the class `Adapter` of fairseq/modules/adapter.py in the GitHub repository
    deep-spin/fairseq-multi-mt (commit 20018acb5ad35ebe3ff614dfe4278781a752b32b), a copy of fairseq
    with the code and the options of "Adapters for Multilingual Speech Translation". Its layers call
    the adapter with the output of their feed-forward network as both arguments, and so did the
    recording: d = 4, half of it within, 3 rows, PyTorch in float64. Kernels are stored as JAX has
    them, and the gradients are those of the sum of output times cotangent.
    """
    recorded = json.loads(RECORDED.read_text())
    with jax.enable_x64(True):
        layer = cj.Bottleneck(cj.preset("st"), param_dtype=jnp.float64)
        weights = {path: np.array(value) for path, value in recorded["weights"].items()}
        f, cotangent = (np.array(recorded[name]) for name in ("input", "cotangent"))
        shapes = jax.eval_shape(layer.init, jax.random.key(0), f)["params"]
        assert flatten_dict(shapes, sep="/").keys() == weights.keys()
        y, found = output_and_gradients(layer, weights, f, cotangent)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, recorded["output"], atol=1e-10, rtol=0)
    wanted = recorded["gradients"]
    wanted["x"] = wanted.pop("input")
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-10, rtol=0, err_msg=path)


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


@pytest.fixture(scope="module")
def fresh():
    """Returns a configuration, the parameters of fresh adapters, and what computes with them.

    The function returns logits, the states before the decoder's last norm, and by place what each
    adapter reads and returns.
    """
    config = dataclasses.replace(SPEECH, encoder_layers=1, decoder_layers=2)
    backbone = speech_backbone(config, seed=3)
    model = cj.Adapted(backbone.module, cj.preset("st"))
    params = cj.init_adapters(model, backbone, quick_key(5))
    inputs = speech_inputs(config, 7)

    @quick_jit
    def computed(params):
        states, seen = [], {}

        def watch(next_fun, args, kwargs, context):
            after = next_fun(*args, **kwargs)
            if context.method_name == "__call__":
                if isinstance(context.module, cj.Bottleneck):
                    seen["/".join(context.module.path)] = args[0], after
                if context.module.path == ("decoder", "layers"):
                    states.append(after[0])
            return after

        with nn.intercept_methods(watch):
            logits = model.apply({"params": params}, *inputs)
        (before_the_norm,) = states
        return logits, before_the_norm, seen

    return config, params, computed


def with_adapters(params, chosen):
    """Returns the parameters, with a zero in place of `up` of every adapter not chosen."""
    return unflatten_dict(
        {
            path: 0 * leaf if path[-2:] == ("up", "kernel") and path[:-2] not in chosen else leaf
            for path, leaf in flatten_dict(params).items()
        }
    )


def test_a_fresh_adapter_changes_logits_by_less_than_its_weights_allow(fresh):
    """The change of each logit is within the bound that norms and initial weights give.

    An adapter behind the last feed-forward network adds at most `|up| |down| sqrt(d)` to a state,
    in the 2-norm, since the norm of its own gives at most `sqrt(d)` to `down`, and a relu and zero
    biases add nothing. With c the centred state and u this bound, the last norm changes by at most
    `max |scale| u / sqrt((|c| - u)^2 / d + eps)`, and a logit by that times the largest row of the
    embeddings.
    """
    config, params, computed = fresh
    plain, states, _ = computed(with_adapters(params, []))
    last = ("decoder", "layers", "1", "fc2", "adapter")
    own, d = flatten_dict(params), config.d_model
    up, down = (np.linalg.norm(own[*last, name, "kernel"], 2) for name in ("up", "down"))
    u = up * down * np.sqrt(d)
    c = np.linalg.norm(states - states.mean(-1, keepdims=True), axis=-1)
    scale = np.abs(params["decoder"]["layer_norm"]["scale"]).max()
    rows = np.linalg.norm(params["decoder_embed_tokens"]["embedding"], axis=1).max()
    bound = rows * scale * u / np.sqrt(np.maximum(c - u, 0) ** 2 / d + 1e-5)
    changed = np.abs(computed(with_adapters(params, [last]))[0] - plain).max(-1)
    assert (changed <= bound).all()
    assert changed.max() > 1e-4
    assert bound.max() < 0.1 * np.abs(plain).max()


def test_every_fresh_adapter_adds_less_than_its_weights_allow(fresh):
    """The change of each frame or token in every layer of both stacks is within its bound.

    As behind the last network, `|f' - f| <= |up| |down| sqrt(d)` with the spectral norms of the
    initial weights.
    """
    config, params, computed = fresh
    _, _, seen = computed(params)
    places = {f"{stack}/fc2/adapter" for stack in ("encoder/layers/0", "decoder/layers/0")}
    assert seen.keys() == places | {"decoder/layers/1/fc2/adapter"}
    flat = flatten_dict(params, sep="/")
    for place, (f, after) in seen.items():
        up, down = (np.linalg.norm(flat[f"{place}/{of}/kernel"], 2) for of in ("up", "down"))
        bound, size = up * down * np.sqrt(config.d_model), np.linalg.norm(f, axis=-1)
        added = np.linalg.norm(np.float64(after) - np.float64(f), axis=-1)
        assert (added <= bound + 1e-6 * size).all(), place  # the sum is rounded to float32
        assert added.max() > 0.1 * bound > 1e-5 * size.max(), place


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
