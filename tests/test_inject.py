"""`Adapted`: where adapters go, what they leave alone, and the facts of flax it relies on."""

import functools
import types

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.config import preset
from compacter_jax.inject import Adapted, init_adapters
from compacter_jax.models.bert import Bert
from tests.helpers import (
    IDS,
    MASK,
    SMALL,
    TINY_BERT,
    WIDTH,
    adapted_shapes,
    backbone_of,
    expected_output,
    random_states,
    random_tree,
)

COMPACTER = preset("compacter", **SMALL)
PLUS_PLUS = preset("compacter++", **SMALL)
SITES = {"feed_forward": r"layer_(?P<layer>\d+)"}


class SetupHost(nn.Module):
    """Submodules made in setup, as third-party Flax models do."""

    def setup(self):
        self.inner = nn.Dense(WIDTH)

    def __call__(self, x):
        return self.inner(x)


class CompactHost(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(x)  # by its automatic name


class SuperOfCompact(CompactHost):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x)


class PlainSuperOfCompact(CompactHost):
    def __call__(self, x):
        return super().__call__(x)


class SuperOfSetup(SetupHost):
    def __call__(self, x):
        return super().__call__(x)


class ManyMethods(nn.Module):
    """Only `__call__` is the host; it calls another of its methods and that one itself."""

    def setup(self):
        self.inner = nn.Dense(WIDTH)

    def project(self, x):
        return self.inner(x)

    def __call__(self, x):
        return self.project(x)


HOSTS = {
    "compact": CompactHost,
    "setup": SetupHost,
    "nn.Dense": functools.partial(nn.Dense, WIDTH),
    "super in a compact class": SuperOfCompact,
    "super in a plain class": PlainSuperOfCompact,
    "super in a setup class": SuperOfSetup,
    "two methods": ManyMethods,
}
hosts = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


class Chain(nn.Module):
    """Hosts layer_0, layer_1, ... one after the other, each of them called `times` times."""

    host: object = CompactHost
    layers: int = 1
    times: int = 1

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            layer = self.host(name=f"layer_{i}")
            for _ in range(self.times):
                x = layer(x)
        return x

    def dummy_inputs(self):
        return (jnp.zeros((1, WIDTH)),)


class SetupChain(nn.Module):
    """The same, with its hosts made in setup and the first of them called again at the end."""

    host: object = SetupHost

    def setup(self):
        self.layer_0, self.layer_1 = self.host(), self.host()

    def __call__(self, x):
        return self.layer_0(self.layer_1(self.layer_0(x)))

    def dummy_inputs(self):
        return (jnp.zeros((1, WIDTH)),)


def adapted(backbone, method=PLUS_PLUS, sites=SITES, seed=0):
    """The model, with random parameters that make every adapter felt."""
    model = Adapted(backbone, method, sites)
    return model, random_tree(adapted_shapes(model), seed)


def run(module, params, *inputs, **options):
    return jax.jit(functools.partial(module.apply, **options))({"params": params}, *inputs)


def adapter_of(params, host, method):
    """NumPy function of the adapter under the path `host`, in float64."""
    flat = flatten_dict(params, sep="/")
    own = {
        path.removeprefix(f"{host}/"): np.float64(leaf)
        for path, leaf in flat.items()
        if path.startswith(f"{host}/adapter/") or path.startswith("phm_")
    }
    return lambda x: expected_output(method, own, np.float64(x))


def split(params):
    """Flat backbone and flat rest."""
    flat = flatten_dict(params, sep="/")
    new = {path for path in flat if "/adapter/" in path or path.startswith("phm_")}
    return {p: v for p, v in flat.items() if p not in new}, {p: flat[p] for p in sorted(new)}


def assert_same(actual, expected):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- Where adapters go --------------------------------------------------------------------------


@hosts
@pytest.mark.parametrize("times", [1, 2])
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
    # Float32 through up to four layers, against float64.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(run(model, params, x), expected, rtol=0, atol=1e-5 * scale)
    assert len(new) == 1 + 2 * 6


