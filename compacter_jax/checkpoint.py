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
from compacter_jax.nn.quantize import check_float
from compacter_jax.params import TRAIN, group_of, label_params
from compacter_jax.sites import Site
from compacter_jax.trees import check_numbers, check_params

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = 1
# The file of weights where adapter_config.json names none, as releases before 0.2 wrote it.
_UNNAMED_WEIGHTS = "adapter.safetensors"
_WEIGHTS_NAME = re.compile(r"adapter(-[0-9a-f]{16})?\.safetensors")

# Field of adapter_config.json -> its type; metadata may have any other.
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
}

# Saved although frozen: the backbone's checkpoint does not have them.
_ALWAYS_SAVED = ("adapters", "rule", "head")
# In adapter_config.json where there are such: names of a backbone of others, and paths of what
# rules of `label_params` train.
_RARE = ("backbone_groups", "also_trained")


def save_adapter(
    directory: str | os.PathLike[str],
    model: adapted.Adapted,
    params: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    labels: Any = None,
    backbone: Any = None,
) -> None:
    """Writes what a fine-tuned model has beyond its backbone.

    `adapter-HASH.safetensors` holds the trained leaves, the adapters, their rule and the head under
    their `/`-joined paths; `adapter_config.json` its name, the method, the head and a hash of
    every leaf that is not stored. An adapter that is in the directory already is there until the
    new `adapter_config.json` takes the old one's place in one step; then the old weights are
    removed. Several threads or processes may save to one directory. A save that is killed may
    leave weights that nothing names; the next one removes them by a log, `.adapter_saving.json`.

    Parameters do not say which of them were trained. Whoever trains more than the method does, by
    `rules` of `label_params` or a rule of their own, gives `labels`, or `backbone` to be told what
    would not be stored. Without either, `load_adapter` refuses the adapter where the difference is
    large enough to change the hash of what is not stored.

    Args:
      directory: made if it does not exist.
      model: the adapted module.
      params: its parameters.
      metadata: JSON-ready values kept in `adapter_config.json` beside the library's own, such as
        label names; `read_adapter_config` gives them back.
      labels: of `label_params`, where its `rules` train more than the method does, so that this is
        stored too. By default what the method trains.
      backbone: has `params`, as before training. Where it is given, parameters that are not stored
        must be equal to its own.

    Raises:
      TypeError: if `metadata` is no JSON; nothing is written then.
      ValueError: if `labels` are not those of `params`, `metadata` has a key that the library
        writes itself or something that JSON cannot hold, such as NaN, `params` are not those of
        the model (replicated, say, or a half of `partition`), the backbone in them is of int8,
        whose hash is not the backbone's, they differ from `backbone` where they are not stored, or
        hold NaN or infinite numbers where they are. Nothing is written then.
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
        "backbone_sha256": hash_params(left),
        "weights": f"adapter-{sha256[:16]}.safetensors",
        "weights_sha256": sha256,
    }
    metadata = dict(metadata or {})
    if clash := sorted(own.keys() & metadata.keys()):
        raise ValueError(f"metadata may not name {quote(clash)}, which save_adapter writes itself")
    own = {name: value for name, value in own.items() if name not in _RARE or value is not None}
    text = json.dumps({**own, **metadata}, indent=2, sort_keys=True, ensure_ascii=False)
    parse_json(text, "metadata")  # what could not be read again is not written
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with hold_folder(directory) as is_alone, _logged(directory, str(own["weights"]), is_alone):
        _commit(directory, str(own["weights"]), data, text + "\n")


def _check_unchanged(left: Mapping[str, Any], backbone: Any) -> None:
    """ValueError if leaves that are not stored are others than the backbone's."""
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
    """Whether two leaves are equal, up to bfloat16 where one is of another type."""
    if leaf is own or own is None:
        return leaf is own
    if leaf.dtype == own.dtype:
        return np.array_equal(leaf, own)
    return hash_params({"": leaf}) == hash_params({"": own})


@contextlib.contextmanager
def _logged(directory: Path, name: str, is_alone: bool) -> Iterator[None]:
    """Keeps a log while an adapter is written, and removes what saves that were killed left."""
    if not is_alone:  # what is in the log may be of somebody who saves just now
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
    """Writes weights, then the configuration that names them, then removes the weights before."""
    before = _weights_in_use(directory)
    with replace_file(directory / name) as temporary:
        temporary.write_bytes(data)
    with replace_file(directory / CONFIG_NAME) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if before is not None and before != name:
        (directory / before).unlink(missing_ok=True)


def _weights_in_use(directory: Path) -> str | None:
    """The weights that the configuration names; None where it is missing, broken or of others."""
    try:
        return weights_name(directory / CONFIG_NAME, read_adapter_config(directory))
    except (OSError, ValueError):
        return None


def load_adapter(
    directory: str | os.PathLike[str], backbone: Any, *inputs: Any
) -> tuple[adapted.Adapted, dict[str, Any]]:
    """Reads an adapter back onto the backbone it was trained with.

    Args:
      directory: written by `save_adapter`.
      backbone: has `module` and `params`, with the head that the adapter was saved with.
      *inputs: example arguments of a call; by default `backbone.module.dummy_inputs()`.

    Returns:
      The adapted module and its parameters, equal to the bit to those saved.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a truncated or foreign file, another backbone or head, missing or unknown
        leaves; it says which.
    """
    return AdapterReader().read(directory, backbone, *inputs)


