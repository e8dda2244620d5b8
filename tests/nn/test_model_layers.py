"""Tests the layers that backbones are built of: attention, GELU and norms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.attention import attention, split_heads
from compacter_jax.nn.norms import LayerNorm, RMSNorm


@pytest.fixture
def rng():
    """Returns a generator for this test alone, so that its numbers do not depend on other tests."""
    return np.random.default_rng(5)


def attention_by_hand(query, key, value, biases, scale):
    """Computes attention of `[batch, heads, length, size]` arrays in float64."""
    scores = scale * query @ np.swapaxes(key, -1, -2)
    for bias in biases:
        scores = scores + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.swapaxes(weights @ value, 1, 2)


@pytest.mark.parametrize("shape", [(2, 3, 7, 5, 4), (1, 1, 1, 9, 3), (3, 2, 6, 1, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_attention_is_that_of_numpy(shape, dtype, tolerance, rng):
    batch, heads, queries, keys, size = shape
    query = rng.standard_normal((batch, heads, queries, size))
    key, value = rng.standard_normal((2, batch, heads, keys, size))
    biases = (
        rng.standard_normal((1, heads, queries, keys)),
        rng.standard_normal((batch, 1, 1, keys)),
    )
    arrays = [jnp.asarray(x, dtype) for x in (query, key, value)]
    out = attention(*arrays, (*map(jnp.float32, biases), None), scale=0.3)
    assert out.dtype == dtype
    exact = attention_by_hand(*(np.float64(x) for x in arrays), biases, 0.3)
    np.testing.assert_allclose(np.float64(out), exact, atol=tolerance)


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_adjacent_rows_may_share_their_keys(copies, dtype, tolerance, rng):
    """Outputs and gradients are those of repeated keys, whose gradients are summed."""
    query = jnp.asarray(rng.standard_normal((2 * copies, 3, 2, 4)), dtype)
    key, value = (jnp.asarray(rng.standard_normal((2, 3, 5, 4)), dtype) for _ in range(2))
    bias = jnp.asarray(rng.standard_normal((2 * copies, 1, 1, 5)), jnp.float32)
    direction = jnp.asarray(rng.standard_normal((2 * copies, 2, 3, 4)), dtype)

    def shared(query, key, value):
        return attention(query, key, value, (bias,), scale=0.5)

    def repeated(query, key, value):
        return shared(query, *(jnp.repeat(x, copies, axis=0) for x in (key, value)))

    (found, pull), (wanted, pull_wanted) = (
        jax.vjp(function, query, key, value) for function in (shared, repeated)
    )
    assert found.dtype == dtype
    np.testing.assert_allclose(np.float32(found), np.float32(wanted), atol=tolerance)
    for own, other in zip(pull(direction), pull_wanted(direction), strict=True):
        np.testing.assert_allclose(np.float32(own), np.float32(other), atol=10 * tolerance)


def test_gradients_of_attention_are_finite_differences(rng):
    query, key, value = rng.standard_normal((3, 2, 2, 5, 3))
    direction = rng.standard_normal((3, 2, 2, 5, 3))
    weights = rng.standard_normal((2, 5, 2, 3))

    def total(query, key, value):
        return (attention_by_hand(query, key, value, (), 0.5) * weights).sum()

    h, point = 1e-5, np.stack([query, key, value])
    slope = (total(*(point + h * direction)) - total(*(point - h * direction))) / (2 * h)
    gradients = jax.grad(lambda arrays: jnp.sum(attention(*arrays, scale=0.5) * weights))(
        [jnp.float32(x) for x in point]
    )
    found = sum(np.sum(np.float64(g) * d) for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(found, slope, rtol=1e-5)


def test_attention_to_nothing_but_padding_is_the_mean(rng):
    """The softmax of equal scores is uniform; a bias of -inf excludes a key completely."""
    query, key, value = jnp.asarray(rng.standard_normal((3, 1, 1, 4, 2)), jnp.float32)
    least = jnp.full((1, 1, 1, 4), jnp.finfo(jnp.float32).min)
    out = attention(query, key, value, (least,))[0, :, 0]
    np.testing.assert_allclose(out, np.tile(value[0, 0].mean(0), (4, 1)), atol=1e-6)
    one = attention(query, key, value, (jnp.array([0, -jnp.inf, -jnp.inf, -jnp.inf]),))
    np.testing.assert_allclose(one[0, :, 0], np.tile(value[0, 0, 0], (4, 1)), atol=1e-6)


def test_dropped_probabilities_leave_the_others_scaled(rng):
    query, key, value = rng.standard_normal((3, 2, 3, 5, 4))
    mask = rng.random((2, 3, 5, 5)) < 0.6
    arrays = [jnp.float32(x) for x in (query, key, value)]
    out = attention(*arrays, dropout=lambda x: jnp.where(mask, x / 0.6, 0))
    weights = np.exp(query @ np.swapaxes(key, -1, -2))
    weights /= weights.sum(-1, keepdims=True)
    exact = np.swapaxes(np.where(mask, weights / 0.6, 0) @ value, 1, 2)
    np.testing.assert_allclose(out, exact, atol=2e-6)


def test_gelu_and_its_derivatives_are_those_of_the_error_function(rng):
    x = np.concatenate([np.linspace(-8, 8, 101), rng.standard_normal(50) * 3])
    below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    gelu = get_activation("gelu")
    np.testing.assert_allclose(gelu(jnp.float32(x)), x * below, atol=1e-6)
    slope = jax.vmap(jax.grad(gelu))
    np.testing.assert_allclose(slope(jnp.float32(x)), below + x * density, atol=1e-6)
    ones = jnp.ones(len(x))
    _, forward = jax.jvp(gelu, [jnp.float32(x)], [ones])
    np.testing.assert_allclose(forward, below + x * density, atol=1e-6)
    _, second = jax.jvp(slope, [jnp.float32(x)], [ones])
    np.testing.assert_allclose(second, (2 - x**2) * density, atol=2e-6)


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the bound is on the buffers of XLA on a CPU"
)
def test_of_a_feed_forward_layer_one_array_is_kept(rng):
    rows, width, inner, layers = 256, 16, 512, 6
    down, up = rng.standard_normal((2, layers, width, inner)) / 16

    def loss(x):
        for i in range(layers):
            x = x + get_activation("gelu")(x @ jnp.float32(down[i])) @ jnp.float32(up[i]).T
        return x.sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((rows, width))).compile()
    kept = compiled.memory_analysis().temp_size_in_bytes
    one = rows * inner * 4
    # In addition to the activations of all layers, there are those of the current layer.
    assert kept < (layers + 3) * one


def norm_by_hand(x, scale, bias, direction, centred, epsilon):
    """Computes a norm of `[..., features]` in float64, and the gradient of `sum(norm * direction)`.

    The sum of squares of a norm is nearly constant, so that its gradient would be rounding alone.
    """
    width = x.shape[-1]
    away = x - x.mean(-1, keepdims=True) if centred else x
    inverse = 1 / np.sqrt((away**2).mean(-1, keepdims=True) + epsilon)
    y = away * inverse * scale + bias
    slope = direction * scale * inverse
    slope -= away * inverse**2 * (slope * away).sum(-1, keepdims=True) / width
    return y, slope - slope.mean(-1, keepdims=True) if centred else slope


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 7), (1, 1, 1, 33)])
def test_norms_are_those_of_numpy(norm, dtype, tolerance, shape, rng):
    # One entry is much larger than the others, as in BERT.
    x = np.asarray(jnp.asarray(rng.standard_normal(shape), dtype), np.float64)
    x[..., 1] += 32
    scale, bias = np.float32(1 + rng.standard_normal((2, shape[-1])) / 4).astype(np.float64)
    params = {"scale": jnp.float32(scale)}
    params |= {"bias": jnp.float32(bias)} if norm is LayerNorm else {}
    module = norm(1e-6, dtype=jnp.dtype(dtype))
    centred = norm is LayerNorm
    direction = np.asarray(jnp.asarray(rng.standard_normal(shape), dtype), np.float64)
    offset = bias if centred else 0
    expected, slope = norm_by_hand(x, scale, offset, direction, centred, 1e-6)

    def run(x):
        return module.apply({"params": params}, x)

    y, pull = jax.vjp(run, jnp.asarray(x, dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(
        np.float64(y), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )
    (got,) = pull(jnp.asarray(direction, dtype))
    np.testing.assert_allclose(np.float64(got), slope, atol=4 * tolerance * np.abs(slope).max())


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@pytest.mark.contract
def test_of_a_norm_one_array_is_kept(norm, rng):
    x = jnp.asarray(rng.standard_normal((4, 6, 10)), jnp.float32)
    module = norm(1e-6)
    params = module.init(jax.random.key(0), x)
    _, backward = jax.vjp(lambda x: module.apply(params, x), x)
    assert [leaf.shape for leaf in jax.tree.leaves(backward)].count(x.shape) == 1


def test_heads_are_parts_of_the_width(rng):
    x = rng.standard_normal((2, 5, 12))
    np.testing.assert_array_equal(split_heads(jnp.asarray(x), 3)[1, 2, 4], np.float32(x[1, 4, 8:]))
