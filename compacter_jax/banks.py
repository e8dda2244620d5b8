"""Members of banks and other compositions: stacked from saved adapters, read, and replaced."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax import catalogue
from compacter_jax.adapter_files import read_saved
from compacter_jax.checkpoint import AdapterReader
from compacter_jax.compositions.bank import Bank, bank_of
from compacter_jax.compositions.base import Member, members_of, own_path, replaces
from compacter_jax.compositions.replacements import NO_LABEL
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import HasParams, init_adapters
from compacter_jax.messages import listing, quote, shorten
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.pooling import pooling_of_module
from compacter_jax.paths import OCCUPIED, SHARED, Groups, group_of, has_labels

Params = Any
# A folder of `save_adapter`, or the result of `load_adapter`.
Source = str | os.PathLike[str] | tuple[Adapted, Params]


@dataclasses.dataclass(frozen=True)
class _Backbone:
    module: Any
    params: Any


class _Loader:
    """A loader of adapters onto a backbone, each with its own number of labels."""

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._by_labels: dict[int | None, Any] = {_num_labels(backbone): backbone}
        self._reader = AdapterReader()

    def load(self, source: Source) -> tuple[Adapted, Params]:
        """Loads an adapter as `load_adapter` does; returns a pair unchanged."""
        if isinstance(source, tuple):
            return source
        saved = read_saved(source)
        labels = saved.settings["num_labels"]
        if also := saved.settings.get("also_trained"):
            raise ValueError(
                f"the adapter in {source} has its own {listing(also, 3)}, which the rules of "
                "label_params trained; a member of a composition can have only parameters that "
                "its method trains"
            )
        if labels not in self._by_labels:
            if not any(map(has_labels, saved.tensors)):
                # The tensors do not confirm the number of labels; the reader refuses tensors that
                # do not fit.
                return self._reader.join(Path(source), saved, self._backbone)
            self._by_labels[labels] = _with_labels(self._backbone, labels)
        return self._reader.join(Path(source), saved, self._by_labels[labels])


def stack_adapters(
    sources: Sequence[Source],
    backbone: Any,
    *,
    capacity: int | None = None,
    shared_rule: bool = False,
) -> tuple[Adapted, Params]:
    """Stacks adapters of one shape into a bank.

    Heads are stacked, too, padded to the largest number of labels. A label that a member lacks gets
    no probability; in a mixture, neither does a label that any member with a weight lacks. The
    backbone's own norms and head stay unchanged.

    Args:
      sources: folders written by `save_adapter`, or pairs of an adapted module and its parameters.
      backbone: object with `module` and `params`; its head may have any number of labels.
      capacity: number of places for members; by default the number of sources. `set_member` can
        fill the free places, and nothing is compiled again.
      shared_rule: True to store one rule for all members, whose rules must then be equal.

    Returns:
      A module that is called with `adapter_ids` or `mix`, as `Adapted` describes, and its
      parameters.

    Raises:
      ValueError: if there are no sources or more than `capacity`; if they differ in more than
        numbers and labels, and then the message lists the differences; or as `load_adapter` does.
    """
    capacity = len(sources) if capacity is None else capacity
    if not 1 <= len(sources) <= capacity:
        raise ValueError(
            f"{len(sources)} adapters were given for a bank with a capacity of {capacity}; give 1 "
            f"to {capacity}"
        )
    loader = _Loader(backbone)
    loaded = [loader.load(source) for source in sources]
    _check_equal(sources, [model for model, _ in loaded])
    first, _ = loaded[0]
    labels = [getattr(model.backbone, "num_labels", None) for model, _ in loaded]
    width = max((count for count in (*labels, _num_labels(backbone)) if count), default=None)
    bank = Bank(first.method, size=capacity, shared_rule=shared_rule)
    wide = _with_labels(backbone, width)
    model = Adapted(wide.module, bank, first.sites, first.param_dtype, first.groups)
    shapes = jax.eval_shape(lambda key: init_adapters(model, wide, key), jax.random.key(0))
    (member,) = members_of(bank)
    own = flatten_dict(wide.params, sep="/")
    members = [_own_leaves(member, params, first.groups) for _, params in loaded]
    params = {}
    for path, shape in flatten_dict(shapes, sep="/").items():
        owned = own_path((member,), path)
        if path in own:
            params[path] = own[path]
        elif owned is None:
            params[path] = jnp.arange(capacity) < len(sources)
        else:
            leaves = [leaves[owned[1]] for leaves in members]
            params[path] = _stacked(path, owned[1], leaves, shape, capacity)
    return model, unflatten_dict(params, sep="/")


def unstack(model: Adapted, params: Params) -> list[tuple[Adapted, Params]]:
    """Returns the members of a bank, each as an adapted module and its parameters.

    Args:
      model: an adapted module whose method is a `Bank`.
      params: its parameters.

    Raises:
      ValueError: if the method is not a bank.
    """
    bank_of(model.method)
    occupied = np.asarray(params[SHARED][OCCUPIED])
    return [get_member(model, params, int(index)) for index in np.flatnonzero(occupied)]


def get_member(model: Adapted, params: Params, which: int | str) -> tuple[Adapted, Params]:
    """Returns one member of a composition as a model of its own.

    Args:
      model: the adapted module of a composition.
      params: its parameters.
      which: name of the member, with the names of nested compositions joined by `/`. In a bank it
        is the index, after the name of the bank if the bank is nested (`"tasks/3"`).

    Returns:
      The adapted module and its parameters. Leaves of the backbone that the member does not replace
      are the composition's.

    Raises:
      ValueError: if there is no such member.
    """
    member, index = _find(model.method, which)
    flat = flatten_dict(params, sep="/")
    own, mine = {}, {}
    for path, leaf in flat.items():
        owned = own_path(members_of(model.method), path)
        if owned is not None and owned[0] == member:
            mine[owned[1]] = leaf if index is None or _is_common(member, path) else leaf[index]
        elif owned is None and not path.startswith(f"{SHARED}/"):
            own[path] = leaf
    labels = _labels_of(mine)
    alone = {**own, **{path: _narrow(path, leaf, labels) for path, leaf in mine.items()}}
    backbone = model.backbone if labels is None else model.backbone.clone(num_labels=labels)
    return model.clone(backbone=backbone, method=member.method), unflatten_dict(alone, sep="/")


def set_member(model: Adapted, params: Params, which: int | str, source: Source) -> Params:
    """Returns the parameters with another member in one place.

    All shapes stay the same, so nothing that was compiled for the model is compiled again.

    Args:
      model: the adapted module of a composition.
      params: its parameters; the function does not change them.
      which: the member, as for `get_member`; an empty place of a bank is filled.
      source: a folder written by `save_adapter`, or an adapted module and its parameters. The
        source may have another head if the composition does not use it, as in a `Stack` below the
        last member.

    Raises:
      ValueError: if there is no such place, or if the source differs from the other members in more
        than numbers and labels; the message lists the differences.
    """
    member, index = _find(model.method, which)
    given, given_params = _Loader(_plain_backbone(model, params)).load(source)
    _check_method(f"the adapter for {which!r}", given, member, model)
    leaves = _own_leaves(member, given_params, model.groups)
    flat = dict(flatten_dict(params, sep="/"))
    members = members_of(model.method)
    for path, leaf in flat.items():
        owned = own_path(members, path)
        if owned is None or owned[0] != member:
            continue
        new = _wide(owned[1], leaves[owned[1]], leaf.shape[-1])
        if index is None or _is_common(member, path):
            if index is not None and not np.array_equal(new, leaf):
                raise ValueError(
                    f"all members of the bank share one {path}, but the adapter for {which!r} has "
                    "a different one; build the bank with shared_rule=False"
                )
            _check_shape(path, new, leaf.shape)
            flat[path] = jnp.asarray(new, leaf.dtype)
        else:
            _check_shape(path, new, leaf.shape[1:])
            flat[path] = leaf.at[index].set(new)
    if index is not None:
        occupied = "/".join((SHARED, *member.path, OCCUPIED))
        flat[occupied] = flat[occupied].at[index].set(True)
    return unflatten_dict(flat, sep="/")


def _find(method: MethodConfig, which: int | str) -> tuple[Member, int | None]:
    """Returns the member that the names lead to, and its index if it is in a bank."""
    members = members_of(method)
    names = tuple(str(which).split("/"))
    for member in members:
        size = member.bank.size if member.bank is not None else None
        if size is None and member.path == names:
            return member, None
        in_bank = size is not None and member.path == names[:-1] and names[-1].isdigit()
        if in_bank and int(names[-1]) < (size or 0):
            return member, int(names[-1])
    known = [
        "/".join((*member.path, *([f"0 to {member.bank.size - 1}"] if member.bank else [])))
        for member in members
    ]
    raise ValueError(
        f"there is no member {quote(which, 100)}; the composition has {listing(known)}"
    )


def _num_labels(backbone: Any) -> int | None:
    return getattr(backbone.module, "num_labels", None)


def _with_labels(backbone: Any, labels: int | None) -> Any:
    """Returns the backbone with this number of labels; added labels get no probability."""
    if labels is None or _num_labels(backbone) in (None, labels):
        return backbone
    flat = flatten_dict(backbone.params, sep="/")
    flat = {path: _narrow(path, _wide(path, leaf, labels), labels) for path, leaf in flat.items()}
    module = backbone.module.clone(num_labels=labels)
    return _Backbone(module, unflatten_dict(flat, sep="/"))


def _wide(path: str, leaf: Any, width: int) -> Any:
    """Pads a leaf of a head with columns for labels that the head does not have."""
    if not has_labels(path) or leaf.shape[-1] >= width:
        return leaf
    fill = NO_LABEL if path.endswith("/bias") else 0.0
    pad = ((0, 0),) * (leaf.ndim - 1) + ((0, width - leaf.shape[-1]),)
    return jnp.pad(jnp.asarray(leaf), pad, constant_values=fill)


def _narrow(path: str, leaf: Any, labels: int | None) -> Any:
    """Removes the columns that `_wide` adds."""
    return leaf[..., :labels] if labels is not None and has_labels(path) else leaf


def _labels_of(leaves: Mapping[str, Any]) -> int | None:
    """Returns the number of labels of a head, or None if there is no classifier."""
    biases = (leaves[path] for path in leaves if has_labels(path) and path.endswith("/bias"))
    bias = next(biases, None)
    return None if bias is None else int(np.sum(np.asarray(bias) > NO_LABEL / 2))


def _own_leaves(member: Member, params: Params, groups: Groups | None) -> dict[str, Any]:
    """Returns the leaves of a one-adapter model that are not the plain backbone's."""
    flat = flatten_dict(params, sep="/")
    return {
        path: leaf
        for path, leaf in flat.items()
        if group_of(path) in ("adapters", "rule") or replaces(member, path, groups)
    }


