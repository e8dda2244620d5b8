"""Kinds of hosts: the axes that a linear layer sums over and makes, and its kernel's layout."""

from __future__ import annotations

import dataclasses
import inspect
import string
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_ARRAYS = (jax.Array, np.ndarray)
# Layers whose weights are not a matrix between an axis of the input and one of the output.
_NOT_LINEAR = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Embed)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer as an equation, with a letter for each axis.

    Attributes:
      inputs: axes of the input.
      outputs: axes of the output.
      kernel: axes of the `kernel`; None if the layout is unknown, and then nothing can be merged.
    """

    inputs: str
    outputs: str
    kernel: str | None

    @property
    def summed(self) -> str:
        """Axes that the layer sums over, in the order of the input."""
        return "".join(axis for axis in self.inputs if axis not in self.outputs)

    @property
    def made(self) -> str:
        """Axes that the layer makes, in the order of the output."""
        return "".join(axis for axis in self.outputs if axis not in self.inputs)

    @property
    def kept(self) -> str:
        """Axes that the input and the output share, in the order of the input."""
        return "".join(axis for axis in self.inputs if axis in self.outputs)

    def fits(self, x: Array, y: Array) -> bool:
        """Returns True if an input and an output can be the layer's."""
        if x.ndim != len(self.inputs) or y.ndim != len(self.outputs):
            return False
        sizes = dict(zip(self.inputs, x.shape, strict=True))
        return all(
            sizes.get(axis, size) == size for axis, size in zip(self.outputs, y.shape, strict=True)
        )

    def rows(self, x: Array) -> Array:
        """Returns the input as `[…, in]`, with all axes that the layer sums over in one."""
        order = self.kept + self.summed
        if self.inputs != order:
            x = jnp.transpose(x, [self.inputs.index(axis) for axis in order])
        if len(self.summed) == 1:
            return x
        return x.reshape(*x.shape[: len(self.kept)], -1)

    def width(self, y: Array) -> int:
        """Returns the number of entries that the layer makes, over all of its axes."""
        return int(np.prod([y.shape[self.outputs.index(axis)] for axis in self.made]))

    def columns(self, rows: Array, y: Array) -> Array:
        """Reshapes `[…, out]` to the shape of the layer's output `y`."""
        order = self.kept + self.made
        if len(self.made) != 1:
            made = [y.shape[self.outputs.index(axis)] for axis in self.made]
            rows = rows.reshape(*rows.shape[:-1], *made)
        if self.outputs == order:
            return rows
        return jnp.transpose(rows, [order.index(axis) for axis in self.outputs])

    def as_kernel(self, update: Array, like: Array) -> Array:
        """Reshapes `[…, in, out]` as the kernel `like`, whose first axes may count layers."""
        assert self.kernel is not None
        order, layers = self.summed + self.made, like.ndim - len(self.kernel)
        sizes = dict(zip(self.kernel, like.shape[layers:], strict=True))
        update = update.reshape(*like.shape[:layers], *(sizes[axis] for axis in order))
        axes = [layers + order.index(axis) for axis in self.kernel]
        return jnp.transpose(update, [*range(layers), *axes])

    def along(self, axis: str, scale: Array, like: Array) -> Array:
        """Reshapes factors `[…, size]` of one axis, for a product with the kernel `like`."""
        assert self.kernel is not None
        layers = like.ndim - len(self.kernel)
        ones = [-1 if own == axis else 1 for own in self.kernel]
        return scale.reshape(*like.shape[:layers], *ones)


# The layer for an input with one axis. The factors of a kernel do not depend on the other axes.
DENSE = Linear("y", "z", "yz")


def known(host: nn.Module, args: Any) -> Linear | None:
    """Returns the `Linear` of a host of flax's own linear layers, or None for any other module.

    A subclass with its own `__call__` counts as another module, because its kernel may have another
    layout.

    Args:
      host: the module, bound or not.
      args: positional arguments of its call.

    Raises:
      ValueError: if one axis is in the input, the kernel and the output at once.
    """
    own = type(host).__call__
    if own is nn.Dense.__call__:
        rest = _letters(args[0].ndim - 1)
        return Linear(f"{rest}y", f"{rest}z", "yz")
    if own is nn.DenseGeneral.__call__:
        return _dense_general(host, args[0].ndim)
    if own is nn.Einsum.__call__:
        return _einsum((*args, None)[1] or host.einsum_str, args[0].ndim, has_kernel=True)
    return None


