"""Tests what `Adapted` does not change, the shared rule, and the behaviour of Flax it relies on."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.models.bert.model import Bert
from tests.helpers import (
    IDS,
    ONE_LAYER,
    SMALL,
    TINY_BERT,
    WIDTH,
    adapted_shapes,
    backbone_of,
    quick_jit,
    quick_key,
    random_states,
    random_tree,
)
from tests.hosts import (
    COMPACTER,
    PLUS_PLUS,
    SITES,
    Chain,
    CompactHost,
    SetupChain,
    SetupHost,
    adapted,
    assert_same,
    run,
    split,
)

# --- What they leave alone ----------------------------------------------------------------------

BACKBONES = {
    "bert": (Bert(ONE_LAYER), None),
    "bert with a head, remat": (Bert(ONE_LAYER, head="token_classification", remat="full"), None),
    "compact": (Chain(layers=2), SITES),
    "setup": (SetupChain(), SITES),
}


@pytest.mark.parametrize(("backbone", "sites"), BACKBONES.values(), ids=BACKBONES)
def test_initial_values_of_the_backbone_are_its_own(backbone, sites):
    model = Adapted(backbone, PLUS_PLUS, sites)
    inputs, key = backbone.dummy_inputs(), quick_key(3)
    plain = quick_jit(backbone.init)(key, *inputs)["params"]
    own, new = split(quick_jit(model.init)(key, *inputs)["params"])
    assert_same(own, flatten_dict(plain, sep="/"))
    assert {path for path in new if "/" not in path} == {"phm_rule"}


@pytest.mark.parametrize("remat", ["off", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_the_backbone_is_its_own(remat, dropout):
    """Adapters that add exactly zero, with or without dropout inside, change no bit."""
    backbone = Bert(ONE_LAYER, remat=remat)
    method = preset("compacter", **SMALL, scaling=0.0, dropout=dropout)
    model, params = adapted(backbone, method, None)
    plain = unflatten_dict(split(params)[0], sep="/")
    # Not compiled: the same operations in the same order allow a comparison of every bit.
    rngs = {"dropout": jax.random.key(5)}
    expected = backbone.apply({"params": plain}, IDS, deterministic=False, rngs=rngs)
    actual = model.apply({"params": params}, IDS, deterministic=False, rngs=rngs)
    assert_same(actual.last_hidden_state, expected.last_hidden_state)
    still = backbone.apply({"params": plain}, IDS)
    assert np.abs(still.last_hidden_state - expected.last_hidden_state).max() > 0.1


class Droppable(Chain):
    """A backbone that takes `deterministic` by position."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        return CompactHost(name="layer_0")(x)


class DropsByDefault(Chain):
    @nn.compact
    def __call__(self, x, *, deterministic=False):
        return CompactHost(name="layer_0")(x)


@pytest.mark.parametrize(
    ("backbone", "args", "options", "drops"),
    [
        (Droppable(), (), {}, False),
        (Droppable(), (False,), {}, True),
        (Droppable(), (True,), {}, False),
        (Droppable(), (), {"deterministic": False}, True),
        (DropsByDefault(), (), {}, True),
        (DropsByDefault(), (), {"deterministic": True}, False),
    ],
)
def test_dropout_of_the_adapters_follows_the_backbone(backbone, args, options, drops):
    model, params = adapted(backbone, preset("compacter++", **SMALL, dropout=0.5))
    x = random_states(6)

    def call(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, x, *args, **options, rngs=rngs)

    assert bool(np.any(call(0) != call(1))) is drops


def test_dropout_of_the_adapters_is_refused_where_nothing_turns_it_on():
    with pytest.raises(
        ValueError, match=r"dropout=0\.5 would never be applied: Chain takes none of"
    ):
        adapted(Chain(), preset("compacter++", **SMALL, dropout=0.5))


@pytest.mark.parametrize("init_range", [1e-4, 1e-1])
def test_the_effect_at_initialisation_is_within_the_rules_scale(init_range):
    """The adapter adds at most 1.13 |W_down| |W_up| |x|: GELU's slope, |W| <= sum_i |A_i| |B_i|."""
    method = preset("compacter++", **SMALL, phm_init_range=init_range)
    backbone = backbone_of(Chain(), seed=7)
    params = init_adapters(Adapted(backbone.module, method, SITES), backbone, quick_key(8))
    x = random_states(9)
    before = run(backbone.module, backbone.params, x)
    after = run(Adapted(backbone.module, method, SITES), params, x)

    def norm(matrix):
        return np.linalg.norm(np.float64(matrix), 2)

    def bound(place):
        blocks = np.float64(place["left"]) @ np.float64(place["right"])
        return sum(norm(A) * norm(B) for A, B in zip(params["phm_rule"], blocks, strict=True))

    adapter = params["layer_0"]["adapter"]
    factor = 1.13 * bound(adapter["down"]) * bound(adapter["up"])
    assert factor < 1000 * init_range**2
    change = np.linalg.norm(after - before, axis=-1)
    lengths = np.linalg.norm(before, axis=-1)
    assert np.all(change <= (factor + 1e-6) * lengths)  # 1e-6: the rounding of x + h
    if init_range == 1e-1:
        assert np.all(change > 1e-4 * lengths)