def _is_common(member: Member, path: str) -> bool:
    """Returns True if the members of a bank share a leaf."""
    return member.bank is not None and member.bank.shared_rule and group_of(path) == "rule"


def _stacked(path: str, own: str, leaves: Sequence[Any], shape: Any, capacity: int) -> Any:
    """Returns one leaf of a bank; empty places get the numbers of the first member."""
    if group_of(own) == "rule" and shape.shape == leaves[0].shape:
        if any(not np.array_equal(leaf, leaves[0]) for leaf in leaves):
            raise ValueError(
                f"shared_rule=True, but the adapters have different values of {own}; leave "
                "shared_rule out"
            )
        return jnp.asarray(leaves[0])
    wide = np.stack([np.asarray(_wide(own, leaf, shape.shape[-1])) for leaf in leaves])
    empty = np.broadcast_to(wide[0], (capacity - len(leaves), *wide.shape[1:]))
    stacked = jnp.asarray(np.concatenate([wide, empty]))
    _check_shape(path, stacked, shape.shape)
    return stacked


def _check_shape(path: str, leaf: Any, wanted: tuple[int, ...]) -> None:
    if leaf.shape != wanted:
        raise ValueError(
            f"{path} has shape {leaf.shape}, but must have {wanted}; an adapter does not fit if "
            "it has more labels than the model's head, or if the layers of its backbone are "
            "stacked (nn.scan)"
        )


