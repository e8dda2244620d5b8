"""Parameters of ModernBERT: conversion between the names of Hugging Face and of this library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from compacter_jax.messages import quote
from compacter_jax.models import names
from compacter_jax.models.encoder import HEADS
from compacter_jax.models.family import Family, Params, add_parameter, to_tensors
from compacter_jax.models.modernbert.config import (
    GLOBAL,
    LOCAL,
    PUBLISHED,
    RATES,
    ModernBertConfig,
)
from compacter_jax.models.modernbert.model import ModernBert

_PARTS = names.MODERNBERT.fused["Wqkv"]
_HEADS = ("head", "classifier", "decoder")


def modernbert_from_hugging_face(tensors: Mapping[str, np.ndarray]) -> Params:
    """Converts the tensors of a Hugging Face checkpoint to the parameters of `ModernBert`.

    Names may have the prefix `model.`. The matrix `Wqkv` becomes the kernels of queries, keys and
    values.

    Args:
      tensors: name -> array; weights of dense layers are `[out, in]`, as in PyTorch.

    Returns:
      Nested dict of arrays with `[in, out]` kernels and unchanged dtypes; kernels are views.

    Raises:
      ValueError: if a name is neither a weight nor a bias, two names mean the same parameter, or
        a matrix of queries, keys and values cannot be divided by three.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        path = _path_of(name)
        *parents, last, leaf = path.split("/")
        if last != "Wqkv":
            add_parameter(flat, origin, path, tensor.T if leaf == "kernel" else tensor, name)
            continue
        if tensor.ndim == 0 or tensor.shape[0] % len(_PARTS):
            raise ValueError(
                f"tensor {quote(name, 100)} has shape {tensor.shape}, whose first axis cannot be "
                "divided into queries, keys and values"
            )
        for part, rows in zip(_PARTS, np.split(tensor, len(_PARTS)), strict=True):
            own = "/".join([*parents, last, part, leaf])
            add_parameter(flat, origin, own, rows.T if leaf == "kernel" else rows, name)
    return unflatten_dict(flat, sep="/")


def modernbert_to_hugging_face(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts the parameters of `ModernBert` to tensors under the names that transformers saves.

    With a head, the encoder's names start with `model.`; without one they do not. A tied decoder is
    not repeated.

    Args:
      params: nested parameters of `ModernBert`, without adapters.

    Returns:
      Name -> C-contiguous array on the host with unchanged dtype. The kernels of queries, keys and
      values become one matrix.

    Raises:
      ValueError: if `ModernBert` does not have one of the parameters.
    """
    prefix = "model." if any(top in params for top in _HEADS) else ""
    tensors: dict[str, np.ndarray] = {}
    fused: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in to_tensors(params, names.MODERNBERT, "ModernBERT").items():
        own = name if name.partition(".")[0] in _HEADS else prefix + name
        module, _, leaf = own.rpartition(".")
        whole, _, part = module.rpartition(".")
        if part in _PARTS:
            fused.setdefault(f"{whole}.{leaf}", {})[part] = tensor
        else:
            tensors[own] = tensor
    return tensors | {
        name: np.concatenate([parts[part] for part in _PARTS]) for name, parts in fused.items()
    }


def _path_of(name: str) -> str:
    *parents, kind = name.removeprefix("model.").split(".")
    if kind not in ("weight", "bias") or not parents:
        raise ValueError(
            f"tensor {quote(name, 100)} is not one of ModernBERT: its name ends in neither weight "
            "nor bias"
        )
    if kind == "weight":
        is_norm = parents[-1] == "norm" or parents[-1].endswith("_norm")
        kind = "embedding" if parents[-1] == "tok_embeddings" else "scale" if is_norm else "kernel"
    return "/".join([*parents, kind])


def _module(config: Any, head: str | None, num_labels: int | None, **attributes: Any) -> ModernBert:
    """Builds the module that a configuration of transformers describes, see `Family.module`.

    Raises:
      ValueError: for a field whose value the module does not support, or `num_labels` for a head
        without labels.
    """
    values = {
        field.name: getattr(config, field.name)
        for field in fields(ModernBertConfig)
        if hasattr(config, field.name)
    } | _rotary_bases(config)
    if values.get("layer_types") is not None:
        values["layer_types"] = tuple(values["layer_types"])
    if head in ("sequence_classification", "token_classification"):
        attributes["num_labels"] = config.num_labels if num_labels is None else num_labels
    elif num_labels is not None and head in HEADS:
        raise ValueError(
            f"num_labels={num_labels} was given, but head={head!r} has no labels; leave it out or "
            "use head='sequence_classification' or 'token_classification'"
        )
    return ModernBert(ModernBertConfig(**values), head=head, **attributes)


def _rotary_bases(config: Any) -> dict[str, float]:
    """Returns the bases that `rope_parameters` of transformers 5 has, none of transformers 4.

    Raises:
      ValueError: for scaled rotary positions.
    """
    scaling = getattr(config, "rope_scaling", None)
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None and scaling is not None:
        raise ValueError(_SCALED.format("rope_scaling", quote(scaling, 100)))
    bases = {}
    for kind, name in ((GLOBAL, "global_rope_theta"), (LOCAL, "local_rope_theta")):
        own = (parameters or {}).get(kind) or {}
        if own.get("rope_type", "default") != "default":
            raise ValueError(_SCALED.format(f"rope_parameters[{kind!r}]", quote(own, 100)))
        if (base := own.get("rope_theta")) is not None:
            bases[name] = base
    return bases


_SCALED = "{}={} in the configuration is not supported; only unscaled rotary positions are"


def _of_size(config: ModernBertConfig, head: str | None, num_labels: int | None) -> ModernBert:
    head = None if head == "auto" else head
    return ModernBert(config, head=head, num_labels=2 if num_labels is None else num_labels)


MODERNBERT = Family(
    names=names.MODERNBERT,
    architectures={
        "ModernBertModel": None,
        "ModernBertForSequenceClassification": "sequence_classification",
        "ModernBertForTokenClassification": "token_classification",
        "ModernBertForMaskedLM": "masked_lm",
        "ModernBertForQuestionAnswering": "question_answering",
    },
    heads=HEADS,
    module=_module,
    module_class=ModernBert,
    from_hugging_face=modernbert_from_hugging_face,
    to_hugging_face=lambda params, head: modernbert_to_hugging_face(params),
    config_class=ModernBertConfig,
    published=PUBLISHED,
    of_size=_of_size,
    inputs=("input_ids", "attention_mask"),
    dropout_fields=RATES,
    depths={"num_hidden_layers": "layers"},
    optional=_HEADS,
    ties={"decoder/kernel": names.MODERNBERT.embeddings},
    shared_head_names=("classifier",),
    pooled_heads=("sequence_classification",),
)
"""The family of `model_type` "modernbert"."""
