"""Loss and update as one pure function, which `train.compute.compute` compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from compacter_jax.params import merge
from train.compute.mesh import fetch, refetched
from train.data.tokens import IGNORED

Batch = Mapping[str, Any]
Params = Any
# (parameters, batch, dropout key or None for none) -> logits
ApplyFunction = Callable[[Params, Batch, Array | None], Array]
# (logits, labels) -> [batch] losses; a `BatchLoss` if they depend on other rows
LossFunction = Callable[[Array, Array], Array]
# (parameters, batch) -> tree of [batch, …] arrays, from which a split is evaluated
OutputsFunction = Callable[[Params, Batch], Any]


class _FunctionOfBatch(Protocol):
    def __call__(self, outputs: Array, labels: Array, /, *, axis_name: str | None) -> Array: ...


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """A loss of rows that depends on the other rows of a batch, on all devices.

    Attributes:
      function: (outputs, labels, axis name) -> `[batch]` losses of this device's rows. With the
        name of a pmap axis it gathers the rows of the other devices.
      axis_name: the name of the pmap axis; None on one device or over a mesh, where the arrays are
        those of the whole batch.
    """

    function: _FunctionOfBatch
    axis_name: str | None = None

    def __call__(self, outputs: Array, labels: Array) -> Array:
        return self.function(outputs, labels, axis_name=self.axis_name)


class TrainState(NamedTuple):
    """State that a step changes; it holds arrays only, so that it can be donated and saved.

    Attributes:
      step: int32 scalar, the number of updates done.
      trained: the trained half of `compacter_jax.partition`.
      opt_state: the optimizer state of the trained leaves.
    """

    step: Array
    trained: Params
    opt_state: optax.OptState


class Hyperparameters(NamedTuple):
    """Numbers of the optimizer that are arguments of a step.

    Runs that differ only in these numbers share a compiled program.

    Attributes:
      learning_rate: the learning rate of this step.
      weight_decay: the weight decay of AdamW, relative to the learning rate.
      clip_norm: the maximum norm of the gradient.
    """

    learning_rate: Any
    weight_decay: Any
    clip_norm: Any


class StepMetrics(NamedTuple):
    """Metrics of a step, float32 scalars.

    Attributes:
      loss: the mean loss over the global batch.
      gradient_norm: the norm of the gradient of the trained leaves.
    """

    loss: Array
    gradient_norm: Array


def loss_function(kind: Literal["classification", "regression", "tokens"]) -> LossFunction:
    """Returns the per-example loss of a kind of task, computed in float32 for logits of any dtype.

    "classification" is the cross-entropy of `[batch, labels]` logits. "regression" is the squared
    error of `[batch, 1]` logits. "tokens" is the mean cross-entropy over the target tokens of an
    example, of `[batch, length, vocabulary]` logits and `[batch, length]` labels, which are
    `train.data.tokens.IGNORED` where there is no token.
    """
    if kind == "tokens":
        return lambda logits, labels: (
            -jnp.sum(token_log_likelihoods(logits, labels), -1)
            / jnp.maximum(jnp.sum(labels != IGNORED, -1), 1)
        )
    if kind == "regression":
        return lambda logits, scores: jnp.square(logits[:, 0].astype(jnp.float32) - scores)
    return cross_entropy


def token_log_likelihoods(logits: Array, labels: Array) -> Array:
    """Returns the log-likelihood of each label, `[…]` float32, 0 where the label is ignored.

    Args:
      logits: `[…, vocabulary]`.
      labels: `[…]` integers.
    """
    known = labels != IGNORED
    losses = cross_entropy(logits, jnp.where(known, labels, 0))
    return jnp.where(known, -losses, 0.0)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross-entropy of each label, `[…]` float32.

    It is NaN for a label outside of 0 to n - 1.

    Args:
      logits: `[…, n]`.
      labels: `[…]` integers.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    # Labels that are too large give NaN already; negative ones would index from the end.
    return jnp.where(labels < 0, jnp.nan, losses)


def loss_and_update(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    dropout_key: Array,
    *,
    apply: ApplyFunction,
    loss: LossFunction,
    tx: optax.GradientTransformationExtraArgs,
    accumulation_steps: int = 1,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    numbers: Hyperparameters | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Updates the trained half with one global batch.

    The loss is the weighted mean over the rows of the whole batch. It does not depend on how the
    batch is divided: several devices and accumulated parts give the gradient of one large batch. (A
    `BatchLoss` reads the rows of all devices, but of one accumulated part alone.)
    Gradients are taken with respect to the trained half, so that no gradient of a frozen weight is
    computed. Only gradients of trained leaves are averaged over devices.

    Args:
      state: the state before the update.
      frozen: the frozen half of `compacter_jax.partition`.
      batch: the rows of this device, of `train.data.batching.batches`.
      dropout_key: the key of the run; step, device and part are folded in.
      apply: the model.
      loss: a loss of `loss_function`.
      tx: the optimizer, of `compacter_jax.optimizer`.
      accumulation_steps: the number of parts into which this device's rows are divided, processed
        one after the other.
      axis_name: the name of the pmap axis; None on one device.
      mesh: the mesh over which `train.compute.mesh.place` divides the frozen half.
      numbers: hyperparameters passed to `tx` with the gradient; None for a `tx` with its own.

    Returns:
      The next state, and metrics that are equal on all devices.
    """
    if isinstance(loss, BatchLoss):
        loss = dataclasses.replace(loss, axis_name=axis_name)
    key = jax.random.fold_in(dropout_key, state.step)
    weight = jnp.sum(batch["weights"])
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        weight = jax.lax.pmean(weight, axis_name)

    def part_loss(trained: Params, part: Batch, part_key: Array) -> Array:
        weights = frozen if mesh is None else fetch(frozen, mesh)
        logits = apply(merge(trained, weights), part, part_key)
        return jnp.sum(loss(logits, part["labels"]) * part["weights"]) / weight

    if mesh is not None:
        part_loss = refetched(part_loss)

    def accumulate(total: Any, part_and_key: tuple[Batch, Array]) -> tuple[Any, None]:
        value = jax.value_and_grad(part_loss)(state.trained, *part_and_key)
        return jax.tree.map(jnp.add, total, value), None

    if accumulation_steps == 1:
        value, gradient = jax.value_and_grad(part_loss)(state.trained, batch, key)
    else:
        # A part takes every `accumulation_steps`-th row instead of consecutive rows: rows that are
        # divided over a mesh then stay on their devices.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1), dict(batch)
        )
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trained))
        keys = jax.random.split(key, accumulation_steps)
        (value, gradient), _ = jax.lax.scan(accumulate, zero, (parts, keys))
    if axis_name is not None:
        value, gradient = jax.lax.pmean((value, gradient), axis_name)
    given = {} if numbers is None else {"numbers": numbers}
    updates, opt_state = tx.update(gradient, state.opt_state, state.trained, **given)
    trained = optax.apply_updates(state.trained, updates)
    metrics = StepMetrics(value, optax.tree.norm(gradient))
    return TrainState(state.step + 1, trained, opt_state), metrics


