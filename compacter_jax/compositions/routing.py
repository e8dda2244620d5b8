"""Routing: selects, for every row of a batch, the adapters that act on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

from compacter_jax.compositions.bank import Bank
from compacter_jax.compositions.base import Path, members_of
from compacter_jax.compositions.replacements import labels_apart, with_rest
from compacter_jax.methods.base import MethodConfig
from compacter_jax.paths import ADAPTER, OCCUPIED, SHARED

# The id of the plain backbone, without a member.
NO_ADAPTER = -1


@dataclasses.dataclass(frozen=True)
class Routing:
    """The members of a bank that the rows of a batch use.

    Attributes:
      bank: the bank.
      occupied: `[size]` bool, True for places that hold a member.
      ids: `[rows]` integers, or None.
      mix: weights `[size]` or `[rows, size]`, or separate ones for each site `[rows or 1, sites,
        size]`; or None. A model that is being initialised has neither `ids` nor `mix`.
    """

    bank: Bank
    occupied: Array | None = None
    ids: Array | None = None
    mix: Array | None = None

    def at(self, site: int, rows: int, batch: int) -> Routing:
        """Returns the routing at one site, for rows that are copies of a batch.

        Args:
          site: index of the site.
          rows: number of rows at the site, a multiple of `batch`.
          batch: number of rows that the model was called with.

        Raises:
          ValueError: if `ids` or `mix` has another number of rows than the batch.
        """
        ids, mix = self.ids, self.mix
        if mix is not None and mix.ndim == 3:
            mix = mix[:, site]
            mix = mix[0] if mix.shape[0] == 1 else mix
        if mix is None or mix.ndim == 1:
            given = batch if ids is None else ids.shape[0]
        else:
            given = mix.shape[0]
        if given != batch:
            name = "mix" if ids is None else "adapter_ids"
            raise ValueError(
                f"{name} has {given} rows, but the backbone is called with {batch}; give one "
                "entry for each row of the batch"
            )
        if ids is not None and rows > batch:
            ids = jnp.tile(ids, rows // batch)
        if mix is not None and mix.ndim == 2 and rows > batch:
            mix = jnp.tile(mix, (rows // batch, 1))
        return dataclasses.replace(self, ids=ids, mix=mix)

    def gather(self, stacked: Any) -> Any:
        """Gathers rows `[rows, …]` from leaves `[size, …]`; NaN for an id without a member."""
        assert self.ids is not None
        assert self.occupied is not None
        known = (self.ids >= 0) & (self.ids < self.bank.size)
        known &= jnp.take(self.occupied, self.ids, mode="clip")
        index = jnp.where(known, self.ids, self.bank.size)
        # A row of the plain backbone takes any member's leaf, and its result is replaced
        # afterwards.
        index = jnp.where(self.is_unadapted, 0, index)

        def take(leaf: Array) -> Array:
            return jnp.take(leaf, index, axis=0, mode="fill", fill_value=jnp.nan)

        return jax.tree.map(take, stacked)

    @property
    def is_unadapted(self) -> Array:
        """True for each row `[rows]` of the plain backbone."""
        assert self.ids is not None
        return (self.ids == NO_ADAPTER) & self.bank.allows_unadapted_rows

    def or_backbone(self, plain: Any, y: Any) -> Any:
        """Returns `y` `[rows, …]`, with `plain` in rows of the plain backbone."""
        plain = jnp.asarray(plain, y.dtype)
        return jnp.where(along(self.is_unadapted, y), plain, y)

    @property
    def weights(self) -> Array:
        """Weights of `mix`, with NaN for the weight of a place that holds no member."""
        assert self.mix is not None
        assert self.occupied is not None
        return jnp.where(self.occupied | (self.mix == 0), self.mix, jnp.nan)

    def choose(self, stacked: Array, own: Array) -> Array:
        """Returns one leaf of the bank per row, or a mixture of them, in place of `own`.

        A label has a probability if every member with a weight has the label. In rows where no
        member has a weight, the labels of the backbone count.

        Args:
          stacked: leaves of the members, `[size, …]`.
          own: leaf of the backbone, `[…]` or `[rows, …]`.

        Returns:
          `[…]` for a `mix` that all rows share, otherwise `[rows, …]`.
        """
        if self.mix is None:
            return self.or_backbone(own, self.gather(stacked))
        weights = self.weights.astype(stacked.dtype)
        values, lacking = labels_apart(stacked)
        mixed = jnp.tensordot(weights, values, axes=1, precision="highest")
        used = (weights != 0).astype(stacked.dtype)
        count = jnp.tensordot(used, lacking.astype(stacked.dtype), axes=1)
        rest, unused = along(1 - weights.sum(-1), mixed), along(used.sum(-1) == 0, mixed)
        return with_rest(mixed, count > 0, rest, unused, own)


def along(rows: Array, y: Array) -> Array:
    """Reshapes `[rows]` to `[rows, 1, …]`, to broadcast with `y`; keeps a scalar."""
    return rows.reshape(rows.shape + (1,) * (y.ndim - rows.ndim))


def mixing_sites(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the hosts at which a bank's members act, in the order of a `mix` by site.

    Args:
      params: parameters of a model with a bank.

    Returns:
      `/`-joined paths of modules of the backbone, including replaced norms and heads.
    """
    inside = (path for path in flatten_dict(dict(params)) if ADAPTER in path)
    return tuple(sorted({"/".join(path[: path.index(ADAPTER)]) for path in inside}))


