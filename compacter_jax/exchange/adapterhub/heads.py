"""Prediction heads in AdapterHub's folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.adapter_files import check_leaves
from compacter_jax.exchange.adapterhub.flex_heads import WITH_POOLER, flex_heads
from compacter_jax.exchange.adapterhub.layout import layout_of
from compacter_jax.exchange.adapterhub.tensors import Tensors
from compacter_jax.exchange.pooling import reads_as_first
from compacter_jax.exchange.tensors import find_tensors, read_tensors
from compacter_jax.files import check_fields, read_json
from compacter_jax.messages import about, quote
from compacter_jax.models.families import FAMILIES
from compacter_jax.models.family import Family
from compacter_jax.weights import converted

HEAD_CONFIG_NAME = "head_config.json"
# Names of the file of tensors, without suffix: as safetensors, and as a pickle.
HEAD_STEMS = ("model_head", "pytorch_model_head")

_LABELLED = ("sequence_classification", "token_classification")
# Modules with a bias of the logits, which transformers has under a second name.
_WITH_BIAS = ("cls.predictions", "lm_head")


# Field of head_config.json -> its type, and the same for the `config` within.
_FIELDS: Mapping[str, Any] = {
    "config": dict[str, Any] | None,
    "name": str | None,
    "model_class": str | None,
    "model_type": str | None,
    "num_labels": int | None,
}
_CONFIG_FIELDS: Mapping[str, Any] = {
    "head_type": str | None,
    "num_labels": int | None,
    "layers": int | None,
    "activation_function": str | None,
    "use_pooler": bool | None,
    "layer_norm": bool | None,
    "bias": bool | None,
}


class _Head(NamedTuple):
    """The contents of head_config.json.

    Attributes:
      head: head of this library.
      num_labels: number of labels of a classifier; otherwise None.
      layers: prefix of the names of its tensors -> replacement.
      activation: activation of a masked language model's transform, if it is given.
    """

    head: str
    num_labels: int | None
    layers: Mapping[str, str]
    activation: str | None = None


def read_adapterhub_head(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the prediction head in a folder of `adapters`, as arguments of `load_backbone`.

    Args:
      directory: folder written by `save_adapter` of `adapters`.

    Returns:
      `head` and, for a classifier, `num_labels`; empty if the folder has no head.

    Raises:
      ValueError: if the head has no counterpart in this library, or the folder does not say which
        head it is.
    """
    path = _config_path(Path(directory))
    if path is None:
        return {}
    head = _head_of(path)
    labels = {} if head.num_labels is None else {"num_labels": head.num_labels}
    return {"head": head.head, **labels}


def _config_path(directory: Path) -> Path | None:
    """Returns the file that says which head is in the folder, or None if there is no head."""
    path = directory / HEAD_CONFIG_NAME
    if path.is_file():
        return path
    tensors = find_tensors(directory, HEAD_STEMS)
    if tensors is None:
        return None
    raise ValueError(
        f"{tensors} holds the weights of a head, but its configuration {HEAD_CONFIG_NAME} is not "
        f"in the same folder; copy it from where the adapter was saved, or remove {tensors.name} "
        "to import the adapter without the head"
    )


def _head_of(path: Path) -> _Head:
    settings = read_json(path, _FIELDS, what="the configuration of a head")
    config = settings.get("config")
    if config is not None:
        check_fields(str(path), config, _CONFIG_FIELDS)
        return _flex_head(config, settings, path)
    architectures: dict[Any, str | None] = {}
    for family in FAMILIES.values():
        architectures |= family.architectures
    model_class = settings.get("model_class")
    head = architectures.get(model_class)
    if head is None:
        raise ValueError(
            f"the head of a {quote(model_class)} in {path} has no counterpart here; leave it out "
            "with "
            "with_head=False"
        )
    return _Head(head, _num_labels(settings, head, path), {})


def _num_labels(settings: Mapping[str, Any], head: str, path: Path) -> int | None:
    """Returns the number of labels of a classifier; None for other heads, or if it is not given."""
    labels = settings.get("num_labels") if head in _LABELLED else None
    if labels is not None and labels < 1:
        raise ValueError(f"num_labels={labels} in {path} must be a whole number of at least 1")
    return labels


def _flex_head(config: Mapping[str, Any], whole: Mapping[str, Any], path: Path) -> _Head:
    kind, name = config.get("head_type"), whole.get("name")
    candidates = flex_heads(whole.get("model_type")).get(str(kind), ())
    for settings, head, modules in candidates:
        if all(config.get(field, value) == value for field, value in settings.items()):
            layers = {f"heads.{name}.{i}": module for i, module in modules.items()}
            labels = _num_labels(config, head, path)
            activation = config.get("activation_function") if head == "masked_lm" else None
            return _Head(head, labels, layers, activation)
    wanted = " or ".join(str(dict(flex.settings)) for flex in candidates)
    raise ValueError(
        f"the head in {path}, {quote(dict(config), 120)}, has no counterpart here: "
        + (
            f"head_type={kind!r} needs {wanted}"
            if wanted
            else f"head_type={quote(kind)} is unknown"
        )
        + "; leave it out with with_head=False"
    )


