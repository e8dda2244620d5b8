"""Compares speech models with transformers' PyTorch model, and checks what is their own."""

import contextlib
import dataclasses
import functools
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.models.names import SPEECH_TO_TEXT
from compacter_jax.models.speech_to_text.checkpoint import speech_to_hugging_face
from compacter_jax.models.speech_to_text.convolutions import Convolutions, shortened
from compacter_jax.models.speech_to_text.model import SpeechToText
from compacter_jax.nn.quantize import is_quantized
from tests.helpers import mean_square, quick_jit
from tests.models.test_seq2seq import exact_sinusoids, loss_and_gradient
from tests.speech_models import (
    FRAMES,
    speech_backbone,
    speech_inputs,
    tiny_speech,
    torch_speech_model,
    torch_speech_outputs,
)
from train.compute import mesh


@contextlib.contextmanager
def torch_default_dtype(dtype):
    """Makes PyTorch create its causal mask in a dtype that holds the dtype's least number."""
    import torch

    torch.set_default_dtype(getattr(torch, np.dtype(dtype).name))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def check_against_torch(backbone, inputs, tolerance, *, exact=False):
    """Compares outputs and all gradients of the mean square, relative to the largest entry."""
    module, model = backbone.module, torch_speech_model(backbone)
    if exact:
        layers = types.SimpleNamespace(
            model_type="m2m_100",
            d_model=module.config.d_model,
            max_position_embeddings=32,
            pad_token_id=module.config.pad_token_id,
        )
        exact_sinusoids(model.double(), layers)
    with torch_default_dtype(inputs[0].dtype):
        theirs = torch_speech_outputs(model, inputs)
    mean_square(theirs).backward()
    output, gradient = loss_and_gradient(module, backbone.params, *inputs)
    for ours, expected in zip(jax.tree.leaves(output), theirs, strict=True):
        states = expected.detach().numpy()
        assert ours.dtype == states.dtype
        np.testing.assert_allclose(ours, states, atol=tolerance * np.abs(states).max(), rtol=0)
    named = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    gradient = speech_to_hugging_face(gradient, module.head)
    assert gradient.keys() == named.keys()
    largest = max(np.abs(leaf).max() for leaf in named.values())
    for name, leaf in named.items():
        # The softmax ignores the biases of keys.
        scale = largest if name.endswith("k_proj.bias") else np.abs(leaf).max()
        np.testing.assert_allclose(
            gradient[name], leaf, atol=tolerance * scale, rtol=0, err_msg=name
        )


WIDE = {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 8}


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({"tie_word_embeddings": False}, "conditional_generation"),
        ({"conv_kernel_sizes": (3, 7, 1), "input_channels": 2, "scale_embedding": False}, None),
    ],
)
def test_outputs_and_gradients_equal_pytorch_in_float64(changes, head):
    """Logits, states of both stacks and all gradients are PyTorch's to 1e-10 in float64.

    Rows have different lengths, and padding holds noise.
    """
    with jax.enable_x64(True):
        backbone = speech_backbone(tiny_speech(**changes), head)
        backbone.module = backbone.module.clone(param_dtype=jnp.float64)
        backbone.params = jax.tree.map(lambda x: np.asarray(x, np.float64), backbone.params)
        inputs = speech_inputs(backbone.module.config, 1, dtype=np.float64)
        check_against_torch(backbone, inputs, 1e-10, exact=True)


def test_logits_and_gradients_equal_pytorch_in_float32():
    """Logits and all gradients of width 64 are PyTorch's to 1e-5 in float32."""
    backbone = speech_backbone(tiny_speech(**WIDE, decoder_layers=2), seed=2)
    flat = flatten_dict(backbone.params, sep="/")
    # Random kernels of this width would make scores large, and their rounding with them.
    flat = {path: leaf * 0.4 if path.endswith("kernel") else leaf for path, leaf in flat.items()}
    backbone.params = unflatten_dict(flat, sep="/")
    check_against_torch(backbone, speech_inputs(backbone.module.config, 2), 1e-5)


@pytest.mark.parametrize("pad", [0, 3])
def test_positions_of_other_padding_tokens_are_those_of_pytorch(pad):
    """PyTorch's model compares a mask with `pad_token_id`, which is followed, or put right."""
    backbone = speech_backbone(tiny_speech(pad_token_id=pad), head=None)
    inputs = speech_inputs(backbone.module.config, 3)
    expected = torch_speech_outputs(torch_speech_model(backbone), inputs)[1].detach().numpy()

    def states(config):
        module = SpeechToText(config, head=None)
        return module.apply({"params": backbone.params}, *inputs[:2], method="encode")

    config = backbone.module.config
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(states(config), expected, atol=bound, rtol=0)
    masked = states(dataclasses.replace(config, mask_between_convolutions=True))
    # The first row has no padding, so only positions can differ.
    assert (np.abs(masked[0] - expected[0]).max() > 0.1) == (pad == 0)


# --- lengths and padding --------------------------------------------------------------------------


