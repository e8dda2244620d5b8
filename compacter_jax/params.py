"""What is trained and what is frozen: labels by path, partition, merge, counts, optimizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, path_aware_map

from compacter_jax.config import (
    BIAS,
    GROUPS,
    BitFitConfig,
    Composition,
    FullFineTuningConfig,
    MethodConfig,
    PHMBottleneckConfig,
    group_of,
    members_of,
    own_path,
    parts_of,
)
from compacter_jax.quantize import is_quantized, quantize

Params = Any
Labels = Any

# What int8 is for, and the axis that a channel runs along: kernels of linear layers, and the
# vocabulary's embeddings.
_QUANTIZED = (
    (re.compile("(.*/)?kernel"), 0),
    (re.compile("(.*/)?(shared|word_embeddings)/embedding"), 1),
)

TRAIN, FREEZE = "train", "freeze"


def label_params(
    params: Params, method: MethodConfig, rules: Sequence[tuple[str, str]] = ()
) -> Labels:
    """Labels each leaf "train" or "freeze", as `method` wants it.

    Args:
      params: nested dict of arrays (or of their shapes).
      method: says which of `GROUPS` are trained.
      rules: `(pattern, label)` pairs that come before the method's; a pattern is a regular
        expression over the whole `/`-joined path, and the first match wins.

    Returns:
      A tree of `params`' structure with a string at each leaf.

    Raises:
      ValueError: if a rule matches no path or has another label, or the method trains a group
        that the parameters do not have.
    """
    paths = list(flatten_dict(params, sep="/"))
    if not isinstance(method, Composition):
        _check_present(paths, method)
    for pattern, chosen in rules:
        if chosen not in (TRAIN, FREEZE):
            raise ValueError(f"label {chosen!r} of pattern {pattern!r} must be 'train' or 'freeze'")
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"pattern {pattern!r} matches no parameter")

    def label(path: tuple[Any, ...], _: Any) -> str:
        joined = "/".join(path)
        for pattern, chosen in rules:
            if re.fullmatch(pattern, joined):
                return chosen
        return TRAIN if is_trained(joined) else FREEZE

    is_trained = _trained_by(method)
    return path_aware_map(label, params)


def _check_present(paths: Sequence[str], method: MethodConfig) -> None:
    """ValueError if `method` trains something of which there is nothing."""
    present = {group_of(path) for path in paths}
    for group in sorted(trained_groups(method) - present - _optional_groups(method)):
        raise ValueError(
            f"method {method.kind!r} trains the {group}, but no parameter is one: "
            f"no path matches {GROUPS[group]!r}"
        )
    if _trains_biases(method) and not any(BIAS.fullmatch(path) for path in paths):
        raise ValueError(f"method {method.kind!r} trains biases, but the parameters have none")


def _trained_by(method: MethodConfig) -> Callable[[str], bool]:
    """Whether `method` trains what is at a `/`-joined path."""
    if isinstance(method, Composition):
        members = members_of(method)
        # A member trains what it would if it were alone.
        alone = {member.path: _trained_by(member.method) for member in members}

        def by_member(path: str) -> bool:
            owned = own_path(members, path)
            return owned is not None and owned[0].trained and alone[owned[0].path](owned[1])

        return by_member
    trained, biases = trained_groups(method), _trains_biases(method)

    def by_group(path: str) -> bool:
        group = group_of(path)
        return group in trained or (biases and group != "head" and bool(BIAS.fullmatch(path)))

    return by_group


def _trains_biases(method: MethodConfig) -> bool:
    return any(isinstance(part, BitFitConfig) for part in parts_of(method))


def trained_groups(method: MethodConfig) -> set[str]:
    """The groups of `GROUPS` that `method` trains whole; BitFit trains biases of others too."""
    full = isinstance(method, FullFineTuningConfig)
    rules = [part.learn_phm for part in parts_of(method) if isinstance(part, PHMBottleneckConfig)]
    choices = {
        "rule": any(rules),
        "adapters": not full,
        "layer norms": method.train_layer_norms,
        "head": method.train_head,
        "pooler": method.train_pooler,
        "backbone": full,
    }
    return {group for group, chosen in choices.items() if chosen}


def _optional_groups(method: MethodConfig) -> set[str]:
    """Groups a backbone may lack without that being a mistake."""
    if isinstance(method, FullFineTuningConfig):
        return {"head", "pooler"}
    # Where a backbone has biases, BitFit adds nothing.
    return {"head", "adapters"} if isinstance(method, BitFitConfig) else {"head"}


def partition(params: Params, labels: Labels) -> tuple[Params, Params]:
    """Splits `params` into `(trained, frozen)`, each with None in place of the other's leaves.

    JAX sees no leaf where None stands: gradients, norms, optimizer state and all-reduces of the
    trained half are those of the trained leaves alone.

    Example:
      >>> partition({"a": 1, "b": 2}, {"a": "train", "b": "freeze"})
      ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    trained = jax.tree.map(lambda label, leaf: leaf if label == TRAIN else None, labels, params)
    frozen = jax.tree.map(lambda label, leaf: None if label == TRAIN else leaf, labels, params)
    return trained, frozen


