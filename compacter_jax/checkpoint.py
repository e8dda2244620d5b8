"""Adapters on disk, without their backbone, and whole backbones: safetensors and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax import catalogue, leftovers, paths
from compacter_jax.compositions.base import members_of
from compacter_jax.files import (
    check_fields,
    check_file,
    converted,
    hold_folder,
    parse_json,
    parse_tensors,
    read_json,
    replace_file,
)
from compacter_jax.inject import adapted
from compacter_jax.messages import about, listing, mismatches, quote, shorten
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.families import family_of
from compacter_jax.models.loading import SINGLE_FILE
from compacter_jax.models.pooling import DEFAULT as FIRST
from compacter_jax.models.pooling import Pooling, check_written, pooling_of_module, write_pooling
from compacter_jax.nn.quantize import check_float
from compacter_jax.params import TRAIN, group_of, label_params
from compacter_jax.sites import Site
from compacter_jax.trees import check_numbers, check_params

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1
# The file of weights if adapter_config.json names none, as in releases before 0.2.
_UNNAMED_WEIGHTS = "adapter.safetensors"
_WEIGHTS_NAME = re.compile(r"adapter(-[0-9a-f]{16})?\.safetensors")

# Field of adapter_config.json -> its type; the metadata may have any other field.
_REQUIRED_FIELDS: Mapping[str, Any] = {
    "format_version": int,
    "method": dict[str, Any],
    "sites": dict[str, str | dict[str, str | int]] | None,
    "head": str | None,
    "num_labels": int | None,
    "backbone_sha256": str,
    "weights_sha256": str,
}
_FIELDS = {
    **_REQUIRED_FIELDS,
    "weights": str,
    "backbone_groups": dict[str, str] | None,
    "also_trained": list[str] | None,
    "pooling": Pooling | None,
}

# Groups that are saved although frozen, because the backbone's checkpoint lacks them.
_ALWAYS_SAVED = ("adapters", "rule", "head")
# Fields that adapter_config.json has only if they are not None: the groups of a module other than
# `Bert` and `T5`, the paths that rules of `label_params` train, and the pooling of a classifier.
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
        raise ValueError(f"metadata may not name {quote(clash)}, which save_adapter writes itself")
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
            f"backbone={quote(backbone, 100)} has no params; give what load_backbone returns, or "
            "an object with the params from before training"
        )
    own = flatten_dict(backbone.params, sep="/")
    changed = [path for path, leaf in left.items() if not _is_same(leaf, own.get(path))]
    if changed:
        raise ValueError(
            f"{len(changed)} leaves differ from the backbone's and would not be stored "
            f"({listing(changed, 3)}); give save_adapter the labels, label_params(params, method, "
            "rules), where rules trained them, or the backbone that they come from"
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
                    f"the backbone has {name}={given!r}; load the backbone with the adapter's"
                )
        # Before there was a choice, all were read by the first token.
        saved_with = settings.get("pooling") or FIRST
        given = pooling_of_module(backbone.module) or FIRST
        if given != saved_with:
            raise ValueError(
                f"the adapter in {directory} was saved with pooling={saved_with!r}, the backbone "
                f"has pooling={given!r}; load the backbone with pooling={saved_with!r}"
            )
        with about(directory / CONFIG_NAME):
            method = catalogue.from_dict(settings["method"])
            check_count(method, stored)
            sites = _sites_from_json(settings["sites"])
            groups = settings.get("backbone_groups")
            model = adapted.Adapted(backbone.module, method, sites=sites, groups=groups)
            wanted, frozen = self._split(model, backbone, settings, inputs)
        check_leaves(directory, stored, wanted, trained_with=_named(settings))
        leaves = {path: as_leaf(path, leaf, wanted[path].dtype) for path, leaf in stored.items()}
        own = flatten_dict(backbone.params, sep="/")
        left = {path: own[path] for path in frozen}
        actual = self._hash(left)
        if actual != settings["backbone_sha256"]:
            raise ValueError(
                f"the adapter in {directory} was made for a backbone with the hash "
                f"{settings['backbone_sha256'][:12]}…, this one has {actual[:12]}…; "
                f"load the backbone it was trained with{_named(settings)} (what rules of "
                "label_params train besides is stored where save_adapter is given the labels)"
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
                lambda key: adapted.init_adapters(model, backbone, key, *inputs), jax.random.key(0)
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

    `load_backbone` and transformers' PyTorch models can read it. Of a module with `pooling` "mean"
    or "cls", transformers reads only the encoder, for it has no such classifier; `load_backbone`
    finds the pooling in 1_Pooling/config.json. Each file is written to a temporary name, synced and
    renamed.

    Args:
      directory: folder of the checkpoint, made if it does not exist.
      module: module of the backbone; its head decides which architecture config.json names.
      params: parameters of the module, without adapters.
      config: configuration of transformers, such as `Backbone.config`; the function does not change
        it.

    Raises:
      ValueError: if the model is of no supported family, or if `params` are not those of the
        module, or hold NaN or infinite numbers, or the folder says another pooling.
      OSError: if the directory cannot be written.
    """
    family = family_of(config)
    check_params(module, params, "saving a backbone")
    check_numbers(flatten_dict(params, sep="/"))
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
    directory, pooling = Path(directory), pooling_of_module(module)
    if pooling is not None:
        check_written(directory, pooling)
    directory.mkdir(parents=True, exist_ok=True)
    if pooling is not None:
        write_pooling(directory, pooling, module.config.hidden_size)
    with replace_file(directory / SINGLE_FILE) as temporary:
        # transformers expects the format "pt"; the values are NumPy's.
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    with replace_file(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the contents of `adapter_config.json`, metadata included.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is not an adapter's, or has a newer format.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is {directory} the folder of an adapter?")
    settings = read_json(path, required=sorted(_REQUIRED_FIELDS), what="an adapter of this library")
    check_fields(str(path), settings, _FIELDS)
    if settings["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {quote(settings['format_version'])}, this release reads "
            f"{FORMAT_VERSION}; install the release that wrote it"
        )
    if settings["num_labels"] is not None and settings["num_labels"] < 1:
        raise ValueError(f"{path}: num_labels={settings['num_labels']} must be at least 1")
    weights_name(path, settings)
    return settings


class Saved(NamedTuple):
    """An adapter as it is on the disk.

    Attributes:
      settings: contents of adapter_config.json.
      tensors: `/`-joined path -> array, in the stored dtype.
    """

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_saved(directory: str | os.PathLike[str]) -> Saved:
    """Reads the two files of an adapter; both are of one save, even while others save.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is broken, the two are not of one adapter, a number is not finite, or
        the head does not have `num_labels` labels.
    """
    directory, before = Path(directory), None
    for _ in range(_ATTEMPTS):
        settings = read_adapter_config(directory)
        path = directory / weights_name(directory / CONFIG_NAME, settings)
        try:
            tensors = _read_weights(path, settings["weights_sha256"])
        except FileNotFoundError:
            if settings == before:
                break
            before = settings
            continue
        _check_labels(directory, settings, tensors)
        return Saved(settings, tensors)
    raise FileNotFoundError(f"{path} does not exist, and {CONFIG_NAME} beside it names it")


# A process that saves all the time may remove the named file before each attempt to read it.
_ATTEMPTS = 100


def weights_name(path: Path, settings: Mapping[str, Any]) -> str:
    """Returns the name of the weights that adapter_config.json at `path` gives.

    Raises:
      ValueError: if it is not the name of an adapter's weights.
    """
    name = settings.get("weights", _UNNAMED_WEIGHTS)
    if not isinstance(name, str) or not _WEIGHTS_NAME.fullmatch(name):
        raise ValueError(
            f"{path}: weights={quote(name, 100)} is no name of an adapter's weights, such as "
            "adapter-0123456789abcdef.safetensors"
        )
    return name


def _check_labels(directory: Path, settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raises ValueError if a classifier is not as wide as the configuration says."""
    if settings["num_labels"] is None:  # the module has no such attribute
        return
    for path, leaf in tensors.items():
        if path.startswith("classifier/") and leaf.shape[-1:] != (settings["num_labels"],):
            raise ValueError(
                f"{directory / CONFIG_NAME}: num_labels={quote(settings['num_labels'])}, but the "
                f"adapter's {path} is of shape {leaf.shape}; copy both files from where the "
                "adapter was saved"
            )


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
            f"also_trained names what is no parameter of the model: {listing(unknown)}"
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
        raise ValueError(
            "labels are not those of params; pass what label_params(params, …) returns"
        )
    return sorted(path for path in left if given[path] == TRAIN)


def _sites_to_json(sites: Mapping[str, str | Site]) -> dict[str, Any]:
    return {
        name: site if isinstance(site, str) else _without_none(dataclasses.asdict(site))
        for name, site in sites.items()
    }


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    # A release that does not know a field can read the sites that lack it.
    return {name: value for name, value in fields.items() if value is not None}


def _sites_from_json(sites: Any) -> Any:
    """Returns the sites of `_sites_to_json`; raises ValueError for an invalid table."""
    if sites is None:
        return None
    return {
        name: site if isinstance(site, str) else _site(name, site) for name, site in sites.items()
    }


def _site(name: str, fields: Mapping[str, Any]) -> Site:
    check_fields(f"site {quote(name, 100)}", fields, typing.get_type_hints(Site))
    try:
        return Site(**fields)
    except TypeError as error:
        raise ValueError(f"site {quote(name, 100)} is none of this library: {error}") from None


def _read_weights(path: Path, sha256: str) -> dict[str, np.ndarray]:
    check_file(path)
    data = path.read_bytes()
    stored = parse_tensors(data, str(path), is_boolean=_is_boolean)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path} is not the file that {CONFIG_NAME} beside it describes: one of the two was "
            "replaced; copy both from where the adapter was saved"
        )
    return stored


def _is_boolean(path: str) -> bool:
    """Returns True for the leaf that marks the occupied places of a bank."""
    return path.rpartition("/")[2] == paths.OCCUPIED


def check_count(method: MethodConfig, stored: Mapping[str, Any]) -> None:
    """Checks that a method has no more members and parts than there are tensors.

    Raises:
      ValueError: if it has more; raised before the model is built.
    """
    count = max(len(members_of(method)), len(method.inserted()))
    if count > max(1, len(stored)):
        raise ValueError(
            f"method {method.kind!r} has {count:,} members, but {len(stored):,} tensors are stored"
        )


def as_leaf(path: str, stored: np.ndarray, dtype: Any) -> jax.Array:
    """Returns a stored leaf in the model's dtype, or in float32 if it was stored in float32.

    Adapters compute in the dtype of their parameters. A leaf that is stored in 16 bits for a model
    of 32 is widened, which is exact. A leaf that was trained in float32 stays float32 beside a
    backbone of 16 bits, and float64 becomes float32.

    Args:
      path: path of the leaf, for messages.
      stored: array of a floating-point type, or boolean.
      dtype: dtype of the model's leaf.

    Raises:
      ValueError: if a number is too large for float32, or if only one of the two is boolean.
    """
    dtype = jnp.dtype(dtype)
    if "bool" in (stored.dtype.name, dtype.name):
        if stored.dtype != dtype:
            raise ValueError(f"{shorten(path, 100)} is of type {stored.dtype}, not {dtype}")
        return jnp.asarray(stored)
    target = jnp.promote_types(stored.dtype, dtype)
    if target == jnp.float64 and dtype != jnp.float64:
        target = jnp.dtype(jnp.float32)
    return jnp.asarray(converted("the adapter", path, stored, target))


def check_leaves(
    directory: Path,
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    trained_with: str = "",
) -> None:
    """Raises ValueError that lists leaves of `stored` that are missing, left over or misshapen."""
    missing = sorted(wanted.keys() - stored.keys())
    left_over = sorted(stored.keys() - wanted.keys())
    shapes = [
        f"{path}: {stored[path].shape} stored, {wanted[path].shape} wanted"
        for path in sorted(wanted.keys() & stored.keys())
        if stored[path].shape != wanted[path].shape
    ]
    if missing or left_over or shapes:
        raise ValueError(
            shorten(
                f"the adapter in {directory} does not fit this backbone; load the one it was "
                f"trained with{trained_with}; {mismatches(missing, left_over, shapes)}"
            )
        )


def _named(settings: Mapping[str, Any]) -> str:
    name = settings.get("backbone")
    return f", {shorten(str(name), 100)}" if name else ""
