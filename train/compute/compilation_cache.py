"""What the command line compiles is kept, in the user's cache folder, for the next run.

JAX does it, and its own variables come first: JAX_COMPILATION_CACHE_DIR names another folder,
JAX_ENABLE_COMPILATION_CACHE=false keeps nothing, JAX_COMPILATION_CACHE_MAX_SIZE is in bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

from tqdm import tqdm

_FOLDER, _ENABLED = "jax_compilation_cache_dir", "JAX_ENABLE_COMPILATION_CACHE"
_DEFAULTS = {
    "jax_compilation_cache_max_size": 2**30,  # what was used longest ago goes first
    # By default JAX keeps what took it a second; a run has many programs that take less.
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}

logger = logging.getLogger("train")


@functools.cache
def announce_compilation() -> None:
    """Says that what comes first has to be compiled, and how long that may take; once a process."""
    tqdm.write(
        "compiling for each new length of input: up to about 20 s each on two cores, less where an "
        "earlier run did it"
    )


def enable(environment: MutableMapping[str, str]) -> Path | None:
    """Has JAX, which is imported later, keep what it compiles; in processes started from here, too.

    A folder that cannot be made or written, or that others can write to (who could have this
    process run what they put there), is not used: that is logged, and fails nothing.

    Args:
      environment: `os.environ`, read and added to: JAX reads it when it is imported.

    Returns:
      The folder; None where the user has chosen another or none, or it cannot be used.
    """
    off = environment.get(_ENABLED, "true").lower() in ("0", "false", "off", "no", "n", "f")
    # Without filelock, which comes with transformers, JAX could not bound the size.
    if off or _FOLDER.upper() in environment or importlib.util.find_spec("filelock") is None:
        return None
    root = environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(root) / "compacter_jax" / f"compiled-{_machine()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(folder)
        _remove_unfinished(folder)
    except OSError as error:
        logger.warning("what is compiled is not kept for the next run: %s", error)
        return None
    for name, value in {_FOLDER: str(folder), **_DEFAULTS}.items():
        if name.upper() not in environment:
            environment[name.upper()] = str(value)
    return folder


def _machine() -> str:
    """Equal where the same machine code runs: a home folder may be shared by unequal machines."""
    described = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        described += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def _check(folder: Path) -> None:
    """OSError unless the folder is this user's, and theirs alone to write to."""
    status = folder.stat()
    own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    if not own or status.st_mode & 0o022:
        raise PermissionError(f"{folder} must be the user's own, and writable for nobody else")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")


def _remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left half written, which JAX would not write again.

    Of an entry JAX writes the program, then when it was used; both under a lock.
    """
    import filelock  # noqa: PLC0415 - see `enable`

    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=1):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink(missing_ok=True)