def read_head(directory: Path, module: Any, own: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads the head in the folder.

    Args:
      directory: folder of the adapter.
      module: module of the backbone.
      own: parameters of the backbone by `/`-joined path.

    Returns:
      Parameters by path; empty if the folder has no head.

    Raises:
      ValueError: if the backbone has another head, the tensors are not those of the head, or the
        folder does not say which head they belong to.
    """
    path = _config_path(directory)
    if path is None:
        return {}
    head = _head_of(path)
    _check_head(directory, head, module)
    tensors = {}
    for name, array in read_tensors(directory, HEAD_STEMS).items():
        layer, _, kind = name.rpartition(".")
        # A T5 saves its prefixes with its head.
        if not name.startswith("prefix_tuning."):
            tensors[f"{head.layers.get(layer, layer)}.{kind}" if layer else name] = array
    family = _family(module)
    with about(directory):
        found = flatten_dict(family.from_hugging_face(tensors), sep="/")
    _check_ties(directory, found, own, family)
    base = layout_of(module).base
    parts = [layer.removeprefix(f"{base}.").partition(".")[0] for layer in head.layers.values()]
    tops = {*_tops_of(own, family), *parts}
    # A bias of the logits is saved with the head, though it is the backbone's.
    tops |= {path.partition("/")[0] for path in found} & set(family.zeros)
    check_leaves(directory, found, {p: leaf for p, leaf in own.items() if _top(p) in tops})
    return {
        path: jnp.asarray(converted(directory, path, array, own[path].dtype))
        for path, array in found.items()
    }


def _check_head(directory: Path, head: _Head, module: Any) -> None:
    labels = getattr(module, "num_labels", None)
    if head.head != module.head or head.num_labels not in (None, labels):
        wanted = ", ".join(f"{k}={v!r}" for k, v in read_adapterhub_head(directory).items())
        raise ValueError(
            f"the folder {directory} has a head with {wanted}, but the backbone has "
            f"head={module.head!r}"
            + (f", num_labels={labels}" if module.head == head.head else "")
            + f"; load the backbone with {wanted}, or leave out the head of the folder with "
            "with_head=False"
        )
    check_pooling(
        directory, module, "load the backbone with pooling='first', or leave out the head"
    )
    own = getattr(module.config, "words_act", None)
    if head.activation not in (None, own):
        raise ValueError(
            f"the head in {directory} has activation_function={quote(head.activation)}, but the "
            f"head of the backbone has {own!r}; leave the head out with "
            "with_head=False"
        )


def check_pooling(directory: Path, module: Any, fix: str) -> None:
    """Checks that a head is one of AdapterHub's, which all read the first token.

    Args:
      directory: of the adapter, for the message.
      module: the backbone's.
      fix: for the message; `with_head=False` follows it.

    Raises:
      ValueError: if the backbone's classifier reads something else than with the pooling "first".
    """
    if not reads_as_first(module):
        raise ValueError(
            f"{directory}: heads of AdapterHub read the first token, a BERT's through its pooler, "
            f"but the backbone has pooling={module.pooling!r}; {fix} with with_head=False"
        )


def _check_ties(
    directory: Path, found: dict[str, Any], own: Mapping[str, Any], family: Family
) -> None:
    """Removes copies of the backbone's embeddings; raises ValueError if they differ from them."""
    for path, original in family.ties.items():
        if path not in found or path in own:
            continue
        copy, values = found.pop(path).T, np.asarray(own[original])
        if not np.array_equal(converted(directory, path, copy, values.dtype), values):
            raise ValueError(
                f"{path} in {directory} is tied to the backbone's {original}, but differs from "
                "it; load the backbone that the adapter was trained with, or leave out the head "
                "with with_head=False"
            )


def _family(module: Any) -> Family:
    return FAMILIES[layout_of(module).model_types[0]]


def _tops_of(paths: Iterable[str], family: Family) -> set[str]:
    """Returns the top levels of a model's parameters that belong to its head."""
    heads = {*family.names.heads, *family.names.frozen_heads, "lm_head"}
    return heads & set(map(_top, paths))


def _top(path: str) -> str:
    return path.partition("/")[0]


def model_class(module: Any) -> str:
    """Returns the name of transformers' class for a backbone with its head."""
    architectures = _family(module).architectures
    return next(name for name, head in architectures.items() if head == module.head)


def written_head(
    module: Any, flat: Mapping[str, Any], name: str, *, trained_pooler: bool
) -> tuple[dict[str, Any], Tensors] | None:
    """Returns the head's own fields of head_config.json, and the tensors of the head.

    A trained pooler becomes the first of two layers of a head of AdapterHub's own; other heads are
    those of transformers' classes.

    Args:
      module: module of the backbone.
      flat: parameters of the backbone by `/`-joined path.
      name: name of the adapter.
      trained_pooler: True if the pooler differs from the backbone's.

    Returns:
      None if there is no head, or if it is tied to the embeddings and has no other parameters.
    """
    has_pooler = module.head == "sequence_classification" and "pooler" in set(map(_top, flat))
    with_pooler = trained_pooler and has_pooler
    tops = _tops_of(flat, _family(module)) | ({"pooler"} if with_pooler else set())
    own = {path: leaf for path, leaf in flat.items() if _top(path) in tops}
    if not own:
        return None
    tensors = _family(module).to_hugging_face(unflatten_dict(own, sep="/"), module.head)
    for place in _WITH_BIAS:
        if f"{place}.bias" in tensors:
            tensors[f"{place}.decoder.bias"] = tensors[f"{place}.bias"]
    labels = getattr(module, "num_labels", 2)
    names = {f"LABEL_{i}": i for i in range(labels)}
    if not with_pooler:
        settings = {"config": None, "name": None, "num_labels": labels, "label2id": names}
        return {**settings, "model_class": model_class(module)}, tensors
    config = {**WITH_POOLER.settings, "head_type": "classification", "num_labels": labels}
    config |= {"label2id": names, "dropout_prob": None}
    renamed = {}
    for i, layer in WITH_POOLER.layers.items():
        for kind in ("weight", "bias"):
            renamed[f"heads.{name}.{i}.{kind}"] = tensors[f"{layer}.{kind}"]
    return {"config": config, "name": name, "model_class": "BertAdapterModel"}, renamed
