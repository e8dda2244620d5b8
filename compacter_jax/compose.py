"""Compositions at work: which member acts on which row, and with which parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

from compacter_jax.adapters import ParamFunction
from compacter_jax.config import (
    Average,
    Bank,
    Composition,
    Member,
    MethodConfig,
    Parallel,
    Stack,
    copies_of,
    members_of,
)
from compacter_jax.paths import ADAPTER, OCCUPIED, SHARED

Path = tuple[str, ...]
# A layer's effect at a site: `(state, context) -> state`, where a state is what is acted on, and a
# context what is read; arrays have a row of the batch each.
Act = Callable[[Any, Any], Any]

# The id of no member: the plain backbone.
PLAIN = -1
# Bias of a label that a member of a bank, or its backbone, does not have: no probability, no
# gradient.
NO_LABEL = -1e30


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which members of a bank the rows of a batch use.

    Attributes:
      bank: the bank.
      occupied: `[size]` bool, the slots that hold a member.
      ids: `[rows]` integers, or None.
      mix: `[size]` or `[rows, size]` weights, or for each site in turn `[rows or 1, sites, size]`;
        or None. A model that is being initialised has neither.
    """

    bank: Bank
    occupied: Array | None = None
    ids: Array | None = None
    mix: Array | None = None

    def at(self, site: int, rows: int, batch: int) -> Selection:
        """That of the site of this number, for rows that are copies of a batch.

        Args:
          site: its number.
          rows: how many there are here, a multiple of `batch`.
          batch: how many rows the model was called with.

        Raises:
          ValueError: if it is of another number of rows than the batch.
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
                f"{name} is of {given} rows, and the backbone is called with {batch}; "
                "give one for each row of the batch"
            )
        if ids is not None and rows > batch:
            ids = jnp.tile(ids, rows // batch)
        if mix is not None and mix.ndim == 2 and rows > batch:
            mix = jnp.tile(mix, (rows // batch, 1))
        return dataclasses.replace(self, ids=ids, mix=mix)

    def gather(self, stacked: Any) -> Any:
        """Of leaves `[size, …]` the rows' own, `[rows, …]`: NaN where there is no such member."""
        assert self.ids is not None
        assert self.occupied is not None
        known = (self.ids >= 0) & (self.ids < self.bank.size)
        known &= jnp.take(self.occupied, self.ids, mode="clip")
        index = jnp.where(known, self.ids, self.bank.size)
        # A row of the plain backbone takes any member's, to be replaced afterwards.
        index = jnp.where(self.is_plain, 0, index)

        def take(leaf: Array) -> Array:
            return jnp.take(leaf, index, axis=0, mode="fill", fill_value=jnp.nan)

        return jax.tree.map(take, stacked)

    @property
    def is_plain(self) -> Array:
        """`[rows]` bool: those of the plain backbone."""
        assert self.ids is not None
        return (self.ids == PLAIN) & self.bank.has_plain

    def or_plain(self, plain: Any, y: Any) -> Any:
        """`y` `[rows, …]`, in rows of the plain backbone `plain`."""
        plain = jnp.asarray(plain, y.dtype)
        return jnp.where(_along(self.is_plain, y), plain, y)

    @property
    def weights(self) -> Array:
        """`mix` with NaN where a weight is for a slot that holds no member."""
        assert self.mix is not None
        assert self.occupied is not None
        return jnp.where(self.occupied | (self.mix == 0), self.mix, jnp.nan)

    def choose(self, stacked: Array, own: Array) -> Array:
        """One leaf of the bank, or a mixture of them, where the backbone has `own`.

        A label has a probability where every member with a weight has it; whether the backbone
        does counts in rows that no member has a part in.

        Args:
          stacked: `[size, …]`.
          own: `[…]` or `[rows, …]`.

        Returns:
          `[…]` for a `mix` that all rows share, otherwise `[rows, …]`.
        """
        if self.mix is None:
            return self.or_plain(own, self.gather(stacked))
        weights = self.weights.astype(stacked.dtype)
        values, lacking = _labels_apart(stacked)
        mixed = jnp.tensordot(weights, values, axes=1, precision="highest")
        used = (weights != 0).astype(stacked.dtype)
        count = jnp.tensordot(used, lacking.astype(stacked.dtype), axes=1)
        rest, unused = _along(1 - weights.sum(-1), mixed), _along(used.sum(-1) == 0, mixed)
        return _with_rest(mixed, count > 0, rest, unused, own)


