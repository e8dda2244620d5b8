"""Tests names, shapes, counts, initial values and dtypes of adapter parameters, and dropout."""

import math

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.methods.phm_linear import PHMLinear
from tests.helpers import (
    WIDTH,
    Model,
    expected_output,
    method_of,
    output_and_gradients,
    projection,
    random_params,
    random_states,
    shapes_of,
)

# Names and shapes of the parameters for a width of 384, in the order of creation.
COMPACTER_384 = {
    "phm_rule": (4, 4, 4),
    "adapter/down/left": (4, 96, 1),
    "adapter/down/right": (4, 1, 3),
    "adapter/down/bias": (12,),
    "adapter/up/left": (4, 3, 1),
    "adapter/up/right": (4, 1, 96),
    "adapter/up/bias": (384,),
}
OWN_RULES = {"adapter/down/phm_rule": (4, 4, 4), "adapter/up/phm_rule": (4, 4, 4)}
FULL_BLOCKS = {"adapter/down/blocks": (4, 96, 3), "adapter/up/blocks": (4, 3, 96)}


def without(shapes, *fragments):
    return {path: shape for path, shape in shapes.items() if not path.endswith(fragments)}


@pytest.mark.parametrize(
    ("name", "overrides", "shapes", "per_adapter"),
    [
        ("compacter", {}, COMPACTER_384, 1188),
        (
            "houlsby",
            {},
            {
                "adapter/down/kernel": (384, 12),
                "adapter/down/bias": (12,),
                "adapter/up/kernel": (12, 384),
                "adapter/up/bias": (384,),
            },
            9612,
        ),
        (
            "phm",
            {"phm_dim": 4},
            without(COMPACTER_384, "left", "right", "phm_rule") | FULL_BLOCKS | OWN_RULES,
            2828,
        ),
        (
            "compacter",
            {"factorized_phm_rule": True},
            without(COMPACTER_384, "phm_rule")
            | {"phm_rule_left": (4, 4, 1), "phm_rule_right": (4, 1, 4)},
            1188,
        ),
        (
            "compacter",
            {"shared_W_phm": True},
            without(COMPACTER_384, "left", "right")
            | {
                "phm_down_left": (4, 96, 1),
                "phm_down_right": (4, 1, 3),
                "phm_up_left": (4, 3, 1),
                "phm_up_right": (4, 1, 96),
            },
            396,
        ),
        (
            "compacter",
            {"shared_W_phm": True, "factorized_phm_W": False},
            without(COMPACTER_384, "left", "right")
            | {"phm_down_blocks": (4, 96, 3), "phm_up_blocks": (4, 3, 96)},
            396,
        ),
        (
            "compacter",
            {"layer_norm_before": True, "layer_norm_after": True},
            COMPACTER_384
            | {
                f"adapter/layer_norm_{place}/{kind}": (384,)
                for place in ("before", "after")
                for kind in ("scale", "bias")
            },
            1188 + 4 * 384,
        ),
    ],
)
def test_names_shapes_and_counts(name, overrides, shapes, per_adapter):
    actual = shapes_of(Model(preset(name, **overrides), width=384))
    assert {path: leaf.shape for path, leaf in actual.items()} == shapes
    own = sum(leaf.size for path, leaf in actual.items() if path.startswith("adapter/"))
    assert own == per_adapter


@pytest.mark.parametrize(
    ("name", "adapters", "trained", "percent"),
    [
        ("houlsby", 48, 1_855_104, "0.832"),
        ("phm", 48, 398_976, "0.179"),
        ("compacter", 48, 161_728, "0.073"),
        ("compacter++", 24, 104_704, "0.047"),
    ],
)
def test_counts_of_the_paper(name, adapters, trained, percent):
    """Table 1 of arXiv:2106.04647: T5-base with its layer norms (62 of width 768) trained."""
    shapes = shapes_of(Model(preset(name), width=768))
    shared = sum(leaf.size for path, leaf in shapes.items() if not path.startswith("adapter/"))
    each = sum(leaf.size for path, leaf in shapes.items()) - shared
    count = adapters * each + shared + 62 * 768
    assert count == trained
    assert f"{100 * count / 222_903_552:.3f}" == percent


@pytest.mark.parametrize(
    ("name", "overrides", "standard_deviations"),
    [
        (
            "compacter",
            {"phm_dim": 8},
            {
                # Glorot with gain sqrt(2): sqrt(4 / (fan_in + fan_out)) for each factor.
                "adapter/down/left": math.sqrt(4 / (48 + 1)),
                "adapter/up/right": math.sqrt(4 / (48 + 1)),
                "phm_rule": 1e-4,
            },
        ),
        (
            "compacter",
            {"phm_dim": 8, "w_init": "normal", "phm_c_init": "uniform"},
            {"adapter/down/left": 1e-4, "adapter/up/right": 1e-4, "phm_rule": math.sqrt(1 / 3)},
        ),
        (
            "phm",
            {},
            {
                "adapter/down/blocks": math.sqrt(4 / (32 + 16)),
                "adapter/up/blocks": math.sqrt(4 / (32 + 16)),
                "adapter/down/phm_rule": 1e-2,
                "adapter/up/phm_rule": 1e-2,
            },
        ),
        ("houlsby", {}, {"adapter/down/kernel": 1e-2, "adapter/up/kernel": 1e-2}),
        (
            "houlsby",
            {"w_init": "glorot-uniform"},
            {"adapter/down/kernel": math.sqrt(4 / (384 + 192))},
        ),
    ],
)
def test_initial_values(name, overrides, standard_deviations):
    model = Model(preset(name, reduction_factor=2, **overrides), width=384)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 384), np.float32))["params"]
    params = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    for path, expected in standard_deviations.items():
        # At least 384 draws: a standard error of at most 4 %.
        np.testing.assert_allclose(params[path].std(), expected, rtol=0.15, err_msg=path)
    for path, leaf in params.items():
        if path.endswith("bias"):
            assert not leaf.any(), path
    weights = [leaf.ravel()[:5] for path, leaf in params.items() if not path.endswith("bias")]
    assert len({tuple(values) for values in weights}) == len(weights)


