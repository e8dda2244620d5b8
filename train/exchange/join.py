"""Backbones joined of the encoder of one checkpoint and the decoder of another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.files import read_json
from compacter_jax.messages import quote
from compacter_jax.models import loading
from compacter_jax.models.families import family_of
from train.fingerprints import files_of_backbone, fingerprints
from train.folders import new_folder
from train.report import write_json
from train.speech.features import PREPROCESSOR

if TYPE_CHECKING:
    from train.fit.options import FitOptions

RECORD_NAME = "joined.json"
_ENCODER, _DECODER = "speech_to_text", "m2m_100"
# Fields in which the two must agree, since both stacks read them.
_EQUAL = ("d_model", "activation_function", "scale_embedding", "pad_token_id")
# Fields that come from the decoder's checkpoint.
_OF_DECODER = (
    *("decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "vocab_size"),
    *("eos_token_id", "bos_token_id", "decoder_start_token_id", "tie_word_embeddings"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)


def join_backbones(encoder: str, decoder: str, folder: Path) -> None:
    """Writes a speech translator of a recogniser's encoder and a text model's decoder.

    The convolutions and the encoder are those of the first checkpoint, the decoder, its embeddings,
    the logits and the tokenizer those of the second. A folder that this function wrote from the
    same files stays as it is.

    Args:
      encoder: folder or hub id of a checkpoint of model_type speech_to_text.
      decoder: folder or hub id of one of model_type m2m_100.
      folder: the folder to write.

    Raises:
      ValueError: if a checkpoint is of another type, the two do not fit, or the folder holds
        something else; the message names the field or the folder.
      OSError: if a checkpoint cannot be read, or the folder cannot be written.
    """
    configs = loading.read_config(encoder), loading.read_config(decoder)
    _check_types(encoder, decoder, *configs)
    sources = {"encoder": encoder, "decoder": decoder}
    record = {
        **sources,
        "inputs": fingerprints(
            {name: files_of_backbone(loading.folder_of(path)) for name, path in sources.items()}
        ),
    }
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if not (folder / RECORD_NAME).is_file() or read_json(folder / RECORD_NAME) != record:
            raise ValueError(
                f"--backbone {folder} is where the joined backbone goes, but it holds something "
                "else; name a new folder"
            )
        return
    _write(encoder, decoder, folder, record)


def _write(encoder: str, decoder: str, folder: Path, record: dict[str, Any]) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    first, second = (cj.load_backbone(name, head="auto") for name in (encoder, decoder))
    config = first.config
    own = {name: getattr(second.module.config, name, None) for name in _OF_DECODER}
    own["bos_token_id"] = getattr(second.config, "bos_token_id", None)
    for name, value in own.items():
        setattr(config, name, value)
    module = loading.module_from_config(config, head="conditional_generation")
    params = joined_params(first.params, second.params)
    with new_folder(folder) as temporary:
        cj.save_backbone(temporary, module, params, config)
        tokenizer = AutoTokenizer.from_pretrained(decoder, trust_remote_code=False)
        tokenizer.save_pretrained(temporary)
        preprocessor = loading.folder_of(encoder) / PREPROCESSOR
        if preprocessor.exists():
            shutil.copy(preprocessor, temporary)
        write_json(temporary / RECORD_NAME, record)


def joined_params(encoder: Any, decoder: Any) -> Any:
    """Returns the parameters of a speech translator.

    Args:
      encoder: parameters of a `SpeechToText`, of which the convolutions and the encoder are taken.
      decoder: parameters of a `Seq2Seq` of model_type m2m_100, of which the rest is.
    """
    of_encoder, of_decoder = (flatten_dict(tree, sep="/") for tree in (encoder, decoder))
    joined = {
        path: leaf
        for path, leaf in of_encoder.items()
        if path.startswith(("encoder/", "encoder_conv/"))
    }
    joined |= {
        path: leaf for path, leaf in of_decoder.items() if path.startswith(("decoder/", "lm_head/"))
    }
    joined["decoder_embed_tokens/embedding"] = of_decoder["shared/embedding"]
    return unflatten_dict(joined, sep="/")


def _check_types(encoder: str, decoder: str, first: Any, second: Any) -> None:
    """Raises ValueError if two configurations cannot be joined."""
    given = (
        ("--encoder-from", encoder, first, _ENCODER),
        ("--decoder-from", decoder, second, _DECODER),
    )
    for flag, name, config, wanted in given:
        if config.model_type != wanted:
            raise ValueError(
                f"{flag} {name} is of model_type {quote(config.model_type, 60)}; give one of "
                f"{wanted}"
            )
    of_first, of_second = (
        loading.module_from_config(config, head=_head(config)).config for config in (first, second)
    )
    if getattr(of_second, "is_compressed", False):
        raise ValueError(
            f"--decoder-from {decoder} has a compressed decoder, which a {_ENCODER} does not have"
        )
    for name in _EQUAL:
        one, other = getattr(of_first, name), getattr(of_second, name)
        if one != other:
            raise ValueError(
                f"--encoder-from {encoder} and --decoder-from {decoder} do not fit: {name} is "
                f"{one!r} of the first and {other!r} of the second"
            )


def _head(config: Any) -> str | None:
    """Returns the head with which the text of a family is written."""
    family = family_of(config)
    return next(head for head in family.architectures.values() if head is not None)


def prepared(options: FitOptions) -> FitOptions:
    """Returns the options, after their backbone was written if it is joined of two.

    Args:
      options: the options of `fit`.

    Raises:
      ValueError, OSError: as `join_backbones`; or if one of the two checkpoints is not given.
    """
    encoder, decoder = options.encoder_from, options.decoder_from
    if encoder is None and decoder is None:
        return options
    if encoder is None or decoder is None:
        raise ValueError(
            "--encoder-from and --decoder-from name the two checkpoints of which --backbone is "
            "joined; give both"
        )
    join_backbones(encoder, decoder, Path(options.backbone))
    return options
