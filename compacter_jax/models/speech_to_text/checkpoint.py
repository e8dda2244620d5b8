"""Parameters of `SpeechToText`: conversion between Hugging Face's names and this library's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from compacter_jax.models import names
from compacter_jax.models.family import Family, Params, add_parameter, to_tensors
from compacter_jax.models.seq2seq.checkpoint import check_no_labels, first_of, parameter_of
from compacter_jax.models.seq2seq.config import RATES, WIDTHS
from compacter_jax.models.speech_to_text.config import HEADS, PUBLISHED, SpeechToTextConfig
from compacter_jax.models.speech_to_text.model import SpeechToText

# Sinusoids, which are computed, and the version of old checkpoints.
_COMPUTED = re.compile(r"(encoder|decoder)\.(version|embed_positions\.weights?)")

# Parts of names that differ: Hugging Face's -> those here.
_RENAMED = {"encoder.conv.": "encoder_conv.", "decoder.embed_tokens.": "decoder_embed_tokens."}


def speech_from_hugging_face(tensors: Mapping[str, np.ndarray]) -> Params:
    """Converts the tensors of a Hugging Face checkpoint to the parameters of `SpeechToText`.

    Names may have the prefix `model.`. The function leaves out sinusoidal positions.

    Args:
      tensors: name -> array; weights of dense layers are `[out, in]`, and those of convolutions
        `[out, in, width]`, as in PyTorch.

    Returns:
      Nested dict of arrays with kernels `[in, out]` and `[width, in, out]`, and unchanged dtypes;
      kernels are views.

    Raises:
      ValueError: if a name is neither a weight nor a bias, or two names mean the same parameter.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        if _COMPUTED.fullmatch(short):
            continue
        for theirs, ours in _RENAMED.items():
            if short.startswith(theirs):
                short = ours + short.removeprefix(theirs)
        path, array = parameter_of(short, tensor)
        if path == "decoder_embed_tokens/kernel":
            path, array = "decoder_embed_tokens/embedding", tensor
        add_parameter(flat, origin, path, array, name)
    return unflatten_dict(flat, sep="/")


def speech_to_hugging_face(
    params: Mapping[str, Any], head: str | None = "conditional_generation"
) -> dict[str, np.ndarray]:
    """Converts the parameters of `SpeechToText` to tensors under the names of transformers.

    Args:
      params: nested parameters of `SpeechToText`, without adapters.
      head: head of the module; with one, names start with `model.`.

    Returns:
      Name -> C-contiguous array on the host with unchanged dtype. The copy of the embeddings in
      the head is not repeated, and sinusoidal positions are left out.

    Raises:
      ValueError: if `SpeechToText` does not have one of the parameters.
    """
    prefix = "" if head is None else "model."

    def renamed(name: str) -> str:
        for theirs, ours in _RENAMED.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        return name if name.startswith("lm_head.") else prefix + name

    tensors = to_tensors(params, names.SPEECH_TO_TEXT, "SpeechToText")
    return {renamed(name): array for name, array in tensors.items()}


def _module(
    config: Any, head: str | None, num_labels: int | None, **attributes: Any
) -> SpeechToText:
    """Builds the module that a configuration of transformers describes, see `Family.module`."""
    check_no_labels(num_labels)
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(SpeechToTextConfig)
        if hasattr(config, field.name)
    }
    for name in ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        values[name] = first_of(values.get(name))
    values["conv_kernel_sizes"] = tuple(values["conv_kernel_sizes"])
    return SpeechToText(SpeechToTextConfig(**values), head=head, **attributes)


def _of_size(config: SpeechToTextConfig, head: str | None, num_labels: int | None) -> SpeechToText:
    check_no_labels(num_labels)
    return SpeechToText(config, head="conditional_generation" if head == "auto" else head)


SPEECH_TO_TEXT = Family(
    names=names.SPEECH_TO_TEXT,
    architectures={
        "Speech2TextForConditionalGeneration": "conditional_generation",
        "Speech2TextModel": None,
    },
    heads=HEADS,
    module=_module,
    module_class=SpeechToText,
    published=PUBLISHED,
    of_size=_of_size,
    inputs=("input_features", "attention_mask", "decoder_input_ids"),
    dropout_fields=RATES,
    output_dropout_fields=RATES[:1],
    width_fields=WIDTHS,
    writes_text=True,
    from_hugging_face=speech_from_hugging_face,
    to_hugging_face=speech_to_hugging_face,
    config_class=SpeechToTextConfig,
    depths={"encoder_layers": "encoder/layers", "decoder_layers": "decoder/layers"},
    optional=(),
    droppable=("lm_head",),
    ties={"lm_head/kernel": "decoder_embed_tokens/embedding"},
)
"""The family of `model_type` "speech_to_text"."""
