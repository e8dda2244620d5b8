"""Compares the compressed attention with NumPy, and tests models whose decoder has such layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.models.names import SEQ2SEQ
from compacter_jax.models.seq2seq.model import Seq2Seq
from compacter_jax.nn.attention import attention
from compacter_jax.nn.quantize import is_quantized
from compacter_jax.paths import own_names
from tests.helpers import adapted_shapes, quick_jit, random_tree
from tests.reference import Reference, softmax
from tests.seq2seq_models import inputs_of, small_backbone, tiny
from train.compute import mesh

# Rows, source, target, width, width of the values, heads.
SIZES = {
    "wide values": (3, 7, 5, 12, 20, 4),
    "narrow values": (3, 5, 6, 15, 9, 3),
    "one source token": (2, 1, 4, 6, 6, 2),
    "one target token": (3, 4, 1, 10, 15, 5),
}
NAMES = ("q", "k", "v", "encoder_k", "encoder_v", "r", "out")
COMPRESSED = {"decoder_layer": "compressed", "decoder_value_dim": 36}


def case_of(name, dtype, seed=0):
    """Returns a module, its parameters, inputs with padding, and a cotangent of the update."""
    rows, source, target, width, inner, heads = SIZES[name]
    rng = np.random.default_rng(seed)
    module = cj.CompressedAttention(heads, inner, param_dtype=dtype)
    y, encoder, cotangent = (
        np.asarray(rng.standard_normal((rows, length, width)), dtype)
        for length in (target, source, target)
    )
    mask = np.ones((rows, source), np.int32)
    mask[0, 1:], mask[1, : source // 2] = 0, 0
    shapes = jax.eval_shape(module.init, jax.random.key(0), y, encoder, mask)["params"]
    return module, random_tree(shapes, seed), (y, encoder, mask), cotangent


def of_heads(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def joined_heads(x):
    return x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)


def in_numpy(params, y, encoder, mask, heads, cotangent):
    """Returns the update and the gradients of its product with the cotangent, in float64."""
    weights = {n: np.float64(params[f"{n}_proj"]["kernel"]) for n in NAMES}
    biases = {n: np.float64(params[f"{n}_proj"]["bias"]) for n in NAMES}
    y, encoder, cotangent = (np.float64(x) for x in (y, encoder, cotangent))
    source, root = encoder.shape[1], np.sqrt(y.shape[2] // heads)

    def dense(name, x):
        return x @ weights[name] + biases[name]

    query = of_heads(dense("q", y) / root, heads)
    key, value = (
        of_heads(np.concatenate([dense(f"encoder_{n}", encoder), dense(n, y)], 1), heads)
        for n in "kv"
    )
    hidden = np.zeros((len(y), 1, y.shape[1], key.shape[2]), bool)
    hidden[..., :source] = mask[:, None, None] == 0
    hidden[..., source:] = np.triu(np.ones((y.shape[1],) * 2, bool), 1)
    a = softmax(np.where(hidden, -1e300, query @ key.swapaxes(2, 3)))
    before = joined_heads(a @ value) + dense("r", y)
    u = np.maximum(before, 0)
    update = dense("out", u)

    gradients = {}

    def back(name, x, dy):
        """Records the gradients of a dense layer, and returns that of its input."""
        gradients[f"{name}_proj/kernel"] = np.einsum("bti,bto->io", x, dy)
        gradients[f"{name}_proj/bias"] = dy.sum((0, 1))
        return dy @ weights[name].T

    d_before = back("out", u, cotangent) * (before > 0)
    dy = back("r", y, d_before)
    d_context = of_heads(d_before, heads)
    da = d_context @ value.swapaxes(2, 3)
    d_scores = a * (da - (da * a).sum(-1, keepdims=True))
    dy += back("q", y, joined_heads(d_scores @ key) / root)
    d_encoder = np.zeros_like(encoder)
    for n, heads_of in (
        ("k", d_scores.swapaxes(2, 3) @ query),
        ("v", a.swapaxes(2, 3) @ d_context),
    ):
        joined = joined_heads(heads_of)
        d_encoder += back(f"encoder_{n}", encoder, joined[:, :source])
        dy += back(n, y, joined[:, source:])
    return update, gradients | {"y": dy, "encoder": d_encoder}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_the_layer_and_its_gradients_equal_numpy(name, dtype, tolerance):
    """Update and all gradients are those of the equations, in float64 and in float32."""
    with jax.enable_x64(dtype == "float64"):
        module, params, (y, encoder, mask), cotangent = case_of(name, dtype)

        def objective(params, y, encoder):
            update = module.apply({"params": params}, y, encoder, mask)
            return jnp.sum(update * cotangent), update

        run = quick_jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))
        (_, update), (of_params, dy, d_encoder) = run(params, y, encoder)
        assert update.dtype == dtype
        gradients = flatten_dict(of_params, sep="/") | {"y": dy, "encoder": d_encoder}
        expected, theirs = in_numpy(params, y, encoder, mask, SIZES[name][-1], cotangent)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(update, expected, atol=tolerance * scale, rtol=0)
        assert gradients.keys() == theirs.keys()
        largest = max(np.abs(leaf).max() for leaf in theirs.values())
        for path, leaf in theirs.items():
            # Gradients of keys vanish with one key, up to rounding.
            scale = max(np.abs(leaf).max(), 1e-2 * largest)
            np.testing.assert_allclose(
                gradients[path], leaf, atol=tolerance * scale, rtol=0, err_msg=path
            )


def test_one_softmax_weighs_self_attention_and_cross_attention():
    """A V = g SelfAttention(y) + (1 - g) CrossAttention(y, E), to 1e-12 in float64."""
    recorded = {}

    def record(next_fun, args, kwargs, context):
        result = next_fun(*args, **kwargs)
        if context.method_name == "attend":
            recorded.update(args=args, result=result)
        return result

    with jax.enable_x64(True):
        module, params, inputs, _ = case_of("wide values", "float64", seed=3)
        with nn.intercept_methods(record):
            module.apply({"params": params}, *inputs)
        query, key, value, (bias,), _ = recorded["args"]
        source, scale = inputs[1].shape[1], query.shape[-1] ** -0.5
        parts, sums = [], []
        for part in (slice(source, None), slice(0, source)):
            own = bias[..., part]
            parts.append(attention(query, key[:, :, part], value[:, :, part], (own,), scale=scale))
            scores = scale * jnp.einsum("bhqd,bhkd->bhqk", query, key[:, :, part]) + own
            sums.append(jnp.moveaxis(jnp.exp(scores).sum(-1, keepdims=True), 1, 2))
        g = sums[0] / (sums[0] + sums[1])
        expected = g * parts[0] + (1 - g) * parts[1]
        assert np.ptp(g) > 0.01
        np.testing.assert_allclose(recorded["result"], expected, atol=1e-12, rtol=0)


def test_later_tokens_and_padding_change_nothing():
    """Positions before a changed token, and rows with any values at padding, are equal in bits."""
    module, params, (y, encoder, mask), _ = case_of("narrow values", "float32", seed=1)
    run = quick_jit(lambda y, encoder: module.apply({"params": params}, y, encoder, mask))
    plain = np.asarray(run(y, encoder))
    for t in range(1, y.shape[1]):
        changed = y.copy()
        changed[:, t] = 1e3
        actual = np.asarray(run(changed, encoder))
        assert actual[:, :t].tobytes() == plain[:, :t].tobytes()
        assert (actual[:, t] != plain[:, t]).any()
    for garbage in (-7.5, 1e30, np.inf, np.nan):
        dirty = np.where(mask[..., None] == 0, np.float32(garbage), encoder)
        assert np.asarray(run(y, dirty)).tobytes() == plain.tobytes()
    assert np.asarray(run(y, encoder + 1)).tobytes() != plain.tobytes()


def test_a_source_of_padding_alone():
    """Such a row has the update and the gradients of a target without a source, and no NaN."""
    module, params, (y, encoder, mask), cotangent = case_of("wide values", "float32", seed=2)
    mask = mask.copy()
    mask[2] = 0

    def objective(y, encoder, mask):
        update = module.apply({"params": params}, y, encoder, mask)
        return jnp.sum(update * cotangent), update

    run = quick_jit(jax.grad(objective, (0, 1), has_aux=True))
    (dy, d_encoder), update = run(y, encoder, mask)
    _, expected_of_two = in_numpy(params, y, encoder, mask, 4, cotangent)
    assert np.isfinite(update).all()
    np.testing.assert_array_equal(d_encoder[2], 0)
    np.testing.assert_allclose(dy[2], expected_of_two["y"][2], atol=1e-4)
    _, other = run(y, encoder + 5, mask)
    np.testing.assert_array_equal(other[2], update[2])


@pytest.mark.parametrize(
    ("heads", "inner", "changes", "message"),
    [
        (5, 20, {}, "num_heads=5 does not divide d=12"),
        (4, 10, {}, "num_heads=4 does not divide value_features=10"),
        (4, 20, {"encoder": (2, 7, 12)}, r"y has shape \(3, 5, 12\) and encoder \(2, 7, 12\)"),
        (4, 20, {"encoder": (3, 7, 8)}, r"y has shape \(3, 5, 12\) and encoder \(3, 7, 8\)"),
        (4, 20, {"mask": (3, 6)}, r"encoder_mask has shape \(3, 6\); it must have .* \(3, 7\)"),
    ],
)
def test_arguments_that_do_not_fit(heads, inner, changes, message):
    """Heads that do not divide a width, and shapes of other batches or widths are refused."""
    shapes = {"y": (3, 5, 12), "encoder": (3, 7, 12), "mask": (3, 7), **changes}
    inputs = [jnp.ones(shapes[name]) for name in ("y", "encoder", "mask")]
    with pytest.raises(ValueError, match=message):
        cj.CompressedAttention(heads, inner).init(jax.random.key(0), *inputs)


def test_initial_weights_are_glorot_uniform():
    """Kernels lie within sqrt(6 / (in + out)) and fill that range; biases are zero."""
    module, x = cj.CompressedAttention(2, 48), jnp.ones((1, 2, 24))
    params = flatten_dict(module.init(jax.random.key(0), x, x)["params"], sep="/")
    assert sorted(params) == sorted(f"{n}_proj/{k}" for n in NAMES for k in ("kernel", "bias"))
    for path, leaf in params.items():
        bound = np.sqrt(6 / sum(leaf.shape)) if path.endswith("kernel") else 0.0
        assert 0.98 * bound <= np.abs(leaf).max() <= bound


# --- models -------------------------------------------------------------------------------------


def counted(module):
    """Returns the numbers of softmaxes and norms in the program of a step of generation."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())
    states = jnp.zeros((1, 4, module.config.d_model))
    cache = jax.eval_shape(lambda p: module.apply(p, states, 5, method="start_cache"), shapes)

    def step(params, cache):
        ids = jnp.zeros((1, 1), jnp.int32)
        return module.apply(params, ids, cache=cache, index=jnp.int32(0), method="decode")

    text = str(jax.make_jaxpr(step)(shapes, cache))
    return np.array([text.count("= exp "), text.count("= rsqrt ")])


