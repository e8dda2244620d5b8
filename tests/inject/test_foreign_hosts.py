"""Applies methods to hosts in third-party modules, merges them, and refuses unsuitable hosts."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import InvalidRngError, ScopeParamNotFoundError

from compacter_jax.catalogue import preset
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.inject.merging import merge_adapter
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig
from compacter_jax.sites import Site
from tests.helpers import quick_jit, random_tree

LORA = preset("lora", rank=2, lora_alpha=4.0, sites=("query",))
IA3 = IA3Config(sites=("key",), input_sites=())
BOTTLENECK = preset("houlsby", sites=("feed_forward",), reduction_factor=2, train_layer_norms=False)


class One(nn.Module):
    """A model that passes its arguments on to its only module, `host_0`."""

    make: object

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.make(name="host_0")(*args, **kwargs)


def adapted(backbone, method, *inputs, site=r"host_(?P<layer>\d+)", **options):
    """Returns the model, and random parameters that all have an effect."""
    sites = dict.fromkeys(("query", "key", "feed_forward", "encoder_key_value"), site)
    model = Adapted(backbone, method, sites, **options)
    return model, random_tree(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])


def plain(params):
    """Returns the parameters without adapters."""
    return {
        name: plain(child) if isinstance(child, dict) else child
        for name, child in params.items()
        if name != "adapter"
    }


def run(module, params, *inputs, **options):
    return quick_jit(functools.partial(module.apply, **options))({"params": params}, *inputs)


def values(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# The input is `[2, 3, 4, 6]`. Each entry has NumPy's product with the kernel, and the shape in
# which `left @ right` is added to it.
LAYERS = {
    "nn.Dense": (
        functools.partial(nn.Dense, 5),
        "abci,io->abco",
        lambda update, kernel: update,
    ),
    "several outputs": (
        functools.partial(nn.DenseGeneral, (2, 3)),
        "abci,iop->abcop",
        lambda update, kernel: update.reshape(kernel.shape),
    ),
    "several inputs": (
        functools.partial(nn.DenseGeneral, 5, axis=(-2, -1)),
        "abij,ijo->abo",
        lambda update, kernel: update.reshape(kernel.shape),
    ),
    "an axis in the middle": (
        functools.partial(nn.DenseGeneral, (2, 5), axis=1),
        "aibc,iop->abcop",
        lambda update, kernel: update.reshape(kernel.shape),
    ),
    "inputs in another order": (
        functools.partial(nn.DenseGeneral, 5, axis=(-1, 1), use_bias=False),
        "aibj,ijo->abo",
        lambda update, kernel: update.reshape(kernel.shape),
    ),
    "an einsum": (
        functools.partial(nn.Einsum, (7, 5, 6), "...i,oki->...ko", use_bias=False),
        "abci,oki->abcko",
        lambda update, kernel: update.reshape(6, 5, 7).transpose(2, 1, 0),
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_lora_at_flax_linear_layers(layer):
    make, equation, as_kernel = LAYERS[layer]
    x, backbone = values(2, 3, 4, 6), One(make)
    model, params = adapted(backbone, LORA, x)
    host = jax.tree.map(np.float64, params["host_0"])
    left, right, kernel = host["adapter"]["left"], host["adapter"]["right"], host["kernel"]
    update = as_kernel(2.0 * left @ right, kernel)
    expected = np.einsum(equation, np.float64(x), kernel + update) + host.get("bias", 0.0)
    np.testing.assert_allclose(run(model, params, x), expected, rtol=0, atol=1e-4)
    # Compares the gradient of a weighted sum of the outputs with the chain rule in NumPy.
    weights = np.random.default_rng(1).standard_normal(expected.shape)
    slopes = quick_jit(jax.grad(lambda p: (model.apply({"params": p}, x) * weights).sum()))(params)
    inputs, outputs = equation.split("->")
    letters = inputs.split(",")
    of_kernel = np.einsum(f"{letters[0]},{outputs}->{letters[1]}", np.float64(x), weights)
    basis = np.stack(
        [
            as_kernel(unit, kernel).ravel()
            for unit in np.eye(left.shape[0] * right.shape[1]).reshape(
                -1, left.shape[0], right.shape[1]
            )
        ]
    )
    of_update = (basis @ of_kernel.ravel()).reshape(left.shape[0], right.shape[1])
    own = slopes["host_0"]["adapter"]
    np.testing.assert_allclose(own["left"], 2.0 * of_update @ right.T, rtol=0, atol=2e-4)
    np.testing.assert_allclose(own["right"], 2.0 * left.T @ of_update, rtol=0, atol=2e-4)
    # With merged weights, the plain layer computes the same.
    merged = merge_adapter(model, params, x)
    np.testing.assert_allclose(merged["host_0"]["kernel"], kernel + update, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run(backbone, merged, x), expected, rtol=0, atol=1e-4)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attn_0")(x, x)


@pytest.mark.contract
def test_lora_in_flax_attention_is_merged():
    """Merges LoRA in all four projections; attention with merged kernels computes the same."""
    x, method = values(2, 3, 8), LORA
    site = r"attn_(?P<layer>\d+)/(query|key|value|out)"
    model, params = adapted(Attention(), method, x, site=site)
    assert set(params["attn_0"]["out"]["adapter"]) == {"left", "right"}
    assert params["attn_0"]["query"]["adapter"]["right"].shape == (2, 8)
    kernels = {}
    for name, host in jax.tree.map(np.float64, params["attn_0"]).items():
        update = 2.0 * host["adapter"]["left"] @ host["adapter"]["right"]
        kernels[name] = host["kernel"] + update.reshape(host["kernel"].shape)
    states = {
        name: np.einsum("abi,ihd->abhd", np.float64(x), kernels[name])
        + np.float64(params["attn_0"][name]["bias"])
        for name in ("query", "key", "value")
    }
    scores = np.einsum("aqhd,akhd->ahqk", states["query"], states["key"]) / np.sqrt(4)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("ahqk,akhd->aqhd", weights, states["value"])
    expected = np.einsum("aqhd,hdo->aqo", mixed, kernels["out"])
    expected += np.float64(params["attn_0"]["out"]["bias"])
    np.testing.assert_allclose(run(model, params, x), expected, rtol=0, atol=1e-4)
    merged = merge_adapter(model, params, x)
    np.testing.assert_allclose(run(Attention(), merged, x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("part", ["sites", "input_sites"])
def test_ia3_of_several_axes_is_merged(part):
    method = IA3Config(**{"sites": (), "input_sites": (), part: ("key",)})
    site = r"attn_(?P<layer>\d+)/(value|out)"
    x = values(2, 3, 8)
    model, params = adapted(Attention(), method, x, site=site)
    merged = merge_adapter(model, params, x)
    expected = run(model, params, x)
    assert np.abs(expected - run(Attention(), plain(params), x)).max() > 0.1
    np.testing.assert_allclose(run(Attention(), merged, x), expected, rtol=0, atol=1e-5)


class Scanned(nn.Module):
    """Three layers with stacked parameters; only the random stream `rows` is the same in all."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(x.shape[-1], name="dense")(x), None

        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


