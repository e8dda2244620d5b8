"""The files of a saved adapter, adapter_config.json and weights, read and checked."""

from __future__ import annotations

import hashlib
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compacter_jax import paths
from compacter_jax.compositions.base import members_of
from compacter_jax.files import check_fields, check_file, read_json
from compacter_jax.messages import mismatches, quote, shorten
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.pooling import Pooling
from compacter_jax.sites import Site
from compacter_jax.weights import converted, parse_tensors

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
            f"{path} has format_version {quote(settings['format_version'])}, but this release "
            f"reads {FORMAT_VERSION}; install the release that wrote it"
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
    for _ in range(ATTEMPTS):
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
    raise FileNotFoundError(
        f"{path} does not exist, but {CONFIG_NAME} in the same folder names it; copy both files "
        "from where the adapter was saved"
    )


def weights_name(path: Path, settings: Mapping[str, Any]) -> str:
    """Returns the name of the weights that adapter_config.json at `path` gives.

    Raises:
      ValueError: if it is not the name of an adapter's weights.
    """
    name = settings.get("weights", _UNNAMED_WEIGHTS)
    if not isinstance(name, str) or not _WEIGHTS_NAME.fullmatch(name):
        raise ValueError(
            f"{path}: weights={quote(name, 100)} is not the name of a file of adapter weights, "
            "such as adapter-0123456789abcdef.safetensors"
        )
    return name


def _check_labels(directory: Path, settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raises ValueError if a classifier is not as wide as the configuration says."""
    if settings["num_labels"] is None:  # the module has no such attribute
        return
    for path, leaf in tensors.items():
        if paths.has_labels(path) and leaf.shape[-1:] != (settings["num_labels"],):
            raise ValueError(
                f"{directory / CONFIG_NAME}: num_labels={quote(settings['num_labels'])}, but "
                f"{path} of the adapter has shape {leaf.shape}; copy both files from where the "
                "adapter was saved"
            )


def sites_from_json(sites: Any) -> Any:
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
        raise ValueError(f"site {quote(name, 100)} is not a valid Site: {error}") from None


def _read_weights(path: Path, sha256: str) -> dict[str, np.ndarray]:
    check_file(path)
    data = path.read_bytes()
    stored = parse_tensors(data, str(path), is_boolean=_is_boolean)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path} is not the file that {CONFIG_NAME} in the same folder describes, so one of "
            "them was replaced; copy both files from where the adapter was saved"
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


# A process that saves all the time may remove the named file before each attempt to read it.
ATTEMPTS = 100


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
            raise ValueError(f"{shorten(path, 100)} has dtype {stored.dtype}, not {dtype}")
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
        f"{path} has shape {stored[path].shape}, not {wanted[path].shape}"
        for path in sorted(wanted.keys() & stored.keys())
        if stored[path].shape != wanted[path].shape
    ]
    if missing or left_over or shapes:
        raise ValueError(
            shorten(
                f"the adapter in {directory} does not fit this backbone; load the backbone that "
                f"it was trained with{trained_with}; {mismatches(missing, left_over, shapes)}"
            )
        )


def named(settings: Mapping[str, Any]) -> str:
    """Returns the name of the backbone of an adapter, for the end of a message."""
    name = settings.get("backbone")
    return f", {shorten(str(name), 100)}" if name else ""
