"""Parameters of BERT and its relatives: from and to the names of Hugging Face."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from compacter_jax.messages import quote
from compacter_jax.models import names
from compacter_jax.models.bert.config import PUBLISHED, RATES, VARIANTS, BertConfig
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.encoder import HEADS
from compacter_jax.models.family import Family, Params, add_parameter, to_tensors

_LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


# Name of a copy of the bias of the logits -> its name in this library.
_COPIES = {
    "cls/predictions/decoder/bias": "cls/predictions/bias",
    "lm_head/decoder/bias": "lm_head/bias",
}
# End of the name of transformers' class -> head; the first of a head is written.
ARCHITECTURES: Mapping[str, str | None] = {
    "Model": None,
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForMaskedLM": "masked_lm",
    "ForQuestionAnswering": "question_answering",
}
# The head of a checkpoint of the pre-training; an ELECTRA's detects replaced tokens, which is none
# of these.
_PRE_TRAINING = {"bert": "masked_lm", "electra": None}
# Head for masked words -> parts of a checkpoint that belong to it or to other heads of the
# pre-training, and the kernel that may be tied to the embeddings.
_WORDS = {
    "cls": (("cls/predictions", "cls/seq_relationship"), "cls/predictions/decoder/kernel"),
    "lm_head": (("lm_head",), "lm_head/decoder/kernel"),
    "generator_predictions": (
        ("generator_predictions", "generator_lm_head", "discriminator_predictions"),
        "generator_lm_head/kernel",
    ),
}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Classes of tokenizers, without "Fast", where those of other families do not fit.
_TOKENIZERS = {
    "roberta": ("RobertaTokenizer", "BartTokenizer"),
    "xlm-roberta": ("XLMRobertaTokenizer",),
    "camembert": ("CamembertTokenizer",),
}


def bert_from_hugging_face(tensors: Mapping[str, np.ndarray], *, base: str = "bert") -> Params:
    """Converts the tensors of a Hugging Face checkpoint to the parameters of `Bert`.

    Names may have the prefix `bert.`. Layer norms may be called gamma and beta, as in the oldest
    checkpoints. The function leaves out the buffer `embeddings.position_ids`, and the copy
    `….decoder.bias` of the bias of the masked language model's logits.

    Args:
      tensors: name -> array; weights of dense layers are `[out, in]`, as in PyTorch.
      base: the prefix, without its dot; of the RoBERTa models "roberta".

    Returns:
      Nested dict of arrays with `[in, out]` kernels and unchanged dtypes; kernels are views.

    Raises:
      ValueError: if a name is neither a weight nor a bias, two names mean the same parameter, or
        the two biases of the masked language model differ.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        modern = name.removeprefix(f"{base}.")
        if modern == "embeddings.position_ids":
            continue
        add_parameter(flat, origin, *encoder_parameter(modern, tensor, names.BERT, "BERT"), name)
    for path, original in _COPIES.items():
        if path not in flat:
            continue
        copy = flat.pop(path)
        if not np.array_equal(copy, flat.setdefault(original, copy)):
            raise ValueError(
                f"{origin[path]!r} and {origin[original]!r} differ, but are two "
                "names of one parameter; remove the wrong one"
            )
    return unflatten_dict(flat, sep="/")


def bert_to_hugging_face(params: Mapping[str, Any], *, base: str = "bert") -> dict[str, np.ndarray]:
    """Converts the parameters of `Bert` to tensors under the names that transformers saves.

    With a head, the encoder's names start with `bert.`; without one they do not. The tied decoder
    of a masked language model is not repeated.

    Args:
      params: nested parameters of `Bert`, without adapters.
      base: that prefix, without its dot.

    Returns:
      Name -> C-contiguous array on the host with unchanged dtype, ready for
      `safetensors.numpy.save_file`, which would write the memory of a view in the wrong order.

    Raises:
      ValueError: if `Bert` does not have one of the parameters.
    """
    return with_base(to_tensors(params, names.BERT, "BERT"), names.BERT, base)


