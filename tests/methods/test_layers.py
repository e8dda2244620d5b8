"""Tests the layers of single methods: parameters, initial values, dtypes and dropout."""

import math

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compacter_jax.catalogue import preset
from compacter_jax.methods.bitfit import AddedBias
from compacter_jax.methods.bottleneck import Bottleneck, LowRankLinear
from compacter_jax.methods.ia3 import IA3Scale
from compacter_jax.methods.lora import LoRAConfig, LoRADelta
from compacter_jax.methods.prefix_tuning import PrefixKeyValue, PrefixTuningConfig, prefix_hidden
from compacter_jax.methods.prompt_tuning import PromptTuningConfig, SoftPrompt
from tests.helpers import Model, quick_jit, random_tree

IN, OUT, LENGTH = 60, 36, 5
STATES = np.float32(np.random.default_rng(0).standard_normal((3, 7, IN)))
HIDDEN = np.float32(np.random.default_rng(1).standard_normal((LENGTH, 8)))
FLAT = PrefixTuningConfig(prefix_length=LENGTH, flat=True)
DEEP = PrefixTuningConfig(prefix_length=LENGTH, bottleneck_size=8)


def glorot(fan_in, fan_out):
    """Returns the standard deviation for a gain of sqrt(2)."""
    return math.sqrt(4 / (fan_in + fan_out))


# PyTorch's linear layers start uniform within 1 / sqrt(in).
LINEAR = 1 / math.sqrt(3 * IN)
# The layer, its arguments, and for each parameter its shape and its initial mean and deviation.
LAYERS = {
    "low rank": (
        LowRankLinear(OUT, rank=20),
        (STATES,),
        {
            "left": ((IN, 20), 0, glorot(IN, 20)),
            "right": ((20, OUT), 0, glorot(20, OUT)),
            "bias": ((OUT,), 0, 0),
        },
    ),
    "LoRA": (
        LoRADelta(LoRAConfig(rank=8), OUT),
        (STATES,),
        {"left": ((IN, 8), 0, LINEAR), "right": ((8, OUT), 0, 0)},
    ),
    "IA3 of an output": (IA3Scale(), (STATES,), {"scale": ((IN,), 1, 0)}),
    "IA3 of an input": (IA3Scale("input_scale"), (STATES,), {"input_scale": ((IN,), 1, 0)}),
    "new bias": (AddedBias(), (STATES,), {"bias": ((IN,), 0, 0)}),
    "prompt": (
        SoftPrompt(PromptTuningConfig(prompt_length=LENGTH, prompt_init_range=0.25)),
        (STATES,),
        {"prompt": ((LENGTH, IN), 0, 0.5 / math.sqrt(12))},
    ),
    "flat prefix": (
        PrefixKeyValue(FLAT, OUT),
        (3, None),
        {"key": ((LENGTH, OUT), 0, 1), "value": ((LENGTH, OUT), 0, 1)},
    ),
    "prefix": (
        PrefixKeyValue(DEEP, OUT),
        (3, HIDDEN),
        {"kernel": ((8, 2 * OUT), 0, 1 / math.sqrt(3 * 8)), "bias": ((2 * OUT,), 0, 0)},
    ),
}
every_layer = pytest.mark.parametrize(("layer", "args", "wanted"), LAYERS.values(), ids=LAYERS)


@every_layer
def test_parameters_and_their_initial_values(layer, args, wanted):
    params = jax.device_get(layer.init(jax.random.key(0), *args)["params"])
    assert {name: leaf.shape for name, leaf in params.items()} == {
        name: shape for name, (shape, _, _) in wanted.items()
    }
    for name, (_, mean, deviation) in wanted.items():
        leaf = params[name]
        if deviation == 0:
            np.testing.assert_array_equal(leaf, mean)
            continue
        # With at least 180 draws, the standard error is at most 5 % of the deviation.
        np.testing.assert_allclose(leaf.std(), deviation, rtol=0.2)
        np.testing.assert_allclose(leaf.mean(), mean, atol=4 * deviation / math.sqrt(leaf.size))


def test_uniform_values_stay_within_their_range():
    for name, bound in (("LoRA", 1 / math.sqrt(IN)), ("prompt", 0.25)):
        layer, args, _ = LAYERS[name]
        params = layer.init(jax.random.key(1), *args)["params"]
        leaf = np.abs(params["left" if name == "LoRA" else "prompt"])
        assert 0.95 * bound < leaf.max() <= bound


