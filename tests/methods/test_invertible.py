"""Tests invertible adapters: their equations, their inverse, their sites, mixtures and messages."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.methods.invertible import Invertible
from tests.helpers import (
    IDS,
    MASK,
    ONE_LAYER,
    WIDTH,
    adapted_shapes,
    backbone_of,
    quick_jit,
    random_tree,
)

CONFIG = cj.InvertibleConfig()
BOTH_SITES = ("embeddings", "encoder/layer/0/output")


def numpy_half(own, x):
    hidden = np.maximum(x @ own["down"]["kernel"] + own["down"]["bias"], 0)
    return hidden @ own["up"]["kernel"] + own["up"]["bias"]


@functools.cache
def members(count=4, width=10):
    """Returns the parameters of some random adapters, in float64."""
    shapes = jax.eval_shape(Invertible(CONFIG).init, jax.random.key(0), jnp.ones((1, width)))
    return [random_tree(shapes["params"], seed=seed) for seed in range(count)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 5e-2)])
def test_the_coupling_is_that_of_nice(dtype, tolerance):
    """Halves `y1 = e1 + F(e2)`, `y2 = e2 + G(y1)`, computed by NumPy in float64."""
    x = np.random.default_rng(0).standard_normal((2, 3, 10))
    for params in members():
        own = jax.tree.map(np.float64, params)
        first = x[..., :5] + numpy_half(own["f"], x[..., 5:])
        expected = np.concatenate([first, x[..., 5:] + numpy_half(own["g"], first)], -1)
        layer = Invertible(CONFIG, dtype=jnp.dtype(dtype))
        actual = layer.apply({"params": params}, jnp.asarray(x, dtype))
        assert actual.dtype == dtype
        np.testing.assert_allclose(
            np.float64(actual), expected, rtol=0, atol=tolerance * np.abs(expected).max()
        )


def test_the_inverse_follows_every_adapter():
    """Inverse after forward and forward after inverse are the identity, to 1e-6 in float32."""
    layer, x = Invertible(CONFIG), np.random.default_rng(1).standard_normal((2, 3, 10))
    x = np.float32(x)
    for params in members():
        own = {"params": params}
        there = layer.apply(own, x)
        assert np.abs(there - x).max() > 0.1
        back = layer.apply(own, there, method=Invertible.inverse)
        np.testing.assert_allclose(back, x, rtol=0, atol=1e-6 * np.abs(there).max())
        again = layer.apply(own, layer.apply(own, x, method=Invertible.inverse))
        np.testing.assert_allclose(again, x, rtol=0, atol=1e-6 * np.abs(there).max())


def model_of(method, head="masked_lm", seed=0):
    """Returns a model on a BERT of one layer, and its random parameters."""
    backbone = backbone_of(cj.Bert(ONE_LAYER, head=head), 1)
    model = cj.Adapted(backbone.module, method)
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=seed))
    return backbone, model, unflatten_dict({**drawn, **flatten_dict(backbone.params)})


def run(model, params, *inputs, **kwargs):
    return quick_jit(lambda p: model.apply({"params": p}, *inputs, **kwargs))(params)


def test_masked_words_go_through_the_inverse():
    """The logits are those of the backbone that reads adapted states and inverted ones."""
    backbone, model, params = model_of(CONFIG)
    own = params["embeddings"]["adapter"]
    layer = Invertible(CONFIG)

    def by_hand(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name == "__call__" and path == "embeddings":
            return layer.apply({"params": own}, y)
        if context.method_name == "__call__" and path == "cls/predictions/transform":
            return layer.apply({"params": own}, y, method=Invertible.inverse)
        return y

    with nn.intercept_methods(by_hand):
        expected = backbone.module.apply({"params": backbone.params}, IDS, MASK)
    actual = run(model, params, IDS, MASK)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    plain = backbone.module.apply({"params": backbone.params}, IDS, MASK)
    assert np.abs(plain - actual).max() > 0.05
    without = cj.Adapted(backbone.module, CONFIG.replace(sites=("encoder_embedding",)))
    assert np.abs(run(without, params, IDS, MASK) - actual).max() > 0.05


def test_gradients_reach_both_directions():
    """The gradients of masked words are those of central differences in float64."""
    _, model, params = model_of(CONFIG)
    trained, frozen = cj.partition(params, cj.label_params(params, CONFIG))
    target = np.random.default_rng(2).standard_normal((*IDS.shape, ONE_LAYER.vocab_size))

    def loss(trained):
        logits = model.apply({"params": cj.merge(trained, frozen)}, IDS, MASK)
        return (logits * target).sum() / target.size

    with jax.enable_x64(True):
        trained, frozen = jax.tree.map(jnp.float64, (trained, frozen))
        slopes = jax.grad(loss)(trained)
        leaves, structure = jax.tree.flatten(trained)
        assert len(leaves) == 8
        for i, slope in enumerate(jax.tree.leaves(slopes)):
            direction = np.random.default_rng(i).standard_normal(slope.shape)
            ends = [
                loss(
                    structure.unflatten([*leaves[:i], leaves[i] + s * direction, *leaves[i + 1 :]])
                )
                for s in (1e-5, -1e-5)
            ]
            expected = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose((slope * direction).sum(), expected, rtol=1e-6, atol=1e-9)


def test_members_are_mixed_behind_the_embeddings():
    """One-hot weights give the single adapter; equal ones give the mean of the outputs."""
    method = cj.preset("mad-x")
    backbone, model, first = model_of(method, head="token_classification", seed=3)
    second = model_of(method, head="token_classification", seed=4)[2]
    singles = [(model, first), (model, second)]
    bank, params = cj.stack_adapters(singles, backbone=backbone)
    sites = cj.mixing_sites(params)
    assert sites == ("classifier", *BOTH_SITES)
    for number, (_, own) in enumerate(singles):
        weights = np.eye(2, dtype=np.float32)[[number] * len(IDS)]
        actual = run(bank, params, IDS, MASK, mix=weights)
        np.testing.assert_allclose(actual, run(model, own, IDS, MASK), rtol=0, atol=1e-5)
        routed = run(bank, params, IDS, MASK, adapter_ids=np.full(len(IDS), number))
        np.testing.assert_allclose(routed, actual, rtol=0, atol=1e-5)
    bare = run(bank, params, IDS, MASK, adapter_ids=np.full(len(IDS), -1))
    plain = backbone.module.apply({"params": backbone.params}, IDS, MASK)
    np.testing.assert_allclose(bare, plain, rtol=0, atol=1e-5)


def test_a_bank_inverts_what_it_mixes():
    """Rows of one member get its masked words; a row without a member the backbone's."""
    backbone, model, first = model_of(CONFIG, seed=5)
    singles = [first, model_of(CONFIG, seed=6)[2]]
    bank, params = cj.stack_adapters([(model, own) for own in singles], backbone=backbone)
    rows = [np.tile(array[:1], (3, 1)) for array in (IDS, MASK)]
    actual = run(bank, params, *rows, adapter_ids=np.array([1, -1, 0]))
    for row, own in ((0, singles[1]), (2, singles[0])):
        expected = run(model, own, *(array[row : row + 1] for array in rows))
        np.testing.assert_allclose(actual[row : row + 1], expected, rtol=0, atol=1e-5)
    plain = backbone.module.apply({"params": backbone.params}, *(a[:1] for a in rows))
    np.testing.assert_allclose(actual[1:2], plain, rtol=0, atol=1e-5)
    mixed = run(bank, params, *rows, mix=np.eye(2, dtype=np.float32)[[1, 0, 0]])
    np.testing.assert_allclose(mixed[::2], actual[::2], rtol=0, atol=1e-5)


def test_what_cannot_be_halved_or_inverted_is_refused():
    with pytest.raises(ValueError, match="whose width of 13 is odd"):
        Invertible(CONFIG).init(jax.random.key(0), jnp.ones((1, 13)))
    with pytest.raises(ValueError, match=r"reduction_factor=7 leaves nothing .* use at most 6"):
        CONFIG.replace(reduction_factor=7).hidden_width(WIDTH)
    with pytest.raises(ValueError, match="name both"):
        cj.InvertibleConfig(sites=("vocabulary",))
    with pytest.raises(ValueError, match="coupling='glow'"):
        cj.InvertibleConfig(coupling="glow")
    with pytest.raises(ValueError, match="cannot act at site 'attention'"):
        adapted_shapes(cj.Adapted(cj.Bert(ONE_LAYER), CONFIG.replace(sites=("attention",))))
    _, model, params = model_of(CONFIG)
    with pytest.raises(ValueError, match="adds more than weights"):
        cj.merge_adapter(model, params)
