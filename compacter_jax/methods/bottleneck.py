"""Bottleneck adapters with dense projections, or projections of low rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array

from compacter_jax import phm
from compacter_jax.methods.base import InsertedConfig, SiteCall, SitesOf
from compacter_jax.methods.fields import choose, require
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.dense import Dtype, linear_init
from compacter_jax.nn.dropout import Dropout
from compacter_jax.sites import Role, Site

WEIGHT_INITS = ("glorot-uniform", "glorot-normal", "normal", "lora")
FACTOR_INITS = WEIGHT_INITS[:3]
# The site of bottlenecks that merging makes a part of the network beside them.
_BESIDE = "parallel_feed_forward"
# Fields that do not affect the function of a trained bottleneck.
_INITIAL = (
    *("w_init", "w_init_up", "w_init_range"),
    *("train_layer_norms", "train_head", "train_pooler"),
)


class LowRankLinear(nn.Module):
    """A linear layer with a low-rank weight, `x @ left @ right + bias`.

    Attributes:
      features: width of the output.
      rank: rank of the weight `left @ right`.
      factor_init: initialiser of each factor.
      last_init: initialiser of `right`, by default `factor_init`.
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameters.

    References:
      arXiv:2106.04647, section 5.2.
    """

    features: int
    rank: int = 1
    factor_init: phm.Initializer = nn.initializers.variance_scaling(2.0, "fan_avg", "uniform")
    last_init: phm.Initializer | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., in] -> [..., features]
        shape = (x.shape[-1], self.rank)
        left = self.param("left", self.factor_init, shape, self.param_dtype)
        shape = (self.rank, self.features)
        right = self.param("right", self.last_init or self.factor_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, left, right, bias = promote_dtype(x, left, right, bias, dtype=self.dtype)
        return x @ left @ right + bias


class Bottleneck(nn.Module):
    """A bottleneck adapter: `x + scaling * up(act(down(x)))`.

    Attributes:
      config: sizes, activation and initial values; its class decides on dense or PHM projections.
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameters.
      per_row: True to never build the weights of PHM projections, as in `PHMLinear`.

    References:
      arXiv:2106.04647, section 3.2; arXiv:1902.00751.
    """

    config: BottleneckConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    per_row: bool = False

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
          x: hidden states, `[..., width]`.
          skip: array that the adapter's output is added to, `[..., width]`; by default `x`.
          rule: the rule `[n, n, n]`, if the model shares one.
          down_blocks: blocks of the projection `down`, if the model shares them.
          up_blocks: blocks of the projection `up`, if the model shares them.
          deterministic: True for no dropout; False uses the rng stream `dropout`.

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
        h = Dropout(config.inner_dropout, name="inner_dropout")(h, deterministic=deterministic)
        h = self._projection(width, "up", h, rule, up_blocks)
        if config.layer_norm_after:
            h = self._layer_norm("layer_norm_after")(h)
        h = Dropout(config.dropout, name="dropout")(h, deterministic=deterministic)
        return (x if skip is None else skip) + config.scaling * h

    def _layer_norm(self, name: str) -> nn.LayerNorm:
        # The layer norm equals PyTorch's, which the reference implementation uses. The fast
        # variance cancels if hidden states have a few large entries.
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
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = self.config.projection(features, name, per_row=self.per_row, **dtypes)
        return project(x, rule, blocks)


def dense_init(config: BottleneckConfig, name: str) -> phm.Initializer:
    """Returns the initialiser of the dense projection `down` or `up`, drawn as one block."""
    return config.last_init(name) or first_init(config, name)


def first_init(config: BottleneckConfig, name: str) -> phm.Initializer:
    """Returns the initialiser that `w_init` stands for, of a projection or of its factors."""
    if config.w_init == "lora":
        return linear_init if name == "down" else nn.initializers.zeros
    init = phm.blocks_init(config.w_init, config.w_init_range)
    return lambda key, shape, dtype=jnp.float32: init(key, (1, *shape), dtype)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(InsertedConfig):
    """A bottleneck adapter, `x + scaling * up(act(down(x)))`, with dense projections.

    Attributes:
      reduction_factor: divisor of the width; the bottleneck is `width // reduction_factor` wide.
      expansion_factor: multiplier of the width before it is divided, to make one bottleneck as wide
        as several together.
      non_linearity: the activation: gelu, gelu_10, gelu_accurate, gelu_fast, gelu_new, gelu_python,
        gelu_python_tanh, gelu_pytorch_tanh, leaky_relu, linear, mish, quick_gelu, relu, relu2,
        relu6, sigmoid, silu, swish or tanh.
      w_init: distribution of the projections' initial weights; one of `WEIGHT_INITS`. The Glorot
        distributions have gain sqrt(2), as the authors of Compacter use. With `lora`, the
        projection `up` is initially zero; it is for dense projections alone.
      w_init_up: initial weights of the projection `up`: `same` for those of `w_init`; `zeros` for
        an adapter that starts as the identity. Of a product of factors only the last is zero.
      w_init_range: standard deviation of `w_init="normal"`.
      scaling: factor of the adapter's output.
      dropout: dropout rate of the adapter's output, before it is added.
      inner_dropout: dropout rate between the activation and the projection `up`.
      layer_norm_before: True for an own layer norm on the adapter's input.
      layer_norm_after: True for an own layer norm on the adapter's output, before the skip
        connection.
      parallel: True if the adapter reads the sub-layer's input (at the sites `residual_...`, its
        residual) and is added to the sub-layer's output; for the sites `parallel_...` and
        `residual_...`.
      original_ln_before: True if at the sites `residual_...` the adapter reads the sub-layer's
        output after the residual is added and, in a backbone that normalises after, the norm is
        applied.
      original_ln_after: True if at the sites `residual_...` the residual and the norm of the
        sub-layer follow the adapter; False if the adapter's output replaces the sub-layer's.
      residual_before_ln: start of the adapter's skip connection with `original_ln_before`. True:
        before the residual and the norm; False: after both; `post_add`: between the two, at the
        sum.

    References:
      Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019, arXiv:1902.00751;
      He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022,
      arXiv:2110.04366 (parallel); `original_ln_...` and `residual_before_ln` are AdapterHub's.
    """

    kind: ClassVar[str] = "bottleneck"
    heading: ClassVar[str] = "for bottleneck adapters, Compacter among them"
    roles: ClassVar[tuple[Role, ...]] = ("output", "parallel", "join", "embedded")
    has_dense_equivalent: ClassVar[bool] = True
    linear: ClassVar[str] = "dense"

    sites: tuple[str, ...] = ("attention", "feed_forward")
    reduction_factor: int = 32
    expansion_factor: int = 1
    non_linearity: str = "gelu_new"
    w_init: str = "normal"
    w_init_up: Literal["same", "zeros"] = "same"
    w_init_range: float = 1e-2
    scaling: float = 1.0
    dropout: float = 0.0
    inner_dropout: float = 0.0
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: Literal[True, False, "post_add"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reduction_factor", "expansion_factor"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError(
                "residual_before_ln='post_add' needs adapters that read the sum with the "
                "residual; set original_ln_before=True"
            )
        for name in ("dropout", "inner_dropout"):
            rate = getattr(self, name)
            require(0.0 <= rate < 1.0, name, rate, "in [0, 1)")
        require(self.w_init_range > 0, "w_init_range", self.w_init_range, "above 0")
        choose("w_init", self.w_init, self._weight_inits())

    def _weight_inits(self) -> tuple[str, ...]:
        return WEIGHT_INITS

    def last_init(self, name: str) -> phm.Initializer | None:
        """Returns the initialiser of a projection's last factor if it is not that of `w_init`."""
        return nn.initializers.zeros if name == "up" and self.w_init_up == "zeros" else None

    def bottleneck_width(self, width: int) -> int:
        """Returns the width of the bottleneck for hidden states of `width`.

        Raises:
          ValueError: if it would be 0.
        """
        bottleneck = width * self.expansion_factor // self.reduction_factor
        if bottleneck < 1:
            raise ValueError(
                f"reduction_factor={self.reduction_factor} leaves no bottleneck at a width of "
                f"{width}; use at most {width}"
            )
        return bottleneck

    def projection(
        self, features: int, name: str, *, per_row: bool, **dtypes: Any
    ) -> Callable[[Array, Array | None, phm.Blocks | None], Array]:
        """Creates the projection `down` or `up` within the call of a `Bottleneck`.

        Args:
          features: width of the output.
          name: "down" or "up".
          per_row: True to never build the weights of PHM projections.
          **dtypes: `dtype` and `param_dtype` of the layer.

        Returns:
          A function of the input, the rule and the blocks; the latter two are None unless the model
          shares them.
        """
        del per_row
        layer = nn.Dense(features, kernel_init=dense_init(self, name), name=name, **dtypes)
        return lambda x, rule, blocks: layer(x)

    def check_site(self, name: str, site: Site) -> None:
        """Checks that the adapter can read the inputs that its fields ask for at a site."""
        super().check_site(name, site)
        is_parallel = site.role == "parallel" or name.startswith("parallel_")
        if is_parallel and not self.parallel:
            raise ValueError(f"site {name!r} is for parallel adapters; set parallel=True")
        if site.role == "embedded" and self.parallel:
            raise ValueError(
                f"parallel=True at site {name!r}: embeddings are no sub-layer whose input an "
                "adapter could read; use parallel=False there"
            )
        if site.role == "output" and self.parallel:
            raise ValueError(
                f"at site {name!r} an adapter sees only the output of the sub-layer; for parallel "
                f"adapters use 'parallel_{name}'"
            )
        moved = self.original_ln_before or not (self.original_ln_after and self.residual_before_ln)
        if site.role == "embedded" and moved:
            raise ValueError(
                "original_ln_before, original_ln_after and residual_before_ln are about the "
                f"residual of a sub-layer, which site {name!r} does not have; leave them out there"
            )
        if site.role != "join" and moved:
            raise ValueError(
                "original_ln_before, original_ln_after and residual_before_ln need the residual; "
                f"use 'residual_{name.removeprefix('parallel_')}' in place of site {name!r}"
            )

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Runs the adapter on the inputs that its fields and the role of the site select."""
        if call.site.role in ("output", "embedded"):
            return self._adapt(call, x, None, x)
        if call.site.role == "parallel":
            return self._adapt(call, context, x, x)
        needs_plain = call.needs_plain and not self.original_ln_after
        needed = self.original_ln_before or needs_plain
        whole = call.run(context, x, *call.args[2:]) if needed else x
        joined = whole if self.original_ln_before else x
        if self.residual_before_ln == "post_add":
            skip = context + x
        else:
            skip = x if self.residual_before_ln else joined
        plain = whole if needs_plain else x
        return self._adapt(call, context if self.parallel else joined, skip, plain)

    def _adapt(self, call: SiteCall, x: Any, skip: Any, plain: Any) -> Any:
        return call.layer(
            Bottleneck,
            x,
            self,
            inputs=(x,),
            plain=plain,
            skip=skip,
            deterministic=call.deterministic,
        )

    def optional_sites(self) -> tuple[str, ...]:
        """Returns `decoder_embedding`, which an encoder lacks, if the encoder's is named, too."""
        return ("decoder_embedding",) if "encoder_embedding" in self.sites else ()

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns why weights of the backbone cannot express the method, or None if they can."""
        del sites_of
        if self.joins_networks:
            return None
        other = [name for name in self.sites if name != _BESIDE]
        where = f"at {', '.join(other)}" if other else "behind or before norms of their own"
        like = " as ciat has them" if {"encoder_embedding", "parallel_attention"} & {*other} else ""
        return (
            "its adapters have a non-linearity, which weights of the backbone cannot express "
            f"{where}{like}; only bottlenecks at {_BESIDE!r} alone, without norms of their own, "
            "can become part of a feed-forward network"
        )

    @property
    def joins_networks(self) -> bool:
        """True at `parallel_feed_forward` alone, without norms of its own."""
        has_norm = self.layer_norm_before or self.layer_norm_after
        return self.sites == (_BESIDE,) and not has_norm

    def network_units(self, width: int) -> int:
        """Returns the width of the bottleneck."""
        return self.bottleneck_width(width)

    def network(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the dense projections of an adapter, with the factor `scaling` in `up`."""
        dense = self.dense_params(own, {})
        up = {name: self.scaling * leaf for name, leaf in dense["up"].items()}
        return {"down": dense["down"], "up": up}

    @property
    def replaces_residual(self) -> bool:
        """True if the adapter's output replaces the sub-layer's, residual included."""
        return not self.original_ln_after

    def map_signature(self) -> Any:
        """Returns the dense equivalent, without its initial values and `train_…` fields."""
        default = BottleneckConfig()
        return self.dense_equivalent().replace(
            **{name: getattr(default, name) for name in _INITIAL}
        )

    def dense_equivalent(self) -> BottleneckConfig:
        """Returns the dense bottleneck that computes the same once its weights are built."""
        fields = {field.name for field in dataclasses.fields(BottleneckConfig)}
        return BottleneckConfig(**{name: getattr(self, name) for name in fields})

    def dense_params(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the dense bottleneck that equals one of the method's."""
        del shared
        return dict(own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankBottleneckConfig(BottleneckConfig):
    """A bottleneck adapter whose projections are products `left @ right` of low rank.

    The released code multiplies the two factors element by element, which equals the product only
    at rank 1.

    Attributes:
      rank: rank of each projection.

    References:
      arXiv:2106.04647, section 5.2 ("Low-rank").
    """

    kind: ClassVar[str] = "low_rank_bottleneck"
    heading: ClassVar[str] = "for low-rank and lora"
    linear: ClassVar[str] = "low_rank"

    w_init: str = "glorot-uniform"
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "rank", self.rank, "at least 1")

    def _weight_inits(self) -> tuple[str, ...]:
        return FACTOR_INITS

    def projection(
        self, features: int, name: str, *, per_row: bool, **dtypes: Any
    ) -> Callable[[Array, Array | None, phm.Blocks | None], Array]:
        """Creates the projection `down` or `up` within the call of a `Bottleneck`."""
        del per_row
        layer = LowRankLinear(
            features,
            self.rank,
            factor_init=first_init(self, name),
            last_init=self.last_init(name),
            name=name,
            **dtypes,
        )
        return lambda x, rule, blocks: layer(x)

    def dense_params(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the dense bottleneck, whose kernels are products of factors."""
        del shared
        dense = dict(own)
        for name in ("down", "up"):
            kernel = own[name]["left"] @ own[name]["right"]
            dense[name] = {"kernel": kernel, "bias": own[name]["bias"]}
        return dense
