"""Initial parameters of an adapted model, beside those of its backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.compilation import initial_shapes, initialiser, run_once
from compacter_jax.compositions.base import members_of, own_path
from compacter_jax.inject.adapted import Adapted
from compacter_jax.limits import check_memory
from compacter_jax.messages import mismatches, shorten
from compacter_jax.paths import REPLACED


class HasParams(Protocol):
    """An object with a tree of parameters: a `Backbone`, or a model of another library."""

    @property
    def params(self) -> Any: ...


def init_adapters(model: Adapted, backbone: HasParams, key: jax.Array, *inputs: Any) -> Any:
    """Returns the backbone's parameters with freshly initialised adapters beside them.

    Args:
      model: the adapted module.
      backbone: object with the backbone's `params`, which are used without a copy.
      key: random key of the adapters' initial values.
      *inputs: example arguments of a call; by default `model.backbone.dummy_inputs()`.

    Returns:
      A nested dict of arrays.

    Raises:
      ValueError: if `backbone.params` differ in names or shapes from those that `model.backbone`
        initialises; or as `Adapted` does.
    """
    given = flatten_dict(backbone.params, sep="/")
    _check_backbone(given, initial_shapes(model.backbone, *inputs))
    initial = initialiser(model, *inputs)

    # Leaves that are not returned are not computed: the backbone is not initialised.
    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {path: leaf for path, leaf in initial(key).items() if path not in given}

    check_memory("the adapters", jax.eval_shape(init, key), "use fewer members or a smaller method")
    new = run_once(init, key)
    members = members_of(model.method)
    for path, leaf in new.items():
        # A member's own norms and heads start with the values of the backbone, not with initial
        # ones.
        if f"/{REPLACED}/" in path and (owned := own_path(members, path)) is not None:
            new[path] = jnp.broadcast_to(given[owned[1]], leaf.shape)
    for part in model.method.inserted():
        new |= part.initial_values(model.backbone, given, new)
    return unflatten_dict({**given, **new}, sep="/")


def _check_backbone(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    left_over = [path for path in given if path not in wanted]
    missing = [path for path in wanted if path not in given]
    shapes = [
        f"{path} has shape {given[path].shape}, not {wanted[path].shape}"
        for path in given
        if path in wanted and given[path].shape != wanted[path].shape
    ]
    if left_over or missing or shapes:
        raise ValueError(
            shorten(
                "the parameters do not match the backbone; "
                f"{mismatches(missing, left_over, shapes)}"
            )
        )
