"""Compares M2M-100, mBART, BART and Marian with transformers' PyTorch models."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.models.seq2seq.checkpoint import seq2seq_to_hugging_face
from tests.helpers import mean_square, quick_jit
from tests.seq2seq_models import (
    CONFIGS,
    inputs_of,
    small_backbone,
    tiny,
    torch_model,
    torch_outputs,
)


def loss_and_gradient(module, params, *inputs):
    """Returns `output, gradient` of the mean square."""

    def loss(params):
        output = module.apply({"params": params}, *inputs)
        return mean_square(jax.tree.leaves(output)), output

    (_, output), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    return output, gradient


def exact_sinusoids(model, config):
    """Replaces the sinusoids of PyTorch's model, which are rounded to float32, by exact ones.

    They are a formula of their own here, by the definitions of the two papers.
    """
    import torch

    width, count = config.d_model, config.max_position_embeddings + 4
    if config.model_type == "m2m_100":
        half = width // 2
        table = torch.zeros(count, width, dtype=torch.float64)
        for i in range(count):
            for k in range(half):
                w = math.exp(-k * math.log(10_000) / (half - 1))
                table[i, k], table[i, half + k] = math.sin(i * w), math.cos(i * w)
        table[config.pad_token_id] = 0
        for stack in (model.get_encoder(), model.get_decoder()):
            stack.embed_positions.weights = table
    elif config.model_type == "marian":
        rows = range(config.max_position_embeddings)
        sines, cosines = (
            [[of(i / 10_000 ** (2 * k / width)) for k in range(width // 2)] for i in rows]
            for of in (math.sin, math.cos)
        )
        table = torch.cat([torch.tensor(t, dtype=torch.float64) for t in (sines, cosines)], 1)
        for stack in (model.get_encoder(), model.get_decoder()):
            stack.embed_positions.weight.data = table


def check_against_torch(backbone, inputs, tolerance, *, exact=False):
    module, params = backbone.module, backbone.params
    model = torch_model(backbone)
    if exact:
        exact_sinusoids(model.double(), module.config)
    theirs = torch_outputs(model, inputs)
    mean_square(theirs).backward()
    output, gradient = loss_and_gradient(module, params, *inputs)
    for ours, expected in zip(jax.tree.leaves(output), theirs, strict=True):
        states = expected.detach().numpy()
        assert ours.dtype == states.dtype
        np.testing.assert_allclose(ours, states, atol=tolerance * np.abs(states).max(), rtol=0)
    named = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    gradient = seq2seq_to_hugging_face(gradient, module.head)
    # A buffer in PyTorch.
    copies = {f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    assert gradient.keys() - named.keys() <= {"final_logits_bias", *copies}
    assert named.keys() <= gradient.keys()
    largest = max(np.abs(leaf).max() for leaf in named.values())
    for name, leaf in named.items():
        scale = np.abs(leaf).max()
        if name.endswith("k_proj.bias"):  # the softmax ignores it
            scale = largest
        np.testing.assert_allclose(
            gradient[name], leaf, atol=tolerance * scale, rtol=0, err_msg=name
        )


WIDE = {
    "d_model": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
}
WIDER = {
    "m2m_100": (
        {"encoder_layers": 1, "decoder_layers": 3, "tie_word_embeddings": False},
        "conditional_generation",
    ),
    "mbart": (
        {"encoder_layers": 2, "decoder_layers": 2, "activation_function": "gelu"},
        "conditional_generation",
    ),
    "bart": (
        {"encoder_layers": 3, "activation_function": "gelu", "scale_embedding": False},
        None,
    ),
    "marian": ({"encoder_layers": 2, "activation_function": "swish"}, "conditional_generation"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_pytorch_in_float64(name):
    """Of width 24, in float64, all logits and gradients are PyTorch's to 1e-10."""
    with jax.enable_x64(True):
        backbone = small_backbone(CONFIGS[name])
        backbone.module = backbone.module.clone(param_dtype=jnp.float64)
        backbone.params = jax.tree.map(lambda x: np.asarray(x, np.float64), backbone.params)
        check_against_torch(backbone, inputs_of(CONFIGS[name], 1), 1e-10, exact=True)


@pytest.mark.parametrize("name", WIDER)
def test_logits_and_gradients_equal_pytorch_in_float32(name):
    """Of width 64, in float32, all logits or states and gradients are PyTorch's to 1e-5."""
    changes, head = WIDER[name]
    backbone = small_backbone(tiny(name, **WIDE, **changes), head, seed=2)
    # Random kernels of this width would make scores large, and their rounding with them.
    flat = flatten_dict(backbone.params, sep="/")
    flat = {path: leaf * 0.4 if path.endswith("kernel") else leaf for path, leaf in flat.items()}
    backbone.params = unflatten_dict(flat, sep="/")
    check_against_torch(backbone, inputs_of(backbone.module.config, 2, (13, 11)), 1e-5)
