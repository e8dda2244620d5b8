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
      param: the owner's `param` method.
      phm_dim: `n`.
      init: initialiser of the rule, or of each factor.
      dtype: of the parameters.
      factorized: store `[n, n, 1]` and `[n, 1, n]`, whose product is the rule.
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
) -> phm.Blocks:
    """Creates blocks `[n, in / n, out / n]` as `blocks`, or factors of `rank` as `left`, `right`.

    Args:
      param: the owner's `param` method.
      in_features: rows of the weight that the blocks and a rule `[n, n, n]` make.
      features: its columns.
      phm_dim: `n`.
      rank: rank of each block, or None for full blocks.
      init: initialiser of the blocks, or of each factor.
      dtype: of the parameters.
      prefix: put before the names.

    Raises:
      ValueError: if `phm_dim` does not divide both feature counts.
    """
    n = phm_dim
    if in_features % n or features % n:
        raise ValueError(
            f"phm_dim={n} does not divide both in_features={in_features} and features={features}"
        )
    p, q = in_features // n, features // n
    if rank is None:
        return param(f"{prefix}blocks", init, (n, p, q), dtype)
    left = param(f"{prefix}left", init, (n, p, rank), dtype)
    return left, param(f"{prefix}right", init, (n, rank, q), dtype)


class PHMLinear(nn.Module):
    """`x @ W + bias`, `W = kronecker_sum(rule, blocks)`.

    Whoever shares a rule or blocks owns them and passes them in; without, the layer has its own.

    Attributes:
      features: width of the output; `phm_dim` divides it and the width of the input.
      phm_dim: `n`.
      phm_rank: rank of the blocks, None for full blocks.
      factorized_phm_rule: an own rule is a product of rank one.
      use_bias: add a bias, initially zero.
      folded: multiply with the factors, for a layer whose parameters differ from row to row;
        otherwise the shapes decide.
      rule_init, blocks_init: initialisers, see `phm`.
      dtype: of the computation; None promotes as flax does. Parameters stay in `param_dtype`.
      param_dtype: of the parameters.

    References:
      arXiv:2106.04647, equations 3 to 5.
    """

    features: int
    phm_dim: int = 4
    phm_rank: int | None = 1
    factorized_phm_rule: bool = False
    use_bias: bool = True
    folded: bool = False
    rule_init: phm.Initializer = phm.rule_init("normal", 1e-2)
    blocks_init: phm.Initializer = phm.blocks_init("glorot-uniform", 1e-2)
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, rule: Array | None = None, blocks: phm.Blocks | None = None
    ) -> Array:
        """`[..., in] -> [..., features]`; `rule` `[n, n, n]`, `blocks` as `phm.kronecker_sum`'s."""
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
            )
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        if isinstance(blocks, tuple):
            x, rule, bias, left, right = promote_dtype(x, rule, bias, *blocks, dtype=self.dtype)
            blocks = (left, right)
        else:
            x, rule, bias, blocks = promote_dtype(x, rule, bias, blocks, dtype=self.dtype)
        matmul = phm.folded_matmul if self.folded else phm.kronecker_sum_matmul
        y = matmul(x, rule, blocks)
        return y if bias is None else y + bias
