"""Losses of sentence embeddings, as pure functions of arrays, one loss for each row of a batch.

All of them compute in float32 at least, and agree with those of sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from compacter_jax.nn.dtypes import at_least_float32

# The smallest norm that an embedding is divided by, as `torch.nn.functional.normalize` has it.
_LEAST_NORM = 1e-12


def normalize(embeddings: Array) -> Array:
    """Returns embeddings divided by their Euclidean norms, in float32 at least.

    Args:
      embeddings: `[…, width]`.

    Returns:
      `[…, width]`; an embedding of zeros stays one, and has a finite gradient.
    """
    x = at_least_float32(embeddings)
    squared = jnp.sum(jnp.square(x), -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, _LEAST_NORM**2))


def multiple_negatives_ranking_loss(
    anchors: Array,
    candidates: Array,
    *,
    scale: float = 20.0,
    positives: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Computes the cross-entropy of each anchor's positive among all candidates.

    The logits are cosine similarities times `scale`.

    Args:
      anchors: `[rows, width]`.
      candidates: `[candidates, width]`: the positives of the rows and perhaps further negatives.
        All candidates but its own positive are negatives of a row.
      scale: the factor of the similarities, the inverse of a temperature.
      positives: `[rows]` integers, the place of each row's positive among the candidates; None if
        the first `rows` candidates are the positives, in the order of the anchors.
      mask: `[rows, candidates]` booleans, False for a candidate that is left out of the softmax of
        a row; None for all. A row's own positive always counts.

    Returns:
      `[rows]` losses.

    Raises:
      ValueError: if the shapes do not fit.

    References:
      Henderson et al., Efficient Natural Language Response Suggestion for Smart Reply, 2017,
      arXiv:1705.00652, section 4.4; van den Oord et al., Representation Learning with Contrastive
      Predictive Coding, 2018, arXiv:1807.03748, equation 4.
    """
    rows = len(anchors)
    if anchors.ndim != 2 or candidates.ndim != 2 or anchors.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"anchors {anchors.shape} and candidates {candidates.shape} must be [rows, width] and "
            "[candidates, width]"
        )
    if positives is None:
        if len(candidates) < rows:
            raise ValueError(
                f"{rows} anchors have {len(candidates)} candidates; each needs its positive"
            )
        positives = jnp.arange(rows)
    similarities = jnp.matmul(
        normalize(anchors), normalize(candidates).T, precision=jax.lax.Precision.HIGHEST
    )
    logits = scale * similarities
    own = positives[:, None]
    if mask is not None:
        is_own = jnp.arange(len(candidates)) == own
        logits = jnp.where(mask | is_own, logits, -jnp.inf)
    right = jnp.take_along_axis(logits, own, axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - right


def cosine_similarity_loss(first: Array, second: Array, scores: Array) -> Array:
    """Computes the squared difference between the cosine of two embeddings and a score.

    Args:
      first: `[rows, width]`.
      second: `[rows, width]`.
      scores: `[rows]`, from -1 to 1.

    Returns:
      `[rows]` losses.

    References:
      Reimers and Gurevych, Sentence-BERT, EMNLP 2019, arXiv:1908.10084, section 3.
    """
    return jnp.square(jnp.sum(normalize(first) * normalize(second), -1) - scores)


def triplet_loss(
    anchors: Array, positives: Array, negatives: Array, *, margin: float = 5.0
) -> Array:
    """Computes how much nearer than `margin` a negative is, compared with the positive.

    The loss is `max(|anchor - positive| - |anchor - negative| + margin, 0)` with Euclidean norms.
    The gradient of a distance of 0 is 0.

    Args:
      anchors: `[rows, width]`.
      positives: `[rows, width]`.
      negatives: `[rows, width]`.
      margin: the margin, in the unit of the embeddings; those of norm 1 are at most 2 apart.

    Returns:
      `[rows]` losses.

    References:
      Reimers and Gurevych, Sentence-BERT, EMNLP 2019, arXiv:1908.10084, section 3.
    """
    anchors = at_least_float32(anchors)
    nearer = _distance(anchors, positives) - _distance(anchors, negatives)
    return jax.nn.relu(nearer + margin)


def matryoshka_loss(
    loss: Callable[[Array], Array], embeddings: Array, dimensions: Sequence[int]
) -> Array:
    """Computes the sum of a loss over the first dimensions of embeddings, for each of some widths.

    Args:
      loss: embeddings `[…, width]` -> losses; it is called with the first `dimensions` numbers of
        all embeddings, divided by their norm.
      embeddings: `[…, width]`.
      dimensions: the widths; that of the embeddings themselves is one of them if it is to be
        trained.

    Returns:
      The sum of what `loss` returns, with weight 1 for each width.

    Raises:
      ValueError: if there are no dimensions, or one is not from 1 to the width.

    References:
      Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, arXiv:2205.13147,
      equation 1.
    """
    check_dimensions(dimensions, embeddings.shape[-1])
    if not dimensions:
        raise ValueError("dimensions is empty; give at least one width")
    parts = [loss(normalize(embeddings[..., :dimension])) for dimension in dimensions]
    return jnp.sum(jnp.stack(parts), axis=0)


def check_dimensions(dimensions: Sequence[int], width: int) -> None:
    """Raises ValueError if a Matryoshka dimension is not from 1 to the width of the embeddings."""
    for dimension in dimensions:
        if not 1 <= dimension <= width:
            raise ValueError(
                f"the Matryoshka dimension {dimension} must be from 1 to {width}, the width of the "
                "embeddings"
            )


def _distance(first: Array, second: Array) -> Array:
    """Returns `[rows]` Euclidean distances."""
    squared = jnp.sum(jnp.square(first - second), -1)
    # The derivative of a square root at 0 is infinite, and a product with 0 would be NaN.
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
