"""Prefix tuning: learned keys and values before those of each attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from compacter_jax.methods.base import InsertedConfig, MethodConfig, SiteCall, SitesOf
from compacter_jax.methods.fields import require
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.dense import Dtype, ParamFunction, linear_init
from compacter_jax.nn.dropout import Dropout
from compacter_jax.paths import ADAPTER
from compacter_jax.patterns import compiled
from compacter_jax.sites import Role, Site


class PrefixKeyValue(nn.Module):
    """Learned keys and values of one attention.

    Attributes:
      config: number and parameterisation of the prefixes.
      width: width of the keys, over all heads.
      value_width: the same of the values, where it differs; None for `width`.
      dtype: dtype of the result.
      param_dtype: dtype of the parameters.

    References:
      arXiv:2101.00190, section 4.3.
    """

    config: PrefixTuningConfig
    width: int
    value_width: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, batch: int, hidden: Array | None, deterministic: bool = True
    ) -> tuple[Array, Array]:
        """Returns keys and values, `[batch, prefix_length, width or value_width]` each.

        Args:
          batch: number of rows, which differ only by dropout.
          hidden: result of `prefix_hidden`, `[prefix_length, bottleneck_size]`; None for flat
            prefixes.
          deterministic: True for no dropout.
        """
        length, width = self.config.prefix_length, self.width
        value_width = self.value_width or width
        if hidden is None:
            init = nn.initializers.normal(1.0)
            pairs = (("key", width), ("value", value_width))
            own = [self.param(name, init, (length, w), self.param_dtype) for name, w in pairs]
            both = jnp.concatenate(own, -1)
        elif value_width == width:
            both = self._projected(hidden, "", 2 * width)
        else:
            parts = (
                self._projected(hidden, "key_", width),
                self._projected(hidden, "value_", value_width),
            )
            both = jnp.concatenate(parts, -1)
        both = jnp.broadcast_to(both.astype(self.dtype or both.dtype), (batch, *both.shape))
        both = Dropout(self.config.dropout, name="dropout")(both, deterministic)
        return both[..., :width], both[..., width:]

    def _projected(self, hidden: Array, prefix: str, width: int) -> Array:
        shape = (hidden.shape[-1], width)
        kernel = self.param(f"{prefix}kernel", linear_init, shape, self.param_dtype)
        bias = self.param(f"{prefix}bias", nn.initializers.zeros, shape[1:], self.param_dtype)
        hidden, kernel, bias = promote_dtype(hidden, kernel, bias, dtype=self.dtype)
        return hidden @ kernel + bias


def prefix_hidden(
    param: ParamFunction, config: PrefixTuningConfig, site: str, width: int | None, dtype: Dtype
) -> Array:
    """Returns the hidden states of a site's prefixes, `[prefix_length, bottleneck_size]`.

    Args:
      param: the model's `param` method; names are `prefix_SITE_embedding`, `…_kernel`, `…_bias`.
      config: sizes and activation.
      site: name of the site.
      width: width of the embeddings.
      dtype: dtype of the parameters.

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
    kernel = param(f"{prefix}_kernel", linear_init, (width, bottleneck), dtype)
    bias = param(f"{prefix}_bias", nn.initializers.zeros, (bottleneck,), dtype)
    return get_activation(config.non_linearity)(embedding @ kernel + bias)


