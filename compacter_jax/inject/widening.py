"""Merging of bottlenecks beside feed-forward networks, which become wider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from compacter_jax.methods.base import InsertedConfig, MethodConfig
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.dtypes import at_least_float32
from compacter_jax.paths import ADAPTER
from compacter_jax.patterns import compiled

if TYPE_CHECKING:
    from compacter_jax.inject.adapted import Adapted


def is_widened(method: MethodConfig) -> bool:
    """Returns True if merging a method makes feed-forward networks wider."""
    return bool(_parts(method))


def widened(method: MethodConfig, backbone: Any) -> nn.Module:
    """Returns the backbone, wider where merging a method makes its feed-forward networks wider.

    Raises:
      ValueError: if its feed-forward networks cannot become wider, or have another activation than
        the bottlenecks beside them.
    """
    if not is_widened(method):
        return backbone
    if not hasattr(backbone, "widened"):
        raise ValueError(
            f"the feed-forward networks of {type(backbone).__name__} cannot become wider by the "
            "bottlenecks beside them, as those of Seq2Seq can; keep the adapter"
        )
    theirs = backbone.config.activation_function
    for part in _parts(method):
        own = part.non_linearity  # type: ignore[attr-defined]
        if get_activation(own) is not get_activation(theirs):
            raise ValueError(
                f"the bottlenecks have non_linearity={own!r}, but the feed-forward networks beside "
                f"them {theirs!r}, so they cannot become one; keep the adapter"
            )
    return backbone.widened(_units(method, backbone))


def without_networks(model: Adapted, params: Any) -> tuple[Any, dict[str, Any]]:
    """Takes the bottlenecks beside feed-forward networks out of the parameters.

    Args:
      model: adapted module.
      params: its parameters.

    Returns:
      The other parameters; and, by path of their layers, the bottlenecks as networks `down` and
      `up`, None in layers without one. There are none if merging makes no network wider.

    Raises:
      ValueError: as `widened`, or if the model has a table of sites of its own.
    """
    method, backbone = model.method, model.backbone
    if widened(method, backbone) is backbone:
        return params, {}
    if model.sites is not None:
        raise ValueError(
            "the model has a table of sites of its own, so the network beside a bottleneck is not "
            "known; keep the adapter, or leave out sites"
        )
    # Sums of Kronecker products become dense.
    method, params = method.precomputed(params, model.sites_of)
    placed = [
        (compiled(site.host), part)
        for part in _parts(method)
        for site in model.sites_of(part).values()
    ]
    networks: dict[str, Any] = {}

    def take(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        kept = {
            name: take(child, (*path, name)) if isinstance(child, Mapping) else child
            for name, child in node.items()
        }
        layer = "/".join(path)
        for pattern, part in placed:
            if (match := pattern.fullmatch(layer)) is not None:
                networks.setdefault(layer, None)
                if int(match["layer"]) not in part.leave_out:
                    networks[layer] = part.network(kept.pop(ADAPTER))
        return kept

    return take(params, ()), networks


def with_networks(model: Adapted, params: Any, networks: Mapping[str, Any]) -> Any:
    """Returns the parameters of the wider backbone, which does what the bottlenecks do.

    Of a feed-forward network `fc2(act(fc1(x)))` and a bottleneck `up(act(down(x)))` beside it,
    `down` comes beside `fc1` and `up` under `fc2`. Networks without a bottleneck get zeros, for
    all layers of a backbone are equally wide.

    Args:
      model: adapted module.
      params: parameters of the backbone.
      networks: bottlenecks, as `without_networks` returns them.
    """
    if not networks:
        return params
    backbone: Any = model.backbone
    first, second = backbone.feed_forward_layers
    units = _units(model.method, backbone)

    def merge(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        merged = {
            name: merge(child, (*path, name)) if isinstance(child, Mapping) else child
            for name, child in node.items()
        }
        if (layer := "/".join(path)) in networks:
            both = _merged(merged[first], merged[second], networks[layer], units)
            merged[first], merged[second] = both
        return merged

    return merge(params, ())


def _parts(method: MethodConfig) -> list[InsertedConfig]:
    """Returns the parts of a method that become parts of feed-forward networks."""
    return [part for part in method.inserted() if part.joins_networks]


def _units(method: MethodConfig, backbone: Any) -> int:
    """Returns the number of units that every network gets, that of the widest bottleneck."""
    return max(part.network_units(backbone.config.hidden_size) for part in _parts(method))


def _merged(
    first: Mapping[str, Array],
    second: Mapping[str, Array],
    network: Mapping[str, Any] | None,
    units: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns both layers of a network with `units` more inner units, in the dtypes they have."""
    width = first["kernel"].shape[0]
    if network is None:
        network = {
            "down": {"kernel": jnp.zeros((width, 0)), "bias": jnp.zeros(0)},
            "up": {"kernel": jnp.zeros((0, width)), "bias": jnp.zeros(width)},
        }
    down, up = network["down"], network["up"]
    missing = units - down["bias"].shape[0]

    def joined(own: Array, new: Array, axis: int) -> Array:
        pads = [(0, missing if i == axis else 0) for i in range(own.ndim)]
        return jnp.concatenate([own, jnp.pad(new, pads).astype(own.dtype)], axis)

    bias = (at_least_float32(second["bias"]) + up["bias"]).astype(second["bias"].dtype)
    return (
        {
            "kernel": joined(first["kernel"], down["kernel"], 1),
            "bias": joined(first["bias"], down["bias"], 0),
        },
        {"kernel": joined(second["kernel"], up["kernel"], 0), "bias": bias},
    )
