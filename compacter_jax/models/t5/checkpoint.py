"""Parameters of T5: conversion between the names of Hugging Face and of this library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from compacter_jax.messages import quote
from compacter_jax.models import names
from compacter_jax.models.family import Family, Params, add_parameter, to_tensors
from compacter_jax.models.t5.config import HEADS, T5Config
from compacter_jax.models.t5.model import T5

_T5_LEFTOVER = "EncDecAttention.relative_attention_bias.weight"


_T5_COPIES = ("encoder/embed_tokens/embedding", "decoder/embed_tokens/embedding")


def t5_from_hugging_face(tensors: Mapping[str, np.ndarray]) -> Params:
    """Converts the tensors of a Hugging Face checkpoint to the parameters of `T5`.

    The function leaves out the relative attention bias of the cross-attention, which old
    checkpoints have and no model reads. It also leaves out the copies `…embed_tokens.weight` of
    `shared.weight`; one of these may replace a missing `shared.weight`.

    Args:
      tensors: name -> array; weights of dense layers are `[out, in]`, as in PyTorch.

    Returns:
      Nested dict of arrays with `[in, out]` kernels and unchanged dtypes; kernels are views.

    Raises:
      ValueError: if a name is not that of a weight, two names mean the same parameter, or two
        copies of the embedding differ.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.endswith(_T5_LEFTOVER):
            continue
        add_parameter(flat, origin, *_t5_parameter(name, tensor), name)
    for path in _T5_COPIES:
        if path not in flat:
            continue
        copy = flat.pop(path)
        if not np.array_equal(copy, flat.setdefault("shared/embedding", copy)):
            raise ValueError(
                f"{origin[path]!r} differs from the shared embedding, but every T5 has one "
                "embedding for encoder and decoder; remove the wrong one"
            )
    return unflatten_dict(flat, sep="/")


def t5_to_hugging_face(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts the parameters of `T5` to tensors under the names that transformers saves.

    Args:
      params: nested parameters of `T5`, without adapters.

    Returns:
      Name -> C-contiguous array on the host with unchanged dtype. `shared.weight` is not repeated.

    Raises:
      ValueError: if `T5` does not have one of the parameters.
    """
    return to_tensors(params, names.T5, "T5")


def _t5_parameter(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    *parents, kind = name.split(".")
    if kind != "weight" or not parents:
        raise ValueError(
            f"tensor {quote(name, 100)} is not one of T5: its name does not end in weight"
        )
    if parents[-1].endswith("layer_norm"):
        return "/".join([*parents, "scale"]), tensor
    if parents[-1] in ("shared", "embed_tokens", "relative_attention_bias"):
        return "/".join([*parents, "embedding"]), tensor
    return "/".join([*parents, "kernel"]), tensor.T


def _t5_module(config: Any, head: str | None, num_labels: int | None, **attributes: Any) -> T5:
    if num_labels is not None:
        raise ValueError(
            f"num_labels={num_labels} was given, but T5 has no classifier: it answers in text"
        )
    values = {f.name: getattr(config, f.name) for f in fields(T5Config) if hasattr(config, f.name)}
    values["tie_word_embeddings"] = _is_tied(config)
    if isinstance(values["eos_token_id"], list):
        values["eos_token_id"] = values["eos_token_id"][0]
    if values.get("decoder_start_token_id") is None:
        values["decoder_start_token_id"] = values["pad_token_id"]
    return T5(T5Config(**values), head=head, **attributes)


def _is_tied(config: Any) -> bool:
    """Returns True if the head is the word embedding and its input is scaled.

    transformers 5 sets `tie_word_embeddings=True` for every T5 and mT5, whatever config.json says.
    It scales a T5 according to `scale_decoder_outputs`, which keeps the value of config.json, and
    never scales an mT5.
    """
    if config.model_type == "mt5":
        written_by = getattr(config, "transformers_version", None) or ""
        if type(config)().tie_word_embeddings or written_by.startswith("5."):
            return False
    return config.tie_word_embeddings and getattr(config, "scale_decoder_outputs", True)


def _of_size(config: T5Config, head: str | None, num_labels: int | None) -> T5:
    if num_labels is not None:
        raise ValueError(f"num_labels={num_labels} was given, but T5 has no classifier")
    return T5(config, head="conditional_generation" if head == "auto" else head)


def t5_family(prefix: str, published: Mapping[str, T5Config]) -> Family:
    """Builds the family of T5 or mT5, whose architectures have names with a prefix."""
    return Family(
        names=names.T5,
        architectures={
            f"{prefix}ForConditionalGeneration": "conditional_generation",
            f"{prefix}WithLMHeadModel": "conditional_generation",
            f"{prefix}Model": None,
            f"{prefix}EncoderModel": "encoder",
        },
        heads=HEADS,
        module=_t5_module,
        module_class=T5,
        published=published,
        of_size=_of_size,
        inputs=("input_ids", "attention_mask", "decoder_input_ids"),
        dropout_fields=("dropout_rate",),
        writes_text=True,
        # Percentages in papers are of the tokens without padding.
        tokens={32_128: 32_100},
        from_hugging_face=t5_from_hugging_face,
        to_hugging_face=lambda params, head: t5_to_hugging_face(params),
        config_class=T5Config,
        depths={"num_layers": "encoder/block", "num_decoder_layers": "decoder/block"},
        optional=(),
        droppable=("decoder", "lm_head"),
        ties={"lm_head/kernel": "shared/embedding"},
        copies_tied_head=True,
    )
