"""IA3: learned factors on the outputs or inputs of linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array

from compacter_jax.hosts import Linear
from compacter_jax.methods.base import InsertedConfig, SiteCall
from compacter_jax.nn.dense import Dtype
from compacter_jax.nn.dtypes import at_least_float32
from compacter_jax.sites import Role, Site


class IA3Scale(nn.Module):
    """A layer of factors, `x * scale`, with `scale` `[width]` initially one.

    Attributes:
      param_name: `scale` for a linear layer's output, `input_scale` for its input.
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameter.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(InsertedConfig):
    """Learned factors on keys, values and the inner activations of the feed-forward network.

    Attributes:
      sites: linear layers whose outputs are multiplied, element by element.
      input_sites: linear layers whose inputs are multiplied, element by element.

    References:
      Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
      Learning, NeurIPS 2022, arXiv:2205.05638.
    """

    kind: ClassVar[str] = "ia3"
    heading: ClassVar[str] = "for ia3"
    roles: ClassVar[tuple[Role, ...]] = ("output",)
    moves_kernels: ClassVar[bool] = True

    sites: tuple[str, ...] = ("key", "value")
    input_sites: tuple[str, ...] = ("feed_forward",)

    def all_sites(self) -> tuple[str, ...]:
        """Returns the sites of outputs, then those of inputs."""
        return self.sites + self.input_sites

    def is_before(self, site_name: str, site: Site) -> bool:
        """Returns True if the method scales the host's input instead of its output."""
        return site.is_before or site_name not in self.sites

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Multiplies the host's output or input by the factors."""
        del context
        name = "input_scale" if self.is_before(call.name, call.site) else "scale"
        return call.layer(IA3Scale, x, name, inputs=(x,), plain=x)

    def merged(
        self, host: Mapping[str, Array], own: Mapping[str, Array], linear: Linear, path: str
    ) -> dict[str, Array]:
        """Returns the host's kernel, and its bias if outputs are scaled, times the factors."""
        scales_output = "scale" in own
        axis = linear.outputs[-1] if scales_output else linear.inputs[-1]
        if axis not in (linear.made if scales_output else linear.summed):
            raise ValueError(
                f"the factors at {path} scale an axis that its kernel does not have, so they "
                "cannot be merged; keep the adapter"
            )
        scale = own["scale"] if scales_output else own["input_scale"]
        kernel = at_least_float32(host["kernel"])
        kernel *= linear.along(axis, scale, kernel)
        changed = {"kernel": kernel.astype(host["kernel"].dtype)}
        if scales_output and "bias" in host:
            layers, bias = scale.shape[:-1], host["bias"]
            ones = (1,) * (bias.ndim - len(layers) - 1)
            factors = scale.reshape(*layers, *ones, scale.shape[-1])
            changed["bias"] = (bias * factors).astype(bias.dtype)
        return changed
