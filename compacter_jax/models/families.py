"""The families of backbones, and the checks of their configurations."""

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
from compacter_jax.models.bert.checkpoint import FAMILIES as BERT
from compacter_jax.models.distilbert.checkpoint import DISTILBERT
from compacter_jax.models.family import Family
from compacter_jax.models.modernbert.checkpoint import MODERNBERT
from compacter_jax.models.pooling import DEFAULT as FIRST
from compacter_jax.models.pooling import Pooling
from compacter_jax.models.seq2seq.checkpoint import FAMILIES as SEQ2SEQ
from compacter_jax.models.speech_to_text.checkpoint import SPEECH_TO_TEXT
from compacter_jax.models.t5.checkpoint import t5_family
from compacter_jax.models.t5.config import PUBLISHED


def family_of_module(module: nn.Module) -> Family:
    """Returns the family of a backbone of this library.

    Raises:
      ValueError: if the backbone is of another class.
    """
    own_type = getattr(getattr(module, "config", None), "model_type", None)
    for model_type, family in FAMILIES.items():
        if isinstance(module, family.module_class) and own_type in (None, model_type):
            return family
    raise ValueError(
        f"{type(module).__name__} is a backbone that transformers has no names for; only "
        f"{' and '.join(dict.fromkeys(one.module_class.__name__ for one in FAMILIES.values()))} are"
    )


def pooling_attributes(
    family: Family, head: str | None, pooling: Pooling | None, model: str
) -> dict[str, Any]:
    """Returns the attribute of a module that chooses the pooling, if modules of the family pool.

    Args:
      family: family of the module.
      head: head of the module.
      pooling: wanted pooling; None leaves the module's own. "first" is how transformers reads, and
        accepted for a classifier of sequences in a family without a choice, too.
      model: name of the model, for the message.

    Raises:
      ValueError: if the head does not pool.
    """
    if pooling is None:
        return {}
    if head in family.pooled_heads:
        return {"pooling": pooling}
    if pooling == FIRST and head == "sequence_classification":
        return {}
    raise ValueError(
        f"pooling={quote(pooling)} was given, but head={head!r} of a {model} does not pool; leave "
        "it out"
    )


def hugging_face_names(module: nn.Module, params: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names that transformers uses for the parameters of a backbone.

    Args:
      module: backbone of this library.
      params: nested parameters of the backbone, or their shapes, without adapters.

    Returns:
      `/`-joined path -> name, for instance `bert.pooler.dense.weight` for `pooler/dense/kernel`.
      Kernels that a checkpoint holds as one matrix have the same name, in the order of its rows.

    Raises:
      ValueError: if the backbone is of another class, or does not have one of the parameters.
    """
    family = family_of_module(module)
    paths = list(flatten_dict(params, sep="/"))
    numbers = {path: np.asarray([i]) for i, path in enumerate(paths)}
    head = getattr(module, "head", None)
    named = family.to_hugging_face(unflatten_dict(numbers, sep="/"), head)
    return {paths[number]: name for name, own in named.items() for number in own.flat}


FAMILIES: Mapping[str, Family] = {
    **BERT,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
    "t5": t5_family("T5", PUBLISHED),
    "mt5": t5_family("MT5", {}),
    **SEQ2SEQ,
    "speech_to_text": SPEECH_TO_TEXT,
}
"""`model_type` of config.json -> its family."""


# Field of config.json that every family has -> its type.
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


# Fields of the compressed decoder, which transformers keeps in any configuration.
_OF_COMPRESSED = ("decoder_layer", "decoder_value_dim")


# Limits above any published model, and low enough that a module of this size is described in
# seconds.
_MOST_LAYERS = 512


_MOST_LABELS = 2**20


_LARGEST_SIZE = 2**28


def check_settings(where: str, settings: Mapping[str, Any], family: Family) -> None:
    """Checks the fields of config.json, or the attributes of transformers' configuration.

    Args:
      where: origin of the settings, for messages.
      settings: name -> value.
      family: family of the model.

    Raises:
      ValueError: if a value has another type than the module needs, or is too large for any model.
    """
    own = typing.get_type_hints(family.config_class)
    # transformers also accepts a list of end tokens, and null for as many layers as the encoder
    # has.
    tokens = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
    others = {
        **dict.fromkeys(tokens, int | list[int] | None),
        "num_decoder_layers": int | None,
        "layer_types": list[str] | None,
        "conv_kernel_sizes": list[int],
    }
    fields = {**own, **{name: others[name] for name in others.keys() & own.keys()}}
    check_fields(where, settings, {**_COMMON_FIELDS, **fields})
    for name in _OF_COMPRESSED:
        if name not in own and settings.get(name) not in (None, "standard"):
            raise ValueError(
                f"{where}: {name}={quote(settings[name])}, but only the encoder-decoders of the "
                f"types {', '.join(SEQ2SEQ)} have compressed layers; leave it out"
            )
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
    """Checks that there are weights for all layers of the configuration.

    Raises:
      ValueError: if some are missing; raised before a module of this depth is made.
    """
    paths = list(paths)
    for field, prefix in family.depths.items():
        layer = re.compile(rf"{prefix}/(\d{{1,9}})/")
        found = {int(match[1]) for match in map(layer.match, paths) if match}
        said = getattr(config, field)
        if found and said > max(found) + 1:
            raise ValueError(
                f"{where}: {field}={said}, but there are weights of {max(found) + 1} layers; "
                "weights are missing in the checkpoint, or config.json is of another model"
            )


# Types that resemble one of `FAMILIES`, so that their weights might seem to fit.
_RELATED: Mapping[str, str] = {
    **dict.fromkeys(("deberta", "deberta-v2", "mpnet", "longformer", "big_bird"), "roberta"),
    **dict.fromkeys(("roberta-prelayernorm", "xmod", "ibert", "data2vec-text"), "roberta"),
    **dict.fromkeys(("xlm-roberta-xl", "xlm"), "xlm-roberta"),
    "flaubert": "camembert",
    **dict.fromkeys(("albert", "mobilebert", "squeezebert", "convbert", "nomic_bert"), "bert"),
    **dict.fromkeys(("nezha", "megatron-bert", "roformer", "ernie"), "bert"),
    **dict.fromkeys(("pegasus", "pegasus_x", "bigbird_pegasus"), "bart"),
    **dict.fromkeys(("blenderbot", "blenderbot-small", "led", "mvp", "plbart"), "bart"),
    **dict.fromkeys(("nllb-moe", "seamless_m4t"), "m2m_100"),
    "fsmt": "marian",
    **dict.fromkeys(("speech_to_text_2", "whisper", "speecht5"), "speech_to_text"),
}


def unsupported(model_type: Any) -> str:
    """Returns what to say of a `model_type` that is in no family."""
    related = _RELATED.get(model_type) if isinstance(model_type, str) else None
    hint = f" (it resembles {related!r}, but its layers compute something else)" if related else ""
    return f"model_type={quote(model_type)}{hint}; supported: {', '.join(map(repr, FAMILIES))}"


def max_tokens_of(config: Any) -> int | None:
    """Returns the largest number of tokens that a model reads; None if there is no limit.

    Args:
      config: configuration of transformers.

    Raises:
      ValueError: if it is not of a supported model.
    """
    return family_of(config).max_tokens(config)


def family_of(config: Any) -> Family:
    """Returns the family of a transformers configuration; raises ValueError for an unknown one."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"not a supported model: {unsupported(config.model_type)}")
    return FAMILIES[config.model_type]