@pytest.mark.parametrize("method", [LORA, IA3, IA3Config(sites=(), input_sites=("key",))])
def test_merging_under_scan(method):
    x = values(2, 4)
    model, params = adapted(Scanned(), method, x, site=r"layers/dense(?P<layer>\d+)?")
    merged = merge_adapter(model, params, x)
    expected = run(model, params, x)
    np.testing.assert_allclose(run(Scanned(), merged, x), expected, rtol=0, atol=1e-5)


class Transposed(nn.Module):
    """A layer with a kernel of shape `[out, in]`, like `FlaxConv1D` of transformers."""

    features: int

    @nn.compact
    def __call__(self, x):
        shape = (self.features, x.shape[-1])
        return x @ self.param("kernel", nn.initializers.normal(), shape).T


class SubclassOfDense(nn.Dense):
    """A subclass of Dense that multiplies by the transposed kernel."""

    @nn.compact
    def __call__(self, x):
        shape = (self.features, x.shape[-1])
        return x @ self.param("kernel", nn.initializers.normal(), shape).T


@pytest.mark.parametrize("make", [Transposed, SubclassOfDense])
@pytest.mark.parametrize("method", [LORA, IA3])
def test_merging_into_a_kernel_of_unknown_layout_is_refused(make, method):
    """LoRA works in such a host, but a square kernel does not show its layout in its shape."""
    x = values(2, 6)
    model, params = adapted(One(functools.partial(make, 6)), method, x)
    assert np.abs(run(model, params, x) - run(model.backbone, plain(params), x)).max() > 0.1
    with pytest.raises(ValueError, match=f"host_0 is a {make.__name__}, whose kernel layout"):
        merge_adapter(model, params, x)


