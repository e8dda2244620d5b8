"""Directions of arrival with a line of sensors; imports JAX and nothing of the adapters.

`alrd` is a reconstruction after the abstract of Qiu, Cai, de Lamare and Zhao, *Reduced-Rank DOA
Estimation Algorithms Based on Alternating Low-Rank Decomposition* (IEEE Signal Processing Letters
2016, arXiv:1604.04321). The paper itself was not at hand: what `compacter_jax.arrays.alternating`
computes may differ from it. The model, for snapshots i = 1 … N of M sensors half a wavelength
apart and K sources, is `r(i) = A s(i) + n(i)` with `A = [a(t_1) … a(t_K)]`.

Angles are in degrees, measured from the line of the sensors: 90 is broadside. Snapshots are
complex64 or complex128 arrays `[N, M]`, spectra are real arrays `[G]`, one value for each angle of
a grid. Every function works under `jax.jit` and `jax.vmap`; values are checked where they are
concrete, and snapshots inside a transformation are not.
"""

from compacter_jax.arrays.alternating import alrd, alrd_filters, alrd_init, alrd_step
from compacter_jax.arrays.iterative import jio
from compacter_jax.arrays.model import cramer_rao, simulate, steering
from compacter_jax.arrays.spectrum import capon, esprit, music, peaks

__all__ = [
    "alrd",
    "alrd_filters",
    "alrd_init",
    "alrd_step",
    "capon",
    "cramer_rao",
    "esprit",
    "jio",
    "music",
    "peaks",
    "simulate",
    "steering",
]
