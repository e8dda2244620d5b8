"""Parameters of DistilBERT: conversion between the names of Hugging Face and of this library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from compacter_jax.models import names
from compacter_jax.models.bert.checkpoint import (
    ARCHITECTURES,
    INPUTS,
    encoder_parameter,
    labels_of,
    with_base,
)
from compacter_jax.models.distilbert.config import PUBLISHED, RATES, DistilBertConfig
from compacter_jax.models.distilbert.model import DistilBert
from compacter_jax.models.encoder import HEADS
from compacter_jax.models.family import Family, Params, add_parameter, to_tensors

_BASE = "distilbert"


def distilbert_from_hugging_face(tensors: Mapping[str, np.ndarray]) -> Params:
    """Converts the tensors of a Hugging Face checkpoint to the parameters of `DistilBert`.

    Names may have the prefix `distilbert.`.

    Args:
      tensors: name -> array; weights of dense layers are `[out, in]`, as in PyTorch.

    Returns:
      Nested dict of arrays with `[in, out]` kernels and unchanged dtypes; kernels are views.

    Raises:
      ValueError: if a name is neither a weight nor a bias, or two names mean the same parameter.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(f"{_BASE}.")
        path, array = encoder_parameter(short, tensor, names.DISTILBERT, "DistilBERT")
        add_parameter(flat, origin, path, array, name)
    return unflatten_dict(flat, sep="/")


def distilbert_to_hugging_face(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts the parameters of `DistilBert` to tensors under the names that transformers saves.

    With a head, the encoder's names start with `distilbert.`; without one they do not. The tied
    kernel of a masked language model is not repeated.

    Args:
      params: nested parameters of `DistilBert`, without adapters.

    Returns:
      Name -> C-contiguous array on the host with unchanged dtype.

    Raises:
      ValueError: if `DistilBert` does not have one of the parameters.
    """
    return with_base(to_tensors(params, names.DISTILBERT, "DistilBERT"), names.DISTILBERT, _BASE)


def _module(config: Any, head: str | None, num_labels: int | None, **attributes: Any) -> DistilBert:
    """Builds the module that a configuration of transformers describes, see `Family.module`."""
    fields = dataclasses.fields(DistilBertConfig)
    ours = DistilBertConfig(**{field.name: getattr(config, field.name) for field in fields})
    return DistilBert(ours, head=head, **attributes, **labels_of(config, head, num_labels))


def _of_size(config: DistilBertConfig, head: str | None, num_labels: int | None) -> DistilBert:
    head = None if head == "auto" else head
    return DistilBert(config, head=head, num_labels=2 if num_labels is None else num_labels)


DISTILBERT = Family(
    names=names.DISTILBERT,
    architectures={f"DistilBert{suffix}": head for suffix, head in ARCHITECTURES.items()},
    heads=HEADS,
    module=_module,
    module_class=DistilBert,
    from_hugging_face=distilbert_from_hugging_face,
    to_hugging_face=lambda params, head: distilbert_to_hugging_face(params),
    config_class=DistilBertConfig,
    published=PUBLISHED,
    of_size=_of_size,
    inputs=INPUTS[:2],
    dropout_fields=RATES,
    output_dropout_fields=RATES[:1],
    depths={"n_layers": "transformer/layer"},
    optional=(*names.DISTILBERT.heads, *names.DISTILBERT.frozen_heads),
    ties={"vocab_projector/kernel": names.DISTILBERT.embeddings},
    shared_head_names=("classifier",),
    pooled_heads=("sequence_classification",),
)
"""The family of `model_type` "distilbert"."""