def merge(trained: Params, frozen: Params) -> Params:
    """Inverse of `partition`.

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
    """The frozen half of `partition` in fewer bits; the backbone computes with it as with its own.

    What computes is still of the dtype of the module, and what is trained of its own. int8 is for
    kernels and the vocabulary's embeddings (see `compacter_jax.quantize`); biases, layer norms and
    the small embeddings then stay as they are. `save_adapter` wants the half as it was before, or
    of bfloat16.

    Args:
      frozen: nested dict of arrays, None where a leaf is trained. Adapters in it stay as they are.
      dtype: bfloat16, float16 or float32; or int8.

    Raises:
      ValueError: for another dtype, or if there is nothing for int8.
    """
    dtype = jnp.dtype(dtype)
    if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"frozen weights can be of a floating-point type or int8, not {dtype}")

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        joined = "/".join(path)
        if leaf is None or group_of(joined) in ("adapters", "rule"):
            return leaf
        if dtype != jnp.int8:
            return leaf.astype(dtype)
        axis = next((axis for pattern, axis in _QUANTIZED if pattern.fullmatch(joined)), None)
        return leaf if axis is None else quantize(leaf, axis)

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
      trained: all that are trained.
      total: all.
      groups: group -> (trained, total), for the groups that the parameters have.
    """

    trained: int
    total: int
    groups: Mapping[str, tuple[int, int]]


def count(params: Params, labels: Labels) -> Count:
    """Counts parameters by group, trained and in all; `params` may be arrays or shapes."""
    flat, flat_labels = flatten_dict(params, sep="/"), flatten_dict(labels, sep="/")
    groups = dict.fromkeys(GROUPS, (0, 0))
    for path, leaf in flat.items():
        group = group_of(path)
        trained, total = groups[group]
        groups[group] = (
            trained + (leaf.size if flat_labels[path] == TRAIN else 0),
            total + leaf.size,
        )
    groups = {group: sizes for group, sizes in groups.items() if sizes[1]}
    return Count(
        trained=sum(trained for trained, _ in groups.values()),
        total=sum(total for _, total in groups.values()),
        groups=groups,
    )


def optimizer(
    tx: optax.GradientTransformation, labels: Labels
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the trained leaves, zero updates and no state for the frozen ones.

    It takes whole trees as well as the trained half of `partition`. Put clipping inside `tx`:
    there it reads the gradients of trained leaves only.

    Args:
      tx: any optax transformation.
      labels: of `label_params`.
    """

    def labels_of(tree: Any) -> Any:
        # The trained half has None, no leaf at all, where a label says "freeze".
        return jax.tree.map(lambda label, leaf: None if leaf is None else label, labels, tree)

    return optax.partition({TRAIN: tx, FREEZE: optax.set_to_zero()}, labels_of)
