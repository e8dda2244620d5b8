"""AdapterHub's configurations of adapters <-> methods."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compacter_jax.adapterhub.layout import (
    VERSION,
    Layer,
    Layout,
    check_prefixed_layers,
    has_relative_positions,
)
from compacter_jax.files import conforms
from compacter_jax.messages import listing, quote
from compacter_jax.methods.base import InsertedConfig, MethodConfig
from compacter_jax.methods.bottleneck import BottleneckConfig
from compacter_jax.methods.combined import CombinedConfig
from compacter_jax.methods.compacter import PHMBottleneckConfig
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig
from compacter_jax.sites import Site

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """One of AdapterHub's kinds of configuration.

    Attributes:
      fields: every field it has -> its default. Those named nowhere else say how weights are
        initialised, and are not read.
      same: fields that mean what a field of ours does -> its name.
      only: field -> the values that have a counterpart here.
      locations: where its adapters can be; those that are fields say whether they are.
    """

    fields: Mapping[str, Any]
    same: Mapping[str, str]
    only: Mapping[str, tuple[Any, ...]]
    locations: tuple[str, ...]

    def read(self, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """All fields of `config`; ValueError for unknown, missing or unsupported ones."""
        unknown = sorted(config.keys() - self.fields.keys() - {"architecture"})
        required = {name for name, default in self.fields.items() if default is _REQUIRED}
        missing = sorted(required - config.keys())
        if unknown or missing:
            raise ValueError(
                f"the config in {path} is not one of {VERSION}; unknown fields: "
                f"{listing(unknown, 4) or 'none'}; missing: {listing(missing) or 'none'}"
            )
        values = {**self.fields, **config}
        for field, allowed in self.only.items():
            if values[field] not in allowed:
                raise ValueError(
                    f"{field}={quote(values[field])} in {path} is not supported; only "
                    f"{' or '.join(map(repr, allowed))} is"
                )
        for field, default in self.fields.items():
            kinds = {type(value) for value in self.only.get(field, (default,))}
            kinds = {bool} if field in self.locations else kinds
            if kinds & {bool, list} and type(values[field]) not in kinds:
                wanted = "true or false" if bool in kinds else "a list"
                raise ValueError(f"{field}={quote(values[field])} in {path} must be {wanted}")
        for field in ("leave_out", "attn_matrices"):
            item = int if field == "leave_out" else str
            if field in values and not conforms(values[field], list[item]):  # type: ignore[valid-type]
                wanted = "whole numbers" if item is int else "letters"
                raise ValueError(f"{field}={quote(values[field])} in {path} must be {wanted}")
        return values

    def write(self, own: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
        """All fields, with `own` values and the locations `used`."""
        places = {name: name in used for name in self.locations if name in self.fields}
        return {**self.fields, **places, **own}


_PHM_FIELDS = (
    "phm_dim",
    "phm_rank",
    "factorized_phm_W",
    "shared_W_phm",
    "shared_phm_rule",
    "factorized_phm_rule",
    "phm_c_init",
    "phm_init_range",
    "learn_phm",
)

_BOTTLENECK = _Architecture(
    fields={
        "mh_adapter": _REQUIRED,
        "output_adapter": _REQUIRED,
        "reduction_factor": _REQUIRED,
        "non_linearity": _REQUIRED,
        "original_ln_before": False,
        "original_ln_after": True,
        "ln_before": False,
        "ln_after": False,
        "init_weights": "bert",
        "init_weights_seed": None,
        "is_parallel": False,
        "scaling": 1.0,
        "use_gating": False,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "cross_adapter": False,
        "leave_out": [],
        "dropout": 0.0,
        "phm_layer": False,
        "phm_dim": 4,
        "factorized_phm_W": True,
        "shared_W_phm": False,
        "shared_phm_rule": True,
        "factorized_phm_rule": False,
        "phm_c_init": "normal",
        "phm_init_range": 0.0001,
        "learn_phm": True,
        "hypercomplex_nonlinearity": "glorot-uniform",
        "phm_rank": 1,
        "phm_bias": True,
        "stochastic_depth": 0.0,
    },
    same={
        "dropout": "dropout",
        "ln_before": "layer_norm_before",
        "ln_after": "layer_norm_after",
        "is_parallel": "parallel",
        "original_ln_before": "original_ln_before",
        "original_ln_after": "original_ln_after",
        "residual_before_ln": "residual_before_ln",
    },
    only={
        "use_gating": (False,),
        "inv_adapter": (None,),
        "residual_before_ln": (True, False, "post_add"),
        "stochastic_depth": (0.0, None),
    },
    locations=("mh_adapter", "cross_adapter", "output_adapter"),
)

_LORA = _Architecture(
    fields={
        "architecture": "lora",
        "selfattn_lora": True,
        "intermediate_lora": False,
        "output_lora": False,
        "leave_out": [],
        "r": 8,
        "alpha": 8,
        "dropout": 0.0,
        "attn_matrices": ["q", "v"],
        "composition_mode": "add",
        "init_weights": "lora",
        "init_weights_seed": None,
        "use_gating": False,
        "use_dora": False,
        "vera_d": None,
        "vera_b": None,
        "dtype": None,
    },
    same={"r": "rank", "alpha": "lora_alpha", "dropout": "dropout"},
    only={
        "composition_mode": ("add", "scale"),
        "use_gating": (False,),
        "use_dora": (False,),
        "vera_d": (None,),
        "vera_b": (None,),
        "dtype": (None, "float32"),
    },
    locations=("q", "k", "v", "intermediate_lora", "output_lora"),
)

_PREFIX_SAME = ("flat", "prefix_length", "bottleneck_size", "non_linearity", "dropout")

_PREFIX_TUNING = _Architecture(
    fields={
        "architecture": "prefix_tuning",
        "encoder_prefix": True,
        "cross_prefix": True,
        "leave_out": [],
        "flat": False,
        "prefix_length": 30,
        "bottleneck_size": 512,
        "non_linearity": "tanh",
        "dropout": 0.0,
        "use_gating": False,
        "shared_gating": True,
        "init_weights_seed": None,
    },
    same={name: name for name in _PREFIX_SAME},
    only={"use_gating": (False,)},
    locations=("encoder_prefix", "self_prefix", "cross_prefix"),
)

_NO_SHARED_BLOCKS = (
    "shared_W_phm=True with factorized_phm_W=False is not supported: `adapters` fails to make "
    "blocks that are shared and not factorised"
)


# --- its configurations, read -------------------------------------------------------------------


class Part(NamedTuple):
    """One configuration of AdapterHub's, read.

    Attributes:
      method: what it is here.
      shunned: patterns of paths where `method` must not act, though its sites are there.
      factor: what its weights are still to be multiplied by: a number or, for each adapter, the
        tensor `scaling` of `[1]` ("learned") or `[width]` ("channel").
      has_bias: whether there are tensors for the biases of PHM projections.
    """

    method: InsertedConfig
    shunned: tuple[str, ...] = ()
    factor: float | str = 1.0
    has_bias: bool = True


class Source(NamedTuple):
    """What is read, and for which backbone.

    Attributes:
      path: of the configuration, for messages.
      module: of the backbone.
      layout: of its family.
    """

    path: Path
    module: Any
    layout: Layout


def read_parts(config: Any, source: Source) -> list[Part]:
    """Reads the `config` of adapter_config.json: one, or a union of several.

    Raises:
      ValueError: for what is no configuration, or has no counterpart here.
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
    return parts


