"""Trained and frozen parameters: labels by path, partition, merge, counts, optimizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map

from compacter_jax.compositions.base import composed_members, members_of, own_path
from compacter_jax.messages import about, quote
from compacter_jax.methods.base import MethodConfig
from compacter_jax.nn.quantize import is_quantized, quantize
from compacter_jax.paths import (
    BIAS,
    FROZEN_HEAD,
    GROUPS,
    HEADS,
    NAMED_GROUPS,
    OWN_MODULES,
    Groups,
    check_groups,
    group_of,
    own_names,
)
from compacter_jax.patterns import compiled

Params = Any
Labels = Any

# A module is a norm if it has exactly these parameters, or if its name matches this pattern.
_NORM_LEAVES = ({"scale"}, {"scale", "bias"})
_NORM_NAME = re.compile(r"(.*/)?[^/]*(norm|(^|_)ln(?![a-z]))[^/]*", re.IGNORECASE)

TRAIN, FREEZE = "train", "freeze"


def label_params(
    params: Params,
    method: MethodConfig,
    rules: Sequence[tuple[str, str]] = (),
    *,
    groups: Groups | None = None,
) -> Labels:
    """Labels each leaf "train" or "freeze", as `method` needs it.

    Args:
      params: nested dict of arrays (or of their shapes).
      method: the method; it decides which of `GROUPS` are trained.
      rules: `(pattern, label)` pairs that take precedence over the method. A pattern is a regular
        expression that matches a whole `/`-joined path; the first match wins. `save_adapter` needs
        the labels to store leaves that only rules train.
      groups: names of the head, the layer norms and the pooler, the same as `groups` of the
        `Adapted` model. None means the built-in names; for a module of others, the function then
        raises an error if the method trains a head or norms that these names do not
        find. An empty mapping states that the built-in names find all of them.

    Returns:
      A tree of `params`' structure with a string at each leaf.

    Raises:
      ValueError: if a rule or a group matches no path; if a rule has another label, or a pattern
        that is not a regular expression or takes too long; if the method trains a group that the
        parameters lack, or have under an unknown name.
    """
    check_groups(groups)
    _check_pairs(rules)
    paths = list(flatten_dict(params, sep="/"))
    for name, pattern in (groups or {}).items():
        if not any(group_of(path, groups) == name.replace("_", " ") for path in paths):
            raise ValueError(
                f"groups[{name!r}]={quote(pattern)} matches no parameter of the backbone"
            )
    if not composed_members(method):
        _check_present(paths, method, groups or {})
    if groups is None:
        _check_found(paths, method, rules)
    for pattern, chosen in rules:
        if chosen not in (TRAIN, FREEZE):
            raise ValueError(
                f"label {quote(chosen, 100)} of pattern {quote(pattern)} must be 'train' or "
                "'freeze'"
            )
        if not any(_matches(pattern, path) for path in paths):
            raise ValueError(f"pattern {quote(pattern)} matches no parameter")

    def label(path: tuple[Any, ...], _: Any) -> str:
        joined = "/".join(path)
        for pattern, chosen in rules:
            if _matches(pattern, joined):
                return chosen
        return TRAIN if is_trained(joined) else FREEZE

    is_trained = _trained_by(method, groups)
    return path_aware_map(label, params)


def _check_pairs(rules: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError if `rules` are not pairs of a pattern and a label."""
    is_sequence = isinstance(rules, Sequence) and not isinstance(rules, str)
    if not is_sequence or not all(
        isinstance(rule, list | tuple) and len(rule) == 2 for rule in rules
    ):
        raise ValueError(
            f"rules={quote(rules, 100)} must be pairs of a pattern and a label, such as "
            "[('.*/norm/.*', 'train')]"
        )


def _matches(pattern: str, path: str) -> bool:
    """Returns True if a rule's pattern matches; raises ValueError for a broken or slow pattern."""
    if not isinstance(pattern, str):
        raise ValueError(f"rules: {quote(pattern)} is not a regular expression")
    with about("rules"):
        return compiled(pattern).fullmatch(path) is not None


def _check_present(paths: Sequence[str], method: MethodConfig, groups: Groups) -> None:
    """Raises ValueError if `method` trains a group that the parameters lack."""
    present = {group_of(path, groups) for path in paths}
    optional = method.optional_groups - {name.replace("_", " ") for name in groups}
    own = own_names(paths)
    if own is not None and any(map(own.has_labels, paths)):
        optional |= {"pooler"}  # which a classifier of the mean of the tokens does not have
    for group in sorted(method.trained_groups() - present - optional):
        name = group.replace(" ", "_")
        pattern = groups.get(name, GROUPS[group])
        fix = f"; {_named(name)}, or set train_{name}=False" if name in NAMED_GROUPS else ""
        raise ValueError(
            f"method {method.kind!r} trains the {group}, but no parameter is one: "
            f"no path matches {quote(pattern)}{fix}"
        )
    if method.trains_biases() and not any(BIAS.fullmatch(path) for path in paths):
        raise ValueError(f"method {method.kind!r} trains biases, but the parameters have none")


