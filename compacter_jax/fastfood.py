"""A model's parameters within a random subspace: Walsh-Hadamard transform and Fastfood.

Let `v` be the vector of the `d` trained numbers. Each tensor `t` of the backbone becomes

    theta_t = theta_t(0) + scale_layer(t) P_t v,    P_t = H G Pi H B / sqrt(L size_t),

the first `size_t` rows of a stack of such blocks. `L` is the least power of two that is not below
`d`; zeros pad `v` to this length. `H` is the Walsh-Hadamard matrix, `B` a diagonal of random signs,
`Pi` a random permutation, and `G` a diagonal of standard normal values.

References:
  Le et al., Fastfood, ICML 2013, arXiv:1408.3060; Aghajanyan et al., Intrinsic Dimensionality
  Explains the Effectiveness of Language Model Fine-Tuning, ACL 2021, arXiv:2012.13255.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# The size of the matrices whose products make up a transform. On two CPU cores 8, 16 and 32 take
# equally long. Butterflies take several times as long, because the compiler fuses them with the
# draws and thus computes these repeatedly. A larger size needs fewer passes over memory.
_RADIX = 16


# The number of entries projected at a time. Only the result is ever in memory as a whole; the draws
# and the steps of the transform have the size of a chunk. From 2**18 to 2**23, CPUs take equally
# long.
_CHUNK = 2**22


def walsh_hadamard(x: Array) -> Array:
    """Multiplies by the Walsh-Hadamard matrix, `y[i] = sum_j (-1)^popcount(i & j) x[j]`.

    The transform is not normalised: applied twice, it multiplies the input by `n`.

    Args:
      x: `[..., n]`, `n` a power of two.

    Returns:
      `[..., n]` of `x`'s dtype.

    Raises:
      ValueError: if `n` is not a power of two.
    """
    n = x.shape[-1] if x.ndim else 0
    if n != _power_of_two(n):
        raise ValueError(
            f"the last axis of shape {x.shape} has size {n}, which is not a power of two; pad it "
            f"to {_power_of_two(n)}"
        )
    # H_n is the Kronecker product of small matrices, each of which acts on its own axis. The loop
    # transforms the first axis and puts it last, until all axes are in their old order.
    y = x.reshape(-1, n)
    for radix in _radices(n):
        axes = y.reshape(-1, radix, n // radix)
        H = jnp.asarray(_hadamard(radix), x.dtype)
        y = jnp.einsum("bfm,fg->bmg", axes, H, precision="highest").reshape(-1, n)
    return y.reshape(x.shape)


def _power_of_two(n: int) -> int:
    """Returns the least power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def _radices(n: int) -> list[int]:
    """Returns factors of `n`, a power of two, none above `_RADIX`."""
    return [_RADIX, *_radices(n // _RADIX)] if n > _RADIX else [n]


def _hadamard(n: int) -> np.ndarray:
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H


def _random_words(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Array, Array]:
    """Returns 64 random bits for each key and counter, as two words of Threefry-2x32-20.

    A stored `v` has a meaning only with its `P`, so `P` must never change. `jax.random` guarantees
    fixed values neither across versions nor across its own settings. This is the published
    function; unrolled, it is about three times as fast as `jax.random` on CPUs.

    References:
      Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            a = a + b
            b = (b << jnp.uint32(rotation) | b >> jnp.uint32(32 - rotation)) ^ a
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return a, b


def _normal(words: Array) -> Array:
    """Returns standard normal float32 values, one for each random word."""
    # These are odd multiples of 2**-23 between -1 and 1, symmetric and all exact.
    uniform = (2 * (words >> jnp.uint32(9)).astype(jnp.int32) + (1 - 2**23)) * jnp.float32(2**-23)
    return jnp.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)


@jax.jit
def mixed(vector: Array, seed: int | Array) -> Array:
    """Returns `u = Pi H B v / sqrt(L)`, which has the norm of `v` and is evenly spread for any `v`.

    One `B` and one `Pi` serve every block, so the function runs once and no block needs a sort. No
    block is worse for it. Given `B` and `Pi`, each row of `P` is a vector of `d` independent normal
    values, because `H`, `B` and `Pi` only rotate it. Rows of different blocks are independent,
    because the blocks' `G` are. Entries of different rows of one block have correlations of `O(1 /
    sqrt(L))`, the same as two Walsh functions in different order. Without `Pi` the `L^2` entries
    would have only `L` absolute values.

    Args:
      vector: `[d]`.
      seed: seed of all random values.

    Returns:
      `[L]` float32, `L` the least power of two that is not below `d`.

    Raises:
      ValueError: if `vector` is empty or does not have rank 1.
    """
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"vector must have shape [d] with d >= 1; got {vector.shape}")
    length = _power_of_two(vector.size)
    key = jnp.uint32(seed), jnp.uint32(0)  # the key of a tensor has a hash of its name instead of 0
    counter = jnp.uint32(0), jnp.arange(length, dtype=jnp.uint32)
    signs, order = _random_words(key, counter)
    padded = jnp.pad(vector.astype(jnp.float32), (0, length - vector.size))
    flipped = jnp.where(signs >> jnp.uint32(31), -padded, padded)
    return walsh_hadamard(flipped)[jnp.argsort(order)] / math.sqrt(length)


def project(mixture: Array, size: int, name: str, seed: int | Array) -> Array:
    """Returns `P v` for one tensor; its expected squared norm is `|v|^2`.

    Each entry is normal with variance `|v|^2 / size`. As in the released code of arXiv:2012.13255,
    `E |P_t v|^2 = |v|^2` for every tensor `t`. There are two differences. Here every tensor depends
    on all of `v`, small tensors included; and the gradients are those of the function, whereas the
    released code divides them by the tensor's own `L`.

    Args:
      mixture: `[L]`, result of `mixed` with the same seed.
      size: number of entries of the tensor.
      name: name of the tensor; each name has its own `P`.
      seed: seed of all random values.

    Returns:
      `[size]` float32.
    """
    factors = jnp.full(1, 1 / math.sqrt(size), jnp.float32)
    return project_all(mixture, {name: size}, factors, seed)[name]


def project_all(
    mixture: Array, sizes: Mapping[str, int], factors: Array, seed: int | Array
) -> dict[str, Array]:
    """Returns `factor H G u` for each name and size, in one loop over the blocks of all tensors.

    `factors` has the shape `[names]`. Each tensor has whole blocks. To share a block between small
    tensors would save little (8 % of the blocks of MiniLM-L6, 1 % of T5-base's), and would make the
    numbers of each tensor depend on the others.
    """
    length = mixture.size
    counts = [-(-size // length) for size in sizes.values()]
    tensors = np.repeat(np.arange(len(sizes)), counts)
    names = np.array([zlib.crc32(name.encode()) for name in sizes], np.uint32)[tensors]
    indices = np.concatenate([np.arange(count, dtype=np.uint32) for count in counts])

    # The backward pass draws the blocks again instead of storing them. The factors are applied in
    # here, so that their operand, another copy of the model, is not stored either.
    @jax.checkpoint
    def project_chunk(blocks: tuple[Array, Array, Array]) -> Array:
        name, index, factor = (part[:, None] for part in blocks)
        counter = index, jnp.arange(length, dtype=jnp.uint32)
        words, _ = _random_words((jnp.uint32(seed), name), counter)
        return walsh_hadamard(_normal(words) * (factor * mixture))

    steps = min(len(tensors), math.ceil(len(tensors) * length / _CHUNK))
    spare = -len(tensors) % steps
    blocks = [jnp.pad(part, (0, spare)) for part in (names, indices, factors[tensors])]
    rows = jax.lax.map(project_chunk, tuple(part.reshape(steps, -1) for part in blocks))
    # The gradient of one split is one concatenation; the gradient of each of many slices would be
    # an array with all the rows.
    *parts, _ = jax.lax.split(rows.reshape(-1), [length * count for count in (*counts, spare)])
    return {name: part[:size] for (name, size), part in zip(sizes.items(), parts, strict=True)}
