"""Compares banks and compositions with each adapter alone, and with NumPy in float64."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.banks import stack_adapters
from compacter_jax.catalogue import preset
from compacter_jax.compositions import entropy
from compacter_jax.compositions.average import Average, AverageMaps
from compacter_jax.compositions.bank import Bank
from compacter_jax.compositions.entropy import minimize_entropy
from compacter_jax.compositions.parallel import Parallel
from compacter_jax.compositions.routing import mixing_sites
from compacter_jax.compositions.stack import Stack
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.t5.model import T5
from compacter_jax.params import cast_frozen, label_params, merge, partition
from tests.helpers import (
    IDS,
    MASK,
    ONE_LAYER,
    SMALL,
    TINY_T5,
    WIDTH,
    adapted_shapes,
    adapter_update,
    backbone_of,
    projection,
    quick_jit,
    quick_key,
    random_states,
    random_tree,
    t5_inputs,
)
from tests.hosts import COMPACTER, PLUS_PLUS, SITES, Chain, assert_same, run

ROWS = np.concatenate([IDS, IDS[::-1]]), np.concatenate([MASK, MASK[::-1]])
ADAPTER_IDS = np.array([2, -1, 0, 2])
# Each preset at its smallest size, and a member of every kind.
METHODS = {
    "compacter": COMPACTER,
    "compacter, own rules": COMPACTER.replace(shared_phm_rule=False, sites=("feed_forward",)),
    "compacter, shared blocks": PLUS_PLUS.replace(shared_W_phm=True),
    "phm": preset("phm", **SMALL),
    "houlsby": preset("houlsby", reduction_factor=2, train_pooler=True),
    "low-rank": preset("low-rank", reduction_factor=2, rank=2),
    "pfeiffer-feed-forward": preset("pfeiffer-feed-forward", reduction_factor=2),
    "residual, taking its place": preset(
        "pfeiffer-feed-forward", reduction_factor=2, original_ln_after=False
    ),
    "parallel": preset("parallel"),
    "lora": preset("lora", rank=2),
    "ia3": preset("ia3", input_sites=("feed_forward",)),
    "bitfit": preset("bitfit"),
    "prefix-tuning": preset("prefix-tuning", prefix_length=3, bottleneck_size=5),
    "mam": preset("mam", prefix_length=2, bottleneck_size=5),
    "prompt-tuning-random": preset("prompt-tuning-random", prompt_length=3),
}
HAS_PREFIXES = ("prefix-tuning", "mam")
QUICK = ("compacter", "lora", "ia3", "bitfit", "prefix-tuning")


def trained_alone(backbone, method, seed, sites=None):
    """Returns a model with one adapter, and parameters, which are random if they are trained."""
    model = Adapted(backbone.module, method, sites)
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed), sep="/")
    own = flatten_dict(backbone.params, sep="/")
    labels = flatten_dict(label_params(unflatten_dict(drawn, sep="/"), method), sep="/")
    params = {
        path: own[path] if path in own and labels[path] == "freeze" else leaf
        for path, leaf in drawn.items()
    }
    return model, unflatten_dict(params, sep="/")


def bank_of(backbone, method, size=3, **settings):
    alone = [trained_alone(backbone, method, seed) for seed in range(1, 1 + size)]
    return alone, *stack_adapters(alone, backbone, **settings)


@functools.cache
def bert(**settings):
    return backbone_of(Bert(ONE_LAYER, head="sequence_classification", **settings))


def output_and_gradient(model, inputs=ROWS):
    """Returns a function that computes the output, and the gradients by path."""

    @quick_jit
    def both(trained, frozen, cotangent, arguments):
        def apply(trained):
            return model.apply({"params": merge(trained, frozen)}, *inputs, **arguments)

        y, pull_back = jax.vjp(apply, trained)
        return y, pull_back(cotangent)[0]

    def of(params, cotangent, **arguments):
        halves = partition(params, label_params(params, model.method))
        y, gradient = both(*halves, cotangent, arguments)
        flat = flatten_dict(gradient, sep="/")
        return y, {path: leaf for path, leaf in flat.items() if leaf is not None}

    return of


def assert_near(actual, expected, bound=1e-6, message=""):
    """Checks that arrays agree to float32 rounding, relative to the largest entry."""
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * scale, err_msg=message)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in METHODS],
)
def test_routing_and_one_hot_mixing_equal_each_row_alone(name):
    method, backbone = METHODS[name], bert()
    alone, model, params = bank_of(backbone, method)
    ids = ADAPTER_IDS if model.method.allows_unadapted_rows else np.abs(ADAPTER_IDS)
    cotangent = np.float32(np.random.default_rng(0).standard_normal((4, 2)))
    expected = np.array(run(backbone.module, backbone.params, *ROWS))
    gradients, of_one = {}, output_and_gradient(alone[0][0])
    for index, (_, own) in enumerate(alone):
        chosen = ids == index
        y, gradients[index] = of_one(own, np.float32(chosen[:, None] * cotangent))
        expected[chosen] = y[chosen]
    of_bank = output_and_gradient(model)
    routed, gradient = of_bank(params, cotangent, adapter_ids=ids)
    assert_near(routed, expected)
    _check_gradients(model, gradient, gradients)
    if name in HAS_PREFIXES:
        with pytest.raises(ValueError, match="no output that could be mixed"):
            run(model, params, *ROWS, mix=np.ones(3, np.float32) / 3)
        return
    one_hot = np.float32(np.arange(3) == ids[:, None])
    mixed, gradient = of_bank(params, cotangent, mix=one_hot)
    assert_near(mixed, expected)
    _check_gradients(model, gradient, gradients)


def _check_gradients(model, gradient, alone):
    """Checks that the gradient of each member is that of its own rows alone."""
    members = cj.compositions.base.members_of(model.method)
    assert gradient
    for path, leaf in gradient.items():
        own = cj.compositions.base.own_path(members, path)[1]
        for index, single in alone.items():
            assert_near(leaf[index], single[own], 2e-6, path)
    assert len(gradient) == len(alone[0])


def test_an_id_of_no_member_is_refused_or_not_a_number():
    alone, model, params = bank_of(bert(), PLUS_PLUS, capacity=4)

    @quick_jit
    def traced(ids):
        return model.apply({"params": params}, *ROWS, adapter_ids=ids)

    y = traced(np.array([0, 4, -2, 3]))
    for of in (np.all, np.any):
        np.testing.assert_array_equal(of(np.isnan(y), axis=1), [False, True, True, True])
    with pytest.raises(ValueError, match="adapter_ids has 2 rows, but the backbone is called"):
        traced(np.array([0, 1]))
    for wrong, message in (
        ([0, 4, 1, 2], "adapter_ids contains 4; use 0 to 3, or -1 for the plain"),
        ([0, 1, -2, 1], "adapter_ids contains -2; use"),
        ([0, 3, 1, 2], "adapter_ids contains 3, but the bank has no member at this index yet"),
        (
            [0.0, 1, 1, 1],
            r"has shape \(4,\) and dtype float.*it must be integers of shape \[batch\]",
        ),
        ([[0]], r"has shape \(1, 1\) and dtype int"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params}, *ROWS, adapter_ids=np.array(wrong))
    for arguments, message in (
        ({}, "needs either adapter_ids of .* or mix of .* got neither"),
        ({"adapter_ids": ADAPTER_IDS, "mix": np.ones(4)}, "got adapter_ids and mix"),
        ({"mix": np.ones(3)}, r"mix has shape \(3,\); it must be \[4\], \[batch, 4\] or"),
        ({"mix": np.ones(4, int)}, "mix has dtype int32; it must be floating-point"),
        ({"mix": np.ones((1, 2, 4))}, "but the bank acts at 5 sites; mixing_sites"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params}, *ROWS, **arguments)
    single, own = alone[0]
    with pytest.raises(ValueError, match="adapter_ids given, but the method 'phm_bottleneck' has"):
        single.apply({"params": own}, *ROWS, adapter_ids=ADAPTER_IDS)


# --- against NumPy in float64 --------------------------------------------------------------------

DENSE = preset(
    "pfeiffer-attention", reduction_factor=2, sites=("feed_forward",), train_layer_norms=False
)
LOW_RANK = preset("low-rank", reduction_factor=2, sites=("feed_forward",), train_layer_norms=False)
COMPACT = PLUS_PLUS.replace(train_layer_norms=False)


class WideChain(Chain):
    """A chain that declares its width, which parameters shared between layers need."""

    config = types.SimpleNamespace(hidden_size=WIDTH)


def chain(method, names, seed=0):
    """Returns a model with one host, random parameters, and functions of its members in float64.

    The functions map states to the output of a member, and return the `down` and `up` of a member.
    """
    model = Adapted(WideChain(), method, SITES)
    params = random_tree(adapted_shapes(model), seed)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}

    def own(name, index=...):
        inside = f"layer_0/adapter/{name}/" if name else "layer_0/adapter/"
        shared = f"adapters/{name}/" if name else ""
        taken = {"adapter/" + p.removeprefix(inside): v for p, v in flat.items() if inside in p}
        taken |= {p.removeprefix(shared): v for p, v in flat.items() if f"{shared}phm_" in p}
        return {path: np.float64(leaf[index]) for path, leaf in taken.items()}

    kernel, bias = (np.float64(flat[f"layer_0/Dense_0/{leaf}"]) for leaf in ("kernel", "bias"))
    return model, params, own, lambda x: np.float64(x) @ kernel + bias


def test_a_stack_is_one_after_the_other():
    stack = Stack(COMPACT, Stack(DENSE, LOW_RANK), names=("language", "tasks"))
    model, params, own, host = chain(stack, ())
    x = random_states(1)
    y = host(x)
    for method, name in ((COMPACT, "language"), (DENSE, "tasks/0"), (LOW_RANK, "tasks/1")):
        y = y + adapter_update(method, own(name), y)
    assert_near(run(model, params, x), y, 1e-5)


def test_members_beside_each_other_have_their_rows():
    language, tasks = COMPACT, Parallel(DENSE, Stack(LOW_RANK, COMPACT))
    model, params, own, host = chain(Stack(language, tasks, names=("language", "tasks")), ())
    x = random_states(2)
    y = host(x)
    y = y + adapter_update(COMPACT, own("language"), y)
    first = y + adapter_update(DENSE, own("tasks/0"), y)
    second = y + adapter_update(LOW_RANK, own("tasks/1/0"), y)
    second = second + adapter_update(COMPACT, own("tasks/1/1"), second)
    outputs = run(model, params, x)
    assert isinstance(outputs, tuple)
    for actual, expected in zip(outputs, (first, second), strict=True):
        assert_near(actual, expected, 1e-5)


@pytest.mark.parametrize("weights", [(), (0.3, 0.9)])
def test_an_average_of_outputs_and_one_of_maps(weights):
    x = random_states(3)
    shares = weights or (0.5, 0.5)
    results = {}
    for kind in (Average, AverageMaps):
        model, params, own, host = chain(kind(COMPACT, LOW_RANK, weights=weights), ())
        results[kind] = run(model, params, x)
        y = host(x)
        members = list(zip(shares, (own("0"), own("1")), strict=True))
        if kind is Average:
            updates = [adapter_update(COMPACT, params, y) for _, params in members]
            assert_near(results[kind], y + np.tensordot(shares, updates, 1), 1e-5)
            continue
        h = sum(share * projection(params, y, "down") for share, params in members)
        h = cj.nn.activations.get_activation(COMPACT.non_linearity)(jnp.asarray(h, jnp.float32))
        up = sum(share * projection(params, np.float64(h), "up") for share, params in members)
        assert_near(results[kind], y + up, 1e-5)
    assert np.abs(results[Average] - results[AverageMaps]).max() > 1e-2


FOUR_IDS = {"one": np.array([1, -1, 0, 1]), "two": np.array([0, 1, -1, -1])}


def of_members(own, method, name, y, ids):
    """Returns the output of a bank: each row is computed by its own member alone."""
    rows = [
        y[i] if index < 0 else y[i] + adapter_update(method, own(name, index), y[i])
        for i, index in enumerate(ids)
    ]
    return np.stack(rows)


def four_states(seed):
    return np.concatenate([random_states(seed), random_states(seed + 1)])


@pytest.mark.parametrize("rows", [4, 3])
def test_a_bank_on_top_of_another_member(rows):
    method = Stack(LOW_RANK, Bank(COMPACT, size=2), names=("below", "one"))
    model, params, own, host = chain(method, ())
    x, ids = four_states(6)[:rows], FOUR_IDS["one"][:rows]
    y = host(x)
    y = y + adapter_update(LOW_RANK, own("below"), y)
    expected = of_members(own, COMPACT, "one", y, ids)
    for given in (ids, {"one": ids}):
        assert_near(run(model, params, x, adapter_ids=given), expected, 1e-5)


def test_an_average_of_banks():
    banks = (Bank(COMPACT, size=2), Bank(DENSE, size=2))
    method = Average(*banks, LOW_RANK, weights=(0.5, 0.3, 0.4), names=("one", "two", "three"))
    model, params, own, host = chain(method, ())
    x = four_states(8)
    y = host(x)
    expected = 0.5 * of_members(own, COMPACT, "one", y, FOUR_IDS["one"])
    expected += 0.3 * of_members(own, DENSE, "two", y, FOUR_IDS["two"])
    expected += 0.4 * (y + adapter_update(LOW_RANK, own("three"), y)) - 0.2 * y
    assert_near(run(model, params, x, adapter_ids=FOUR_IDS), expected, 1e-5)


def test_banks_beside_each_other():
    """Two banks in `Parallel` each take their own ids; anything but a mapping is refused."""
    backbone, banks = bert(), (Bank(PLUS_PLUS, size=2), Bank(METHODS["lora"], size=2))
    model = Adapted(backbone.module, Parallel(*banks, names=("one", "two")))
    params = init_adapters(model, backbone, quick_key(0))
    alone = {}
    for name, method in (("one", PLUS_PLUS), ("two", METHODS["lora"])):
        alone[name] = [trained_alone(backbone, method, seed) for seed in (1, 2)]
        for i, source in enumerate(alone[name]):
            params = cj.set_member(model, params, f"{name}/{i}", source)
    outputs = run(model, params, *ROWS, adapter_ids=FOUR_IDS)
    plain = run(backbone.module, backbone.params, *ROWS)
    for (name, ids), actual in zip(FOUR_IDS.items(), outputs, strict=True):
        each = np.stack([plain, *(run(*single, *ROWS) for single in alone[name])])
        assert_near(actual, each[ids + 1, np.arange(4)])
    nothing = (
        "adapter_ids has no entry for the bank '{}'; for a composition with 2 banks it must "
        "be a mapping"
    )
    for wrong, message in (
        (FOUR_IDS["one"], f"{nothing.format('one')} by name of the bank, got ndarray"),
        ({"one": ADAPTER_IDS % 2}, rf"{nothing.format('two')} by name of the bank, got \['one'\]"),
        ({**FOUR_IDS, "two": np.array([0, 2, 0, 0])}, "adapter_ids contains 2; use 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params}, *ROWS, adapter_ids=wrong)


def test_a_bank_before_members_beside_each_other_within_others_beside_each_other():
    below = Stack(Bank(COMPACT, size=2), Parallel(DENSE, LOW_RANK), names=("one", "tasks"))
    model, params, own, host = chain(Parallel(below, LOW_RANK, names=("a", "b")), ())
    x, ids = four_states(10)[:3], FOUR_IDS["one"][:3]
    y = host(x)
    banked = of_members(own, COMPACT, "a/one", y, ids)
    expected = [
        banked + adapter_update(DENSE, own("a/tasks/0"), banked),
        banked + adapter_update(LOW_RANK, own("a/tasks/1"), banked),
        y + adapter_update(LOW_RANK, own("b"), y),
    ]
    weights = np.float32(np.arange(2) == ids[:, None])
    mixes = (weights, weights[:, None])
    for chosen in ({"adapter_ids": ids}, *({"mix": mix} for mix in mixes)):
        for actual, wanted in zip(run(model, params, x, **chosen), expected, strict=True):
            assert_near(actual, wanted, 1e-5)
    for wrong in (np.tile(ids, 2), np.tile(ids, 3), ids[:2]):
        message = f"adapter_ids has {len(wrong)} rows, but the backbone is called with 3; give"
        with pytest.raises(ValueError, match=message):
            model.apply({"params": params}, x, adapter_ids=wrong)


def test_a_mixture_is_the_weighted_sum_of_the_members_outputs():
    for bank in (Bank(COMPACT, size=3), Bank(COMPACT, size=3, shared_rule=True)):
        model, params, own, host = chain(bank, ())
        shape = (3, 3, 3) if bank.shared_rule else (3, 3, 3, 3)
        assert params["phm_rule"].shape == shape
        x = np.concatenate([random_states(4), random_states(5)])
        y = host(x)

        def member(index, bank=bank, own=own):
            params = own("", index)
            if bank.shared_rule:
                params["phm_rule"] = np.float64(own("")["phm_rule"])
            return params

        updates = np.stack([adapter_update(COMPACT, member(i), y) for i in range(3)])
        weights = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
        mixed = run(model, params, x, mix=weights)
        assert_near(mixed, y + np.einsum("bn,nbtd->btd", weights, updates), 1e-5)
        for mix in (weights[1], weights[None, None, 1]):
            expected = y + np.tensordot(weights[1], updates, 1)
            assert_near(run(model, params, x, mix=mix), expected, 1e-5)
        ids = np.array([1, -1, 0, 2])
        expected = np.stack([y[i] if a < 0 else (y + updates[a])[i] for i, a in enumerate(ids)])
        assert_near(run(model, params, x, adapter_ids=ids), expected, 1e-5)


# --- what is computed ----------------------------------------------------------------------------


def sizes_of_intermediates(jaxpr):
    """Yields the size of every array that is computed, also inside nested programs."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes_of_intermediates(inner)


