"""Tests where `Adapted` puts adapters, what they compute, and what it refuses."""

import dataclasses
import types

import flax.errors
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.methods.compacter import PHMBottleneckConfig
from compacter_jax.methods.intrinsic import IntrinsicConfig
from compacter_jax.models.bert.model import Bert
from tests.helpers import (
    IDS,
    MASK,
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
    HOSTS,
    PLUS_PLUS,
    SITES,
    Chain,
    CompactHost,
    SetupChain,
    SetupHost,
    adapted,
    adapter_of,
    assert_same,
    run,
    split,
)


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.contract
def test_each_host_has_one_adapter_that_runs_once_a_call(host, times):
    chain = Chain(host, layers=2, times=times)
    model, params = adapted(chain)
    backbone, new = split(params)
    expected = x = random_states(1)
    for i in range(2):
        adapter = adapter_of(params, f"layer_{i}", PLUS_PLUS)
        layer = backbone_layer(backbone, i)
        for _ in range(times):
            expected = adapter(layer(expected))
    # Float32 through up to four layers, compared with float64.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(run(model, params, x), expected, rtol=0, atol=1e-5 * scale)
    assert len(new) == 1 + 2 * 6


def backbone_layer(flat, index):
    own = [leaf for path, leaf in sorted(flat.items()) if path.startswith(f"layer_{index}/")]
    bias, kernel = map(np.float64, own)
    return lambda x: np.float64(x) @ kernel + bias


@pytest.mark.parametrize("host", [CompactHost, SetupHost])
@pytest.mark.contract
def test_hosts_made_in_setup_and_called_again(host):
    model, params = adapted(SetupChain(host))
    backbone, _ = split(params)
    expected = x = random_states(1)
    for i in (0, 1, 0):
        expected = adapter_of(params, f"layer_{i}", PLUS_PLUS)(
            backbone_layer(backbone, i)(expected)
        )
    scale = np.abs(expected).max()
    np.testing.assert_allclose(run(model, params, x), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.contract
def test_a_module_applied_twice_uses_its_adapters_twice():
    class Twice(nn.Module):
        model: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.model(self.model(x))

    model, params = adapted(Chain())
    x = random_states(2)
    once = run(model, params, x)
    twice = run(Twice(model), {"model": params}, x)
    np.testing.assert_allclose(twice, run(model, params, once), rtol=1e-5, atol=1e-6)


@pytest.mark.contract
def test_adapted_nested_in_other_modules():
    """Paths are relative to the backbone wherever it is; two models do not mix."""

    class Tower(nn.Module):
        model: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH, name="layer_0")(self.model(x))

    class Towers(nn.Module):
        first: nn.Module
        second: nn.Module

        def __call__(self, x):
            return self.first(x) + self.second(x)

    one, two = adapted(Chain(), seed=1), adapted(Chain(SetupHost), seed=2)
    dense = nn.Dense(WIDTH)
    shapes = jax.eval_shape(dense.init, jax.random.key(0), random_states(0))
    outer = random_tree(shapes["params"], seed=3)
    x = random_states(4)
    towers = Towers(Tower(one[0]), Tower(two[0]))
    params = {
        name: {"model": params, "layer_0": outer}
        for name, (_, params) in (("first", one), ("second", two))
    }
    shapes = jax.eval_shape(towers.init, jax.random.key(0), x)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    expected = sum(run(dense, outer, run(model, own, x)) for model, own in (one, two))
    np.testing.assert_allclose(run(towers, params, x), expected, rtol=1e-5, atol=1e-5)


