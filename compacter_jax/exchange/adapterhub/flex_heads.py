"""The heads of AdapterHub's own model classes, and what equals them in transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class FlexHead(NamedTuple):
    """A head of AdapterHub's own model classes that has a counterpart in this library.

    Attributes:
      settings: required fields of its configuration.
      head: head of this library.
      layers: number of one of its layers -> name of a module in transformers' model.
    """

    settings: Mapping[str, Any]
    head: str
    layers: Mapping[str, str]


def _classifier(activation: str, first: str, last: str) -> FlexHead:
    """Returns a classifier of sequences with a hidden layer."""
    settings = {"layers": 2, "activation_function": activation, "use_pooler": False, "bias": True}
    return FlexHead(settings, "sequence_classification", {"1": first, "4": last})


def _masked_lm(dense: str, norm: str, decoder: str) -> FlexHead:
    settings = {"layers": 2, "layer_norm": True, "bias": True}
    return FlexHead(settings, "masked_lm", {"0": dense, "2": norm, "3": decoder})


def _heads(
    classifiers: tuple[FlexHead, ...], masked_lm: FlexHead
) -> Mapping[str, tuple[FlexHead, ...]]:
    """Returns type of a head -> heads, with those that all encoders have alike."""
    return {
        "classification": classifiers,
        "multilabel_classification": classifiers,
        "tagging": (FlexHead({"layers": 1}, "token_classification", {"1": "classifier"}),),
        "question_answering": (FlexHead({"layers": 1}, "question_answering", {"1": "qa_outputs"}),),
        "masked_lm": (masked_lm,),
    }


WITH_POOLER = _classifier("tanh", "bert.pooler.dense", "classifier")
_OF_POOLER = FlexHead(
    {"layers": 1, "use_pooler": True, "bias": True}, "sequence_classification", {"1": "classifier"}
)
_BERT = _heads(
    (WITH_POOLER, _OF_POOLER),
    _masked_lm(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
    ),
)
_ROBERTA = _heads(
    (_classifier("tanh", "classifier.dense", "classifier.out_proj"),),
    _masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
)
_ELECTRA = _heads(
    (_classifier("gelu", "classifier.dense", "classifier.out_proj"),),
    _masked_lm(
        "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"
    ),
)
_DISTILBERT = _heads(
    (_classifier("relu", "pre_classifier", "classifier"),),
    _masked_lm("vocab_transform", "vocab_layer_norm", "vocab_projector"),
)
_SEQ2SEQ = {
    "seq2seq_lm": (
        FlexHead({"layers": 1, "bias": False}, "conditional_generation", {"0": "lm_head"}),
    ),
}
_OF_TYPES: Mapping[str, Mapping[str, tuple[FlexHead, ...]]] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
}


def flex_heads(model_type: Any) -> Mapping[str, tuple[FlexHead, ...]]:
    """Returns `head_type` -> the heads with a counterpart, for AdapterHub's name of a family.

    Args:
      model_type: value in head_config.json; None, as in old releases, for BERT and T5.
    """
    if model_type is None:
        return {**_BERT, **_SEQ2SEQ}
    return _OF_TYPES.get(str(model_type), _SEQ2SEQ)
