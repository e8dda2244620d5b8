"""Compares ModernBERT with the PyTorch implementation of transformers, and tests it by itself."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from compacter_jax.models.encoder import HEADS
from compacter_jax.models.loading import module_from_name
from compacter_jax.models.modernbert.checkpoint import modernbert_to_hugging_face
from compacter_jax.models.modernbert.config import GLOBAL, LOCAL, ModernBertConfig
from compacter_jax.models.modernbert.model import ModernBert
from compacter_jax.nn.quantize import is_quantized
from compacter_jax.nn.rotary import rotary_table
from tests.helpers import quick_jit
from tests.modernbert_models import (
    in_float64,
    inputs_of,
    modeling,
    random_config,
    small_backbone,
    tiny,
    torch_config,
    torch_model,
    torch_output,
)


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


@pytest.mark.parametrize("choice", ["first", "cls", "mean"])
def test_the_pooling_is_the_configurations_or_the_chosen_one(choice):
    """ "first" is what `classifier_pooling` says, and each choice is PyTorch's of that name."""
    pytest.importorskip("torch")
    config = tiny(classifier_pooling="mean")
    backbone, inputs = small_backbone(config, pooling=choice), inputs_of(config, 2)
    wanted = "mean" if choice == "first" else choice
    theirs = small_backbone(tiny(classifier_pooling=wanted))
    expected = torch_output(torch_model(theirs), *inputs).detach().numpy()
    np.testing.assert_allclose(apply(backbone, *inputs), expected, atol=1e-5, rtol=0)


def test_a_row_of_padding_alone_equals_pytorch():
    """Queries without a key attend to all positions equally, as in transformers 4."""
    pytest.importorskip("torch")
    if not importlib.metadata.version("transformers").startswith("4."):
        pytest.skip("transformers 5 treats such a query in another way")
    config = tiny()
    backbone, (ids, mask) = small_backbone(config, None), inputs_of(config, 4)
    mask[1] = 0
    expected = torch_output(torch_model(backbone), ids, mask).detach().numpy()
    output = apply(backbone, ids, mask).last_hidden_state
    np.testing.assert_allclose(output, expected, atol=2e-5, rtol=0)


@pytest.mark.contract
@pytest.mark.parametrize("kind", [GLOBAL, LOCAL])
def test_rotary_positions_are_those_of_transformers_up_to_the_last(kind):
    """Cosines and sines of all 8192 positions are PyTorch's, rounded angles included."""
    torch = pytest.importorskip("torch")
    if not importlib.metadata.version("transformers").startswith("4."):
        pytest.skip("the class of transformers 5 takes the kind of layers")
    config = ModernBertConfig()
    theirs = torch_config(ModernBert(config))
    theirs.rope_theta = config.rotary_base(kind)
    made = modeling().ModernBertRotaryEmbedding(theirs)
    length = config.max_position_embeddings
    expected = made(torch.zeros(1), torch.arange(length)[None])
    ours = rotary_table(length, config.head_size, config.rotary_base(kind), np.dtype("float32"))
    for own, other in zip(ours, expected, strict=True):
        half = other[0, :, : config.head_size // 2].numpy()
        # Powers differ in their last digit, which moves an angle of thousands by some 1e-4.
        np.testing.assert_allclose(own[:64], half[:64], atol=1e-5, rtol=0)
        np.testing.assert_allclose(own, half, atol=1e-3, rtol=0)


def test_tokens_beyond_the_window_are_seen_by_global_layers_alone():
    """A local layer's output does not depend on a token beyond its window, a global one's does."""
    ids = np.arange(12)[None] % 7
    other = ids.copy()
    other[0, 11] = 9
    for kind, seen in ((GLOBAL, True), (LOCAL, False)):
        backbone = small_backbone(tiny(num_hidden_layers=1, layer_types=(kind,)), None)
        one, two = (apply(backbone, x).last_hidden_state for x in (ids, other))
        changed = np.abs(one - two).max(-1)[0]
        assert (changed[:9] > 1e-4).all() == seen
        assert (changed[9:] > 1e-4).all()  # at a distance of at most half of 4
        assert seen or (changed[:9] == 0).all()


def test_padding_cannot_be_seen_and_defaults_are_no_padding_and_positions_from_zero():
    """Other tokens under padding change nothing; the defaults are ones, and 0, 1, 2, …"""
    config = tiny()
    backbone = small_backbone(config, pooling="mean")
    ids, mask = inputs_of(config, 5)
    other = np.where(mask == 1, ids, 11)
    np.testing.assert_array_equal(apply(backbone, ids, mask), apply(backbone, other, mask))
    np.testing.assert_array_equal(
        apply(backbone, ids, mask), apply(backbone, ids, mask.astype(bool))
    )
    positions = np.arange(ids.shape[1])[None]
    whole = apply(backbone, ids, np.ones_like(ids), position_ids=positions)
    np.testing.assert_allclose(apply(backbone, ids), whole, atol=1e-6, rtol=0)
    # Attention reads differences of positions alone.
    shifted = apply(backbone, ids[:, :9], position_ids=np.arange(9)[None] + 5)
    np.testing.assert_allclose(shifted, apply(backbone, ids[:, :9]), atol=1e-5, rtol=0)
    doubled = apply(backbone, ids[:, :7], position_ids=2 * np.arange(7)[None])
    assert np.abs(doubled - apply(backbone, ids[:, :7])).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.zeros((1, 17), int)}, r"17 tokens long, .*max_position_embeddings=16"),
        (
            {"token_type_ids": np.zeros((2, 5), int)},
            r"has no token types; leave token_type_ids out",
        ),
        ({"input_ids": np.full((2, 5), 19)}, r"input_ids contains 19 .*vocab_size - 1 = 18"),
        ({"position_ids": np.full((1, 5), 16)}, r"position_ids contains 16 .* = 15"),
        ({"position_ids": np.zeros((1, 4), int)}, r"position_ids has shape \(1, 4\)"),
        ({"attention_mask": np.ones((2, 4), int)}, r"attention_mask has shape \(2, 4\)"),
        ({"attention_mask": np.ones((2, 5))}, r"attention_mask has dtype float"),
    ],
)
def test_bad_inputs_are_refused(changes, message):
    """The message names the argument, its value and what is wanted."""
    module = ModernBert(tiny())
    inputs = {"input_ids": np.zeros((2, 5), int), **changes}
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), **inputs)