def _labels_apart(leaf: Array) -> tuple[Array, Array]:
    """A leaf with 0 for labels that it lacks, and which those are."""
    lacking = leaf <= NO_LABEL / 2
    return jnp.where(lacking, 0, leaf), lacking


def _with_rest(mixed: Array, lacking: Array, rest: Any, unused: Any, own: Array) -> Array:
    """A weighted sum of members' leaves, with what is missing from a sum of 1 the backbone's.

    That rest is often nothing but rounding, which must not be multiplied by `NO_LABEL`.

    Args:
      mixed: the sum, with 0 for labels that a member lacks.
      lacking: those that one with a weight lacks.
      rest: 1 less the sum of the weights.
      unused: where no member has a weight.
      own: the backbone's.
    """
    values, own_lacking = _labels_apart(own)
    # Added, not put in place, so that what is not a number stays so.
    return mixed + rest * values + jnp.where(lacking | (own_lacking & unused), NO_LABEL, 0)


def _along(rows: Array, y: Array) -> Array:
    """`[rows]` as `[rows, 1, …]`, to go with `y`; a scalar as it is."""
    return rows.reshape(rows.shape + (1,) * (y.ndim - rows.ndim))


class Shared(NamedTuple):
    """What the layers of a part share, as keyword arguments of a layer (or by site).

    Attributes:
      common: for all members of a bank, and where there is no bank.
      stacked: with a leading axis `size`.
    """

    common: dict[str, Any]
    stacked: dict[str, Any]

    def at(self, site: str) -> Shared:
        """That of one site, where prefixes are computed from it."""
        common, stacked = (
            {"hidden": tree[site]} if site in tree else {} for tree in (self.common, self.stacked)
        )
        return Shared(common, stacked)


def banked_shared(
    create: Callable[[ParamFunction], dict[str, Any]], param: ParamFunction, bank: Bank
) -> Shared:
    """What the layers of a bank's members share, each member's own.

    Args:
      create: makes it for one member with the `param` method it is given.
      param: the model's.
      bank: says how many there are, and whether a rule is one for all.
    """
    one: dict[str, Array] = {}
    many: dict[str, Array] = {}

    def declare(name: str, init: Any, *args: Any) -> Array:
        if bank.shared_rule and name.startswith("phm_rule"):
            one[name] = param(name, init, *args)
            return one[name]

        def init_many(key: Array, *args: Any) -> Array:
            return jax.vmap(lambda key: init(key, *args))(jax.random.split(key, bank.size))

        many[name] = param(name, init_many, *args)
        return many[name][0]

    first = create(declare)
    if not many:
        return Shared(first, {})
    stacked = jax.vmap(lambda own: create(lambda name, *_: (one | own)[name]))(many)
    common = {"rule": first["rule"]} if one else {}
    return Shared(common, {name: value for name, value in stacked.items() if name not in common})


class Call(NamedTuple):
    """How a layer is called.

    Attributes:
      inputs: arrays `[rows, …]`.
      named: keyword arguments: arrays `[rows, …]`, or what is no array; without what is shared.
      plain: what the plain backbone has in place of the result, or None if it has nothing.
      how: `how(layer, *inputs, **named)`.
    """

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    plain: Any
    how: Callable[..., Any]

    def apply(self, layer: nn.Module, params: Any, key: Array | None, **shared: Any) -> Any:
        """The result, of a layer with these parameters and this key of dropout."""
        rngs = None if key is None else {"dropout": key}
        named = {**self.named, **shared}
        return layer.apply({"params": params}, *self.inputs, **named, rngs=rngs, method=self.how)