def test_what_all_layers_of_a_prefix_share():
    drawn = {}

    def param(name, init, shape, dtype):
        drawn[name] = init(jax.random.key(len(drawn)), shape, dtype)
        return drawn[name]

    config = PrefixTuningConfig(prefix_length=LENGTH, bottleneck_size=40)
    hidden = prefix_hidden(param, config, "cross_key_value", IN, jnp.float32)
    embedding, kernel, bias = (
        np.float64(drawn.pop(f"prefix_cross_key_value_{name}"))
        for name in ("embedding", "kernel", "bias")
    )
    assert not drawn
    np.testing.assert_allclose(hidden, np.tanh(embedding @ kernel + bias), atol=1e-5)
    np.testing.assert_allclose([embedding.std(), kernel.std()], [1, LINEAR], rtol=0.2)
    assert not bias.any()
    message = "needs the width of the backbone's hidden states: give .* or set flat=True"
    with pytest.raises(ValueError, match=message):
        prefix_hidden(param, config, "cross_key_value", None, jnp.float32)


@every_layer
def test_dtypes(layer, args, wanted):
    """Layers compute in `dtype` and keep parameters in `param_dtype`."""
    for dtype, param_dtype in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        typed = layer.clone(dtype=dtype, param_dtype=param_dtype)
        y, variables = jax.eval_shape(lambda: typed.init_with_output(jax.random.key(0), *args))  # noqa: B023
        assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}


DROPPING = {
    "LoRA": (LoRADelta(LoRAConfig(rank=4, dropout=0.25), OUT), (STATES[:1, :2],)),
    "flat prefix": (PrefixKeyValue(FLAT.replace(dropout=0.25), OUT), (2, None)),
    "prefix": (PrefixKeyValue(DEEP.replace(dropout=0.25), OUT), (2, HIDDEN)),
}


@pytest.mark.parametrize(("layer", "args"), DROPPING.values(), ids=DROPPING)
def test_dropout_is_off_by_default_and_unbiased_when_on(layer, args):
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(2)
    params = {name: np.float32(rng.standard_normal(leaf.shape)) for name, leaf in shapes.items()}
    whole = np.array(layer.apply({"params": params}, *args))

    @quick_jit
    def draw(keys):
        return jax.vmap(
            lambda key: jnp.stack(
                layer.apply({"params": params}, *args, False, rngs={"dropout": key})
            )
        )(keys)

    draws = np.asarray(draw(jax.random.split(jax.random.key(3), 2000)))
    assert draws.std(0).min() > 0
    # 2000 draws; the bound is five standard errors.
    np.testing.assert_array_less(np.abs(draws.mean(0) - whole), 5 * draws.std(0) / math.sqrt(2000))
    # Dropout differs between rows.
    if isinstance(layer, PrefixKeyValue):
        assert (draws[:, :, 0] != draws[:, :, 1]).any()
    with pytest.raises(flax.errors.InvalidRngError):
        layer.apply({"params": params}, *args, False)


@pytest.mark.parametrize(
    "layer",
    [
        LoRADelta(LoRAConfig(rank=4, dropout=0.5), OUT),
        Bottleneck(preset("houlsby", reduction_factor=4, dropout=0.5)),
        Bottleneck(preset("compacter", reduction_factor=5, dropout=0.5)),
    ],
    ids=["LoRA", "dense", "compacter"],
)
def test_dropout_of_what_is_no_padding_does_not_depend_on_it(layer):
    """Padding added by a longer batch must not change the dropout of the real tokens."""
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), STATES))["params"]
    params = random_tree(shapes, 4)

    def run(x):
        rngs = {"dropout": jax.random.key(5)}
        return layer.apply({"params": params}, x, deterministic=False, rngs=rngs)

    short, rows = run(STATES[:2, :4]), run(STATES[:2, 3])
    whole = run(STATES)
    assert np.abs(whole - layer.apply({"params": params}, STATES)).max() > 0.1
    np.testing.assert_allclose(short, whole[:2, :4], atol=1e-5)
    assert rows.shape == (2, whole.shape[-1])


@pytest.mark.parametrize("name", ["parallel", "scaled-parallel"])
def test_parallel_bottlenecks_start_at_zero(name):
    model = Model(preset(name), width=IN)
    params = model.init(jax.random.key(4), STATES)["params"]["adapter"]
    assert not params["up"]["kernel"].any()
    np.testing.assert_allclose(params["down"]["kernel"].std(), LINEAR, rtol=0.1)
    np.testing.assert_array_equal(model.apply({"params": {"adapter": params}}, STATES), STATES)


def test_a_skip_from_elsewhere():
    """The update of an adapter does not depend on the residual that it is added to."""
    adapter = Bottleneck(preset("houlsby", reduction_factor=4, layer_norm_after=True))
    params = adapter.init(jax.random.key(5), STATES)
    skip = STATES[::-1]
    added = adapter.apply(params, STATES) - STATES
    assert np.abs(added).max() > 1
    np.testing.assert_allclose(adapter.apply(params, STATES, skip=skip) - skip, added, atol=1e-6)
