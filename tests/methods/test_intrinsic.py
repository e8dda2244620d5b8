"""Compares the subspace of intrinsic dimension with dense float64 matrices of the same draws."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend import random as jex_random

from compacter_jax import fastfood
from compacter_jax.fastfood import mixed, project, walsh_hadamard
from compacter_jax.methods.intrinsic import (
    IntrinsicConfig,
    layer_of,
    layers_of,
    perturb,
    vector_size,
)
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.t5.model import T5
from tests.helpers import TINY_BERT, TINY_T5, backbone_of

PINNED = [
    *(-3.007666, 2.474931, 1.778550, -1.681548, 0.030270, 1.314615),
    *(0.925075, -2.186163, 1.223489, -2.744683, 5.078390, -2.075041),
]


def hadamard_product(x):
    """Computes `x @ H` in float64 by recursive halving."""
    half = x.shape[-1] // 2
    if not half:
        return np.float64(x)
    left, right = hadamard_product(x[..., :half]), hadamard_product(x[..., half:])
    return np.concatenate([left + right, left - right], -1)


def random_words(seed, name, index, length):
    """Returns both words of every draw of a block, by JAX's own Threefry."""
    key = jnp.array([seed, zlib.crc32(name.encode())], jnp.uint32)
    counter = jnp.stack([jnp.full(length, index), jnp.arange(length)]).astype(jnp.uint32)
    return np.asarray(jex_random.threefry_2x32(key, counter))


def normal_values(seed, name, index, length):
    words, _ = random_words(seed, name, index, length)
    uniform = (2.0 * (words >> 9) + 1) / 2**23 - 1
    return np.sqrt(2) * scipy.special.erfinv(uniform)