@dataclasses.dataclass(frozen=True)
class BankedLayer:
    """The layers of a bank at one site.

    Attributes:
      create: makes the layer of a member, without a scope; `create(folded=True)` where a bottleneck
        is not to build its weights.
      params: of the layers, each leaf `[size, …]`.
      selection: which rows use which.
      shared: what they share with those at other sites.
      key: of dropout, or None.
    """

    create: Callable[..., nn.Module]
    params: Any
    selection: Selection
    shared: Shared
    key: Array | None

    def __call__(self, call: Call) -> Any:
        """What each row's member, or the mixture of members, returns."""
        if self.selection.mix is not None:
            return self._mixed(call)
        y = self._routed(call)
        return y if call.plain is None else self.selection.or_plain(call.plain, y)

    def _routed(self, call: Call) -> Any:
        arrays = {name: value for name, value in call.named.items() if isinstance(value, Array)}
        others = {name: value for name, value in call.named.items() if name not in arrays}
        layer = self.create(folded=True)
        rows = call.inputs[0].shape[0]
        keys = None if self.key is None else jax.random.split(self.key, rows)

        def one(params: Any, stacked: Any, key: Any, inputs: Any, arrays: Any) -> Any:
            inputs, arrays = jax.tree.map(lambda x: x[None], (inputs, arrays))
            of_row = Call(inputs, {**arrays, **others}, None, call.how)
            y = of_row.apply(layer, params, key, **self.shared.common, **stacked)
            return jax.tree.map(lambda y: y[0], y)

        params, stacked = self.selection.gather((self.params, self.shared.stacked))
        return jax.vmap(one)(params, stacked, keys, call.inputs, arrays)

    def _mixed(self, call: Call) -> Any:
        if call.plain is None:
            raise ValueError(
                "members of a bank of prefix tuning add tokens to attend to, and no output that "
                "could be mixed; call the model with adapter_ids"
            )
        layer, weights = self.create(), self.selection.weights
        keys = None if self.key is None else jax.random.split(self.key, self.selection.bank.size)

        # One member after the other, computed again for the gradient: memory for one, not for all.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def add(total: Array, member: Any) -> tuple[Array, None]:
            params, stacked, key, weight = member
            y = call.apply(layer, params, key, **self.shared.common, **stacked)
            return total + _along(weight, y) * y, None

        members = (self.params, self.shared.stacked, keys, jnp.moveaxis(weights, -1, 0))
        shape = jax.eval_shape(
            lambda member: add(jnp.zeros(()), member)[0],
            jax.tree.map(lambda leaf: leaf[0], members),
        )
        rest = _along(1 - weights.sum(-1), shape) * call.plain
        rest = jnp.broadcast_to(rest, shape.shape).astype(shape.dtype)
        total, _ = jax.lax.scan(add, rest, members)
        return total.astype(call.inputs[0].dtype)


def combine(
    node: MethodConfig, acts: Mapping[Path, Act], state: Any, context: Any, path: Path = ()
) -> Any:
    """What a composition makes of a state at one site.

    Args:
      node: a method.
      acts: path of a member -> its effect; a member that is not here has no layer at this site.
      state: arrays `[rows, …]`.
      context: likewise.
      path: of `node`.
    """
    if path in acts:
        return acts[path](state, context)
    if not any(other[: len(path)] == path for other in acts):
        return state
    assert isinstance(node, Composition)
    children = [
        (child, (*path, name)) for name, child in zip(node.names, node.members, strict=True)
    ]
    if isinstance(node, Average):
        rest = 1 - sum(node.weights)
        total = rest * state if rest else 0
        for weight, (child, below) in zip(node.weights, children, strict=True):
            total += weight * combine(child, acts, state, context, below)
        return total
    if isinstance(node, Parallel):
        parts = []
        for i, (child, below) in enumerate(children):
            mine, read = _chunk(node, i, (state, context))
            parts.append(combine(child, acts, mine, read, below))
        return jnp.concatenate(parts)
    for child, below in children:
        state = combine(child, acts, state, context, below)
    return state


