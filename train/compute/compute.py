"""Compiled step and evaluation of a run, for one device, several devices, or a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compacter_jax.params import merge
from train.compute.mesh import make_mesh, on_own_part, own_part, place, replicate, shard_batch
from train.compute.step import (
    ApplyFunction,
    Batch,
    Hyperparameters,
    LossFunction,
    OutputsFunction,
    Params,
    StepMetrics,
    TrainState,
    logits_of,
    loss_and_update,
)
from train.data.batching import shard

AXIS = "devices"


class _Step(Protocol):
    def __call__(
        self,
        state: TrainState,
        frozen: Params,
        batch: Batch,
        numbers: Hyperparameters | None = None,
    ) -> tuple[TrainState, StepMetrics]: ...


@dataclasses.dataclass(frozen=True)
class Compute:
    """Compiled functions of a run: jit on one device or over a mesh, pmap over several devices.

    If several hosts train together, each calls `step` with its own part of a batch, of
    `train.data.batching.batches`, and all get the same state and metrics. `outputs` does not
    communicate, so hosts may evaluate different numbers of batches.

    Attributes:
      devices: the devices, including those of other hosts.
      init_state: trained half -> placed `TrainState`.
      place: frozen half -> the same on every device, or divided over the mesh.
      step: (state, frozen, host batch, numbers) -> (state, metrics). The state is donated; the
        numbers are None if the optimizer has its own.
      outputs: (trained half of a state, frozen, host batch) -> the result of `OutputsFunction`, on
        the host.
      host_state: placed state -> one copy on the host.
      place_state: inverse of `host_state`.
    """

    devices: Sequence[jax.Device]
    init_state: Callable[[Params], TrainState]
    place: Callable[[Params], Params]
    step: _Step
    outputs: Callable[[Params, Params, Batch], Any]
    host_state: Callable[[TrainState], TrainState]
    place_state: Callable[[TrainState], TrainState]


def make_compute(
    apply: ApplyFunction,
    loss: LossFunction,
    tx: optax.GradientTransformationExtraArgs,
    *,
    outputs: OutputsFunction | None = None,
    seed: int,
    accumulation_steps: int = 1,
    devices: Sequence[jax.Device] | None = None,
    mesh: str | None = None,
    by_pmap: bool | None = None,
) -> Compute:
    """Compiles `loss_and_update` and the outputs of a split for the given devices.

    Args:
      apply: the model, as in `train.compute.step.loss_and_update`.
      loss: the loss, as in `train.compute.step.loss_and_update`.
      tx: the optimizer, as in `train.compute.step.loss_and_update`.
      outputs: the outputs from which a split is evaluated; by default the logits in float32.
      seed: the seed of the dropout masks.
      accumulation_steps: the number of parts, as in `train.compute.step.loss_and_update`.
      devices: the devices, which share the rows of a batch; by default all of every host.
      mesh: the layout of each host's devices, as `train.compute.mesh.parse` accepts it, to divide
        the frozen half over them; by default every device has a whole copy.
      by_pmap: whether to compile by pmap rather than jit, without a mesh; by default for several
        devices.

    Raises:
      ValueError: as `train.compute.mesh.make_mesh`.
    """
    devices = list(devices or jax.devices())
    laid_out = None if mesh is None else make_mesh(mesh, devices)
    by_pmap = len(devices) > 1 if by_pmap is None else by_pmap
    axis_name = AXIS if by_pmap and mesh is None else None

    # Seed and numbers are arguments, not constants: runs that differ only in them share the
    # compiled program.
    def update(
        state: TrainState, frozen: Params, batch: Batch, constants: _Constants
    ) -> tuple[TrainState, StepMetrics]:
        return loss_and_update(
            state,
            frozen,
            batch,
            jax.random.key(constants.seed),
            apply=apply,
            loss=loss,
            tx=tx,
            accumulation_steps=accumulation_steps,
            axis_name=axis_name,
            mesh=laid_out,
            numbers=constants.numbers,
        )

    def forward(trained: Params, frozen: Params, batch: Batch) -> Any:
        return (outputs or logits_of(apply))(merge(trained, frozen), batch)

    if laid_out is not None:
        compiled = _on_mesh(update, forward, laid_out)
    elif axis_name:
        compiled = _on_several(update, forward, devices)
    else:
        compiled = _on_one(update, forward, devices[0])

    def new_state(trained: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))

    def init_state(trained: Params) -> TrainState:
        # Copied: the step donates its state, and the caller's arrays must outlive it.
        return compiled.place_state(jax.jit(new_state)(jax.tree.map(np.array, trained)))

    def step(
        state: TrainState, frozen: Params, batch: Batch, numbers: Hyperparameters | None = None
    ) -> tuple[TrainState, StepMetrics]:
        if numbers is not None:
            numbers = Hyperparameters(*map(np.float32, numbers))
        return compiled.step(state, frozen, batch, _Constants(np.uint32(seed), numbers))

    return Compute(
        devices,
        init_state,
        compiled.place,
        step,
        compiled.outputs,
        compiled.host_state,
        compiled.place_state,
    )


class _Constants(NamedTuple):
    """Scalars of a step that are the same on every device.

    Attributes:
      seed: the seed of the dropout masks.
      numbers: the hyperparameters of the optimizer.
    """

    seed: Any
    numbers: Hyperparameters | None


class _Compiled(NamedTuple):
    """Two compiled functions, and functions that place their arguments, named as in `Compute`."""

    step: Callable[[TrainState, Params, Batch, _Constants], tuple[TrainState, StepMetrics]]
    outputs: Callable[[Params, Params, Batch], Any]
    place: Callable[[Params], Params]
    place_state: Callable[[TrainState], TrainState]
    host_state: Callable[[TrainState], TrainState]


@functools.cache
def compiler_options(device: jax.Device) -> dict[str, bool] | None:
    """Returns compiler options for a step on a device: on a CPU, to keep the order of the program.

    By default XLA starts any operation that is ready, and keeps its arrays for longer. For
    BERT-base with 8 x 128 tokens that is a fifth more memory in the same time
    (`benchmarks/NOTES.md`).
    """
    if device.platform != "cpu":
        return None
    options = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    try:
        with jax.default_device(device):
            jax.jit(jnp.negative, compiler_options=options).lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError:  # XLA's options come and go with its versions
        return None
    return options


def _on_one(update: Any, forward: Any, device: jax.Device) -> _Compiled:
    """Compiles by jit for one device."""
    step = jax.jit(update, donate_argnums=0, compiler_options=compiler_options(device))
    evaluate = jax.jit(forward)

    def put(tree: Any) -> Any:
        return jax.device_put(tree, device)

    return _Compiled(
        lambda state, frozen, batch, constants: step(state, frozen, put(dict(batch)), constants),
        lambda trained, frozen, batch: jax.device_get(evaluate(trained, frozen, put(dict(batch)))),
        put,
        put,
        lambda state: state,
    )


def _on_several(update: Any, forward: Any, devices: Sequence[jax.Device]) -> _Compiled:
    """Compiles by pmap with replicated arrays; each host passes and gets its own devices' rows."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    step = jax.pmap(update, AXIS, in_axes=(0, 0, 0, None), devices=devices, donate_argnums=0)
    evaluate = jax.pmap(forward, AXIS, devices=own)
    replicate = _replicate(own)

    def run_step(
        state: TrainState, frozen: Params, batch: Batch, constants: _Constants
    ) -> tuple[TrainState, StepMetrics]:
        state, metrics = step(state, frozen, shard(batch, len(own)), constants)
        # They stay on the device, so that nothing waits here for the step.
        return state, jax.tree.map(lambda x: x.addressable_shards[0].data[0], metrics)

    def outputs(trained: Params, frozen: Params, batch: Batch) -> Any:
        rows = jax.device_get(evaluate(trained, frozen, shard(batch, len(own))))
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), rows)

    return _Compiled(run_step, outputs, replicate, replicate, _first_copy)


