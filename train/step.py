"""One pure loss-and-update function, jitted on one device or pmapped over several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compacter_jax.params import merge
from train.data import IGNORED, shard

Batch = Mapping[str, Any]
Params = Any
# (parameters, batch, dropout key or None for none) -> logits
ApplyFunction = Callable[[Params, Batch, Array | None], Array]
# (logits, labels) -> [batch] losses
LossFunction = Callable[[Array, Array], Array]
# (parameters, batch) -> tree of [batch, …] arrays, what a split is evaluated by
OutputsFunction = Callable[[Params, Batch], Any]

AXIS = "devices"


class TrainState(NamedTuple):
    """What a step changes: arrays only, so that it can be donated and saved.

    Attributes:
      step: int32 scalar, updates done.
      trained: trained half of `compacter_jax.partition`.
      opt_state: of the optimizer, for the trained leaves alone.
    """

    step: Array
    trained: Params
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """float32 scalars: mean loss over the global batch, norm of the trained leaves' gradient."""

    loss: Array
    gradient_norm: Array


def loss_function(kind: Literal["classification", "regression", "tokens"]) -> LossFunction:
    """Per-example loss: cross-entropy of `[batch, labels]`, squared error of `[batch, 1]` logits.

    For "tokens", the mean cross-entropy over an example's target tokens, of
    `[batch, length, vocabulary]` logits and `[batch, length]` labels that are `train.data.IGNORED`
    where there is none. Computed in float32 whatever the dtype of the logits.
    """
    if kind == "tokens":
        return lambda logits, labels: (
            -jnp.sum(token_log_likelihoods(logits, labels), -1)
            / jnp.maximum(jnp.sum(labels != IGNORED, -1), 1)
        )
    if kind == "regression":
        return lambda logits, scores: jnp.square(logits[:, 0].astype(jnp.float32) - scores)
    return lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), labels
    )


def token_log_likelihoods(logits: Array, labels: Array) -> Array:
    """Log-likelihood of each label: `[…, vocabulary]`, `[…]` -> `[…]` float32, 0 where ignored."""
    known = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(known, labels, 0)
    )
    return jnp.where(known, -losses, 0.0)