def _chunk(node: Parallel, index: int, tree: Any) -> Any:
    """The rows of the child `index` of a `Parallel`."""
    copies = [copies_of(child) for child in node.members]
    first, last = sum(copies[:index]), sum(copies[: index + 1])

    def cut(x: Any) -> Any:
        each = x.shape[0] // sum(copies)
        return x[first * each : last * each]

    return jax.tree.map(cut, tree)


class Leaf(NamedTuple):
    """A leaf of the backbone, or what rows of a batch have in its place.

    Attributes:
      value: `[…]`, or `[rows, …]` if `by_row`.
      by_row: whether it differs from row to row.
    """

    value: Array
    by_row: bool = False


def effective(
    node: MethodConfig,
    own: Leaf,
    stored: Mapping[Path, Array],
    select: Callable[[Path, int], Selection],
    rows: int,
    path: Path = (),
) -> Leaf:
    """What a host computes with, in place of a leaf of its own.

    Args:
      node: a method.
      own: the backbone's.
      stored: path of a member -> its leaf, `[size, …]` of a bank; a member that is not here has
        the backbone's.
      select: path of a bank and number of rows -> which rows use which of its members.
      rows: of the batch.
      path: of `node`.
    """
    if path in stored and not isinstance(node, Bank):
        return Leaf(stored[path])
    if path in stored:
        value = select(path, rows).choose(stored[path], own.value)
        return Leaf(value, own.by_row or value.ndim == stored[path].ndim)
    if not any(other[: len(path)] == path for other in stored):
        return own
    assert isinstance(node, Composition)
    children = list(zip(node.names, node.members, strict=True))

    def of_child(name: str, child: MethodConfig, own: Leaf, rows: int) -> Leaf:
        return effective(child, own, stored, select, rows, (*path, name))

    if isinstance(node, Stack):
        for name, child in children:
            own = of_child(name, child, own, rows)
        return own
    if isinstance(node, Average):
        leaves = [of_child(name, child, own, rows) for name, child in children]
        mixed: Any = 0
        lacking: Any = False
        for weight, (part, _) in zip(node.weights, leaves, strict=True):
            values, lacks = _labels_apart(part)
            mixed, lacking = mixed + weight * values, lacking | (lacks & (weight != 0))
        rest, unused = 1 - sum(node.weights), not any(node.weights)
        value = _with_rest(mixed, lacking, rest, unused, own.value)
        return Leaf(value, any(by_row for _, by_row in (own, *leaves)))
    assert isinstance(node, Parallel)
    parts: list[Array] = []
    for i, (name, child) in enumerate(children):
        count = rows // copies_of(node) * copies_of(child)
        mine = Leaf(_chunk(node, i, own.value), by_row=True) if own.by_row else own
        value, by_row = of_child(name, child, mine, count)
        parts.append(value if by_row else jnp.broadcast_to(value, (count, *value.shape)))
    return Leaf(jnp.concatenate(parts), by_row=True)


def run_with(
    host: nn.Module, own: Mapping[str, Any], leaves: Mapping[str, Leaf], x: Array
) -> Array:
    """A call of a host with some of its leaves replaced.

    Args:
      host: a module without parts of its own, such as a norm or a dense layer.
      own: its parameters.
      leaves: name -> what it is to have in place of its own.
      x: `[rows, …]`.
    """
    template: Any = host.clone(parent=None, name=None)
    same = {**own, **{name: leaf.value for name, leaf in leaves.items() if not leaf.by_row}}
    by_row = {name: leaf.value for name, leaf in leaves.items() if leaf.by_row}
    if not by_row:
        return template.apply({"params": same}, x)
    # What rows have in common is not batched: a kernel is multiplied with all of them at once.
    return jax.vmap(lambda mine, x: template.apply({"params": {**same, **mine}}, x))(by_row, x)


