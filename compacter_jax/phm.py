"""Parameterised hypercomplex multiplication: sums of Kronecker products, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# Blocks are an array `[n, p, q]`, or the pair `(left [n, p, r], right [n, r, q])` of its factors.
Blocks = Array | tuple[Array, Array]
Initializer = Callable[..., Any]

# The cost of one multiplication on the factored path, in multiplications on the built path, whose
# one large matrix product runs closer to peak speed. Measured on two CPU cores, forward pass and
# gradient, the paths break even at ratios between 2 and 10; more tokens give a higher ratio.
_FACTORED_COST = 8


def kronecker_sum(rule: Array, blocks: Blocks) -> Array:
    """Returns a sum of Kronecker products, `W = sum_i rule[i] (x) blocks[i]`.

    Args:
      rule: left factors, `[n, a, b]`; Compacter shares them between all adapters.
      blocks: right factors, `[n, p, q]`, one set per adapter; or `(left, right)` of shapes `[n, p,
        r]` and `[n, r, q]`, for `blocks[i] = left[i] @ right[i]`.

    Returns:
      `[a * p, b * q]` weight, of the operands' promoted dtype.

    Raises:
      ValueError: if an operand does not have rank 3, the leading axes differ, or `left` and `right`
        differ in their rank `r`.

    Example:
      >>> rule = jnp.stack([jnp.eye(2), jnp.array([[0.0, -1.0], [1.0, 0.0]])])
      >>> blocks = jnp.array([[[1.0, 2.0]], [[0.0, 3.0]]])
      >>> kronecker_sum(rule, blocks)
      Array([[ 1.,  2.,  0., -3.],
             [ 0.,  3.,  1.,  2.]], dtype=float32)

    References:
      Zhang et al., Beyond Fully-Connected Layers with Quaternions, ICLR 2021, arXiv:2102.08597.
    """
    _check(rule, blocks)
    if isinstance(blocks, tuple):
        blocks = blocks[0] @ blocks[1]
    _, a, b = rule.shape
    _, p, q = blocks.shape
    return jnp.einsum("nab,npq->apbq", rule, blocks).reshape(a * p, b * q)


def kronecker_sum_matmul(x: Array, rule: Array, blocks: Blocks) -> Array:
    """Computes `x @ kronecker_sum(rule, blocks)`, by the cheaper of two equal ways.

    For many tokens, the function builds `W` once and multiplies. For few tokens, or factors much
    smaller than `W`, it multiplies `x` by the factors and never builds `W`. The choice depends on
    the shapes alone and is made during tracing.

    Args:
      x: `[..., a * p]`.
      rule: `[n, a, b]`.
      blocks: `[n, p, q]`, or `(left [n, p, r], right [n, r, q])`.

    Returns:
      `[..., b * q]`, of the operands' promoted dtype.

    Raises:
      ValueError: as `kronecker_sum`, or if the last axis of `x` is not `a * p`.

    Example:
      >>> rule, blocks = jnp.ones((4, 4, 4)), (jnp.ones((4, 192, 1)), jnp.ones((4, 1, 6)))
      >>> kronecker_sum_matmul(jnp.ones((2, 768)), rule, blocks).shape
      (2, 24)
    """
    _check(rule, blocks)
    in_features = rule.shape[1] * (blocks[0] if isinstance(blocks, tuple) else blocks).shape[1]
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"x has shape {x.shape}; its last axis must be a * p = {in_features} for rule "
            f"{rule.shape} and blocks {_shapes(blocks)}"
        )
    tokens = math.prod(x.shape[:-1])
    if prefers_factored(tokens, rule, blocks):
        return factored_matmul(x, rule, blocks)
    return x @ kronecker_sum(rule, blocks)


def prefers_factored(tokens: int, rule: Array, blocks: Blocks) -> bool:
    """Returns True if `kronecker_sum_matmul` takes the factored path for `tokens` rows of `x`.

    The function counts multiplications. The built path has `(tokens + n) in out`. The factored path
    has, per token, `n r (in + out) + n a b r` for low-rank blocks and `n in q + n a b q` for full
    blocks.
    """
    n, a, b = rule.shape
    if isinstance(blocks, tuple):
        (_, p, r), (_, _, q) = blocks[0].shape, blocks[1].shape
        per_token = n * r * (a * p + b * q) + n * a * b * r
    else:
        _, p, q = blocks.shape
        per_token = n * a * p * q + n * a * b * q
    built = (tokens + n) * (a * p) * (b * q)
    return _FACTORED_COST * tokens * per_token < built


def factored_matmul(x: Array, rule: Array, blocks: Blocks) -> Array:
    """Computes `x @ W` without building `W`: blocks act on one axis of `x`, the rule on the other.

    Shapes, dtype and equation are those of `kronecker_sum_matmul`.
    """
    left = blocks[0] if isinstance(blocks, tuple) else blocks
    a, p = rule.shape[1], left.shape[1]
    rows = x.reshape(*x.shape[:-1], a, p)
    mixed = jnp.einsum("...ap,npr->...anr", rows, left)
    if isinstance(blocks, tuple):
        mixed = jnp.einsum("...anr,nab->...bnr", mixed, rule)
        y = jnp.einsum("...bnr,nrq->...bq", mixed, blocks[1])
    else:
        y = jnp.einsum("...anq,nab->...bq", mixed, rule)
    return y.reshape(*x.shape[:-1], y.shape[-2] * y.shape[-1])


def per_row_matmul(x: Array, rule: Array, blocks: Blocks) -> Array:
    """Computes `x @ W` as two products with small matrices, for a `W` that few rows of `x` share.

    The function first multiplies the rule into the factors of the narrower side, so that two
    products remain instead of three. If each row of a batch has its own `W`, these products are
    batched.

    Shapes, dtype and equation are those of `kronecker_sum_matmul`.
    """
    if not isinstance(blocks, tuple):
        return factored_matmul(x, rule, blocks)
    left, right = blocks
    (n, a, b), (_, p, r), q = rule.shape, left.shape, right.shape[2]
    if b * q <= a * p:
        narrow = jnp.einsum("nab,nrq->anrbq", rule, right).reshape(a * n * r, b * q)
        mixed = jnp.einsum("...ap,npr->...anr", x.reshape(*x.shape[:-1], a, p), left)
        return mixed.reshape(*x.shape[:-1], a * n * r) @ narrow
    narrow = jnp.einsum("nab,npr->apbnr", rule, left).reshape(a * p, b * n * r)
    mixed = (x @ narrow).reshape(*x.shape[:-1], b, n * r)
    return (mixed @ right.reshape(n * r, q)).reshape(*x.shape[:-1], b * q)


def blocks_init(w_init: str, init_range: float) -> Initializer:
    """Returns an initialiser of blocks or their factors, which draws each of the `n` separately.

    Args:
      w_init: "glorot-uniform" or "glorot-normal", both with gain sqrt(2) over the fan of one block,
        or "normal".
      init_range: standard deviation of "normal".

    Raises:
      ValueError: for another `w_init`.
    """
    scaling = jax.nn.initializers.variance_scaling
    match w_init:
        case "glorot-uniform":
            return scaling(2.0, "fan_avg", "uniform", batch_axis=(0,))
        case "glorot-normal":
            # "normal" is the untruncated distribution, as in PyTorch's xavier_normal_.
            return scaling(2.0, "fan_avg", "normal", batch_axis=(0,))
        case "normal":
            return jax.nn.initializers.normal(init_range)
    raise ValueError(f"unknown w_init={w_init!r}; use glorot-uniform, glorot-normal or normal")


def glorot_deviation(
    in_features: int, features: int, phm_dim: int, rank: int | None, w_init: str, init_range: float
) -> float:
    """Standard deviation of a rule that gives a sum of Kronecker products Glorot's size.

    That is the deviation of a dense weight `[in_features, features]` with gain sqrt(2),
    `sqrt(4 / (in_features + features))`, where each entry of the sum is one of `phm_dim` products
    of an entry of the rule with one of a block.

    Args:
      in_features: rows of the sum.
      features: its columns.
      phm_dim: `n`.
      rank: of the blocks, None where they are full.
      w_init: of the blocks or of their factors, see `blocks_init`.
      init_range: likewise.
    """
    rows, columns = in_features / phm_dim, features / phm_dim

    def deviation(fan_in: float, fan_out: float) -> float:
        return init_range if w_init == "normal" else math.sqrt(4 / (fan_in + fan_out))

    if rank is None:
        block = deviation(rows, columns)
    else:
        block = math.sqrt(rank) * deviation(rows, rank) * deviation(rank, columns)
    return math.sqrt(4 / (in_features + features)) / (math.sqrt(phm_dim) * block)


def rule_init(phm_c_init: str, init_range: float) -> Initializer:
    """Returns an initialiser of a rule or of its factors.

    Args:
      phm_c_init: "normal", or "uniform" on [-1, 1].
      init_range: standard deviation of "normal".

    Raises:
      ValueError: for another `phm_c_init`.
    """
    match phm_c_init:
        case "normal":
            return jax.nn.initializers.normal(init_range)
        case "uniform":
            return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
                key, shape, dtype, minval=-1.0, maxval=1.0
            )
    raise ValueError(f"unknown phm_c_init={phm_c_init!r}; use normal or uniform")


def _shapes(blocks: Blocks) -> str:
    return str(tuple(f.shape for f in blocks) if isinstance(blocks, tuple) else blocks.shape)


def _check(rule: Array, blocks: Blocks) -> None:
    factors = blocks if isinstance(blocks, tuple) else (blocks,)
    operands = (rule, *factors)
    if any(o.ndim != 3 for o in operands) or len({o.shape[0] for o in operands}) > 1:
        raise ValueError(
            f"rule {rule.shape} and blocks {_shapes(blocks)} must be of rank 3 with the same "
            "leading axis n"
        )
    if len(factors) == 2 and factors[0].shape[2] != factors[1].shape[1]:
        raise ValueError(
            f"blocks {_shapes(blocks)}: left [n, p, r] and right [n, r, q] differ in their rank r"
        )
