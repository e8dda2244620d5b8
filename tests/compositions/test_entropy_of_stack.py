"""Tests weights of the least entropy for a task on a bank of languages: gradients, and falls."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from tests.helpers import ONE_LAYER, adapted_shapes, backbone_of, random_tree

MEMBERS, LENGTH, RATE = 3, 5, 1e-3


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


@pytest.fixture(scope="module")
def small_step(stacked):
    """Returns 100 random sentences, float64 parameters, and what one small step finds."""
    model, params = stacked
    ids, mask = inputs_of(100, seed=3)
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda leaf: jnp.float64(leaf) if leaf.dtype == jnp.float32 else leaf, params
        )
        found = minimized((model, params), ids, mask, steps=1, learning_rate=RATE)
        return ids, mask, params, jax.device_get(found)


def test_the_gradient_is_that_of_finite_differences(stacked, small_step):
    """One step in float64 moves the scores along the central differences of the entropy, to 1e-6.

    The scores follow from the weights, since the gradient of scores sums to 0 at each site.
    """
    model, _ = stacked
    (ids, mask, params, found), step = small_step, 1e-5
    ids, mask, sites = ids[:2], mask[:2], len(cj.mixing_sites(params))
    assert found.weights.dtype == np.float64
    logs = np.log(found.weights[:2])
    slopes = -(logs - logs.mean(-1, keepdims=True)) / RATE
    with jax.enable_x64(True):
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


def test_a_small_step_lowers_the_entropy_of_every_sentence(small_step):
    """With a learning rate of 1e-3 the entropy falls on each of 100 random sentences."""
    entropies = small_step[-1].entropies
    assert entropies.shape == (100, 2)
    assert (entropies[:, 1] < entropies[:, 0]).all()


def test_weights_and_logits_belong_together(stacked):
    """A call with the found weights returns the found logits; without a step these are equal."""
    model, params = stacked
    ids, mask = inputs_of(2, seed=4)
    apply = jax.jit(lambda mix: model.apply({"params": params}, ids, mask, mix=mix))
    found = minimized(stacked, ids, mask, steps=2, learning_rate=3.0)
    assert np.abs(found.weights - 1 / MEMBERS).max() > 1e-2
    np.testing.assert_allclose(apply(found.weights), found.logits, atol=1e-5)
    none = minimized(stacked, ids, mask, steps=0, learning_rate=3.0)
    weights = np.full(found.weights.shape, 1 / MEMBERS, np.float32)
    np.testing.assert_allclose(none.weights, weights, rtol=1e-6)
    np.testing.assert_allclose(apply(weights), none.logits, atol=1e-6)
    np.testing.assert_allclose(none.entropies[:, 0], found.entropies[:, 0], atol=1e-6)
    assert none.entropies.shape == (2, 1)


def products(jaxpr):
    """Yields the shapes of the results of all matrix products in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                program = getattr(inner, "jaxpr", inner)
                if hasattr(program, "eqns"):
                    yield from products(program)


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


def products_of_loops(text):
    """Returns the number of products in the bodies of a compiled program's loops, inner ones aside.

    Products of a computation that a body calls, such as a fusion, count as well.
    """
    computations, name = {}, ""
    for line in text.splitlines():
        if (head := re.match(r"(?:ENTRY )?%([\w.-]+) \(", line)) is not None:
            name = head[1]
        computations.setdefault(name, []).append(line)

    def count(name):
        lines = [line for line in computations[name] if " while(" not in line]
        called = re.findall(r"(?:calls|to_apply)=%([\w.-]+)", "\n".join(lines))
        return sum(" dot(" in line for line in lines) + sum(map(count, called))

    return max(map(count, re.findall(r" while\(.*body=%([\w.-]+)", text)), default=0)


def test_layers_below_the_first_mixture_are_computed_once():
    """The loop of the steps has only the products of what the weights change, forward and back."""
    config = dataclasses.replace(ONE_LAYER, num_hidden_layers=3)
    module = cj.Bert(config, head="token_classification", num_labels=4)
    method = cj.preset("pfeiffer-feed-forward", reduction_factor=2, leave_out=(0, 1))
    model = cj.Adapted(module, cj.Bank(method, size=MEMBERS))
    ids, mask = inputs_of(2)
    drawn = random_tree(adapted_shapes(model), seed=2)

    def run(params, ids, mask):
        return minimized((model, params), ids, mask, steps=3, learning_rate=1.0)

    found = products_of_loops(jax.jit(run).lower(drawn, ids, mask).compile().as_text())
    # Both factors of the adapter with the weights' gradients, and the classifier.
    assert 4 <= found <= 9
