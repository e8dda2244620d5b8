"""Hugging Face checkpoints <-> parameters of the linen backbones, read without PyTorch."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from compacter_jax.files import check_fields, expanded, is_there, read_json
from compacter_jax.messages import about, listing, quote, reason_of, shorten
from compacter_jax.models.families import (
    FAMILIES,
    check_depths,
    check_settings,
    family_of,
    pooling_attributes,
    unsupported,
)
from compacter_jax.models.family import DropoutRate, Family, Params
from compacter_jax.models.fitting import CONFIG_FILE, fit_tensors, leave_out
from compacter_jax.models.names import NAMES
from compacter_jax.models.pooling import SENTENCE_FILES, Pooling, read_pooling
from compacter_jax.models.sentences import SentenceEmbedding, read_folder
from compacter_jax.nn.remat import Remat
from compacter_jax.weights import read_tensors

Dtype = Any


SINGLE_FILE = "model.safetensors"


INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Backbone:
    """A pretrained model: `module.apply({"params": params}, input_ids, attention_mask)`.

    Attributes:
      module: the linen module.
      params: nested plain dict of arrays, with the structure and shapes of `module.init`.
      config: configuration of transformers, as it was loaded.
      name: folder or hub id that it was loaded from.
      new_parameters: `/`-joined paths of the parameters that the checkpoint lacks and that were
        initialised.
    """

    module: nn.Module
    params: Params
    config: Any
    name: str
    new_parameters: tuple[str, ...] = ()


def load_backbone(
    path_or_hub_id: str | Path,
    *,
    head: str | None = "auto",
    num_labels: int | None = None,
    dropout_rate: DropoutRate | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    remat: Remat = "off",
    pooling: Pooling | None = None,
    seed: int = 0,
) -> Backbone:
    """Loads a Hugging Face checkpoint: config.json and safetensors, whole or in shards.

    A head or pooler that the checkpoint lacks is initialised from `seed`, logged as a warning and
    listed in `new_parameters`. A head or pooler that the module lacks is left out and logged.

    Args:
      path_or_hub_id: a folder, or the id of a repository on the Hugging Face hub.
      head: "auto" for the head that config.json names in `architectures`; otherwise a head of the
        module, for BERT one of `compacter_jax.models.encoder.HEADS` (None for hidden states).
      num_labels: width of a classification head; None takes that of config.json (2 if it has none).
      dropout_rate: value for all dropout rates of config.json; "inside" to turn off dropout of the
        outputs of sub-layers and of embeddings, and to keep it within attention and feed-forward
        networks; None keeps all.
      dtype: dtype of the computation; None promotes inputs and parameters as flax does.
      param_dtype: dtype of all parameters. Trained ones need float32; `cast_frozen` stores the
        others in fewer bits.
      remat: activations that the backward pass computes again, to save memory: "off" for none;
        "full" for each layer from its input alone; "dots" for all but the products with weights.
      pooling: input of a classifier of sequences: "first" for the first token through the pooler,
        as in transformers; "mean" for the mean of the unmasked tokens; "cls" for the first token.
        The last two have no pooler. None takes that of sentence-transformers' 1_Pooling/config.json
        if the checkpoint has this file, and "first" otherwise.
      seed: seed of the parameters that the checkpoint lacks.

    Returns:
      Module, parameters and configuration.

    Raises:
      ValueError: if the folder, its configuration or its weights are not those of a supported
        model, or do not fit the requested head.
      OSError: if the hub does not answer or has no such repository.
    """
    folder = folder_of(path_or_hub_id)
    config = _read_config(folder)
    family = family_of(config)
    with about(folder / CONFIG_FILE):
        head = _known_head(head, config, family)
    if pooling is None and head in family.pooled_heads:
        pooling = read_pooling(folder)
    with about(folder / CONFIG_FILE):
        module = module_from_config(
            config,
            head=head,
            num_labels=num_labels,
            dropout_rate=dropout_rate,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            pooling=pooling,
        )
    tensors = read_checkpoint(folder)
    with about(folder):
        found = flatten_dict(family.from_hugging_face(tensors), sep="/")
    check_depths(str(folder / CONFIG_FILE), module.config, family, found)
    with about(folder):
        family.check_layers(module.config, found)
    if _other_task(config, family, module):
        found = leave_out(found, family.shared_head_names, folder)
    params, new = fit_tensors(found, module, family, folder=folder, seed=seed)
    return Backbone(module, params, config, str(path_or_hub_id), new)


def read_config(path_or_hub_id: str | Path) -> Any:
    """Returns the transformers configuration of a checkpoint, or of a config.json alone.

    Args:
      path_or_hub_id: a folder, a file, or the id of a repository on the Hugging Face hub (whose
        weights are fetched, too, as in `load_backbone`).

    Raises:
      ValueError: if it is not the configuration of a supported model.
      OSError: if the hub does not answer or has no such repository.
    """
    return _read_config(_file_or_folder(path_or_hub_id))


def pooling_of(path_or_hub_id: str | Path) -> Pooling | None:
    """Returns the pooling that a checkpoint was trained with, None if it does not say.

    Args:
      path_or_hub_id: as for `read_config`.

    Raises:
      ValueError, OSError: as `compacter_jax.models.pooling.read_pooling` and `read_config`.
    """
    place = _file_or_folder(path_or_hub_id)
    return read_pooling(place if place.is_dir() else place.parent)


def read_sentence_embedding(
    path_or_hub_id: str | Path, pooling: Pooling | None = None
) -> SentenceEmbedding:
    """Reads from a checkpoint of sentence-transformers how hidden states become embeddings.

    A checkpoint without `modules.json` has the pooling of its `1_Pooling/config.json`, or else the
    mean of the tokens, as sentence-transformers does.

    Args:
      path_or_hub_id: a folder, or the id of a repository on the Hugging Face hub.
      pooling: pooling to take in place of that of the checkpoint.

    Raises:
      ValueError: if a file is broken, or if the checkpoint has a module, a pooling or a prompt that
        is not supported; the message names the file and the module.
      OSError: if the hub does not answer or has no such repository.
    """
    return read_folder(folder_of(path_or_hub_id), pooling)


def known_pooling(name_or_path: str | Path) -> Pooling | None:
    """Returns `pooling_of` a folder or file; None for any other name, such as a published size."""
    return pooling_of(name_or_path) if is_there(expanded(name_or_path)) else None


def _file_or_folder(path_or_hub_id: str | Path) -> Path:
    path = expanded(path_or_hub_id)
    is_file = is_there(path) and path.is_file()
    return path if is_file else folder_of(path_or_hub_id)


def module_from_config(
    config: Any,
    *,
    head: str | None = "auto",
    num_labels: int | None = None,
    dropout_rate: DropoutRate | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    remat: Remat = "off",
    pooling: Pooling | None = None,
) -> nn.Module:
    """Returns the module that a transformers configuration describes, without weights.

    Args:
      config: configuration of transformers, for instance a `transformers.BertConfig`.
      head: "auto" for the head that `config.architectures` names; otherwise a head of the module.
      num_labels: width of a classification head; None takes that of the configuration.
      dropout_rate: value for all dropout rates of the configuration, or "inside", as in
        `load_backbone`; None keeps all.
      dtype: dtype of the computation; None promotes inputs and parameters as flax does.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again, to save memory: "off" for none;
        "full" for each layer from its input alone; "dots" for all but the products with weights.
      pooling: input of a classifier of sequences, see `load_backbone`; None is "first".

    Returns:
      A linen module, for `init` or `jax.eval_shape`.

    Raises:
      ValueError: if the configuration is not of a supported model; if "auto" finds no known
        architecture in it; if models of its family have no such head; or if `num_labels` or
        `pooling` is given for a head that has none.
    """
    family = family_of(config)
    _check_attributes("the configuration", config, family)
    head = _known_head(head, config, family)
    attributes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    attributes |= pooling_attributes(family, head, pooling, repr(config.model_type))
    module = family.module(config, head, num_labels, **attributes)
    return module if dropout_rate is None else family.with_dropout(module, dropout_rate)


def module_from_name(
    name_or_path: str | Path, *, head: str | None = "auto", num_labels: int | None = None
) -> nn.Module:
    """Returns the module of a published size, or of a configuration on disk, without weights.

    Args:
      name_or_path: a key of `PUBLISHED` such as "t5-base", which needs no download; or the path of
        a config.json or of its folder.
      head: "auto" for the head that a config.json names and, for a published size, conditional
        generation for T5 and no head for BERT; otherwise a head of the module.
      num_labels: width of a classification head.

    Returns:
      A linen module, for `init` or `jax.eval_shape`.

    Raises:
      ValueError: if there is neither such a name nor such a file, or as `module_from_config`.
    """
    path = expanded(name_or_path)
    if is_there(path):
        return module_from_config(_read_config(path), head=head, num_labels=num_labels)
    name = str(name_or_path)
    for family in FAMILIES.values():
        if name in family.published:
            return family.of_size(family.published[name], head, num_labels)
    near = difflib.get_close_matches(name[:80], PUBLISHED, 3) or list(PUBLISHED)[:3]
    raise ValueError(
        f"{quote(name, 80)} is neither a config.json here nor a published size known by name; of "
        f"{', '.join(NAMES)} {len(PUBLISHED)} sizes are known, such as {', '.join(near)}"
    )


PUBLISHED: Mapping[str, Any] = {
    name: config for family in FAMILIES.values() for name, config in family.published.items()
}


"""Hub id -> configuration, for the sizes that are known without a download."""


def _known_head(head: str | None, config: Any, family: Family) -> str | None:
    """The head asked for, "auto" resolved; ValueError for one of another family."""
    if head == "auto":
        head = _head_of_architecture(config, family)
    _check_head(head, config.model_type)
    return head


def _head_of_architecture(config: Any, family: Family) -> str | None:
    names = config.architectures or ["none"]
    if names[0] not in family.architectures:
        raise ValueError(
            f"config.json names the architecture {shorten(names[0], 100)}; known: "
            f"{', '.join(family.architectures)}. To load the weights all the same, pass head=…"
        )
    return family.architectures[names[0]]


def _check_head(head: str | None, model_type: str) -> None:
    """Raises ValueError for a head of another family; the module refuses an unknown head."""
    heads = FAMILIES[model_type].heads
    if head not in heads and any(head in family.heads for family in FAMILIES.values()):
        raise ValueError(
            f"head={quote(head)} is for another kind of backbone; one of model_type={model_type!r} "
            "has "
            f"{', '.join(str(known) for known in heads)}. An adapter fits the kind of backbone it "
            "was trained on"
        )


def _other_task(config: Any, family: Family, module: Any) -> bool:
    """Returns True if the configuration names an architecture with another head than the module."""
    if not config.architectures:
        return False
    return family.architectures.get(config.architectures[0], "unknown") not in (None, module.head)


def _read_config(place: Path) -> Any:
    """Returns the configuration in a folder, or in the file itself."""
    from transformers import AutoConfig  # noqa: PLC0415 (importing compacter_jax stays light)

    file = place / CONFIG_FILE if place.is_dir() else place
    try:
        settings = read_json(file, what="the configuration of a model")
    except FileNotFoundError:
        raise ValueError(
            f"{place} has no {CONFIG_FILE}; it must be a folder written by save_pretrained"
        ) from None
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{file} says {unsupported(model_type)}")
    family = FAMILIES[model_type]
    check_settings(str(file), settings, family)
    try:
        config = AutoConfig.from_pretrained(file, trust_remote_code=False)
    except Exception as error:  # the classes of errors change between versions of transformers
        reason = shorten(" ".join(str(error).split()), 200)
        raise ValueError(f"{file} is not a configuration of {model_type!r}: {reason}") from error
    # Other names of a field, such as hidden_size for a T5, have set the field by now.
    _check_attributes(str(file), config, family)
    return config


_OF_EVERY_FAMILY = ("num_labels", "architectures", "decoder_layer", "decoder_value_dim")


def _check_attributes(where: str, config: Any, family: Family) -> None:
    """Raises ValueError if an attribute that the module reads is not valid for the module."""
    fields = [*typing.get_type_hints(family.config_class), *_OF_EVERY_FAMILY]
    own = {name: getattr(config, name) for name in fields if hasattr(config, name)}
    check_settings(where, own, family)


_HUB_ID = re.compile(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?")


def folder_of(path_or_hub_id: str | Path) -> Path:
    """Returns the folder of a checkpoint, which is downloaded if it is on the Hugging Face hub.

    Raises:
      ValueError: if the argument is neither a folder nor the id of a repository.
      OSError: if the repository could not be had.
    """
    folder = expanded(path_or_hub_id)
    if is_there(folder) and folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"{shorten(name, 200)} is not a folder, and not the id of a repository on the hub"
        )

    from huggingface_hub import snapshot_download  # noqa: PLC0415 (only needed for hub ids)

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["config.json", "model*.safetensors", INDEX_FILE, *SENTENCE_FILES],
            )
        )
    except Exception as error:  # the classes of the hub's errors change between its versions
        raise OSError(
            f"{name!r} is not a folder here, and could not be had from the Hugging Face hub "
            f"({reason_of(error, 100)}). Check the name and the connection, or download "
            "config.json and *.safetensors, for the command line the tokenizer's files "
            "(tokenizer.json or spiece.model, tokenizer_config.json), too, and give their folder"
        ) from error


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint, in one file or in shards, by Hugging Face's names.

    Raises:
      ValueError: if there is no such file, or one is damaged; the message names it.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return read_tensors(single, skip=_is_buffer)
    if index.is_file():
        return _read_shards(folder, index)
    others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".h5", ".msgpack"))
    raise ValueError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}"
        + (f", only {listing(others, most=3)}" if others else "")
        + ". Pickled weights (pytorch_model.bin) are never unpickled here, since that can run any "
        "code: convert them where PyTorch is installed, with transformers' "
        "model.save_pretrained(folder, safe_serialization=True)"
    )


def _is_buffer(name: str) -> bool:
    """Returns True for a tensor of positions, whole numbers that are not a parameter."""
    return name.endswith("position_ids")


def _read_shards(folder: Path, index: Path) -> dict[str, np.ndarray]:
    what = "the index of a sharded checkpoint"
    settings = read_json(index, required=["weight_map"], what=what)
    check_fields(str(index), settings, {"weight_map": dict[str, str]})
    shards: dict[str, list[str]] = {}
    for name, shard in settings["weight_map"].items():
        shards.setdefault(shard, []).append(name)
    tensors: dict[str, np.ndarray] = {}
    for shard, wanted in sorted(shards.items()):
        # No file system has longer names; asked for one, the system would repeat the whole name.
        if Path(shard).name != shard or "\0" in shard or len(shard) > 255:
            raise ValueError(
                f"{index} names the shard {quote(shard, 100)}, which is not in its folder"
            )
        if not (folder / shard).is_file():
            raise ValueError(f"{index} names {shorten(shard, 100)}, which is missing")
        tensors |= read_tensors(folder / shard, wanted, skip=_is_buffer)
    return tensors
