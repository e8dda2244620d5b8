"""Paths of parameters: the names in a tree, and the groups that paths belong to."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from compacter_jax.messages import about, quote
from compacter_jax.patterns import Pattern, compiled

# Name of an adapter's parameters under its host: `…/adapter/…`.
ADAPTER = "adapter"


# Task heads, by `/`-joined paths: made for the task, so no method adapts them as a backbone.
HEAD = r"(classifier|qa_outputs)/.*"


# In a composition: `…/adapter/NAMES/replaced/…` are a member's own leaves of the host itself, its
# norm or head; `adapters/NAMES/…` what the adapters of a member share, and which slots of a bank
# are occupied.
REPLACED = "replaced"


SHARED = "adapters"


OCCUPIED = "occupied"


# Group of parameters -> regular expression over whole `/`-joined paths; see `groups` for others.
GROUPS: dict[str, str] = {
    "rule": r"(.*/)?phm_rule(_left|_right)?",
    "adapters": rf"(.*/)?{ADAPTER}/.*|(phm_(down|up)|prefix|intrinsic)_.*|{SHARED}/.*",
    "layer norms": r"(?!cls/)(.*/)?(LayerNorm|layer_norm|final_layer_norm)/[^/]*",
    "head": HEAD,
    "pooler": r"pooler/.*",
    "backbone": r".*",
}


# First match wins: a norm within a head is the head's.
_PRECEDENCE = ("rule", "adapters", "head", "layer norms", "pooler", "backbone")


# The groups whose names a backbone of others can say, as keys of a mapping.
NAMED_GROUPS = ("head", "layer_norms", "pooler")


Groups = Mapping[str, str]


def check_groups(groups: Groups | None) -> None:
    """Checks names of groups as `Adapted` and `label_params` take them.

    Args:
      groups: names of `NAMED_GROUPS` -> regular expressions; None for the built-in names.

    Raises:
      ValueError: if it is no mapping, has another name, or a value is no regular expression.
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
            raise ValueError(f"groups[{name!r}]={quote(pattern)} is no regular expression")
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
    """The group of `GROUPS` that a `/`-joined path belongs to.

    Args:
      path: of a parameter.
      groups: names in place of the built-in ones, see `Adapted`.
    """
    patterns = _patterns(tuple((groups or {}).items()))
    return next(name for name, pattern in patterns if pattern.fullmatch(path))


# How the parameters of `Bert` and `T5` begin: every one of them, and one that each tree has.
_OWN_BEGINNINGS = frozenset(
    (
        *("embeddings", "encoder", "pooler", "classifier", "qa_outputs", "cls"),
        *("shared", "decoder", "lm_head"),
    )
)


_OWN_EMBEDDINGS = ("embeddings/word_embeddings/embedding", "shared/embedding")


def is_own(paths: Sequence[str]) -> bool:
    """Whether parameters have the names of `Bert` or `T5`, adapters left out of account.

    Args:
      paths: `/`-joined.
    """
    backbone = [path for path in paths if group_of(path) not in ("rule", "adapters")]
    begin = {path.partition("/")[0] for path in backbone}
    return begin <= _OWN_BEGINNINGS and any(path in backbone for path in _OWN_EMBEDDINGS)


BIAS = re.compile("(.*/)?bias")
