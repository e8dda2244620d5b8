"""Linear layers of the backbone that are trained whole, beside adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array

from compacter_jax.hosts import Linear, first_array, linear
from compacter_jax.methods.base import InsertedConfig, MethodConfig, SiteCall
from compacter_jax.methods.combined import CombinedConfig
from compacter_jax.nn.dense import Dtype
from compacter_jax.nn.dtypes import at_least_float32
from compacter_jax.sites import Role


class FullDelta(nn.Module):
    """The change `x @ kernel + bias` of a linear layer's output, initially zero.

    Attributes:
      features: width of the linear layer's output.
      use_bias: True to change the bias, too.
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameters.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., in] -> [..., out]
        zeros, shape = nn.initializers.zeros, (x.shape[-1], self.features)
        kernel = self.param("kernel", zeros, shape, self.param_dtype)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        y = x @ kernel
        if self.use_bias:
            bias = self.param("bias", zeros, (self.features,), self.param_dtype)
            (bias,) = promote_dtype(bias, dtype=y.dtype)
            y = y + bias
        return y


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedSitesConfig(InsertedConfig):
    """Weights of linear layers, trained whole: `x @ (W + D) + b + d` with D and d initially zero.

    The gradient of D is that of W. The changes, not the weights, are parameters of the adapter: W
    stays as it is, so that each member of a bank has changes of its own, a saved adapter holds
    them, and weight decay pulls the weights towards those of the backbone.

    Attributes:
      sites: linear layers.

    References:
      Le et al., Lightweight Adapter Tuning for Multilingual Speech Translation, ACL 2021,
      arXiv:2106.01463, section 4.3, which trains cross-attention beside adapters.
    """

    kind: ClassVar[str] = "trained_sites"
    roles: ClassVar[tuple[Role, ...]] = ("output",)
    moves_kernels: ClassVar[bool] = True

    sites: tuple[str, ...] = ("cross_query", "cross_key", "cross_value", "cross_attention")

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Adds the change, computed from the host's input, to the host's output."""
        # In a composition, `context` may have only some of the rows of the call.
        first = first_array(call.args)
        args = (*call.args[:first], context, *call.args[first + 1 :])
        host, inputs = linear(call.host, args, x, call.path)
        change = call.layer(
            FullDelta,
            x,
            host.width(x),
            bool(getattr(call.host, "use_bias", False)),
            inputs=(host.rows(inputs),),
            plain=0.0,
        )
        return x + host.columns(change, x)

    def merged(
        self, host: Mapping[str, Array], own: Mapping[str, Array], linear: Linear, path: str
    ) -> dict[str, Array]:
        """Returns the host's kernel and bias with the changes added, in their dtypes."""
        del path
        changes = {"kernel": linear.as_kernel(own["kernel"], host["kernel"])}
        if "bias" in own:
            changes["bias"] = own["bias"].reshape(host["bias"].shape)
        return {
            name: (at_least_float32(host[name]) + change).astype(host[name].dtype)
            for name, change in changes.items()
        }


# The linear layers of a sub-layer that a name stands for.
_SUB_LAYERS = {"cross_attention": TrainedSitesConfig().sites}


def with_trained_sites(method: MethodConfig, sites: Sequence[str]) -> MethodConfig:
    """Returns a method with weights of the backbone that are trained whole beside its adapters.

    Args:
      method: a method that leaves the backbone's weights as they are, no composition.
      sites: names of linear layers in the backbone's table of sites; `cross_attention` stands for
        all four of cross-attention.

    Raises:
      ValueError: if the method trains or moves the whole backbone or is a composition, or a site is
        named twice.
    """
    moves_all = method.trains_backbone or method.moves_backbone
    if moves_all or hasattr(method, "members"):
        why = "moves all weights" if moves_all else "is a composition"
        raise ValueError(
            f"trained_sites={list(sites)} are trained beside adapters or alone, but method "
            f"{method.kind!r} {why}; choose one with adapters, or head-only"
        )
    named = [name for site in sites for name in _SUB_LAYERS.get(site, (site,))]
    parts = (*method.inserted(), TrainedSitesConfig(sites=tuple(named)))
    return CombinedConfig(
        parts=parts,
        train_layer_norms=method.train_layer_norms,
        train_head=method.train_head,
        train_pooler=method.train_pooler,
    )