def test_lengths_through_the_convolutions_equal_pytorch():
    """From 1 to 40 frames, the states after the convolutions and their mask are PyTorch's.

    The values are those of each length alone, to 1e-10 in float64: as a row of a batch of all
    lengths, beyond whose end the convolutions set zeros, and alone where an end may lie within a
    kernel of stride 2 (every remainder, and shorter than the kernel).
    """
    torch = pytest.importorskip("torch")
    backbone = speech_backbone(tiny_speech())
    module, model = backbone.module, torch_speech_model(backbone)
    mask = np.tril(np.ones((40, 40), np.int64))  # row i has i + 1 frames
    theirs = model._get_feature_vector_attention_mask(10, torch.tensor(mask))
    np.testing.assert_array_equal(module.mask_of_states(mask), theirs.numpy())
    features = np.random.default_rng(0).normal(size=(40, 40, 7))
    few = (1, 2, 37, 38, 39, 40)
    with jax.enable_x64(True), torch.no_grad():
        layer = Convolutions(module.config, param_dtype=jnp.float64)
        params = jax.tree.map(np.float64, backbone.params["encoder_conv"])

        @quick_jit
        def states(params, features):
            def call(*args):
                return layer.apply({"params": params}, *args)

            alone = {length: call(features[length - 1, None, :length], None) for length in few}
            return call(features, jnp.arange(1, 41)), alone

        together, alone = states(params, features)
        assert together.dtype == np.float64
        convolutions = model.double().get_encoder().conv
        for length in range(1, 41):
            expected = convolutions(torch.tensor(features[length - 1, None, :length])).numpy()[0]
            assert shortened(length, 2) == len(expected) == int(theirs[length - 1].sum())
            found = [together[length - 1, : len(expected)]]
            found += [alone[length][0]] if length in few else []
            for ours in found:
                bound = 1e-10 * np.abs(expected).max()
                np.testing.assert_allclose(ours, expected, atol=bound, rtol=0)


def test_rows_do_not_depend_on_their_padding():
    """With `mask_between_convolutions`, a row alone has the logits that it has in a batch."""
    with jax.enable_x64(True):
        config = tiny_speech(mask_between_convolutions=True)
        backbone = speech_backbone(config)
        features, mask, ids = speech_inputs(config, 4, dtype=np.float64)
        module = backbone.module.clone(param_dtype=jnp.float64)

        @functools.partial(quick_jit, static_argnums=0)
        def logits(config, features, mask, ids):
            one = module.clone(config=config)
            return one.apply({"params": backbone.params}, features, mask, ids)

        together = logits(config, features, mask, ids)
        noisy = np.where(mask[..., None] == 0, 1e3, features)
        np.testing.assert_array_equal(logits(config, noisy, mask, ids), together)
        unmasked = dataclasses.replace(config, mask_between_convolutions=False)
        for row, frames in ((1, FRAMES[1]), (2, FRAMES[2])):
            alone = [array[row : row + 1] for array in (features[:, :frames], mask[:, :frames])]
            expected = logits(config, *alone, ids[row : row + 1])[0]
            np.testing.assert_allclose(together[row], expected, atol=1e-12 * np.abs(expected).max())
        # The same row differs where padding is read.
        differing = logits(unmasked, features, mask, ids)
        assert np.abs(differing[1] - together[1]).max() > 1e-2


def test_dropout_is_where_transformers_has_it(monkeypatch):
    """Rates and shapes of all dropouts are those that PyTorch's model has in training."""
    torch = pytest.importorskip("torch")
    rates = {"dropout": 0.25, "attention_dropout": 0.5, "activation_dropout": 0.125}
    config = tiny_speech(**rates)
    inputs = speech_inputs(config, 0)
    model, theirs = torch_speech_model(speech_backbone(config)).train(), []

    def counted(x, p=0.5, training=True, inplace=False):
        theirs.append((tuple(x.shape), p))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", counted)
    torch_speech_outputs(model, inputs)
    ours = []

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            ours.append((args[0].shape, context.module.rate))
        return next_fun(*args, **kwargs)

    module = SpeechToText(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)

    def call(params):
        return module.apply(
            params, *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)}
        )

    with nn.intercept_methods(watch):
        jax.eval_shape(call, shapes)
    assert ours == theirs


# --- weights --------------------------------------------------------------------------------------


def test_eight_bits_leave_the_convolutions_as_they_are():
    """Kernels of linear layers and embeddings are int8, and the logits hardly change."""
    backbone = speech_backbone(tiny_speech())
    small = cj.cast_frozen(backbone.params, "int8")
    for path, leaf in flatten_dict(small, sep="/").items():
        is_linear = path.endswith("kernel") and "conv" not in path
        assert is_quantized(leaf) == (is_linear or path == SPEECH_TO_TEXT.embeddings), path
    inputs = speech_inputs(backbone.module.config, 5)

    def logits(params):
        return backbone.module.apply({"params": params}, *inputs)

    expected = logits(backbone.params)
    assert np.abs(logits(small) - expected).max() < 0.05 * np.abs(expected).max()


