"""Floating-point operations of a training step, and what part of a device's peak a run reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

import compacter_jax as cj
from train.compute import step
from train.compute.program import Program, gradient_program

# `device_kind` of JAX -> dtype -> peak of dense matrix products in FLOP/s, of one JAX device.
# float32 is what JAX computes it in by default: TF32 on GPUs that have it, and on TPUs one pass of
# bfloat16. TPUs: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; a device is a core,
# half a chip, of v2 and v3. GPUs: NVIDIA's data sheets, without sparsity, which they include from
# Ampere on; the T4 has neither TF32 nor bfloat16.
_PEAKS: Mapping[str, Mapping[str, float]] = {
    "TPU v2": {"bfloat16": 22.5e12, "float32": 22.5e12},
    "TPU v3": {"bfloat16": 61.5e12, "float32": 61.5e12},
    "TPU v4": {"bfloat16": 275e12, "float32": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12, "float32": 197e12},
    "TPU v5e": {"bfloat16": 197e12, "float32": 197e12},
    "TPU v5": {"bfloat16": 459e12, "float32": 459e12},
    "TPU v5p": {"bfloat16": 459e12, "float32": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12, "float32": 918e12},
    "TPU v6e": {"bfloat16": 918e12, "float32": 918e12},
    "Tesla T4": {"float32": 8.1e12},
    "NVIDIA L4": {"bfloat16": 121e12, "float32": 60e12},
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312e12, "float32": 156e12},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312e12, "float32": 156e12},
    "NVIDIA A100-PCIE-40GB": {"bfloat16": 312e12, "float32": 156e12},
    "NVIDIA A100 80GB PCIe": {"bfloat16": 312e12, "float32": 156e12},
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989e12, "float32": 494e12},
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float32": 378e12},
    "NVIDIA H100 NVL": {"bfloat16": 835e12, "float32": 417e12},
    "NVIDIA H200": {"bfloat16": 989e12, "float32": 494e12},
}


def known_devices() -> tuple[str, ...]:
    """Kinds of devices whose peak is known."""
    return tuple(_PEAKS)


def peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that a device can do at most, by its `device_kind`; None where that is not known."""
    return _PEAKS.get(device_kind, {}).get(dtype)


def of_step(program: Program) -> int:
    """FLOPs of a step: of its matrix products, attention's included.

    They are those of the forward pass, of the gradients to activations as far down as something is
    trained, and of the gradients of what is trained. Elementwise operations are left out: they
    are a few percent.
    """
    return sum(operation.flops for operation in program.operations)


class Meter:
    """Model FLOP/s utilisation: the part of a device's peak that a step must use.

    What is computed again to save memory does not count (arXiv:2204.02311, appendix B).

    Args:
      model: the adapted module.
      inputs: keys of a batch that are its arguments.
      loss: as for `train.compute.step.loss_and_update`.
      params: of the model, or their shapes.
      labels: of `compacter_jax.label_params`.
      peak: of one device in FLOP/s; None if not known.
      devices: of this process.
    """

    def __init__(
        self,
        model: Any,
        inputs: Sequence[str],
        loss: step.LossFunction,
        params: Any,
        labels: Any,
        *,
        peak: float | None,
        devices: int,
    ):
        self._apply = step.apply_function(without_remat(model), inputs)
        self._loss = loss
        self._halves = cj.partition(jax.tree.map(_shape, params), labels)
        self._peak, self._devices = peak, devices
        self._flops: dict[Any, int] = {}

    def utilisation(self, batch: Mapping[str, Any], seconds: float) -> float | None:
        """Of a step on this process's rows of a batch; None if the peak is not known."""
        if self._peak is None:
            return None
        shapes = {name: _shape(array) for name, array in batch.items()}
        key = tuple((name, shape.shape) for name, shape in shapes.items())
        if key not in self._flops:
            program = gradient_program(self._apply, self._loss, *self._halves, shapes)
            self._flops[key] = of_step(program)
        return self._flops[key] / (self._devices * self._peak * seconds)


def without_remat(model: Any) -> Any:
    """An adapted module that computes nothing twice."""
    backbone = model.backbone
    return model.clone(backbone=backbone.clone(remat=type(backbone).remat))


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