def numpy_layer_norm(params, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normal * np.float64(params["scale"]) + np.float64(params["bias"])


def test_the_sites_of_bert():
    """Computes one layer of BERT by hand: adapters follow each projection, residuals come after."""
    config = ONE_LAYER
    model, params = adapted(Bert(config), COMPACTER, None)
    _, state = model.backbone.apply(
        {"params": params}, IDS, MASK, capture_intermediates=True, mutable=["intermediates"]
    )
    seen = state["intermediates"]
    embedded = np.float64(seen["embeddings"]["__call__"][0])
    attended = np.float64(seen["encoder"]["layer"]["0"]["attention"]["self"]["__call__"][0])
    layer = jax.tree.map(np.float64, params["encoder"]["layer"]["0"])

    def project(place, x):
        return x @ place["dense"]["kernel"] + place["dense"]["bias"]

    def close(place, path, x, residual):
        adapter = adapter_of(params, f"encoder/layer/0/{path}/dense", COMPACTER)
        x = adapter(project(place, x)) + residual
        return numpy_layer_norm(place["LayerNorm"], x, config.layer_norm_eps)

    x = close(layer["attention"]["output"], "attention/output", attended, embedded)
    inner = project(layer["intermediate"], x)
    inner = np.float64(jax.nn.gelu(inner, approximate=False))
    expected = close(layer["output"], "output", inner, x)
    actual = run(model, params, IDS, MASK).last_hidden_state
    # Float32; layer norms keep the states of order one.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def hosts_with_adapters(params):
    flat = flatten_dict(params, sep="/")
    return sorted({path.partition("/adapter/")[0] for path in flat if "/adapter/" in path})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, ["0/attention/output", "0/output", "1/attention/output", "1/output"]),
        ({"sites": ("attention",)}, ["0/attention/output", "1/attention/output"]),
        ({"leave_out": (0,)}, ["1/attention/output", "1/output"]),
        ({"leave_out": (1,), "sites": ("feed_forward",)}, ["0/output"]),
    ],
)
def test_sites_and_leave_out(overrides, expected):
    model = Adapted(Bert(TINY_BERT), preset("compacter", **SMALL, **overrides))
    shapes = adapted_shapes(model)
    assert hosts_with_adapters(shapes) == [f"encoder/layer/{path}/dense" for path in expected]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharesUnderAnotherName(PHMBottleneckConfig):
    def shared(self, param, width, sites, dtype):
        param("matrices", jax.nn.initializers.ones, (2, 2), dtype)
        return super().shared(param, width, sites, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovesUnderAnotherName(IntrinsicConfig):
    def own_params(self, param, paths, groups, dtype):
        return {"directions": param("directions", jax.nn.initializers.zeros, (3,), dtype)}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (SharesUnderAnotherName(sites=("feed_forward",), reduction_factor=2), "matrices"),
        (MovesUnderAnotherName(dimension=3), "directions"),
    ],
    ids=["shared", "moving"],
)
def test_names_of_shared_parameters_are_those_that_are_saved(method, name):
    """Another would be frozen with the backbone, and be missing in the adapter's file."""
    with pytest.raises(ValueError, match=f"creates a parameter '{name}' at the top") as error:
        adapted_shapes(Adapted(Bert(TINY_BERT), method))
    assert "not be saved; give it a name of the groups rule or adapters" in str(error.value)


def test_full_fine_tuning_inserts_nothing():
    backbone = Bert(TINY_BERT)
    shapes = adapted_shapes(Adapted(backbone, preset("full")))
    assert flatten_dict(shapes).keys() == flatten_dict(backbone_of(backbone).params).keys()