def mixing_sites(params: Mapping[str, Any]) -> tuple[str, ...]:
    """The hosts at which a bank's members act, in the order of a `mix` by site.

    Args:
      params: of a model with a bank.

    Returns:
      `/`-joined paths of modules of the backbone, those of replaced norms and heads included.
    """
    inside = (path for path in flatten_dict(dict(params)) if ADAPTER in path)
    return tuple(sorted({"/".join(path[: path.index(ADAPTER)]) for path in inside}))


def select(
    method: MethodConfig, params: Mapping[str, Any], adapter_ids: Any, mix: Any
) -> dict[Path, Selection]:
    """Path of each bank of a composition -> which rows use which of its members.

    Args:
      method: of the model.
      params: of the model; empty while it is being initialised.
      adapter_ids: `[batch]` integers, from 0 to `size - 1` or -1; with several banks a mapping of
        their names, `/`-joined. Checked where it is no tracer.
      mix: `[size]`, `[batch, size]` or `[batch or 1, sites, size]`; likewise.

    Raises:
      ValueError: if there is no bank, both or neither are given, a shape does not fit, or an id is
        of no member.
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
        return {path: Selection(bank) for path, bank in banks.items()}
    if banks and len(given) != 1:
        raise ValueError(
            "a model with a bank of adapters is called with adapter_ids=[batch] or with "
            f"mix=[{next(iter(banks.values())).size}]; given: {' and '.join(given) or 'neither'}"
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
        selections[path] = Selection(bank, occupied, ids, mix)
    return selections


def _of_bank(name: str, value: Any, path: str, count: int) -> Any:
    if isinstance(value, Mapping) and path in value:
        return value[path]
    if isinstance(value, Mapping) or count > 1:
        got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{name} has nothing for the bank {path!r}; a composition with {count} banks wants a "
            f"mapping of their names, got {got}"
        )
    return value


def check_ids(ids: Any, bank: Bank, occupied: Any) -> None:
    """ValueError unless every id is of a member, as far as the values are known.

    Args:
      ids: `[batch]` integers. Those of a tracer are not looked at: a row whose id is of no member
        is NaN then.
      bank: says how many there are.
      occupied: `[size]` bool.
    """
    if np.ndim(ids) != 1 or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise ValueError(
            f"adapter_ids is of shape {np.shape(ids)} and type {jnp.result_type(ids)}; it must be "
            "[batch] integers"
        )
    if isinstance(ids, jax.core.Tracer):
        return
    ids = np.asarray(ids)
    least = PLAIN if bank.has_plain else 0
    wrong = ids[(ids < least) | (ids >= bank.size)]
    if wrong.size:
        more = ", or -1 for the plain backbone" if bank.has_plain else ""
        raise ValueError(
            f"adapter_ids has {int(wrong[0])}, but the bank has members 0 to {bank.size - 1}{more}"
        )
    if isinstance(occupied, jax.core.Tracer):
        return
    empty = ids[(ids >= 0) & ~np.asarray(occupied)[ids]]
    if empty.size:
        raise ValueError(
            f"adapter_ids has {int(empty[0])}, a place of the bank that holds no member yet; put "
            "one there with set_member"
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
        raise ValueError(f"mix is of type {jnp.result_type(mix)}; weights are floating-point")


def stored_leaf(own: Array, member: Member) -> Array:
    """What a member has at first in place of a leaf of the backbone; of a bank, every member."""
    if member.bank is None:
        return own
    return jnp.broadcast_to(own, (member.bank.size, *own.shape))


class Mixed(NamedTuple):
    """What `minimize_entropy` returns.

    Attributes:
      weights: `[batch, n]`, or `[batch, sites, n]`, each row's found by itself; they sum to 1.
      logits: with these weights, `[batch, …, labels]`.
      entropies: `[batch, steps + 1]`, before every step and after the last, in nats.
    """

    weights: Array
    logits: Array
    entropies: Array


def minimize_entropy(
    logits_fn: Callable[..., Array],
    n: int,
    *inputs: Any,
    steps: int,
    learning_rate: float,
    mask: Any = None,
    sites: int | None = None,
) -> Mixed:
    """Finds for each example weights of `n` adapters with which its predictions are most certain.

    By gradient descent, from equal weights, on scores of which the weights are the softmax. No
    labels are needed, so it is done when predicting; examples do not see each other. All is one
    compiled program.

    Args:
      logits_fn: `logits_fn(weights, *inputs_of_one_example)` gives its logits, `[labels]` or
        `[length, labels]`; the weights are `[n]`, or `[sites, n]`. With a bank: `lambda mix, ids:
        model.apply({"params": params}, ids[None], mix=mix[None])[0]`. Nothing compiles anew for the
        same function; to change parameters, make them arguments of it, and pass
        `jax.tree_util.Partial(logits_fn, params)`.
      n: how many adapters there are.
      *inputs: arrays `[batch, …]`.
      steps: of gradient descent.
      learning_rate: of gradient descent.
      mask: `[batch, length]`, zero where a prediction does not count, such as at padding.
      sites: how many sites have weights of their own, `len(mixing_sites(params))`; None for the
        same at all.

    Raises:
      ValueError: if `n`, `steps` or `learning_rate` is not positive, or there are no inputs.

    References:
      Wang et al., Efficient Test Time Adapter Ensembling for Low-resource Language Varieties,
      Findings of EMNLP 2021, arXiv:2109.04877, section 3.
    """
    for name, value in (("n", n), ("steps", steps), ("learning_rate", learning_rate)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    if not inputs:
        raise ValueError("minimize_entropy wants inputs, arrays [batch, …], after n")
    if not isinstance(logits_fn, jax.tree_util.Partial):
        logits_fn = jax.tree_util.Partial(logits_fn)
    shape = (n,) if sites is None else (sites, n)
    return _minimize(logits_fn, inputs, mask, learning_rate, shape=shape, steps=steps)


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def _minimize(
    logits_fn: Callable[..., Array],
    inputs: tuple[Any, ...],
    mask: Any,
    learning_rate: Array,
    *,
    shape: tuple[int, ...],
    steps: int,
) -> Mixed:
    def one(inputs: tuple[Any, ...], mask: Any) -> Mixed:
        def objective(scores: Array) -> tuple[Array, Array]:
            logits = logits_fn(jax.nn.softmax(scores), *inputs)
            return _mean_entropy(logits, mask), logits

        def step(scores: Array, _: None) -> tuple[Array, Array]:
            (entropy, _), slope = jax.value_and_grad(objective, has_aux=True)(scores)
            return scores - learning_rate * slope, entropy

        scores, entropies = jax.lax.scan(step, jnp.zeros(shape), length=steps)
        last, logits = objective(scores)
        return Mixed(jax.nn.softmax(scores), logits, jnp.append(entropies, last))

    return jax.vmap(one)(inputs, mask)


def _mean_entropy(logits: Array, mask: Any) -> Array:
    """Mean entropy of the predictions, of logits `[…, labels]` and a mask `[…]` or None."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    entropies = -(jnp.exp(log_probabilities) * log_probabilities).sum(-1)
    if mask is None:
        return entropies.mean()
    counts = jnp.asarray(mask) != 0
    return (entropies * counts).sum() / jnp.maximum(counts.sum(), 1)
