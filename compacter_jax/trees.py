"""Checks that a tree holds the parameters of a module, before the tree is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict

from compacter_jax.compilation import backbone_of, initial_shapes
from compacter_jax.messages import listing, shorten
from compacter_jax.paths import ADAPTER
from compacter_jax.weights import check_finite

_Shape = tuple[int, ...]


def check_params(module: nn.Module, params: Any, doing: str, *, stacked: bool = False) -> bool:
    """Checks that `params` has the leaves and shapes that `module.init` makes, and no others.

    The shapes are unknown if neither the module nor the backbone that it adapts has `dummy_inputs`.
    Inside a transformation, where nothing is saved, the function does not compute them. In both
    cases it refuses only trees that no module has.

    Args:
      module: module that the parameters should belong to.
      params: tree of arrays.
      doing: description of the operation, the beginning of the message.
      stacked: True to accept a tree whose leaves all have one more axis in front.

    Returns:
      True if the leaves have one more axis.

    Raises:
      ValueError: if `params` is replicated, wrapped in `{"params": …}`, a half of `partition`, or
        made for another model. The message says which, and what to give instead.
    """
    leaves = jax.tree.leaves(params)
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    wanted: Mapping[str, _Shape] | None = None if is_traced else _shapes(module)
    reason = _no_tree(params, wanted)
    if reason is None:
        shapes = {path: tuple(leaf.shape) for path, leaf in _flat(params).items()}
        wanted = _with_unused(module, wanted, shapes)
        if stacked and _is_stacked(shapes, wanted):
            return True
        reason = _misfit(shapes, wanted)
    if reason is not None:
        raise ValueError(shorten(f"{doing} needs the model's parameters, but {reason}"))
    return False


def check_numbers(leaves: Mapping[str, Any]) -> None:
    """Checks that leaves to be saved hold neither NaN nor infinities, which readers refuse.

    Args:
      leaves: `/`-joined path -> array.

    Raises:
      ValueError: if a leaf holds one; the message names the leaf.
    """
    for path, leaf in leaves.items():
        check_finite("params", path, np.asarray(leaf))


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"/".join(map(str, path)): leaf for path, leaf in flatten_dict(params).items()}


def _no_tree(params: Any, wanted: Mapping[str, _Shape] | None) -> str | None:
    """Returns why `params` is not a tree of named arrays and the fix, or None if it is one."""
    if not isinstance(params, Mapping | FrozenDict):
        return f"params has type {type(params).__name__}; give the nested dict of arrays"
    if _is_wrapped(params, wanted):
        return 'params is {"params": …}, as `apply` takes it; give params["params"]'
    leaves = _flat(params)
    if absent := [path for path, leaf in leaves.items() if not hasattr(leaf, "shape")]:
        return (
            f"{len(absent)} of {len(leaves)} leaves are not arrays ({listing(absent, most=2)}), "
            "as in a half of partition; give merge(trained, frozen)"
        )
    return None


def _is_wrapped(params: Mapping[str, Any], wanted: Mapping[str, _Shape] | None) -> bool:
    is_own = any(path.startswith("params/") for path in wanted or ())
    return isinstance(params.get("params"), Mapping | FrozenDict) and not is_own


def _is_stacked(shapes: Mapping[str, _Shape], wanted: Mapping[str, _Shape] | None) -> bool:
    """Returns True if all leaves have one axis of the same size before those that are wanted."""
    first = {shape[:1] for shape in shapes.values()}
    if len(first) != 1 or first == {()}:
        return False
    if wanted is not None:
        return {path: shape[1:] for path, shape in shapes.items()} == wanted
    # No module consists of matrices only, all with the same number of rows.
    return all(len(shape) > 1 for shape in shapes.values())


def _misfit(shapes: Mapping[str, _Shape], wanted: Mapping[str, _Shape] | None) -> str | None:
    """Returns why leaves differ from those that are wanted and the fix, or None if they agree."""
    if _is_stacked(shapes, wanted):
        path, shape = next(iter(shapes.items()))
        return (
            f"every leaf has an additional leading axis of size {shape[0]} ({listing([path])} has "
            f"shape {shape}), as after replicating for pmap; give jax.tree.map(lambda x: x[0], "
            "params)"
        )
    if wanted is None:
        return None
    missing = sorted(wanted.keys() - shapes.keys())
    left_over = sorted(shapes.keys() - wanted.keys())
    other = [
        f"{path} has shape {shapes[path]}, not {wanted[path]}"
        for path in sorted(shapes.keys() & wanted.keys())
        if shapes[path] != wanted[path]
    ]
    if not (missing or left_over or other):
        return None
    has_adapters = any(f"/{ADAPTER}/" in path for path in left_over)
    fix = (
        "remove the adapters, as merge_adapter does"
        if has_adapters
        else "give all parameters of this model"
    )
    return (
        f"params does not match the model; missing: {listing(missing, most=2) or 'none'}; left "
        f"over: {listing(left_over, most=2) or 'none'}; of another shape: "
        f"{listing(other, most=2) or 'none'}; {fix}"
    )


def _shapes(module: nn.Module) -> dict[str, _Shape] | None:
    """Returns path -> shape of every leaf of `module.init`, or None without example inputs."""
    if not hasattr(backbone_of(module), "dummy_inputs"):
        return None
    return {path: tuple(leaf.shape) for path, leaf in initial_shapes(module).items()}


def _with_unused(
    module: nn.Module, wanted: Mapping[str, _Shape] | None, there: Mapping[str, _Shape]
) -> Mapping[str, _Shape] | None:
    """Returns `wanted` plus leaves of the backbone that are present, but unused by the method.

    An example is a norm that an adapter replaces.
    """
    if wanted is None or there.keys() <= wanted.keys() or not hasattr(module, "backbone"):
        return wanted
    own = _shapes(module.backbone) or {}
    return {**{path: own[path] for path in there if path in own}, **wanted}
