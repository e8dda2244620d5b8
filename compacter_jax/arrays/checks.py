"""Checks of the input: what does not fit is a ValueError that names the value and the fix."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def is_traced(*values: Any) -> bool:
    """Returns True if a value is inside a transformation of JAX, so that it cannot be read."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def check_angles(angles: Any, fewest: int = 1) -> None:
    """Checks directions or a grid of them.

    Args:
      angles: `[K]` directions in degrees, or with `fewest=2` a grid `[G]` in rising order.
      fewest: the smallest number of angles.

    Raises:
      ValueError: if there are too few angles, or they lie outside 0 to 180 degrees, or a grid does
        not rise.
    """
    shape = np.shape(angles)
    if len(shape) != 1 or shape[0] < fewest:
        wanted = "at least 2 angles, [G]" if fewest == 2 else "one angle or more, [K]"
        raise ValueError(f"angles of shape {list(shape)} should be {wanted}")
    if is_traced(angles):
        return
    values = np.asarray(angles)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 180):
        bad = values[~((values >= 0) & (values <= 180))][0]
        raise ValueError(f"angles has {bad:g}; directions are degrees from 0 to 180")
    if fewest == 2 and not (np.diff(values) > 0).all():
        at = int(np.argmin(np.diff(values) > 0))
        raise ValueError(f"angles[{at + 1}] is not above angles[{at}]; sort the grid")


def check_snapshots(snapshots: Any) -> None:
    """Checks measured values.

    Args:
      snapshots: `[N, M]`, complex, one row for each snapshot.

    Raises:
      ValueError: if the shape, the dtype or a value does not fit; a NaN is named by its index.
    """
    shape = np.shape(snapshots)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"snapshots of shape {list(shape)} should be [snapshots, sensors], at least one of each"
        )
    dtype = getattr(snapshots, "dtype", None) or np.asarray(snapshots).dtype
    if not np.issubdtype(dtype, np.complexfloating):
        raise ValueError(
            f"snapshots are {dtype}, not complex; pass amplitudes and phases as complex64 or "
            "complex128"
        )
    if not is_traced(snapshots):
        finite = np.isfinite(np.asarray(snapshots))
        if not finite.all():
            i, m = (int(index) for index in np.argwhere(~finite)[0])
            raise ValueError(
                f"snapshots[{i}, {m}] is {np.asarray(snapshots)[i, m]}; remove snapshot {i} or "
                "fill the gap"
            )


def check_memory_of_recursion(forgetting: Any, loading: Any) -> None:
    """Checks the weight of the past and the start of a recursion.

    Args:
      forgetting: the factor by which a snapshot loses weight with each later one.
      loading: the multiple of the identity that the recursion starts from.

    Raises:
      ValueError: if `forgetting` is outside (0, 1] or `loading` is not positive and finite.
    """
    if not is_traced(forgetting) and not 0 < forgetting <= 1:
        raise ValueError(f"forgetting={forgetting} should be above 0 and at most 1, such as 0.998")
    if not is_traced(loading) and not 0 < loading < np.inf:
        raise ValueError(f"loading={loading} should be positive; 1 is the power of the noise")


def check_windows(sensors: int, window: int, rank: int, sources: int | None = None) -> None:
    """Checks that windows cover the line of sensors.

    Args:
      sensors: M, the number of sensors.
      window: I, the number of sensors in a window.
      rank: D, the number of windows.
      sources: the number of sources to be found, if known.

    Raises:
      ValueError: if the windows are longer than the line, leave sensors out, or are too short to
        tell the sources apart.
    """
    if rank < 1 or window < 1:
        raise ValueError(f"window={window} and rank={rank} should be at least 1")
    if window > sensors:
        raise ValueError(
            f"window={window} is more than the {sensors} sensors; use {sensors} or less"
        )
    if rank == 1 and window < sensors:
        raise ValueError(
            f"rank=1 is one window, and window={window} of {sensors} sensors needs several; use "
            f"rank={-(-sensors // window)} or more, or window={sensors}"
        )
    if rank * window < sensors:
        raise ValueError(
            f"{rank} windows of {window} sensors leave some of {sensors} out; use "
            f"rank={-(-sensors // window)} or more, or window={-(-sensors // rank)} or more"
        )
    if sources is not None:
        check_sources(sources, window)


def check_sources(sources: int, window: int) -> None:
    """Checks that a window can tell the sources apart.

    Raises:
      ValueError: if `sources` is not from 1 to `window - 1`.
    """
    if not 1 <= sources < window:
        raise ValueError(
            f"sources={sources} cannot be told apart by a window of {window} sensors; they can be "
            f"1 to {window - 1}"
        )