def backbone_layer(flat, index):
    own = [leaf for path, leaf in sorted(flat.items()) if path.startswith(f"layer_{index}/")]
    bias, kernel = map(np.float64, own)
    return lambda x: np.float64(x) @ kernel + bias


@pytest.mark.parametrize("host", [CompactHost, SetupHost])
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


def test_adapted_nested_in_other_modules():
    """Paths count from the backbone, wherever it stands; two models keep apart."""

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
    outer = random_tree({"kernel": np.zeros((WIDTH, WIDTH)), "bias": np.zeros(WIDTH)}, seed=3)
    x = random_states(4)
    towers = Towers(Tower(one[0]), Tower(two[0]))
    params = {
        name: {"model": params, "layer_0": outer}
        for name, (_, params) in (("first", one), ("second", two))
    }
    shapes = jax.eval_shape(towers.init, jax.random.key(0), x)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    dense = nn.Dense(WIDTH)
    expected = sum(run(dense, outer, run(model, own, x)) for model, own in (one, two))
    np.testing.assert_allclose(run(towers, params, x), expected, rtol=1e-5, atol=1e-5)


def numpy_layer_norm(params, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normal * np.float64(params["scale"]) + np.float64(params["bias"])


def test_the_sites_of_bert():
    """One layer of BERT by hand: adapters on what each projection returns, residuals after."""
    config = TINY_BERT.__class__(**{**vars(TINY_BERT), "num_hidden_layers": 1})
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
    # Float32; layer norms keep the states at order 1.
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


def test_full_fine_tuning_inserts_nothing():
    backbone = Bert(TINY_BERT)
    shapes = adapted_shapes(Adapted(backbone, preset("full")))
    assert flatten_dict(shapes).keys() == flatten_dict(backbone_of(backbone).params).keys()


# --- What they leave alone ----------------------------------------------------------------------

BACKBONES = {
    "bert": (Bert(TINY_BERT), None),
    "bert with a head": (Bert(TINY_BERT, head="token_classification"), None),
    "bert, remat": (Bert(TINY_BERT, remat=True), None),
    "compact": (Chain(layers=2), SITES),
    "setup": (SetupChain(), SITES),
}


@pytest.mark.parametrize(("backbone", "sites"), BACKBONES.values(), ids=BACKBONES)
def test_initial_values_of_the_backbone_are_its_own(backbone, sites):
    model = Adapted(backbone, PLUS_PLUS, sites)
    inputs, key = backbone.dummy_inputs(), jax.random.key(3)
    plain = jax.jit(backbone.init)(key, *inputs)["params"]
    own, new = split(jax.jit(model.init)(key, *inputs)["params"])
    assert_same(own, flatten_dict(plain, sep="/"))
    assert {path for path in new if "/" not in path} == {"phm_rule"}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_the_backbone_is_its_own(remat, dropout):
    """Adapters that add exactly nothing, with or without dropout inside, change no bit."""
    backbone = Bert(TINY_BERT, remat=remat)
    method = preset("compacter", **SMALL, scaling=0.0, dropout=dropout)
    model, params = adapted(backbone, method, None)
    plain = unflatten_dict(split(params)[0], sep="/")
    options = {"deterministic": False, "rngs": {"dropout": jax.random.key(5)}}
    expected = run(backbone, plain, IDS, MASK, **options)
    actual = run(model, params, IDS, MASK, **options)
    assert_same(actual.last_hidden_state, expected.last_hidden_state)
    still = run(backbone, plain, IDS, MASK).last_hidden_state
    assert np.abs(still - expected.last_hidden_state).max() > 0.1


class Droppable(Chain):
    """Takes `deterministic` by position."""

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
        (Chain(), (), {}, False),
    ],
)
def test_dropout_of_the_adapters_follows_the_backbone(backbone, args, options, drops):
    model, params = adapted(backbone, preset("compacter++", **SMALL, dropout=0.5))
    x = random_states(6)

    def call(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, x, *args, **options, rngs=rngs)

    assert bool(np.any(call(0) != call(1))) is drops


