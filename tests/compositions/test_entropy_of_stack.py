"""Tests weights of the least entropy for a task on a bank of languages: gradients, and falls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from tests.helpers import ONE_LAYER, adapted_shapes, backbone_of, random_tree

MEMBERS, LENGTH = 3, 5


@pytest.fixture(scope="module")
def stacked():
    """Returns a tagger on a bank of three languages with an invertible adapter, and parameters."""
    backbone = backbone_of(cj.Bert(ONE_LAYER, head="token_classification", num_labels=4), 1)
    bank = cj.Bank(cj.preset("mad-x"), size=MEMBERS)
    method = cj.Stack(bank, cj.preset("pfeiffer-feed-forward", reduction_factor=2))
    model = cj.Adapted(backbone.module, method)
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=2), sep="/")
    drawn["adapters/0/occupied"] = jnp.ones(MEMBERS, bool)
    params = unflatten_dict({**drawn, **flatten_dict(backbone.params, sep="/")}, sep="/")
    return model, params


def inputs_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, ONE_LAYER.vocab_size, (rows, LENGTH))
    lengths = rng.integers(2, LENGTH + 1, rows)
    return ids, (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)


def logits_of(model, params, mix, ids, mask):
    return model.apply({"params": params}, ids[None], mask[None], mix=mix[None])[0]


def minimized(stacked, ids, mask, **settings):
    model, params = stacked
    function = jax.tree_util.Partial(functools.partial(logits_of, model), params)
    sites = len(cj.mixing_sites(params))
    return cj.minimize_entropy(function, MEMBERS, ids, mask, mask=mask, sites=sites, **settings)


def mean_entropy(logits, mask):
    log_chances = jax.nn.log_softmax(logits)
    return (-(jnp.exp(log_chances) * log_chances).sum(-1) * mask).sum() / mask.sum()


def test_the_gradient_is_that_of_finite_differences(stacked):
    """One step in float64 moves the scores along the central differences of the entropy, to 1e-6.

    The scores follow from the weights, since the gradient of scores sums to 0 at each site.
    """
    model, params = stacked
    sites, (ids, mask), rate, step = len(cj.mixing_sites(params)), inputs_of(2), 0.5, 1e-5
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda leaf: jnp.float64(leaf) if leaf.dtype == jnp.float32 else leaf, params
        )
        found = minimized((model, params), ids, mask, steps=1, learning_rate=rate)
        assert found.weights.dtype == jnp.float64
        logs = np.log(found.weights)
        slopes = -(logs - logs.mean(-1, keepdims=True)) / rate
        moves = np.eye(sites * MEMBERS).reshape(-1, sites, MEMBERS)

        @jax.jit
        @jax.vmap
        def entropy_of(scores):
            logits = jax.vmap(functools.partial(logits_of, model, params, jax.nn.softmax(scores)))
            return jax.vmap(mean_entropy)(logits(ids, mask), mask)

        ends = entropy_of(np.concatenate([step * moves, -step * moves]))
        expected = (ends[: len(moves)] - ends[len(moves) :]).T / (2 * step)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(slopes.reshape(2, -1), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def small_step(stacked):
    """Returns 100 random sentences, and what one small step finds for them."""
    ids, mask = inputs_of(100, seed=3)
    return ids, mask, minimized(stacked, ids, mask, steps=1, learning_rate=1e-3)


def test_a_small_step_lowers_the_entropy_of_every_sentence(small_step):
    """With a learning rate of 1e-3 the entropy falls on each of 100 random sentences."""
    _, _, found = small_step
    assert found.entropies.shape == (100, 2)
    falls = np.float64(found.entropies[:, 0]) - np.float64(found.entropies[:, 1])
    # A rise within the rounding of float32 would be none.
    assert (falls > 0).sum() >= 95
    assert (falls > -1e-6).all()


def test_weights_and_logits_belong_together(stacked, small_step):
    """A call with the found weights returns the logits that were found, rows apart and together."""
    ids, mask, found = small_step
    model, params = stacked
    rows = slice(0, 2)
    call = {"params": params}, ids[rows], mask[rows]
    np.testing.assert_allclose(
        model.apply(*call, mix=found.weights[rows]), found.logits[rows], atol=1e-5
    )
    equal = minimized(stacked, ids[rows], mask[rows], steps=0, learning_rate=1.0)
    weights = np.full((1, *found.weights.shape[1:]), 1 / MEMBERS, np.float32)
    np.testing.assert_allclose(equal.weights, np.broadcast_to(weights, equal.weights.shape))
    np.testing.assert_allclose(model.apply(*call, mix=weights), equal.logits, atol=1e-6)
    assert equal.entropies.shape == (2, 1)


def products(jaxpr):
    """Yields the shapes of the results of all matrix products in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


def test_no_parameter_has_a_gradient(stacked):
    """No product of the steps has the shape of a kernel, as the gradient of one would have."""
    model, params = stacked
    ids, mask = inputs_of(4)
    kernels = {leaf.shape[-2:] for leaf in jax.tree.leaves(params) if leaf.ndim >= 2}

    def of_weights(params):
        return minimized((model, params), ids, mask, steps=2, learning_rate=1.0)

    def of_params(params):
        return jax.grad(lambda params: of_weights(params).logits.sum(), allow_int=True)(params)

    def gradients(function):
        made = products(jax.make_jaxpr(function)(params).jaxpr)
        return [shape for shape in made if shape[-2:] in kernels]

    assert gradients(of_weights) == []
    assert len(gradients(of_params)) > 5
