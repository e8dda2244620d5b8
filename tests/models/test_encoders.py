"""Compares RoBERTa, ELECTRA and DistilBERT with transformers' PyTorch models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from tests.encoder_models import (
    CONFIGS,
    HEADS,
    SETS,
    check_against_torch,
    in_float64,
    inputs_of,
    module_of,
    small_encoder,
    torch_model,
    torch_outputs,
)
from tests.helpers import adapted_shapes

CASES = [(name, head) for name in SETS for head in HEADS]
# The relatives have the same modules: one head of each shows what their configurations change.
RELATIVES = [("xlm-roberta", "token_classification"), ("camembert", "masked_lm")]
WIDE = {"hidden_size": 40, "num_attention_heads": 5}


@pytest.mark.parametrize(("name", "head"), CASES + RELATIVES)
def test_outputs_and_gradients_equal_pytorch_in_float64(name, head):
    """Logits or states and all gradients are PyTorch's to 1e-10 in float64."""
    with jax.enable_x64(True):
        backbone = in_float64(small_encoder(name, head, seed=1))
        check_against_torch(backbone, inputs_of(CONFIGS[name], 1), 1e-10, exact=True)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_outputs_and_gradients_equal_pytorch_in_float32(name, head):
    """Logits or states and all gradients of width 40 are PyTorch's to 1e-5 in float32."""
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


# --- training -----------------------------------------------------------------------------------

RATES = {
    "roberta": {
        "hidden_dropout_prob": 0.25,
        "attention_probs_dropout_prob": 0.5,
        "classifier_dropout": 0.125,
    },
    "distilbert": {
        "dropout": 0.25,
        "attention_dropout": 0.5,
        "qa_dropout": 0.125,
        "seq_classif_dropout": 0.0625,
    },
}
RATES["electra"] = RATES["roberta"]


@pytest.mark.parametrize("head", ["sequence_classification", "question_answering"])
@pytest.mark.parametrize("name", SETS)
def test_dropout_is_where_transformers_has_it(name, head, monkeypatch):
    """Rates of all dropouts, and their shapes where all states are computed, are PyTorch's."""
    torch = pytest.importorskip("torch")
    backbone = small_encoder(name, head, **RATES[name])
    module, inputs = backbone.module, inputs_of(CONFIGS[name], 0)
    model, theirs, ours = torch_model(backbone).train(), [], []

    def counted(x, p=0.5, training=True, inplace=False):
        theirs.append((tuple(x.shape), p))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", counted)
    torch_outputs(model, inputs)

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            ours.append((args[0].shape, context.module.rate))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda p: module.apply(
                {"params": p}, *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)}
            ),
            backbone.params,
        )
    if head == "sequence_classification":  # the last layer computes the first token's state alone
        theirs, ours = ([rate for _, rate in each] for each in (theirs, ours))
    assert ours == theirs


@pytest.mark.parametrize("name", SETS)
def test_remat_finds_the_same_sites(name):
    """Adapters in recomputed layers, and on the embeddings, have the same parameters."""
    method = cj.CombinedConfig(
        parts=(
            cj.PrefixTuningConfig(prefix_length=2, bottleneck_size=3),
            cj.BottleneckConfig(
                sites=("residual_feed_forward", "encoder_embedding"), reduction_factor=2
            ),
        )
    )
    module = module_of(name)
    plain = adapted_shapes(cj.Adapted(module, method))
    again = adapted_shapes(cj.Adapted(module.clone(remat="full"), method))
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    assert plain["embeddings"]["adapter"]["down"]["kernel"].shape == (12, 6)
