"""Bytes that a training step takes on one device, predicted from its operations.

What is predicted is what a compiler keeps that fuses elementwise operations into those that read
them, and keeps both operands of every product. For a TPU v5e XLA lays out 0.73 to 0.76 of it, as it
fuses into products, too; on a CPU it takes 1.3 to 2.1 times as much. Seen with MiniLM and batches
of 32 x 64 tokens, for the TPU with Compacter++ alone; `benchmarks/memory.py` measures it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import optax

from train.compute.program import Program

# Their results go to memory. Everything else is computed again wherever it is read, unless that
# would keep more in memory.
_SEPARATE = re.compile(
    "dot_general|conv_.*|reduce_.*|arg(max|min)|cum.*|sort|gather|scatter.*|dynamic_.*|random_.*|"
    "while|scan|cond"
)
# The same values in another order or shape: matrix products read through them.
_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "copy")
# A value that is read twice is kept if it takes less than so much of what it is computed from.
_WORTH_KEEPING = 0.75


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step, at its peak.

    Attributes:
      frozen: weights that are not trained.
      trained: parameters that are.
      optimizer: its state.
      batch: ids, masks and labels.
      gradients: those there are at the peak, sums over parts of a batch included.
      activations: everything else that the step computes.
    """

    frozen: int
    trained: int
    optimizer: int
    batch: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def of_step(
    program: Program,
    trained: Any,
    frozen: Any,
    batch: Any,
    tx: optax.GradientTransformation,
    *,
    accumulation_steps: int = 1,
) -> Memory:
    """Predicts the memory of an update.

    Args:
      program: `train.compute.program.gradient_program` of one of the parts of a device's rows.
      trained: half of `compacter_jax.partition`, of arrays or of their shapes.
      frozen: the other half.
      batch: all of a device's rows, or their shapes.
      tx: the optimizer.
      accumulation_steps: into how many parts the rows are divided.
    """
    gradients, activations = at_peak(program)
    if accumulation_steps > 1:
        gradients += size(trained)
    return Memory(
        frozen=size(frozen),
        trained=size(trained),
        optimizer=size(jax.eval_shape(tx.init, trained)),
        batch=size(batch),
        gradients=gradients,
        activations=activations,
    )


def size(tree: Any) -> int:
    """Bytes of all arrays, or of arrays of these shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def at_peak(program: Program) -> tuple[int, int]:
    """Bytes of what the operations have made and still need, where these are most.

    Returns:
      Those of the program's outputs, and all others.
    """
    sources = _sources(program)
    born: dict[int, int] = {}
    read: dict[int, int] = {}
    for i, operation in enumerate(program.operations):
        # A fused operation may write its result over an operand that is not needed any more.
        birth = 2 * i if _SEPARATE.fullmatch(operation.name) else 2 * i + 1
        for array in (*operation.inputs, *operation.outputs):
            for source in sources.get(array, ()):
                born.setdefault(source, birth)
                read[source] = 2 * i
    end = 2 * len(program.operations)
    outputs = frozenset().union(*(sources.get(array, ()) for array in program.outputs))
    changes = np.zeros((2, end + 2), np.int64)
    for array, birth in born.items():
        row, last = (0, end) if array in outputs else (1, read[array])
        changes[row, birth] += program.bytes[array]
        # What is born at an odd place may have been read last at the even one before.
        changes[row, max(last, birth) + 1] -= program.bytes[array]
    live = changes.cumsum(axis=1)
    made, others = live[:, live.sum(axis=0).argmax()]
    return int(made), int(others)


def _sources(program: Program) -> dict[int, frozenset[int]]:
    """For each array that is made, those in memory that it is computed from: itself, if it is."""
    uses = Counter(array for operation in program.operations for array in operation.inputs)
    wanted = _wanted(program)
    sources: dict[int, frozenset[int]] = {}
    for operation in program.operations:
        read = frozenset().union(*(sources.get(array, ()) for array in operation.inputs))
        bytes_read = sum(program.bytes[array] for array in read)
        for array in operation.outputs:
            cheaper = uses[array] > 1 and program.bytes[array] < _WORTH_KEEPING * bytes_read
            kept = _SEPARATE.fullmatch(operation.name) or array in wanted or cheaper
            viewed = operation.name in _VIEWS and not cheaper
            sources[array] = read if viewed or not kept else frozenset([array])
    return sources


def _wanted(program: Program) -> set[int]:
    """Arrays that must be in memory: outputs, and the operands of matrix products."""
    wanted = set(program.outputs)
    for operation in reversed(program.operations):
        seen_through = operation.name in _VIEWS and operation.outputs[0] in wanted
        if seen_through or operation.name == "dot_general":
            wanted.update(operation.inputs)
    return wanted
