"""Checks of the arguments of a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compacter_jax.nn.attention import Cache


def check_inputs(
    vocab_size: int, name: str, ids: Array, mask_name: str, mask: Array | None
) -> None:
    """Raises ValueError if ids are outside of the vocabulary or the mask has another shape."""
    if ids.ndim != 2:
        raise ValueError(f"{name} has shape {ids.shape}; it must be [batch, length]")
    if not ids.shape[1]:
        raise ValueError(
            f"{name} has shape {ids.shape}, so it has no tokens; give at least one per row"
        )
    check_ids(name, ids, vocab_size, "vocab_size")
    _check_mask(mask_name, mask, name, ids.shape)


def check_features(width: int, features: Array, mask: Array | None) -> None:
    """Checks features of frames `[batch, frames, width]` and their mask `[batch, frames]`.

    Raises:
      ValueError: if a shape or a dtype does not fit, or padding comes before a frame (where the
        values of the mask are known).
    """
    if features.ndim != 3 or features.shape[2] != width:
        raise ValueError(
            f"input_features has shape {features.shape}; it must be [batch, frames, {width}], as "
            "input_feat_per_channel of the model's configuration says"
        )
    if not features.shape[1]:
        raise ValueError(
            f"input_features has shape {features.shape}, so it has no frames; give at least one "
            "per row"
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(
            f"input_features has dtype {features.dtype}; it must be floating-point numbers, such "
            "as log-mel energies, not the samples of a recording"
        )
    _check_mask("attention_mask", mask, "input_features", features.shape[:2])
    if mask is not None and _is_known(mask):
        present = np.asarray(mask) != 0
        rising = np.argwhere(present[:, 1:] & ~present[:, :-1])
        if rising.size:
            raise ValueError(
                f"attention_mask has 0 before 1 in row {rising[0, 0]}; padding of speech must be "
                "on the right of a row"
            )


def check_source(
    width: int,
    ids: Array,
    states: Array | None,
    given: Array | None,
    mask: Array | None,
    cache: Cache | None,
) -> None:
    """Checks the mask and states (or cache) of the encoder that the decoder's `ids` attend to.

    Args:
      width: width of the states.
      ids: the decoder's ids, `[batch, target length]`.
      states: the encoder's states, or None.
      given: mask of the encoder's inputs, or None.
      mask: the mask of the encoder's states that follows from it, or None.
      cache: cache of the decoder, or None.

    Raises:
      ValueError: if a shape or the type of the mask does not fit.
    """
    if states is not None:
        if states.ndim != 3 or states.shape[2] != width:
            raise ValueError(
                f"encoder_hidden_states has shape {states.shape}; it must be [batch, length, "
                f"d_model={width}]"
            )
        rows, length, _ = states.shape
    elif cache is not None:
        rows, length = cache.source_shape
    if ids.shape[0] != rows:
        raise ValueError(
            f"decoder_input_ids has {ids.shape[0]} rows, but the encoder's states have {rows}; "
            "give the same number of rows"
        )
    if given is None or mask is None:
        return
    if given.shape != mask.shape != (rows, length):
        raise ValueError(
            f"attention_mask has shape {given.shape}, which leaves {mask.shape} for the encoder's "
            f"states of shape {(rows, length)}; give the mask of the encoder's inputs"
        )
    _check_mask("attention_mask", mask, "the encoder's states", (rows, length))
    _check_mask("attention_mask", given, "the encoder's inputs", given.shape)


def _check_mask(name: str, mask: Array | None, of: str, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {mask.shape}; it must have the shape of {of}, {shape}")
    if jnp.issubdtype(mask.dtype, jnp.floating):
        # A floating-point mask might be an additive one, with 0 to attend and -inf to ignore: the
        # opposite.
        raise ValueError(
            f"{name} has dtype {mask.dtype}; it must be integers or booleans, 1 at tokens and 0 "
            "at padding"
        )


def check_ids(name: str, ids: Any, size: int, field: str) -> None:
    """Checks that a table of `size` rows has every id, if the values are known.

    The function does not check a tracer, whose values are unknown. `Embed` gives NaN for an id that
    the table does not have.

    Args:
      name: name of the argument.
      ids: integers of any shape.
      size: number of rows of the table.
      field: field of the configuration that holds `size`.

    Raises:
      ValueError: if an id is negative, or not less than `size`.
    """
    if not _is_known(ids):
        return
    values = np.asarray(ids)
    outside = (values < 0) | (values >= size)
    if not outside.any():
        return
    place = tuple(np.argwhere(outside)[0].tolist())
    value = int(values[place])
    found = f"contains {value} at {place}" if place else f"is {value}"
    hint = "; -100 marks labels that a loss ignores: give pad_token_id" if value == -100 else ""
    raise ValueError(f"{name} {found}; use 0 to {field} - 1 = {size - 1}{hint}")


def _is_known(array: Any) -> bool:
    """Returns True if the values of an array can be read here, and are not traced."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
