"""Limits on the size of requested arrays, checked before the arrays are made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any


def check_memory(what: str, shapes: Mapping[str, Any], fix: str) -> None:
    """Checks that arrays fit into the memory of this machine, before they are made.

    Args:
      what: description of the arrays, for the message.
      shapes: `/`-joined path -> anything with a `shape` and a `dtype`.
      fix: advice to the user, for the message.

    Raises:
      ValueError: if the arrays together are larger than the memory; the message names the largest.
    """
    sizes = {
        path: math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8)
        for path, leaf in shapes.items()
    }
    wanted, there = sum(sizes.values()), memory_of_machine()
    if there is not None and wanted > there:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ValueError(
            f"{what} would take {wanted / 2**30:,.0f} GiB, but this machine has "
            f"{there / 2**30:,.0f}; the largest array is {largest[:100]} {shapes[largest].shape}; "
            f"{fix}"
        )


def memory_of_machine() -> int | None:
    """Returns the memory of this machine in bytes, or None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
