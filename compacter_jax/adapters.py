"""Linen layers made of the pure functions of `phm`: parameters, their names and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from compacter_jax import phm
from compacter_jax.config import (
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    LowRankBottleneckConfig,
    PHMBottleneckConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from compacter_jax.hosts import Linear
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.dropout import Dropout
from compacter_jax.paths import ADAPTER
from compacter_jax.patterns import compiled

Dtype = Any
# `nn.Module.param` of whichever module owns the parameter.
ParamFunction = Callable[..., Array]

# What PyTorch's linear layers start with, uniform within 1 / sqrt(in).
_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


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


class LowRankLinear(nn.Module):
    """`x @ left @ right + bias`.

    Attributes:
      features: width of the output.
      rank: of the weight `left @ right`.
      factor_init: initialiser of each factor.
      dtype: of the computation; None promotes as flax does.
      param_dtype: of the parameters.

    References:
      arXiv:2106.04647, section 5.2.
    """

    features: int
    rank: int = 1
    factor_init: phm.Initializer = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., in] -> [..., features]
        shape = (x.shape[-1], self.rank)
        left = self.param("left", self.factor_init, shape, self.param_dtype)
        shape = (self.rank, self.features)
        right = self.param("right", self.factor_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, left, right, bias = promote_dtype(x, left, right, bias, dtype=self.dtype)
        return x @ left @ right + bias


class Bottleneck(nn.Module):
    """A bottleneck adapter: `x + scaling * up(act(down(x)))`.

    Attributes:
      config: sizes, activation and initial values; dense or PHM projections by its class.
      dtype: of the computation; None promotes as flax does.
      param_dtype: of the parameters.
      folded: never build the weights of PHM projections, as in `PHMLinear`.

    References:
      arXiv:2106.04647, section 3.2; arXiv:1902.00751.
    """

    config: BottleneckConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    folded: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        skip: Array | None = None,
        rule: Array | None = None,
        down_blocks: phm.Blocks | None = None,
        up_blocks: phm.Blocks | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Adapts hidden states.

        Args:
          x: `[..., width]`.
          skip: what the adapter's output is added to, `[..., width]`; by default `x`.
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
        h = Dropout(config.dropout, name="dropout")(h, deterministic=deterministic)
        return (x if skip is None else skip) + config.scaling * h

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
        if isinstance(config, LowRankBottleneckConfig):
            factor_init = dense_init(config, name)
            return LowRankLinear(
                features, config.rank, factor_init=factor_init, name=name, **dtypes
            )(x)
        if not isinstance(config, PHMBottleneckConfig):
            return nn.Dense(features, kernel_init=dense_init(config, name), name=name, **dtypes)(x)
        linear = PHMLinear(
            features,
            phm_dim=config.phm_dim,
            phm_rank=config.phm_rank if config.factorized_phm_W else None,
            factorized_phm_rule=config.factorized_phm_rule,
            folded=self.folded,
            rule_init=phm.rule_init(config.phm_c_init, config.phm_init_range),
            blocks_init=phm.blocks_init(config.w_init, config.phm_init_range),
            name=name,
            **dtypes,
        )
        return linear(x, rule, blocks)


class LoRADelta(nn.Module):
    """The update `lora_alpha / rank * (dropout(x) @ left) @ right` of a linear layer's output.

    Attributes:
      config: rank, factor and dropout rate.
      features: width of the linear layer's output.
      dtype: of the computation; None promotes as flax does.
      param_dtype: of the parameters.

    References:
      arXiv:2106.09685, equation 3.
    """

    config: LoRAConfig
    features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:  # [..., in] -> [..., out]
        rank = self.config.rank
        left = self.param("left", _linear_init, (x.shape[-1], rank), self.param_dtype)
        right = self.param("right", nn.initializers.zeros, (rank, self.features), self.param_dtype)
        x = Dropout(self.config.dropout, name="dropout")(x, deterministic)
        x, left, right = promote_dtype(x, left, right, dtype=self.dtype)
        return self.config.factor * (x @ left @ right)


class IA3Scale(nn.Module):
    """`x * scale`, `scale` `[width]` initially one.

    Attributes:
      param_name: `scale` for a linear layer's output, `input_scale` for its input.
      dtype: of the computation; None promotes as flax does.
      param_dtype: of the parameter.

    References:
      arXiv:2205.05638, section 3.3.
    """

    param_name: str = "scale"
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., width] -> [..., width]
        scale = self.param(self.param_name, nn.initializers.ones, x.shape[-1:], self.param_dtype)
        x, scale = promote_dtype(x, scale, dtype=self.dtype)
        return x * scale


class AddedBias(nn.Module):
    """`x + bias`, `bias` `[width]` initially zero: for BitFit where there is no bias to train.

    Attributes:
      dtype: of the computation; None promotes as flax does.
      param_dtype: of the parameter.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., width] -> [..., width]
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        x, bias = promote_dtype(x, bias, dtype=self.dtype)
        return x + bias


