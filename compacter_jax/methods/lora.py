"""LoRA: low-rank updates of linear layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array

from compacter_jax.hosts import Linear, first_array, linear
from compacter_jax.methods.base import InsertedConfig, SiteCall
from compacter_jax.methods.fields import require
from compacter_jax.nn.dense import Dtype, linear_init
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.dtypes import at_least_float32
from compacter_jax.sites import Role


class LoRADelta(nn.Module):
    """The update `scaling * (dropout(x) @ left) @ right` of a linear layer's output.

    Attributes:
      config: rank, scaling and dropout rate.
      features: width of the linear layer's output.
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameters.

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
        left = self.param("left", linear_init, (x.shape[-1], rank), self.param_dtype)
        right = self.param("right", nn.initializers.zeros, (rank, self.features), self.param_dtype)
        x = Dropout(self.config.dropout, name="dropout")(x, deterministic)
        x, left, right = promote_dtype(x, left, right, dtype=self.dtype)
        # One axis of all tokens: XLA's gradient of `right` for several axes of a wide layer takes
        # many times as long on a CPU (`benchmarks/NOTES.md`).
        update = x.reshape(-1, x.shape[-1]) @ left @ right
        return self.config.scaling * update.reshape(*x.shape[:-1], self.features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(InsertedConfig):
    """A low-rank update of linear layers, `x @ W + lora_alpha / rank * (x @ left) @ right`.

    The initial values of `left` are those of PyTorch's linear layers; `right` is initially zero.

    Attributes:
      rank: rank of each update.
      lora_alpha: numerator of the scaling `lora_alpha / rank`.
      use_rslora: True to divide by `sqrt(rank)` instead, arXiv:2312.03732.
      dropout: dropout rate of the update's input.

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685.
    """

    kind: ClassVar[str] = "lora"
    heading: ClassVar[str] = "for lora"
    roles: ClassVar[tuple[Role, ...]] = ("output",)
    moves_kernels: ClassVar[bool] = True

    sites: tuple[str, ...] = ("query", "value")
    rank: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Adds the low-rank update, computed from the host's input, to the host's output."""
        # In a composition, `context` may have only some of the rows of the call.
        first = first_array(call.args)
        args = (*call.args[:first], context, *call.args[first + 1 :])
        host, inputs = linear(call.host, args, x, call.path)
        update = call.layer(
            LoRADelta,
            x,
            self,
            host.width(x),
            inputs=(host.rows(inputs),),
            plain=0.0,
            deterministic=call.deterministic,
        )
        return x + host.columns(update, x)

    def merged(
        self, host: Mapping[str, Array], own: Mapping[str, Array], linear: Linear, path: str
    ) -> dict[str, Array]:
        """Returns the host's kernel with the update added, in the kernel's dtype."""
        del path
        kernel = at_least_float32(host["kernel"])
        left, right = (at_least_float32(own[name]) for name in ("left", "right"))
        update = jnp.matmul(left, right, precision="highest")
        kernel += self.scaling * linear.as_kernel(update, kernel)
        return {"kernel": kernel.astype(host["kernel"].dtype)}