@pytest.mark.parametrize("init_range", [1e-4, 1e-1])
def test_the_effect_at_initialisation_is_within_the_rules_scale(init_range):
    """|W| <= sum_i |A_i| |B_i|: the adapter adds at most 1.13 |W_down| |W_up| |x| (GELU's slope)."""
    method = preset("compacter++", **SMALL, phm_init_range=init_range)
    backbone = backbone_of(Chain(), seed=7)
    params = init_adapters(Adapted(backbone.module, method, SITES), backbone, jax.random.key(8))
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
    assert factor < 100 * init_range**2
    change = np.linalg.norm(after - before, axis=-1)
    lengths = np.linalg.norm(before, axis=-1)
    assert np.all(change <= (factor + 1e-6) * lengths)  # 1e-6: the rounding of x + h
    if init_range == 1e-1:
        assert np.all(change > 1e-4 * lengths)


# --- The shared rule ----------------------------------------------------------------------------


def objective(model, cotangent, *inputs):
    def value(params):
        y = model.apply({"params": params}, *inputs)
        return jnp.sum(cotangent * getattr(y, "last_hidden_state", y))

    return jax.jit(jax.value_and_grad(value))


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_the_shared_rule_is_the_sum_over_unshared_copies(remat):
    backbone = Bert(TINY_BERT, remat=remat)
    cotangent = np.float32(np.random.default_rng(1).standard_normal((*IDS.shape, WIDTH)))
    shared, params = adapted(backbone, COMPACTER, None)
    unshared = Adapted(backbone, COMPACTER.replace(shared_phm_rule=False))
    copies = flatten_dict(adapted_shapes(unshared), sep="/")
    flat = flatten_dict(params, sep="/")
    copies = {path: flat.get(path, flat["phm_rule"]) for path in copies}
    assert sum(path.endswith("phm_rule") for path in copies) == 2 * 2 * 2
    one, gradient = objective(shared, cotangent, IDS, MASK)(params)
    many, gradients = objective(unshared, cotangent, IDS, MASK)(unflatten_dict(copies, sep="/"))
    np.testing.assert_allclose(one, many, rtol=1e-5)
    gradients = flatten_dict(gradients, sep="/")
    total = sum(leaf for path, leaf in gradients.items() if path.endswith("phm_rule"))
    # Eight float32 summands; other leaves pass the same sums in another order.
    scale = np.abs(total).max()
    assert scale > 0.1
    np.testing.assert_allclose(gradient["phm_rule"], total, rtol=0, atol=2e-5 * scale)
    for path, leaf in flatten_dict(gradient, sep="/").items():
        if path != "phm_rule":
            scale = np.abs(leaf).max()
            np.testing.assert_allclose(leaf, gradients[path], rtol=0, atol=5e-5 * scale + 1e-6)


@pytest.mark.parametrize("overrides", [{}, {"shared_W_phm": True}, {"factorized_phm_rule": True}])
def test_remat_changes_no_number(overrides):
    method = COMPACTER.replace(**overrides)
    cotangent = np.float32(np.random.default_rng(2).standard_normal((*IDS.shape, WIDTH)))
    plain, params = adapted(Bert(TINY_BERT), method, None)
    rematted = Adapted(Bert(TINY_BERT, remat=True), method)
    assert_same(adapted_paths(rematted), adapted_paths(plain))
    values = [objective(model, cotangent, IDS, MASK)(params) for model in (plain, rematted)]
    assert values[0][1][
        "phm_rule_left" if overrides.get("factorized_phm_rule") else "phm_rule"
    ].any()
    # The same operations, fused differently.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *values)


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


# --- jit ----------------------------------------------------------------------------------------


def test_jit_inside_and_outside():
    model, params = adapted(Chain())
    x = random_states(10)
    eager = model.apply({"params": params}, x)
    plain = jax.jit(model.backbone.apply)({"params": params}, x)  # adapters' leaves are ignored
    assert np.abs(eager - plain).max() > 0.1
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), eager, atol=1e-5)
    np.testing.assert_allclose(jax.jit(model.backbone.apply)({"params": params}, x), plain)


