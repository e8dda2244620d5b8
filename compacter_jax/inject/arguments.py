"""The arguments and results of backbones and hosts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compacter_jax.inject.host_call import Placement
from compacter_jax.sites import BEFORE, Role, Site


def output_of(places: list[Placement], y: Any, path: str) -> int | None:
    """Returns the index of the adapted item in a host's result, or None for the whole result."""
    given = {place.site.output for place in places}
    if len(given) > 1:
        raise ValueError(
            f"sites {', '.join(repr(place.name) for place in places)} are different outputs of "
            f"the same host {path}; name only one of them"
        )
    index = given.pop()
    if index is None:
        is_parallel = any(place.site.role == "parallel" for place in places)
        return 0 if is_parallel and isinstance(y, tuple) else None
    if not isinstance(y, tuple | list) or index >= len(y):
        count = f"{len(y)} values" if isinstance(y, tuple | list) else type(y).__name__
        raise ValueError(
            f"site {places[0].name!r} has output={index}, but the host {path} returns {count}; "
            "choose another output, or leave output out for a host that returns an array"
        )
    return index


def with_item(y: Any, index: int, item: Any) -> Any:
    """Returns a tuple or list with another item at an index."""
    items = [*y[:index], item, *y[index + 1 :]]
    return y._make(items) if hasattr(y, "_make") else type(y)(items)


def split_args(
    site: Site, context: Any, path: str, args: Any
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Splits the arguments of a host, for a method that acts before it.

    Args:
      site: site where the method acts.
      context: flax's context of the call.
      path: `/`-joined path of the host.
      args: positional arguments of the host.

    Returns:
      `(x, context, join_args)`: the adapted value, the residual or None, and a function that puts
      the adapted value back among the arguments.

    Raises:
      ValueError: if the call of the host does not fit the role of the site.
    """
    role = site.role
    _check_arguments(role, context, path, args)
    first = {"join": 1, "attend": 1, "positions": 1}.get(role, 0)
    last = 4 if role == "attend" else first + 1
    x = tuple(args[first:last]) if role == "attend" else args[first]

    def join_args(x: Any) -> Any:
        changed = x if role == "attend" else (x,)
        return (*args[:first], *changed, *args[last:])

    return x, args[0] if role == "join" else None, join_args


def _check_arguments(role: Role, context: Any, path: str, args: Any) -> None:
    """Raises ValueError if the call of a host does not fit its role."""
    fits = len(args) >= {"join": 2, "attend": 4, "positions": 2}.get(role, 1)
    if fits and role == "attend":
        arrays = all(isinstance(x, jax.Array) and x.ndim == 4 for x in args[1:3])
        fits = arrays and isinstance(args[3], tuple | list)
    if fits and role == "output":
        fits = isinstance(args[0], jax.Array)
    if not fits:
        kinds = ("array" if isinstance(x, jax.Array) else type(x).__name__ for x in args[:4])
        given = ", ".join(kinds)[:100]
        wanted = BEFORE.get(role, "f(x), where x is an array")
        raise ValueError(
            f"a site of the role {role!r} needs a host that is called as {wanted}, but "
            f"{type(context.module).__name__}.{context.method_name} at {path or 'the top'} is "
            f"called with ({given}); move the computation into a method with these arguments, and "
            "name the method: Site(host=…, method=…)"
        )


# Arguments that make a backbone deterministic, or the opposite.
SWITCHES = ("deterministic", "train", "training", "is_training", "enable_dropout")


def is_deterministic(bound: inspect.BoundArguments) -> bool:
    """Returns True if dropout is off by the arguments, or the backbone takes no switch."""
    given = {
        parameter.name: parameter.default
        for parameter in bound.signature.parameters.values()
        if parameter.default is not parameter.empty
    } | dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    for name in SWITCHES:
        if (value := given.get(name)) is not None:
            return value if name == "deterministic" else not value
    return True


def make_room(arguments: dict[str, Any], count: int, config: Any) -> None:
    """Pads a call's arguments by `count` tokens in front, whose embeddings are replaced later."""
    ids = arguments.get("input_ids")
    if ids is not None:
        rows = getattr(config, "max_position_embeddings", None)
        limit = getattr(config, "max_positions", rows)
        if limit is not None and count + ids.shape[1] > limit:
            raise ValueError(
                f"prompt_length={count} and {ids.shape[1]} tokens together exceed the backbone's "
                f"{limit} positions, with max_position_embeddings={rows}; truncate to "
                f"{max(0, limit - count)} tokens"
            )
    # The filler may be any token but padding, because BERT sends no gradient through its embedding.
    token = 1 if getattr(config, "pad_token_id", None) == 0 else 0
    for name, filler in (("input_ids", token), ("attention_mask", 1), ("token_type_ids", 0)):
        if (array := arguments.get(name)) is not None:
            arguments[name] = jnp.pad(array, ((0, 0), (count, 0)), constant_values=filler)
    # The result has these tokens too, until `without_first` takes them away.
    for name, start in (
        ("position_ids", getattr(config, "first_position", 0)),
        ("word_positions", 0),
    ):
        if (positions := arguments.get(name)) is not None:
            first = jnp.broadcast_to(start + jnp.arange(count), (positions.shape[0], count))
            arguments[name] = jnp.concatenate([first, positions + count], axis=1)


def repeat_rows(arguments: dict[str, Any], copies: int) -> int:
    """Repeats a batch `copies` times; keeps arguments that do not have one row per row of it.

    Returns:
      The number of rows of the batch.
    """
    rows = max(np.shape(x)[0] for x in jax.tree.leaves(arguments) if np.ndim(x))

    def repeat(x: Any) -> Any:
        is_batch = np.ndim(x) > 0 and np.shape(x)[0] == rows
        return jnp.concatenate([jnp.asarray(x)] * copies) if is_batch else x

    for name, value in arguments.items():
        arguments[name] = jax.tree.map(repeat, value)
    return rows


def apart(y: Any, copies: int) -> tuple[Any, ...]:
    """Splits a result into those of the copies of a batch."""
    leaves, structure = jax.tree.flatten(y)
    parts = zip(*(jnp.split(leaf, copies) for leaf in leaves), strict=True)
    return tuple(jax.tree.unflatten(structure, part) for part in parts)


def is_own(backbone: nn.Module) -> bool:
    """Returns True if a backbone is one of this library's, whose layers are known."""
    return any(cls.__module__.startswith("compacter_jax.models.") for cls in type(backbone).__mro__)