class SoftPrompt(nn.Module):
    """Learned embeddings that take the place of the first `prompt_length` ones.

    Attributes:
      config: length and initial values; those of the vocabulary are set by `init_adapters`.
      dtype: of the computation; None promotes as flax does.
      param_dtype: of the parameter.

    References:
      arXiv:2104.08691, section 2.
    """

    config: PromptTuningConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [batch, length, width] -> the same shape
        batch, _, width = x.shape
        half = self.config.prompt_init_range
        init = nn.initializers.uniform(2 * half)
        prompt = self.param(
            "prompt",
            lambda *args: init(*args) - half,
            (self.config.prompt_length, width),
            self.param_dtype,
        )
        x, prompt = promote_dtype(x, prompt, dtype=self.dtype)
        prompt = jnp.broadcast_to(prompt, (batch, *prompt.shape))
        return jnp.concatenate([prompt, x[:, prompt.shape[1] :]], axis=1)


class PrefixKeyValue(nn.Module):
    """Learned keys and values of one attention.

    Attributes:
      config: how many, and how they are parameterised.
      width: of keys, all heads together.
      dtype: of the result.
      param_dtype: of the parameters.

    References:
      arXiv:2101.00190, section 4.3.
    """

    config: PrefixTuningConfig
    width: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, batch: int, hidden: Array | None, deterministic: bool = True
    ) -> tuple[Array, Array]:
        """Keys and values, `[batch, prefix_length, width]` each.

        Args:
          batch: rows; they differ by dropout alone.
          hidden: `[prefix_length, bottleneck_size]` of `prefix_hidden`, where not flat.
          deterministic: no dropout.
        """
        length = self.config.prefix_length
        if hidden is None:
            shape, init = (length, self.width), nn.initializers.normal(1.0)
            both = jnp.concatenate(
                [self.param(name, init, shape, self.param_dtype) for name in ("key", "value")], -1
            )
        else:
            shape = (hidden.shape[-1], 2 * self.width)
            kernel = self.param("kernel", _linear_init, shape, self.param_dtype)
            bias = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
            hidden, kernel, bias = promote_dtype(hidden, kernel, bias, dtype=self.dtype)
            both = hidden @ kernel + bias
        both = jnp.broadcast_to(both.astype(self.dtype or both.dtype), (batch, *both.shape))
        both = Dropout(self.config.dropout, name="dropout")(both, deterministic)
        return both[..., : self.width], both[..., self.width :]


def prefix_hidden(
    param: ParamFunction, config: PrefixTuningConfig, site: str, width: int | None, dtype: Dtype
) -> Array:
    """What the prefixes of a site are computed from, `[prefix_length, bottleneck_size]`.

    Args:
      param: the model's `param` method; names are `prefix_SITE_embedding`, `…_kernel`, `…_bias`.
      config: sizes and activation.
      site: name of the site.
      width: of the embeddings.
      dtype: of the parameters.

    Raises:
      ValueError: if `width` is None.
    """
    if width is None:
        raise ValueError(
            "prefix tuning through a bottleneck needs the width of the backbone's hidden states: "
            "give the module a `config` with `hidden_size`, or set flat=True"
        )
    prefix, bottleneck = f"prefix_{site}", config.bottleneck_size
    shape = (config.prefix_length, width)
    embedding = param(f"{prefix}_embedding", nn.initializers.normal(1.0), shape, dtype)
    kernel = param(f"{prefix}_kernel", _linear_init, (width, bottleneck), dtype)
    bias = param(f"{prefix}_bias", nn.initializers.zeros, (bottleneck,), dtype)
    return get_activation(config.non_linearity)(embedding @ kernel + bias)


def dense_init(config: BottleneckConfig, name: str) -> phm.Initializer:
    """Initialiser of the dense projection `down` or `up`: as for one block, over all of it."""
    if config.w_init == "lora":
        return _linear_init if name == "down" else nn.initializers.zeros
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