def objective(model, cotangent, *inputs):
    def value(params):
        y = model.apply({"params": params}, *inputs)
        return jnp.sum(cotangent * getattr(y, "last_hidden_state", y))

    return quick_jit(jax.value_and_grad(value))


CHAINS = {
    "compact": Chain(layers=3),
    "setup": Chain(SetupHost, layers=3),
    "compact, remat": Chain(nn.remat(CompactHost), layers=3),
    "setup, remat": Chain(nn.remat(SetupHost), layers=3),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_gradient_of_the_shared_rule_is_the_sum_over_unshared_copies(chain):
    shared, params = adapted(chain)
    unshared = Adapted(chain, PLUS_PLUS.replace(shared_phm_rule=False), SITES)
    flat = flatten_dict(params, sep="/")
    copies = flatten_dict(adapted_shapes(unshared), sep="/")
    copies = {path: flat.get(path, flat["phm_rule"]) for path in copies}
    assert sum(path.endswith("phm_rule") for path in copies) == 3 * 2
    assert sum(path.endswith("phm_rule") for path in flat) == 1
    x, cotangent = random_states(1), random_states(2)
    one, gradient = objective(shared, cotangent, x)(params)
    many, gradients = objective(unshared, cotangent, x)(unflatten_dict(copies, sep="/"))
    np.testing.assert_allclose(one, many, rtol=1e-5)
    gradients = flatten_dict(gradients, sep="/")
    total = sum(leaf for path, leaf in gradients.items() if path.endswith("phm_rule"))
    # A sum of six float32 numbers; the other leaves sum the same numbers in another order.
    scale = np.abs(total).max()
    assert scale > 0.1
    np.testing.assert_allclose(gradient["phm_rule"], total, rtol=0, atol=1e-5 * scale)
    for path, leaf in flatten_dict(gradient, sep="/").items():
        if path != "phm_rule":
            scale = np.abs(leaf).max()
            np.testing.assert_allclose(leaf, gradients[path], rtol=0, atol=1e-5 * scale)


REMAT = {
    "compact": (Chain(layers=2), Chain(nn.remat(CompactHost), layers=2), SITES, {}),
    "setup": (SetupChain(), SetupChain(nn.remat(SetupHost)), SITES, {"factorized_phm_rule": True}),
    "bert": (Bert(ONE_LAYER), Bert(ONE_LAYER, remat="full"), None, {"shared_W_phm": True}),
}


@pytest.mark.parametrize(("plain", "rematted", "sites", "overrides"), REMAT.values(), ids=REMAT)
def test_remat_changes_no_number(plain, rematted, sites, overrides):
    method = PLUS_PLUS.replace(**overrides)
    model, params = adapted(plain, method, sites)
    rematted = Adapted(rematted, method, sites)
    assert adapted_paths(rematted) == adapted_paths(model)
    shape = (*IDS.shape, WIDTH)
    cotangent = np.float32(np.random.default_rng(2).standard_normal(shape))
    inputs = (IDS,) if sites is None else (cotangent + 1,)
    # The same operations, fused in another way.
    chex.assert_trees_all_close(
        *(objective(m, cotangent, *inputs)(params) for m in (model, rematted)), rtol=1e-4, atol=1e-4
    )


def adapted_paths(model):
    return sorted(flatten_dict(adapted_shapes(model), sep="/"))


def test_adapters_compute_in_their_hosts_dtype():
    backbone = Bert(TINY_BERT, dtype=jnp.bfloat16)
    model = Adapted(backbone, COMPACTER)
    shapes = adapted_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    y = jax.eval_shape(model.apply, {"params": shapes}, IDS)
    assert y.last_hidden_state.dtype == jnp.bfloat16
    half = Adapted(backbone, COMPACTER, param_dtype=jnp.bfloat16)
    _, new = split(adapted_shapes(half))
    assert {leaf.dtype for leaf in new.values()} == {jnp.dtype(jnp.bfloat16)}


def test_jit_inside_and_outside():
    model, params = adapted(Chain())
    x = random_states(10)
    eager = model.apply({"params": params}, x)
    plain = jax.jit(model.backbone.apply)({"params": params}, x)  # leaves of adapters are ignored
    assert np.abs(eager - plain).max() > 0.1
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), eager, atol=1e-5)
    np.testing.assert_allclose(jax.jit(model.backbone.apply)({"params": params}, x), plain)


def test_fact_a_function_compiled_before_ignores_the_hook():
    """This is the reason why `Adapted` enters the hook inside the call, and not around it."""
    seen = []

    def hook(next_fun, args, kwargs, context):
        seen.append(context.module.path)
        return next_fun(*args, **kwargs)

    module, x = Chain(), random_states(11)
    params = random_tree(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    compiled = jax.jit(module.apply)
    compiled({"params": params}, x)
    with nn.intercept_methods(hook):
        compiled({"params": params}, x)
    assert not seen
    with nn.intercept_methods(hook):
        module.apply({"params": params}, x)
    assert ("layer_0",) in seen


def test_a_module_under_nn_jit_is_traced_again():
    """The same trap inside a backbone: a function traced before by nn.jit would ignore the hook."""
    model, params = adapted(Chain(nn.jit(CompactHost)))
    x = random_states(12)
    expected = run(adapted(Chain())[0], params, x)
    for _ in range(2):
        np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-5)
