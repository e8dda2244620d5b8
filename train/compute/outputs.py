"""Outputs of a model on a whole split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from train.compute import compilation_cache, distributed, step
from train.data import batching, tokens

# batch -> tree of [batch, …] arrays
OutputsFunction = Callable[[step.Batch], Any]


def split_outputs(
    outputs: OutputsFunction,
    encoded: tokens.Encoded,
    batch_size: int,
    *,
    description: str | None,
    before_batch: Callable[[], object] | None = None,
) -> Any:
    """Computes the outputs of every example, in the order of the data.

    Args:
      outputs: batch -> tree of `[rows, …]` arrays; each host passes its part of the rows.
      encoded: the examples.
      batch_size: the number of rows of a batch, over all hosts.
      description: the label of the progress bar; None shows no bar.
      before_batch: a function to call before every batch.

    Returns:
      A tree of `[examples, …]` arrays.

    Raises:
      ValueError: if there are no examples.
    """
    rows: Any = None
    with tqdm(
        total=len(encoded),
        desc=description,
        # Short compared with training: useful on a terminal, noise in a log file.
        disable=True if description is None or not distributed.is_first() else None,
        leave=False,
        unit="ex",
    ) as bar:
        part = distributed.index(), distributed.number()
        for batch in batching.batches(encoded, batch_size, shuffle=False, part=part):
            if before_batch is not None:
                before_batch()
            if distributed.is_first():
                compilation_cache.announce_compilation()
            indices, y = distributed.gather((batch["indices"], outputs(batch)))
            if rows is None:
                rows = jax.tree.map(lambda x: np.zeros((len(encoded), *x.shape[1:]), x.dtype), y)
            real = indices >= 0
            for whole, new in zip(jax.tree.leaves(rows), jax.tree.leaves(y), strict=True):
                whole[indices[real]] = new[real]
            bar.update(int(real.sum()))
    if rows is None:
        raise ValueError("there are no examples to compute outputs for")
    return rows