def loss_and_update(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    dropout_key: Array,
    *,
    apply: ApplyFunction,
    loss: LossFunction,
    tx: optax.GradientTransformation,
    accumulation_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update of the trained half from one global batch.

    The loss is the weighted mean over the rows of the whole batch, however it is divided: devices
    and accumulated parts give the gradient of one large batch. Gradients are taken with respect to
    the trained half, so that no gradient of a frozen weight exists, and only trained leaves are
    averaged over devices.

    Args:
      state: see `TrainState`.
      frozen: frozen half of `compacter_jax.partition`.
      batch: this device's rows, of `train.data.batches`.
      dropout_key: of the run; step, device and part are folded in.
      apply: the model.
      loss: of `loss_function`.
      tx: optimizer, `compacter_jax.optimizer`.
      accumulation_steps: parts to divide this device's rows into, one after the other.
      axis_name: of the pmap axis; None on one device.

    Returns:
      The next state, and metrics equal on all devices.
    """
    key = jax.random.fold_in(dropout_key, state.step)
    weight = jnp.sum(batch["weights"])
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        weight = jax.lax.pmean(weight, axis_name)

    def part_loss(trained: Params, part: Batch, part_key: Array) -> Array:
        logits = apply(merge(trained, frozen), part, part_key)
        return jnp.sum(loss(logits, part["labels"]) * part["weights"]) / weight

    def accumulate(total: Any, part_and_key: tuple[Batch, Array]) -> tuple[Any, None]:
        value = jax.value_and_grad(part_loss)(state.trained, *part_and_key)
        return jax.tree.map(jnp.add, total, value), None

    if accumulation_steps == 1:
        value, gradient = jax.value_and_grad(part_loss)(state.trained, batch, key)
    else:
        parts = jax.tree.map(lambda x: x.reshape(accumulation_steps, -1, *x.shape[1:]), dict(batch))
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trained))
        keys = jax.random.split(key, accumulation_steps)
        (value, gradient), _ = jax.lax.scan(accumulate, zero, (parts, keys))
    if axis_name is not None:
        value, gradient = jax.lax.pmean((value, gradient), axis_name)
    updates, opt_state = tx.update(gradient, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    metrics = StepMetrics(value, optax.tree.norm(gradient))
    return TrainState(state.step + 1, trained, opt_state), metrics


def apply_function(
    module: Any, inputs: Sequence[str] = ("input_ids", "attention_mask", "token_type_ids")
) -> ApplyFunction:
    """How the steps call a module: with these parts of a batch, dropout where there is a key."""

    def apply(params: Params, batch: Batch, dropout_key: Array | None) -> Array:
        return module.apply(
            {"params": params},
            *(batch[name] for name in inputs),
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )

    return apply


def logits_of(apply: ApplyFunction) -> OutputsFunction:
    """The logits without dropout, `[batch, …]` float32."""
    return lambda params, batch: apply(params, batch, None).astype(jnp.float32)


def linear_schedule(learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """From 0 up to `learning_rate` in `warmup_steps`, then linearly to 0 at `total_steps`."""
    decay_steps = max(total_steps - warmup_steps, 1)
    decay = optax.schedules.linear_schedule(learning_rate, 0.0, decay_steps)
    if not warmup_steps:
        return decay
    warmup = optax.schedules.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.schedules.join_schedules([warmup, decay], [warmup_steps])


@dataclasses.dataclass(frozen=True)
class Compute:
    """The compiled functions of a run, on one device (jit) or on several (pmap).

    Attributes:
      devices: what they run on.
      init_state: trained half -> placed `TrainState`.
      place: frozen half -> the same on every device.
      step: (state, frozen, host batch) -> (state, metrics); the state given is donated.
      outputs: (trained half of a state, frozen, host batch) -> what `OutputsFunction` gives, on
        the host.
      host_state: placed state -> one copy of it.
      place_state: inverse of `host_state`.
    """

    devices: Sequence[jax.Device]
    init_state: Callable[[Params], TrainState]
    place: Callable[[Params], Params]
    step: Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]
    outputs: Callable[[Params, Params, Batch], Any]
    host_state: Callable[[TrainState], TrainState]
    place_state: Callable[[TrainState], TrainState]


def make_compute(
    apply: ApplyFunction,
    loss: LossFunction,
    tx: optax.GradientTransformation,
    *,
    outputs: OutputsFunction | None = None,
    seed: int,
    accumulation_steps: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Compute:
    """Compiles `loss_and_update` and what evaluates a split for the given devices.

    Args:
      apply: as for `loss_and_update`, and so are `loss`, `tx` and `accumulation_steps`.
      loss: see there.
      tx: see there.
      outputs: what a split is evaluated by; by default the logits in float32.
      seed: of the dropout masks.
      accumulation_steps: see there.
      devices: by default all local ones. With several, a batch's rows are divided among them.
    """
    devices = list(devices or jax.local_devices())
    several = len(devices) > 1

    # The seed is an argument, not a constant: runs that differ in it alone share what is compiled.
    def update(
        state: TrainState, frozen: Params, batch: Batch, seed: Array
    ) -> tuple[TrainState, StepMetrics]:
        return loss_and_update(
            state,
            frozen,
            batch,
            jax.random.key(seed),
            apply=apply,
            loss=loss,
            tx=tx,
            accumulation_steps=accumulation_steps,
            axis_name=AXIS if several else None,
        )

    def forward(trained: Params, frozen: Params, batch: Batch) -> Any:
        return (outputs or logits_of(apply))(merge(trained, frozen), batch)

    def new_state(trained: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))

    if several:
        axes = (0, 0, 0, None)
        step = jax.pmap(update, AXIS, in_axes=axes, devices=devices, donate_argnums=0)
        evaluate = jax.pmap(forward, AXIS, devices=devices)
        place, host = _replicate(devices), _first_copy
        split = lambda batch: shard(batch, len(devices))  # noqa: E731
    else:
        step, evaluate = jax.jit(update, donate_argnums=0), jax.jit(forward)
        place, host = lambda tree: jax.device_put(tree, devices[0]), lambda tree: tree
        split = lambda batch: jax.device_put(dict(batch), devices[0])  # noqa: E731

    def run_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        state, metrics = step(state, frozen, split(batch), np.uint32(seed))
        return state, host(metrics)

    def run_outputs(trained: Params, frozen: Params, batch: Batch) -> Any:
        rows = jax.device_get(evaluate(trained, frozen, split(batch)))
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), rows) if several else rows

    def init_state(trained: Params) -> TrainState:
        # Copied: the step donates its state, and the caller's arrays must outlive it.
        return place(jax.jit(new_state)(jax.tree.map(np.array, trained)))

    return Compute(devices, init_state, place, run_step, run_outputs, host, place)


def _replicate(devices: Sequence[jax.Device]) -> Callable[[Any], Any]:
    """Puts a copy of every leaf on each device, as pmap wants it: a leading axis of devices."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def copy(leaf: Any) -> Array:
        row = np.asarray(leaf)[None]  # NumPy: nothing to compile for every shape
        shape = (len(devices), *row.shape[1:])
        rows = [jax.device_put(row, device) for device in devices]
        return jax.make_array_from_single_device_arrays(shape, sharding, rows)

    return lambda tree: jax.tree.map(copy, tree)


def _first_copy(tree: Any) -> Any:
    """The first device's copy of every leaf, without the leading axis, on the host."""
    return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0, ...], tree)
