"""A training step as a list of operations on arrays, traced without weights, data or compilation.

`train.compute.flops` counts what the operations compute, `train.compute.memory` what they keep.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

import compacter_jax as cj
from train.compute import step

# What runs the program it holds once, as it is.
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
    """One operation.

    Attributes:
      name: of the JAX primitive.
      inputs: numbers of the arrays it reads.
      outputs: numbers of those it makes.
      flops: floating-point operations, those of matrix products alone.
      product: of a matrix product, its sizes: `[batch, m, k] @ [batch, k, n]`; else None.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    flops: int
    product: tuple[int, int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """Operations in the order of execution; arrays are numbers.

    Attributes:
      operations: those whose results are needed.
      bytes: of each array.
      inputs: arrays that are there before.
      outputs: arrays that must be there afterwards.
    """

    operations: tuple[Operation, ...]
    bytes: tuple[int, ...]
    inputs: frozenset[int]
    outputs: tuple[int, ...]


def gradient_program(
    apply: step.ApplyFunction, loss: step.LossFunction, trained: Any, frozen: Any, batch: Any
) -> Program:
    """The loss and the gradients of one device's rows, dropout included.

    Args:
      apply: as for `train.compute.step.loss_and_update`, and so is `loss`.
      loss: see there.
      trained: half of `compacter_jax.partition`, of arrays or of their shapes.
      frozen: the other half.
      batch: one device's rows, or their shapes.

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
    """What a function does to trees of arrays, or of their shapes."""
    closed = jax.make_jaxpr(function)(*arguments)
    tracer = _Flattened()
    inputs = [tracer.new(var) for var in (*closed.jaxpr.constvars, *closed.jaxpr.invars)]
    outputs = tracer.add(closed.jaxpr, inputs)
    operations = _needed(tracer.operations, outputs)
    return Program(tuple(operations), tuple(tracer.bytes), frozenset(inputs), tuple(outputs))


class _Flattened:
    """Collects the operations of nested programs; arrays get numbers."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.bytes: list[int] = []

    def new(self, var: Any) -> int:
        shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
        # Random keys are of a type of their own, and next to nothing.
        self.bytes.append(math.prod(shape) * getattr(dtype, "itemsize", 0))
        return len(self.bytes) - 1

    def add(self, jaxpr: Jaxpr, inputs: Sequence[int]) -> list[int]:
        """Appends what `jaxpr` does to `inputs`, its constants first; returns its outputs."""
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
    """The programs among an equation's parameters."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _flops(equation: Any) -> int:
    """Of a matrix product, `2 m k n`; of a loop, those of all its rounds."""
    if (sizes := _product(equation)) is not None:
        return 2 * math.prod(sizes)
    rounds = equation.params.get("length", 1)
    return rounds * sum(_flops(inner) for body in _inner(equation.params) for inner in body.eqns)


def _product(equation: Any) -> tuple[int, int, int, int] | None:
    """`(batch, m, k, n)` of a matrix product."""
    if equation.primitive.name != "dot_general":
        return None
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    left, right = (var.aval for var in equation.invars[:2])
    k = math.prod(left.shape[axis] for axis in contracted)
    batch = math.prod(left.shape[axis] for axis in batched)
    return batch, left.size // (batch * k), k, right.size // (batch * k)


def _needed(operations: Sequence[Operation], outputs: Sequence[int]) -> list[Operation]:
    """Those that the outputs depend on, as a compiler keeps them."""
    wanted, kept = set(outputs), []
    for operation in reversed(operations):
        if not wanted.isdisjoint(operation.outputs):
            wanted.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]
