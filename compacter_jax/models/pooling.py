"""Pooling: what a classifier on an encoder reads of the states of the tokens."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compacter_jax.files import read_json, replace_file
from compacter_jax.messages import listing, quote

Pooling = Literal["first", "mean", "cls"]
"""The pooling of a classifier: the first token through the pooler as in transformers, the mean of
the tokens, or the first token as it is."""
POOLINGS: tuple[Pooling, ...] = typing.get_args(Pooling)
DEFAULT: Pooling = "first"
POOLING_FILE = "1_Pooling/config.json"
# Other files of sentence-transformers, beside config.json.
MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
TOKENIZING_FILE = "sentence_bert_config.json"
SENTENCE_FILES = (POOLING_FILE, MODULES_FILE, PROMPTS_FILE, TOKENIZING_FILE)
# Field of sentence-transformers' file -> the pooling that it turns on; others are not supported.
_FIELDS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_NAMES: dict[str, Pooling] = {"mean": "mean", "cls": "cls"}


def mean_of_tokens(states: Array, attention_mask: Array | None) -> Array:
    """Returns the mean of the states of the unmasked tokens, summed in float32 at least.

    Args:
      states: `[batch, length, hidden]`.
      attention_mask: `[batch, length]`, zero at padding; None for no padding.

    Returns:
      `[batch, hidden]` in the dtype of `states`; NaN in a row of nothing but padding.
    """
    at_least_float32 = jnp.promote_types(states.dtype, jnp.float32)
    if attention_mask is None:
        return states.mean(1, dtype=at_least_float32).astype(states.dtype)
    kept = (attention_mask != 0).astype(states.dtype)
    total = jnp.einsum("bl,blh->bh", kept, states, preferred_element_type=at_least_float32)
    return (total / kept.sum(1, keepdims=True, dtype=at_least_float32)).astype(states.dtype)


def pool(states: Array, attention_mask: Array | None, pooling: Pooling) -> Array:
    """Returns one vector for each sequence, without a layer of the backbone.

    Args:
      states: `[batch, length, hidden]`, the last hidden states.
      attention_mask: `[batch, length]`, zero at padding; None for no padding.
      pooling: "mean" for the mean of the unmasked tokens, or "cls" for the first token.

    Returns:
      `[batch, hidden]` in the dtype of `states`; NaN for the mean of nothing but padding.

    Raises:
      ValueError: for another pooling; "first" needs a layer of the backbone, its pooler.
    """
    if pooling not in ("mean", "cls"):
        raise ValueError(
            f"pooling={quote(pooling)} is not one of 'mean' and 'cls'; 'first' has a layer of its "
            "own in the backbone, which embeddings do not"
        )
    return mean_of_tokens(states, attention_mask) if pooling == "mean" else states[:, 0]


def check_tokens(attention_mask: Any) -> None:
    """Checks that every row has a token to take the mean of, as far as the values are known.

    Raises:
      ValueError: for a row of nothing but padding.
    """
    if isinstance(attention_mask, jax.core.Tracer) or attention_mask is None:
        return
    if not getattr(attention_mask, "is_fully_addressable", True):
        return
    empty = np.flatnonzero(~(np.asarray(attention_mask) != 0).any(-1))
    if len(empty):
        raise ValueError(
            f"attention_mask has nothing but padding in row {empty[0]}, and pooling='mean' takes "
            "the mean of the tokens; give every row at least one token"
        )


def read_pooling(folder: Path, file: str = POOLING_FILE) -> Pooling | None:
    """Reads the pooling that a checkpoint was trained with from sentence-transformers' file.

    Args:
      folder: of the checkpoint.
      file: path of the file in the folder.

    Returns:
      None where there is no such file.

    Raises:
      ValueError: if the file is no such configuration, or its pooling is not supported.
    """
    path = folder / file
    if not path.is_file():
        return None
    settings = read_json(path, what="the pooling of a model of sentence-transformers")
    named = settings.get("pooling_mode")
    chosen = {
        name for name, value in settings.items() if name.startswith("pooling_mode_") and value
    }
    if named is not None:
        return _supported(path, f"pooling_mode={quote(named, 60)}", _name_of(named), _NAMES)
    if len(chosen) != 1:
        said = f"sets {listing(sorted(chosen))}" if chosen else "sets no field pooling_mode_…"
        raise ValueError(f"{path} {said}; {_FIX}")
    (field,) = chosen
    return _supported(path, field, field, _FIELDS)


_FIX = (
    "supported are pooling_mode_mean_tokens and pooling_mode_cls_token, each alone; choose with "
    "pooling='first', 'mean' or 'cls'"
)


def _name_of(named: Any) -> Any:
    """The one mode that `pooling_mode` names, alone or in a list."""
    return named[0] if isinstance(named, list) and len(named) == 1 else named


def _supported(path: Path, field: str, name: Any, known: dict[str, Pooling]) -> Pooling:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{path} says {field}, which is not supported; {_FIX}")
    return known[name]


def pooling_of_module(module: Any) -> Pooling | None:
    """Returns the pooling of a classifier of sequences, None of other modules."""
    if getattr(module, "head", None) != "sequence_classification":
        return None
    pooling = getattr(module, "pooling", None)
    return pooling if pooling in POOLINGS else None


def check_written(folder: Path, pooling: Pooling) -> None:
    """Checks that a head written to a folder will be read with its own pooling.

    Raises:
      ValueError: if the folder has another pooling.
    """
    if pooling == DEFAULT and (folder / POOLING_FILE).is_file():
        raise ValueError(
            f"{folder / POOLING_FILE} says how a head is to be read, and this one has "
            f"pooling={pooling!r}; choose another folder, or remove the file"
        )


def write_pooling(folder: Path, pooling: Pooling, width: int) -> None:
    """Writes sentence-transformers' file of a pooling; nothing for a head with a pooler.

    Args:
      folder: of the checkpoint.
      pooling: of its head.
      width: of the hidden states.
    """
    if pooling == DEFAULT:
        return
    settings = {"word_embedding_dimension": width}
    settings |= {field: pooling == each for field, each in _FIELDS.items()}
    path = folder / POOLING_FILE
    path.parent.mkdir(exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