def test_a_step_has_one_softmax_and_one_norm_a_layer():
    """The jaxpr of a step has one of each per layer, where the standard decoder has 2 and 3."""
    for changes, expected in ((COMPRESSED, [1, 1]), ({}, [2, 3])):
        one, three = (
            counted(Seq2Seq(tiny("m2m_100", decoder_layers=n, **changes))) for n in (1, 3)
        )
        np.testing.assert_array_equal((three - one) / 2, expected)


@pytest.mark.parametrize("inner", [None, 9, 48])
def test_weights_of_a_layer(inner):
    """A layer has 3 d^2 + 4 d F weights, 4 d + 3 F biases and the 2 d of its norm."""
    config = tiny("m2m_100", decoder_layer="compressed", decoder_value_dim=inner, decoder_ffn_dim=6)
    module = Seq2Seq(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]
    layer = shapes["decoder"]["layers"]["0"]
    assert set(layer) == {"encoder_attn", "encoder_attn_layer_norm"}
    d, f = config.d_model, inner or 6
    flat = flatten_dict(layer, sep="/")
    kernels = sum(leaf.size for path, leaf in flat.items() if path.endswith("kernel"))
    assert kernels == (2 * d * d + d * f) + (d * d + d * f) + d * f + f * d == 3 * d * d + 4 * d * f
    assert sum(leaf.size for leaf in flat.values()) == kernels + 4 * d + 3 * f + 2 * d