def dense_params(own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the dense bottleneck that equals one of another kind.

    Args:
      own: the parameters of a `Bottleneck`, dense, PHM or of low rank.
      shared: what it is called with that others share: `rule`, `down_blocks`, `up_blocks`.
    """
    top = {"phm_rule": shared["rule"]} if "rule" in shared else {}
    for name in ("down", "up"):
        blocks = shared.get(f"{name}_blocks", ())
        if isinstance(blocks, tuple):
            factors = zip(("left", "right"), blocks, strict=False)
            top |= {f"phm_{name}_{factor}": value for factor, value in factors}
        else:
            top[f"phm_{name}_blocks"] = blocks
    return _dense_adapter(own, top)


def _dense_adapter(adapter: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """One adapter's own parameters with built kernels; `top` has what is shared."""
    built = dict(adapter)
    for name in ("down", "up"):
        own = adapter[name]
        if "kernel" in own:
            continue
        if "left" in own and own["left"].ndim == 2:  # of low rank
            built[name] = {"kernel": own["left"] @ own["right"], "bias": own["bias"]}
            continue
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


def flat_prefixes(
    params: Mapping[str, Any], config: PrefixTuningConfig, hosts: Mapping[str, str]
) -> dict[str, Any]:
    """Parameters of the flat prefixes that equal those computed through a bottleneck.

    Args:
      params: nested parameters of a model with prefix tuning, not flat.
      config: the method.
      hosts: site -> regular expression of its hosts' paths.

    Returns:
      The same with `key` and `value` `[prefix_length, width]` in place of each host's `kernel` and
      `bias`, and without what the hosts of a site share.
    """
    flat = flatten_dict(params, sep="/")
    built = {path: leaf for path, leaf in flat.items() if not path.startswith("prefix_")}
    for site, host in hosts.items():
        kernels = compiled(f"({host})/{ADAPTER}/kernel")
        hidden = prefix_hidden(lambda name, *_: flat[name], config, site, 0, None)
        for path in flat:
            if not kernels.fullmatch(path):
                continue
            prefix = path.removesuffix("kernel")
            both = hidden @ built.pop(path) + built.pop(f"{prefix}bias")
            built[f"{prefix}key"], built[f"{prefix}value"] = jnp.split(both, 2, axis=-1)
    return unflatten_dict(built, sep="/")


def merge_weights(
    params: Mapping[str, Any], config: LoRAConfig | IA3Config, hosts: Mapping[str, Linear]
) -> dict[str, Any]:
    """The backbone's parameters with the updates of LoRA or the factors of IA3 in its kernels.

    Args:
      params: nested parameters of an adapted model; hosts have a `kernel` and may have a `bias`.
      config: the method.
      hosts: path of each host -> what it computes, with a layout of its kernel.

    Returns:
      The same without adapters; kernels are computed in float32 and keep their dtype.

    Raises:
      ValueError: if the factors are of an axis that the kernel does not have.
    """

    def merge(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for name, child in node.items():
            if name != ADAPTER and isinstance(child, Mapping):
                merged[name] = merge(child, (*path, name))
            elif name != ADAPTER:
                merged[name] = child
        if ADAPTER in node:
            host = "/".join(path)
            merged |= _merged(merged, node[ADAPTER], config, hosts[host], host)
        return merged

    return merge(params, ())


def _merged(
    host: Mapping[str, Array],
    own: Mapping[str, Array],
    config: LoRAConfig | IA3Config,
    linear: Linear,
    path: str,
) -> dict[str, Array]:
    kernel = host["kernel"].astype(jnp.float32)
    changed = {}
    if isinstance(config, LoRAConfig):
        left, right = (own[name].astype(jnp.float32) for name in ("left", "right"))
        update = jnp.matmul(left, right, precision="highest")
        kernel += config.factor * linear.as_kernel(update, kernel)
        return {"kernel": kernel.astype(host["kernel"].dtype)}
    axis = linear.outputs[-1] if "scale" in own else linear.inputs[-1]
    if axis not in (linear.made if "scale" in own else linear.summed):
        raise ValueError(
            f"the factors at {path} are of an axis that its kernel does not have, so they cannot "
            "be merged; keep the adapter"
        )
    scale = own["scale"] if "scale" in own else own["input_scale"]
    kernel *= linear.along(axis, scale, kernel)
    if "scale" in own and "bias" in host:
        layers, bias = scale.shape[:-1], host["bias"]
        ones = (1,) * (bias.ndim - len(layers) - 1)
        factors = scale.reshape(*layers, *ones, scale.shape[-1])
        changed["bias"] = (bias * factors).astype(bias.dtype)
    return {"kernel": kernel.astype(host["kernel"].dtype), **changed}
