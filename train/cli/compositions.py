"""Compositions on the command line: `stack(runs/english/adapter, compacter++)`.

An expression denotes a composition of `compacter_jax`, such as `Stack`. Its leaves are presets,
which are new members, and folders of saved adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compacter_jax as cj
from compacter_jax.catalogue import COMPOSITIONS, from_dict, presets, to_dict
from compacter_jax.compositions.bank import Bank
from compacter_jax.compositions.base import Composition, members_of
from compacter_jax.messages import listing, quote
from compacter_jax.methods.base import MethodConfig
from train.cli.method_flags import given_options, is_composition, method_of, options_of

_KINDS = [kind for kind in COMPOSITIONS if kind != Bank.kind]


# Adapters of one shape, mixed at prediction by the weights of --mix.
MIX = "mix"


_WEIGHTED = ("average", "average_maps")


# Flag that accepts an expression -> an example.
_EXAMPLES = {
    "--method": "stack(language=runs/english/adapter, task=compacter++)",
    "--adapter": "average(0.7*runs/a/adapter, 0.3*runs/b/adapter)",
}


_TOKEN = re.compile(r"\s*([(),=*]|[^(),=*]+)")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A preset or a folder in an expression.

    Attributes:
      text: the text of the leaf.
      folder: the folder of the saved adapter; None for a preset.
      member: the member of the saved adapter that is meant, as for `compacter_jax.get_member`; None
        for the whole adapter.
    """

    text: str
    folder: Path | None
    member: str | None = None


@dataclasses.dataclass(frozen=True)
class Node:
    """A composition in an expression.

    Attributes:
      kind: a key of `COMPOSITIONS`, or `MIX` for a `Bank` of its members.
      names: the names of its members.
      weights: the weights of an average; empty if none are given.
      members: its members: leaves and other compositions.
    """

    kind: str
    names: tuple[str, ...]
    weights: tuple[float, ...]
    members: tuple[Leaf | Node, ...]

    def leaves(self) -> dict[str, Leaf]:
        """Returns path of names, `/`-joined -> leaf."""
        found: dict[str, Leaf] = {}
        for name, member in zip(self.names, self.members, strict=True):
            if isinstance(member, Leaf):
                found[name] = member
            else:
                found |= {f"{name}/{inner}": leaf for inner, leaf in member.leaves().items()}
        return found

    def places(self) -> dict[str, str]:
        """Returns path of names of a leaf -> its path for `compacter_jax.set_member`."""
        found: dict[str, str] = {}
        for at, (name, member) in enumerate(zip(self.names, self.members, strict=True)):
            place = str(at) if self.kind == MIX else name
            if isinstance(member, Leaf):
                found[name] = place
            else:
                inner = member.places().items()
                found |= {f"{name}/{below}": f"{place}/{path}" for below, path in inner}
        return found

    def mixes(self) -> list[Node]:
        """Returns the mixes in the expression, itself included."""
        nodes = [member for member in self.members if isinstance(member, Node)]
        return [self] * (self.kind == MIX) + [each for node in nodes for each in node.mixes()]

    def presets(self) -> list[str]:
        """Returns the presets among the leaves, in order."""
        return [leaf.text for leaf in self.leaves().values() if leaf.folder is None]


def folder_of(folder: Path) -> Path:
    """Returns the folder of an adapter: `folder`, or `folder/adapter` in the output of `fit`."""
    candidates = (folder, folder / "adapter")
    return next(
        (path for path in candidates if (path / cj.checkpoint.CONFIG_NAME).exists()), folder
    )


def holds_adapter(folder: Path) -> bool:
    """Returns True if there is an adapter in `folder_of(folder)`."""
    return (folder_of(folder) / cj.checkpoint.CONFIG_NAME).exists()


def parse(text: str, flag: str = "--method") -> Node:
    """Parses an expression.

        expression = KIND "(" member { "," member } ")"
        member     = [ NAME "=" ] [ WEIGHT "*" ] ( expression | PRESET | FOLDER [ "#" MEMBER ] )

    KIND is stack, parallel, average or average_maps, and mix in `--adapter`. Names are 0, 1, … by
    default. Weights are for averages, and are given for all members or for none. The members of a
    mix are folders; its weights are those of `--mix`. `FOLDER#MEMBER` is one member of a saved
    composition.

    Args:
      text: the expression.
      flag: the flag that has the expression; only `--method` accepts presets.

    Raises:
      ValueError: for an expression that cannot be parsed, an unknown kind, or a leaf that is
        neither a preset nor the folder of an adapter.
    """
    parser = _Parser(text, flag)
    made = parser.expression()
    parser.end()
    if isinstance(made, Leaf):
        raise parser.error("it is empty")
    return made


