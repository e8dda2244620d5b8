"""Memory of a training step on one device in bytes, predicted from its operations.

The model is a compiler that fuses elementwise operations into the operations that read their
results, and that stores both operands of every product. For a TPU v5e, XLA allocates 0.73 to 0.76
of the prediction, since it also fuses into products; on a CPU it allocates 1.3 to 2.1 times as
much. This was measured with MiniLM and batches of 32 x 64 tokens, for the TPU with Compacter++
only; `benchmarks/memory.py` measures it.
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

# Operations whose results are stored. All other results are recomputed wherever they are read,
# unless that would store more.
_SEPARATE = re.compile(
    "dot_general|conv_.*|reduce_.*|arg(max|min)|cum.*|sort|gather|scatter.*|dynamic_.*|random_.*|"
    "while|scan|cond"
)
# Operations that only reorder or reshape values: matrix products read through them.
_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "copy")
# A value that is read twice is stored if it takes less than this fraction of its sources.
_WORTH_KEEPING = 0.75


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step.

    Attributes:
      frozen: weights that are not trained.
      trained: trained parameters.
      optimizer: the state of the optimizer.
      batch: ids, masks and labels.
      gradients: the gradients that exist at the peak, sums over parts of a batch included.
      activations: all other arrays that the step computes.
    """

    frozen: int
    trained: int
    optimizer: int
    batch: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all fields."""
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
      program: `train.compute.program.gradient_program` of one part of a device's rows.
      trained: the trained half of `compacter_jax.partition`, of arrays or of their shapes.
      frozen: the frozen half.
      batch: all rows of a device, or their shapes.
      tx: the optimizer.
      accumulation_steps: the number of parts into which the rows are divided.
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
    """Returns the bytes of all arrays of a tree, or of arrays with these shapes and dtypes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def of_cache(model: Any, shapes: Any, rows: int, length: int, target_length: int) -> int:
    """Returns the bytes of the keys and values of a decoder in generation, without beams.

    Args:
      model: an adapted encoder-decoder.
      shapes: shapes of its parameters.
      rows: number of rows.
      length: length of the inputs, in tokens, or in frames of speech.
      target_length: largest number of tokens of the decoder; 0 without one, then the result is 0.
    """
    if not target_length:
        return 0
    backbone = model.backbone
    length += sum(part.extra_tokens for part in model.method.inserted())
    mask = jax.ShapeDtypeStruct((rows, length), np.int32)
    length = jax.eval_shape(backbone.mask_of_states, mask).shape[1]
    dtype = backbone.dtype or backbone.param_dtype
    states = jax.ShapeDtypeStruct((rows, length, backbone.config.hidden_size), dtype)

    def start(params: Any, states: Any) -> Any:
        return backbone.apply({"params": params}, states, target_length, method="start_cache")

    return size(jax.eval_shape(start, shapes, states))


def at_peak(program: Program) -> tuple[int, int]:
    """Returns the bytes of live arrays at the peak of a program.

    Returns:
      The bytes of the program's outputs, and those of all other arrays.
    """
    sources = _sources(program)
    born: dict[int, int] = {}
    read: dict[int, int] = {}
    for i, operation in enumerate(program.operations):
        # A fused operation may overwrite an operand that is not needed afterwards.
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
        # An array born at an odd position may have been read last at the even position before.
        changes[row, max(last, birth) + 1] -= program.bytes[array]
    live = changes.cumsum(axis=1)
    made, others = live[:, live.sum(axis=0).argmax()]
    return int(made), int(others)


def _sources(program: Program) -> dict[int, frozenset[int]]:
    """Returns the stored arrays from which each array is computed: itself, if it is stored."""
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
    """Returns the arrays that must be stored: outputs, and operands of matrix products."""
    wanted = set(program.outputs)
    for operation in reversed(program.operations):
        seen_through = operation.name in _VIEWS and operation.outputs[0] in wanted
        if seen_through or operation.name == "dot_general":
            wanted.update(operation.inputs)
    return wanted
