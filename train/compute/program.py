"""Program of a training step: a list of operations, traced without weights, data or compilation.

`train.compute.flops` counts the work of the operations, `train.compute.memory` their memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

import compacter_jax as cj
from train.compute import step

# Primitives that run an inner program exactly once.
_CALLS = (
    "pjit",
    "jit",
    "closed_call",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on arrays.

    Attributes:
      name: the name of the JAX primitive.
      inputs: the numbers of the arrays that it reads.
      outputs: the numbers of the arrays that it writes.
      flops: the floating-point operations, counted for matrix products and convolutions only.
      product: the sizes of a matrix product, `[batch, m, k] @ [batch, k, n]`; None for others.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    flops: int
    product: tuple[int, int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """Operations in the order of execution; arrays are represented by numbers.

    Attributes:
      operations: the operations whose results are needed.
      bytes: the bytes of each array.
      inputs: the arrays that exist beforehand.
      outputs: the arrays that must exist afterwards.
    """

    operations: tuple[Operation, ...]
    bytes: tuple[int, ...]
    inputs: frozenset[int]
    outputs: tuple[int, ...]


def gradient_program(
    apply: step.ApplyFunction, loss: step.LossFunction, trained: Any, frozen: Any, batch: Any
) -> Program:
    """Traces the loss and the gradients of one device's rows, dropout included.

    Args:
      apply: the model, as in `train.compute.step.loss_and_update`.
      loss: the loss, as in `train.compute.step.loss_and_update`.
      trained: the trained half of `compacter_jax.partition`, of arrays or of their shapes.
      frozen: the frozen half.
      batch: the rows of one device, or their shapes.

    Returns:
      A program whose outputs are the loss, then the gradients of `trained`.
    """

    def run(trained: Any, frozen: Any, batch: Any, seed: Any) -> Any:
        def mean_loss(trained: Any) -> Any:
            logits = apply(cj.merge(trained, frozen), batch, jax.random.key(seed))
            return jnp.sum(loss(logits, batch["labels"]) * batch["weights"])

        return jax.value_and_grad(mean_loss)(trained)

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return traced(run, trained, frozen, batch, seed)


def traced(function: Callable[..., Any], *arguments: Any) -> Program:
    """Traces a function of trees of arrays, or of their shapes."""
    closed = jax.make_jaxpr(function)(*arguments)
    tracer = _Flattened()
    inputs = [tracer.new(var) for var in (*closed.jaxpr.constvars, *closed.jaxpr.invars)]
    outputs = tracer.add(closed.jaxpr, inputs)
    operations = _needed(tracer.operations, outputs)
    return Program(tuple(operations), tuple(tracer.bytes), frozenset(inputs), tuple(outputs))


class _Flattened:
    """Collector of the operations of nested programs, which gives every array a number."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.bytes: list[int] = []

    def new(self, var: Any) -> int:
        shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
        # Random keys have their own type without an item size, and are negligibly small.
        self.bytes.append(math.prod(shape) * getattr(dtype, "itemsize", 0))
        return len(self.bytes) - 1

    def add(self, jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
        """Appends the operations of `jaxpr` on `inputs`, constants first; returns its outputs."""
        numbers = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))

        def read(variables: Sequence[Any]) -> list[int]:
            return [self.new(v) if isinstance(v, Literal) else numbers[v] for v in variables]

        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name in _CALLS:
                called = next(_inner(equation.params))
                constants = [self.new(var) for var in called.constvars]
                results = self.add(called, [*constants, *read(equation.invars)])
                numbers |= dict(zip(equation.outvars, results, strict=True))
                continue
            made = [self.new(var) for var in equation.outvars]
            numbers |= dict(zip(equation.outvars, made, strict=True))
            operation = Operation(
                name,
                tuple(read(equation.invars)),
                tuple(made),
                _flops(equation),
                _product(equation),
            )
            self.operations.append(operation)
        return read(jaxpr.outvars)


def _inner(parameters: Any) -> Iterator[Jaxpr]:
    """Yields the programs among an equation's parameters."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _flops(equation: Any) -> int:
    """Returns the FLOPs of a matrix product or convolution; of a loop, those of all iterations."""
    if equation.primitive.name == "conv_general_dilated":
        return _flops_of_convolution(equation)
    if (sizes := _product(equation)) is not None:
        return 2 * math.prod(sizes)
    rounds = equation.params.get("length", 1)
    return rounds * sum(_flops(inner) for body in _inner(equation.params) for inner in body.eqns)


def _flops_of_convolution(equation: Any) -> int:
    """Returns the FLOPs of a convolution: multiplications with padding or holes are left out."""
    parameters, (out,) = equation.params, equation.outvars
    left, right = (var.aval for var in equation.invars)
    numbers = parameters["dimension_numbers"]
    per_place = out.aval.size * right.shape[numbers.rhs_spec[1]]
    pairs = 1
    for axis in range(len(parameters["window_strides"])):
        size, window, places = (
            array.shape[spec[2 + axis]]
            for array, spec in (
                (left, numbers.lhs_spec),
                (right, numbers.rhs_spec),
                (out.aval, numbers.out_spec),
            )
        )
        read = (
            np.arange(places)[:, None] * parameters["window_strides"][axis]
            + np.arange(window) * parameters["rhs_dilation"][axis]
            - parameters["padding"][axis][0]
        )
        hole = parameters["lhs_dilation"][axis]
        inside = (read >= 0) & (read <= (size - 1) * hole) & (read % hole == 0)
        pairs *= int(inside.sum())
        per_place //= places
    return 2 * per_place * pairs


def _product(equation: Any) -> tuple[int, int, int, int] | None:
    """Returns `(batch, m, k, n)` of a matrix product; None for any other equation."""
    if equation.primitive.name != "dot_general":
        return None
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    left, right = (var.aval for var in equation.invars[:2])
    k = math.prod(left.shape[axis] for axis in contracted)
    batch = math.prod(left.shape[axis] for axis in batched)
    return batch, left.size // (batch * k), k, right.size // (batch * k)


def _needed(operations: Sequence[Operation], outputs: Sequence[int]) -> list[Operation]:
    """Returns the operations that the outputs depend on; a compiler removes the others."""
    wanted, kept = set(outputs), []
    for operation in reversed(operations):
        if not wanted.isdisjoint(operation.outputs):
            wanted.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]
