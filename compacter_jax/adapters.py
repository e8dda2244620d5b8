"""Linen layers made of the pure functions of `phm`: parameters, their names and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array

from compacter_jax import phm
from compacter_jax.activations import get_activation
from compacter_jax.config import ADAPTER, BottleneckConfig, PHMBottleneckConfig

Dtype = Any
# `nn.Module.param` of whichever module owns the parameter.
ParamFunction = Callable[..., Array]


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
        y = phm.kronecker_sum_matmul(x, rule, blocks)
        return y if bias is None else y + bias


class Bottleneck(nn.Module):
    """A serial bottleneck adapter: `x + scaling * up(act(down(x)))`.

    Attributes:
      config: sizes, activation and initial values; dense or PHM projections by its class.
      dtype: of the computation; None promotes as flax does.
      param_dtype: of the parameters.

    References:
      arXiv:2106.04647, section 3.2; arXiv:1902.00751.
    """

    config: BottleneckConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        rule: Array | None = None,
        down_blocks: phm.Blocks | None = None,
        up_blocks: phm.Blocks | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Adapts hidden states.

        Args:
          x: `[..., width]`.
          rule: `[n, n, n]`, where the model shares one.
          down_blocks: blocks of the projection `down`, where the model shares them.
          up_blocks: those of `up`.
          deterministic: no dropout; otherwise the rng stream `dropout` is used.

        Returns:
          `[..., width]`.

        Raises:
          ValueError: if the reduction factor or `phm_dim` does not fit the width.
        """
        config, width = self.config, x.shape[-1]
        bottleneck = config.bottleneck_width(width)
        h = x
        if config.layer_norm_before:
            h = self._layer_norm("layer_norm_before")(h)
        h = self._projection(bottleneck, "down", h, rule, down_blocks)
        h = get_activation(config.non_linearity)(h)
        h = self._projection(width, "up", h, rule, up_blocks)
        if config.layer_norm_after:
            h = self._layer_norm("layer_norm_after")(h)
        h = nn.Dropout(config.dropout, name="dropout")(h, deterministic=deterministic)
        return x + config.scaling * h

    def _layer_norm(self, name: str) -> nn.LayerNorm:
        # As PyTorch's, which the reference implementation uses; the fast variance cancels where
        # hidden states have a few large entries.
        return nn.LayerNorm(
            epsilon=1e-5,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _projection(
        self, features: int, name: str, x: Array, rule: Array | None, blocks: phm.Blocks | None
    ) -> Array:
        config = self.config
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if not isinstance(config, PHMBottleneckConfig):
            return nn.Dense(features, kernel_init=dense_init(config), name=name, **dtypes)(x)
        linear = PHMLinear(
            features,
            phm_dim=config.phm_dim,
            phm_rank=config.phm_rank if config.factorized_phm_W else None,
            factorized_phm_rule=config.factorized_phm_rule,
            rule_init=phm.rule_init(config.phm_c_init, config.phm_init_range),
            blocks_init=phm.blocks_init(config.w_init, config.phm_init_range),
            name=name,
            **dtypes,
        )
        return linear(x, rule, blocks)


def dense_init(config: BottleneckConfig) -> phm.Initializer:
    """Initialiser of a dense projection: as for one block, over the whole weight."""
    init = phm.blocks_init(config.w_init, config.w_init_range)
    return lambda key, shape, dtype=jnp.float32: init(key, (1, *shape), dtype)[0]


def shared_params(
    param: ParamFunction, config: PHMBottleneckConfig, width: int | None, param_dtype: Dtype
) -> dict[str, Any]:
    """Creates what all adapters of a model share, as keyword arguments of `Bottleneck`.

    Args:
      param: the model's `param` method; names are `phm_rule…`, `phm_down_…` and `phm_up_…`.
      config: says what is shared.
      width: of the hidden states; needed where blocks are shared.
      param_dtype: of the parameters.

    Raises:
      ValueError: if blocks are shared and `width` is None.
    """
    shared: dict[str, Any] = {}
    if config.shared_phm_rule:
        shared["rule"] = rule_params(
            param,
            config.phm_dim,
            phm.rule_init(config.phm_c_init, config.phm_init_range),
            param_dtype,
            factorized=config.factorized_phm_rule,
        )
    if config.shared_W_phm:
        if width is None:
            raise ValueError(
                "shared_W_phm needs the width of the backbone's hidden states: give the module a "
                "`config` with `hidden_size`, or share only the rule"
            )
        bottleneck = config.bottleneck_width(width)
        init = phm.blocks_init(config.w_init, config.phm_init_range)
        rank = config.phm_rank if config.factorized_phm_W else None
        for name, in_features, features in (
            ("down", width, bottleneck),
            ("up", bottleneck, width),
        ):
            shared[f"{name}_blocks"] = blocks_params(
                param,
                in_features,
                features,
                config.phm_dim,
                rank,
                init,
                dtype=param_dtype,
                prefix=f"phm_{name}_",
            )
    return shared


def build_weights(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the dense bottlenecks that equal PHM ones: each kernel is a Kronecker sum.

    Args:
      params: nested parameters of a model with PHM bottlenecks, each under `…/adapter`, and what
        they share at the top.

    Returns:
      The same with `kernel` `[in, out]` in place of each projection's rule and blocks, and nothing
      shared at the top.

    References:
      arXiv:2106.04647, equation 3.
    """

    def build(node: Mapping[str, Any]) -> dict[str, Any]:
        built = {}
        for name, child in node.items():
            if name == ADAPTER:
                built[name] = _dense_adapter(child, params)
            elif isinstance(child, Mapping):
                built[name] = build(child)
            elif not name.startswith("phm_"):
                built[name] = child
        return built

    return build(params)


def _dense_adapter(adapter: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """One adapter's own parameters with built kernels; `top` has what is shared."""
    built = dict(adapter)
    for name in ("down", "up"):
        own = adapter[name]
        prefix = f"phm_{name}_"
        shared = {key.removeprefix(prefix): top[key] for key in top if key.startswith(prefix)}
        rule = _stored((own, top), "phm_rule", "phm_rule_left", "phm_rule_right")
        blocks = _stored((own, shared), "blocks", "left", "right")
        built[name] = {"kernel": phm.kronecker_sum(rule, blocks), "bias": own["bias"]}
    return built


def _stored(places: Sequence[Mapping[str, Any]], whole: str, left: str, right: str) -> Array:
    """The parameter `whole`, or the product of its two factors, from the first place with it."""
    for params in places:
        if whole in params:
            return params[whole]
        if left in params:
            return params[left] @ params[right]
    raise ValueError(f"there is no {whole} and no {left} among the parameters of an adapter")
