"""Tests how bottlenecks start: the paper's saddle point, the identity, and Glorot's size."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax import phm
from compacter_jax.methods.bottleneck import Bottleneck, BottleneckConfig, LowRankBottleneckConfig
from compacter_jax.methods.compacter import PHMBottleneckConfig
from tests.helpers import SMALL, Model, backbone_of, random_states, shapes_of

SIZES = {"reduction_factor": 2, "phm_dim": 3}
OF_EVERY_KIND = {
    "dense": BottleneckConfig(reduction_factor=2, w_init_up="zeros"),
    "dense, lora": BottleneckConfig(reduction_factor=2, w_init="lora", w_init_up="zeros"),
    "low rank": LowRankBottleneckConfig(reduction_factor=2, rank=2, w_init_up="zeros"),
    "Compacter": PHMBottleneckConfig(**SIZES, w_init_up="zeros", phm_c_init="glorot"),
    "own rules": PHMBottleneckConfig(**SIZES, w_init_up="zeros", shared_phm_rule=False),
    "full blocks": PHMBottleneckConfig(
        **SIZES, w_init_up="zeros", factorized_phm_W=False, shared_phm_rule=False
    ),
    "shared factors": PHMBottleneckConfig(**SIZES, w_init_up="zeros", shared_W_phm=True),
    "shared blocks": PHMBottleneckConfig(
        **SIZES, w_init_up="zeros", shared_W_phm=True, factorized_phm_W=False
    ),
    "factorised rule": PHMBottleneckConfig(
        **SIZES, w_init_up="zeros", factorized_phm_rule=True, phm_c_init="glorot"
    ),
    "norms": PHMBottleneckConfig(
        **SIZES, w_init_up="zeros", layer_norm_before=True, layer_norm_after=True
    ),
}


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_with_up_at_zero_the_start_is_the_identity(name):
    model, x = Model(OF_EVERY_KIND[name]), random_states(0)
    params = model.init(jax.random.key(1), x)
    np.testing.assert_array_equal(model.apply(params, x), x)


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_and_not_a_saddle(name):
    """If only one factor is zero at first, it has a gradient."""
    model, x = Model(OF_EVERY_KIND[name]), random_states(2)
    params = model.init(jax.random.key(3), x)
    cotangent = random_states(4)
    gradient = jax.grad(lambda p: jnp.sum(model.apply(p, x) * cotangent))(params)
    flat = flatten_dict(params["params"], sep="/")
    slopes = flatten_dict(gradient["params"], sep="/")
    zero = [
        path
        for path, leaf in flat.items()
        if not np.any(leaf) and not path.endswith("bias") and "up" in path
    ]
    assert len(zero) == 1
    if not OF_EVERY_KIND[name].layer_norm_after:  # a norm of zeros hides it for one step
        assert np.abs(slopes[zero[0]]).max() > 0


@pytest.mark.parametrize("backbone", ["bert", "t5"])
def test_compacter_for_short_runs_starts_as_the_backbone(backbone):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    bert = cj.BertConfig(vocab_size=13, hidden_size=12, max_position_embeddings=9, **sizes)
    t5 = cj.T5Config(vocab_size=13, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2)
    module = cj.Bert(bert, head="sequence_classification") if backbone == "bert" else cj.T5(t5)
    ids = np.array([[3, 5, 1, 7], [4, 9, 2, 2]])
    inputs = (ids, ids > 1) if backbone == "bert" else (ids, ids > 1, ids[:, :2])
    plain = backbone_of(module)
    model = cj.Adapted(module, cj.preset("compacter++-short", **SMALL))
    params = cj.init_adapters(model, plain, jax.random.key(0))
    np.testing.assert_array_equal(
        model.apply({"params": params}, *inputs), module.apply({"params": plain.params}, *inputs)
    )


# --- the paper's initial values -----------------------------------------------------------------


def at_deviation(c):
    """Returns the update and gradients of an adapter whose unit rule is multiplied by c."""
    width = 24
    layer = Bottleneck(PHMBottleneckConfig(reduction_factor=2, phm_dim=4))
    x, cotangent, unit = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(5, width), (5, width), (4, 4, 4)])
    )
    own = layer.init(jax.random.key(3), x, rule=unit)["params"]

    def update(rule, own):
        return layer.apply({"params": own}, x, skip=jnp.zeros_like(x), rule=rule)

    def loss(rule, own):
        return jnp.sum(update(rule, own) * cotangent)

    of_rule, of_own = jax.grad(loss, argnums=(0, 1))(c * unit, own)
    return update(c * unit, own), of_rule, flatten_dict(of_own, sep="/")


def test_the_papers_start_is_a_saddle():
    """Half the rule's deviation gives half its gradient, and a quarter of the update."""
    whole, half = at_deviation(1e-4), at_deviation(5e-5)
    norm = np.linalg.norm
    assert norm(half[0]) / norm(whole[0]) == pytest.approx(1 / 4, rel=1e-2)
    assert norm(half[1]) / norm(whole[1]) == pytest.approx(1 / 2, rel=1e-2)
    factors = [path for path in whole[2] if path.endswith(("left", "right"))]
    assert len(factors) == 4
    for path in factors:
        assert norm(half[2][path]) / norm(whole[2][path]) == pytest.approx(1 / 4, rel=1e-2), path