def flat_prefixes(
    params: Mapping[str, Any], config: PrefixTuningConfig, hosts: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the parameters of the flat prefixes that equal prefixes through a bottleneck.

    Args:
      params: nested parameters of a model with prefix tuning that is not flat.
      config: the method.
      hosts: site -> regular expression of its hosts' paths.

    Returns:
      The parameters with `key` and `value`, `[prefix_length, width]` of each, in place of each
      host's kernels and biases, and without those that the hosts of a site share.
    """
    flat = flatten_dict(params, sep="/")
    built = {path: leaf for path, leaf in flat.items() if not path.startswith("prefix_")}
    for site, host in hosts.items():
        kernels = compiled(f"({host})/{ADAPTER}/((key|value)_)?kernel")
        hidden = prefix_hidden(lambda name, *_: flat[name], config, site, 0, None)
        for path in flat:
            if not kernels.fullmatch(path):
                continue
            prefix = path.removesuffix("kernel")
            own = hidden @ built.pop(path) + built.pop(f"{prefix}bias")
            if prefix.endswith("_"):  # keys and values have kernels of their own
                built[prefix.removesuffix("_")] = own
            else:
                built[f"{prefix}key"], built[f"{prefix}value"] = jnp.split(own, 2, axis=-1)
    return unflatten_dict(built, sep="/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(InsertedConfig):
    """Learned keys and values before those of each attention.

    Attributes:
      prefix_length: number of prefixes.
      flat: True to learn the prefixes directly; False to compute them as `kernel_layer^T act(W e +
        b) + bias_layer` from learned embeddings `e`, with `W` and `e` shared by the layers of a
        site.
      bottleneck_size: width of `W e`, if not flat.
      non_linearity: activation `act`, if not flat.
      dropout: dropout rate of the keys and values.
      shift_positions: with relative positions (T5), True to count the keys' positions from the
        first prefix, but not those of queries, as AdapterHub does; False to leave the tokens'
        biases unchanged and give the prefixes none.

    References:
      Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL 2021,
      arXiv:2101.00190.
    """

    kind: ClassVar[str] = "prefix_tuning"
    heading: ClassVar[str] = "for prefix-tuning and mam"
    roles: ClassVar[tuple[Role, ...]] = ("attend",)
    skips_missing_sites: ClassVar[bool] = True
    shares_by_site: ClassVar[bool] = True
    adds_tokens: ClassVar[bool] = True

    sites: tuple[str, ...] = ("encoder_key_value", "decoder_key_value", "cross_key_value")
    prefix_length: int = 30
    flat: bool = False
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    shift_positions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prefix_length >= 1, "prefix_length", self.prefix_length, "at least 1")
        require(self.bottleneck_size >= 1, "bottleneck_size", self.bottleneck_size, "at least 1")
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        if self.shift_positions and self.leave_out:
            raise ValueError(
                f"shift_positions=True and leave_out={self.leave_out} cannot be combined: all "
                "layers share one position bias, so they must all have prefixes; set one of them "
                "to its default"
            )

    @property
    def allows_unadapted_rows(self) -> bool:
        """True if some rows can be without prefixes: unless the prefixes shift all positions."""
        return not self.shift_positions

    def companions(self, site: Site) -> tuple[Site, ...]:
        """Returns the sites where positions are counted, if prefixes shift them."""
        if not self.shift_positions:
            return ()
        return (dataclasses.replace(site, method="relative_bias", role="positions"),)

    def shared(
        self, param: ParamFunction, width: int | None, sites: list[str], dtype: Dtype
    ) -> dict[str, Any]:
        """Creates the hidden states of each site's prefixes with `prefix_hidden`."""
        if self.flat:
            return {}
        return {site: prefix_hidden(param, self, site, width, dtype) for site in sites}

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns why weights of the backbone cannot express the method."""
        del sites_of
        return "it adds tokens to attend to, not weights"

    def precomputed(
        self, params: Mapping[str, Any], sites_of: SitesOf
    ) -> tuple[MethodConfig, Mapping[str, Any]]:
        """Returns flat prefixes, which are computed once."""
        if self.flat:
            return self, params
        hosts = {name: site.host for name, site in sites_of(self).items()}
        return self.replace(flat=True), flat_prefixes(params, self, hosts)

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Puts the prefixes before keys and values, and pads the biases."""
        del context
        if call.site.role == "positions":
            return x + self.prefix_length
        key, value, biases = x
        length, heads = call.site.length_axis, 3 - call.site.length_axis
        widths = [array.shape[heads] * array.shape[3] for array in (key, value)]
        prefixes = call.layer(
            PrefixKeyValue,
            key,
            self,
            *widths,
            inputs=(key,),
            plain=None,
            call_layer=_prefixes_like,
            deterministic=call.deterministic,
        )

        def extend(array: Any, prefix: Any) -> Any:
            prefix = prefix.reshape(*prefix.shape[:2], array.shape[heads], array.shape[3])
            prefix = jnp.moveaxis(prefix, 1, length)
            return jnp.concatenate([prefix, array], axis=length)

        key, value = (extend(*pair) for pair in zip((key, value), prefixes, strict=True))

        def lengthen(bias: Any) -> Any:
            # A bias of shifted positions already covers all keys.
            count = 0 if bias is None else key.shape[length] - bias.shape[-1]
            return jnp.pad(bias, ((0, 0),) * (bias.ndim - 1) + ((count, 0),)) if count else bias

        biases = tuple(lengthen(bias) for bias in biases)
        return key, value, (*biases, *call.hiding(self.prefix_length, key, length))


def _prefixes_like(layer: Any, key: Any, hidden: Any = None, **named: Any) -> Any:
    return layer(key.shape[0], hidden, **named)
