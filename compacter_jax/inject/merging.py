"""Merging of adapters into the backbone's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from compacter_jax.compilation import example_inputs
from compacter_jax.hosts import DENSE, Linear, met_in
from compacter_jax.inject.arguments import is_own
from compacter_jax.inject.widening import with_networks, without_networks
from compacter_jax.methods.base import InsertedConfig, SitesOf
from compacter_jax.nn.quantize import check_float, is_quantized
from compacter_jax.paths import ADAPTER, fused_parts
from compacter_jax.patterns import compiled
from compacter_jax.trees import check_params

if TYPE_CHECKING:
    from compacter_jax.inject.adapted import Adapted


def merge_adapter(model: Adapted, params: Any, *inputs: Any) -> Any:
    """Merges a weight-space method into the backbone's parameters.

    `model.merged_module()` with the result computes the same as `model`, up to rounding, and
    `save_backbone` can write both. This module is `model.backbone`, unless bottlenecks beside
    feed-forward networks become a part of these: then it is wider.

    Args:
      model: adapted module: LoRA, IA3, BitFit on a backbone with its own biases, a bottleneck at
        `parallel_feed_forward` with the activation of that network in a `Seq2Seq`, several of these
        at once, intrinsic dimension, or full fine-tuning.
      params: parameters of the model; or all of them with one more axis, as after replicating for
        pmap, which the result then has too.
      *inputs: example arguments of a call; by default `model.backbone.dummy_inputs()`.

    Returns:
      A nested dict of arrays, the parameters of `model.merged_module()`.

    Raises:
      ValueError: if weights of the backbone cannot express the method, and then the message says
        why; if the backbone is of int8; if `params` are not those of the model; or if the kernel of
        a host may have another layout than those of `nn.Dense`, `nn.DenseGeneral` and `nn.Einsum`.
    """
    if check_params(model, params, "merging an adapter", stacked=True):
        return jax.vmap(lambda one: merge_adapter(model, one, *inputs))(params)
    check_float(params, "merging an adapter")
    method = model.method
    if (reason := method.unmergeable(model.sites_of)) is not None:
        raise ValueError(f"method {method.kind!r} cannot be merged into the backbone: {reason}")
    if method.moves_backbone:
        return method.moved(params, model.groups)
    params, networks = without_networks(model, params)
    moving = [part for part in method.inserted() if part.moves_kernels]
    if moving:
        hosts = _linear_hosts(model, params, inputs)
        params = _merge_parts(moving, model.sites_of, params, hosts)
    return with_networks(model, params, networks)


def _linear_hosts(model: Adapted, params: Any, inputs: Any) -> dict[str, Linear]:
    """Returns path -> `Linear` of the hosts of adapters.

    Raises:
      ValueError: for a class that is not known.
    """
    flat = flatten_dict(params, sep="/")
    paths = {path.partition(f"/{ADAPTER}/")[0] for path in flat if f"/{ADAPTER}/" in path}
    kernels = [f"{path}/{part}" for path in paths for part in fused_parts(path) or ("",)]
    if is_own(model.backbone) and all(f"{one.rstrip('/')}/kernel" in flat for one in kernels):
        return dict.fromkeys(paths, DENSE)  # no need to trace the model
    hosts = {}
    met = met_in(model, inputs or example_inputs(model.backbone))
    for path in sorted(paths):
        name, found = met.get(path, ("module that the example inputs do not reach", None))
        if found is None:
            raise ValueError(
                f"{path} is a {name}, whose kernel layout is not known, so nothing can be merged "
                "into it; keep the adapter, or adapt an nn.Dense, nn.DenseGeneral or nn.Einsum"
            )
        hosts[path] = found
    return hosts


def _merge_parts(
    parts: list[InsertedConfig], sites_of: SitesOf, params: Any, hosts: Mapping[str, Linear]
) -> Any:
    """Returns the backbone's parameters with all parts merged; a host belongs to one part."""
    patterns = [(compiled(site.host), part) for part in parts for site in sites_of(part).values()]

    def part_at(host: str) -> InsertedConfig:
        for pattern, part in patterns:
            match = pattern.fullmatch(host)
            if match and (match["layer"] is None or int(match["layer"]) not in part.leave_out):
                return part
        raise ValueError(
            f"the parameters have an adapter at {host}, but no part of the method acts there"
        )

    def merge(node: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for name, child in node.items():
            if name != ADAPTER and isinstance(child, Mapping):
                merged[name] = merge(child, (*path, name))
            elif name != ADAPTER:
                merged[name] = child
        if ADAPTER in node:
            host = "/".join(path)
            parts = fused_parts(host)
            whole = _fused(merged, parts)
            changed = part_at(host).merged(whole, node[ADAPTER], hosts[host], host)
            merged |= _divided(changed, merged, parts) if parts else changed
        return merged

    return merge(params, ())


def _fused(node: Mapping[str, Any], parts: tuple[str, ...]) -> Mapping[str, Any]:
    """Returns the leaves of linear layers side by side, those of the node itself without parts."""
    if not parts:
        return node
    leaves = node[parts[0]]
    return {leaf: jnp.concatenate([node[part][leaf] for part in parts], -1) for leaf in leaves}


def _divided(
    changed: Mapping[str, Any], node: Mapping[str, Any], parts: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the linear layers `parts` of a node with the leaves that `_fused` put together."""
    divided: dict[str, Any] = {part: dict(node[part]) for part in parts}
    for leaf, whole in changed.items():
        for part, own in zip(parts, jnp.split(whole, len(parts), axis=-1), strict=True):
            divided[part][leaf] = own
    return divided


def has_narrow_kernels(params: Mapping[str, Any]) -> bool:
    """Returns True if kernels of the backbone have fewer bits than float32."""
    kernels = [
        leaf
        for path, leaf in flatten_dict(params).items()
        if path[-1] == "kernel" and ADAPTER not in path
    ]
    return any(is_quantized(kernel) or kernel.dtype.itemsize < 4 for kernel in kernels)