def _on_mesh(update: Any, forward: Any, mesh: Mesh) -> _Compiled:
    """Compiles by jit, which divides the work as `train.compute.mesh` divides the frozen half."""
    own = own_part(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(update, donate_argnums=0, out_shardings=whole)
    evaluate = jax.jit(forward)

    def run_step(
        state: TrainState, frozen: Params, batch: Batch, constants: _Constants
    ) -> tuple[TrainState, StepMetrics]:
        state, metrics = step(state, frozen, shard_batch(batch, mesh), constants)
        return state, jax.tree.map(lambda x: x.addressable_shards[0].data, metrics)

    def outputs(trained: Params, frozen: Params, batch: Batch) -> Any:
        trained, frozen = on_own_part((trained, frozen), own)
        return jax.device_get(evaluate(trained, frozen, shard_batch(batch, own)))

    return _Compiled(
        run_step,
        outputs,
        lambda tree: place(tree, mesh),
        lambda state: replicate(state, mesh),
        lambda state: jax.tree.map(lambda x: np.array(x.addressable_shards[0].data), state),
    )


def _replicate(devices: Sequence[jax.Device]) -> Callable[[Any], Any]:
    """Returns a function that copies every leaf to each device, along pmap's leading axis."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def copy(leaf: Any) -> Array:
        row = np.asarray(leaf)[None]  # NumPy: nothing to compile for every shape
        shape = (len(devices), *row.shape[1:])
        rows = [jax.device_put(row, device) for device in devices]
        return jax.make_array_from_single_device_arrays(shape, sharding, rows)

    return lambda tree: jax.tree.map(copy, tree)


def _first_copy(tree: Any) -> Any:
    """Returns the first device's copy of every leaf on the host, without the leading axis."""
    return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0, ...], tree)