def _read_bottleneck(config: Mapping[str, Any], source: Source) -> Part:
    values = _BOTTLENECK.read(config, source.path)
    parallel, phm = values["is_parallel"], values["phm_layer"]
    if values["adapter_residual_before_ln"] and values["ln_after"] and not parallel:
        raise ValueError(
            f"adapter_residual_before_ln=True with ln_after=True in {source.path} is not "
            "supported: no adapter here normalises its skip connection"
        )
    if values["residual_before_ln"] == "post_add" and not parallel:
        _check_sum(values, source)
    scaling = _number(values, "scaling", source.path, besides=("learned", "channel"))
    # Here the factor comes after an own norm, there before it.
    kept = 1.0 if isinstance(scaling, str) or values["ln_after"] else scaling
    factor = scaling if kept == 1.0 else 1.0
    cls, fields = (PHMBottleneckConfig, _PHM_FIELDS) if phm else (BottleneckConfig, ())
    if phm and values["shared_W_phm"]:
        _check_shared_blocks(values, factor)
    if phm and scaling == "channel":
        raise ValueError(
            f"scaling='channel' with phm_layer=True in {source.path} is not supported: the product "
            "is no sum of Kronecker products"
        )
    same = {ours: values[theirs] for theirs, ours in _BOTTLENECK.same.items()}
    if parallel:  # it reads the residual and skips from the output, whatever these say
        same |= {"original_ln_before": False, "residual_before_ln": True}
    locations = [name for name in _BOTTLENECK.locations if values[name]]
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