def test_merging_wants_example_inputs():
    model, params = adapted(One(functools.partial(nn.Dense, 6)), LORA, values(2, 6))
    with pytest.raises(ValueError, match="One has no dummy_inputs"):
        merge_adapter(model, params)


class NamedDense(nn.Dense):
    """A subclass of Dense that differs only in its name, so that its layout is known."""


@pytest.mark.contract
def test_merging_into_a_subclass_that_computes_as_its_base():
    x = values(2, 6)
    model, params = adapted(One(functools.partial(NamedDense, 6)), LORA, x)
    merged = merge_adapter(model, params, x)
    np.testing.assert_allclose(
        run(model.backbone, merged, x), run(model, params, x), rtol=0, atol=1e-5
    )


NOT_LINEAR = {
    "Conv": (functools.partial(nn.Conv, 4, (3, 3)), (2, 5, 5, 4), jnp.float32),
    "Conv of one": (functools.partial(nn.Conv, 4, (1, 1)), (2, 5, 5, 4), jnp.float32),
    "ConvTranspose": (functools.partial(nn.ConvTranspose, 4, (3,)), (2, 5, 4), jnp.float32),
    "Embed": (functools.partial(nn.Embed, 7, 4), (2, 5), jnp.int32),
    "DenseGeneral": (functools.partial(nn.DenseGeneral, 4, batch_dims=(0,)), (2, 5), jnp.float32),
    "Einsum": (functools.partial(nn.Einsum, (2, 5, 4), "bi,bio->bo"), (2, 5), jnp.float32),
}


@pytest.mark.parametrize("layer", NOT_LINEAR)
def test_lora_is_refused_where_there_is_no_matrix(layer):
    make, shape, dtype = NOT_LINEAR[layer]
    model = Adapted(One(make), LORA, {"query": r"host_(?P<layer>\d+)"})
    with pytest.raises(ValueError, match=r"(?i)" + layer.split()[0]) as error:
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))
    assert re.search("LoRA (needs a linear layer|does not support|requires)", str(error.value))
    assert "\n" not in str(error.value)


class EquationFirst(nn.Module):
    """A layer like Gemma's `Einsum`: it is called with the equation, and its weight is `w`."""

    shape: tuple

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), self.shape))


class CallsEinsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        return EquationFirst((2, 4, 3), name="host_0")("BTD,NDH->BTNH", x)


def test_lora_at_a_module_that_is_called_with_an_equation():
    x = values(2, 3, 4)
    model, params = adapted(CallsEinsum(), LORA, x)
    own = params["host_0"]["adapter"]
    update = np.float64(own["left"]) @ np.float64(own["right"])
    kernel = np.float64(params["host_0"]["w"]) + 2.0 * update.reshape(4, 2, 3).transpose(1, 0, 2)
    expected = np.einsum("btd,ndh->btnh", np.float64(x), kernel)
    np.testing.assert_allclose(run(model, params, x), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="host_0 is a EquationFirst"):
        merge_adapter(model, params, x)
    ia3 = IA3Config(sites=(), input_sites=("key",))
    with pytest.raises(ValueError, match=r"EquationFirst.__call__ at host_0 is called with \(str"):
        adapted(CallsEinsum(), ia3, x)


class Part(nn.Module):
    """A factor for every feature, with a configurable name, so that parts can share a scope."""

    own_name: str
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        return x @ self.param(self.own_name, nn.initializers.normal(), shape)


class FeedForward(nn.Module):
    """A feed-forward layer like Gemma's: it owns the parameters of its parts; all share a path."""

    inner: int = 6

    @nn.compact
    def __call__(self, x):
        for name, features in (("gating", self.inner), ("linear", 6)):
            part = Part(name, features)
            nn.share_scope(self, part)
            x = part(x)
        return x