class _Parser:
    """Recursive descent parser of one expression."""

    def __init__(self, text: str, flag: str):
        self._text, self._flag = text, flag
        self._tokens = [token.strip() for token in _TOKEN.findall(text.strip())]

    def error(self, why: str) -> ValueError:
        return ValueError(
            f"{self._flag} {quote(self._text, 100)} is not a valid composition: {why}; an example "
            f"is {_EXAMPLES[self._flag]!r}"
        )

    def expression(self) -> Leaf | Node:
        name = self._word()
        if self._peek() != "(":
            return self._leaf(name)
        kinds = _KINDS if self._flag == "--method" else [*_KINDS, MIX]
        if name not in kinds:
            raise self.error(f"{quote(name)} is not one of {', '.join(kinds)}")
        self._take("(")
        members = [self._member(name)]
        while self._peek() == ",":
            self._take(",")
            members.append(self._member(name))
        self._take(")")
        names, weights, values = zip(*members, strict=True)
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            raise self.error(f"give weights to all members of {name}, or to none")
        names = tuple(own or str(at) for at, own in enumerate(names))
        if name == MIX and any(isinstance(value, Node) for value in values):
            raise self.error("the members of mix are folders of adapters, not compositions")
        if name == MIX and len(set(names)) < len(names):
            raise self.error("the members of mix need different names")
        return Node(name, names, tuple(given), values)

    def end(self) -> None:
        if self._tokens:
            raise self.error(f"{quote(self._tokens[0])} comes after its end")

    def _member(self, kind: str) -> tuple[str | None, float | None, Leaf | Node]:
        name, weight = None, None
        if self._peek(1) == "=":
            name = self._word()
            self._take("=")
        if self._peek(1) == "*":
            weight = self._weight(self._word(), kind)
            self._take("*")
        return name, weight, self.expression()

    def _weight(self, text: str, kind: str) -> float:
        if kind not in _WEIGHTED:
            other = "; give the weights of a mix to --mix" if kind == MIX else ""
            raise self.error(f"only {' and '.join(_WEIGHTED)} take weights, not {kind}{other}")
        try:
            return float(text)
        except ValueError:
            raise self.error(f"{quote(text)} is not a number, as weights must be") from None

    def _leaf(self, text: str) -> Leaf:
        if text in presets():
            return Leaf(text, None)
        folder = folder_of(Path(text))
        if (folder / cj.checkpoint.CONFIG_NAME).exists():
            return Leaf(text, folder)
        before, mark, member = text.rpartition("#")
        if mark and holds_adapter(Path(before)):
            return Leaf(text, folder_of(Path(before)), member)
        if self._flag != "--method":
            raise self.error(f"{quote(text)} is not the folder of an adapter")
        raise self.error(
            f"{quote(text, 100)} is neither the folder of an adapter nor one of the presets "
            f"{', '.join(presets())}"
        )

    def _peek(self, at: int = 0) -> str | None:
        return self._tokens[at] if at < len(self._tokens) else None

    def _word(self) -> str:
        following = self._peek()
        if following is None or following in "(),=*":
            raise self.error(f"a name is missing before {following or 'the end'!r}")
        return self._tokens.pop(0)

    def _take(self, token: str) -> None:
        if self._peek() != token:
            raise self.error(f"{token!r} is missing before {self._peek() or 'the end'!r}")
        self._tokens.pop(0)


def composed(expression: Node, options: Any, trained: str | None) -> Composition:
    """Returns the method that an expression describes.

    Args:
      expression: the result of `parse`.
      options: changes to the presets, each for the presets that have the field.
      trained: the names of the members to train, `/`-joined, separated by commas; by default the
        presets.

    Raises:
      ValueError: for a name that no member has, options that no preset has, or members that cannot
        be composed; or if nothing would be trained.
    """
    leaves = expression.leaves()
    chosen = set(_trained_names(expression, trained))
    _check_options(expression.presets(), options)
    methods = {
        name: method_of(leaf.text, options_of(leaf.text, options))
        if leaf.folder is None
        else saved_method(leaf.folder, leaf.member)
        for name, leaf in leaves.items()
    }
    return _composition(expression, methods, chosen, "")


def saved_method(folder: Path, member: str | None = None) -> MethodConfig:
    """Returns the method of a saved adapter, or of one of its members.

    Raises:
      ValueError: if there is none; the message names its file.
    """
    try:
        method = from_dict(cj.read_adapter_config(folder)["method"])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if member is None:
        return method
    known = {"/".join(each.path): each.method for each in members_of(method) if not each.bank}
    if member not in known:
        raise ValueError(
            f"{folder} has no member {quote(member, 100)}; "
            + (f"it has {listing(known)}" if any(known) else "it is a single adapter")
        )
    return known[member]


