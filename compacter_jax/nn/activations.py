"""Activation functions by the names that Hugging Face configurations use."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

ActivationFn = Callable[[Array], Array]


def _gelu_exact(x: Array) -> Array:
    if jnp.finfo(x.dtype).bits < 32:  # 1 + erf(x) has no digits left at the negative end
        return jax.nn.gelu(x, approximate=False)
    return _gelu_by_erf(x)


@jax.custom_jvp
def _gelu_by_erf(x: Array) -> Array:
    # PyTorch computes the same. `jax.nn.gelu` uses erfc, which is slower and keeps one more array.
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@_gelu_by_erf.defjvp
def _gelu_by_erf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    # erf is odd. Taken at -x it differs from the expression of the forward pass. XLA would
    # otherwise keep that one beside x for the backward pass, an array of the feed-forward layer's
    # inner width.
    below = 0.5 * (1 - jax.lax.erf(x * -math.sqrt(0.5)))
    density = jnp.exp(-0.5 * jnp.square(x)) * (1 / math.sqrt(2 * math.pi))
    return _gelu_by_erf(x), dx * (below + x * density)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _clipped_gelu(x: Array) -> Array:
    return jnp.clip(_gelu_exact(x), -10, 10)


def _identity(x: Array) -> Array:
    return x


ACTIVATIONS: dict[str, ActivationFn] = {
    "gelu": _gelu_exact,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu_exact,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": _identity,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Each entry equals the entry of `transformers.activations.ACT2FN` with the same name."""


def get_activation(name: str) -> ActivationFn:
    """Returns the activation function of that name.

    Args:
      name: a key of `ACTIVATIONS`, for instance "gelu" (exact) or "gelu_new" (with tanh).

    Returns:
      An elementwise function; its result has the shape and dtype of its argument.

    Raises:
      ValueError: if the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {name!r}; known activations: {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]
