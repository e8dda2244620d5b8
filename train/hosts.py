"""Several processes that train one model, each on its own devices: who is who, and what they share.

All of it is there with one process, too, and then does nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def index() -> int:
    """Of this process, from 0 on."""
    return jax.process_index()


def number() -> int:
    """Of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return index() == 0


def wait(name: str) -> None:
    """Returns when every process has come here; `name` stands in the error if one does not."""
    if number() > 1:
        from jax.experimental import multihost_utils  # noqa: PLC0415

        multihost_utils.sync_global_devices(name)


def any_of(value: bool) -> bool:
    """Whether `value` holds in any process."""
    return bool(gather(np.array([value])).any())


def gather(tree: Any) -> Any:
    """Arrays of every process, `[rows, …]` each, one below the other in the order of processes.

    Shapes must be equal in all processes.
    """
    if number() == 1:
        return tree
    from jax.experimental import multihost_utils  # noqa: PLC0415

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))
