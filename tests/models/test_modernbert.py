"""Compares ModernBERT with the PyTorch implementation of transformers, and tests it by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax.models.bert.config import HEADS
from compacter_jax.models.modernbert.checkpoint import modernbert_to_hugging_face
from compacter_jax.models.modernbert.config import GLOBAL, LOCAL, ModernBertConfig
from compacter_jax.models.modernbert.model import ModernBert
from compacter_jax.nn.rotary import rotary_table
from tests.helpers import quick_jit
from tests.modernbert_models import (
    in_float64,
    inputs_of,
    random_config,
    small_backbone,
    tiny,
    torch_model,
    torch_output,
)

NAMES = ("ids", "mask")


def apply(backbone, *inputs, **named):
    run = quick_jit(lambda params: backbone.module.apply({"params": params}, *inputs, **named))
    return run(backbone.params)


def loss_and_gradient(backbone, *inputs):
    """Returns the output and the gradient of its mean square."""

    def loss(params):
        (output,) = jax.tree.leaves(backbone.module.apply({"params": params}, *inputs))
        return (output**2).mean(), output

    (_, output), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(backbone.params)
    return output, gradient


def check_against_torch(backbone, model, inputs, tolerance):
    theirs = torch_output(model, *inputs)
    (theirs**2).mean().backward()
    output, gradient = loss_and_gradient(backbone, *inputs)
    expected = theirs.detach().numpy()
    assert output.dtype == expected.dtype
    np.testing.assert_allclose(output, expected, atol=tolerance * np.abs(expected).max(), rtol=0)
    named = {name: p.grad.numpy() for name, p in model.named_parameters()}
    gradient = modernbert_to_hugging_face(gradient)
    assert gradient.keys() == named.keys()
    largest = max(np.abs(leaf).max() for leaf in named.values())
    assert largest > 1e-2, "the comparison of gradients would be empty"
    for name, leaf in named.items():
        scale = max(np.abs(leaf).max(), 1e-2 * largest)
        np.testing.assert_allclose(
            gradient[name], leaf, atol=tolerance * scale, rtol=0, err_msg=name
        )


@pytest.mark.parametrize("seed", range(10))
def test_logits_and_gradients_equal_pytorch_in_float32(seed):
    """Logits and all gradients of every head are PyTorch's to 1e-5, beyond the local window."""
    config = random_config(seed, tie_word_embeddings=seed != 3)
    head = HEADS[seed % len(HEADS)]
    backbone = small_backbone(config, head, seed, num_labels=1 + seed % 3)
    check_against_torch(backbone, torch_model(backbone), inputs_of(config, seed), 1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_logits_and_gradients_equal_pytorch_in_float64(head):
    """Both agree to 1e-10 in float64, where PyTorch's softmax and angles are float64, too."""
    pytest.importorskip("torch")
    config = random_config(20, num_hidden_layers=3, global_attn_every_n_layers=2)
    with jax.enable_x64(True), in_float64(config):
        backbone = small_backbone(config, head)  # PyTorch's model takes values of float32
        backbone.module = backbone.module.clone(param_dtype=jnp.float64)
        backbone.params = jax.tree.map(lambda x: np.asarray(x, np.float64), backbone.params)
        model = torch_model(backbone).double()
        check_against_torch(backbone, model, inputs_of(config, 20), 1e-10)
