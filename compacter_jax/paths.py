"""Paths of parameters: the names in a parameter tree, and the group of every path."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from compacter_jax.messages import about, quote
from compacter_jax.patterns import Pattern, compiled

# The name under which a host keeps the parameters of its adapter: `…/adapter/…`.
ADAPTER = "adapter"


# Task heads, as `/`-joined paths. A head belongs to the task, so no method adapts it as a part of
# the backbone.
HEAD = r"(classifier|qa_outputs)/.*"


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
    "layer norms": r"(?!cls/)(.*/)?(LayerNorm|layer_norm|final_layer_norm)/[^/]*",
    "head": HEAD,
    "pooler": r"pooler/.*",
    "backbone": r".*",
}


# The first match wins: a norm within a head belongs to the head.
_PRECEDENCE = ("rule", "adapters", "head", "layer norms", "pooler", "backbone")


# The groups that `groups` can name for a module other than `Bert` and `T5`, as keys of the mapping.
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
    """Returns the group of `GROUPS` that a `/`-joined path belongs to.

    Args:
      path: path of a parameter.
      groups: regular expressions in place of the built-in ones, as in `Adapted`.
    """
    patterns = _patterns(tuple((groups or {}).items()))
    return next(name for name, pattern in patterns if pattern.fullmatch(path))


# The first names in the paths of `Bert` and `T5`. Every path begins with one of them, and every
# tree has one of the embeddings.
_OWN_BEGINNINGS = frozenset(
    (
        *("embeddings", "encoder", "pooler", "classifier", "qa_outputs", "cls"),
        *("shared", "decoder", "lm_head"),
    )
)


_OWN_EMBEDDINGS = ("embeddings/word_embeddings/embedding", "shared/embedding")


def is_own(paths: Sequence[str]) -> bool:
    """Returns True if parameters have the names of `Bert` or `T5`; ignores adapters.

    Args:
      paths: `/`-joined paths of the parameters.
    """
    backbone = [path for path in paths if group_of(path) not in ("rule", "adapters")]
    begin = {path.partition("/")[0] for path in backbone}
    return begin <= _OWN_BEGINNINGS and any(path in backbone for path in _OWN_EMBEDDINGS)


BIAS = re.compile("(.*/)?bias")