@pytest.mark.parametrize(
    "method",
    [
        COMPACT,
        COMPACT.replace(shared_W_phm=True),
        preset("phm", **SMALL, sites=("feed_forward",), train_layer_norms=False),
        LOW_RANK,
    ],
    ids=["compacter", "compacter, shared blocks", "phm", "low-rank"],
)
def test_no_row_has_a_weight_of_its_own(method):
    rows, bottleneck = 20, WIDTH // method.reduction_factor
    model, params, _, _ = chain(Bank(method, size=2), ())
    x = jnp.ones((rows, 1, WIDTH))  # one token, so that activations are smaller than a weight

    frozen = params.pop("adapters")
    ids = np.arange(rows) % 2

    def output_and_gradients(params, x):
        def apply(params, x):
            return model.apply({"params": {**params, "adapters": frozen}}, x, adapter_ids=ids)

        y, pull_back = jax.vjp(apply, params, x)
        return y, pull_back(y)

    jaxpr = jax.make_jaxpr(output_and_gradients)(params, x).jaxpr
    assert max(sizes_of_intermediates(jaxpr)) < rows * WIDTH * bottleneck


def test_members_that_come_and_go_compile_nothing():
    backbone = bert()
    alone, model, params = bank_of(backbone, PLUS_PLUS, size=2, capacity=1000)
    compiled = quick_jit(
        lambda params, ids: model.apply({"params": params}, *ROWS, adapter_ids=ids)
    )
    compiled(params, ADAPTER_IDS % 2)
    single, new = trained_alone(backbone, PLUS_PLUS, 7)
    params = cj.set_member(model, params, 999, (single, new))
    params = cj.set_member(model, params, 0, alone[1])
    y = compiled(params, np.array([0, 1, 999, 999]))
    assert compiled._cache_size() == 1
    np.testing.assert_array_equal(y[0], compiled(params, np.array([1, 1, 1, 1]))[0])
    assert_near(y[2:], run(single, new, *ROWS)[2:])


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_layers_that_are_computed_again(remat):
    _, model, params = bank_of(bert(), PLUS_PLUS)
    cotangent = np.ones((4, 2), np.float32)
    again = model.clone(backbone=bert(remat=remat).module)
    y, gradient = output_and_gradient(again)(params, cotangent, adapter_ids=ADAPTER_IDS)
    expected, expected_gradient = output_and_gradient(model)(
        params, cotangent, adapter_ids=ADAPTER_IDS
    )
    assert_near(y, expected)
    for path, leaf in expected_gradient.items():
        assert_near(gradient[path], leaf, 2e-6, path)


