"""What loading and saving need to know of each family: architectures, Hugging Face names, ties."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.files import check_fields
from compacter_jax.messages import quote
from compacter_jax.models.bert.checkpoint import BERT
from compacter_jax.models.family import Family
from compacter_jax.models.t5.checkpoint import t5_family
from compacter_jax.models.t5.config import PUBLISHED


def hugging_face_names(module: nn.Module, params: Mapping[str, Any]) -> dict[str, str]:
    """The names that transformers has for the parameters of a backbone.

    Args:
      module: the backbone, a `Bert` or a `T5`.
      params: its nested parameters, or their shapes, without adapters.

    Returns:
      `/`-joined path -> name, such as `bert.pooler.dense.weight` of `pooler/dense/kernel`.

    Raises:
      ValueError: if the backbone is of another class, or a parameter is not one of its.
    """
    family = next((one for one in FAMILIES.values() if isinstance(module, one.module_class)), None)
    if family is None:
        raise ValueError(
            f"{type(module).__name__} is a backbone that transformers has no names for; only Bert "
            "and T5 are"
        )
    paths = list(flatten_dict(params, sep="/"))
    numbers = {path: np.asarray(i) for i, path in enumerate(paths)}
    named = family.to_hugging_face(unflatten_dict(numbers, sep="/"))
    return {paths[number.item()]: name for name, number in named.items()}


FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "t5": t5_family("T5", PUBLISHED),
    "mt5": t5_family("MT5", {}),
}
"""`model_type` of config.json -> what is known of it."""


# Fields of config.json that every family has -> type.
_COMMON_FIELDS: Mapping[str, Any] = {
    "architectures": list[str] | None,
    "id2label": dict[str, Any] | None,
    "label2id": dict[str, Any] | None,
    "num_labels": int | None,
    "tie_word_embeddings": bool,
    "transformers_version": str | None,
    "is_decoder": bool,
    "add_cross_attention": bool,
    "position_embedding_type": str | None,
    "scale_decoder_outputs": bool | None,
}


# Larger than any model that was published, and small enough to be described in seconds.
_MOST_LAYERS = 512


_MOST_LABELS = 2**20


_LARGEST_SIZE = 2**28


def check_settings(where: str, settings: Mapping[str, Any], family: Family) -> None:
    """Checks fields of config.json, or attributes of what transformers makes of it.

    Args:
      where: they are from, for messages.
      settings: name -> value.
      family: of the model.

    Raises:
      ValueError: if one is of another type than the module wants, or too large for any model.
    """
    own = typing.get_type_hints(family.config_class)
    # transformers reads a list here, too, and null as the number of layers of the encoder.
    others = {"eos_token_id": int | list[int] | None, "num_decoder_layers": int | None}
    fields = {**own, **{name: others[name] for name in others.keys() & own.keys()}}
    check_fields(where, settings, {**_COMMON_FIELDS, **fields})
    for name in ("id2label", "label2id"):
        if len(settings.get(name) or ()) > _MOST_LABELS:
            raise ValueError(f"{where}: {name} has more than {_MOST_LABELS:,} labels")
    for name in (*fields, "num_labels"):
        most = _LARGEST_SIZE
        if name in family.depths:
            most = _MOST_LAYERS
        elif name == "num_labels":
            most = _MOST_LABELS
        value = settings.get(name)
        if type(value) is int and value > most:
            raise ValueError(
                f"{where}: {name}={quote(value, 40)} is too large; at most {most:,} is supported"
            )


def check_depths(where: str, config: Any, family: Family, paths: Iterable[str]) -> None:
    """Checks that there are weights for as many layers as a configuration says.

    Raises:
      ValueError: if there are fewer, before a module of so many is made.
    """
    paths = list(paths)
    for field, prefix in family.depths.items():
        layer = re.compile(rf"{prefix}/(\d{{1,9}})/")
        found = {int(match[1]) for match in map(layer.match, paths) if match}
        said = getattr(config, field)
        if found and said > max(found) + 1:
            raise ValueError(
                f"{where}: {field}={said}, but the weights are of {max(found) + 1} layers; weights "
                "are missing in the checkpoint, or config.json is of another model"
            )


def family_of(config: Any) -> Family:
    """The family of a configuration of transformers; ValueError if it is not supported."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={quote(config.model_type)} is not supported; supported: "
            f"{', '.join(map(repr, FAMILIES))}"
        )
    return FAMILIES[config.model_type]