def _trained_names(expression: Node, trained: str | None) -> list[str]:
    leaves = expression.leaves()
    if trained is None:
        if new := [name for name, leaf in leaves.items() if leaf.folder is None]:
            return new
        raise ValueError(
            "all members of the composition are saved adapters, which are not trained unless "
            f"--train-members names some of {listing(leaves)}"
        )
    names = [name.strip() for name in trained.split(",")]
    if unknown := [name for name in names if name not in leaves]:
        raise ValueError(
            f"--train-members names {quote(unknown[0])}; the members are {listing(leaves)}"
        )
    left = [name for name, leaf in leaves.items() if leaf.folder is None and name not in names]
    if left:
        raise ValueError(
            f"--train-members leaves out the preset {quote(left[0])}, which would keep its random "
            "initial values; name it, too"
        )
    return names


def _check_options(names: Sequence[str], options: Any) -> None:
    """Raises ValueError for an option that none of the presets has."""
    used = {key for name in names for key in given_options(options_of(name, options))}
    if unused := sorted(given_options(options).keys() - used):
        flag = "--" + unused[0].replace("_", "-")
        raise ValueError(
            f"{flag} applies to new members of a composition, but none of them "
            f"({listing(names) or 'all are saved adapters'}) has this field; leave it out"
        )


def _composition(
    node: Node, methods: Mapping[str, MethodConfig], trained: set[str], above: str
) -> Composition:
    members: list[MethodConfig] = []
    frozen = []
    for name, member in zip(node.names, node.members, strict=True):
        path = f"{above}{name}"
        if isinstance(member, Node):
            members.append(_composition(member, methods, trained, f"{path}/"))
            learns = any(each.startswith(f"{path}/") for each in trained)
        else:
            members.append(methods[path])
            learns = path in trained
        frozen += [] if learns else [name]
    if node.kind == MIX:
        _check_equal(node, members)
        return Bank(members[0], size=len(members), frozen=("0",) if frozen else ())
    weights = {"weights": node.weights} if node.weights else {}
    made: Composition = COMPOSITIONS[node.kind](
        *members, names=node.names, frozen=tuple(frozen), **weights
    )
    return made


def _check_equal(node: Node, members: Sequence[MethodConfig]) -> None:
    """Raises ValueError if members of a mix differ in their shapes, or are several adapters."""
    for name, member in zip(node.names, members, strict=True):
        if isinstance(member, Composition):
            raise ValueError(
                f"the members of a mix are single adapters, but {name} is a composition of "
                f"{listing(member.names)}; name one of them as in runs/tags#{member.names[-1]}"
            )
    first = to_dict(members[0])
    for name, member in zip(node.names, members, strict=True):
        own = to_dict(member)
        if differing := sorted(key for key in own | first if own.get(key) != first.get(key)):
            # Methods of two kinds differ in nearly every field.
            differing = ["kind"] if "kind" in differing else differing
            told = [
                f"{key}: {quote(own.get(key), 60)}, not {quote(first.get(key), 60)}"
                for key in differing
            ]
            raise ValueError(
                f"the members of a mix must have one shape, but {name} differs from "
                f"{node.names[0]}; {listing(told, 4, 140)}"
            )


class ChoosesMethod:
    """Base of the options of commands that accept a preset or a composition."""

    method: str
    train_members: str | None
    method_options: Any

    def check_method(self) -> None:
        """Checks the name and options of a preset; a composition is only parsed when it is used.

        Raises:
          ValueError: for an unknown preset, or for options that it lacks.
        """
        if not is_composition(self.method):
            method_of(self.method, self.method_options)

    def check_members(self) -> None:
        """Raises ValueError if members of a composition are named although the method is none."""
        if self.train_members is not None and not is_composition(self.method):
            raise ValueError(
                f"--train-members names members of a composition, but --method {self.method} is "
                "not a composition; leave it out"
            )

    @functools.cached_property
    def composition(self) -> Node | None:
        """Composition that `method` describes; None for a preset.

        Raises:
          ValueError: as `parse`.
        """
        return parse(self.method) if is_composition(self.method) else None

    def method_config(self) -> MethodConfig:
        """Returns the preset with the given changes, or the composition."""
        if self.composition is None:
            return method_of(self.method, self.method_options)
        return composed(self.composition, self.method_options, self.train_members)