@pytest.mark.parametrize("name", ["m2m_100", "bart"])
def test_names_are_those_of_the_family(name):
    """Every parameter has a name of the family, and kernels are divided and quantised."""
    ours = small_backbone(tiny(name, **COMPRESSED))
    flat = flatten_dict(ours.params, sep="/")
    assert own_names(list(flat)) is SEQ2SEQ
    small = flatten_dict(cj.cast_frozen(ours.params, "int8"), sep="/")
    for path in flat:
        if path.endswith("kernel"):
            assert is_quantized(small[path])
            spec = mesh.spec_of(path, (4096, 4096), {"data": 2, "model": 2})
            last = mesh.DATA if path.endswith(("out_proj/kernel", "fc2/kernel")) else mesh.MODEL
            assert spec[1] == last, path


def test_dropout_is_where_the_paper_has_it():
    """It drops what r_proj and out_proj read, the softmax, and the update."""
    rates = {"dropout": 0.25, "attention_dropout": 0.5, "activation_dropout": 0.125}
    config = tiny("m2m_100", **COMPRESSED, **rates)
    module, inputs, seen = Seq2Seq(config), inputs_of(config, 0), []

    def watch(next_fun, args, kwargs, context):
        host = context.module
        if isinstance(host, nn.Dropout) and "decoder/layers" in "/".join(host.path):
            seen.append((args[0].shape, host.rate))
        return next_fun(*args, **kwargs)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rngs = {"dropout": jax.random.key(0)}
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda p: module.apply(p, *inputs, deterministic=False, rngs=rngs), shapes)
    assert seen == [
        *(((3, 3, 7, 16), 0.5), ((3, 7, 24), 0.25), ((3, 7, 36), 0.125), ((3, 7, 24), 0.25))
    ]