def test_dropout_is_on_the_output_before_the_skip():
    config = preset("houlsby", reduction_factor=2, dropout=0.25, scaling=0.5)
    model = Model(config)
    params = {"params": unflatten_dict(random_params(model, seed=6), sep="/")}
    x = random_states(7)
    whole = np.asarray(model.apply(params, x)) - x

    @jax.jit
    def draw(keys):
        return jax.vmap(lambda key: model.apply(params, x, False, rngs={"dropout": key}))(keys)

    added = np.asarray(draw(jax.random.split(jax.random.key(8), 4000))) - x
    kept = np.abs(added) > 1e-6
    # Each entry is either dropped, or kept and divided by the keep rate.
    np.testing.assert_allclose(
        added[kept], np.broadcast_to(whole / 0.75, kept.shape)[kept], atol=1e-5
    )
    # With 4000 draws, standard errors are 0.7 % of the rate and 0.9 % of the value.
    np.testing.assert_allclose(kept.mean(0), 0.75, atol=0.035)
    np.testing.assert_allclose(added.mean(0), whole, rtol=0.05, atol=1e-5)


def test_dropout_needs_an_rng_when_it_is_on():
    model = Model(preset("houlsby", reduction_factor=2, dropout=0.25))
    params = {"params": unflatten_dict(random_params(model), sep="/")}
    with pytest.raises(flax.errors.InvalidRngError):
        model.apply(params, random_states(0), False)
    # With a rate of zero, no random key is needed.
    Model(preset("houlsby", reduction_factor=2)).apply(params, random_states(0), False)


@pytest.mark.parametrize("knob", ["dense, layer norms", "compacter", "layer norm after, scaled"])
def test_bfloat16_computes_on_float32_parameters(knob):
    config = method_of(knob)
    model = Model(config, dtype=jnp.bfloat16)
    params = random_params(model, seed=9)
    x = jnp.asarray(random_states(10), jnp.bfloat16)
    y, gradients = output_and_gradients(model, params, x, jnp.ones_like(x))
    assert y.dtype == gradients.pop("x").dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in gradients.values()} == {jnp.dtype(jnp.float32)}
    rounded = {path: np.float64(jnp.asarray(v, jnp.bfloat16)) for path, v in params.items()}
    expected = expected_output(config, rounded, np.float64(x))
    # About ten roundings of 2^-9 each, of values at most a few times the largest output.
    np.testing.assert_allclose(
        np.float64(y), expected, rtol=0, atol=10 * 2.0**-8 * np.abs(expected).max()
    )


def test_without_a_dtype_inputs_and_parameters_promote():
    model = Model(method_of("compacter"))
    params = {"params": unflatten_dict(shapes_of(model), sep="/")}
    x = jax.ShapeDtypeStruct((3, WIDTH), jnp.bfloat16)
    assert jax.eval_shape(model.apply, params, x).dtype == jnp.float32


@pytest.mark.parametrize("knob", ["dense, layer norms", "compacter", "shared full blocks"])
def test_param_dtype(knob):
    leaves = shapes_of(Model(method_of(knob), param_dtype=jnp.bfloat16)).values()
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (PHMLinear(6, phm_dim=2), {"phm_rule", "left", "right", "bias"}),
        (PHMLinear(6, phm_dim=2, use_bias=False), {"phm_rule", "left", "right"}),
        (PHMLinear(6, phm_dim=2, phm_rank=None), {"phm_rule", "blocks", "bias"}),
        (
            PHMLinear(6, phm_dim=2, factorized_phm_rule=True),
            {"phm_rule_left", "phm_rule_right", "left", "right", "bias"},
        ),
    ],
)
def test_phm_linear_owns_what_it_is_not_given(layer, names):
    x = np.float32(np.random.default_rng(0).standard_normal((5, 4)))
    variables = layer.init(jax.random.key(1), x)
    assert variables["params"].keys() == names
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), variables["params"])
    exact = {f"adapter/only/{name}": value for name, value in ({"bias": 0.0} | params).items()}
    np.testing.assert_allclose(
        layer.apply({"params": jax.tree.map(np.float32, params)}, x),
        projection(exact, np.float64(x), "only"),
        atol=1e-5,  # float32, sums of about 30 products of order one
    )
    rule = np.float32(rng.standard_normal((2, 2, 2)))
    blocks = np.float32(rng.standard_normal((2, 2, 3)))
    alone = layer.init(jax.random.key(1), x, rule, blocks).get("params", {})
    assert alone.keys() == names & {"bias"}


@pytest.mark.parametrize(("features", "width"), [(6, 5), (5, 6)], ids=["input", "output"])
def test_phm_dim_must_divide_both_widths(features, width):
    message = f"phm_dim=2 does not divide both in_features={width} and features={features}"
    with pytest.raises(ValueError, match=message):
        PHMLinear(features, phm_dim=2).init(jax.random.key(0), np.zeros((1, width)))


def test_a_bottleneck_that_does_not_fit_the_width():
    with pytest.raises(ValueError, match="phm_dim=4 does not divide both the width 12"):
        shapes_of(Model(preset("compacter", reduction_factor=2)))


def test_shared_blocks_need_a_width():
    config = preset("compacter", shared_W_phm=True)
    with pytest.raises(ValueError, match="shared_W_phm needs the width of the backbone's hidden"):
        config.shared(lambda *_: None, None, [], jnp.float32)
