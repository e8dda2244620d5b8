"""Several processes that train one model, each on its own devices: who is who, and what they share.

All of it is there with one process, too, and then does nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train.cli.options import HostOptions


def start(options: HostOptions) -> None:
    """Joins the processes that train together, if the flags say that there are several.

    To be called before JAX is asked for anything: it looks for devices once.

    Raises:
      ValueError: if the flags do not go together, or JAX finds no cluster to join.
      OSError: if the process that coordinates does not answer.
    """
    options.check_hosts()
    if not options.distributed and options.num_processes is None:
        return
    # Without it, processes on CPUs cannot add up what each has computed.
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
    # JAX has taken SIGTERM for a service of its own, and nothing would stop this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        if (handler := signal.getsignal(number)) is not None:  # of Python
            signal.signal(number, handler)


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


def of_first(action: Callable[[], None]) -> None:
    """Runs `action` in the first process, while the others wait.

    Raises:
      ValueError, OSError: in the first process, what `action` raises; then a ValueError in all
        others, which would otherwise wait for the first for ever.
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
        raise ValueError("the first process does not begin the run, and says why")


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
