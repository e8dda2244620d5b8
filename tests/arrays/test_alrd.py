"""Alternating low-rank decomposition against its formulas in NumPy, Capon, and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compacter_jax import arrays
from compacter_jax.arrays import least_squares
from tests.arrays import reference

GRID = np.array([62.0, 71.0, 80.0, 90.0, 97.0, 105.0, 118.0])
SENSORS, COUNT = 12, 30
FORMS = {
    "set": {"window": 5, "rank": 4, "modified": False},
    "shared": {"window": 9, "rank": 4, "modified": True},
}
FORGETTING, LOADING = 0.97, 0.7


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    """Runs this file with 64 bits."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def received(seed, sensors=SENSORS, count=COUNT, **options):
    return reference.snapshots(
        np.random.default_rng(seed), np.array([80.0, 97.0]), sensors, count, **options
    )


def steps_of(values, sensors=SENSORS, forgetting=FORGETTING, grid=GRID, **settings):
    """Returns the filters `[N, G, M]` and spectra `[N, G]` after every snapshot."""
    state = arrays.alrd_init(grid, sensors, dtype=jnp.complex128, **settings)
    found = []
    for value in values:
        state, spectrum = arrays.alrd_step(state, jnp.asarray(value), forgetting)
        found.append((arrays.alrd_filters(state, sensors), spectrum))
    return tuple(np.array(each) for each in zip(*found, strict=True))