def apply_function(
    module: Any,
    inputs: Sequence[str] = ("input_ids", "attention_mask", "token_type_ids"),
    named: Sequence[str] = (),
) -> ApplyFunction:
    """Returns a function that calls a module with the given inputs of a batch.

    Dropout is active if there is a key. If a batch has `adapter_ids`, they select the members of a
    bank for its rows; if it has `mix`, these are the weights of the members.

    Args:
      module: the module.
      inputs: keys of a batch that are positional arguments.
      named: keys of a batch that are keyword arguments.
    """

    def apply(params: Params, batch: Batch, dropout_key: Array | None) -> Array:
        return module.apply(
            {"params": params},
            *(batch[name] for name in inputs),
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            **routing(batch),
            **{name: batch[name] for name in named},
        )

    return apply


def routing(batch: Batch, copies: int = 1) -> dict[str, Array]:
    """Returns the keyword argument that routes rows to the members of a bank, if there is one.

    Args:
      batch: the batch, which may have `adapter_ids`, or `mix`, `[n]`, `[rows, n]` or `[rows, sites,
        n]`.
      copies: the number of consecutive copies of each row.
    """
    if (mix := batch.get("mix")) is not None:
        return {"mix": mix if mix.ndim == 1 else jnp.repeat(mix, copies, axis=0)}
    ids = batch.get("adapter_ids")
    return {} if ids is None else {"adapter_ids": jnp.repeat(ids, copies)}


def logits_of(apply: ApplyFunction) -> OutputsFunction:
    """Returns a function that computes the logits without dropout, `[batch, …]` float32."""
    return lambda params, batch: apply(params, batch, None).astype(jnp.float32)


def linear_schedule(learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Returns a schedule from 0 to `learning_rate` in `warmup_steps`, then to 0 at `total_steps`.

    The schedule computes on the host: a step takes the learning rate as an argument.
    """
    steps = [warmup_steps, max(total_steps, warmup_steps + 1)]
    rates = [learning_rate, 0.0]
    if warmup_steps:
        steps, rates = [0, *steps], [0.0, *rates]
    return lambda count: float(np.interp(count, steps, rates))


def adamw(
    *, decays: bool, clips: bool, members: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW, after clipping if `clips`, whose `update` takes `numbers`: `Hyperparameters`.

    The state is that of `optax.adamw` with a schedule; with `members`, that of `by_member`.
    """

    def of(numbers: Hyperparameters) -> optax.GradientTransformation:
        decay = numbers.weight_decay if decays else 0.0
        tx = optax.adamw(lambda count: numbers.learning_rate, weight_decay=decay)
        tx = by_member(tx) if members else tx
        return optax.chain(optax.clip_by_global_norm(numbers.clip_norm), tx) if clips else tx

    def update(
        updates: Any, state: Any, params: Any = None, *, numbers: Hyperparameters
    ) -> tuple[Any, Any]:
        return of(numbers).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(of(Hyperparameters(0.0, 0.0, 1.0)).init, update)


def by_member(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `tx` with a state of its own for each member of a bank.

    A member without rows in a batch has no gradient. Neither its parameters nor its moments and its
    number of steps change then: Adam's momentum and weight decay would move it otherwise. A member
    with rows is updated as if there were no others.

    Args:
      tx: the transformation; all leaves of its trees have a leading axis of members.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves = jax.tree.leaves(updates)
        # A gradient that is not a number counts, so that the run stops there.
        moves = jnp.stack([jnp.any(leaf != 0, range(1, leaf.ndim)) for leaf in leaves]).any(0)
        new, new_state = jax.vmap(tx.update)(updates, state, params)

        def keep(new: Array, old: Any) -> Array:
            return jnp.where(moves.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return jax.tree.map(lambda leaf: keep(leaf, 0), new), jax.tree.map(keep, new_state, state)

    return optax.GradientTransformation(jax.vmap(tx.init), update)
