"""Merging of bottlenecks beside feed-forward networks, which become wider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from compacter_jax.methods.base import InsertedConfig, MethodConfig
from compacter_jax.nn.activations import get_activation
from compacter_jax.paths import ADAPTER
from compacter_jax.patterns import compiled

if TYPE_CHECKING:
    from compacter_jax.inject.adapted import Adapted


def is_widened(method: MethodConfig, backbone: Any) -> bool:
    """Returns True if merging a method makes feed-forward networks of a backbone wider."""
    return _units(method, backbone) > 0


def widened(method: MethodConfig, backbone: Any) -> nn.Module:
    """Returns the backbone, wider where merging a method makes its feed-forward networks wider.

    Raises:
      ValueError: if its feed-forward networks cannot become wider, or have another activation than
        the bottlenecks beside them.
    """
    units = _units(method, backbone)
    if not units:
        return backbone
    if not hasattr(backbone, "widened"):
        raise ValueError(
            f"the feed-forward networks of {type(backbone).__name__} cannot become wider by the "
            "bottlenecks beside them, as those of Seq2Seq can; keep the adapter"
        )
    theirs = backbone.config.activation_function
    for part in _parts(method, backbone):
        own = part.non_linearity  # type: ignore[attr-defined]
        if get_activation(own) is not get_activation(theirs):
            raise ValueError(
                f"the bottlenecks have non_linearity={own!r}, but the feed-forward networks beside "
                f"them {theirs!r}, so they cannot become one; keep the adapter"
            )
    return backbone.widened(units)


def merge_networks(method: MethodConfig, model: Adapted, params: Any) -> Any:
    """Returns parameters with the bottlenecks beside feed-forward networks merged into these.

    Of a network `fc2(act(fc1(x)))` and a bottleneck `up(act(down(x)))` beside it, `down` comes
    beside `fc1` and `up` under `fc2`. Networks without a bottleneck get zeros, for all layers of a
    backbone are equally wide.

    Args:
      method: method of the model.
      model: adapted module.
      params: its parameters.

    Raises:
      ValueError: as `widened`, or if the model has a table of sites of its own.
    """
    backbone: Any = model.backbone
    if widened(method, backbone) is backbone:
        return params
    if model.sites is not None:
        raise ValueError(
            "the model has a table of sites of its own, so the network beside a bottleneck is not "
            "known; keep the adapter, or leave out sites"
        )
    units = _units(method, backbone)
    # Sums of Kronecker products become dense.
    method, params = method.precomputed(params, model.sites_of)
    placed = [
        (compiled(site.host), part)
        for part in _parts(method, backbone)
        for site in model.sites_of(part).values()
    ]
    first, second = backbone.feed_forward_layers

    def merge(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        merged = {
            name: merge(child, (*path, name)) if isinstance(child, Mapping) else child
            for name, child in node.items()
        }
        matches = [(pattern.fullmatch("/".join(path)), part) for pattern, part in placed]
        here = [(int(match["layer"]), part) for match, part in matches if match]
        if here:
            own = merged.pop(ADAPTER, None)
            acting = [part for layer, part in here if layer not in part.leave_out]
            network = acting[0].network(own) if acting else None
            merged |= _merged(merged[first], merged[second], network, units, (first, second))
        return merged

    return merge(params, ())


def _parts(method: MethodConfig, backbone: Any) -> list[InsertedConfig]:
    """Returns the parts of a method that become parts of feed-forward networks."""
    width = getattr(getattr(backbone, "config", None), "hidden_size", None)
    if width is None:
        return []
    return [part for part in method.inserted() if part.units_beside(width)]


def _units(method: MethodConfig, backbone: Any) -> int:
    """Returns the number of units that every network gets, that of the widest bottleneck."""
    parts = _parts(method, backbone)
    return max((part.units_beside(backbone.config.hidden_size) for part in parts), default=0)


def _merged(
    first: Mapping[str, Array],
    second: Mapping[str, Array],
    network: Mapping[str, Any] | None,
    units: int,
    names: tuple[str, str],
) -> dict[str, Any]:
    """Returns both layers of a network with `units` more inner units, in the dtypes they have."""
    width = first["kernel"].shape[0]
    if network is None:
        like = first["kernel"].dtype
        network = {
            "down": {"kernel": jnp.zeros((width, 0), like), "bias": jnp.zeros(0, like)},
            "up": {"kernel": jnp.zeros((0, width), like), "bias": jnp.zeros(width, like)},
        }
    down, up = network["down"], network["up"]
    missing = units - down["bias"].shape[0]

    def joined(own: Array, new: Array, axis: int) -> Array:
        pads = [(0, missing if i == axis % own.ndim else 0) for i in range(own.ndim)]
        return jnp.concatenate([own, jnp.pad(new, pads).astype(own.dtype)], axis)

    wider = {name: joined(first[name], down[name], -1) for name in first}
    bias = second["bias"].astype(jnp.float32) + up["bias"]
    kernel = joined(second["kernel"], up["kernel"], 0)
    last = {"kernel": kernel, "bias": bias.astype(second["bias"].dtype)}
    return {names[0]: wider, names[1]: last}
