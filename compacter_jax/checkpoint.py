"""Adapters on disk, without their backbone, and whole backbones: safetensors and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax import catalogue, leftovers
from compacter_jax.adapter_files import (
    CONFIG_NAME,
    FORMAT_VERSION,
    Saved,
    as_leaf,
    check_count,
    check_leaves,
    named,
    read_adapter_config,
    read_saved,
    sites_from_json,
    weights_name,
)
from compacter_jax.files import hold_folder, parse_json, replace_file
from compacter_jax.inject import adapted, initial
from compacter_jax.messages import about, listing, quote
from compacter_jax.models.families import family_of
from compacter_jax.models.loading import SINGLE_FILE
from compacter_jax.models.pooling import DEFAULT as FIRST
from compacter_jax.models.pooling import check_written, pooling_of_module, write_pooling
from compacter_jax.nn.quantize import check_float
from compacter_jax.params import TRAIN, group_of, label_params
from compacter_jax.sites import Site
from compacter_jax.trees import check_numbers, check_params

# Groups that are saved although frozen, because the backbone's checkpoint lacks them.
_ALWAYS_SAVED = ("adapters", "rule", "head")


# Fields that adapter_config.json has only if they are not None: the groups of a module of
# others, the paths that rules of `label_params` train, and the pooling of a classifier.
_RARE = ("backbone_groups", "also_trained", "pooling")


def save_adapter(
    directory: str | os.PathLike[str],
    model: adapted.Adapted,
    params: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    labels: Any = None,
    backbone: Any = None,
) -> None:
    """Writes the parameters that a fine-tuned model has in addition to its backbone.

    `adapter-HASH.safetensors` holds the trained leaves, the adapters, their rule and the head under
    their `/`-joined paths. `adapter_config.json` holds the name of this file, the method, the head
    and one hash over the leaves that are not stored. An adapter that is already in the directory
    stays valid until the new `adapter_config.json` replaces the old one in one step; then the old
    weights are removed. Several threads or processes may save to one directory. A save that is
    killed may leave weights that no configuration names; the next save finds them in a log,
    `.adapter_saving.json`, and removes them.

    The parameters do not show which of them were trained. If more was trained than the method
    trains, by `rules` of `label_params` or in another way, give `labels` to store it, or `backbone`
    to get an error that lists it. Without either, `load_adapter` refuses the adapter if the
    difference is large enough to change the hash of the leaves that are not stored.

    Args:
      directory: folder of the adapter, made if it does not exist.
      model: the adapted module.
      params: parameters of the model.
      metadata: JSON-ready values that `adapter_config.json` keeps beside the library's own, such as
        label names; `read_adapter_config` returns them.
      labels: result of `label_params`, if its `rules` train more than the method does, so that
        these leaves are stored too. The default is the leaves that the method trains.
      backbone: object with the `params` from before training. If it is given, parameters that are
        not stored must be equal to those of the backbone.

    Raises:
      TypeError: if `metadata` is not JSON.
      ValueError: if `labels` do not belong to `params`; if `metadata` has a key that the library
        writes itself, or a value that JSON cannot hold, such as NaN; if `params` are not those of
        the model (replicated, say, or a half of `partition`); if the backbone in them is of int8,
        whose hash differs from the backbone's; if they differ from `backbone` in leaves that are
        not stored; or if leaves to be stored hold NaN or infinite numbers. Nothing is written after
        a TypeError or a ValueError.
      OSError: if the directory cannot be written.
    """
    check_params(model, params, "saving an adapter")
    check_float(params, "saving an adapter")
    also = _also_trained(params, model, labels)
    stored, left = _split(params, model, also)
    check_numbers(stored)
    if backbone is not None:
        _check_unchanged(left, backbone)
    data = safetensors.flax.save(stored)
    sha256 = hashlib.sha256(data).hexdigest()
    own = {
        "format_version": FORMAT_VERSION,
        "method": catalogue.to_dict(model.method),
        "sites": None if model.sites is None else _sites_to_json(model.sites),
        "backbone_groups": None if model.groups is None else dict(model.groups),
        "also_trained": also or None,
        "head": getattr(model.backbone, "head", None),
        "num_labels": getattr(model.backbone, "num_labels", None),
        "pooling": pooling_of_module(model.backbone),
        "backbone_sha256": hash_params(left),
        "weights": f"adapter-{sha256[:16]}.safetensors",
        "weights_sha256": sha256,
    }
    metadata = dict(metadata or {})
    if clash := sorted(own.keys() & metadata.keys()):
        raise ValueError(
            f"metadata must not have the key {quote(clash)}, which save_adapter writes itself; "
            "rename it"
        )
    own = {name: value for name, value in own.items() if name not in _RARE or value is not None}
    text = json.dumps({**own, **metadata}, indent=2, sort_keys=True, ensure_ascii=False)
    parse_json(text, "metadata")  # refuses text that could not be read again
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with hold_folder(directory) as is_alone, _logged(directory, str(own["weights"]), is_alone):
        _commit(directory, str(own["weights"]), data, text + "\n")


def _check_unchanged(left: Mapping[str, Any], backbone: Any) -> None:
    """Raises ValueError if leaves that are not stored differ from the backbone's."""
    if not isinstance(getattr(backbone, "params", None), Mapping):
        raise ValueError(
            f"backbone={quote(backbone, 100)} has no attribute params; give the result of "
            "load_backbone, or an object with the params from before training"
        )
    own = flatten_dict(backbone.params, sep="/")
    changed = [path for path, leaf in left.items() if not _is_same(leaf, own.get(path))]
    if changed:
        raise ValueError(
            f"{len(changed)} leaves differ from the backbone's and would not be stored "
            f"({listing(changed, 3)}); if rules trained them, give save_adapter "
            "labels=label_params(params, method, rules); if not, give it the backbone that they "
            "come from"
        )