def test_a_mesh_leaves_convolutions_whole():
    """Embeddings and kernels of layers are divided over a mesh, and convolutions are not."""
    sizes, shape = {"data": 2, "model": 2}, (4096, 4096)
    for path in (SPEECH_TO_TEXT.embeddings, "encoder/layers/0/fc1/kernel"):
        assert set(mesh.spec_of(path, shape, sizes)) == {mesh.DATA, mesh.MODEL}, path
    assert not any(mesh.spec_of("encoder_conv/conv_layers/0/kernel", (4, 8, 8), sizes))


# --- what is refused ------------------------------------------------------------------------------

BAD = {
    "kernels": ({"conv_kernel_sizes": (5, 4)}, r"conv_kernel_sizes=\[5, 4\] must be odd numbers"),
    "no kernel": ({"conv_kernel_sizes": ()}, r"conv_kernel_sizes=\[\] must be odd numbers"),
    "channels": ({"conv_channels": 7}, "conv_channels=7 is odd, and a gated linear unit halves"),
    "features": ({"input_feat_per_channel": 0}, "input_feat_per_channel=0 is not positive"),
    "heads": ({"decoder_attention_heads": 5}, "decoder_attention_heads=5 does not divide d_model"),
    "tokens": ({"forced_bos_token_id": 99}, "forced_bos_token_id=99 is not in the vocabulary"),
    "rate": ({"dropout": 1.0}, "dropout=1.0 is not a dropout rate"),
    "type": ({"model_type": "whisper"}, "unknown model_type='whisper'; it must be 'speech_to_te"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_configurations_that_cannot_be(changes, message):
    """A value that no model can have is refused by the name of its field."""
    with pytest.raises(ValueError, match=message):
        tiny_speech(**changes)


FEATURES, MASK, TARGETS = speech_inputs(tiny_speech(), 6)
INPUTS = {
    "width": ((FEATURES[..., :5], MASK), r"\(3, 29, 5\); it must be \[batch, frames, 7\], as inp"),
    "samples": ((FEATURES[..., 0], MASK), r"input_features has shape \(3, 29\); it must be"),
    "empty": ((FEATURES[:, :0], MASK[:, :0]), r"\(3, 0, 7\), so it has no frames; give at least"),
    "integers": ((np.int16(FEATURES), MASK), "dtype int16; it must be floating-point numbers"),
    "mask's length": ((FEATURES, MASK[:, :9]), r"attention_mask has shape \(3, 9\); it must have"),
    "mask's rank": ((FEATURES, MASK[0]), r"attention_mask has shape \(29,\); it must have the"),
    "floating mask": ((FEATURES, np.float32(MASK)), "attention_mask has dtype float32; it must"),
    "left": ((FEATURES, MASK[:, ::-1]), "attention_mask has 0 before 1 in row 1; padding of speec"),
}


@pytest.mark.parametrize(("inputs", "message"), INPUTS.values(), ids=INPUTS)
def test_inputs_that_do_not_fit(inputs, message):
    """Features and masks of another kind are refused in a call and in generation."""
    module = SpeechToText(tiny_speech())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, TARGETS))
    with pytest.raises(ValueError, match=message):
        cj.generate(module, {}, *inputs, max_new_tokens=2)


def test_calls_that_cannot_be():
    """A call needs targets, a head is one of two, and prompts of tokens are refused by name."""
    module = SpeechToText(tiny_speech())
    with pytest.raises(ValueError, match="decoder_input_ids are missing; give the targets"):
        module.init(jax.random.key(0), FEATURES, MASK)
    with pytest.raises(ValueError, match="unknown head 'encoder'"):
        SpeechToText(tiny_speech(), head="encoder")
    with pytest.raises(ValueError, match="reads features, to which no prompt of tokens can be add"):
        cj.Adapted(module, cj.preset("prompt-tuning-random"))
    shapes = jax.eval_shape(module.init, jax.random.key(0), FEATURES, MASK, TARGETS)
    states = jax.ShapeDtypeStruct((3, 8, 24), jnp.float32)
    for ids, mask, message in (
        (TARGETS[:2], MASK[:2], "decoder_input_ids has 2 rows, but the encoder's states"),
        (TARGETS, MASK[:, :8], r"\(3, 8\), which leaves \(3, 2\) for the encoder's states of shap"),
        (TARGETS, np.float32(MASK), "attention_mask has dtype float32; it must be integers"),
        (TARGETS, MASK[0], r"attention_mask has shape \(29,\); it must have the shape of the enco"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda p, s, ids=ids, mask=mask: module.apply(p, ids, s, mask, method="decode"),
                shapes,
                states,
            )


def test_a_jitted_call_gives_the_same():
    """Traced masks and features, whose values cannot be checked, give the same logits."""
    backbone = speech_backbone(tiny_speech(mask_between_convolutions=True))
    plain = backbone.module.apply({"params": backbone.params}, FEATURES, MASK, TARGETS)
    jitted = quick_jit(lambda p, *inputs: backbone.module.apply({"params": p}, *inputs))
    again = jitted(backbone.params, FEATURES, MASK, TARGETS)
    np.testing.assert_allclose(again, plain, atol=1e-5 * np.abs(plain).max())
    assert math.isfinite(float(plain.sum()))
