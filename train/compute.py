"""The step and the evaluation of a run, compiled for the devices there are: one, several, hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compacter_jax.params import merge
from train.data import shard
from train.step import (
    ApplyFunction,
    Batch,
    LossFunction,
    OutputsFunction,
    Params,
    StepMetrics,
    TrainState,
    logits_of,
    loss_and_update,
)

AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Compute:
    """The compiled functions of a run: jit on one device, pmap over several, of all hosts.

    Where several hosts train together, each calls `step` with its own part of a batch, of
    `train.data.batches`, and all get the same state and metrics; `outputs` communicates with
    nobody, so hosts may evaluate different numbers of batches.

    Attributes:
      devices: what they run on, those of other hosts included.
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
      devices: by default all, of every host. With several, a batch's rows are divided among them.
    """
    devices = list(devices or jax.devices())
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
        # Each host passes and gets the part of its own devices.
        own = [device for device in devices if device.process_index == jax.process_index()]
        axes = (0, 0, 0, None)
        step = jax.pmap(update, AXIS, in_axes=axes, devices=devices, donate_argnums=0)
        evaluate = jax.pmap(forward, AXIS, devices=own)
        place, host, scalar = _replicate(own), _first_copy, _first_scalar
        split = lambda batch: shard(batch, len(own))  # noqa: E731
    else:
        step, evaluate = jax.jit(update, donate_argnums=0), jax.jit(forward)
        place, host = lambda tree: jax.device_put(tree, devices[0]), lambda tree: tree
        scalar = host
        split = lambda batch: jax.device_put(dict(batch), devices[0])  # noqa: E731

    def run_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        state, metrics = step(state, frozen, split(batch), np.uint32(seed))
        return state, scalar(metrics)

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


def _first_scalar(tree: Any) -> Any:
    """The same of scalars, on the device: nobody waits for the step that computes them."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)
