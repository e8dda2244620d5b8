"""The fields of AdapterHub's configurations, and the values that are supported."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from compacter_jax.exchange.adapterhub.layout import VERSION
from compacter_jax.files import conforms
from compacter_jax.messages import listing, quote

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """One of AdapterHub's kinds of configuration.

    Attributes:
      fields: every field -> its default. Fields that no other attribute names are about initial
        weights, and are ignored.
      same: field with the meaning of a field of this library -> name of that field.
      only: field -> supported values.
      locations: possible places of its adapters; a field with the name of a location turns it on or
        off.
    """

    fields: Mapping[str, Any]
    same: Mapping[str, str]
    only: Mapping[str, tuple[Any, ...]]
    locations: tuple[str, ...]

    def read(self, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Returns all fields of `config`.

        Raises:
          ValueError: if a field is unknown, missing or not supported.
        """
        unknown = sorted(config.keys() - self.fields.keys() - {"architecture"})
        required = {name for name, default in self.fields.items() if default is _REQUIRED}
        missing = sorted(required - config.keys())
        if unknown or missing:
            raise ValueError(
                f"the config in {path} does not have the fields of {VERSION}; unknown fields: "
                f"{listing(unknown, 4) or 'none'}; missing fields: {listing(missing) or 'none'}"
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
        """Returns all fields, with `own` values and the locations `used`."""
        places = {name: name in used for name in self.locations if name in self.fields}
        return {**self.fields, **places, **own}


PHM_FIELDS = (
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


BOTTLENECK = _Architecture(
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
        "inv_adapter": (None, "nice"),
        "residual_before_ln": (True, False, "post_add"),
        "stochastic_depth": (0.0, None),
    },
    locations=("mh_adapter", "cross_adapter", "output_adapter"),
)


LORA = _Architecture(
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


PREFIX_TUNING = _Architecture(
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


NO_SHARED_BLOCKS = (
    "shared_W_phm=True with factorized_phm_W=False is not supported: `adapters` cannot create "
    "shared blocks that are not factorised"
)