def _is_same(leaf: Any, own: Any) -> bool:
    """Returns True for equal leaves, compared in bfloat16 if their types differ."""
    if leaf is own or own is None:
        return leaf is own
    if leaf.dtype == own.dtype:
        return np.array_equal(leaf, own)
    return hash_params({"": leaf}) == hash_params({"": own})


@contextlib.contextmanager
def _logged(directory: Path, name: str, is_alone: bool) -> Iterator[None]:
    """Keeps a log while an adapter is written, and removes leftovers of killed saves."""
    if not is_alone:  # another process may be saving just now, and the log may be its own
        yield
        return
    before = _weights_in_use(directory)
    leftovers.clear(directory, before)
    leftovers.note(directory, [name, before or name])
    try:
        yield
    finally:
        leftovers.clear(directory, _weights_in_use(directory))


def _commit(directory: Path, name: str, data: bytes, text: str) -> None:
    """Writes weights, then the configuration that names them; then removes the old weights."""
    before = _weights_in_use(directory)
    with replace_file(directory / name) as temporary:
        temporary.write_bytes(data)
    with replace_file(directory / CONFIG_NAME) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if before is not None and before != name:
        (directory / before).unlink(missing_ok=True)


def _weights_in_use(directory: Path) -> str | None:
    """Returns the weights that the configuration names, or None if it is missing or invalid."""
    try:
        return weights_name(directory / CONFIG_NAME, read_adapter_config(directory))
    except (OSError, ValueError):
        return None


def load_adapter(
    directory: str | os.PathLike[str], backbone: Any, *inputs: Any
) -> tuple[adapted.Adapted, dict[str, Any]]:
    """Loads an adapter onto the backbone it was trained with.

    Args:
      directory: folder written by `save_adapter`.
      backbone: object with `module` and `params`, with the head that the adapter was saved with.
      *inputs: example arguments of a call; by default `backbone.module.dummy_inputs()`.

    Returns:
      The adapted module and its parameters, equal to the bit to those saved.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a truncated or foreign file, another backbone or head, and missing or unknown
        leaves; the message says which.
    """
    return AdapterReader().read(directory, backbone, *inputs)


