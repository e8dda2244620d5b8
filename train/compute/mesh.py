"""Sharding of a backbone over a mesh: the dimension of each weight that each mesh axis divides.

`--mesh data=2,model=4` arranges the eight devices of a host in two rows of four. Each row computes
its part of every batch. Every frozen kernel is divided over both axes: over `model` as in Megatron,
so that a sub-layer communicates once, and over `data` as in FSDP, so that a row fetches missing
parts from the other row when it needs them. Trained parameters are replicated on every device. With
several hosts, each has a whole copy of the backbone, and the batch is divided over the hosts, too.

References:
  Shoeybi et al., Megatron-LM, arXiv:1909.08053; Rajbhandari et al., ZeRO, arXiv:1910.02054.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compacter_jax.models.names import NAMES, Names
from compacter_jax.params import GROUPS

HOSTS, DATA, MODEL = "hosts", "data", "model"
# Primitives that `refetched` recomputes: the fetch, and operations that copy fetched weights.
_NOT_KEPT = frozenset({"sharding_constraint", "convert_element_type", "transpose"})

# Regular expression over whole `/`-joined paths -> the axis that each dimension is divided over;
# the first match wins. Small arrays are replicated on every device.
Rule = tuple[str, tuple[str, ...]]


def _rules_of(names: Names) -> tuple[Rule, ...]:
    """Returns the rules for the backbones of a family."""
    columns, rows = "|".join(names.columns), "|".join(names.rows)
    return (
        # The first kernels of a sub-layer are divided by columns, the last one by rows.
        (rf"(.*/)?({columns})/kernel", (DATA, MODEL)),
        (rf"(.*/)?({rows})/kernel", (MODEL, DATA)),
        *((path, (MODEL, DATA)) for path in (names.embeddings, *names.more_embeddings)),
        (names.parameters, ()),
    )


RULES: tuple[Rule, ...] = (
    (GROUPS["rule"], ()),
    (GROUPS["adapters"], ()),
    (GROUPS["head"], ()),
    (r"(.*/)?(bias|scale)", ()),
    *(rule for names in NAMES.values() for rule in _rules_of(names)),
)


def parse(text: str) -> dict[str, int]:
    """Parses `"data=2,model=4"` to axis -> number of devices; an axis that is not named has one.

    Raises:
      ValueError: for any other text.
    """
    sizes = {DATA: 1, MODEL: 1}
    named = set()
    for part in text.split(","):
        match = re.fullmatch(rf"\s*({DATA}|{MODEL})=([1-9]\d*)\s*", part)
        if match is None or match[1] in named:
            raise ValueError(
                f"--mesh {text!r} must give the devices along each axis, as data=2,model=4"
            )
        named.add(match[1])
        sizes[match[1]] = int(match[2])
    return sizes


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates the mesh with the axes `hosts`, `data` and `model`.

    Args:
      text: the mesh of one host, as `parse` accepts it.
      devices: the devices; by default all devices of every host.

    Raises:
      ValueError: if `text` is no mesh, or does not match the number of devices of every host.
    """
    sizes = parse(text)
    hosts: dict[int, list[jax.Device]] = {}
    for device in devices or jax.devices():
        hosts.setdefault(device.process_index, []).append(device)
    for own in hosts.values():
        if len(own) != math.prod(sizes.values()):
            raise ValueError(
                f"--mesh {text!r} needs {math.prod(sizes.values())} devices, but a host has "
                f"{len(own)}; the product of the axes must be {len(own)}"
            )
    shape = (sizes[DATA], sizes[MODEL])
    laid_out = [mesh_utils.create_device_mesh(shape, hosts[index]) for index in sorted(hosts)]
    return Mesh(np.stack(laid_out), (HOSTS, DATA, MODEL))


def spec_of(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Returns the partition of a frozen weight.

    A dimension is not divided if its axis does not divide it evenly.

    Args:
      path: the `/`-joined path of the parameter.
      shape: the shape of the array.
      sizes: axis -> number of devices, of `parse`.

    Raises:
      ValueError: if no rule matches the path.
    """
    for pattern, axes in RULES:
        if re.fullmatch(pattern, path):
            pairs = zip(axes, shape, strict=False)
            return PartitionSpec(*(None if size % sizes[axis] else axis for axis, size in pairs))
    raise ValueError(
        f"no rule says how {path} of shape {tuple(shape)} is divided over a mesh; leave --mesh "
        "out, or add its name to compacter_jax/models/names.py"
    )


def bytes_of_part(frozen: Any, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of frozen weights on one device of a mesh.

    Args:
      frozen: a tree of the weights, or of their shapes and dtypes.
      sizes: axis -> number of devices, of `parse`.
    """

    def size(path: Any, leaf: Any) -> int:
        axes = spec_of(joined(path), leaf.shape, sizes)
        parts = math.prod(sizes[axis] for axis in axes if axis is not None)
        return math.prod(leaf.shape) * leaf.dtype.itemsize // parts

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size, frozen)))


def place(tree: Any, mesh: Mesh) -> Any:
    """Places every array on the mesh according to `spec_of`."""

    def put(path: Any, leaf: Any) -> Array:
        spec = spec_of(joined(path), leaf.shape, mesh.shape)
        return _put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places a whole copy of every array on every device."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def fetch(frozen: Any, mesh: Mesh) -> Any:
    """Gathers the weights that `place` divided over the axis `data`; to be called in a jitted step.

    Without this, the compiler divides products along `data`, too, and adds up their partial
    results, which are larger than the weights if a batch has many tokens. Use it in a function that
    `refetched` wraps.
    """

    def whole(path: Any, leaf: Array) -> Array:
        spec = spec_of(joined(path), leaf.shape, mesh.shape)
        if DATA not in spec:
            return leaf
        rest = PartitionSpec(*(None if axis == DATA else axis for axis in spec))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, rest))

    return jax.tree_util.tree_map_with_path(whole, frozen)


def refetched(function: Any) -> Any:
    """Returns `function` with a backward pass that fetches weights again, not storing them."""

    def keeps(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name not in _NOT_KEPT

    return jax.checkpoint(function, policy=keeps)


def joined(path: Sequence[Any]) -> str:
    """Returns the `/`-joined path of a parameter, or of the node of its arrays."""
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    # Each host reads the parts of its devices from its own copy, without communication.
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Array]:
    """Divides the rows of a host over the rows of its mesh.

    Raises:
      ValueError: if they do not divide evenly.
    """
    size, parts = len(next(iter(batch.values()))), mesh.shape[DATA]
    if size % parts:
        raise ValueError(
            f"a batch of {size} on a host cannot be divided over data={parts}; use a multiple of "
            f"{parts}"
        )
    rows = NamedSharding(mesh, PartitionSpec((HOSTS, DATA)))
    return {
        name: jax.make_array_from_process_local_data(rows, array) for name, array in batch.items()
    }


def own_part(mesh: Mesh) -> Mesh:
    """Returns the mesh of this host's devices."""
    own = mesh.local_mesh
    return Mesh(own.devices, own.axis_names)


def on_own_part(tree: Any, own: Mesh) -> Any:
    """Returns this host's view of arrays from `place` or `replicate`; nothing is copied."""

    def view(array: Array) -> Array:
        assert isinstance(array.sharding, NamedSharding)
        sharding = NamedSharding(own, array.sharding.spec)
        parts = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    return jax.tree.map(view, tree)