def _check_sum(values: Mapping[str, Any], source: Source) -> None:
    """ValueError where `adapters` finds no sum that a skip connection could start from."""
    where = "on a T5" if _normalises_before(source.layout) else "with original_ln_before=False"
    if _normalises_before(source.layout) or not values["original_ln_before"]:
        raise ValueError(
            f"residual_before_ln='post_add' {where} in {source.path} is not supported: {VERSION} "
            "fails there itself, for it has the sum only where a norm follows it"
        )


def _normalises_before(layout: Layout) -> bool:
    """Whether norms are in front of sub-layers, and nothing follows the sum with the residual."""
    return has_relative_positions(layout)


def _check_shared_blocks(values: Mapping[str, Any], factor: Any) -> None:
    if not values["factorized_phm_W"]:
        raise ValueError(_NO_SHARED_BLOCKS)
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
    """The whole number that leaves as wide a bottleneck as AdapterHub's number does."""
    value, width = _number(values, "reduction_factor", source.path), _width(source)
    if isinstance(value, float | int) and value > 0:
        bottleneck = max(1, int(width // value))
        for factor in (int(value), width // bottleneck):
            if factor >= 1 and max(1, width // factor) == bottleneck:
                return min(factor, width)
    raise ValueError(
        f"reduction_factor={quote(value, 100)} in {source.path} is not supported: no whole number "
        "leaves the "
        f"same bottleneck beside a width of {width}"
    )


def _width(source: Source) -> int:
    return source.module.config.hidden_size


def _activation(values: Mapping[str, Any], path: Path) -> str:
    name = values["non_linearity"]
    if not isinstance(name, str):
        raise ValueError(f"non_linearity={quote(name)} in {path} must be the name of an activation")
    return "leaky_relu" if name.lower() == "leakyrelu" else name.lower()


def _read_lora(config: Mapping[str, Any], source: Source) -> Part:
    values = _LORA.read(config, source.path)
    matrices = values["attn_matrices"] if values["selfattn_lora"] else []
    # Other matrices it passes over in BERT and T5.
    locations = [name for name in _LORA.locations if name in matrices or values.get(name)]
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
    same = {ours: values[theirs] for theirs, ours in _LORA.same.items()}
    return Part(LoRAConfig(**placement, **same), shunned)


def _read_prefix_tuning(config: Mapping[str, Any], source: Source) -> Part:
    values = _PREFIX_TUNING.read(config, source.path)
    # Decoders, and encoders without one, have prefixes always.
    locations = [name for name in _PREFIX_TUNING.locations if values.get(name, True)]
    layers = source.layout.layers(source.module)
    check_prefixed_layers(source.layout, layers, locations, values["leave_out"])
    placement, shunned = _placement(locations, values["leave_out"], source)
    same = {ours: values[theirs] for theirs, ours in _PREFIX_TUNING.same.items()}
    same["non_linearity"] = _activation(values, source.path)
    shift = has_relative_positions(source.layout)
    return Part(PrefixTuningConfig(shift_positions=shift, **placement, **same), shunned)


_READERS: dict[str | None, Callable[[Mapping[str, Any], Source], Part]] = {
    None: _read_bottleneck,
    "lora": _read_lora,
    "prefix_tuning": _read_prefix_tuning,
}


def _placement(
    locations: Iterable[str], leave_out: Collection[int], source: Source
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields `sites` and `leave_out`, and patterns of paths to shun.

    A layer of ours has one number in encoder and decoder; where AdapterHub leaves out different
    ones of the two, their paths are shunned instead.
    """
    module, layout = source.module, source.layout
    layers = layout.layers(module)
    kept = [layer for number, layer in enumerate(layers) if number not in leave_out]
    sites = [layout.sites[name] for name in locations if any(name in layer for layer in kept)]
    if not sites:
        raise ValueError(f"the config in {source.path} puts adapters nowhere in this backbone")
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
    """The method that all parts are."""
    if len(parts) == 1:
        return parts[0].method.replace(train_pooler=train_pooler)
    return CombinedConfig(parts=tuple(part.method for part in parts), train_pooler=train_pooler)


def sites_of(parts: Sequence[Part], source: Source) -> dict[str, str | Site] | None:
    """The backbone's table of sites with patterns narrowed; None if it does as it is.

    Raises:
      ValueError: if two parts want one site narrowed in different ways.
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
                f"two configs in {source.path} act at {sorted(narrowed & set(names))} and leave "
                "out layers of the encoder or the decoder alone; that is not supported together"
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


# --- methods, written ---------------------------------------------------------------------------


def write_config(
    hosts: Sequence[tuple[InsertedConfig, set[str]]], layout: Layout, layers: list[Layer]
) -> dict[str, Any]:
    """The `config` of adapter_config.json.

    Args:
      hosts: each part of a method with the paths where its adapters are, as AdapterHub has them.
      layout: of the backbone's family.
      layers: of the backbone.

    Raises:
      ValueError: for what AdapterHub has no counterpart of.
    """
    configs = [_written(part, there, layout, layers) for part, there in hosts]
    _check_union(configs)
    return configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}


def _written(part: Any, hosts: set[str], layout: Layout, layers: list[Layer]) -> dict[str, Any]:
    if isinstance(part, PrefixTuningConfig):
        architecture, always = _PREFIX_TUNING, {"self_prefix"}
        own = {theirs: getattr(part, ours) for theirs, ours in architecture.same.items()}
    elif isinstance(part, BottleneckConfig):
        architecture, always, own = _BOTTLENECK, set(), _bottleneck_fields(part, layout)
    else:
        architecture, always, own = _LORA, set(), _lora_fields(part)
    used, leave_out = _located(part, hosts, always, architecture.locations, layers)
    if isinstance(part, PrefixTuningConfig):
        _check_prefixes(part, used, leave_out, layout, layers)
    if architecture is _LORA:
        own["attn_matrices"] = [matrix for matrix in "qkv" if matrix in used]
        own["selfattn_lora"] = bool(own["attn_matrices"])
    return architecture.write({**own, "leave_out": leave_out}, used)


def _bottleneck_fields(part: BottleneckConfig, layout: Layout) -> dict[str, Any]:
    own = {theirs: getattr(part, ours) for theirs, ours in _BOTTLENECK.same.items()}
    if own["residual_before_ln"] == "post_add" and _normalises_before(layout):
        own["residual_before_ln"] = False  # the same there
    own |= {
        "reduction_factor": part.reduction_factor,
        "non_linearity": part.non_linearity,
        # Behind an own norm, it is in the norm's parameters.
        "scaling": 1.0 if part.layer_norm_after else part.scaling,
    }
    if isinstance(part, PHMBottleneckConfig):
        if part.shared_W_phm and not part.factorized_phm_W:
            raise ValueError(_NO_SHARED_BLOCKS)
        own |= {"phm_layer": True, **{field: getattr(part, field) for field in _PHM_FIELDS}}
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
    """The locations that are exactly `hosts`, and the layers left out; ValueError if none are."""
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
            f"AdapterHub cannot put method {part.kind!r} where this model has it"
            + (f"; it has no place at {listing(extra)}" if extra else "")
            + (f"; it would also act at {listing(lacking)}" if lacking else "")
            + "; place bottlenecks at sites residual_… or at a sub-layer's output, LoRA at query, "
            "key, value, feed_forward and, in T5 of two, the projection wi_1, prefixes in decoders "
            "as a whole"
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
    if has_relative_positions(layout) and not part.shift_positions:
        raise ValueError(
            f"AdapterHub cannot express shift_positions=False on T5: {VERSION} counts prefixes in "
            "the relative positions of keys, and not of queries; train with shift_positions=True"
        )


def _check_union(configs: list[dict[str, Any]]) -> None:
    """ValueError for a union that `adapters` refuses to load."""
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
