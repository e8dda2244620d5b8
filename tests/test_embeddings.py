"""Compares the losses of embeddings and their gradients with float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj

ROWS, NEGATIVES, WIDTH = 5, 7, 11
# (dtype, tolerance of a loss, tolerance of a gradient): finite differences of the oracle are good
# to 1e-8.
DTYPES = [(np.float64, 1e-12, 1e-7), (np.float32, 1e-6, 1e-6)]


@pytest.fixture(scope="module", autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ranking(anchors, candidates, scale=20.0, mask=None):
    logits = scale * unit(anchors) @ unit(candidates).T
    if mask is not None:
        logits = np.where(
            mask | (np.arange(len(candidates)) == np.arange(ROWS)[:, None]), logits, -np.inf
        )
    return np.log(np.exp(logits).sum(1)) - np.diag(logits)


def cosine(first, second, scores):
    return ((unit(first) * unit(second)).sum(1) - scores) ** 2


def triplet(anchors, positives, negatives, margin=5.0):
    near, far = (np.sqrt(((anchors - x) ** 2).sum(1)) for x in (positives, negatives))
    return np.maximum(near - far + margin, 0)


def drawn(*sizes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(size, WIDTH)) for size in sizes]


SCORES = np.random.default_rng(9).uniform(-1, 1, ROWS)
MASK = np.random.default_rng(8).uniform(size=(ROWS, ROWS + NEGATIVES)) < 0.6
CASES = {
    "ranking": (
        cj.multiple_negatives_ranking_loss,
        ranking,
        drawn(ROWS, ROWS + NEGATIVES),
    ),
    "ranking, masked": (
        lambda *x: cj.multiple_negatives_ranking_loss(*x, scale=3.0, mask=MASK),
        lambda *x: ranking(*x, scale=3.0, mask=MASK),
        drawn(ROWS, ROWS + NEGATIVES, seed=1),
    ),
    "cosine": (
        lambda *x: cj.cosine_similarity_loss(*x, SCORES.astype(x[0].dtype)),
        lambda *x: cosine(*x, SCORES),
        drawn(ROWS, ROWS, seed=2),
    ),
    "triplet": (
        lambda *x: cj.triplet_loss(*x, margin=0.3),
        lambda *x: triplet(*x, margin=0.3),
        drawn(ROWS, ROWS, ROWS, seed=3),
    ),
}


def numerical_gradient(function, arrays, step=1e-6):
    """Returns central differences of a sum of losses, one array for each argument."""
    found = []
    for i, array in enumerate(arrays):
        slopes = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            values = []
            for sign in (1, -1):
                moved = [x.copy() for x in arrays]
                moved[i][place] += sign * step
                values.append(function(*moved).sum())
            slopes[place] = (values[0] - values[1]) / (2 * step)
        found.append(slopes)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "of_loss", "of_gradient"), DTYPES)
def test_loss_and_gradient_equal_numpy(name, dtype, of_loss, of_gradient):
    ours, oracle, arrays = CASES[name]
    given = [jnp.asarray(x, dtype) for x in arrays]
    losses, gradients = jax.jit(
        lambda *x: (ours(*x), jax.grad(lambda *y: ours(*y).sum(), tuple(range(len(x))))(*x))
    )(*given)
    assert losses.dtype == dtype
    exact = [np.asarray(x, np.float64) for x in given]
    wanted = oracle(*exact)
    assert len(set(np.round(wanted, 6))) > 1
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=of_loss * scale)
    for found, slopes in zip(gradients, numerical_gradient(oracle, exact), strict=True):
        largest = max(1.0, float(np.abs(slopes).max()))
        np.testing.assert_allclose(found, slopes, rtol=0, atol=of_gradient * largest)


def test_matryoshka_sums_the_losses_of_normalised_beginnings():
    embeddings = np.stack(drawn(ROWS, ROWS, ROWS, seed=4), axis=1)
    dimensions = (WIDTH, 4, 1)
    for name, count in {"triplet": 3, "cosine": 2}.items():
        ours, oracle, _ = CASES[name]

        def of(loss, x, count=count):
            return loss(*(x[:, i] for i in range(count)))

        found = cj.matryoshka_loss(functools.partial(of, ours), jnp.asarray(embeddings), dimensions)
        wanted = sum(of(oracle, unit(embeddings[..., :width])) for width in dimensions)
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    for dimensions, told in (((12,), "12 must be from 1 to 11"), ((0,), "0 must"), ((), "empty")):
        with pytest.raises(ValueError, match=told):
            cj.matryoshka_loss(lambda x: x[:, 0, 0], jnp.asarray(embeddings), dimensions)


def test_positives_may_be_anywhere_and_count_though_masked():
    anchors, candidates = drawn(ROWS, ROWS + NEGATIVES, seed=5)
    order = np.random.default_rng(6).permutation(len(candidates))
    places = np.argsort(order)[:ROWS]
    found = cj.multiple_negatives_ranking_loss(
        jnp.asarray(anchors), jnp.asarray(candidates[order]), positives=jnp.asarray(places)
    )
    np.testing.assert_allclose(found, ranking(anchors, candidates), atol=1e-12)
    alone = cj.multiple_negatives_ranking_loss(
        jnp.asarray(anchors), jnp.asarray(candidates), mask=np.zeros_like(MASK)
    )
    np.testing.assert_allclose(alone, 0, atol=1e-12)
    with pytest.raises(ValueError, match=r"5 anchors have 4 candidates"):
        cj.multiple_negatives_ranking_loss(jnp.asarray(anchors), jnp.asarray(candidates[:4]))
    with pytest.raises(ValueError, match=r"must be \[rows, width\] and"):
        cj.multiple_negatives_ranking_loss(jnp.asarray(anchors), jnp.asarray(candidates[:, :4]))


def test_equal_embeddings_and_zeros_have_finite_gradients():
    """Padding rows may have any embedding, and must not spoil the gradient of the others."""
    zeros, (x,) = jnp.zeros((2, WIDTH)), drawn(2, seed=7)
    x = jnp.asarray(x)
    for loss in (
        lambda y: cj.multiple_negatives_ranking_loss(y, x).sum(),
        lambda y: cj.cosine_similarity_loss(y, x, jnp.ones(2)).sum(),
        lambda y: cj.triplet_loss(y, x, zeros).sum(),
    ):
        for place in (zeros, x):
            assert np.isfinite(jax.jit(jax.grad(loss))(place)).all()
    np.testing.assert_array_equal(cj.normalize(zeros), zeros)
    np.testing.assert_allclose(cj.normalize(x), unit(np.asarray(x)), atol=1e-12)


def test_low_precision_is_computed_in_float32():
    anchors, candidates = (jnp.asarray(x, jnp.bfloat16) for x in drawn(ROWS, ROWS, seed=10))
    exact = [np.asarray(x, np.float64) for x in (anchors, candidates)]
    found = cj.multiple_negatives_ranking_loss(anchors, candidates)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, ranking(*exact), rtol=2e-6, atol=1e-6)
    found = cj.triplet_loss(anchors, candidates, candidates[::-1])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, triplet(*exact, exact[1][::-1]), rtol=2e-6)


def test_embeddings_pool_as_they_say():
    (states,) = (np.stack(drawn(6, 6, 6, seed=11)),)
    mask = np.array([[1] * 6, [1] * 2 + [0] * 4, [0] + [1] * 5])
    means = np.stack([row[kept == 1].mean(0) for row, kept in zip(states, mask, strict=True)])
    for pooling, wanted in (("mean", means), ("cls", states[:, 0])):
        plain = cj.SentenceEmbedding(pooling)(jnp.asarray(states), jnp.asarray(mask))
        np.testing.assert_allclose(plain, wanted, atol=1e-12)
        normal = cj.SentenceEmbedding(pooling, normalize=True)(
            jnp.asarray(states), jnp.asarray(mask)
        )
        np.testing.assert_allclose(normal, unit(wanted), atol=1e-12)
        np.testing.assert_array_equal(
            cj.pool(jnp.asarray(states), jnp.asarray(mask), pooling), plain
        )
    with pytest.raises(ValueError, match="pooling='first' is not one of sentence embeddings"):
        cj.SentenceEmbedding("first")
    with pytest.raises(ValueError, match="pooling='first' is not one of 'mean' and 'cls'"):
        cj.pool(jnp.asarray(states), None, "first")