def test_fact_a_function_compiled_before_ignores_the_hook():
    """Why `Adapted` enters the hook inside the call, not around it."""
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


# --- Errors -------------------------------------------------------------------------------------


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
            "unknown site 'ffn'; Bert has attention, feed",
        ),
        (Chain(), {}, None, r"Chain has no table of sites; pass sites=\{name: regular expression"),
        (Chain(), {}, {"other": r"(?P<layer>\d+)"}, "unknown site 'feed_forward'; Chain has other"),
        (
            Chain(),
            {},
            {"feed_forward": r"layer_\d+"},
            r"has no group .*write it as \(\?P<layer>\\d",
        ),
        (Chain(), {"non_linearity": "geluu"}, SITES, "unknown activation 'geluu'"),
        (
            Chain(),
            {},
            {"feed_forward": r"layers_(?P<layer>\d+)"},
            r"site 'feed_forward' matched no module: no path matches 'layers_",
        ),
        # Matches a beginning only.
        (Chain(), {}, {"feed_forward": r"lay(?P<layer>\d*)"}, "matched no module"),
        (Chain(layers=2), {"leave_out": (2,)}, SITES, r"leave_out has \[2\], but .*layers 0 to 1"),
        (
            Chain(layers=2),
            {"leave_out": (0, 1)},
            SITES,
            "leaves no layer of site 'feed_forward' to",
        ),
        (
            Chain(TupleHost),
            {},
            SITES,
            "the host layer_0 returns tuple, not an array; choose as site",
        ),
        (
            Chain(ChildNamedAdapter),
            {},
            SITES,
            "host layer_0 has something of its own named 'adapter'",
        ),
        (Chain(SetupChildNamedAdapter), {}, SITES, "layer_0 has something of its own named"),
        (Chain(ParameterNamedAdapter), {}, SITES, "layer_0 has something of its own named"),
        (Chain(), {"phm_dim": 5}, SITES, "phm_dim=5 does not divide both the width 12"),
        (Chain(), {"shared_W_phm": True}, SITES, "shared_W_phm needs the width of the backbone's"),
    ],
)
def test_what_cannot_work(backbone, overrides, sites, message):
    method = PLUS_PLUS.replace(**overrides)
    with pytest.raises(ValueError, match=message):
        adapted_shapes(Adapted(backbone, method, sites))


def test_missing_adapters_are_an_error():
    """Not a silent plain backbone: the parameters must have every adapter."""
    model, params = adapted(Chain())
    plain = unflatten_dict(split(params)[0], sep="/")
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        model.apply({"params": plain}, random_states(0))


# --- init_adapters ------------------------------------------------------------------------------


def test_init_adapters_adds_to_the_very_leaves():
    backbone = backbone_of(Bert(TINY_BERT))
    model = Adapted(backbone.module, COMPACTER)
    key = jax.random.key(4)
    params = init_adapters(model, backbone, key)
    own, new = split(params)
    given = flatten_dict(backbone.params, sep="/")
    assert own.keys() == given.keys()
    assert all(own[path] is given[path] for path in given)
    drawn = split(jax.jit(model.init)(key, *model.backbone.dummy_inputs())["params"])[1]
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
        ("layer_0/inner/bias", None, r"missing: \['layer_0/inner/bias'\]; left over: none"),
        ("layer_0/adapter/down/bias", np.zeros(6), r"left over: \['layer_0/adapter/down/bias'\]"),
        (
            "layer_1/inner/kernel",
            np.zeros((12, 11)),
            r"shape: \['layer_1/inner/kernel: \(12, 11\) given, \(12, 12\) wanted'\]",
        ),
    ],
)
def test_init_adapters_refuses_other_parameters(path, leaf, message):
    backbone = backbone_of(SetupChain())
    given = types.SimpleNamespace(params=change(backbone.params, path, leaf))
    with pytest.raises(ValueError, match=message):
        init_adapters(Adapted(backbone.module, PLUS_PLUS, SITES), given, jax.random.key(0))
