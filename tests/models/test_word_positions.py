"""Logits of chosen tokens alone, in every encoder with a head for masked words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from tests.encoder_models import in_float64, small_encoder
from tests.helpers import backbone_of
from tests.modernbert_models import tiny

BERT = cj.BertConfig(
    vocab_size=23,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=14,
    max_position_embeddings=20,
)
NAMES = ("bert", "electra", "modernbert")


def backbone_for_words(name):
    if name == "bert":
        return backbone_of(cj.Bert(BERT, head="masked_lm"))
    if name == "modernbert":
        return backbone_of(cj.ModernBert(tiny(), head="masked_lm"))
    return small_encoder(name, "masked_lm", num_hidden_layers=2)


def inputs():
    """Returns ids, a mask with padding, and positions; some repeat, and some are padding."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(5, 19, (3, 9)))
    mask = jnp.asarray(np.arange(9) < np.array([[9], [4], [1]])).astype(jnp.int32)
    return ids, mask, jnp.asarray(rng.integers(0, 9, (3, 4))).at[0, :2].set(5)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), ours, theirs)


def losses(apply, positions):
    """Returns two functions of parameters: of the chosen logits, and of all, then chosen."""

    def chosen(params):
        return jnp.sin(apply(params, word_positions=positions)).sum()

    def of_all(params):
        logits = apply(params)
        return jnp.sin(jnp.take_along_axis(logits, positions[:, :, None], 1)).sum()

    return chosen, of_all


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_all_tokens(name):
    """The logits of chosen tokens and the gradients through them, to 1e-10 in float64."""
    ids, mask, positions = inputs()
    with jax.enable_x64(True):
        backbone = in_float64(backbone_for_words(name))

        def apply(params, **given):
            return backbone.module.apply({"params": params}, ids, mask, **given)

        assert apply(backbone.params, word_positions=positions).shape[:2] == positions.shape
        found, wanted = (
            jax.jit(jax.value_and_grad(loss))(backbone.params) for loss in losses(apply, positions)
        )
        assert_close(found, wanted)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("prompt-tuning-random", {"prompt_length": 3}),
        ("compacter++", {"reduction_factor": 3, "phm_dim": 2}),
        ("mad-x", {}),
    ],
)
def test_positions_do_not_count_what_a_prompt_adds(method, settings):
    """With a prompt in front or adapters, position 0 is the first token of the input."""
    ids, mask, positions = inputs()
    with jax.enable_x64(True):
        backbone = in_float64(backbone_for_words("bert"))
        model = cj.Adapted(backbone.module, cj.preset(method, **settings), param_dtype=jnp.float64)
        params = cj.init_adapters(model, backbone, jax.random.key(1))
        params = jax.tree.map(
            lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
        )

        def apply(params, **given):
            return model.apply({"params": params}, ids, mask, **given)

        found, wanted = (
            jax.jit(jax.value_and_grad(loss))(params) for loss in losses(apply, positions)
        )
        assert_close(found, wanted)


@pytest.mark.parametrize(
    ("head", "positions", "message"),
    [
        ("masked_lm", np.zeros((2, 4), int), r"word_positions has shape \(2, 4\); .* \(3, k\)"),
        ("masked_lm", np.zeros(3, int), r"word_positions has shape \(3,\)"),
        ("masked_lm", np.full((3, 1), 9), "word_positions contains 9 at"),
        ("masked_lm", np.full((3, 1), -1), "word_positions contains -1 at"),
        (None, np.zeros((3, 1), int), "word_positions is for head='masked_lm', not for head=None"),
    ],
)
def test_positions_that_cannot_be(head, positions, message):
    """Positions beyond the sequence, of another batch, or for another head are refused."""
    ids, mask, _ = inputs()
    module = cj.Bert(BERT, head=head)
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), ids, mask, word_positions=jnp.asarray(positions))
