"""Floating-point operations of a training step, and model FLOP/s utilisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

import compacter_jax as cj
from train.compute import step
from train.compute.program import Program, gradient_program

# `device_kind` of JAX -> dtype -> peak of dense matrix products in FLOP/s, of one JAX device.
# "float32" is JAX's default precision for it: TF32 on GPUs that have it, and one pass of bfloat16
# on TPUs. TPUs: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; a device of v2 and v3
# is a core, half a chip. GPUs: NVIDIA's data sheets, whose numbers from Ampere on include sparsity,
# taken out here. The T4 has neither TF32 nor bfloat16.
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
    """Returns the device kinds with a known peak."""
    return tuple(_PEAKS)


def peak(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of a device, by its `device_kind`; None if it is not known."""
    return _PEAKS.get(device_kind, {}).get(dtype)


def of_step(program: Program) -> int:
    """Returns the FLOPs of the matrix products and convolutions of a step, attention included.

    They comprise the forward pass, the gradients of activations down to the lowest trained layer,
    and the gradients of trained parameters. Elementwise operations, a few percent, are left out.
    """
    return sum(operation.flops for operation in program.operations)


class Meter:
    """Meter of model FLOP/s utilisation: the fraction of the devices' peak that a step must use.

    Recomputation to save memory does not count (arXiv:2204.02311, appendix B).

    Args:
      model: the adapted module.
      apply_of: model -> how it computes the arguments of the loss, as for
        `train.compute.step.loss_and_update`.
      loss: the loss, as for `train.compute.step.loss_and_update`.
      params: the parameters of the model, or their shapes.
      labels: the labels of `compacter_jax.label_params`.
      peak: the peak of one device in FLOP/s; None if it is not known.
      devices: the number of devices of this process.
    """

    def __init__(
        self,
        model: Any,
        apply_of: Callable[[Any], step.ApplyFunction],
        loss: step.LossFunction,
        params: Any,
        labels: Any,
        *,
        peak: float | None,
        devices: int,
    ):
        self._apply = apply_of(without_remat(model))
        self._loss = loss
        self._halves = cj.partition(jax.tree.map(_shape, params), labels)
        self._peak, self._devices = peak, devices
        self._flops: dict[Any, int] = {}

    def utilisation(self, batch: Mapping[str, Any], seconds: float) -> float | None:
        """Returns the utilisation of a step on this process's rows; None without a peak."""
        if self._peak is None:
            return None
        shapes = {name: _shape(array) for name, array in batch.items()}
        key = tuple((name, shape.shape) for name, shape in shapes.items())
        if key not in self._flops:
            program = gradient_program(self._apply, self._loss, *self._halves, shapes)
            self._flops[key] = of_step(program)
        return self._flops[key] / (self._devices * self._peak * seconds)


def without_remat(model: Any) -> Any:
    """Returns an adapted module that recomputes nothing."""
    backbone = model.backbone
    return model.clone(backbone=backbone.clone(remat=type(backbone).remat))


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