def with_base(
    tensors: Mapping[str, np.ndarray], own: names.Names, base: str
) -> dict[str, np.ndarray]:
    """Puts the prefix before the encoder's names, if there is a head beside the encoder."""
    heads = {*own.heads, *own.frozen_heads}
    tops = {name.partition(".")[0] for name in tensors}
    return {
        name if tops.isdisjoint(heads) or name.partition(".")[0] in heads else f"{base}.{name}": of
        for name, of in tensors.items()
    }


def encoder_parameter(
    modern: str, tensor: np.ndarray, own: names.Names, family: str
) -> tuple[str, np.ndarray]:
    """Returns the path of a tensor, and its array as this library orients it.

    Args:
      modern: name of the tensor, without the prefix of models with a head.
      tensor: the tensor.
      own: names of the family's parameters.
      family: name of the family, for messages.

    Raises:
      ValueError: if the name ends in neither weight nor bias.
    """
    name = modern
    for old, new in _LEGACY_NAMES.items():
        if modern.endswith(old):
            modern = modern.removesuffix(old) + new
    *parents, kind = modern.split(".")
    if kind == "bias":
        return "/".join([*parents, "bias"]), tensor
    if kind != "weight" or not parents:
        raise ValueError(
            f"tensor {quote(name, 100)} is not one of {family}: its name ends in neither weight "
            "nor bias"
        )
    if parents[-1] in own.norms:
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
    named = {f.name for f in fields(BertConfig)}
    if config.model_type != "electra":
        named.remove("embedding_size")
    ours = BertConfig(**{name: getattr(config, name) for name in named})
    return Bert(ours, head=head, **attributes, **labels_of(config, head, num_labels))


def labels_of(config: Any, head: str | None, num_labels: int | None) -> dict[str, Any]:
    """Returns the attribute of an encoder that is its number of labels, if its head has labels.

    Raises:
      ValueError: if `num_labels` is given for a head without labels.
    """
    if head in ("sequence_classification", "token_classification"):
        return {"num_labels": config.num_labels if num_labels is None else num_labels}
    if num_labels is not None and head in HEADS:
        raise ValueError(
            f"num_labels={num_labels} was given, but head={head!r} has no labels; leave it out or "
            "use head='sequence_classification' or 'token_classification'"
        )
    return {}


def _max_tokens(config: Any) -> int:
    """Returns the largest number of tokens, for a configuration of transformers or of `Bert`."""
    offset = (config.pad_token_id or 0) + 1
    counts = VARIANTS[config.model_type].counts_from_padding
    return int(config.max_position_embeddings) - (offset if counts else 0)


def _of_size(config: BertConfig, head: str | None, num_labels: int | None) -> Bert:
    head = None if head == "auto" else head
    return Bert(config, head=head, num_labels=2 if num_labels is None else num_labels)


def _family(model_type: str) -> Family:
    variant = VARIANTS[model_type]
    words, kernel = _WORDS[variant.words]
    architectures = {f"{variant.architecture}{suffix}": h for suffix, h in ARCHITECTURES.items()}
    if model_type in _PRE_TRAINING:
        architectures[f"{variant.architecture}ForPreTraining"] = _PRE_TRAINING[model_type]
    return Family(
        names=names.BERT,
        architectures=architectures,
        heads=HEADS,
        module=_bert_module,
        module_class=Bert,
        from_hugging_face=functools.partial(bert_from_hugging_face, base=variant.base),
        to_hugging_face=lambda params, head: bert_to_hugging_face(params, base=variant.base),
        config_class=BertConfig,
        published=PUBLISHED[model_type],
        of_size=_of_size,
        # A RoBERTa has one token type for all tokens.
        inputs=INPUTS[: 2 if variant.counts_from_padding else 3],
        dropout_fields=RATES,
        output_dropout_fields=RATES[:1],
        depths={"num_hidden_layers": "encoder/layer"},
        optional=("pooler", "classifier", "qa_outputs", *words),
        ties={kernel: names.BERT.embeddings},
        shared_head_names=("classifier",),
        pooled_heads=("sequence_classification",),
        max_tokens=_max_tokens,
        tokenizers=_TOKENIZERS.get(model_type, ()),
    )


FAMILIES: Mapping[str, Family] = {model_type: _family(model_type) for model_type in VARIANTS}
"""`model_type` -> its family."""
