"""The configurations of AdapterHub that equal methods of this library."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from compacter_jax.exchange.adapterhub.layout import (
    VERSION,
    Layer,
    Layout,
    check_prefixed_layers,
)
from compacter_jax.exchange.adapterhub.schema import (
    BOTTLENECK,
    LORA,
    NO_SHARED_BLOCKS,
    PHM_FIELDS,
    PREFIX_TUNING,
)
from compacter_jax.messages import listing
from compacter_jax.methods.base import InsertedConfig
from compacter_jax.methods.bottleneck import BottleneckConfig
from compacter_jax.methods.compacter import PHMBottleneckConfig
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.invertible import InvertibleConfig
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig


def write_config(
    hosts: Sequence[tuple[InsertedConfig, set[str]]], layout: Layout, layers: list[Layer]
) -> dict[str, Any]:
    """Returns the `config` of adapter_config.json.

    Args:
      hosts: parts of the method, each with the paths of its adapters in AdapterHub's layout.
      layout: layout of the backbone's family.
      layers: layers of the backbone.

    Raises:
      ValueError: if AdapterHub has no counterpart.
    """
    behind = [part for part, _ in hosts if isinstance(part, InvertibleConfig)]
    others = [(part, there) for part, there in hosts if part not in behind]
    configs = [_written(part, there, layout, layers) for part, there in others]
    _check_union(configs)
    for part in behind:
        _add_invertible(part, configs, layout)
    return configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}


def _written(part: Any, hosts: set[str], layout: Layout, layers: list[Layer]) -> dict[str, Any]:
    if isinstance(part, PrefixTuningConfig):
        architecture, always = PREFIX_TUNING, {"self_prefix"}
        own = {theirs: getattr(part, ours) for theirs, ours in architecture.same.items()}
    elif isinstance(part, BottleneckConfig):
        architecture, always, own = BOTTLENECK, set(), _bottleneck_fields(part, layout)
    else:
        architecture, always, own = LORA, set(), _lora_fields(part)
    used, leave_out = _located(part, hosts, always, architecture.locations, layers)
    if isinstance(part, PrefixTuningConfig):
        _check_prefixes(part, used, leave_out, layout, layers)
    if architecture is LORA:
        own["attn_matrices"] = [matrix for matrix in "qkv" if matrix in used]
        own["selfattn_lora"] = bool(own["attn_matrices"])
    return architecture.write({**own, "leave_out": leave_out}, used)


def _add_invertible(part: InvertibleConfig, configs: list[dict[str, Any]], layout: Layout) -> None:
    """Adds an invertible adapter to the configuration of the bottlenecks beside it."""
    layout.check_invertible()
    if part.leave_out or part.all_sites() != InvertibleConfig().all_sites():
        raise ValueError(
            f"AdapterHub cannot place method {part.kind!r} at {listing(part.all_sites())}; leave "
            "its sites as they are"
        )
    for config in configs:
        if "inv_adapter" in config and config["inv_adapter"] is None:
            if config["non_linearity"] != part.non_linearity:
                raise ValueError(
                    "AdapterHub has one non_linearity for bottlenecks and the invertible adapter, "
                    f"but these have {config['non_linearity']!r} and {part.non_linearity!r}; "
                    "train both with one"
                )
            config["inv_adapter"] = part.coupling
            config["inv_adapter_reduction_factor"] = part.reduction_factor
            return
    raise ValueError(
        f"AdapterHub cannot express method {part.kind!r} without a bottleneck of its own beside it"
    )


def _bottleneck_fields(part: BottleneckConfig, layout: Layout) -> dict[str, Any]:
    own = {theirs: getattr(part, ours) for theirs, ours in BOTTLENECK.same.items()}
    if own["residual_before_ln"] == "post_add" and layout.normalises_before:
        own["residual_before_ln"] = False  # equal in such a backbone
    if part.expansion_factor != 1:
        raise ValueError(
            f"expansion_factor={part.expansion_factor} has no counterpart in AdapterHub, whose "
            "fractions of reduction_factor are rounded in another way; only adapters with "
            "expansion_factor=1 can be exported"
        )
    own |= {
        "reduction_factor": part.reduction_factor,
        "non_linearity": part.non_linearity,
        # After the adapter's own norm, the scaling is in the norm's parameters.
        "scaling": 1.0 if part.layer_norm_after else part.scaling,
    }
    if isinstance(part, PHMBottleneckConfig):
        if part.shared_W_phm and not part.factorized_phm_W:
            raise ValueError(NO_SHARED_BLOCKS)
        own |= {"phm_layer": True, **{field: getattr(part, field) for field in PHM_FIELDS}}
        if part.phm_c_init == "glorot":  # which only says how the rule was drawn
            own["phm_c_init"] = "normal"
    return own


def _lora_fields(part: LoRAConfig | IA3Config) -> dict[str, Any]:
    if isinstance(part, IA3Config):
        return {"composition_mode": "scale", "init_weights": "ia3", "r": 1, "alpha": 1}
    alpha = part.lora_alpha * (math.sqrt(part.rank) if part.use_rslora else 1)
    return {"r": part.rank, "alpha": alpha, "dropout": part.dropout}


def _located(
    part: InsertedConfig,
    hosts: set[str],
    always: set[str],
    locations: Collection[str],
    layers: list[Layer],
) -> tuple[set[str], list[int]]:
    """Returns the locations of exactly `hosts`, and the layers left out.

    Raises:
      ValueError: if no locations have exactly these hosts.
    """
    used = always | {
        location
        for layer in layers
        for location in locations
        if not hosts.isdisjoint(layer.get(location, ()))
    }
    there = [{host for name in used & layer.keys() for host in layer[name]} for layer in layers]
    leave_out = [i for i, own in enumerate(there) if own and hosts.isdisjoint(own)]
    expected = {host for i, own in enumerate(there) if i not in leave_out for host in own}
    if expected != hosts:
        extra, lacking = sorted(hosts - expected), sorted(expected - hosts)
        raise ValueError(
            f"AdapterHub cannot place method {part.kind!r} at the sites of this model"
            + (f"; it has no place at {listing(extra)}" if extra else "")
            + (f"; it would also act at {listing(lacking)}" if lacking else "")
            + "; place bottlenecks at sites residual_… or at the output of a sub-layer, LoRA at "
            "query, key, value, feed_forward and (in a gated T5) wi_1, and prefixes in every "
            "layer of a decoder"
        )
    return used, leave_out


def _check_prefixes(
    part: PrefixTuningConfig,
    used: set[str],
    leave_out: list[int],
    layout: Layout,
    layers: list[Layer],
) -> None:
    check_prefixed_layers(layout, layers, used, leave_out)
    if layout.has_relative_positions and not part.shift_positions:
        raise ValueError(
            f"AdapterHub cannot express shift_positions=False on T5: {VERSION} counts prefixes in "
            "the relative positions of keys, but not in those of queries; train with "
            "shift_positions=True"
        )


def _check_union(configs: list[dict[str, Any]]) -> None:
    """Raises ValueError for a union that `adapters` refuses to load."""
    for i, one in enumerate(configs):
        for other in configs[:i]:
            kinds = {config.get("architecture", "bottleneck") for config in (one, other)}
            if len(kinds) > 1 or one["leave_out"] or other["leave_out"]:
                continue
            fields = [field for field in ("mh_adapter", "output_adapter") if field in one]
            if not fields or any(one[field] == other[field] for field in fields):
                raise ValueError(
                    f"AdapterHub cannot have two parts of the kind {kinds.pop()!r} at once"
                )
