"""Adapters on disk, without their backbone, and whole backbones: safetensors and JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax import config, inject
from compacter_jax.files import replace_file
from compacter_jax.models.convert import SINGLE_FILE
from compacter_jax.models.families import family_of
from compacter_jax.params import FREEZE, group_of, label_params
from compacter_jax.quantize import check_float
from compacter_jax.sites import Site

WEIGHTS_NAME = "adapter.safetensors"
CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1

# Saved although frozen: the backbone's checkpoint does not have them.
_ALWAYS_SAVED = ("adapters", "rule", "head")


def save_adapter(
    directory: str | os.PathLike[str],
    model: inject.Adapted,
    params: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes what a fine-tuned model has beyond its backbone.

    `adapter.safetensors` holds the trained leaves, the adapters, their rule and the head under
    their `/`-joined paths; `adapter_config.json` the method, the head and a hash of every leaf
    that is not stored. Each file is written to a temporary name, synced and renamed.

    Args:
      directory: made if it does not exist.
      model: the adapted module.
      params: its parameters.
      metadata: JSON-ready values kept in `adapter_config.json` beside the library's own, such as
        label names; `read_adapter_config` gives them back.

    Raises:
      TypeError: if `metadata` is no JSON; nothing is written then.
      ValueError: if `metadata` has a key that the library writes itself, or the backbone in
        `params` is of int8, whose hash is not the backbone's.
      OSError: if the directory cannot be written.
    """
    check_float(params, "saving an adapter")
    stored, left = _split(params, model.method)
    data = safetensors.flax.save(stored)
    own = {
        "format_version": FORMAT_VERSION,
        "method": config.to_dict(model.method),
        "sites": None if model.sites is None else _sites_to_json(model.sites),
        "head": getattr(model.backbone, "head", None),
        "num_labels": getattr(model.backbone, "num_labels", None),
        "backbone_sha256": hash_params(left),
        "weights_sha256": hashlib.sha256(data).hexdigest(),
    }
    metadata = dict(metadata or {})
    if clash := sorted(own.keys() & metadata.keys()):
        raise ValueError(f"metadata may not name {clash}, which save_adapter writes itself")
    text = json.dumps({**own, **metadata}, indent=2, sort_keys=True, ensure_ascii=False)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replace_file(directory / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(data)
    with replace_file(directory / CONFIG_NAME) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_adapter(
    directory: str | os.PathLike[str], backbone: Any
) -> tuple[inject.Adapted, dict[str, Any]]:
    """Reads an adapter back onto the backbone it was trained with.

    Args:
      directory: written by `save_adapter`.
      backbone: has `module` and `params`, with the head that the adapter was saved with.

    Returns:
      The adapted module and its parameters, equal to the bit to those saved.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a truncated or foreign file, another backbone or head, missing or unknown
        leaves; it says which.
    """
    return AdapterReader().read(directory, backbone)


class AdapterReader:
    """`load_adapter` for many: what adapters of one shape have in common is computed once.

    That is the hash of the backbone, and which leaves a method has beside it.
    """

    def __init__(self) -> None:
        # By identity; arrays and modules are kept, so that nothing else can come to have theirs.
        self._hashes: dict[tuple[int, ...], tuple[str, list[Any]]] = {}
        self._splits: dict[Any, tuple[Any, tuple[dict[str, Any], dict[str, Any]]]] = {}

    def read(
        self, directory: str | os.PathLike[str], backbone: Any
    ) -> tuple[inject.Adapted, dict[str, Any]]:
        """See `load_adapter`."""
        directory = Path(directory)
        settings = read_adapter_config(directory)
        for name in ("head", "num_labels"):
            given = getattr(backbone.module, name, None)
            if given != settings[name]:
                raise ValueError(
                    f"the adapter in {directory} was saved with {name}={settings[name]!r}, the "
                    f"backbone has {name}={given!r}; load the backbone with the adapter's"
                )
        stored = _read_weights(directory, settings["weights_sha256"])
        method = config.from_dict(settings["method"])
        model = inject.Adapted(backbone.module, method, sites=_sites_from_json(settings["sites"]))
        wanted, frozen = self._split(model, backbone, settings)
        check_leaves(directory, stored, wanted, trained_with=_named(settings))
        own = flatten_dict(backbone.params, sep="/")
        left = {path: own[path] for path in frozen}
        actual = self._hash(left)
        if actual != settings["backbone_sha256"]:
            raise ValueError(
                f"the adapter in {directory} was made for a backbone with the hash "
                f"{settings['backbone_sha256'][:12]}…, this one has {actual[:12]}…; "
                f"load the backbone it was trained with{_named(settings)}"
            )
        return model, unflatten_dict({**left, **stored}, sep="/")

    def _split(
        self, model: inject.Adapted, backbone: Any, settings: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shapes of what is stored, and of what is not, by path."""
        key = (model.method, repr(settings["sites"]), id(backbone.module))
        if key not in self._splits:
            shapes = jax.eval_shape(
                lambda key: inject.init_adapters(model, backbone, key), jax.random.key(0)
            )
            self._splits[key] = backbone.module, _split(shapes, model.method)
        return self._splits[key][1]

    def _hash(self, left: Mapping[str, Any]) -> str:
        """`hash_params`, of the same arrays once."""
        arrays = [left[path] for path in sorted(left)]
        key = tuple(map(id, arrays))
        if key not in self._hashes:
            self._hashes[key] = hash_params(left), arrays
        return self._hashes[key][0]


def save_backbone(directory: str | os.PathLike[str], module: Any, params: Any, config: Any) -> None:
    """Writes a backbone as a Hugging Face checkpoint: config.json and model.safetensors.

    `load_backbone` reads it back, and so does transformers' PyTorch. Each file is written to a
    temporary name, synced and renamed.

    Args:
      directory: made if it does not exist.
      module: the backbone's module; its head decides on the architecture named.
      params: its parameters, without adapters.
      config: the configuration of transformers, such as `Backbone.config`; it is not changed.

    Raises:
      ValueError: if the model is of no supported family, or `params` hold something else.
      OSError: if the directory cannot be written.
    """
    family = family_of(config)
    tensors = family.to_hugging_face(params)
    settings = json.loads(config.to_json_string(use_diff=False))
    head = getattr(module, "head", None)
    settings["architectures"] = [
        name for name, its_head in family.architectures.items() if its_head == head
    ][:1]
    settings["tie_word_embeddings"] = module.config.tie_word_embeddings
    if (num_labels := getattr(module, "num_labels", None)) is not None:
        names = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        if len(settings.get("id2label") or {}) != num_labels:
            settings["id2label"], settings["label2id"] = (
                names,
                {name: int(i) for i, name in names.items()},
            )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replace_file(directory / SINGLE_FILE) as temporary:
        # "pt" is what transformers wants to see; the values are NumPy's.
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    with replace_file(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of `adapter_config.json`, metadata included.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not an adapter's, or of a newer format.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is {directory} the folder of an adapter?")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    wanted = {"format_version", "method", "sites", "head", "num_labels"}
    wanted |= {"backbone_sha256", "weights_sha256"}
    missing = wanted - settings.keys() if isinstance(settings, dict) else wanted
    if missing:
        raise ValueError(f"{path} is no adapter of this library: it has no {sorted(missing)}")
    if settings["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {settings['format_version']!r}, this release reads "
            f"{FORMAT_VERSION}; install the release that wrote it"
        )
    return settings


def hash_params(params: Mapping[str, Any]) -> str:
    """SHA-256 of parameters by path and value.

    Values are rounded to bfloat16 first, so that a backbone kept in bfloat16 and the same one in
    float32 have one hash.

    Args:
      params: `/`-joined path -> array.
    """
    digest = hashlib.sha256()
    for path in sorted(params):
        leaf = np.asarray(params[path]).astype(jnp.bfloat16)
        digest.update(f"{path} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint16).data)
    return digest.hexdigest()


def _split(params: Any, method: config.MethodConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat `(stored, left to the backbone's own checkpoint)`."""
    labels = flatten_dict(label_params(params, method), sep="/")
    stored: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        frozen = labels[path] == FREEZE and group_of(path) not in _ALWAYS_SAVED
        (left if frozen else stored)[path] = leaf
    return stored, left


def _sites_to_json(sites: Mapping[str, str | Site]) -> dict[str, Any]:
    return {
        name: site if isinstance(site, str) else dataclasses.asdict(site)
        for name, site in sites.items()
    }


def _sites_from_json(sites: Any) -> Any:
    """Inverse; what is no mapping stays what it is, for `Adapted` to refuse."""
    if not isinstance(sites, Mapping):
        return sites
    try:
        return {
            name: site if isinstance(site, str) else Site(**site) for name, site in sites.items()
        }
    except TypeError as error:
        raise ValueError(f"sites={sites!r} are none of this library: {error}") from None


def _read_weights(directory: Path, sha256: str) -> dict[str, jax.Array]:
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    data = path.read_bytes()
    try:
        # Not `safetensors.flax.load`, which reads no bfloat16 from bytes.
        stored = safetensors.flax.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path} is not the file that {CONFIG_NAME} beside it describes: one of the two was "
            "replaced; copy both from where the adapter was saved"
        )
    return stored


def check_leaves(
    directory: Path,
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    trained_with: str = "",
) -> None:
    """ValueError that lists what is missing in `stored`, left over, or of another shape."""
    missing = sorted(wanted.keys() - stored.keys())
    left_over = sorted(stored.keys() - wanted.keys())
    shapes = [
        f"{path}: {stored[path].shape} stored, {wanted[path].shape} wanted"
        for path in sorted(wanted.keys() & stored.keys())
        if stored[path].shape != wanted[path].shape
    ]
    if missing or left_over or shapes:
        raise ValueError(
            f"the adapter in {directory} does not fit this backbone; load the one it was trained "
            f"with{trained_with}; missing: {missing or 'none'}; left over: {left_over or 'none'}; "
            f"of another shape: {shapes or 'none'}"
        )


def _named(settings: Mapping[str, Any]) -> str:
    name = settings.get("backbone")
    return f", {name}" if name else ""
