"""The model, Capon, MUSIC, ESPRIT, joint optimisation and peaks against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compacter_jax import arrays
from tests.arrays import reference

GRID = np.linspace(60, 120, 31)
ANGLES = np.array([81.0, 97.0])


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    """Runs this file with 64 bits."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def values():
    return reference.snapshots(np.random.default_rng(0), ANGLES, 11, 25, correlation=0.6)


def test_steering():
    """The phase of sensor m is that of a wave from the angle, in both precisions."""
    found = arrays.steering(GRID, 11)
    assert found.dtype == jnp.complex128
    np.testing.assert_allclose(found, reference.steering(GRID, 11), atol=1e-13)
    single = arrays.steering(GRID.astype(np.float32), 11)
    assert single.dtype == jnp.complex64
    np.testing.assert_allclose(single, found, atol=1e-4)
    np.testing.assert_allclose(arrays.steering([60, 90], 4)[1], 1, atol=1e-13)


def test_drawn_snapshots_have_the_covariance_of_the_model():
    """Powers, correlation and noise are those that were asked for."""
    snr, count = np.array([3.0, 9.0]), 40_000
    drawn = arrays.simulate(jax.random.key(1), ANGLES, 5, count, snr, 0.7)
    assert drawn.shape == (count, 5)
    a, amplitude = reference.steering(ANGLES, 5).T, 10 ** (snr / 20)
    power = np.outer(amplitude, amplitude) * np.array([[1, 0.7], [0.7, 1]])
    expected = a @ power @ a.conj().T + np.eye(5)
    np.testing.assert_allclose(
        np.array(drawn).T @ np.array(drawn).conj() / count,
        expected,
        atol=0.03 * np.abs(expected).max(),
    )
    # Circular: no correlation with the conjugate.
    mirrored = np.array(drawn).T @ np.array(drawn) / count
    assert np.abs(mirrored).max() < 0.03 * np.abs(expected).max()


def test_coherent_sources_are_one_signal():
    """With correlation 1 the snapshots without noise lie on one line."""
    drawn = np.array(arrays.simulate(jax.random.key(2), ANGLES, 6, 40, 80.0, 1.0))
    singular = np.linalg.svd(drawn, compute_uv=False)
    assert singular[1] < 1e-3 * singular[0]


@pytest.mark.parametrize("window", [None, 8, 11])
def test_capon(values, window):
    """The spectrum is that of the inverse covariance, with forgetting and loading."""
    matrix = reference.covariance(values) if window is None else reference.smoothed(values, window)
    size = len(matrix)
    found = arrays.capon(values, GRID, window=window, loading=0.3)
    expected = reference.capon(matrix + 0.3 * np.eye(size), reference.steering(GRID, size))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_capon_forgets_as_the_recursion_does(values):
    """The covariance is that of a recursion with the same forgetting and loading."""
    found = arrays.capon(values, GRID, forgetting=0.9, loading=0.3)
    matrix = reference.covariance(values, 0.9, 0.3)
    expected = reference.capon(matrix, reference.steering(GRID, 11))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("window", [None, 8])
def test_music(values, window):
    """The spectrum is that of the projection on the noise subspace."""
    matrix = reference.covariance(values) if window is None else reference.smoothed(values, window)
    found = arrays.music(values, GRID, 2, window=window)
    expected = reference.music(matrix, reference.steering(GRID, len(matrix)), 2)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("window", [None, 8])
def test_esprit(values, window):
    """Directions are those of the rotation between two parts of the line."""
    matrix = reference.covariance(values) if window is None else reference.smoothed(values, window)
    found = arrays.esprit(values, 2, window=window)
    np.testing.assert_allclose(found, reference.esprit(matrix, 2), atol=1e-8)
    np.testing.assert_allclose(found, ANGLES, atol=1)


def test_smoothing_finds_coherent_sources():
    """Coherent sources have one dimension without smoothing, and two peaks with it."""
    drawn = reference.snapshots(
        np.random.default_rng(3), ANGLES, 20, 50, snr_db=15.0, correlation=1.0
    )
    grid = np.linspace(70, 110, 201)
    found = arrays.peaks(arrays.music(drawn, grid, 2, window=14), grid, 2)
    np.testing.assert_allclose(found, ANGLES, atol=0.5)
    np.testing.assert_allclose(arrays.esprit(drawn, 2, window=14), ANGLES, atol=0.5)
    np.testing.assert_allclose(
        arrays.peaks(arrays.capon(drawn, grid, window=14), grid, 2), ANGLES, atol=0.7
    )


def test_joint_optimisation(values):
    """The spectrum is that of matrix and vector in turn, before rounding errors grow."""
    values = values[:6]
    found = arrays.jio(values, GRID, rank=3, forgetting=0.97, loading=0.7)
    responses = reference.steering(GRID, 11)
    expected = [reference.jio(values, a, 3, 0.97, 0.7) for a in responses]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("correlation", [0.0, 0.9, 1.0])
def test_cramer_rao(correlation):
    """The bound is the inverse of the whole Fisher information of a Gaussian covariance.

    For coherent sources that information is singular, and the bound is its limit.
    """
    found = arrays.cramer_rao(ANGLES, 9, 40, 5.0, correlation)
    near = min(correlation, 1 - 1e-6)
    expected = reference.cramer_rao(ANGLES, 9, 40, 5.0, near)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_peaks():
    """A parabola in the logarithm is found where it is, in rising order, the highest first."""
    grid = np.linspace(0, 10, 41) + np.where(np.arange(41) % 2, 0.03, 0)

    def hill(at, height):
        return height * np.exp(-((grid - at) ** 2))

    spectrum = np.maximum(np.maximum(hill(7.13, 2.0), hill(3.31, 5.0)), hill(0.0, 9.0) + 1e-9)
    np.testing.assert_allclose(arrays.peaks(spectrum, grid, 2), [3.31, 7.13], atol=1e-6)
    np.testing.assert_allclose(arrays.peaks(spectrum, grid, 1), [3.31], atol=1e-6)
    three = arrays.peaks(np.stack([spectrum, spectrum[::-1]]), grid, 3)
    assert three.shape == (2, 3)
    assert np.isnan(three[0, 2])
    np.testing.assert_allclose(three[0, :2], [3.31, 7.13], atol=1e-6)


METHODS = {
    "set": lambda x, grid: arrays.alrd(x, grid, window=10, rank=4),
    "shared": lambda x, grid: arrays.alrd(x, grid, window=16, rank=5, modified=True),
    "capon": arrays.capon,
    "music": lambda x, grid: arrays.music(x, grid, 1),
    "smoothed music": lambda x, grid: arrays.music(x, grid, 1, window=14),
    "jio": lambda x, grid: arrays.jio(x, grid, rank=4),
}


@pytest.mark.parametrize("method", [*METHODS, "esprit"])
def test_one_source(method):
    """One source at 10 dB is found within half a degree in 20 of 20 trials of 100 snapshots."""
    grid = np.arange(40.0, 140.0, 1.0, dtype=np.float32)
    angles = np.random.default_rng(5).uniform(50, 130, 20).astype(np.float32)
    keys = jax.random.split(jax.random.key(6), 20)

    @jax.jit
    def found(key, angle):
        x = arrays.simulate(key, angle[None], 20, 100, 10.0)
        if method == "esprit":
            return arrays.esprit(x, 1)[0]
        return arrays.peaks(METHODS[method](x, grid), grid, 1)[0]

    errors = [float(found(key, angle)) - angle for key, angle in zip(keys, angles, strict=True)]
    assert np.abs(errors).max() < 0.5