# --- Glorot's size ------------------------------------------------------------------------------


def test_the_deviation_is_that_of_the_formula():
    """The formula is sqrt(4 / (d + b)) / (sqrt(n) std_left std_right), at MiniLM's width."""
    width, bottleneck, n = 384, 12, 4
    left, right = math.sqrt(4 / (width / n + 1)), math.sqrt(4 / (bottleneck / n + 1))
    c = math.sqrt(4 / (width + bottleneck)) / (math.sqrt(n) * left * right)
    assert phm.glorot_deviation(width, bottleneck, n, 1, "glorot-uniform", 1.0) == pytest.approx(c)
    assert phm.glorot_deviation(bottleneck, width, n, 1, "glorot-normal", 1.0) == pytest.approx(c)
    assert c == pytest.approx(0.2475, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"phm_rank": 3, "phm_dim": 8},
        {"factorized_phm_W": False},
        {"w_init": "normal", "phm_init_range": 0.02},
        {"shared_phm_rule": False, "w_init": "glorot-normal"},
        {"factorized_phm_rule": True},
        {"shared_W_phm": True},
    ],
)
def test_weights_start_at_glorots_size(changes):
    """Compares the root mean square of both projections over many draws."""
    width, factor = 64, 4
    method = PHMBottleneckConfig(reduction_factor=factor, phm_c_init="glorot", **changes)
    model = Model(method, width=width)
    x = np.zeros((1, width), np.float32)

    @jax.jit
    @jax.vmap
    def squares(key):
        params = model.init(key, x)["params"]
        shared = method.shared(lambda name, *_: params[name], width, [], jnp.float32)
        dense = method.dense_params(params["adapter"], shared)
        return jnp.stack([jnp.mean(dense[name]["kernel"] ** 2) for name in ("down", "up")])

    found = np.sqrt(np.mean(squares(jax.random.split(jax.random.key(0), 400)), 0))
    np.testing.assert_allclose(found, math.sqrt(4 / (width + width // factor)), rtol=0.1)


def test_a_shared_rule_of_glorots_size_needs_the_width():
    method = PHMBottleneckConfig(**SIZES, phm_c_init="glorot")
    with pytest.raises(
        ValueError, match=r"phm_c_init='glorot' needs the width .* give phm_c_init="
    ):
        method.shared(lambda *_: None, None, [], jnp.float32)


def test_other_bottlenecks_are_as_before():
    """With `up` at zero, all other parameters start with the same values."""
    plain, zero = (Model(PHMBottleneckConfig(**SIZES, w_init_up=up)) for up in ("same", "zeros"))
    x = random_states(5)
    before, after = (
        flatten_dict(model.init(jax.random.key(6), x)["params"], sep="/") for model in (plain, zero)
    )
    differing = [path for path in before if not np.array_equal(before[path], after[path])]
    assert differing == ["adapter/up/right"]
    assert shapes_of(plain).keys() == shapes_of(zero).keys()


def test_adapterhub_is_not_told_how_the_rule_was_drawn(tmp_path):
    module = cj.Bert(
        cj.BertConfig(
            vocab_size=13,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
        ),
        head="sequence_classification",
    )
    plain = backbone_of(module)
    method = cj.preset("compacter++-short", **SMALL, train_layer_norms=False)
    model = cj.Adapted(module, method)
    params = cj.init_adapters(model, plain, jax.random.key(0))
    cj.export_adapterhub(tmp_path, model, params)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    assert settings["phm_c_init"] == "normal"
    again, loaded = cj.import_adapterhub(tmp_path, plain)
    assert again.method == method.replace(
        phm_c_init="normal", w_init_up="same", sites=("residual_feed_forward",)
    )
    np.testing.assert_array_equal(loaded["phm_rule"], params["phm_rule"])


# --- runs that are too short --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reach", "is_told"),
    [
        ({}, 0.02, True),  # a tenth of MiniLM's 0.2475 is 0.0248
        ({}, 0.03, False),
        ({"factorized_phm_rule": True}, 0.03, True),  # its entries are squares of this value
        ({"factorized_phm_rule": True}, 0.2, False),
        ({"learn_phm": False}, 0.02, False),
        ({"phm_c_init": "uniform"}, 0.02, False),
        ({"phm_c_init": "glorot"}, 0.0, False),
        ({"phm_init_range": 0.05}, 0.0, False),
    ],
)
def test_short_runs_are_told(changes, reach, is_told):
    told = cj.preset("compacter++", **changes).slow_start(384, reach)
    assert (told is not None) == is_told
    if told is not None:
        assert f"sum to {reach:.2g}" in told
        assert "starts at 0.0001" in told
        assert "compacter++-short" in told


def test_other_methods_are_never_too_short():
    for name in ("houlsby", "lora", "phm", "low-rank", "compacter++-short"):
        assert cj.preset(name).slow_start(384, 0.0) is None
    assert cj.preset("compacter").slow_start(None, 0.0) is None
