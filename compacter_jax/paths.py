"""Paths of parameters: the names in a parameter tree, and the group of every path."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from compacter_jax.messages import about, quote
from compacter_jax.models.names import NAMES, Names
from compacter_jax.patterns import Pattern, compiled

# The name under which a host keeps the parameters of its adapter: `…/adapter/…`.
ADAPTER = "adapter"


def _of_all_families(field: str) -> tuple[str, ...]:
    """Returns the names in a field of `Names`, of all families, each once."""
    return tuple(dict.fromkeys(name for own in NAMES.values() for name in getattr(own, field)))


def _one_of(names: Sequence[str]) -> str:
    return f"({'|'.join(map(re.escape, names))})"


# A head belongs to the task, so no method adapts it as a part of the backbone.
HEADS = _of_all_families("heads")


# Heads of the pre-training, whose norms stay frozen.
FROZEN_HEAD = re.compile(rf"{_one_of(_of_all_families('frozen_heads'))}/.*")


# Names in the parameters of a composition. `…/adapter/NAMES/replaced/…` holds a member's own copy
# of leaves of the host itself, such as a norm or the head. `adapters/NAMES/…` holds parameters that
# all adapters of a member share, and the flags of the occupied slots of a bank.
REPLACED = "replaced"


SHARED = "adapters"


OCCUPIED = "occupied"


# Group of parameters -> regular expression that matches whole `/`-joined paths. A caller can
# replace some of them, see `Adapted.groups`.
GROUPS: dict[str, str] = {
    "rule": r"(.*/)?phm_rule(_left|_right)?",
    "adapters": rf"(.*/)?{ADAPTER}/.*|(phm_(down|up)|prefix|intrinsic)_.*|{SHARED}/.*",
    "layer norms": rf"(?!{FROZEN_HEAD.pattern})(.*/)?{_one_of(_of_all_families('norms'))}/[^/]*",
    "head": rf"{_one_of(HEADS)}/.*",
    "pooler": rf"{_one_of(_of_all_families('poolers'))}/.*",
    "backbone": r".*",
}


# The first match wins: a norm within a head belongs to the head.
_PRECEDENCE = ("rule", "adapters", "head", "layer norms", "pooler", "backbone")


# The groups that `groups` can name for a module of others, as keys of the mapping.
NAMED_GROUPS = ("head", "layer_norms", "pooler")


Groups = Mapping[str, str]


def check_groups(groups: Groups | None) -> None:
    """Checks a `groups` argument of `Adapted` or `label_params`.

    Args:
      groups: mapping from names of `NAMED_GROUPS` to regular expressions; None for the built-in
        names.

    Raises:
      ValueError: if `groups` is not a mapping, a name is not in `NAMED_GROUPS`, or a value is not a
        regular expression.
    """
    if groups is None:
        return
    if not isinstance(groups, Mapping):
        raise ValueError(f"groups={quote(groups)} must be a mapping, such as {{'head': 'lm_head'}}")
    for name, pattern in groups.items():
        if name not in NAMED_GROUPS:
            raise ValueError(
                f"groups has no {quote(name)}; its names are {', '.join(NAMED_GROUPS)}"
            )
        if not isinstance(pattern, str):
            raise ValueError(f"groups[{name!r}]={quote(pattern)} is not a regular expression")
        with about(f"groups[{name!r}]"):
            compiled(pattern)


@functools.lru_cache
def _patterns(
    named: tuple[tuple[str, str], ...],
) -> tuple[tuple[str, Pattern | re.Pattern[str]], ...]:
    own = {name.replace("_", " "): rf"(?:{pattern})(/.*)?" for name, pattern in named}
    return tuple(
        (name, compiled(own[name]) if name in own else re.compile(GROUPS[name]))
        for name in _PRECEDENCE
    )


def group_of(path: str, groups: Groups | None = None) -> str:
    """Returns the group of `GROUPS` that a `/`-joined path belongs to.

    Args:
      path: path of a parameter.
      groups: regular expressions in place of the built-in ones, as in `Adapted`.
    """
    patterns = _patterns(tuple((groups or {}).items()))
    return next(name for name, pattern in patterns if pattern.fullmatch(path))


# The classes of this library's own backbones, for messages.
OWN_MODULES = ", ".join(NAMES)


def own_names(paths: Sequence[str]) -> Names | None:
    """Returns the names of the family that parameters are of; None for those of another module.

    Args:
      paths: `/`-joined paths of the parameters. Those of adapters and of heads do not matter.
    """
    backbone = [path for path in paths if group_of(path) not in ("rule", "adapters", "head")]
    for names in NAMES.values():
        if names.embeddings in backbone and all(map(names.has, backbone)):
            return names
    return None


def has_labels(path: str) -> bool:
    """Returns True if the last axis of a parameter has an entry for each label of a classifier."""
    return any(names.has_labels(path) for names in NAMES.values())


def fused_parts(path: str) -> tuple[str, ...]:
    """Returns the names of the linear layers that a module fuses, by its path; none of others."""
    last = path.rpartition("/")[2]
    return next((own.fused[last] for own in NAMES.values() if last in own.fused), ())


BIAS = re.compile("(.*/)?bias")
