"""Compositions of adapters: their members, and the owners of their parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from compacter_jax.messages import listing, quote
from compacter_jax.methods.base import InsertedConfig, MethodConfig, SitesOf
from compacter_jax.methods.fields import did_you_mean, no_answer
from compacter_jax.paths import ADAPTER, BIAS, GROUPS, OCCUPIED, REPLACED, SHARED, Groups, group_of

if TYPE_CHECKING:
    from jax import Array

Path = tuple[str, ...]
# A layer's effect at a site: `(x, context) -> x`, with the adapted value `x` and a further value
# `context` that is read; arrays have one row for each row of the batch.
Act = Callable[[Any, Any], Any]
Combine = Callable[[str, Any, Any], Any]


class Leaf(NamedTuple):
    """A leaf of the backbone, or the leaf that rows of a batch have instead.

    Attributes:
      value: `[…]`, or `[rows, …]` if `by_row`.
      by_row: True if the value differs from row to row.
    """

    value: Array
    by_row: bool = False


EffectiveOf = Callable[[str, Leaf, int], Leaf]


@dataclasses.dataclass(frozen=True, init=False)
class Composition(MethodConfig):
    """The base of all compositions of adapters; a composition is a method.

    Members may be compositions themselves. A member owns the layer norms, the head, the pooler and,
    with BitFit, the biases that it trains; the backbone keeps its original ones. The fields
    `train_…` therefore belong to the members.

    Attributes:
      members: methods, given as positional arguments.
      names: names of the members in the parameter tree, `…/adapter/NAME/…`; by default 0, 1, ….
      frozen: names of members that are not trained.
    """

    members: tuple[MethodConfig, ...] = ()
    names: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __init__(self, *members: MethodConfig, **fields: Any) -> None:
        if members:
            fields["members"] = members
        known = {field.name: field.default for field in dataclasses.fields(self)}
        for name in fields.keys() - known.keys():
            raise ValueError(
                f"method {self.kind!r} has no field {quote(name, 100)}"
                f"{did_you_mean(name, list(known))}; its fields are {', '.join(known)}"
            )
        for name, default in known.items():
            object.__setattr__(self, name, fields.get(name, default))
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.members:
            raise ValueError(f"{self.kind} has no members; name at least one method")
        for name in ("train_layer_norms", "train_head", "train_pooler"):
            if getattr(self, name) != getattr(MethodConfig, name):
                raise ValueError(
                    f"{name} is set in each member of {self.kind!r}, not in the composition itself"
                )
        for member in self.members:
            if not member.inserted():
                raise ValueError(
                    f"method {member.kind!r} cannot be a member of {self.kind!r}: it changes "
                    "weights of the backbone; use a method that inserts parameters"
                )
        if not self.names:
            object.__setattr__(self, "names", tuple(map(str, range(len(self.members)))))
        self._check_names()
        self.copies()

    def _check_names(self) -> None:
        if len(self.names) != len(self.members) or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"names={quote(self.names)} must be {len(self.members)} different names, one for "
                "each "
                "member"
            )
        for name in self.names:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (REPLACED, OCCUPIED):
                raise ValueError(
                    f"{quote(name, 100)} cannot name a member; use letters, digits, '_', '-' and "
                    "'.', and "
                    f"neither {REPLACED!r} nor {OCCUPIED!r}"
                )
        for name in self.frozen:
            if name not in self.names:
                raise ValueError(
                    f"frozen names {quote(name, 100)}{did_you_mean(name, list(self.names))}, "
                    f"but the members are {listing(self.names)}"
                )

    def _refuse_added_tokens(self, why: str) -> None:
        """Raises ValueError if a method anywhere in the composition adds tokens to attend to."""
        for part in self.inserted():
            if part.adds_tokens:
                raise ValueError(f"method {part.kind!r} cannot be in {self.kind!r}: {why}")

    def _refuse_unjoined(self) -> None:
        if any(part.replaces_residual for part in self.inserted()):
            raise ValueError(
                f"original_ln_after=False cannot be in {self.kind!r}: the output of that member "
                "would replace the residual that the other members read; set it to True"
            )

    def inserted(self) -> tuple[InsertedConfig, ...]:
        """Returns the inserted methods of all members."""
        return tuple(part for member in self.members for part in member.inserted())

    def unmergeable(self, sites_of: SitesOf) -> str:
        """Returns why weights of the backbone cannot express the method."""
        del sites_of
        return "it is several adapters"

    def precomputed(
        self, params: Mapping[str, Any], sites_of: SitesOf
    ) -> tuple[MethodConfig, Mapping[str, Any]]:
        """Returns the composition and the parameters unchanged."""
        del sites_of
        return self, params

    def children(self) -> list[tuple[str, MethodConfig]]:
        """Returns the members with their names."""
        return list(zip(self.names, self.members, strict=True))

    def single_methods(self) -> tuple[Member, ...]:
        """Returns the single methods of the composition, in order."""
        return tuple(
            dataclasses.replace(
                member,
                path=(name, *member.path),
                trained=member.trained and name not in self.frozen,
                replaces=member.replaces - self.groups_of_others(name),
            )
            for name, child in self.children()
            for member in members_of(child, composed=True)
        )

    def map_weights(self) -> Mapping[str, float] | None:
        """Returns the weights of members whose linear maps are averaged, None for other kinds."""
        return None

    def groups_of_others(self, name: str) -> frozenset[str]:
        """Returns the groups of the backbone that a member can never own."""
        del name
        return frozenset()

    def copies(self) -> int:
        """Returns the number of copies that a model of the composition makes of each row."""
        copies = [copies_of(member) for member in self.members]
        if len(set(copies) - {1}) > 1:
            raise ValueError(
                f"the members {', '.join(self.names)} of {self.kind!r} return {copies} copies of "
                "each row; members with several copies must all have the same number"
            )
        return max(copies)

    def parallel_names(self) -> tuple[str, ...]:
        """Returns the names of the items if a call returns a tuple, see `parallel_names`."""
        return max((parallel_names(member) for member in self.members), key=len)

    def combine(self, child: Combine, x: Any, context: Any) -> Any:
        """Combines the effects of the members at one site.

        Args:
          child: `child(name, x, context)` is the effect of a member.
          x: adapted value, arrays `[rows, …]`.
          context: further value that is read, arrays `[rows, …]`.
        """
        raise no_answer(self, "combine", "compositions of named members need")

    def effective(self, child: EffectiveOf, own: Leaf, rows: int) -> Leaf:
        """Returns the leaf that a host uses in place of its own.

        Args:
          child: `child(name, own, rows)` is the leaf of a member.
          own: leaf of the backbone.
          rows: number of rows of the batch.
        """
        raise no_answer(self, "effective", "compositions of named members need")

    def chosen(self, own: Leaf, stored: Array, choose: Callable[[Any, Any], Any]) -> Leaf:
        """Returns the leaf of the whole composition, if its members have no names.

        Args:
          own: leaf of the backbone.
          stored: stacked leaves of the members.
          choose: `choose(stored, own)` returns the leaf of the rows of a batch.
        """
        raise no_answer(self, "chosen", "compositions without named members need")


@dataclasses.dataclass(frozen=True)
class Member:
    """A single method of a composition.

    Attributes:
      path: names that lead to the member; empty outside of compositions, and in a bank that is the
        whole method.
      method: method of the member.
      bank: bank whose members it describes, or None.
      trained: True if the member is trained.
      replaces: groups of the backbone's parameters that the member has its own copy of: "layer
        norms", "head", "pooler" or "biases".
    """

    path: tuple[str, ...]
    method: MethodConfig
    bank: Any = None
    trained: bool = True
    replaces: frozenset[str] = frozenset()


def members_of(method: MethodConfig, composed: bool = False) -> tuple[Member, ...]:
    """Returns the single methods of a composition in order, or `method` itself as the only one.

    Args:
      method: any method.
      composed: True if `method` is a member of a composition.
    """
    if isinstance(method, Composition):
        return method.single_methods()
    return (Member((), method, replaces=replaced_groups(method) if composed else frozenset()),)


def composed_members(method: MethodConfig) -> tuple[Member, ...]:
    """Returns the single methods of a composition; none for any other method."""
    return members_of(method) if isinstance(method, Composition) else ()


def replaced_groups(method: MethodConfig) -> frozenset[str]:
    """Returns the groups of the backbone that a member has its own copy of."""
    choices = {
        # The head belongs to the task, so a member owns one even if it does not train it.
        "head": True,
        "layer norms": method.train_layer_norms,
        "pooler": method.train_pooler,
        "biases": method.trains_biases(),
    }
    return frozenset(group for group, chosen in choices.items() if chosen)


def own_path(members: tuple[Member, ...], path: str) -> tuple[Member, str] | None:
    """Returns the owner of a leaf of a composition, and the leaf's path in the owner's model.

    Args:
      members: members of the composition.
      path: `/`-joined path of the leaf.

    Returns:
      None for a leaf of the backbone, and for the flags of the occupied places of a bank.
    """
    parts = path.split("/")
    if parts[0] == SHARED:
        host, inside = [], parts[1:]
    elif ADAPTER in parts:
        split = parts.index(ADAPTER)
        host, inside = parts[:split], parts[split + 1 :]
    else:
        is_inserted = any(re.fullmatch(GROUPS[group], path) for group in ("rule", "adapters"))
        at_root = not members[0].path and is_inserted
        return (members[0], path) if at_root else None
    member = next(m for m in members if tuple(inside[: len(m.path)]) == m.path)
    rest = inside[len(member.path) :]
    if rest == [OCCUPIED]:
        return None
    if rest[0] == REPLACED:
        return member, "/".join((*host, *rest[1:]))
    own = rest if parts[0] == SHARED else (*host, ADAPTER, *rest)
    return member, "/".join(own)


def copies_of(method: MethodConfig) -> int:
    """Returns the number of copies that a model of `method` makes of each row."""
    return method.copies() if isinstance(method, Composition) else 1


def parallel_names(method: MethodConfig) -> tuple[str, ...]:
    """Returns the `/`-joined names of the items that a call returns; none if it is no tuple."""
    return method.parallel_names() if isinstance(method, Composition) else ()


def node_at(method: MethodConfig, path: Path) -> Any:
    """Returns the member of a composition that the names lead to."""
    for name in path:
        assert isinstance(method, Composition)
        method = dict(method.children())[name]
    return method


def combine(
    node: MethodConfig, acts: Mapping[Path, Act], x: Any, context: Any, path: Path = ()
) -> Any:
    """Combines the effects of the members of a composition at one site.

    Args:
      node: a method.
      acts: path of a member -> its effect; a member that is missing has no layer at this site.
      x: adapted value, arrays `[rows, …]`.
      context: further value that is read, arrays `[rows, …]`.
      path: path of `node`.
    """
    if path in acts:
        return acts[path](x, context)
    if not any(other[: len(path)] == path for other in acts):
        return x
    assert isinstance(node, Composition)
    members = dict(node.children())

    def child(name: str, x: Any, context: Any) -> Any:
        return combine(members[name], acts, x, context, (*path, name))

    return node.combine(child, x, context)


def replaces(member: Member, path: str, groups: Groups | None = None) -> bool:
    """Returns True if a member has its own leaf in place of the backbone's at `path`."""
    group = group_of(path, groups)
    bias = "biases" in member.replaces and group != "head" and BIAS.fullmatch(path)
    return bool(bias) or group in member.replaces