def _named(group: str) -> str:
    """Returns the advice how a user names a group of a backbone."""
    return (
        f"give Adapted and label_params groups={{'{group}': regular expression of the paths of "
        "its parameters or modules}"
    )


def _check_found(
    paths: Sequence[str], method: MethodConfig, rules: Sequence[tuple[str, str]]
) -> None:
    """Checks that the head and norms that a method trains are found in another module.

    A head under an unknown name would keep its initial values, and norms under unknown names would
    stay frozen. The check takes paths that the user's own rules match as known.
    """
    wanted = [member.method for member in members_of(method)]
    if any(one.trains_backbone for one in wanted) or own_names(paths) is not None:
        return
    ruled = {path for path in paths if any(_matches(rule, path) for rule, _ in rules)}
    norms = _norms(paths)
    heads = [path for path in paths if group_of(path) == "head"]
    if any(one.train_head for one in wanted) and not heads and not ruled - set(norms):
        raise ValueError(
            f"train_head=True, but no parameter is called {' or '.join(f'{n}/…' for n in HEADS)}, "
            f"so the head would stay as it was drawn (there are {_some(_beginnings(paths))}); "
            f"{_named('head')}, or set train_head=False"
        )
    missed = [path for path in norms if path not in ruled and group_of(path) != "layer norms"]
    if any(one.train_layer_norms for one in wanted) and missed:
        raise ValueError(
            f"train_layer_norms=True, but of {len(norms)} parameters of norms {len(missed)} "
            f"have names that are not known ({_some(missed)}) and would stay frozen; "
            f"{_named('layer_norms')}, or set train_layer_norms=False"
        )


def _beginnings(paths: Sequence[str]) -> list[str]:
    """Returns the top-level names of a backbone's parameters."""
    groups = ("rule", "adapters")
    return sorted({path.partition("/")[0] for path in paths if group_of(path) not in groups})


def _norms(paths: Sequence[str]) -> list[str]:
    """Returns the parameters that look like those of norms, outside of adapters and heads."""
    modules: dict[str, set[str]] = {}
    for path in paths:
        module, _, leaf = path.rpartition("/")
        modules.setdefault(module, set()).add(leaf)
    norms = {
        module
        for module, leaves in modules.items()
        if leaves in _NORM_LEAVES or _NORM_NAME.fullmatch(module)
    }
    return [
        path
        for path in paths
        if path.rpartition("/")[0] in norms
        and group_of(path) in ("layer norms", "backbone")
        and not FROZEN_HEAD.fullmatch(path)
    ]


def _some(names: Sequence[str]) -> str:
    """Returns the first names of many, for an error message of one line."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]))[:150] + more


def _trained_by(method: MethodConfig, groups: Groups | None) -> Callable[[str], bool]:
    """Returns a predicate on `/`-joined paths: True for a leaf that `method` trains."""
    members = composed_members(method)
    if members:
        # A member trains the same leaves as it would alone.
        alone = {member.path: _trained_by(member.method, groups) for member in members}

        def by_member(path: str) -> bool:
            owned = own_path(members, path)
            return owned is not None and owned[0].trained and alone[owned[0].path](owned[1])

        return by_member
    trained, biases = method.trained_groups(), method.trains_biases()

    def by_group(path: str) -> bool:
        group = group_of(path, groups)
        return group in trained or (biases and group != "head" and bool(BIAS.fullmatch(path)))

    return by_group


def partition(params: Params, labels: Labels) -> tuple[Params, Params]:
    """Splits `params` into `(trained, frozen)`, each with None in place of the other's leaves.

    JAX ignores None in a tree: gradients, norms, optimizer state and all-reduces of the trained
    half cover the trained leaves alone.

    Example:
      >>> partition({"a": 1, "b": 2}, {"a": "train", "b": "freeze"})
      ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    trained = jax.tree.map(lambda label, leaf: leaf if label == TRAIN else None, labels, params)
    frozen = jax.tree.map(lambda label, leaf: None if label == TRAIN else leaf, labels, params)
    return trained, frozen


