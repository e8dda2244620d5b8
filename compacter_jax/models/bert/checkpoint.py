"""Parameters of BERT: conversion between the names of Hugging Face and of this library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from compacter_jax.messages import quote
from compacter_jax.models import names
from compacter_jax.models.bert.config import HEADS, PUBLISHED, BertConfig
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.family import Family, Params, add_parameter, to_tensors

_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


_DECODER_BIAS, _PREDICTIONS_BIAS = "cls/predictions/decoder/bias", "cls/predictions/bias"


def bert_from_hugging_face(tensors: Mapping[str, np.ndarray]) -> Params:
    """Converts the tensors of a Hugging Face checkpoint to the parameters of `Bert`.

    Names may have the prefix `bert.`. Layer norms may be called gamma and beta, as in the oldest
    checkpoints. The function leaves out the buffer `embeddings.position_ids`, and
    `cls.predictions.decoder.bias`, the copy of `cls.predictions.bias`.

    Args:
      tensors: name -> array; weights of dense layers are `[out, in]`, as in PyTorch.

    Returns:
      Nested dict of arrays with `[in, out]` kernels and unchanged dtypes; kernels are views.

    Raises:
      ValueError: if a name is neither a weight nor a bias, two names mean the same parameter, or
        the two biases of the masked language model differ.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.removeprefix("bert.") == "embeddings.position_ids":
            continue
        add_parameter(flat, origin, *_bert_parameter(name, tensor), name)
    if _DECODER_BIAS in flat:
        copy = flat.pop(_DECODER_BIAS)
        if not np.array_equal(copy, flat.setdefault(_PREDICTIONS_BIAS, copy)):
            raise ValueError(
                f"{origin[_DECODER_BIAS]!r} and {origin[_PREDICTIONS_BIAS]!r} differ, but are two "
                "names of one parameter; remove the wrong one"
            )
    return unflatten_dict(flat, sep="/")


def bert_to_hugging_face(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts the parameters of `Bert` to tensors under the names that transformers saves.

    With a head, the encoder's names start with `bert.`; without one they do not. The tied decoder
    of a masked language model is not repeated.

    Args:
      params: nested parameters of `Bert`, without adapters.

    Returns:
      Name -> C-contiguous array on the host with unchanged dtype, ready for
      `safetensors.numpy.save_file`, which would write the memory of a view in the wrong order.

    Raises:
      ValueError: if `Bert` does not have one of the parameters.
    """
    has_head = any(top in params for top in ("classifier", "qa_outputs", "cls"))
    encoder = ("embeddings", "encoder", "pooler")
    return {
        f"bert.{name}" if has_head and name.partition(".")[0] in encoder else name: tensor
        for name, tensor in to_tensors(params, names.BERT, "BERT").items()
    }


def _bert_parameter(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    modern = name.removeprefix("bert.")
    for old, new in _LEGACY_NAMES.items():
        if modern.endswith(old):
            modern = modern.removesuffix(old) + new
    *parents, kind = modern.split(".")
    if kind == "bias":
        return "/".join([*parents, "bias"]), tensor
    if kind != "weight" or not parents:
        raise ValueError(
            f"tensor {quote(name, 100)} is not one of BERT: its name ends in neither weight nor "
            "bias"
        )
    if parents[-1] == "LayerNorm":
        return "/".join([*parents, "scale"]), tensor
    if parents[-1].endswith("_embeddings"):
        return "/".join([*parents, "embedding"]), tensor
    return "/".join([*parents, "kernel"]), tensor.T


def _bert_module(config: Any, head: str | None, num_labels: int | None, **attributes: Any) -> Bert:
    """Builds the module that a configuration of transformers describes, see `Family.module`.

    Raises:
      ValueError: for a field whose value the module does not support, or `num_labels` for a head
        without labels.
    """
    for name, supported in (
        ("position_embedding_type", "absolute"),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        value = getattr(config, name, supported)
        if value != supported:
            raise ValueError(
                f"{name}={quote(value, 100)} in the configuration is not supported; only "
                f"{supported!r} is"
            )
    ours = BertConfig(**{f.name: getattr(config, f.name) for f in fields(BertConfig)})
    if head in ("sequence_classification", "token_classification"):
        attributes["num_labels"] = config.num_labels if num_labels is None else num_labels
    elif num_labels is not None and head in HEADS:
        raise ValueError(
            f"num_labels={num_labels} was given, but head={head!r} has no labels; leave it out or "
            "use head='sequence_classification' or 'token_classification'"
        )
    return Bert(ours, head=head, **attributes)


def _of_size(config: BertConfig, head: str | None, num_labels: int | None) -> Bert:
    head = None if head == "auto" else head
    return Bert(config, head=head, num_labels=2 if num_labels is None else num_labels)


BERT = Family(
    names=names.BERT,
    architectures={
        "BertModel": None,
        "BertForSequenceClassification": "sequence_classification",
        "BertForTokenClassification": "token_classification",
        "BertForMaskedLM": "masked_lm",
        "BertForPreTraining": "masked_lm",
        "BertForQuestionAnswering": "question_answering",
    },
    heads=HEADS,
    module=_bert_module,
    module_class=Bert,
    from_hugging_face=bert_from_hugging_face,
    to_hugging_face=lambda params, head: bert_to_hugging_face(params),
    config_class=BertConfig,
    published=PUBLISHED,
    of_size=_of_size,
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    dropout_fields=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    output_dropout_fields=("hidden_dropout_prob",),
    depths={"num_hidden_layers": "encoder/layer"},
    optional=("pooler", "classifier", "qa_outputs", "cls/predictions", "cls/seq_relationship"),
    ties={"cls/predictions/decoder/kernel": "embeddings/word_embeddings/embedding"},
    shared_head_names=("classifier",),
    pooled_heads=("sequence_classification",),
)
"""The family of `model_type` "bert"."""