def test_a_decoder_that_normalises_sums_and_recomputes_layers():
    """A BART's logits are those of the equations, and recomputed layers give the same gradient."""
    ours = small_backbone(tiny("bart", **COMPRESSED, decoder_layers=2))
    inputs = inputs_of(ours.module.config, 2)[:3]

    def run(module):
        def loss(params):
            logits = module.apply({"params": params}, *inputs)
            return jnp.square(logits).mean(), logits

        return quick_jit(jax.grad(loss, has_aux=True))(ours.params)

    (plain, logits), (again, _) = (run(ours.module.clone(remat=remat)) for remat in ("off", "full"))
    expected = Reference(ours.module, cj.preset("full"), ours.params)(*inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    for one, other in zip(*map(jax.tree.leaves, (plain, again)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layer": "thin"}, "unknown decoder_layer='thin'; use 'standard' or 'compressed'"),
        ({"decoder_value_dim": 24}, "decoder_value_dim=24 is for decoder_layer='compressed'"),
        (
            {"decoder_layer": "compressed", "decoder_value_dim": 20},
            "decoder_attention_heads=3 does not divide decoder_value_dim=20, the width",
        ),
        (
            {"decoder_layer": "compressed", "decoder_ffn_dim": 10},
            "decoder_attention_heads=3 does not divide decoder_ffn_dim=10, the width",
        ),
        ({**COMPRESSED, "decoder_value_dim": 0}, "decoder_value_dim=0 is not positive"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    """Unknown kinds, widths of another kind and widths that heads do not divide are refused."""
    with pytest.raises(ValueError, match=message):
        tiny("m2m_100", **changes)


# --- sites --------------------------------------------------------------------------------------


def test_a_compacter_adapter_a_layer_and_no_cross_attention():
    """A layer has one adapter where the standard one has two; absent sites say what to use."""
    method = cj.preset("compacter", reduction_factor=4, phm_dim=3)
    for changes, count in ((COMPRESSED, 1), ({}, 2)):
        shapes = flatten_dict(
            adapted_shapes(cj.Adapted(Seq2Seq(tiny("m2m_100", **changes)), method)), sep="/"
        )
        hosts = {p.split("/adapter/")[0] for p in shapes if p.startswith("decoder/layers/0")}
        assert len({host for host in hosts if f"{host}/adapter/up/bias" in shapes}) == count
    module = Seq2Seq(tiny("m2m_100", **COMPRESSED))
    for name in ("cross_attention", "parallel_cross_attention", "residual_cross_attention"):
        with pytest.raises(ValueError, match=f"no site '{name}': a layer of a compressed decoder"):
            cj.Adapted(module, cj.BottleneckConfig(sites=(name,), reduction_factor=2))
    with pytest.raises(ValueError, match="no site 'cross_key_value': a layer of a compressed"):
        cj.Adapted(module, cj.PrefixTuningConfig(sites=("cross_key_value",)))
    with pytest.raises(ValueError, match="unknown site 'middle'; Seq2Seq has attention, feed_for"):
        cj.Adapted(module, cj.LoRAConfig(sites=("middle",)))
    assert "cross_attention" in Seq2Seq.sites


def test_merging_into_a_compressed_decoder():
    """LoRA at every projection becomes part of it; bottlenecks beside the layer are refused."""
    ours = small_backbone(tiny("m2m_100", **COMPRESSED))
    sites = ("query", "key", "value", "intermediate", "output_projection")
    model = cj.Adapted(ours.module, cj.LoRAConfig(sites=sites, rank=2))
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=6))
    params = unflatten_dict({**drawn, **flatten_dict(ours.params)})
    inputs = inputs_of(ours.module.config, 3)
    logits = quick_jit(lambda p: model.apply({"params": p}, *inputs))(params)
    merged = cj.merge_adapter(model, params)
    assert merged.keys() == ours.params.keys()
    actual = quick_jit(lambda p: ours.module.apply({"params": p}, *inputs))(merged)
    np.testing.assert_allclose(actual, logits, atol=1e-5 * np.abs(logits).max())
    beside = cj.Adapted(ours.module, cj.preset("parallel", reduction_factor=2))
    with pytest.raises(ValueError, match="inner units of a compressed decoder are values of its"):
        cj.merge_adapter(beside, random_tree(adapted_shapes(beside)))
    with pytest.raises(ValueError, match="AdapterHub are not supported for a compressed decoder"):
        cj.export_adapterhub("unused", beside, random_tree(adapted_shapes(beside)))
