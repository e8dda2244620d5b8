"""BitFit: trained biases of the backbone, or new ones if it has none."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array

from compacter_jax.methods.base import InsertedConfig, SiteCall, SitesOf
from compacter_jax.nn.dense import Dtype
from compacter_jax.sites import Role


class AddedBias(nn.Module):
    """A new bias `[width]`, initially zero, for BitFit at hosts that have no bias to train.

    Attributes:
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameter.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., width] -> [..., width]
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        x, bias = promote_dtype(x, bias, dtype=self.dtype)
        return x + bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFitConfig(InsertedConfig):
    """Trained biases of the backbone, or new ones if it has none.

    Attributes:
      sites: linear layers, norms and logits that get a new bias, initially zero.

    References:
      Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
      Language-models, ACL 2022, arXiv:2106.10199; new biases: the released code of
      arXiv:2106.04647.
    """

    kind: ClassVar[str] = "bitfit"
    roles: ClassVar[tuple[Role, ...]] = ("output", "bias")
    skips_missing_sites: ClassVar[bool] = True
    needs_no_site: ClassVar[str | None] = (
        "has biases of its own, and BitFit trains all of them; leave_out applies only to new biases"
    )
    # The method adds nothing to a backbone that has biases.
    optional_groups: ClassVar[frozenset[str]] = frozenset({"head", "adapters"})

    sites: tuple[str, ...] = ("linear", "norm", "logits")

    def trains_biases(self) -> bool:
        """Returns True."""
        return True

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns why new biases cannot be merged, or None if the backbone has its own biases."""
        new = "its biases are new, and the backbone's architecture has no place for them"
        return new if sites_of(self) else None

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Adds a new bias to the host's output."""
        del context
        return call.layer(AddedBias, x, inputs=(x,), plain=x)