class AdapterReader:
    """A `load_adapter` for many adapters: parts that they share are computed once.

    These parts are the hash of the backbone, and the split of a method's leaves into stored ones
    and those of the backbone.
    """

    def __init__(self) -> None:
        # The keys are identities. The arrays and modules are kept, so that no other object can get
        # their identity.
        self._hashes: dict[tuple[int, ...], tuple[str, list[Any]]] = {}
        self._splits: dict[Any, tuple[Any, tuple[dict[str, Any], dict[str, Any]]]] = {}

    def read(
        self, directory: str | os.PathLike[str], backbone: Any, *inputs: Any
    ) -> tuple[adapted.Adapted, dict[str, Any]]:
        """Reads an adapter as `load_adapter` does."""
        return self.join(Path(directory), read_saved(directory), backbone, *inputs)

    def join(
        self, directory: Path, saved: Saved, backbone: Any, *inputs: Any
    ) -> tuple[adapted.Adapted, dict[str, Any]]:
        """Puts the result of `read_saved` onto the backbone, as `load_adapter` does."""
        settings, stored = saved
        for name in ("head", "num_labels"):
            given = getattr(backbone.module, name, None)
            if given != settings[name]:
                raise ValueError(
                    f"the adapter in {directory} was saved with {name}={quote(settings[name])}, "
                    f"but the backbone has {name}={given!r}; load the backbone with "
                    f"{name}={quote(settings[name])}"
                )
        # Before there was a choice, all were read by the first token.
        saved_with = settings.get("pooling") or FIRST
        given = pooling_of_module(backbone.module) or FIRST
        if given != saved_with:
            raise ValueError(
                f"the adapter in {directory} was saved with pooling={saved_with!r}, but the "
                f"backbone has pooling={given!r}; load the backbone with pooling={saved_with!r}"
            )
        with about(directory / CONFIG_NAME):
            method = catalogue.from_dict(settings["method"])
            check_count(method, stored)
            sites = sites_from_json(settings["sites"])
            groups = settings.get("backbone_groups")
            model = adapted.Adapted(backbone.module, method, sites=sites, groups=groups)
            wanted, frozen = self._split(model, backbone, settings, inputs)
        check_leaves(directory, stored, wanted, trained_with=named(settings))
        leaves = {path: as_leaf(path, leaf, wanted[path].dtype) for path, leaf in stored.items()}
        own = flatten_dict(backbone.params, sep="/")
        left = {path: own[path] for path in frozen}
        actual = self._hash(left)
        if actual != settings["backbone_sha256"]:
            raise ValueError(
                f"the adapter in {directory} was made for a backbone with the hash "
                f"{settings['backbone_sha256'][:12]}…, but this backbone has {actual[:12]}…; load "
                f"the backbone that the adapter was trained with{named(settings)} (if rules of "
                "label_params trained weights of the backbone, give save_adapter the labels to "
                "store them)"
            )
        return model, unflatten_dict({**left, **leaves}, sep="/")

    def _split(
        self, model: adapted.Adapted, backbone: Any, settings: Mapping[str, Any], inputs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the shapes of the stored leaves and of the other leaves, by path."""
        also = settings.get("also_trained") or ()
        own = [repr(settings.get(name)) for name in ("sites", *_RARE)]
        key = (model.method, *own, id(backbone.module))
        if key not in self._splits:
            shapes = jax.eval_shape(
                lambda key: initial.init_adapters(model, backbone, key, *inputs), jax.random.key(0)
            )
            self._splits[key] = backbone.module, _split(shapes, model, also)
        return self._splits[key][1]

    def _hash(self, left: Mapping[str, Any]) -> str:
        """Returns `hash_params`, computed once for the same arrays."""
        arrays = [left[path] for path in sorted(left)]
        key = tuple(map(id, arrays))
        if key not in self._hashes:
            self._hashes[key] = hash_params(left), arrays
        return self._hashes[key][0]


def save_backbone(directory: str | os.PathLike[str], module: Any, params: Any, config: Any) -> None:
    """Writes a backbone as a Hugging Face checkpoint: config.json and model.safetensors.

    `load_backbone` and transformers' PyTorch models can read it. Of a BERT with `pooling` "mean" or
    "cls", transformers reads only the encoder, for it has no such classifier; `load_backbone` finds
    the pooling in 1_Pooling/config.json. Each file is written to a temporary name, synced and
    renamed.

    Args:
      directory: folder of the checkpoint, made if it does not exist.
      module: module of the backbone; its head decides which architecture config.json names.
      params: parameters of the module, without adapters.
      config: configuration of transformers, such as `Backbone.config`; the function does not change
        it. Widths that `Adapted.merged_module` may have changed are written as the module has them.

    Raises:
      ValueError: if the model is of no supported family, or if `params` are not those of the
        module, or hold NaN or infinite numbers, or the folder says another pooling.
      OSError: if the directory cannot be written.
    """
    family = family_of(config)
    check_params(module, params, "saving a backbone")
    check_numbers(flatten_dict(params, sep="/"))
    tensors = family.to_hugging_face(params, getattr(module, "head", None))
    settings = json.loads(config.to_json_string(use_diff=False))
    head = getattr(module, "head", None)
    settings["architectures"] = [
        name for name, its_head in family.architectures.items() if its_head == head
    ][:1]
    if family.ties:
        settings["tie_word_embeddings"] = module.config.tie_word_embeddings
    settings |= {name: getattr(module.config, name) for name in family.width_fields}
    if (num_labels := getattr(module, "num_labels", None)) is not None:
        names = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        if len(settings.get("id2label") or {}) != num_labels:
            settings["id2label"], settings["label2id"] = (
                names,
                {name: int(i) for i, name in names.items()},
            )
    directory, pooling = Path(directory), pooling_of_module(module)
    if pooling is not None:
        check_written(directory, pooling)
        if pooling != FIRST and "classifier_pooling" in settings:
            settings["classifier_pooling"] = pooling  # transformers reads this field, too
    directory.mkdir(parents=True, exist_ok=True)
    if pooling is not None:
        write_pooling(directory, pooling, module.config.hidden_size)
    with replace_file(directory / SINGLE_FILE) as temporary:
        # transformers expects the format "pt"; the values are NumPy's.
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    with replace_file(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def hash_params(params: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of parameters by path and value.

    Values are first rounded to bfloat16, so that a backbone has the same hash in bfloat16 and in
    float32.

    Args:
      params: `/`-joined path -> array.
    """
    digest = hashlib.sha256()
    for path in sorted(params):
        leaf = np.asarray(params[path]).astype(jnp.bfloat16)
        digest.update(f"{path} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint16).data)
    return digest.hexdigest()


def _split(
    params: Any, model: adapted.Adapted, also: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns flat `(stored, left to the backbone's checkpoint)`; stores paths in `also`, too."""
    groups, also = model.groups or {}, frozenset(also)
    if unknown := sorted(also - flatten_dict(params, sep="/").keys()):
        raise ValueError(
            f"also_trained names parameters that the model does not have: {listing(unknown)}"
        )
    labels = flatten_dict(label_params(params, model.method, groups=groups), sep="/")
    stored: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        is_kept = labels[path] == TRAIN or group_of(path, groups) in _ALWAYS_SAVED or path in also
        (stored if is_kept else left)[path] = leaf
    return stored, left


def _also_trained(params: Any, model: adapted.Adapted, labels: Any) -> list[str]:
    """Returns the paths that the labels train, but the method does not."""
    if labels is None:
        return []
    _, left = _split(params, model, ())
    given = flatten_dict(labels, sep="/") if isinstance(labels, Mapping) else {}
    if given.keys() != flatten_dict(params, sep="/").keys():
        raise ValueError("labels do not match params; pass the result of label_params(params, …)")
    return sorted(path for path in left if given[path] == TRAIN)


def _sites_to_json(sites: Mapping[str, str | Site]) -> dict[str, Any]:
    return {
        name: site if isinstance(site, str) else _without_none(dataclasses.asdict(site))
        for name, site in sites.items()
    }


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    # A release that does not know a field can read the sites that lack it.
    return {name: value for name, value in fields.items() if value is not None}