def dense(dimension, size, name, seed):
    """Returns `P` of a tensor, `[size, dimension]`: the rows of the blocks `H G Pi H B`."""
    length = 1
    while length < dimension:
        length *= 2
    H = np.float64(scipy.linalg.hadamard(length))
    words, order = random_words(seed, "", 0, length)
    B = np.diag(np.where(words >= 2**31, -1, 1))
    Pi = np.eye(length)[np.argsort(order, kind="stable")]
    blocks = [
        H @ np.diag(normal_values(seed, name, index, length)) @ Pi @ H @ B
        for index in range(-(-size // length))
    ]
    return np.concatenate(blocks)[:size, :dimension] / np.sqrt(length * size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def projected(vector, size, name="encoder/layer/0/kernel", seed=0):
    return project(mixed(vector, seed), size, name, seed)


# Compiled once for all tests that use trees of the same shapes.
moved_by = jax.jit(perturb)


def assert_close(actual, expected, tolerance=1e-5):
    """Checks float32 sums that may cancel; the bound is relative to the largest entry."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def bert_params(seed=0, head="sequence_classification"):
    return backbone_of(Bert(TINY_BERT, head=head), seed).params


def random_vector(size, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(size), jnp.float32)


def layer_scale(params, seed=0):
    layers = layers_of(flatten_dict(params, sep="/"))
    return 1 + 0.5 * jnp.asarray(np.random.default_rng(seed).standard_normal(len(layers)))


class TestWalshHadamard:
    @pytest.mark.parametrize("size", [1, 2, 8, 32, 64, 1024, 32768])
    def test_it_is_the_product_with_the_matrix(self, size):
        x = np.random.default_rng(size).standard_normal((2, 3, size)).astype(np.float32)
        if size <= 1024:
            expected = np.float64(x) @ scipy.linalg.hadamard(size)
            np.testing.assert_allclose(hadamard_product(x), expected, rtol=0, atol=1e-11)
        y = jax.jit(walsh_hadamard)(x)
        assert y.dtype == jnp.float32
        assert_close(y, hadamard_product(x), 1e-6)

    @pytest.mark.parametrize("shape", [(64,), (0, 8), (1, 2, 1, 16)])
    def test_any_leading_axes(self, shape):
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        y = walsh_hadamard(jnp.asarray(x))
        np.testing.assert_allclose(y, hadamard_product(x), rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3), (jnp.int32, 0)]
    )
    def test_the_dtype_is_kept(self, dtype, tolerance):
        x = jnp.asarray(np.random.default_rng(2).normal(0, 5, (4, 64)), dtype)
        y = walsh_hadamard(x)
        assert y.dtype == dtype
        assert_close(np.float64(y), hadamard_product(np.asarray(x, np.float64)), tolerance)

    def test_the_gradient_is_the_transform(self):
        rng = np.random.default_rng(3)
        x, cotangent = rng.standard_normal((2, 5, 256)).astype(np.float32)
        _, pull = jax.vjp(walsh_hadamard, jnp.asarray(x))
        assert_close(pull(jnp.asarray(cotangent))[0], hadamard_product(cotangent), 1e-6)

    def test_a_size_that_is_no_power_of_two(self):
        with pytest.raises(ValueError, match=r"\(2, 48\) has size 48, .* pad it to 64"):
            walsh_hadamard(jnp.ones((2, 48)))
        with pytest.raises(ValueError, match=r"size 0, .* pad it to 1"):
            walsh_hadamard(jnp.ones((2, 0)))


class TestDraws:
    def test_known_answers(self):
        """Known answers of the authors of Threefry: `kat_vectors` of Random123, 20 rounds."""
        counters = np.array([[0, 0xFFFFFFFF, 0x243F6A88], [0, 0xFFFFFFFF, 0x85A308D3]], np.uint32)
        keys = np.array([[0, 0xFFFFFFFF, 0x13198A2E], [0, 0xFFFFFFFF, 0x03707344]], np.uint32)
        words = fastfood._random_words(tuple(keys), tuple(counters))
        assert [f"{word:08x}" for word in words[0]] == ["6b200159", "1cb996fc", "c4923a9c"]
        assert [f"{word:08x}" for word in words[1]] == ["99ba4efe", "bb002be7", "483df7a0"]

    def test_they_are_standard_normal_and_independent(self):
        # In one dimension, P holds one draw for each entry, apart from the common sign and scale.
        size = 20_000
        draws = np.asarray(projected(jnp.ones(1), size)) * np.sqrt(size)
        assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
        for lag in (1, 2, 16, 128):
            assert abs(np.mean(draws[:-lag] * draws[lag:])) < 4 / np.sqrt(size)

    def test_stored_vectors_keep_their_meaning(self):
        """Values of the first release: a change of them would break saved vectors."""
        values = projected(jnp.arange(1.0, 6.0), 12, "encoder/layer/0/output/dense/kernel", 3)
        np.testing.assert_allclose(values, PINNED, rtol=0, atol=1e-6)


class TestProject:
    @pytest.mark.parametrize(
        ("dimension", "size", "chunk"),
        [
            (50, 200, fastfood._CHUNK),  # all at once
            (64, 65, 1),  # at least one block at a time
            (65, 7, 128),
            (1, 5, 2),
            (200, 1000, 768),  # the last chunk is padded
        ],
    )
    def test_it_is_the_dense_product(self, dimension, size, chunk, monkeypatch):
        monkeypatch.setattr(fastfood, "_CHUNK", chunk)
        rng = np.random.default_rng(dimension)
        seed, name = int(rng.integers(2**31)), f"decoder/block/{size}/kernel"
        vector = rng.standard_normal(dimension).astype(np.float32)
        cotangent = rng.standard_normal(size).astype(np.float32)

        @jax.jit
        def run(vector, cotangent):
            y, pull = jax.vjp(lambda v: projected(v, size, name, seed), vector)
            return y, pull(cotangent)[0]

        y, gradient = run(vector, cotangent)
        P = dense(dimension, size, name, seed)
        assert y.dtype == gradient.dtype == jnp.float32
        assert_close(y, P @ vector)
        assert_close(gradient, P.T @ cotangent)

    def test_it_is_linear(self):
        a, b = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
        together = projected(jnp.asarray(2 * a - b), 150)
        assert_close(together, 2 * projected(jnp.asarray(a), 150) - projected(jnp.asarray(b), 150))

    def test_mixing_keeps_the_norm(self):
        vector = random_vector(50)
        mixture = mixed(vector, 5)
        assert mixture.shape == (64,)
        np.testing.assert_allclose(jnp.linalg.norm(mixture), jnp.linalg.norm(vector), rtol=1e-6)

    # Five standard errors: |P v|^2 / |v|^2 has a deviation of about sqrt(6 / size), at least sqrt(6
    # / L).
    @pytest.mark.parametrize(("size", "tolerance"), [(3, 0.16), (40, 0.09), (330, 0.04)])
    def test_the_expected_norm_is_that_of_the_vector(self, size, tolerance):
        vector = np.zeros(50, np.float32)
        vector[[3, 20]] = 3, 4  # far from evenly spread

        @jax.jit
        def squares(seeds):
            return jax.vmap(lambda s: jnp.sum(projected(vector, size, seed=s) ** 2))(seeds)

        ratios = squares(jnp.arange(2000)) / 25
        assert abs(np.mean(ratios) - 1) < tolerance, np.std(ratios) / np.sqrt(2000)

    def test_rows_are_hardly_correlated(self):
        length = 256
        P = np.asarray(jax.vmap(lambda v: projected(v, 2 * length))(jnp.eye(length))).T
        rows = P / np.linalg.norm(P, axis=1, keepdims=True)
        correlations = np.abs(rows @ rows.T - np.eye(2 * length))
        assert correlations.max() < 8 / np.sqrt(length)
        assert np.sqrt(np.mean(correlations**2)) < 1.3 / np.sqrt(length)
        # Without the permutation, each block would have only `length` distinct values.
        assert len(np.unique(np.abs(P).round(6))) > 20 * length

    def test_other_seeds_and_names_are_other_projections(self):
        tensors = {name: jnp.zeros(100) for name in ("a", "b", "ab")}
        seeds = jnp.array([0, 1, 2**31 - 1])
        draws = jax.jit(jax.vmap(lambda seed: perturb(tensors, jnp.ones(30), None, seed)))(seeds)
        correlations = np.corrcoef(np.concatenate(list(draws.values()))) - np.eye(9)
        assert np.abs(correlations).max() < 0.5

    @pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
    def test_what_is_no_vector(self, shape):
        with pytest.raises(ValueError, match=r"must have shape \[d\]"):
            mixed(jnp.ones(shape), 0)


class TestLayers:
    @pytest.mark.parametrize(
        ("path", "layer"),
        [
            ("encoder/layer/3/attention/self/query/kernel", "encoder/layer/3"),
            ("encoder/block/0/layer/1/DenseReluDense/wo/kernel", "encoder/block/0"),
            ("decoder/block/11/layer/0/layer_norm/scale", "decoder/block/11"),
            ("bert/encoder/layer/7/output/dense/bias", "bert/encoder/layer/7"),
            ("layer/2/kernel", "layer/2"),
            ("decoder/layers/5/fc1/kernel", "decoder/layers/5"),
            ("layers/0/mlp/1/kernel", "layers/0"),
            ("embeddings/LayerNorm/bias", "embeddings"),
            ("shared/embedding", "shared"),
            ("pooler/dense/kernel", "pooler"),
            ("lm_head/kernel", "lm_head"),
            ("encoder/final_layer_norm/scale", "encoder/final_layer_norm"),
            ("kernel", "kernel"),
        ],
    )
    def test_the_layer_of_a_path(self, path, layer):
        assert layer_of(path) == layer

    def test_those_of_bert(self):
        assert layers_of(flatten_dict(bert_params(), sep="/")) == (
            "embeddings",
            "encoder/layer/0",
            "encoder/layer/1",
            "pooler",
        )

    def test_those_of_t5(self):
        assert layers_of(flatten_dict(backbone_of(T5(TINY_T5)).params, sep="/")) == (
            "decoder/block/0",
            "decoder/final_layer_norm",
            "encoder/block/0",
            "encoder/block/1",
            "encoder/final_layer_norm",
            "shared",
        )

    def test_the_order_is_natural(self):
        paths = [f"encoder/layer/{i}/kernel" for i in (10, 2, 1, 11)]
        assert [path[14:] for path in layers_of(paths)] == ["1", "2", "10", "11"]

    def test_heads_and_adapters_are_in_none(self):
        paths = ["qa_outputs/bias", "classifier/kernel", "adapter/prompt", "a/b/adapter/up/bias"]
        assert layers_of(paths) == ()
        assert layers_of(["adapters/kernel"]) == ("adapters",)

    def test_the_size_of_the_vector(self):
        paths = list(flatten_dict(bert_params(), sep="/"))
        assert vector_size(IntrinsicConfig(dimension=30), paths) == 26
        assert vector_size(IntrinsicConfig(dimension=30, structure_aware=False), paths) == 30
        assert vector_size(IntrinsicConfig(dimension=5), paths) == 1
        with pytest.raises(ValueError, match=r"dimension=4 .* have 4 scales; use 5 or more"):
            vector_size(IntrinsicConfig(dimension=4), paths)


class TestPerturb:
    def test_values_and_gradients_are_those_of_dense_matrices(self, monkeypatch):
        monkeypatch.setattr(fastfood, "_CHUNK", 320)  # five blocks, of one tensor or of several
        rng = np.random.default_rng(0)
        params = bert_params()
        flat = flatten_dict(params, sep="/")
        scale, layers = layer_scale(params), layers_of(flat)
        vector = random_vector(45)
        cotangents = {p: np.float32(rng.standard_normal(leaf.shape)) for p, leaf in flat.items()}

        @jax.jit
        def run(params, vector, scale, cotangents):
            moved, pull = jax.vjp(lambda v, s: perturb(params, v, s, 7), vector, scale)
            return moved, pull(cotangents)

        moved, (to_vector, to_scale) = run(
            params, vector, scale, unflatten_dict(cotangents, sep="/")
        )
        moved = flatten_dict(moved, sep="/")
        expected_vector, expected_scale = np.zeros(45), np.zeros(len(layers))
        for path, leaf in flat.items():
            if path.startswith("classifier/"):
                np.testing.assert_array_equal(moved[path], leaf)
                continue
            P, layer = dense(45, leaf.size, path, 7), layers.index(layer_of(path))
            move = P @ np.float64(vector)
            assert_close(moved[path], leaf + scale[layer] * move.reshape(leaf.shape))
            expected_vector += scale[layer] * (P.T @ cotangents[path].ravel())
            expected_scale[layer] += move @ cotangents[path].ravel()
        assert_close(to_vector, expected_vector)
        assert_close(to_scale, expected_scale)

    def test_at_zero_it_is_the_identity(self):
        params = bert_params()
        moved = moved_by(params, jnp.zeros(30), layer_scale(params), 0)
        jax.tree.map(np.testing.assert_array_equal, moved, params)

    def test_sums_of_bfloat16_are_rounded_once(self):
        params = bert_params()
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
        for vector in (random_vector(30), jnp.zeros(30)):
            moved, expected = (
                moved_by(tree, vector, layer_scale(params), 0) for tree in (low, exact)
            )
            expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected)
            assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(jnp.bfloat16)}
            jax.tree.map(np.testing.assert_array_equal, moved, expected)

    def test_traced_or_not(self):
        params, vector = bert_params(), random_vector(30)
        scale = layer_scale(params)
        eager = perturb(params, vector, scale, 9)
        jax.tree.map(assert_close, moved_by(params, vector, scale, 9), eager)

    def test_each_tensor_depends_on_its_own_path_alone(self):
        params, vector = bert_params(), random_vector(30)
        moved = flatten_dict(moved_by(params, vector, jnp.ones(4), 0), sep="/")
        backwards = unflatten_dict(dict(reversed(flatten_dict(params).items())))
        assert list(backwards) == list(reversed(params))
        some = {"pooler": params["pooler"], "embeddings": params["embeddings"]}
        for tree, scale in ((backwards, jnp.ones(4)), (some, None)):
            for path, leaf in flatten_dict(moved_by(tree, vector, scale, 0), sep="/").items():
                assert_close(leaf, moved[path], 1e-6)

    def test_adapters_and_heads_are_left_alone(self):
        params = {
            "classifier": {"bias": jnp.ones(3)},
            "pooler": {"dense": {"kernel": jnp.ones((3, 2)), "adapter": {"left": jnp.ones(2)}}},
        }
        moved = perturb(params, jnp.ones(5), None, 0)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), moved, params)
        assert same == {
            "classifier": {"bias": True},
            "pooler": {"dense": {"kernel": False, "adapter": {"left": True}}},
        }

    def test_nothing_as_large_as_the_model_is_stored(self):
        """The backward pass repeats the draws, so it keeps only a few vectors of length L."""
        params = {"embeddings": {"embedding": jnp.zeros((1000, 64))}}

        @jax.jit
        def kept(vector, scale):
            _, pull = jax.vjp(lambda v, s: perturb(params, v, s, 0), vector, scale)
            return jax.tree.leaves(pull)

        leaves = jax.eval_shape(kept, jnp.ones(100), jnp.ones(1))
        assert 0 < sum(leaf.size for leaf in leaves) < 20_000

    def test_a_scale_for_other_layers(self):
        with pytest.raises(ValueError, match=r"\(3,\) must have one entry .* 4 layers embeddings,"):
            perturb(bert_params(), jnp.ones(30), jnp.ones(3), 0)