def test_dropout_differs_by_row_and_by_member():
    config = dataclasses.replace(
        ONE_LAYER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    backbone = backbone_of(Bert(config, head="sequence_classification"))
    _, model, params = bank_of(backbone, PLUS_PLUS.replace(dropout=0.5), size=2)
    same = np.repeat(ROWS[0][:1], 4, axis=0)

    @functools.partial(quick_jit, static_argnames="deterministic")
    def apply(key, deterministic=False, **chosen):
        return model.apply(
            {"params": params},
            same,
            deterministic=deterministic,
            rngs={"dropout": key},
            **chosen,
        )

    for chosen in ({"adapter_ids": np.zeros(4, int)}, {"mix": np.float32([0.5, 0.5])}):
        y = apply(quick_key(0), **chosen)
        assert len(np.unique(np.asarray(y)[:, 0])) == 4
        assert_same(apply(quick_key(0), **chosen), y)
        assert np.abs(apply(quick_key(1), **chosen) - y).max() > 1e-3
        told = apply(quick_key(0), deterministic=True, **chosen)
        assert_near(told, np.tile(told[:1], (4, 1)))


@pytest.mark.parametrize("name", ["bitfit", "lora"])
def test_a_backbone_of_int8(name):
    alone, model, params = bank_of(bert(), METHODS[name], size=2)
    params = narrow(model, params)
    rows = run(model, params, *ROWS, adapter_ids=np.array([0, 1, -1, 1]))
    one = quick_jit(alone[0][0].apply)
    expected = [one({"params": narrow(*single)}, *ROWS) for single in alone]
    for row, index in ((0, 0), (1, 1), (3, 1)):
        assert_near(rows[row], expected[index][row])


def narrow(model, params):
    """Returns the parameters with the frozen half in eight bits."""
    trained, frozen = partition(params, label_params(params, model.method))
    return merge(trained, cast_frozen(frozen, "int8"))


# --- T5 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5():
    backbone = backbone_of(T5(TINY_T5))
    method = preset("compacter", **SMALL, sites=("attention", "cross_attention", "feed_forward"))
    return backbone, *bank_of(backbone, method, size=2), t5_inputs(0, TINY_T5)


def test_rows_of_encoder_and_decoder(t5):
    backbone, alone, model, params, inputs = t5
    ids = np.array([1, -1, 0])
    plain = run(backbone.module, backbone.params, *inputs)
    cotangent = np.float32(np.random.default_rng(0).standard_normal(plain.shape))
    expected, gradients, of_one = plain, {}, output_and_gradient(alone[0][0], inputs)
    for index, (_, own) in enumerate(alone):
        chosen = ids == index
        y, gradients[index] = of_one(own, chosen[:, None, None] * cotangent)
        expected = np.where(chosen[:, None, None], y, expected)
    routed, gradient = output_and_gradient(model, inputs)(params, cotangent, adapter_ids=ids)
    assert_near(routed, expected)
    _check_gradients(model, gradient, gradients)


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_are_generated_each_with_its_member(t5, beams):
    backbone, alone, model, params, (ids, mask, *_) = t5
    settings = {"max_new_tokens": 4, "num_beams": beams, "min_new_tokens": 4}
    chosen = np.array([1, -1, 0])
    tokens = cj.generate(model, params, ids, mask, adapter_ids=chosen, **settings)
    single = alone[0][0]
    for row, index in enumerate(chosen):
        pair = (backbone.module, backbone.params) if index < 0 else (single, alone[index][1])
        expected = cj.generate(*pair, ids, mask, **settings)
        np.testing.assert_array_equal(tokens[row], expected[row])
    if beams == 1:
        mixed = cj.generate(model, params, ids, mask, mix=np.float32([0, 1]), **settings)
        np.testing.assert_array_equal(mixed[0], tokens[0])
        with pytest.raises(ValueError, match="adapter_ids contains 2; use 0 to 1"):
            cj.generate(model, params, ids, mask, adapter_ids=[2, 0, 0], **settings)
        with pytest.raises(ValueError, match="mix given, but the model has no bank of adapters"):
            cj.generate(backbone.module, params, ids, mask, mix=[1.0], **settings)


def test_members_beside_each_other_in_encoder_and_decoder(t5):
    backbone, alone, _, _, inputs = t5
    method = alone[0][0].method
    model = Adapted(backbone.module, Parallel(method, method, names=("one", "two")))
    params = init_adapters(model, backbone, quick_key(0))
    for name, source in zip(("one", "two"), alone, strict=True):
        params = cj.set_member(model, params, name, source)
    outputs = run(model, params, *inputs)
    assert isinstance(outputs, tuple)
    for actual, single in zip(outputs, alone, strict=True):
        assert_near(actual, run(*single, *inputs))
    message = (
        "a model with Parallel has no 'encode': it would have to return one value for each "
        "of 2 members; use one"
    )
    with pytest.raises(ValueError, match=message):
        cj.generate(model, params, *inputs[:2], max_new_tokens=2)


# --- what is trained -----------------------------------------------------------------------------


def trained_paths(model):
    labels = flatten_dict(label_params(adapted_shapes(model), model.method), sep="/")
    return {path for path, label in labels.items() if label == "train"}


def test_what_is_trained_of_a_composition():
    module = bert().module
    language = PLUS_PLUS.replace(train_layer_norms=False)
    stack = Stack(language, PLUS_PLUS, names=("language", "task"), frozen=("language",))
    trained = trained_paths(Adapted(module, stack))
    host = "encoder/layer/0/output/dense/adapter/task"
    norms = ("embeddings", "encoder/layer/0/attention/output", "encoder/layer/0/output")
    assert trained == {
        "adapters/task/phm_rule",
        *(f"{host}/{p}/{leaf}" for p in ("down", "up") for leaf in ("left", "right", "bias")),
        *(f"{n}/LayerNorm/adapter/task/replaced/{x}" for n in norms for x in ("scale", "bias")),
        *(f"classifier/adapter/task/replaced/{leaf}" for leaf in ("kernel", "bias")),
    }
    none = trained_paths(Adapted(module, stack.replace(frozen=("language", "task"))))
    assert none == set()
    bank = trained_paths(Adapted(module, Bank(PLUS_PLUS.replace(learn_phm=False), size=2)))
    assert bank == {
        path.replace("adapter/task", "adapter") for path in trained if "phm_rule" not in path
    }
    bitfit = trained_paths(Adapted(module, Bank(preset("bitfit"), size=2)))
    own = flatten_dict(bert().params, sep="/")
    expected = {path for path in own if path.endswith("/bias") and "pooler" not in path}
    expected |= {"classifier/kernel", "pooler/dense/bias"}
    assert {path.replace("adapter/replaced/", "") for path in bitfit} == expected


def test_a_frozen_member_beside_a_trained_one_stays(tmp_path):
    backbone = bert()
    method = Parallel(PLUS_PLUS, DENSE, names=("one", "two"), frozen=("one",))
    model = Adapted(backbone.module, method)
    params = init_adapters(model, backbone, quick_key(0))
    assert_same(
        params["classifier"]["adapter"]["one"]["replaced"]["kernel"],
        params["classifier"]["kernel"],
    )
    trained, frozen = partition(params, label_params(params, method))
    trained = jax.tree.map(lambda leaf: leaf + 0.5, trained)
    moved = merge(trained, frozen)
    apply = quick_jit(lambda params: model.apply({"params": params}, *ROWS))
    for i, same in enumerate((True, False)):
        assert (np.abs(apply(params)[i] - apply(moved)[i]).max() < 1e-6) == same
    cj.save_adapter(tmp_path, model, moved)
    loaded_model, loaded = cj.load_adapter(tmp_path, backbone)
    assert loaded_model == model
    assert_same(loaded, moved)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Stack, "stack has no members; name at least one method"),
        (lambda: Stack(preset("full")), "method 'full' cannot be a member of 'stack': it changes"),
        (lambda: Stack(PLUS_PLUS, PLUS_PLUS), "the members 0, 1 of a stack each have layer norms"),
        (lambda: Stack(DENSE, name=("a",)), r"has no field 'name' \(did you mean 'names'\?\)"),
        (lambda: Stack(DENSE, DENSE, names=("a", "a")), "must be 2 different names"),
        (lambda: Stack(DENSE, names=("a/b",)), "'a/b' cannot name a member"),
        (lambda: Stack(DENSE, frozen=("b",)), "frozen names 'b', but the members are 0"),
        (lambda: Stack(DENSE, train_head=False), "train_head is set in each member of 'stack'"),
        (
            lambda: Stack(*[METHODS["prompt-tuning-random"]] * 2),
            "only one member of the kind 'prompt_tuning'",
        ),
        (lambda: Bank(DENSE, size=0), "size=0 must be at least 1"),
        (lambda: Bank(Stack(DENSE)), "of one method, and that method cannot be a composition"),
        (
            lambda: Bank(preset("phm"), size=2, shared_rule=True),
            "'phm_bottleneck' has a rule in every projection; set shared_phm_rule=True in it, or",
        ),
        (
            lambda: Bank(METHODS["mam"], size=2, shared_rule=True),
            "'combined' has no rule; leave shared_rule out",
        ),
        (lambda: Average(METHODS["mam"]), "method 'prefix_tuning' cannot be in 'average'"),
        (
            lambda: Average(DENSE, DENSE, weights=(1,)),
            r"weights=\(1.0,\) must have 2 entries, one for each",
        ),
        (lambda: Parallel(METHODS["prompt-tuning-random"]), "its rows are longer than those"),
        (
            lambda: Parallel(METHODS["residual, taking its place"]),
            "original_ln_after=False cannot be in 'parallel'",
        ),
        (
            lambda: Stack(Parallel(DENSE, DENSE), Parallel(DENSE, DENSE, DENSE)),
            r"return \[2, 3\] copies of each row; members with several copies must all have",
        ),
        (lambda: AverageMaps(DENSE, Stack(DENSE)), "average_maps must be single methods"),
        (
            lambda: AverageMaps(DENSE, DENSE.replace(scaling=2)),
            "the members 0, 1 of average_maps d",
        ),
        (
            lambda: AverageMaps(METHODS["lora"], METHODS["ia3"]),
            "members of average_maps must be of one kind, not of lora, ",
        ),
    ],
)
def test_compositions_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_composition_as_json():
    method = Stack(
        Bank(DENSE, size=3, shared_rule=False),
        Average(COMPACT, AverageMaps(METHODS["lora"], METHODS["lora"]), weights=(1, 2)),
        names=("bank", "mean"),
        frozen=("bank",),
    )
    assert cj.catalogue.from_dict(cj.catalogue.to_dict(method)) == method
    assert hash(method) == hash(method.replace(frozen=["bank"]))


