"""Replacements of parts of this package that may pay on an accelerator."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from compacter_jax import phm
from compacter_jax.models.bert import layers as bert_layers
from compacter_jax.models.modernbert import layers as modernbert_layers
from compacter_jax.models.seq2seq import compressed
from compacter_jax.models.seq2seq import layers as seq2seq_layers
from compacter_jax.models.t5 import layers as t5_layers
from compacter_jax.nn.activations import get_activation

# Modules that call `attention`.
_WITH_ATTENTION = (bert_layers, compressed, modernbert_layers, seq2seq_layers, t5_layers)
# Tokens of a block of the kernel, and features of one of its products. A GPU wants powers of two,
# and products of at least 16 on each side.
_TOKENS, _FEATURES, _LEAST = 64, 128, 16


# --- attention ----------------------------------------------------------------------------------


@contextlib.contextmanager
def library_attention() -> Iterator[None]:
    """Replaces attention by `jax.nn.dot_product_attention` in models that are traced within."""
    with contextlib.ExitStack() as stack:
        for layers in _WITH_ATTENTION:
            stack.enter_context(mock.patch.object(layers, "attention", dot_product_attention))
        yield


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    biases: Iterable[Array | None] = (),
    *,
    scale: float = 1.0,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Computes `compacter_jax.nn.attention.attention`, on a GPU in low precision by cuDNN.

    Args:
      query: `[batch, heads, queries, size]`.
      key: `[batch, heads, keys, size]`, or fewer rows, each for adjacent rows of the query.
      value: as many rows, `[batch, heads, keys, size]`.
      biases: added to the scores, each `[batch or 1, heads or 1, queries or 1, keys]` or None.
      scale: factor of the scores.
      dropout: ignored, since the models of the benchmark have none.

    Returns:
      `[batch, queries, heads, size]`.
    """
    del dropout
    given = [bias for bias in biases if bias is not None]
    bias = functools.reduce(operator.add, given) if given else None
    if bias is not None:
        # Half of the least finite number: a sum with a score must stay finite in low precision.
        bias = jnp.maximum(bias, jnp.finfo(query.dtype).min / 2).astype(query.dtype)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], query.shape[2], key.shape[2]))
    if (copies := len(query) // len(key)) > 1:
        key, value = (jnp.repeat(x, copies, axis=0) for x in (key, value))
    on_gpu = jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16)
    query, key, value = (jnp.moveaxis(x, 1, 2) for x in (query, key, value))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        scale=scale,
        implementation="cudnn" if on_gpu else "xla",
    )


# --- an adapter in one kernel -------------------------------------------------------------------


class Adapter(NamedTuple):
    """Parameters of a Compacter adapter.

    Attributes:
      rule: `[n, n, n]`.
      down: factors `(left [n, width / n, 1], right [n, 1, bottleneck / n])`.
      down_bias: `[bottleneck]`.
      up: factors `(left [n, bottleneck / n, 1], right [n, 1, width / n])`.
      up_bias: `[width]`.
    """

    rule: Array
    down: tuple[Array, Array]
    down_bias: Array
    up: tuple[Array, Array]
    up_bias: Array