class Wrapper(nn.Module):
    """A wrapper that shares the scope of its part, like `DenseLoRA` in Flax's `share_scope`."""

    @nn.compact
    def __call__(self, x):
        return 3.0 * self.part(x)

    def setup(self):
        self.part = nn.Dense(6)
        nn.share_scope(self, self.part)


class CallsAsOther(nn.Module):
    """A module that shares the scope of its parts and has another main method than `__call__`."""

    @nn.compact
    def forward(self, x):
        for name in ("gating", "linear"):
            part = Part(name, 6)
            nn.share_scope(self, part)
            x = part(x)
        return x

    def __call__(self, x):
        return self.forward(x)


class Forward(nn.Module):
    @nn.compact
    def __call__(self, x):
        return CallsAsOther(name="host_0").forward(x)


@pytest.mark.contract
@pytest.mark.parametrize("inner", [6, 10])
def test_modules_that_share_a_scope_get_one_adapter(inner):
    x, backbone = values(2, 6), One(functools.partial(FeedForward, inner))
    model, params = adapted(backbone, IA3, x)
    params["host_0"]["adapter"]["scale"] = 2 * jnp.ones(6)
    expected = 2 * run(backbone, plain(params), x)
    np.testing.assert_allclose(run(model, params, x), expected, rtol=1e-5, atol=0)


def test_a_wrapper_that_takes_the_scope_of_its_part_gets_one_adapter():
    x, backbone = values(2, 6), One(Wrapper)
    model, params = adapted(backbone, IA3, x)
    params["host_0"]["adapter"]["scale"] = 2 * jnp.ones(6)
    expected = 2 * run(backbone, plain(params), x)
    np.testing.assert_allclose(run(model, params, x), expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="host_0 is a Wrapper, whose kernel layout"):
        merge_adapter(*adapted(backbone, LORA, x), x)


def test_two_hosts_of_one_scope_are_refused():
    with pytest.raises(ValueError, match="is a Part and a Part that share a scope"):
        adapted(Forward(), IA3, values(2, 6))


class Switched(nn.Module):
    """A backbone whose argument for dropout is called `train`."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(6, name="host_0")(x)


class Enabled(nn.Module):
    @nn.compact
    def __call__(self, x, *, enable_dropout=True):
        return nn.Dense(6, name="host_0")(x)


class Deaf(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="host_0")(x)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, training=None):
        return nn.Dense(6, name="host_0")(x)


@pytest.mark.parametrize(
    ("backbone", "name", "default"),
    [
        (Switched(), "train", False),
        (Enabled(), "enable_dropout", True),
        (Training(), "training", 0),
    ],
)
@pytest.mark.parametrize("method", [BOTTLENECK, LORA])
def test_dropout_by_the_backbones_own_word(backbone, name, default, method):
    """If the backbone's own argument switches dropout on, a key is needed."""
    x = values(2, 6)
    model, params = adapted(backbone, method.replace(dropout=0.5), x)

    def call(**options):
        return jax.eval_shape(lambda params: model.apply({"params": params}, x, **options), params)

    call(**{name: False})
    for options in ({name: True}, {} if default else {name: True}):
        with pytest.raises(InvalidRngError):
            call(**options)
    if not default:
        call()


def test_dropout_drops():
    x = values(2, 6)
    model, params = adapted(Switched(), LORA.replace(dropout=0.5), x)

    def call(key, *, train):
        rngs = {"dropout": jax.random.key(key)}
        return np.asarray(model.apply({"params": params}, x, train=train, rngs=rngs))

    assert (call(0, train=True) != call(1, train=True)).any()
    np.testing.assert_array_equal(call(0, train=False), call(1, train=False))


@pytest.mark.parametrize("method", [BOTTLENECK, LORA])
def test_dropout_that_would_never_be_on_is_refused(method):
    with pytest.raises(
        ValueError,
        match=r"dropout=0\.5 would never be applied: Deaf takes none of the arguments det",
    ):
        adapted(Deaf(), method.replace(dropout=0.5), values(2, 6))


Result = collections.namedtuple("Result", ["cache", "states"])


class Several(nn.Module):
    """A host that returns its states as one of several outputs."""

    pack: object

    @nn.compact
    def __call__(self, x):
        return self.pack(jnp.zeros(2), nn.Dense(6, name="dense")(x))