# --- the least entropy ---------------------------------------------------------------------------


def entropy_of(weights, table, tokens, mask):
    """Computes the entropy of a non-linear model in float64; its logits are `[length, labels]`."""
    states = np.tanh(tokens @ np.tensordot(weights[0], table, 1))
    logits = states @ np.tensordot(weights[-1], table, 1)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return (-(probabilities * np.log(probabilities)).sum(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("sites", [None, 2])
def test_weights_of_the_least_entropy_against_finite_differences(sites):
    rng = np.random.default_rng(0)
    table, tokens = rng.standard_normal((3, 4, 4)), rng.standard_normal((5, 6, 4))
    mask = np.ones((5, 6))
    mask[0, 4:] = mask[3, 1:] = 0

    def logits_fn(table, weights, tokens):
        weights = weights if sites else weights[None]
        states = jnp.tanh(tokens @ jnp.tensordot(weights[0], table, 1))
        return states @ jnp.tensordot(weights[-1], table, 1)

    result = minimize_entropy(
        jax.tree_util.Partial(logits_fn, jnp.float32(table)),
        3,
        jnp.float32(tokens),
        steps=4,
        learning_rate=2.0,
        mask=mask,
        sites=sites,
    )
    shape = (sites or 1, 3)

    def softmax(scores):
        return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)

    for row in range(5):
        scores, seen = np.zeros(shape), []
        for _ in range(4):
            seen.append(entropy_of(softmax(scores), table, tokens[row], mask[row]))
            slope = np.zeros(shape)
            for index in np.ndindex(shape):
                step = np.zeros(shape)
                step[index] = 1e-5
                ends = [
                    entropy_of(softmax(scores + sign * step), table, tokens[row], mask[row])
                    for sign in (1, -1)
                ]
                slope[index] = (ends[0] - ends[1]) / 2e-5
            scores -= 2.0 * slope
        seen.append(entropy_of(softmax(scores), table, tokens[row], mask[row]))
        np.testing.assert_allclose(result.entropies[row], seen, rtol=1e-4)
        weights = softmax(scores)
        np.testing.assert_allclose(result.weights[row], weights if sites else weights[0], rtol=1e-3)
    assert result.logits.shape == (5, 6, 4)


def test_each_example_finds_its_mixture_of_a_bank():
    _, model, params = bank_of(bert(), PLUS_PLUS)
    sites = mixing_sites(params)
    assert sites == (
        "classifier",
        "embeddings/LayerNorm",
        "encoder/layer/0/attention/output/LayerNorm",
        "encoder/layer/0/output/LayerNorm",
        "encoder/layer/0/output/dense",
    )

    def logits_fn(params, mix, ids, mask):
        return model.apply({"params": params}, ids[None], mask[None], mix=mix[None])[0]

    function = jax.tree_util.Partial(logits_fn, params)
    settings = {"steps": 5, "learning_rate": 0.5, "sites": len(sites)}
    result = minimize_entropy(function, 3, *ROWS, **settings)
    assert (np.diff(result.entropies, axis=1)[:, 0] < 0).all()
    np.testing.assert_allclose(result.weights.sum(-1), 1, rtol=1e-6)
    # Each example is optimised independently of the others.
    np.testing.assert_allclose(result.weights[:2], result.weights[3:1:-1], rtol=1e-5)
    # A call with the optimised weights returns the same logits.
    assert_near(run(model, params, *ROWS, mix=result.weights), result.logits, 1e-5)


def test_other_inputs_and_parameters_compile_nothing():
    def logits_fn(table, weights, x):
        return x @ jnp.tensordot(weights, table, 1)

    before, found = entropy._minimize._cache_size(), []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        table, x = (jnp.float32(rng.standard_normal(shape)) for shape in ((3, 4, 2), (5, 4)))
        function = jax.tree_util.Partial(logits_fn, table)
        result = minimize_entropy(function, 3, x, steps=2, learning_rate=0.5 + seed)
        found.append(np.asarray(result.weights))
    assert entropy._minimize._cache_size() == before + 1
    assert np.abs(found[0] - found[1]).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n=0 must be positive"),
        ({"steps": -1}, "steps=-1 must be at least 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be positive"),
        ({"inputs": ()}, r"needs at least one input after n, an array of shape \[batch, …\]"),
    ],
)
def test_settings_of_the_least_entropy_that_are_refused(change, message):
    settings = {"n": 2, "inputs": (np.ones((2, 2)),), "steps": 1, "learning_rate": 1.0} | change
    n, inputs = settings.pop("n"), settings.pop("inputs")
    with pytest.raises(ValueError, match=message):
        minimize_entropy(lambda w, x: w + x, n, *inputs, **settings)