def _check_equal(sources: Sequence[Source], models: Sequence[Adapted]) -> None:
    first = models[0]
    wanted = Member((), first.method, replaces=frozenset({"head"}))
    for i, (source, model) in enumerate(zip(sources, models, strict=True)):
        name = f"adapter {i}" if isinstance(source, tuple) else f"the adapter in {Path(source)}"
        _check_method(name, model, wanted, first)


def _check_method(name: str, given: Adapted, wanted: Member, like: Adapted) -> None:
    """Raises ValueError with the list of differences if an adapter is not as wanted."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(given, name), getattr(like, name)) for name in ("sites", "groups")
    }
    if "head" in wanted.replaces:
        own, other = (getattr(each.backbone, "head", None) for each in (given, like))
        pairs["head"] = (own, other)
        pairs["pooling"] = (pooling_of_module(given.backbone), pooling_of_module(like.backbone))
    theirs, ours = catalogue.to_dict(given.method), catalogue.to_dict(wanted.method)
    for key in sorted(theirs.keys() | ours.keys()):
        pairs[key] = (theirs.get(key), ours.get(key))
    differences = [
        f"{key}: {quote(a, 60)}, not {quote(b, 60)}" for key, (a, b) in pairs.items() if a != b
    ]
    if differences:
        raise ValueError(shorten(f"{name} differs from the others; {'; '.join(differences)}"))


def _plain_backbone(model: Adapted, params: Params) -> HasParams:
    """Returns the backbone of a composition, with only the leaves that no member owns."""
    members = members_of(model.method)
    flat = {
        path: leaf
        for path, leaf in flatten_dict(params, sep="/").items()
        if own_path(members, path) is None and not path.startswith(f"{SHARED}/")
    }
    return _Backbone(model.backbone, unflatten_dict(flat, sep="/"))