def test_inversion_lemma():
    """The recursion has the inverse of the covariance after every snapshot."""
    values = received(0)
    inverse = least_squares.identity(SENSORS, (), LOADING, jnp.complex128)
    for i, value in enumerate(values):
        inverse, gain = least_squares.updated(inverse, jnp.asarray(value), FORGETTING)
        direct = np.linalg.inv(reference.covariance(values[: i + 1], FORGETTING, LOADING))
        loaded = np.linalg.inv(
            reference.covariance(values[: i + 1], FORGETTING)
            + LOADING * FORGETTING ** (i + 1) * np.eye(SENSORS)
        )
        np.testing.assert_allclose(direct, loaded, atol=1e-10)
        np.testing.assert_allclose(inverse, direct, atol=1e-10)
        np.testing.assert_allclose(gain, direct @ value, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_formulas(form):
    """Filters and powers of every snapshot and angle are those of the formulas, written out."""
    settings = FORMS[form]
    values = received(1)
    filters, spectra = steps_of(values, loading=LOADING, **settings)
    oracle = reference.alrd_shared if settings["modified"] else reference.alrd_set
    for g, a in enumerate(reference.steering(GRID, SENSORS)):
        expected = oracle(values, a, settings["window"], settings["rank"], FORGETTING, LOADING)
        np.testing.assert_allclose(filters[:, g], expected[0], atol=1e-9)
        np.testing.assert_allclose(spectra[:, g], expected[1], rtol=1e-9)


@pytest.mark.parametrize("recursion", ["rls", "covariance"])
@pytest.mark.parametrize("form", FORMS)
def test_constraint(form, recursion):
    """The response to the angle that is looked at is 1 after every snapshot."""
    filters, _ = steps_of(received(2), recursion=recursion, **FORMS[form])
    responses = np.einsum("ngm,gm->ng", filters.conj(), reference.steering(GRID, SENSORS))
    np.testing.assert_allclose(responses, 1, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_at_a_time_is_the_scan(form):
    """`alrd` gives the spectra that `alrd_step` gives snapshot by snapshot."""
    values = received(3)
    _, spectra = steps_of(values, **FORMS[form])
    options = {"forgetting": FORGETTING, **FORMS[form]}
    every = arrays.alrd(values, GRID, history=True, **options)
    assert every.shape == (COUNT, len(GRID))
    np.testing.assert_allclose(every, spectra, rtol=1e-9)
    np.testing.assert_array_equal(arrays.alrd(values, GRID, **options), every[-1])


def test_vmap_over_trials():
    """A batch of trials gives the spectra of the trials."""
    values = np.stack([received(seed) for seed in (4, 5)])
    spectra = jax.vmap(lambda each: arrays.alrd(each, GRID, **FORMS["set"]))(values)
    for one, spectrum in zip(values, spectra, strict=True):
        np.testing.assert_allclose(spectrum, arrays.alrd(one, GRID, **FORMS["set"]), rtol=1e-9)


def sweeps(values, count, sensors=SENSORS, loading=0.5, **settings):
    """Returns the power after every sweep for one covariance, and the last state."""
    state = arrays.alrd_init(
        GRID, sensors, recursion="covariance", loading=1.0, dtype=jnp.complex128, **settings
    )
    state = state._replace(covariance=jnp.asarray(reference.covariance(values, loading=loading)))

    def sweep(state, _):
        state, spectrum = state.sweep()
        return state, spectrum

    state, powers = jax.jit(lambda state: jax.lax.scan(sweep, state, length=count))(state)
    return np.array(powers), state


@pytest.mark.parametrize("form", FORMS)
def test_the_power_never_rises(form):
    """400 sweeps of the exact form only lower the output power, down to Capon's at the least."""
    values = received(6)
    powers, state = sweeps(values, 400, **FORMS[form])
    assert (np.diff(powers, axis=0) <= 1e-12 * powers[:-1]).all()
    matrix = reference.covariance(values, loading=0.5)
    least = reference.capon(matrix, reference.steering(GRID, SENSORS))
    assert (powers[-1] >= least * (1 - 1e-10)).all()
    assert (powers[-1] < 0.99 * powers[0]).any()
    # The spectrum is the power of the filter that the state has.
    filters = np.array(arrays.alrd_filters(state, SENSORS))
    spent = np.einsum("gm,mn,gn->g", filters.conj(), matrix, filters).real
    np.testing.assert_allclose(spent, powers[-1], rtol=1e-10)


def test_each_move_lowers_the_power():
    """Every single step of a sweep lowers the power, not only the sweep as a whole."""
    values = received(7)
    _, state = sweeps(values, 2, **FORMS["set"])

    def power(state):
        filters = np.array(arrays.alrd_filters(state, SENSORS))
        return np.einsum("gm,mn,gn->g", filters.conj(), state.covariance, filters).real

    for d in range(4):
        before, state = power(state), state.move(d)
        assert (power(state) <= before * (1 + 1e-12)).all()


@pytest.mark.parametrize("rank", [2, 3])
def test_blocks_converge_to_capon(rank):
    """Windows that do not overlap lose nothing: the spectrum becomes Capon's."""
    values = received(8, snr_db=0.0)
    powers, state = sweeps(values, 1500, window=SENSORS // rank, rank=rank)
    matrix = reference.covariance(values, loading=0.5)
    responses = reference.steering(GRID, SENSORS)
    np.testing.assert_allclose(powers[-1], reference.capon(matrix, responses), rtol=1e-6)
    assert not np.allclose(powers[0], powers[-1], rtol=1e-3)
    filters = np.stack([reference.capon_filter(matrix, a) for a in responses])
    np.testing.assert_allclose(arrays.alrd_filters(state, SENSORS), filters, atol=1e-6)


@pytest.mark.parametrize("recursion", ["rls", "covariance"])
def test_one_window_of_all_sensors_is_capon(recursion):
    """With D = 1 and I = M the filter is Capon's after every snapshot, in both recursions."""
    values = received(9)
    filters, spectra = steps_of(
        values, window=SENSORS, rank=1, loading=LOADING, recursion=recursion
    )
    for i in range(COUNT):
        matrix = reference.covariance(values[: i + 1], FORGETTING, LOADING)
        responses = reference.steering(GRID, SENSORS)
        expected = np.stack([reference.capon_filter(matrix, a) for a in responses])
        np.testing.assert_allclose(filters[i], expected, atol=1e-10)
        if recursion == "covariance":
            np.testing.assert_allclose(spectra[i], reference.capon(matrix, responses), rtol=1e-10)


def test_windows_over_the_whole_line_move_once():
    """With windows over all sensors the first basis vector already gives Capon's filter."""
    values = received(10)
    state = arrays.alrd_init(
        GRID, SENSORS, window=SENSORS, rank=2, recursion="covariance", dtype=jnp.complex128
    )
    matrix = reference.covariance(values, loading=0.5)
    state = state._replace(covariance=jnp.asarray(matrix)).move(0)
    responses = reference.steering(GRID, SENSORS)
    expected = np.stack([reference.capon_filter(matrix, a) for a in responses])
    np.testing.assert_allclose(arrays.alrd_filters(state, SENSORS), expected, atol=1e-10)
    again = state.move(1)
    np.testing.assert_allclose(again.basis, state.basis, atol=1e-8)
    np.testing.assert_allclose(arrays.alrd_filters(again, SENSORS), expected, atol=1e-10)


def test_a_shared_vector_is_convolved_with_the_weights():
    """The filter is the convolution of phi and w if windows move by one sensor."""
    state = arrays.alrd_init(GRID, SENSORS, dtype=jnp.complex128, **FORMS["shared"])
    for value in received(11):
        state, _ = arrays.alrd_step(state, jnp.asarray(value))
    filters = arrays.alrd_filters(state, SENSORS)
    for g in range(len(GRID)):
        expected = np.convolve(state.basis[0, g], state.weights[g])
        np.testing.assert_allclose(filters[g], expected, atol=1e-10)


@pytest.mark.parametrize(("form", "count"), [("set", COUNT), ("shared", 200)])
def test_single_precision_has_the_same_peaks(form, count):
    """complex64 finds the peaks of complex128.

    With a vector for each window, differences near sources grow with every snapshot, in both
    precisions, so that only a short run can be compared.
    """
    grid = np.arange(70.0, 110.0, 0.5)
    values = received(12, count=200)[:count]
    options = {"forgetting": 0.98, **FORMS[form]}
    double = arrays.alrd(values, grid, **options)
    single = arrays.alrd(values.astype(np.complex64), grid, **options)
    assert (double.dtype, single.dtype) == (np.float64, np.float32)
    found = [arrays.peaks(spectrum, grid, 2) for spectrum in (double, single)]
    np.testing.assert_allclose(found[1], found[0], atol=0.01)
    assert np.abs(np.array(found[0]) - [80, 97]).max() < 3


def test_images_follow_their_inverses():
    """`Q_d a_d`, which has an update of its own, stays the product, in single precision, too."""
    state = arrays.alrd_init(GRID, SENSORS, **FORMS["set"])
    for value in received(14, count=150).astype(np.complex64):
        state, _ = arrays.alrd_step(state, jnp.asarray(value), 0.95)
    products = np.einsum("dij,dgj->dgi", state.inverses, state.steering)
    np.testing.assert_allclose(state.images, products, atol=1e-4 * np.abs(products).max())


def test_inverses_stay_hermitian():
    """An error that is not Hermitian does not grow by forgetting."""
    values = received(13, count=400).astype(np.complex64)
    inverse = least_squares.identity(SENSORS, (), 1.0, jnp.complex64)
    inverse += 1e-4j * jnp.eye(SENSORS, dtype=jnp.complex64)[::-1]  # not Hermitian

    def step(inverse, value):
        return least_squares.updated(inverse, value, jnp.float32(0.9))[0], None

    inverse, _ = jax.jit(lambda values: jax.lax.scan(step, inverse, values))(values)
    inverse = np.array(inverse)
    np.testing.assert_array_equal(inverse, inverse.conj().T)
    direct = np.linalg.inv(reference.covariance(values.astype(complex), 0.9, 1.0))
    np.testing.assert_allclose(inverse, direct, atol=2e-4 * np.abs(direct).max())