@pytest.mark.parametrize("pack", [lambda *y: y, lambda *y: list(y), Result])
def test_a_host_that_returns_its_states_among_others(pack):
    x, backbone = values(2, 6), One(functools.partial(Several, pack))
    site = Site(host=r"host_(?P<layer>\d+)", output=1)
    model, params = adapted(backbone, IA3, x, site=site)
    before, after = run(backbone, plain(params), x), run(model, params, x)
    assert type(before) is type(after)
    np.testing.assert_array_equal(after[0], before[0])
    expected = before[1] * params["host_0"]["adapter"]["scale"]
    np.testing.assert_allclose(after[1], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (2, "output=2, but the host host_0 returns 2 values"),
        (True, "output=True; it must be the index"),
        (-1, "output=-1; it must be the index"),
        (None, r"returns tuple, not an array; .* Site\(host=…, output=1\)"),
    ],
)
def test_outputs_that_are_none(output, message):
    backbone = One(functools.partial(Several, lambda *y: y))
    with pytest.raises(ValueError, match=message):
        adapted(backbone, IA3, values(2, 6), site=Site(host=r"host_(?P<layer>\d+)", output=output))


def test_an_output_of_a_host_that_returns_an_array():
    with pytest.raises(ValueError, match="output=1, but the host host_0 returns"):
        adapted(Deaf(), IA3, values(2, 6), site=Site(host=r"host_(?P<layer>\d+)", output=1))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.LSTMCell(4, name="cell_0"), name="rnn")(x)


def test_a_cell_of_a_recurrent_network():
    """The call of the cell returns the carry and the output, inside a scan over time."""
    x, site = values(2, 3, 4), Site(host=r"cell_(?P<layer>\d+)", output=1)
    model, params = adapted(Recurrent(), IA3, x, site=site)
    expected = run(Recurrent(), plain(params), x) * params["cell_0"]["adapter"]["scale"]
    np.testing.assert_allclose(run(model, params, x), expected, rtol=1e-5, atol=1e-6)


class Methods(nn.Module):
    def setup(self):
        self.host_0 = nn.Dense(6)

    def features(self, x, *, twice=False):
        return self.host_0(x) * (2 if twice else 1)

    def __call__(self, x):
        return self.features(x).mean()


def test_a_module_of_nnx_is_refused():
    with pytest.raises(
        ValueError, match=r"has type Linear and is not a flax\.linen module; .*ToNNX"
    ):
        Adapted(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), LORA, sites={"query": "a"})


def test_any_method_of_the_backbone():
    x = values(2, 6)
    model, params = adapted(Methods(), IA3, x)
    variables, scale = {"params": params}, params["host_0"]["adapter"]["scale"]
    expected = 2 * Methods().apply({"params": plain(params)}, x, method="features") * scale

    def features(module, x):  # like the wrappers in transformers
        return module.host_0(x) * 2

    for made in (
        model.apply(variables, x, twice=True, method="features"),
        model.apply(variables, x, twice=True, method=Methods.features),
        model.apply(variables, x, method=features),
        model.apply(variables, "features", x, twice=True, method="call"),
        model.bind(variables).call("features", x, twice=True),
    ):
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        model.apply(variables, x, method=Adapted.__call__), model.apply(variables, x)
    )
    with pytest.raises(ValueError, match="Methods has no method 'feature'"):
        model.apply(variables, x, method="feature")
    with pytest.raises(ValueError, match="calls the backbone directly, which has no parameters"):
        model.apply(variables, x, method=lambda model, x: model.backbone.features(x))
    with pytest.raises(ScopeParamNotFoundError):
        model.apply({"params": {"host_0": {"other": x}}}, x, method=features)


def test_any_method_under_intrinsic_dimension():
    x = values(2, 6)
    method = preset("intrinsic", dimension=5)
    model = Adapted(Methods(), method, {})
    backbone = One(None).clone()  # the call reads only its parameters
    params = random_tree(jax.eval_shape(Methods().init, jax.random.key(0), x)["params"])
    object.__setattr__(backbone, "params", params)
    full = init_adapters(model, backbone, jax.random.key(0), x)
    assert full["intrinsic_vector"].shape == (5,)
    y = model.apply({"params": full}, x, method="features")
    np.testing.assert_allclose(y, Methods().apply({"params": params}, x, method="features"))