def random_adapter(key: Array, width: int, bottleneck: int, n: int, dtype: Any) -> Adapter:
    """Returns normal random parameters, the factors divided by the root of their length."""
    keys = iter(jax.random.split(key, 7))

    def draw(*shape: int) -> Array:
        return (jax.random.normal(next(keys), shape) / shape[-2] ** 0.5).astype(dtype)

    return Adapter(
        draw(n, n, n),
        (draw(n, width // n, 1), draw(n, 1, bottleneck // n)),
        draw(1, bottleneck)[0],
        (draw(n, bottleneck // n, 1), draw(n, 1, width // n)),
        draw(1, width)[0],
    )


def plain_adapter(x: Array, skip: Array, adapter: Adapter, activation: str) -> Array:
    """Returns `skip + up(activation(down(x)))` of `[tokens, width]` arrays, as the package does."""
    h = phm.kronecker_sum_matmul(x, adapter.rule, adapter.down) + adapter.down_bias
    h = get_activation(activation)(h)
    return skip + phm.kronecker_sum_matmul(h, adapter.rule, adapter.up) + adapter.up_bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fused_adapter(
    x: Array, skip: Array, adapter: Adapter, activation: str, interpret: bool = False
) -> Array:
    """Computes `plain_adapter` in one pass over tokens; its gradient is that of `plain_adapter`.

    Args:
      x: hidden states `[tokens, width]`; 64 divides the tokens, and 128 the width.
      skip: what the adapter's output is added to, `[tokens, width]`.
      adapter: the parameters.
      activation: the name of the activation.
      interpret: whether to interpret the kernel, where it cannot be compiled.
    """
    width, bottleneck = x.shape[-1], adapter.down_bias.shape[0]
    # More columns of zeros: an activation of 0 that is multiplied by 0.
    room = max(_LEAST, pl.next_power_of_2(bottleneck)) - bottleneck
    down = jnp.pad(phm.kronecker_sum(adapter.rule, adapter.down), ((0, 0), (0, room)))
    up = jnp.pad(phm.kronecker_sum(adapter.rule, adapter.up), ((0, room), (0, 0)))
    tokens = pl.BlockSpec((_TOKENS, width), lambda i: (i, 0))

    def whole(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)

    weights = (down, jnp.pad(adapter.down_bias, (0, room)), up, adapter.up_bias)
    return pl.pallas_call(
        functools.partial(_adapter_kernel, activation=activation),
        grid=(x.shape[0] // _TOKENS,),
        in_specs=[tokens, tokens, *map(whole, weights)],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(x, skip, *weights)


def _adapter_kernel(
    x: Any,
    skip: Any,
    down: Any,
    down_bias: Any,
    up: Any,
    up_bias: Any,
    out: Any,
    *,
    activation: str,
) -> None:
    """Computes a block of tokens, a slice of features at a time."""
    width, bottleneck = down.shape
    parts = [pl.ds(start, _FEATURES) for start in range(0, width, _FEATURES)]
    h = jnp.zeros((x.shape[0], bottleneck), jnp.float32)
    for part in parts:
        h += jnp.dot(x[:, part], down[part, :], preferred_element_type=jnp.float32)
    h = get_activation(activation)(h + down_bias[...].astype(jnp.float32)).astype(x.dtype)
    for part in parts:
        y = jnp.dot(h, up[:, part], preferred_element_type=jnp.float32)
        y += up_bias[part].astype(jnp.float32) + skip[:, part].astype(jnp.float32)
        out[:, part] = y.astype(out.dtype)


def _forward(
    x: Array, skip: Array, adapter: Adapter, activation: str, interpret: bool
) -> tuple[Array, Any]:
    return fused_adapter(x, skip, adapter, activation, interpret), (x, skip, adapter)


def _backward(activation: str, interpret: bool, kept: Any, gradient: Array) -> Any:
    del interpret
    _, pull = jax.vjp(functools.partial(plain_adapter, activation=activation), *kept)
    return pull(gradient)


fused_adapter.defvjp(_forward, _backward)


# --- cross-entropy without the logits in memory --------------------------------------------------


def plain_cross_entropy(states: Array, table: Array, labels: Array) -> Array:
    """Returns the cross-entropies `[tokens]` of the logits `states @ table.T`, in float32.

    Args:
      states: `[tokens, width]`.
      table: the embeddings of words, `[words, width]`.
      labels: int32 `[tokens]`.
    """
    logits = (states @ table.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy_in_parts(states: Array, table: Array, labels: Array, parts: int) -> Array:
    """Computes `plain_cross_entropy` with the logits of a part of the words at a time.

    The table is frozen and gets no gradient; the backward pass computes the logits again.

    Args:
      states: `[tokens, width]`.
      table: `[words, width]`.
      labels: int32 `[tokens]`.
      parts: number of parts, which divides that of words.
    """
    return _cross_entropy_forward(states, table, labels, parts)[0]


def _cross_entropy_forward(
    states: Array, table: Array, labels: Array, parts: int
) -> tuple[Array, Any]:
    def add(total: Array, words: Array) -> tuple[Array, None]:
        return jnp.logaddexp(total, jax.nn.logsumexp(_logits(states, words), axis=-1)), None

    start = jnp.full(len(states), -jnp.inf)
    total, _ = jax.lax.scan(add, start, table.reshape(parts, -1, table.shape[-1]))
    wanted = table[labels].astype(jnp.float32)
    chosen = jnp.sum(states.astype(jnp.float32) * wanted, axis=-1)
    return total - chosen, (states, table, labels, total)


def _cross_entropy_backward(parts: int, kept: Any, gradient: Array) -> Any:
    states, table, labels, total = kept

    def add(sums: Array, words: Array) -> tuple[Array, None]:
        chances = jnp.exp(_logits(states, words) - total[:, None]).astype(words.dtype)
        return sums + jnp.dot(chances, words, preferred_element_type=jnp.float32), None

    start = jnp.zeros(states.shape)
    sums, _ = jax.lax.scan(add, start, table.reshape(parts, -1, table.shape[-1]))
    of_states = (sums - table[labels].astype(jnp.float32)) * gradient[:, None]
    return of_states.astype(states.dtype), None, None


def _logits(states: Array, words: Array) -> Array:
    return jnp.dot(states, words.T, preferred_element_type=jnp.float32)


cross_entropy_in_parts.defvjp(_cross_entropy_forward, _cross_entropy_backward)
