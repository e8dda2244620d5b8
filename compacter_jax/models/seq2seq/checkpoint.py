"""Parameters of `Seq2Seq`: conversion between the names of Hugging Face and of this library."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from compacter_jax.messages import quote
from compacter_jax.models import names
from compacter_jax.models.family import Family, Params, add_parameter, to_tensors
from compacter_jax.models.seq2seq.config import (
    DERIVED,
    HEADS,
    MODEL_TYPES,
    PUBLISHED,
    RATES,
    WIDTHS,
    Seq2SeqConfig,
)
from compacter_jax.models.seq2seq.model import Seq2Seq

_SHARED, _OF_DECODER, _HEAD = (
    "shared/embedding",
    "decoder_embed_tokens/embedding",
    "lm_head/kernel",
)
_COPIES = ("encoder/embed_tokens/embedding", "decoder/embed_tokens/embedding")
# Tensors of old checkpoints that no model reads.
_VERSIONS = re.compile(r"(encoder|decoder)\.version")
_SINUSOIDS = re.compile(r"(encoder|decoder)\.embed_positions\.weights?")


def seq2seq_from_hugging_face(
    tensors: Mapping[str, np.ndarray], *, model_type: str = "m2m_100"
) -> Params:
    """Converts the tensors of a Hugging Face checkpoint to the parameters of `Seq2Seq`.

    Names may have the prefix `model.`. The function leaves out sinusoidal positions, and the copies
    `…embed_tokens.weight` of `shared.weight`; one of these may replace a missing `shared.weight`.
    A Marian without `shared.weight` has embeddings for the encoder and for the decoder.

    Args:
      tensors: name -> array; weights of dense layers are `[out, in]`, as in PyTorch.
      model_type: type of the model.

    Returns:
      Nested dict of arrays with `[in, out]` kernels and unchanged dtypes; kernels are views.

    Raises:
      ValueError: if a name is neither a weight nor a bias, two names mean the same parameter, or
        two copies of the embedding differ.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        is_computed = model_type in ("m2m_100", "marian") and _SINUSOIDS.fullmatch(short)
        if is_computed or _VERSIONS.fullmatch(short):
            continue
        add_parameter(flat, origin, *parameter_of(short, tensor), name)
    if model_type == "marian" and _SHARED not in flat and _COPIES[0] in flat:
        _separate(flat)
    else:
        _share(flat, origin)
    return unflatten_dict(flat, sep="/")


def seq2seq_to_hugging_face(
    params: Mapping[str, Any], head: str | None = "conditional_generation"
) -> dict[str, np.ndarray]:
    """Converts the parameters of `Seq2Seq` to tensors under the names that transformers saves.

    Args:
      params: nested parameters of `Seq2Seq`, without adapters.
      head: head of the module; with one, names start with `model.`.

    Returns:
      Name -> C-contiguous array on the host with unchanged dtype. Copies of embeddings are not
      repeated but where the head is not tied to them, for transformers makes no copies then;
      sinusoidal positions are left out.

    Raises:
      ValueError: if `Seq2Seq` does not have one of the parameters.
    """
    prefix = "" if head is None else "model."
    renamed = {
        "lm_head.weight": "lm_head.weight",
        "final_logits_bias.bias": "final_logits_bias",
        "decoder_embed_tokens.weight": f"{prefix}decoder.embed_tokens.weight",
    }
    if "decoder_embed_tokens" in params:
        renamed["shared.weight"] = f"{prefix}encoder.embed_tokens.weight"
    tensors = to_tensors(params, names.SEQ2SEQ, "Seq2Seq")
    copies = {}
    if "lm_head" in params and "shared.weight" in tensors:
        copies = {
            f"{prefix}{stack}.embed_tokens.weight": tensors["shared.weight"]
            for stack in ("encoder", "decoder")
        }
    converted = {renamed.get(name, prefix + name): array for name, array in tensors.items()}
    if "final_logits_bias" in converted:
        converted["final_logits_bias"] = converted["final_logits_bias"][None]
    return copies | converted


