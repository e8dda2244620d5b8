"""Distributed training: several processes that train one model, each on its own devices.

All functions also work with a single process, and then do nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train.cli.options import HostOptions


def start(options: HostOptions) -> None:
    """Joins the processes that train together, if the flags ask for several.

    It must be called before JAX looks for devices, which happens once.

    Raises:
      ValueError: if the flags do not go together, or JAX finds no cluster to join.
      OSError: if the coordinating process does not answer.
    """
    options.check_hosts()
    if not options.distributed and options.num_processes is None:
        return
    # Without gloo, processes on CPUs cannot sum their results.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = options.coordinator_address
    try:
        jax.distributed.initialize(address, options.num_processes, options.process_id)
    except ValueError as error:
        raise ValueError(
            f"no other processes were found: {error}; give --coordinator-address, "
            "--num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        raise OSError(f"cannot join the other processes at {address}: {error}") from error
    # JAX has taken over SIGTERM for its own service, so that nothing would stop this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        if (handler := signal.getsignal(number)) is not None:  # None if it was not set by Python
            signal.signal(number, handler)


def index() -> int:
    """Returns the index of this process, starting at 0."""
    return jax.process_index()


def number() -> int:
    """Returns the number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Returns True in the process that writes and reports."""
    return index() == 0


def wait(name: str) -> None:
    """Waits until every process has called this; `name` appears in the error if one does not."""
    if number() > 1:
        from jax.experimental import multihost_utils  # noqa: PLC0415

        multihost_utils.sync_global_devices(name)


def of_first(action: Callable[[], None]) -> None:
    """Runs `action` in the first process, while the others wait.

    Raises:
      ValueError, OSError: in the first process, the error of `action`; then a ValueError in all
        others, which would otherwise wait forever.
    """
    error: Exception | None = None
    if is_first():
        try:
            action()
        except (ValueError, OSError) as caught:
            error = caught
    failed = any_of(error is not None)
    if error is not None:
        raise error
    if failed:
        raise ValueError("the first process did not begin the run; its own message says why")


def any_of(value: bool) -> bool:
    """Returns True if `value` is true in any process."""
    return bool(gather(np.array([value])).any())


def gather(tree: Any) -> Any:
    """Concatenates the `[rows, …]` arrays of every process, in the order of the processes.

    Shapes must be equal in all processes.
    """
    if number() == 1:
        return tree
    from jax.experimental import multihost_utils  # noqa: PLC0415

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))
