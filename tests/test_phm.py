"""Compares sums of Kronecker products with float64 NumPy; tests distributions of initial values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compacter_jax.phm import (
    blocks_init,
    factored_matmul,
    kronecker_sum,
    kronecker_sum_matmul,
    per_row_matmul,
    prefers_factored,
    rule_init,
)

# name -> (n, a, b, p, q, r, leading axes of x); r is None for full blocks.
SHAPES = {
    "square rule, rank one": (4, 4, 4, 6, 3, 1, (2, 5)),
    "square rule, rank three": (3, 3, 3, 5, 7, 3, (4,)),
    "square rule, full blocks": (3, 3, 3, 4, 2, None, (2, 3)),
    "one product, rank one": (1, 1, 1, 7, 5, 1, (3,)),
    "one product, full blocks": (1, 2, 3, 3, 2, None, (3,)),
    "non-square rule, low rank": (5, 2, 3, 3, 4, 2, (2, 1, 3)),
    "non-square rule, full blocks": (2, 3, 1, 2, 5, None, (7,)),
    "no leading axes, low rank": (2, 2, 2, 3, 5, 1, ()),
    "no leading axes, full blocks": (2, 2, 2, 5, 3, None, ()),
    "no tokens": (2, 2, 2, 3, 3, 1, (0, 4)),
}
# Each case is a compilation: all shapes in float32, some in bfloat16.
cases = pytest.mark.parametrize(
    ("shape", "dtype"),
    [pytest.param(shape, jnp.float32, id=name) for name, shape in SHAPES.items()]
    + [
        pytest.param(SHAPES[name], jnp.bfloat16, id=f"{name}, bfloat16")
        for name in ("square rule, rank three", "non-square rule, full blocks")
    ],
)


def built_matmul(x, rule, blocks):
    return x @ kronecker_sum(rule, blocks)


PATHS = {"built": built_matmul, "factored": factored_matmul, "per-row": per_row_matmul}
paths = pytest.mark.parametrize("matmul", PATHS.values(), ids=PATHS)


def random_operands(shape, dtype=jnp.float32, seed=0):
    """Returns `x, rule, blocks` and a cotangent of the product."""
    n, a, b, p, q, r, leading = shape
    rng = np.random.default_rng(seed)

    def draw(*axes):
        return jnp.asarray(rng.standard_normal(axes), dtype)

    blocks = draw(n, p, q) if r is None else (draw(n, p, r), draw(n, r, q))
    return draw(*leading, a * p), draw(n, a, b), blocks, draw(*leading, b * q)


def to_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def oracle(x, rule, blocks, cotangent):
    """Computes the product and its gradients to x, rule and blocks with `np.kron`."""
    full = blocks[0] @ blocks[1] if isinstance(blocks, tuple) else blocks
    weight = sum(np.kron(A, B) for A, B in zip(rule, full, strict=True))
    rows, cotangents = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    (_, a, b), (_, p, q) = rule.shape, full.shape
    weight_gradient = (rows.T @ cotangents).reshape(a, p, b, q)
    rule_gradient = np.stack([(weight_gradient * B[:, None]).sum((1, 3)) for B in full])
    blocks_gradient = np.stack([(weight_gradient * A[:, None, :, None]).sum((0, 2)) for A in rule])
    if isinstance(blocks, tuple):
        left, right = blocks
        blocks_gradient = (
            blocks_gradient @ right.transpose(0, 2, 1),
            left.transpose(0, 2, 1) @ blocks_gradient,
        )
    return x @ weight, (cotangent @ weight.T, rule_gradient, blocks_gradient)


def assert_within(actual, expected, scale, unit):
    """Checks `|actual - expected| <= unit * scale` element by element.

    `scale` is the oracle applied to the absolute values of the operands. It is the sum of the added
    magnitudes, so the bound holds even if they cancel.
    """

    def check(one, other, magnitude):
        one = np.asarray(one).astype(np.float64)
        assert one.shape == other.shape
        assert np.all(np.abs(one - other) <= unit * magnitude), np.max(
            np.abs(one - other) / np.maximum(magnitude, 1e-300)
        )

    jax.tree.map(check, actual, expected, scale)


# Roundings in units of the last place. Float32: each operand passes through at most 5 sums of at
# most 42 terms, whose errors add up like a random walk. Bfloat16: sums are accumulated in float32
# and rounded once, through at most 6 intermediate results.
UNITS = {jnp.float32: 42 * 2.0**-24, jnp.bfloat16: 6 * 2.0**-8}


@cases
def test_kronecker_sum_is_the_sum_of_kronecker_products(shape, dtype):
    _, rule, blocks, _ = random_operands(shape, dtype, seed=1)
    weight = jax.jit(kronecker_sum)(rule, blocks)
    assert weight.dtype == dtype

    def from_kron(rule, blocks):
        full = blocks[0] @ blocks[1] if isinstance(blocks, tuple) else blocks
        return sum(np.kron(A, B) for A, B in zip(rule, full, strict=True))

    exact = to_float64((rule, blocks))
    magnitude = jax.tree.map(np.abs, exact)
    assert_within(weight, from_kron(*exact), from_kron(*magnitude), UNITS[dtype])


@cases
@paths
def test_product_and_gradients_equal_the_oracle(matmul, shape, dtype):
    x, rule, blocks, cotangent = random_operands(shape, dtype, seed=2)

    @jax.jit
    def product_and_gradients(x, rule, blocks, cotangent):
        product, pull_back = jax.vjp(matmul, x, rule, blocks)
        return product, pull_back(cotangent)

    actual = product_and_gradients(x, rule, blocks, cotangent)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}
    exact = to_float64((x, rule, blocks, cotangent))
    assert_within(actual, oracle(*exact), oracle(*jax.tree.map(np.abs, exact)), UNITS[dtype])


@pytest.mark.parametrize("low_rank", [True, False])
@paths
def test_vmap_agrees_with_a_loop(low_rank, matmul):
    shape = (3, 2, 3, 4, 5, 2 if low_rank else None, (6,))
    many = [random_operands(shape, seed=seed)[:3] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    one_by_one = np.stack([jax.jit(matmul)(*operands) for operands in many])
    # The sums have another order: a few units in the last place of terms of order 10.
    np.testing.assert_allclose(jax.jit(jax.vmap(matmul))(*stacked), one_by_one, atol=1e-5)
    per_row = jax.jit(jax.vmap(matmul, in_axes=(0, None, None)))(*many[0])
    np.testing.assert_allclose(per_row, one_by_one[0], atol=1e-5)


def test_mixed_dtypes_promote():
    x, rule, blocks, _ = random_operands(SHAPES["square rule, rank one"], jnp.bfloat16)
    rule = rule.astype(jnp.float32)
    assert jax.eval_shape(kronecker_sum, rule, blocks).dtype == jnp.float32
    for matmul in (*PATHS.values(), kronecker_sum_matmul):
        assert jax.eval_shape(matmul, x, rule, blocks).dtype == jnp.float32


# Rule [n, n, n]; width and bottleneck of T5-base with a reduction factor of 32; rank (None: full).
@pytest.mark.parametrize(
    ("tokens", "n", "width", "bottleneck", "rank", "factored"),
    [
        # Built: (tokens + 4) * 18432. Factored: 8 * tokens * (4 * 792 + 64) = tokens * 25856.
        pytest.param(1, 4, 768, 24, 1, True, id="one token"),
        pytest.param(9, 4, 768, 24, 1, True, id="at 9 tokens 232704 < 239616"),
        pytest.param(10, 4, 768, 24, 1, False, id="at 10 tokens 258560 > 258048"),
        pytest.param(4096, 4, 768, 24, 1, False, id="a batch, narrow bottleneck"),
        pytest.param(4096, 4, 768, 384, 1, True, id="a batch, wide bottleneck"),
        pytest.param(4096, 12, 768, 24, None, False, id="a batch, full blocks"),
        pytest.param(0, 4, 768, 24, 1, True, id="no tokens"),
    ],
)
def test_the_shapes_choose_the_path(*, tokens, n, width, bottleneck, rank, factored, monkeypatch):
    p, q = width // n, bottleneck // n
    rule = jax.ShapeDtypeStruct((n, n, n), jnp.float32)
    blocks = jax.ShapeDtypeStruct((n, p, q), jnp.float32)
    if rank is not None:
        left = jax.ShapeDtypeStruct((n, p, rank), jnp.float32)
        blocks = (left, jax.ShapeDtypeStruct((n, rank, q), jnp.float32))
    assert prefers_factored(tokens, rule, blocks) is factored

    taken = []
    monkeypatch.setattr(
        "compacter_jax.phm.factored_matmul",
        lambda *operands: taken.append(True) or factored_matmul(*operands),
    )
    x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    product = jax.eval_shape(kronecker_sum_matmul, x, rule, blocks)
    assert product.shape == (tokens, bottleneck)
    assert bool(taken) is factored


@pytest.mark.parametrize("leading", [(), (40,)], ids=["factored", "built"])
def test_the_chosen_path_equals_the_oracle(leading):
    operands = random_operands((2, 2, 2, 15, 15, 1, leading), seed=5)
    assert prefers_factored(math.prod(leading), *operands[1:3]) is (leading == ())
    exact = to_float64(operands)
    expected, scale = oracle(*exact)[0], oracle(*jax.tree.map(np.abs, exact))[0]
    product = jax.jit(kronecker_sum_matmul)(*operands[:3])
    assert_within(product, expected, scale, UNITS[jnp.float32])


def zeros(*shapes):
    made = tuple(np.zeros(shape, np.float32) for shape in shapes)
    return made if len(made) > 1 else made[0]


@pytest.mark.parametrize(
    ("rule", "blocks", "message"),
    [
        (
            zeros((2, 2)),
            zeros((2, 3, 3)),
            r"rule \(2, 2\) and blocks \(2, 3, 3\) must be of rank 3",
        ),
        (zeros((2, 2, 2)), zeros((3, 3)), r"blocks \(3, 3\) must be of rank 3"),
        (zeros((2, 2, 2)), zeros((3, 3, 3)), "with the same leading axis n"),
        (zeros((2, 2, 2)), zeros((2, 3, 1), (3, 1, 3)), r"\(\(2, 3, 1\), \(3, 1, 3\)\)"),
        (zeros((2, 2, 2)), zeros((2, 3), (2, 1, 3)), "must be of rank 3"),
        (zeros((2, 2, 2)), zeros((2, 3, 1), (2, 2, 3)), "differ in their rank r"),
    ],
)
def test_operands_that_do_not_fit(rule, blocks, message):
    with pytest.raises(ValueError, match=message):
        kronecker_sum(rule, blocks)
    with pytest.raises(ValueError, match=message):
        kronecker_sum_matmul(zeros((5, 6)), rule, blocks)


@pytest.mark.parametrize("x", [zeros((5, 7)), zeros(())])
@pytest.mark.parametrize("blocks", [zeros((2, 3, 4)), zeros((2, 3, 1), (2, 1, 4))])
def test_x_of_another_width(x, blocks):
    with pytest.raises(ValueError, match=r"last axis must be a \* p = 6 for rule \(2, 2, 2\)"):
        kronecker_sum_matmul(x, zeros((2, 2, 2)), blocks)


BLOCKS_SHAPE = (64, 40, 24)


@pytest.mark.parametrize(
    "shape", [BLOCKS_SHAPE, (512, 96, 1), (512, 1, 6)], ids=["full blocks", "left", "right"]
)
def test_each_block_is_glorot_uniform_by_itself(shape):
    """The fans are those of one block, not of the stack of blocks."""
    blocks = np.asarray(blocks_init("glorot-uniform", 1.0)(jax.random.key(0), shape))
    limit = math.sqrt(12 / (shape[1] + shape[2]))  # sqrt(2) * sqrt(6 / (fan_in + fan_out))
    assert np.abs(blocks).max() <= limit * (1 + 1e-6)
    assert np.abs(blocks).max() > 0.99 * limit
    # The variance of N draws has a relative standard error of sqrt(4 / 5 / N); N >= 3072.
    np.testing.assert_allclose(blocks.var(), limit**2 / 3, rtol=0.08)
    np.testing.assert_allclose(blocks.var((1, 2)).mean(), limit**2 / 3, rtol=0.35)
    assert len(np.unique(blocks[:, 0, 0])) > 0.9 * shape[0]


@pytest.mark.parametrize("w_init", ["glorot-uniform", "glorot-normal"])
def test_glorot_has_the_moments_of_pytorch(w_init):
    torch = pytest.importorskip("torch")
    fill = {
        "glorot-uniform": torch.nn.init.xavier_uniform_,
        "glorot-normal": torch.nn.init.xavier_normal_,
    }[w_init]
    ours = np.asarray(blocks_init(w_init, 1.0)(jax.random.key(1), BLOCKS_SHAPE))
    theirs = torch.empty(BLOCKS_SHAPE)
    generator = torch.Generator().manual_seed(0)
    for block in theirs:
        fill(block, gain=math.sqrt(2), generator=generator)
    theirs = theirs.numpy()
    # With 61,440 draws each, standard errors are below 0.6 % of the standard deviation and 1.5 % of
    # the fourth moment, which separates the uniform (1.8) from the normal (3) and a truncated one
    # (2.3).
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.03)
    fourth = [(draws**4).mean() / draws.var() ** 2 for draws in (ours, theirs)]
    np.testing.assert_allclose(fourth[0], fourth[1], rtol=0.08)
    if w_init == "glorot-uniform":
        np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=1e-3)


@pytest.mark.parametrize(
    "initializer",
    [blocks_init("normal", 0.02), rule_init("normal", 0.02)],
    ids=["blocks", "rule"],
)
def test_normal_has_the_range_as_standard_deviation(initializer):
    draws = np.asarray(initializer(jax.random.key(2), BLOCKS_SHAPE))
    np.testing.assert_allclose(draws.std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(draws.mean(), 0.0, atol=0.02 * 5 / math.sqrt(draws.size))
    assert np.abs(draws).max() > 3 * 0.02  # not truncated at two standard deviations


def test_uniform_rule_is_on_minus_one_to_one():
    draws = np.asarray(rule_init("uniform", 1e-4)(jax.random.key(3), (12, 12, 12)))
    assert draws.min() < -0.98
    assert draws.max() > 0.98
    assert np.abs(draws).max() <= 1.0
    np.testing.assert_allclose(draws.var(), 1 / 3, rtol=0.08)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "initializer",
    [
        blocks_init("glorot-uniform", 1e-2),
        blocks_init("glorot-normal", 1e-2),
        blocks_init("normal", 1e-2),
        rule_init("normal", 1e-2),
        rule_init("uniform", 1e-2),
    ],
)
def test_initialisers_draw_the_dtype_asked_for(initializer, dtype):
    shaped = jax.eval_shape(lambda key: initializer(key, (2, 3, 4), dtype), jax.random.key(0))
    assert (shaped.shape, shaped.dtype) == ((2, 3, 4), dtype)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (blocks_init, "unknown w_init='xavier'; use glorot-uniform, glorot-normal or normal"),
        (rule_init, "unknown phm_c_init='xavier'; use normal or uniform"),
    ],
)
def test_unknown_initialiser(make, message):
    with pytest.raises(ValueError, match=message):
        make("xavier", 1.0)