def test_the_mean_of_a_row_of_padding_alone_is_refused():
    """The message names the row."""
    module = ModernBert(tiny(), head="sequence_classification", pooling="mean")
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="nothing but padding in row 1"):
        module.init(jax.random.key(0), np.zeros((2, 3), int), mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4, "hidden_size": 12}, "into heads of even width"),
        ({"local_attention": 0}, "local_attention=0 is not positive"),
        ({"layer_types": (GLOBAL,)}, "layer_types has 1 entries for num_hidden_layers=2"),
        ({"layer_types": (GLOBAL, "sparse")}, "layer_types has 'sparse'; use 'full_attention'"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max' is unknown; use 'cls' or 'mean'"),
        ({"mlp_dropout": 1.0}, "mlp_dropout=1.0 is not a dropout rate"),
        ({"pad_token_id": 19}, "pad_token_id=19 is not in the vocabulary"),
        ({"hidden_activation": "gelo"}, "unknown activation 'gelo'"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    """The message names the field and what is wanted."""
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_remat_changes_nothing():
    """Gradients with recomputed layers are equal, with dropout, too."""
    config = tiny(embedding_dropout=0.1, attention_dropout=0.1, mlp_dropout=0.1)
    backbone, inputs = small_backbone(config), inputs_of(config, 6)

    def gradient(remat):
        def loss(params):
            output = backbone.module.clone(remat=remat).apply(
                {"params": params},
                *inputs,
                deterministic=False,
                rngs={"dropout": jax.random.key(4)},
            )
            return (output**2).mean()

        return quick_jit(jax.grad(loss))(backbone.params)

    plain = gradient("off")
    for a, b in zip(jax.tree.leaves(gradient("full")), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)


def test_bfloat16_and_int8_stay_near_float32():
    """Both computations are near the one in float32, with 1/256 and 1/254 of relative rounding."""
    config = tiny()
    backbone, inputs = small_backbone(config), inputs_of(config, 7)
    exact = apply(backbone, *inputs)
    bound = 12 / 256 * np.abs(exact).max()
    rough = quick_jit(backbone.module.clone(dtype=jnp.bfloat16).apply)(
        {"params": backbone.params}, *inputs
    )
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(rough), exact, atol=bound, rtol=0)
    narrow = cj.cast_frozen(backbone.params, jnp.int8)
    kernel = narrow["layers"]["1"]["attn"]["Wqkv"]["key"]["kernel"]
    assert is_quantized(kernel)
    quantised = backbone.module.apply({"params": narrow}, *inputs)
    np.testing.assert_allclose(quantised, exact, atol=bound, rtol=0)


def test_the_published_counts():
    """The counts are those of the published checkpoints, from the configuration alone."""
    counts = {
        ("answerdotai/ModernBERT-base", None): 149_014_272,
        ("answerdotai/ModernBERT-base", "masked_lm"): 149_655_232,
        ("answerdotai/ModernBERT-large", None): 394_781_696,
        ("answerdotai/ModernBERT-large", "masked_lm"): 395_881_664,
    }
    for (name, head), count in counts.items():
        module = module_from_name(name, head=head)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