def route(
    method: MethodConfig, params: Mapping[str, Any], adapter_ids: Any, mix: Any
) -> dict[Path, Routing]:
    """Returns path of each bank of a composition -> `Routing` of its members.

    Args:
      method: method of the model.
      params: parameters of the model; empty while it is being initialised.
      adapter_ids: `[batch]` integers, from 0 to `size - 1` or -1; with several banks a mapping from
        their `/`-joined names. The values are checked, except those of a tracer.
      mix: `[size]`, `[batch, size]` or `[batch or 1, sites, size]`; with several banks a mapping
        from their names.

    Raises:
      ValueError: if there is no bank, both or neither are given, a shape does not fit, or an id has
        no member.
    """
    banks = {member.path: member.bank for member in members_of(method) if member.bank is not None}
    given = {"adapter_ids": adapter_ids, "mix": mix}
    given = {name: value for name, value in given.items() if value is not None}
    if not banks and given:
        raise ValueError(
            f"{' and '.join(given)} given, but the method {method.kind!r} has no bank of adapters; "
            "build one with stack_adapters, or leave the argument out"
        )
    if not params:
        return {path: Routing(bank) for path, bank in banks.items()}
    if banks and len(given) != 1:
        raise ValueError(
            "a model with a bank of adapters needs either adapter_ids of shape [batch] or mix of "
            f"shape [{next(iter(banks.values())).size}]; got {' and '.join(given) or 'neither'}"
        )
    selections = {}
    for path, bank in banks.items():
        ((name, value),) = given.items()
        value = _of_bank(name, value, "/".join(path), len(banks))
        keys = (SHARED, *path, OCCUPIED)
        occupied: Any = functools.reduce(lambda tree, key: tree[key], keys, params)
        check = check_ids if name == "adapter_ids" else _check_mix
        check(value, bank, occupied)
        chosen = jnp.asarray(value)
        ids, mix = (chosen, None) if name == "adapter_ids" else (None, chosen)
        selections[path] = Routing(bank, occupied, ids, mix)
    return selections


def _of_bank(name: str, value: Any, path: str, count: int) -> Any:
    if isinstance(value, Mapping) and path in value:
        return value[path]
    if isinstance(value, Mapping) or count > 1:
        got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{name} has no entry for the bank {path!r}; for a composition with {count} banks it "
            f"must be a mapping by name of the bank, got {got}"
        )
    return value


def check_ids(ids: Any, bank: Bank, occupied: Any) -> None:
    """Raises ValueError if an id has no member, as far as the values are known.

    Args:
      ids: `[batch]` integers. The values of a tracer are not checked; a row whose id has no member
        is then NaN.
      bank: the bank, which has the number of members.
      occupied: `[size]` bool, True for places that hold a member.
    """
    if np.ndim(ids) != 1 or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise ValueError(
            f"adapter_ids has shape {np.shape(ids)} and dtype {jnp.result_type(ids)}; it must be "
            "integers of shape [batch]"
        )
    if isinstance(ids, jax.core.Tracer):
        return
    ids = np.asarray(ids)
    least = NO_ADAPTER if bank.allows_unadapted_rows else 0
    wrong = ids[(ids < least) | (ids >= bank.size)]
    if wrong.size:
        more = ", or -1 for the plain backbone" if bank.allows_unadapted_rows else ""
        raise ValueError(f"adapter_ids contains {int(wrong[0])}; use 0 to {bank.size - 1}{more}")
    if isinstance(occupied, jax.core.Tracer):
        return
    empty = ids[(ids >= 0) & ~np.asarray(occupied)[ids]]
    if empty.size:
        raise ValueError(
            f"adapter_ids contains {int(empty[0])}, but the bank has no member at this index yet; "
            "put one there with set_member"
        )


def _check_mix(mix: Any, bank: Bank, occupied: Any) -> None:
    del occupied  # a weight for an empty place is NaN
    shape = np.shape(mix)
    if not 1 <= len(shape) <= 3 or shape[-1] != bank.size:
        raise ValueError(
            f"mix has shape {shape}; it must be [{bank.size}], [batch, {bank.size}] or "
            f"[batch or 1, sites, {bank.size}]"
        )
    if not jnp.issubdtype(jnp.result_type(mix), jnp.floating):
        raise ValueError(f"mix has dtype {jnp.result_type(mix)}; it must be floating-point")
