"""Tensors of a checkpoint fitted to a module: what it lacks, has in excess or has twice."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from compacter_jax.compilation import initialiser, run_once
from compacter_jax.files import read_json
from compacter_jax.messages import listing, shorten
from compacter_jax.models.family import Family, Params
from compacter_jax.weights import converted


def fit_tensors(
    found: dict[str, np.ndarray],
    module: Any,
    family: Family,
    *,
    folder: Path,
    seed: int,
) -> tuple[Params, tuple[str, ...]]:
    """Returns parameters in the form of `module.init`, and the paths of those not in `found`."""
    initial, key = initialiser(module), jax.random.key(seed)
    wanted = jax.eval_shape(initial, key)
    found = leave_out(found, [p for p in family.optional if not _within(p, wanted)], folder)
    _settle_ties(found, wanted, module, family, folder)
    for path, leaf in wanted.items():
        if path not in found and any(_within(part, [path]) for part in family.zeros):
            found[path] = np.zeros(leaf.shape, np.float32)
    found = leave_out(found, [p for p in family.droppable if not _within(p, wanted)], folder)
    for part in family.droppable:
        if _within(part, wanted) and not _within(part, found):
            raise ValueError(
                f"{folder} has no {part}, which head={module.head!r} needs; load a checkpoint that "
                "has one, or with another head"
                + (": head='encoder' for an encoder alone" if "encoder" in family.heads else "")
            )

    absent = [part for part in family.optional if not _within(part, found)]
    new = tuple(path for part in absent for path in _within(part, wanted))
    _check_new(folder, {path: wanted[path] for path in new}, found)
    _check_shapes(found, {p: leaf for p, leaf in wanted.items() if p not in new}, family, folder)
    fresh: dict[str, Any] = {}
    if new:
        logger.warning(
            "%s does not have %s: newly initialised, to be trained before use",
            folder,
            ", ".join(new),
            extra={"new_parameters": new},  # for callers that have these parameters from elsewhere
        )
        # The compiled function returns only these leaves, so that nothing else is computed.
        fresh = run_once(lambda key: {path: initial(key)[path] for path in new}, key)
    flat = {
        path: fresh[path]
        if path in fresh
        else jnp.asarray(converted(folder, path, found[path], leaf.dtype))
        for path, leaf in wanted.items()
    }
    return unflatten_dict(flat, sep="/"), new


# The allowed size of a new head, which may be larger than a small backbone.
_MANY = 2**24


def _check_new(folder: Path, new: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises ValueError if a new parameter is larger than all that the checkpoint has."""
    for path, leaf in new.items():
        size = math.prod(leaf.shape)
        if size > max(_MANY, sum(array.size for array in found.values())):
            raise ValueError(
                f"{path} would be new and of shape {leaf.shape}, larger than all that is in "
                f"{folder}; is the number of labels meant?"
            )


def _within(part: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if path.startswith(f"{part}/")]


def leave_out(
    found: dict[str, np.ndarray], parts: Iterable[str], folder: Path
) -> dict[str, np.ndarray]:
    """Returns what was found without some parts, and says which were left out."""
    dropped = [path for part in parts for path in _within(part, found)]
    if dropped:
        logger.info("left out of %s, as of another head: %s", folder, ", ".join(dropped))
    return {path: array for path, array in found.items() if path not in dropped}


def _settle_ties(
    found: dict[str, np.ndarray],
    wanted: Mapping[str, Any],
    module: Any,
    family: Family,
    folder: Path,
) -> None:
    """Removes tied copies that the module lacks from `found`, and adds those that it has."""
    for path, original in family.ties.items():
        if original not in found:
            continue
        kinds = {path.rsplit("/", 1)[-1], original.rsplit("/", 1)[-1]}
        values = found[original].T if kinds == {"kernel", "embedding"} else found[original]
        if path in wanted:
            if family.copies_tied_head and _says_tied(folder):
                found.setdefault(path, values)
        elif (
            path in found
            and module.config.tie_word_embeddings
            and not np.array_equal(found.pop(path), values)
        ):
            raise ValueError(
                f"{path} in {folder} differs from {original}, but the configuration ties the two; "
                "set tie_word_embeddings to false in config.json if they are to differ"
            )


def _says_tied(folder: Path) -> bool:
    """Returns `tie_word_embeddings` of config.json, for which transformers 5 always reads True."""
    return read_json(folder / CONFIG_FILE).get("tie_word_embeddings", True)


def _check_shapes(
    found: Mapping[str, np.ndarray],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    family: Family,
    folder: Path,
) -> None:
    missing = [f"{p} {leaf.shape}" for p, leaf in wanted.items() if p not in found]
    excess = [f"{p} {array.shape}" for p, array in found.items() if p not in wanted]
    differing = [p for p, leaf in wanted.items() if p in found and found[p].shape != leaf.shape]
    if not (missing or excess or differing):
        return
    if not (missing or excess) and all(map(family.names.has_labels, differing)):
        have, want = found[differing[0]].shape[-1], wanted[differing[0]].shape[-1]
        raise ValueError(
            f"the classifier in {folder} has num_labels={have}, not {want}; use num_labels={have}, "
            "or start from a checkpoint without a classifier"
        )
    lines = [f"the weights in {folder} do not fit the module"]
    for title, items in (
        ("missing in the checkpoint", missing),
        ("not in the module", excess),
        (
            "of another shape",
            [f"{p} (checkpoint {found[p].shape}, module {wanted[p].shape})" for p in differing],
        ),
    ):
        if items:
            lines.append(f"{title}: {listing(items, most=2, longest=130)}")
    raise ValueError(shorten("; ".join(lines)))


logger = logging.getLogger("compacter_jax")


CONFIG_FILE = "config.json"
