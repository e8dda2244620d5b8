"""Compares RoBERTa, ELECTRA and DistilBERT with transformers' PyTorch models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.encoder_models import (
    CONFIGS,
    HEADS,
    SETS,
    check_against_torch,
    in_float64,
    inputs_of,
    module_of,
    small_encoder,
)

CASES = [(name, head) for name in SETS for head in HEADS]
# The relatives have the same modules: one head of each shows what their configurations change.
RELATIVES = [("xlm-roberta", "token_classification"), ("camembert", "masked_lm")]
WIDE = {"hidden_size": 40, "num_attention_heads": 5, "num_hidden_layers": 2}


@pytest.mark.parametrize(("name", "head"), CASES + RELATIVES)
def test_outputs_and_gradients_equal_pytorch_in_float64(name, head):
    """Logits or states and all gradients are PyTorch's to 1e-10 in float64."""
    with jax.enable_x64(True):
        backbone = in_float64(small_encoder(name, head, seed=1))
        check_against_torch(backbone, inputs_of(CONFIGS[name], 1), 1e-10, exact=True)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_outputs_and_gradients_equal_pytorch_in_float32(name, head):
    """Logits or states and all gradients of two layers are PyTorch's to 1e-5 in float32."""
    backbone = small_encoder(name, head, seed=2, **WIDE)
    check_against_torch(backbone, inputs_of(backbone.module.config, 2, 13), 1e-5)


@pytest.mark.parametrize("name", SETS)
def test_an_untied_head_equals_pytorch(name):
    """The logits of masked words may have a kernel of their own."""
    with jax.enable_x64(True):
        backbone = in_float64(small_encoder(name, "masked_lm", seed=3, tie_word_embeddings=False))
        check_against_torch(backbone, inputs_of(CONFIGS[name], 3), 1e-10, exact=True)


def test_positions_count_the_tokens_after_the_padding_id():
    """Token j of a row that is not padding has the position p + j, and padding has p."""
    module = module_of("camembert")
    ids = jnp.array([[3, 3, 7, 8, 3, 9], [5, 6, 7, 3, 3, 3]])
    expected = [[3, 3, 4, 5, 3, 6], [4, 5, 6, 3, 3, 3]]
    np.testing.assert_array_equal(module.positions(ids), expected)
    backbone = small_encoder("camembert")
    given = [
        backbone.module.apply({"params": backbone.params}, ids, position_ids=each)
        for each in (None, jnp.array(expected))
    ]
    np.testing.assert_array_equal(*(output.last_hidden_state for output in given))


BAD_INPUTS = {
    "roberta": (
        ({"input_ids": (1, 14)}, "14 tokens .*=15, of which the first 2 are of no token; truncate"),
        (
            {"token_type_ids": 1},
            "contains 1 at .* model_type='roberta' with one token type does not tell",
        ),
        ({"position_ids": 15}, "position_ids contains 15"),
    ),
    "electra": (
        ({"input_ids": (1, 16)}, "16 tokens long, .*=15; truncate to 15"),
        (
            {"token_type_ids": 2},
            "token_type_ids contains 2 at .*; use 0 to type_vocab_size - 1 = 1",
        ),
    ),
    "distilbert": (
        ({"input_ids": (1, 16)}, "16 tokens long, .*=15; truncate to 15"),
        ({"token_type_ids": 0}, "given, but a model of model_type='distilbert' has no token types"),
    ),
}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [(name, *case) for name, cases in BAD_INPUTS.items() for case in cases],
)
def test_inputs_that_cannot_be(name, given, message):
    """Too long rows, and token types and positions that the model lacks, are refused by name."""
    module = module_of(name)
    shape = given.pop("input_ids", (1, 5))
    arrays = {field: np.full(shape, value) for field, value in given.items()}
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), np.ones(shape, int), **arrays)


def test_the_longest_input_is_what_is_left_after_the_padding():
    """A RoBERTa with 15 positions and padding 1 reads 13 tokens."""
    module = module_of("roberta")
    jax.eval_shape(module.init, jax.random.key(0), np.ones((1, 13), int))
    assert module.config.max_positions == 13
