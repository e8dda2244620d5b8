"""The methods that equal AdapterHub's configurations of adapters."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compacter_jax.exchange.adapterhub.layout import (
    VERSION,
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
from compacter_jax.messages import about, quote
from compacter_jax.methods.base import InsertedConfig, MethodConfig
from compacter_jax.methods.bottleneck import BottleneckConfig
from compacter_jax.methods.combined import CombinedConfig
from compacter_jax.methods.compacter import PHMBottleneckConfig
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.invertible import InvertibleConfig
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig
from compacter_jax.sites import Site


class Part(NamedTuple):
    """One configuration of AdapterHub's, as read.

    Attributes:
      method: equal method of this library.
      shunned: patterns of paths where `method` must not act, though they are at its sites.
      factor: factor that its weights are still to be multiplied by: a number or, for each adapter,
        the tensor `scaling` of `[1]` ("learned") or `[width]` ("channel").
      has_bias: True if there are tensors for the biases of PHM projections.
    """

    method: InsertedConfig
    shunned: tuple[str, ...] = ()
    factor: float | str = 1.0
    has_bias: bool = True


class Source(NamedTuple):
    """The configuration that is read, and the backbone it is for.

    Attributes:
      path: path of the configuration, for messages.
      module: module of the backbone.
      layout: layout of the backbone's family.
    """

    path: Path
    module: Any
    layout: Layout


def read_parts(config: Any, source: Source) -> list[Part]:
    """Reads the `config` of adapter_config.json: one configuration, or a union of several.

    Raises:
      ValueError: if a configuration is not valid, or has no counterpart in this library.
    """
    configs = [config]
    if isinstance(config, dict) and config.get("architecture") == "union":
        configs = config.get("configs")  # type: ignore[assignment]
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        raise ValueError(f"the config in {source.path} must be an object, or a union of objects")
    parts = []
    for one in configs:
        architecture = one.get("architecture")
        if not isinstance(architecture, str | None) or architecture not in _READERS:
            known = ["null", *(f"{name!r}" for name in _READERS if name), "'union'"]
            raise ValueError(
                f"architecture={quote(architecture)} in {source.path} is not supported; supported: "
                f"{', '.join(known)}"
            )
        parts.append(_READERS[architecture](one, source))
        if one.get("inv_adapter") is not None:
            parts.append(_read_invertible(one, source))
    return parts


def _read_bottleneck(config: Mapping[str, Any], source: Source) -> Part:
    values = BOTTLENECK.read(config, source.path)
    parallel, phm = values["is_parallel"], values["phm_layer"]
    if values["adapter_residual_before_ln"] and values["ln_after"] and not parallel:
        raise ValueError(
            f"adapter_residual_before_ln=True with ln_after=True in {source.path} is not "
            "supported: no adapter here normalises its skip connection"
        )
    if values["residual_before_ln"] == "post_add" and not parallel:
        _check_sum(values, source)
    scaling = _number(values, "scaling", source.path, besides=("learned", "channel"))
    # In this library, the factor follows an adapter's own norm; in AdapterHub, it precedes the
    # norm.
    kept = 1.0 if isinstance(scaling, str) or values["ln_after"] else scaling
    factor = scaling if kept == 1.0 else 1.0
    cls, fields = (PHMBottleneckConfig, PHM_FIELDS) if phm else (BottleneckConfig, ())
    if phm and values["shared_W_phm"]:
        _check_shared_blocks(values, factor)
    if phm and scaling == "channel":
        raise ValueError(
            f"scaling='channel' with phm_layer=True in {source.path} is not supported: the "
            "product is not a sum of Kronecker products"
        )
    same = {ours: values[theirs] for theirs, ours in BOTTLENECK.same.items()}
    if parallel:  # it always reads the residual and skips from the output
        same |= {"original_ln_before": False, "residual_before_ln": True}
    locations = [name for name in BOTTLENECK.locations if values[name]]
    placement, shunned = _placement(locations, values["leave_out"], source)
    method = cls(
        reduction_factor=_reduction_factor(values, source),
        non_linearity=_activation(values, source.path),
        scaling=kept,
        **placement,
        **same,
        **{field: values[field] for field in fields},
    )
    return Part(method, shunned, factor, values["phm_bias"])


def _read_invertible(config: Mapping[str, Any], source: Source) -> Part:
    with about(source.path):
        source.layout.check_invertible()
    values = BOTTLENECK.read(config, source.path)
    factor = values["inv_adapter_reduction_factor"]
    if type(factor) is not int:
        raise ValueError(
            f"inv_adapter_reduction_factor={quote(factor, 100)} in {source.path} must be a whole "
            "number"
        )
    method = InvertibleConfig(
        reduction_factor=factor, non_linearity=_activation(values, source.path)
    )
    return Part(method)


def _check_sum(values: Mapping[str, Any], source: Source) -> None:
    """Raises ValueError if `adapters` has no sum where the skip connection could start."""
    layout = source.layout
    on_a = f"on a {layout.module_class.__name__}"
    where = on_a if layout.normalises_before else "with original_ln_before=False"
    if layout.normalises_before or not values["original_ln_before"]:
        raise ValueError(
            f"residual_before_ln='post_add' {where} in {source.path} is not supported: {VERSION} "
            "itself fails there, because it computes the sum only if a norm follows"
        )


def _check_shared_blocks(values: Mapping[str, Any], factor: Any) -> None:
    if not values["factorized_phm_W"]:
        raise ValueError(NO_SHARED_BLOCKS)
    if values["shared_phm_rule"] and factor != 1.0:
        raise ValueError(
            f"scaling={factor!r} with shared_W_phm=True and shared_phm_rule=True is not supported: "
            "it cannot be folded into weights that all adapters share"
        )


def _number(
    values: Mapping[str, Any], field: str, path: Path, besides: tuple[str, ...] = ()
) -> float | str:
    value = values[field]
    # JSON has whole numbers that no float can hold.
    if value in besides or (type(value) in (int, float) and abs(value) <= sys.float_info.max):
        return value
    others = "".join(f" or {other!r}" for other in besides)
    raise ValueError(
        f"{field}={quote(value, 100)} in {path} is not supported; it must be a number{others}"
    )


def _reduction_factor(values: Mapping[str, Any], source: Source) -> int:
    """Returns the whole number that gives the same bottleneck width as AdapterHub's number."""
    value, width = _number(values, "reduction_factor", source.path), _width(source)
    if isinstance(value, float | int) and value > 0:
        bottleneck = max(1, int(width // value))
        for factor in (int(value), width // bottleneck):
            if factor >= 1 and max(1, width // factor) == bottleneck:
                return min(factor, width)
    raise ValueError(
        f"reduction_factor={quote(value, 100)} in {source.path} is not supported: no whole number "
        f"gives the same bottleneck at a width of {width}"
    )


def _width(source: Source) -> int:
    return source.module.config.hidden_size


def _activation(values: Mapping[str, Any], path: Path) -> str:
    name = values["non_linearity"]
    if not isinstance(name, str):
        raise ValueError(f"non_linearity={quote(name)} in {path} must be the name of an activation")
    return "leaky_relu" if name.lower() == "leakyrelu" else name.lower()


def _read_lora(config: Mapping[str, Any], source: Source) -> Part:
    values = LORA.read(config, source.path)
    matrices = values["attn_matrices"] if values["selfattn_lora"] else []
    # AdapterHub ignores other matrices in BERT and T5.
    locations = [name for name in LORA.locations if name in matrices or values.get(name)]
    placement, shunned = _placement(locations, values["leave_out"], source)
    if "intermediate_lora" in locations and getattr(source.module.config, "is_gated", False):
        shunned = (*shunned, ".*/wi_0$")
    if values["composition_mode"] == "scale":
        if values["r"] != 1 or values["dropout"]:
            raise ValueError(
                f"r={quote(values['r'], 40)} and dropout={quote(values['dropout'], 40)} in "
                f"{source.path} must be 1 and 0 "
                "with composition_mode='scale'"
            )
        alpha = _number(values, "alpha", source.path)
        return Part(IA3Config(input_sites=(), **placement), shunned, alpha)
    same = {ours: values[theirs] for theirs, ours in LORA.same.items()}
    return Part(LoRAConfig(**placement, **same), shunned)


def _read_prefix_tuning(config: Mapping[str, Any], source: Source) -> Part:
    values = PREFIX_TUNING.read(config, source.path)
    # The locations without a field, decoders and encoders without a decoder, always have prefixes.
    locations = [name for name in PREFIX_TUNING.locations if values.get(name, True)]
    layers = source.layout.layers(source.module)
    check_prefixed_layers(source.layout, layers, locations, values["leave_out"])
    placement, shunned = _placement(locations, values["leave_out"], source)
    same = {ours: values[theirs] for theirs, ours in PREFIX_TUNING.same.items()}
    same["non_linearity"] = _activation(values, source.path)
    shift = source.layout.has_relative_positions
    return Part(PrefixTuningConfig(shift_positions=shift, **placement, **same), shunned)


_READERS: dict[str | None, Callable[[Mapping[str, Any], Source], Part]] = {
    None: _read_bottleneck,
    "lora": _read_lora,
    "prefix_tuning": _read_prefix_tuning,
}


def _placement(
    locations: Iterable[str], leave_out: Collection[int], source: Source
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the fields `sites` and `leave_out`, and patterns of paths to shun.

    In this library, a layer of the encoder and one of the decoder share a number. If AdapterHub
    leaves out different numbers in the two, their paths are shunned instead.
    """
    module, layout = source.module, source.layout
    layers = layout.layers(module)
    kept = [layer for number, layer in enumerate(layers) if number not in leave_out]
    sites = [layout.sites[name] for name in locations if any(name in layer for layer in kept)]
    if not sites:
        raise ValueError(f"the config in {source.path} places no adapter in this backbone")
    left: dict[str, list[int]] = {}
    first = 0
    for stack, depth in layout.depths(module).items():
        left[stack] = [i for i in range(depth) if first + i in leave_out]
        first += depth
    of_first, *of_others = left.values()
    if all(numbers == of_first for numbers in of_others):
        return {"sites": tuple(sites), "leave_out": tuple(of_first)}, ()
    shunned = tuple(f"{stack}/{i}/" for stack, numbers in left.items() for i in numbers)
    return {"sites": tuple(sites)}, shunned


def method_of(parts: Sequence[Part], *, train_pooler: bool) -> MethodConfig:
    """Returns the method that consists of all parts."""
    if len(parts) == 1:
        return parts[0].method.replace(train_pooler=train_pooler)
    return CombinedConfig(parts=tuple(part.method for part in parts), train_pooler=train_pooler)


def sites_of(parts: Sequence[Part], source: Source) -> dict[str, str | Site] | None:
    """Returns the backbone's table of sites with narrowed patterns, or None if none is narrowed.

    Raises:
      ValueError: if two parts narrow one site in different ways.
    """
    if not any(part.shunned for part in parts):
        return None
    absent = getattr(source.module, "absent_sites", ())
    table = {name: site for name, site in source.module.sites.items() if name not in absent}
    narrowed: set[str] = set()
    for part in parts:
        names = part.method.all_sites()
        if part.shunned and not narrowed.isdisjoint(names):
            raise ValueError(
                f"two configs in {source.path} both act at {sorted(narrowed & set(names))}, and "
                "one of them leaves out layers of only the encoder or only the decoder; this "
                "combination is not supported"
            )
        for name in names:
            table[name] = _narrowed(table[name], part.shunned)
        narrowed |= set(names)
    return table


def _narrowed(site: str | Site, shunned: tuple[str, ...]) -> str | Site:
    if not shunned:
        return site
    ahead = f"(?!{'|'.join(shunned)})"
    if isinstance(site, str):
        return ahead + site
    return dataclasses.replace(site, host=ahead + site.host)