class AdapterReader:
    """`load_adapter` for many: what adapters of one shape have in common is computed once.

    That is the hash of the backbone, and which leaves a method has beside it.
    """

    def __init__(self) -> None:
        # By identity; arrays and modules are kept, so that nothing else can come to have theirs.
        self._hashes: dict[tuple[int, ...], tuple[str, list[Any]]] = {}
        self._splits: dict[Any, tuple[Any, tuple[dict[str, Any], dict[str, Any]]]] = {}

    def read(
        self, directory: str | os.PathLike[str], backbone: Any, *inputs: Any
    ) -> tuple[adapted.Adapted, dict[str, Any]]:
        """See `load_adapter`."""
        return self.join(Path(directory), read_saved(directory), backbone, *inputs)

    def join(
        self, directory: Path, saved: Saved, backbone: Any, *inputs: Any
    ) -> tuple[adapted.Adapted, dict[str, Any]]:
        """Puts what `read_saved` read from a directory onto the backbone; see `load_adapter`."""
        settings, stored = saved
        for name in ("head", "num_labels"):
            given = getattr(backbone.module, name, None)
            if given != settings[name]:
                raise ValueError(
                    f"the adapter in {directory} was saved with {name}={quote(settings[name])}, "
                    f"the backbone has {name}={given!r}; load the backbone with the adapter's"
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
        """Shapes of what is stored, and of what is not, by path."""
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
      ValueError: if the model is of no supported family, or `params` hold something else, or NaN or
        infinite numbers.
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
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replace_file(directory / SINGLE_FILE) as temporary:
        # "pt" is what transformers wants to see; the values are NumPy's.
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    with replace_file(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the contents of `adapter_config.json`, metadata included.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not an adapter's, or of a newer format.
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
      settings: of adapter_config.json.
      tensors: by `/`-joined path, as they are stored.
    """

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_saved(directory: str | os.PathLike[str]) -> Saved:
    """Reads the two files of an adapter, which are of one save even beside somebody who saves.

    Raises:
      FileNotFoundError: if one is missing.
      ValueError: if one is broken, they are not of one adapter, a number is not finite, or the
        head has other than `num_labels` labels.
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


# Who saves all the time may remove what was named just now, each time that it is looked for.
_ATTEMPTS = 100


def weights_name(path: Path, settings: Mapping[str, Any]) -> str:
    """Returns the name of the file of weights that adapter_config.json at `path` names.

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
    """ValueError if a classifier is not as wide as the configuration says."""
    if settings["num_labels"] is None:  # of a module that does not say how many it has
        return
    for path, leaf in tensors.items():
        if path.startswith("classifier/") and leaf.shape[-1:] != (settings["num_labels"],):
            raise ValueError(
                f"{directory / CONFIG_NAME}: num_labels={quote(settings['num_labels'])}, but the "
                f"adapter's {path} is of shape {leaf.shape}; copy both files from where the "
                "adapter was saved"
            )


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


def _split(
    params: Any, model: adapted.Adapted, also: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat `(stored, left to the backbone's own checkpoint)`; paths in `also` are stored, too."""
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
    """The paths that labels train, and the method does not."""
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
    # Releases that do not know a field read what does not have it.
    return {name: value for name, value in fields.items() if value is not None}


def _sites_from_json(sites: Any) -> Any:
    """Inverse; ValueError for what is no table of sites."""
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
    """Whether a leaf says which places of a bank are occupied."""
    return path.rpartition("/")[2] == paths.OCCUPIED


def check_count(method: MethodConfig, stored: Mapping[str, Any]) -> None:
    """Checks that a method has no more members and parts than there are tensors.

    Raises:
      ValueError: if it has more, before anything is made of them.
    """
    count = max(len(members_of(method)), len(method.inserted()))
    if count > max(1, len(stored)):
        raise ValueError(
            f"method {method.kind!r} has {count:,} members, but {len(stored):,} tensors are stored"
        )


def as_leaf(path: str, stored: np.ndarray, dtype: Any) -> jax.Array:
    """Returns a stored leaf in the model's type, or in float32 where that was stored.

    Adapters compute in the dtype of their parameters. One that is stored in 16 bits for a model of
    32 is widened, which is exact. What was trained in float32 stays so beside a backbone of 16
    bits, and float64 becomes float32.

    Args:
      path: for messages.
      stored: of a floating-point type, or boolean.
      dtype: of the model's leaf.

    Raises:
      ValueError: if a number is too large for float32, or one of the two is boolean alone.
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
            shorten(
                f"the adapter in {directory} does not fit this backbone; load the one it was "
                f"trained with{trained_with}; {mismatches(missing, left_over, shapes)}"
            )
        )


def _named(settings: Mapping[str, Any]) -> str:
    name = settings.get("backbone")
    return f", {shorten(str(name), 100)}" if name else ""