def merge(trained: Params, frozen: Params) -> Params:
    """Merges the two halves that `partition` returns.

    Raises:
      ValueError: if a leaf is in both halves or in neither.

    Example:
      >>> merge({"a": 1, "b": None}, {"a": None, "b": 2})
      {'a': 1, 'b': 2}
    """

    def choose(path: Any, a: Any, b: Any) -> Any:
        if (a is None) == (b is None):
            where = "neither half" if a is None else "both halves"
            raise ValueError(f"{jax.tree_util.keystr(path)} is in {where}")
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(choose, trained, frozen, is_leaf=lambda x: x is None)


def cast_frozen(frozen: Params, dtype: Any) -> Params:
    """Returns the frozen half of `partition` in a smaller dtype, for the backbone to compute with.

    The layers still compute in the dtype of the module, and trained leaves keep their own dtype.
    int8 stores kernels of linear layers and the embeddings of the vocabulary (see
    `compacter_jax.nn.quantize`); biases, layer norms, convolutions and the small embeddings stay
    unchanged then. `save_adapter` needs the
    original half, or one in bfloat16.

    Args:
      frozen: nested dict of arrays, None where a leaf is trained. Adapters in it stay unchanged.
      dtype: bfloat16, float16, float32 or int8.

    Raises:
      ValueError: for another dtype; for int8, if no frozen leaf can be stored in it, or if the
        backbone is none of this library's, whose layers alone compute with it.
    """
    dtype = jnp.dtype(dtype)
    if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"frozen weights can be of a floating-point type or int8, not {dtype}")
    paths = list(flatten_dict(frozen, sep="/"))
    own = own_names(paths) if dtype == jnp.int8 else None
    if dtype == jnp.int8 and own is None:
        raise ValueError(
            f"int8 is for the weights of {OWN_MODULES}, whose layers compute with it; those of "
            f"other modules (here {_some(_beginnings(paths))}) can be of bfloat16"
        )

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        joined = "/".join(path)
        if leaf is None or group_of(joined) in ("adapters", "rule"):
            return leaf
        if own is None:
            return leaf.astype(dtype)
        if joined in (own.embeddings, *own.more_embeddings):
            return quantize(leaf, axis=1)
        is_linear = path[-1] == "kernel" and leaf.ndim == 2
        return quantize(leaf, axis=0) if is_linear else leaf

    cast_half = path_aware_map(cast, frozen)
    if dtype == jnp.int8 and not any(map(is_quantized, flatten_dict(cast_half).values())):
        raise ValueError(
            "no kernel is frozen, so int8 stores nothing: it is for methods that leave the "
            "backbone's kernels as they are, not for full fine-tuning"
        )
    return cast_half


@dataclasses.dataclass(frozen=True)
class Count:
    """Numbers of parameters.

    Attributes:
      trained: number of trained parameters.
      total: number of all parameters.
      groups: group -> (trained, total), for the groups that the parameters have.
    """

    trained: int
    total: int
    groups: Mapping[str, tuple[int, int]]


def count(params: Params, labels: Labels, groups: Groups | None = None) -> Count:
    """Counts parameters by group, trained and in total.

    Args:
      params: nested dict of arrays, or of their shapes.
      labels: result of `label_params`.
      groups: the `groups` that `label_params` received.
    """
    flat, flat_labels = flatten_dict(params, sep="/"), flatten_dict(labels, sep="/")
    sizes = dict.fromkeys(GROUPS, (0, 0))
    for path, leaf in flat.items():
        group = group_of(path, groups)
        trained, total = sizes[group]
        sizes[group] = (
            trained + (leaf.size if flat_labels[path] == TRAIN else 0),
            total + leaf.size,
        )
    sizes = {group: both for group, both in sizes.items() if both[1]}
    return Count(
        trained=sum(trained for trained, _ in sizes.values()),
        total=sum(total for _, total in sizes.values()),
        groups=sizes,
    )


def optimizer(
    tx: optax.GradientTransformation, labels: Labels
) -> optax.GradientTransformationExtraArgs:
    """Applies `tx` to the trained leaves; the frozen ones get zero updates and no state.

    The transformation accepts whole trees as well as the trained half of `partition`. Put clipping
    inside `tx`, so that it sees the gradients of trained leaves only.

    Args:
      tx: any optax transformation.
      labels: result of `label_params`.
    """

    def labels_of(tree: Any) -> Any:
        # Where a label says "freeze", the trained half has None, which is not a leaf.
        return jax.tree.map(lambda label, leaf: None if leaf is None else label, labels, tree)

    return optax.partition({TRAIN: tx, FREEZE: optax.set_to_zero()}, labels_of)