class TupleHost(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(x), None


class ChildNamedAdapter(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="adapter")(x)


class SetupChildNamedAdapter(nn.Module):
    def setup(self):
        self.adapter = nn.Dense(WIDTH)

    def __call__(self, x):
        return self.adapter(x)


class ParameterNamedAdapter(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("adapter", nn.initializers.ones, (WIDTH,))


@pytest.mark.parametrize(
    ("backbone", "overrides", "sites", "message"),
    [
        (
            Bert(TINY_BERT),
            {"sites": ("ffn",)},
            None,
            "unknown site 'ffn'; Bert has attention",
        ),
        (Chain(), {}, None, r"Chain has no table of sites; pass sites=\{name: regular expression"),
        (Chain(), {}, {"other": r"(?P<layer>\d+)"}, "unknown site 'feed_forward'; Chain has other"),
        (
            Chain(),
            {},
            {"feed_forward": r"layer_\d+"},
            r"no group .*write it as \(\?P<layer>",
        ),
        (Chain(), {"non_linearity": "geluu"}, SITES, "unknown activation 'geluu'"),
        (
            Chain(),
            {},
            {"feed_forward": r"layers_(?P<layer>\d+)"},
            r"site 'feed_forward' matched no module: no path matches 'layers_",
        ),
        # The pattern matches only the beginning of the path.
        (Chain(), {}, {"feed_forward": r"lay(?P<layer>\d*)"}, "matched no module"),
        (Chain(layers=2), {"leave_out": (2,)}, SITES, r"leave_out has \[2\], but .*layers 0 to 1"),
        (
            Chain(layers=2),
            {"leave_out": (0, 1)},
            SITES,
            "leaves no layer of site 'feed_forward'",
        ),
        (
            Chain(TupleHost),
            {},
            SITES,
            "the host layer_0 returns tuple, not an array",
        ),
        (
            Chain(ChildNamedAdapter),
            {},
            SITES,
            "layer_0 already has a variable or submodule 'adapter'",
        ),
        (Chain(SetupChildNamedAdapter), {}, SITES, "layer_0 already has a variable or submodule"),
        (Chain(ParameterNamedAdapter), {}, SITES, "layer_0 already has a variable or submodule"),
        (Chain(), {"phm_dim": 5}, SITES, "phm_dim=5 does not divide both the width 12"),
        (Chain(), {"shared_W_phm": True}, SITES, "shared_W_phm needs the width of the backbone's"),
    ],
)
def test_what_cannot_work(backbone, overrides, sites, message):
    method = PLUS_PLUS.replace(**overrides)
    with pytest.raises(ValueError, match=message):
        adapted_shapes(Adapted(backbone, method, sites))


def test_missing_adapters_are_an_error():
    """Parameters without adapters must not silently run as the plain backbone."""
    model, params = adapted(Chain())
    plain = unflatten_dict(split(params)[0], sep="/")
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        model.apply({"params": plain}, random_states(0))


def test_init_adapters_adds_to_the_very_leaves():
    backbone = backbone_of(Bert(TINY_BERT))
    model = Adapted(backbone.module, COMPACTER)
    key = quick_key(4)
    params = init_adapters(model, backbone, key)
    own, new = split(params)
    given = flatten_dict(backbone.params, sep="/")
    assert own.keys() == given.keys()
    assert all(own[path] is given[path] for path in given)
    drawn = split(quick_jit(model.init)(key, *model.backbone.dummy_inputs())["params"])[1]
    assert_same(new, drawn)
    lefts = [leaf.ravel()[:3].tolist() for path, leaf in new.items() if path.endswith("left")]
    assert len({tuple(values) for values in lefts}) == len(lefts) == 2 * 2 * 2


def test_init_adapters_with_example_inputs():
    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, x):
            return CompactHost(name="layer_0")(x)

    module, x = Foreign(), random_states(0)
    own = random_tree(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    backbone = types.SimpleNamespace(params=own)
    model = Adapted(module, PLUS_PLUS, SITES)
    with pytest.raises(ValueError, match=r"Foreign has no dummy_inputs\(\); pass example inputs"):
        init_adapters(model, backbone, jax.random.key(0))
    params = init_adapters(model, backbone, jax.random.key(0), x)
    assert run(model, params, x).shape == x.shape


def change(params, path, leaf):
    flat = {**flatten_dict(params, sep="/"), path: leaf}
    return unflatten_dict({path: leaf for path, leaf in flat.items() if leaf is not None}, sep="/")


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("layer_0/inner/bias", None, "missing: layer_0/inner/bias; left over: none"),
        ("layer_0/adapter/down/bias", np.zeros(6), "left over: layer_0/adapter/down/bias"),
        (
            "layer_1/inner/kernel",
            np.zeros((12, 11)),
            r"shape: layer_1/inner/kernel has shape \(12, 11\), not \(12, 12\)",
        ),
    ],
)
def test_init_adapters_refuses_other_parameters(path, leaf, message):
    backbone = backbone_of(SetupChain())
    given = types.SimpleNamespace(params=change(backbone.params, path, leaf))
    with pytest.raises(ValueError, match=message):
        init_adapters(Adapted(backbone.module, PLUS_PLUS, SITES), given, jax.random.key(0))
