"""A model's parameters within a random subspace: Walsh-Hadamard transform, Fastfood, layers.

With `v` the `d` numbers that are trained, each tensor `t` of the backbone becomes

    theta_t = theta_t(0) + scale_layer(t) P_t v,    P_t = H G Pi H B / sqrt(L size_t),

the first `size_t` rows of a stack of such blocks. `L` is the power of two next to `d`, to which `v`
is padded by zeros; `H` is the Walsh-Hadamard matrix, `B` a diagonal of random signs, `Pi` a random
permutation, `G` a diagonal of standard normal values.

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

# Of the matrices whose products make up a transform. On two CPU cores 8, 16 and 32 take equally
# long, and butterflies, which the compiler fuses with the draws and so computes again and again,
# several times that; the larger, the fewer the passes over memory.
_RADIX = 16


# Numbers projected at a time. Of all that is projected only the result is ever in memory: the draws
# and the steps of the transform are a chunk's. From 2**18 to 2**23, CPUs take equally long.
_CHUNK = 2**22


def walsh_hadamard(x: Array) -> Array:
    """Product with the Walsh-Hadamard matrix, `y[i] = sum_j (-1)^popcount(i & j) x[j]`.

    Not normalised: twice is `n` times the input.

    Args:
      x: `[..., n]`, `n` a power of two.

    Returns:
      `[..., n]` of `x`'s dtype.

    Raises:
      ValueError: if `n` is no power of two.
    """
    n = x.shape[-1] if x.ndim else 0
    if n != _power_of_two(n):
        raise ValueError(
            f"the last axis of shape {x.shape} has size {n}, which is no power of two; "
            f"pad it to {_power_of_two(n)}"
        )
    # H_n is the Kronecker product of small ones, each acting on an axis of its own. The first axis
    # is transformed and put last, until all are in their old order.
    y = x.reshape(-1, n)
    for radix in _radices(n):
        axes = y.reshape(-1, radix, n // radix)
        H = jnp.asarray(_hadamard(radix), x.dtype)
        y = jnp.einsum("bfm,fg->bmg", axes, H, precision="highest").reshape(-1, n)
    return y.reshape(x.shape)


def _power_of_two(n: int) -> int:
    """The least that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def _radices(n: int) -> list[int]:
    """Factors of `n`, a power of two, none above `_RADIX`."""
    return [_RADIX, *_radices(n // _RADIX)] if n > _RADIX else [n]


def _hadamard(n: int) -> np.ndarray:
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H


def _random_words(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Array, Array]:
    """Threefry-2x32 of 20 rounds: 64 random bits for each key and counter, of 32 each.

    A stored `v` means nothing without its `P`, so `P` must come out the same for ever. `jax.random`
    promises that neither between versions nor between its own settings; this is the published
    function, and unrolled it is about three times as fast on CPUs.

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
    """Standard normal float32 values, one of each random word."""
    # Odd multiples of 2**-23, between -1 and 1 and symmetric, all of them exact.
    uniform = (2 * (words >> jnp.uint32(9)).astype(jnp.int32) + (1 - 2**23)) * jnp.float32(2**-23)
    return jnp.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)


@jax.jit
def mixed(vector: Array, seed: int | Array) -> Array:
    """`u = Pi H B v / sqrt(L)`, which has the norm of `v` and is equally spread whatever `v` is.

    One `B` and one `Pi` serve every block, so that this is computed once and nothing is sorted for
    each of them. No block is the worse for it: given `B` and `Pi`, each row of `P` is a vector of
    `d` independent normal values (`H`, `B` and `Pi` turn it, which changes nothing), and rows of
    different blocks are independent, as their `G` are. Entries of different rows of one block have
    correlations of `O(1 / sqrt(L))`, those of two Walsh functions in different order; without `Pi`
    the `L^2` entries would have but `L` absolute values.

    Args:
      vector: `[d]`.
      seed: of all that is random.

    Returns:
      `[L]` float32, `L` the power of two next to `d`.

    Raises:
      ValueError: if `vector` is not of rank 1, or empty.
    """
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"vector must be of shape [d], d at least 1; got {vector.shape}")
    length = _power_of_two(vector.size)
    key = jnp.uint32(seed), jnp.uint32(0)  # where tensors have a hash of their names
    counter = jnp.uint32(0), jnp.arange(length, dtype=jnp.uint32)
    signs, order = _random_words(key, counter)
    padded = jnp.pad(vector.astype(jnp.float32), (0, length - vector.size))
    flipped = jnp.where(signs >> jnp.uint32(31), -padded, padded)
    return walsh_hadamard(flipped)[jnp.argsort(order)] / math.sqrt(length)


def project(mixture: Array, size: int, name: str, seed: int | Array) -> Array:
    """`P v` for one tensor, of expected squared norm `|v|^2`.

    Each of its entries is normal with variance `|v|^2 / size`. As in the released code of
    arXiv:2012.13255, `E |P_t v|^2 = |v|^2` for every tensor `t`; unlike there, every tensor depends
    on all of `v`, small ones too, and gradients are those of the function (there they are divided
    by the tensor's own `L`).

    Args:
      mixture: `[L]`, from `mixed` with the same seed.
      size: of the tensor.
      name: of the tensor; one of another name has another `P`.
      seed: of all that is random.

    Returns:
      `[size]` float32.
    """
    factors = jnp.full(1, 1 / math.sqrt(size), jnp.float32)
    return project_all(mixture, {name: size}, factors, seed)[name]


def project_all(
    mixture: Array, sizes: Mapping[str, int], factors: Array, seed: int | Array
) -> dict[str, Array]:
    """`factor H G u` for each name and size, in one loop over the blocks of all.

    `factors` has the shape `[names]`. Each tensor has whole blocks: sharing one between small
    tensors would save little (8 % of the blocks of MiniLM-L6, 1 % of T5-base's), and make the
    numbers of each depend on the others.
    """
    length = mixture.size
    counts = [-(-size // length) for size in sizes.values()]
    tensors = np.repeat(np.arange(len(sizes)), counts)
    names = np.array([zlib.crc32(name.encode()) for name in sizes], np.uint32)[tensors]
    indices = np.concatenate([np.arange(count, dtype=np.uint32) for count in counts])

    # Drawn again for gradients, not stored. Factors come in here, for then nor is what they
    # multiply, which would be another copy of the model.
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
    # The gradient of one split is one concatenation; each of many slices would have an array of all
    # the rows.
    *parts, _ = jax.lax.split(rows.reshape(-1), [length * count for count in (*counts, spare)])
    return {name: part[:size] for (name, size), part in zip(sizes.items(), parts, strict=True)}