def parameter_of(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """Returns the path and the orientation in which a module has a tensor of a checkpoint."""
    if name == "final_logits_bias":
        return "final_logits_bias/bias", tensor.reshape(-1)
    *parents, kind = name.split(".")
    if kind not in ("weight", "bias") or not parents:
        raise ValueError(
            f"tensor {quote(name, 100)} is not one of these encoder-decoders: its name ends in "
            "neither weight nor bias"
        )
    if kind == "bias":
        return "/".join([*parents, "bias"]), tensor
    if parents[-1].endswith("layer_norm") or parents[-1] == "layernorm_embedding":
        return "/".join([*parents, "scale"]), tensor
    if parents[-1] in ("shared", "embed_tokens", "embed_positions"):
        return "/".join([*parents, "embedding"]), tensor
    return "/".join([*parents, "kernel"]), tensor.T


def _share(flat: dict[str, np.ndarray], origin: Mapping[str, str]) -> None:
    """Makes one embedding of all copies."""
    for path in _COPIES:
        if path not in flat:
            continue
        copy = flat.pop(path)
        if not np.array_equal(copy, flat.setdefault(_SHARED, copy)):
            raise ValueError(
                f"{origin[path]!r} differs from the shared embedding, but these models have one "
                "embedding for encoder and decoder; remove the wrong one"
            )


def _separate(flat: dict[str, np.ndarray]) -> None:
    """Names the embeddings of the encoder and of the decoder, which a Marian need not share.

    If they are equal after all, `Family.ties` leaves out those of the decoder.
    """
    flat[_SHARED] = flat.pop(_COPIES[0])
    head = flat.get(_HEAD)
    # Saving keeps only one name of tensors that the decoder and the head share.
    of_decoder = flat.pop(_COPIES[1], None if head is None else head.T)
    if of_decoder is None:
        return
    flat[_OF_DECODER] = of_decoder
    if head is not None and np.array_equal(head.T, of_decoder):
        del flat[_HEAD]


def first_of(value: Any) -> Any:
    """Returns the first of several tokens; transformers accepts lists of them."""
    return value[0] if isinstance(value, list) else value


def _module(config: Any, head: str | None, num_labels: int | None, **attributes: Any) -> Seq2Seq:
    """Builds the module that a configuration of transformers describes, see `Family.module`."""
    check_no_labels(num_labels)
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Seq2SeqConfig)
        if field.name not in DERIVED and hasattr(config, field.name)
    }
    for name in ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        values[name] = first_of(values.get(name))
    if values.get("share_encoder_decoder_embeddings", True):
        values["decoder_vocab_size"] = None  # transformers repeats `vocab_size` there
    return Seq2Seq(Seq2SeqConfig(**values), head=head, **attributes)


def _of_size(config: Seq2SeqConfig, head: str | None, num_labels: int | None) -> Seq2Seq:
    check_no_labels(num_labels)
    return Seq2Seq(config, head="conditional_generation" if head == "auto" else head)


def check_no_labels(num_labels: int | None) -> None:
    """Raises ValueError if a number of labels was given."""
    if num_labels is not None:
        raise ValueError(
            f"num_labels={num_labels} was given, but this encoder-decoder has no classifier: it "
            "answers in text"
        )


# Layers that only one kind of decoder has.
_OF_STANDARD = re.compile(r"decoder/layers/\d+/(self_attn|fc[12])/.*")
_OF_COMPRESSED = re.compile(r"decoder/layers/\d+/encoder_attn/(encoder_[kv]|r)_proj/.*")


def _check_layers(config: Seq2SeqConfig, paths: Iterable[str]) -> None:
    """Raises ValueError if a checkpoint has the other kind of decoder."""
    kinds = (("standard", _OF_STANDARD), ("compressed", _OF_COMPRESSED))
    found = [kind for kind, own in kinds if any(map(own.fullmatch, paths))]
    if not found or config.decoder_layer in found:
        return
    said = f"decoder_layer={config.decoder_layer!r}, but the weights are of a {found[0]} decoder"
    if config.is_compressed:
        raise ValueError(
            f"{said}, which cannot be converted: a standard layer adds the results of two "
            "softmaxes, and the one softmax of a compressed layer over source and target weighs "
            "the two, g SelfAttention + (1 - g) CrossAttention with a g of its own for each token; "
            "set decoder_layer to 'standard', or train a compressed decoder from scratch"
        )
    raise ValueError(f"{said}; set decoder_layer to 'compressed' in config.json")


def _family(model_type: str, prefix: str) -> Family:
    with_logits = "MTModel" if model_type == "marian" else "ForConditionalGeneration"
    return Family(
        names=names.SEQ2SEQ,
        architectures={
            f"{prefix}{with_logits}": "conditional_generation",
            f"{prefix}Model": None,
        },
        heads=HEADS,
        module=_module,
        module_class=Seq2Seq,
        published=PUBLISHED[model_type],
        of_size=_of_size,
        inputs=("input_ids", "attention_mask", "decoder_input_ids"),
        dropout_fields=RATES,
        output_dropout_fields=RATES[:1],
        width_fields=WIDTHS,
        writes_text=True,
        from_hugging_face=functools.partial(seq2seq_from_hugging_face, model_type=model_type),
        to_hugging_face=seq2seq_to_hugging_face,
        config_class=Seq2SeqConfig,
        depths={"encoder_layers": "encoder/layers", "decoder_layers": "decoder/layers"},
        optional=(),
        zeros=("final_logits_bias",),
        droppable=("lm_head", "final_logits_bias"),
        ties={_OF_DECODER: _SHARED, _HEAD: _SHARED},
        check_layers=_check_layers,
    )


FAMILIES: Mapping[str, Family] = {
    model_type: _family(model_type, prefix)
    for model_type, prefix in zip(MODEL_TYPES, ("M2M100", "MBart", "Bart", "Marian"), strict=True)
}
"""`model_type` -> its family."""