class LikeT5X(nn.Module):
    """A third-party layer with `axis` and `features` and a flat kernel."""

    features: tuple
    axis: object = -1

    @nn.compact
    def __call__(self, x):
        size = int(np.prod(self.features))
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], size))
        return (x @ kernel).reshape(*x.shape[:-1], *self.features)


def test_lora_at_a_layer_with_axis_and_features():
    x = values(2, 3, 4)
    model, params = adapted(One(functools.partial(LikeT5X, (2, 5))), LORA, x)
    own = params["host_0"]["adapter"]
    kernel = np.float64(params["host_0"]["kernel"]) + 2.0 * np.float64(own["left"]) @ own["right"]
    expected = (np.float64(x) @ kernel).reshape(2, 3, 2, 5)
    np.testing.assert_allclose(run(model, params, x), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="host_0 is a LikeT5X"):
        merge_adapter(model, params, x)


class ByName(nn.Module):
    """A module that calls its parts with keyword arguments."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="host_0")(inputs=x)
        return nn.MultiHeadDotProductAttention(2, name="attn")(inputs_q=x, inputs_k=x)


@pytest.mark.parametrize("method", [LORA, IA3Config(sites=(), input_sites=("key",))])
def test_a_host_that_is_called_by_name(method):
    x = values(2, 3, 6)
    model, params = adapted(ByName(), method, x)
    merged = merge_adapter(model, params, x)
    np.testing.assert_allclose(run(ByName(), merged, x), run(model, params, x), rtol=0, atol=1e-4)


def test_prefix_tuning_says_what_attention_it_wants():
    method = PrefixTuningConfig(sites=("encoder_key_value",), prefix_length=2, flat=True)
    site = Site(host=r"attn_(?P<layer>\d+)", role="attend")
    with pytest.raises(ValueError, match=r"attend\(query, key, value, biases\).*MultiHeadDotProd"):
        adapted(Attention(), method, values(2, 3, 8), site=site)
    join = preset("pfeiffer-feed-forward", reduction_factor=2, sites=("feed_forward",))
    with pytest.raises(ValueError, match=r"join\(residual, output\), but Dense.__call__ at host_0"):
        adapted(Deaf(), join, values(2, 6), site=Site(host=r"host_(?P<layer>\d+)", role="join"))


@nn.jit
class JitBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(6, name="host")(x)


class JitBlocks(nn.Module):
    """Two blocks that nn.jit treats as one."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = JitBlock(name=f"block_{i}")(x)
        return x


class JitCall(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.Dense(6, name=f"host_{i}")(x)
        return x


@pytest.mark.contract
@pytest.mark.parametrize(
    ("backbone", "site", "leave_out"),
    [
        (JitBlocks(), r"block_(?P<layer>\d+)/host", (0,)),
        (JitCall(), r"host_(?P<layer>\d+)", (1,)),
    ],
)
def test_under_nn_jit(backbone, site, leave_out):
    """The backbone was called before it was adapted, and is called several times afterwards."""
    x = values(2, 6)
    own = backbone.init(jax.random.key(0), x)["params"]
    before = backbone.apply({"params": own}, x)
    model, params = adapted(backbone, IA3.replace(leave_out=leave_out), x, site=site)
    kept = [i for i in range(2) if i not in leave_out]
    scales = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "scale" in str(path)]
    assert len(scales) == len(kept)

    def expected(params):
        y = x
        for i in range(2):
            host = params[f"block_{i}"]["host"] if f"block_{i}" in params else params[f"host_{i}"]
            h = y @ host["kernel"] + host["bias"]
            y = y + h * (host["adapter"]["scale"] if i in kept else 1.0)
        return y

    slopes = jax.jit(jax.grad(lambda p: model.apply({"params": p}, x).sum()))(params)
    wanted = jax.jit(jax.grad(lambda p: expected(p).sum()))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), slopes, wanted
    )
    for call in (jax.jit(model.apply), model.apply, model.apply):
        y = call({"params": params}, x)
        np.testing.assert_allclose(y, expected(params), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(backbone.apply({"params": own}, x), before)
