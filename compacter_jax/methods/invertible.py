"""Invertible adapters behind the embeddings, and their inverses before tied logits."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from compacter_jax.messages import quote
from compacter_jax.methods.base import InsertedConfig, SiteCall
from compacter_jax.methods.fields import require
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.dense import Dtype
from compacter_jax.sites import Role


class Invertible(nn.Module):
    """An additive coupling of two halves: `y1 = e1 + F(e2)`, `y2 = e2 + G(y1)`.

    `F` and `G` are each two dense layers with an activation between them.

    Attributes:
      config: width and activation of `F` and `G`.
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameters.

    References:
      Dinh et al., NICE: Non-linear Independent Components Estimation, arXiv:1410.8516;
      Pfeiffer et al., MAD-X, EMNLP 2020, arXiv:2005.00052, section 4.2.
    """

    config: InvertibleConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.f = _Half(self.config, dtype=self.dtype, param_dtype=self.param_dtype)
        self.g = _Half(self.config, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(self, x: Array) -> Array:
        """Adapts embeddings, `[..., width]`.

        Raises:
          ValueError: if the width is odd, or the reduction factor does not fit it.
        """
        self.config.hidden_width(x.shape[-1])
        first, second = jnp.split(x, 2, axis=-1)
        first = first + self.f(second)
        return jnp.concatenate([first, second + self.g(first)], axis=-1)

    def inverse(self, y: Array) -> Array:
        """Returns the `x` of which `y` is the adapted value, both `[..., width]`."""
        first, second = jnp.split(y, 2, axis=-1)
        second = second - self.g(first)
        return jnp.concatenate([first - self.f(second), second], axis=-1)


class _Half(nn.Module):
    """`up(act(down(x)))`, as wide as its input."""

    config: InvertibleConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, width = self.config, x.shape[-1]
        settings: dict[str, Any] = {
            "kernel_init": nn.initializers.normal(config.w_init_range),
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        h = nn.Dense(config.hidden_width(2 * width), name="down", **settings)(x)
        h = get_activation(config.non_linearity)(h)
        return nn.Dense(width, name="up", **settings)(h)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvertibleConfig(InsertedConfig):
    """An invertible adapter of the embeddings, for a language.

    A masked language model whose logits are products with its embeddings applies the inverse to
    what it multiplies. Other heads have no use for it.

    Attributes:
      reduction_factor: divisor of half the width; `F` and `G` are `width // 2 // reduction_factor`
        wide within.
      coupling: the kind of coupling, `nice` for an additive one. AdapterHub's `glow` is not here.
      non_linearity: the activation within `F` and `G`, as for bottlenecks.
      w_init_range: standard deviation of the initial weights; biases are zero.

    References:
      Pfeiffer et al., MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer,
      EMNLP 2020, arXiv:2005.00052.
    """

    kind: ClassVar[str] = "invertible"
    heading: ClassVar[str] = "for invertible adapters"
    roles: ClassVar[tuple[Role, ...]] = ("embedded", "vocabulary")

    sites: tuple[str, ...] = ("encoder_embedding", "vocabulary")
    reduction_factor: int = 2
    coupling: Literal["nice"] = "nice"
    non_linearity: str = "relu"
    w_init_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reduction_factor >= 1, "reduction_factor", self.reduction_factor, "at least 1")
        require(self.w_init_range > 0, "w_init_range", self.w_init_range, "above 0")
        if "vocabulary" in self.sites and "encoder_embedding" not in self.sites:
            raise ValueError(
                f"sites={quote(self.sites)} names 'vocabulary' without 'encoder_embedding', whose "
                "adapter is inverted there; name both"
            )

    def hidden_width(self, width: int) -> int:
        """Returns the width within `F` and `G` for embeddings of `width`.

        Raises:
          ValueError: if `width` is odd, or the result would be 0.
        """
        if width % 2:
            raise ValueError(
                f"an invertible adapter halves the embeddings, whose width of {width} is odd; use "
                "a backbone of even width, or a method without an invertible adapter"
            )
        hidden = width // 2 // self.reduction_factor
        if hidden < 1:
            raise ValueError(
                f"reduction_factor={self.reduction_factor} leaves nothing of half a width of "
                f"{width}; use at most {width // 2}"
            )
        return hidden

    def optional_sites(self) -> tuple[str, ...]:
        """Returns `vocabulary`, which models without a head for masked words lack."""
        return ("vocabulary",)

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Adapts the embeddings, or inverts that before the logits."""
        del context
        if call.site.role == "vocabulary":
            return call.again("encoder_embedding", Invertible.inverse, inputs=(x,), plain=x)
        return call.layer(Invertible, x, self, inputs=(x,), plain=x)