def linear(host: nn.Module, args: Any, y: Any, path: str) -> tuple[Linear, Any]:
    """Returns the `Linear` of a host and the array that it acts on.

    An unknown module counts as one that maps the last axis. There are two exceptions: a module with
    attributes `axis` and `features` (t5x, MaxText) counts as `nn.DenseGeneral`, and a call with an
    equation in front counts as `einsum`.

    Args:
      host: the module, bound or not.
      args: positional arguments of its call.
      y: result of the call.
      path: path of the host, for errors.

    Raises:
      ValueError: if the host cannot be a linear layer; the message names the class.
    """
    found = known(host, args)
    if found is not None:
        return found, args[0]
    first: Any = args[0] if args else None
    second: Any = args[1] if len(args) > 1 else None
    if isinstance(first, str) and isinstance(second, _ARRAYS):
        return _einsum(first, second.ndim, has_kernel=False), second
    are_arrays = isinstance(first, _ARRAYS) and isinstance(y, _ARRAYS)
    if are_arrays and hasattr(host, "axis") and hasattr(host, "features"):
        alike = dataclasses.replace(_dense_general(host, first.ndim), kernel=None)
        if alike.fits(first, y):
            return alike, first
    if isinstance(host, _NOT_LINEAR) or not are_arrays or first.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"LoRA needs a linear layer, but {path or 'the model itself'} is a "
            f"{type(host).__name__} of {type(host).__module__}; choose an nn.Dense, "
            "nn.DenseGeneral or nn.Einsum of flax.linen as site"
        )
    rest = _letters(first.ndim - 1)
    return Linear(f"{rest}y", f"{rest}z", None), first


def by_position(context: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns a call's arguments, with leading keyword arguments moved to their positions.

    Args:
      context: context of the interceptor.
      args: positional arguments.
      kwargs: keyword arguments.
    """
    left = dict(kwargs)
    if not left:
        return args, left
    parameters = list(inspect.signature(context.orig_method).parameters.values())
    args = list(args)
    for parameter in parameters[len(args) :]:
        if parameter.name not in left or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        args.append(left.pop(parameter.name))
    return tuple(args), left


def _letters(count: int) -> str:
    return string.ascii_uppercase[:count]


def _dense_general(host: Any, ndim: int) -> Linear:
    if getattr(host, "batch_dims", ()):
        raise ValueError(
            f"an nn.DenseGeneral with batch_dims={host.batch_dims} has one matrix for each batch "
            "index, which LoRA does not support; choose another site"
        )
    axes = [host.axis] if isinstance(host.axis, int) else list(host.axis)
    features = 1 if isinstance(host.features, int) else len(host.features)
    inputs = _letters(ndim)
    summed = "".join(inputs[axis] for axis in sorted(axis % ndim for axis in axes))
    kept = "".join(axis for axis in inputs if axis not in summed)
    made = string.ascii_lowercase[:features]
    return Linear(inputs, kept + made, summed + made)


def _einsum(equation: str, ndim: int, *, has_kernel: bool) -> Linear:
    operands, arrow, outputs = equation.replace(" ", "").partition("->")
    inputs, comma, kernel = operands.partition(",")
    taken = set(equation)
    free = iter(letter for letter in string.ascii_letters if letter not in taken)
    rest = "".join(next(free) for _ in range(ndim - len(inputs.replace("...", ""))))
    inputs, outputs = (axes.replace("...", rest) for axes in (inputs, outputs))
    both = set(inputs) & set(outputs)
    summed, made = set(inputs) - both, set(outputs) - both
    plain = len(inputs) == len(set(inputs)) and len(outputs) == len(set(outputs))
    if not (arrow and comma and plain and "." not in kernel) or set(kernel) != summed | made:
        raise ValueError(
            f"the einsum {equation!r} does not multiply axes of its input by one matrix, as LoRA "
            "requires; choose another site"
        )
    return Linear(inputs, outputs, kernel if has_kernel else None)


def met_in(model: nn.Module, inputs: Any) -> Mapping[str, tuple[str, Linear | None]]:
    """Returns path -> (name of the class, `Linear` if it is known) for the modules of a model.

    Of modules that share a scope, the result has the outermost, which is where an adapter acts.

    Args:
      model: the unbound model.
      inputs: example arguments of a call.
    """
    met: dict[str, tuple[str, Linear | None]] = {}

    def note(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        host = context.module
        first, _ = by_position(context, args, kwargs)
        if (path := "/".join(host.path)) not in met and context.method_name == "__call__":
            try:
                found = known(host, first) if first else None
            except ValueError:
                found = None
            met[path] = type(host).__name__, found
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return met


def first_array(args: Any) -> int:
    """Returns the index of the array that a host acts on, since an equation may come before it."""
    return next((i for i, x in enumerate(args) if isinstance(x, _ARRAYS)), 0)
