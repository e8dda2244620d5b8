"""A linear layer whose weight is a sum of Kronecker products."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array

from compacter_jax import phm
from compacter_jax.nn.dense import Dtype, ParamFunction


def rule_params(
    param: ParamFunction, phm_dim: int, init: phm.Initializer, dtype: Dtype, *, factorized: bool
) -> Array:
    """Creates a rule `[n, n, n]` as `phm_rule`, or as `phm_rule_left` times `phm_rule_right`.

    Args:
      param: `param` method of the owner.
      phm_dim: `n`.
      init: initialiser of the rule, or of each factor.
      dtype: dtype of the parameters.
      factorized: True to store `[n, n, 1]` and `[n, 1, n]`, whose product is the rule.
    """
    n = phm_dim
    if not factorized:
        return param("phm_rule", init, (n, n, n), dtype)
    left = param("phm_rule_left", init, (n, n, 1), dtype)
    return left @ param("phm_rule_right", init, (n, 1, n), dtype)


def blocks_params(
    param: ParamFunction,
    in_features: int,
    features: int,
    phm_dim: int,
    rank: int | None,
    init: phm.Initializer,
    *,
    dtype: Dtype,
    prefix: str = "",
    last_init: phm.Initializer | None = None,
) -> phm.Blocks:
    """Creates blocks `[n, in / n, out / n]` as `blocks`, or factors of `rank` as `left`, `right`.

    Args:
      param: `param` method of the owner.
      in_features: number of rows of the weight that the blocks and a rule `[n, n, n]` make.
      features: number of columns of the weight.
      phm_dim: `n`.
      rank: rank of each block, or None for full blocks.
      init: initialiser of the blocks, or of each factor.
      dtype: dtype of the parameters.
      prefix: prefix of the names.
      last_init: initialiser of the blocks, or of `right` alone; by default `init`.

    Raises:
      ValueError: if `phm_dim` does not divide both `in_features` and `features`.
    """
    n, last_init = phm_dim, last_init or init
    if in_features % n or features % n:
        raise ValueError(
            f"phm_dim={n} does not divide both in_features={in_features} and features={features}"
        )
    p, q = in_features // n, features // n
    if rank is None:
        return param(f"{prefix}blocks", last_init, (n, p, q), dtype)
    left = param(f"{prefix}left", init, (n, p, rank), dtype)
    return left, param(f"{prefix}right", last_init, (n, rank, q), dtype)


class PHMLinear(nn.Module):
    """A linear layer `x @ W + bias` with the weight `W = kronecker_sum(rule, blocks)`.

    An owner of shared rules or blocks passes them to the call. Without them, the layer creates its
    own.

    Attributes:
      features: width of the output; `phm_dim` divides it and the width of the input.
      phm_dim: `n`, the number of Kronecker products.
      phm_rank: rank of the blocks, None for full blocks.
      factorized_phm_rule: True if the layer's own rule is a product of rank one.
      use_bias: True to add a bias, initially zero.
      per_row: True to multiply by the factors, for a layer whose parameters differ from row to row;
        otherwise the shapes decide.
      rule_init, blocks_init: initialisers, see `phm`.
      last_init: initialiser of the blocks, or of their factor `right`; by default `blocks_init`.
      dtype: dtype of the computation; None promotes as flax does. Parameters keep `param_dtype`.
      param_dtype: dtype of the parameters.

    References:
      arXiv:2106.04647, equations 3 to 5.
    """

    features: int
    phm_dim: int = 4
    phm_rank: int | None = 1
    factorized_phm_rule: bool = False
    use_bias: bool = True
    per_row: bool = False
    rule_init: phm.Initializer = phm.rule_init("normal", 1e-2)
    blocks_init: phm.Initializer = phm.blocks_init("glorot-uniform", 1e-2)
    last_init: phm.Initializer | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, rule: Array | None = None, blocks: phm.Blocks | None = None
    ) -> Array:
        """Maps `[..., in]` to `[..., features]`, with `rule` and `blocks` as in `kronecker_sum`."""
        if rule is None:
            rule = rule_params(
                self.param,
                self.phm_dim,
                self.rule_init,
                self.param_dtype,
                factorized=self.factorized_phm_rule,
            )
        if blocks is None:
            blocks = blocks_params(
                self.param,
                x.shape[-1],
                self.features,
                self.phm_dim,
                self.phm_rank,
                self.blocks_init,
                dtype=self.param_dtype,
                last_init=self.last_init,
            )
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        if isinstance(blocks, tuple):
            x, rule, bias, left, right = promote_dtype(x, rule, bias, *blocks, dtype=self.dtype)
            blocks = (left, right)
        else:
            x, rule, bias, blocks = promote_dtype(x, rule, bias, blocks, dtype=self.dtype)
        matmul = phm.per_row_matmul if self.per_row else phm.kronecker_sum_matmul
        y = matmul(x, rule, blocks)
        return y if bias is None else y + bias
