"""Compilation cache of the command line, in the user's cache folder, shared by later runs.

JAX implements the cache, and its own variables take precedence: JAX_COMPILATION_CACHE_DIR names
another folder, JAX_ENABLE_COMPILATION_CACHE=false disables the cache,
JAX_COMPILATION_CACHE_MAX_SIZE is the limit in bytes.
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
_DEFAULTS: dict[str, float] = {
    "jax_compilation_cache_max_size": 2**30,  # the least recently used goes first
    # JAX's default is a second, and many programs of a run compile in less.
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}

logger = logging.getLogger("train")


@functools.cache
def announce_compilation() -> None:
    """Prints, once per process, that compilation comes first and how long it may take."""
    tqdm.write(
        "each new input length has to be compiled: this takes up to about 20 s on two cores, less "
        "if an earlier run compiled it"
    )


def enable(environment: MutableMapping[str, str]) -> Path | None:
    """Enables JAX's compilation cache in this process and in processes that it starts.

    JAX must be imported afterwards. A folder is not used if it cannot be created or written, or if
    others can write to it, who could place code there for this process to run. This is logged and
    is no error.

    Args:
      environment: `os.environ`, which JAX reads when it is imported; variables are added.

    Returns:
      The folder; None if the user has chosen another or none, or if it cannot be used.
    """
    off = environment.get(_ENABLED, "true").lower() in ("0", "false", "off", "no", "n", "f")
    # Without filelock, which transformers requires, JAX cannot limit the size.
    if off or _FOLDER.upper() in environment or importlib.util.find_spec("filelock") is None:
        return None
    root = environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(root) / "compacter_jax" / f"compiled-{_machine()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(folder)
        _remove_unfinished(folder)
    except OSError as error:
        logger.warning("compiled programs are not kept for the next run: %s", error)
        return None
    for name, value in {_FOLDER: str(folder), **_DEFAULTS}.items():
        if name.upper() not in environment:
            environment[name.upper()] = str(value)
    return folder


def enable_late() -> None:
    """Enables the cache as `enable` does, in a process that has imported JAX already."""
    folder = enable(os.environ)
    if folder is None:
        return
    import jax  # noqa: PLC0415 - `enable` runs before JAX is imported
    from jax.experimental.compilation_cache import compilation_cache  # noqa: PLC0415

    jax.config.update(_FOLDER, str(folder))
    for name, value in _DEFAULTS.items():
        jax.config.update(name, type(value)(os.environ[name.upper()]))
    compilation_cache.reset_cache()  # a program compiled before has settled that there is none


def _machine() -> str:
    """Returns an id of the machine's instruction set; machines with one home folder may differ."""
    described = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        described += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def _check(folder: Path) -> None:
    """Raises OSError unless the folder belongs to this user and nobody else can write to it."""
    status = folder.stat()
    own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    if not own or status.st_mode & 0o022:
        raise PermissionError(
            f"{folder} must belong to the user, and must not be writable for anybody else"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")


def _remove_unfinished(folder: Path) -> None:
    """Removes entries that a killed process left half written, which JAX would not write again.

    JAX writes the program of an entry, then its time of access, both under a lock.
    """
    import filelock  # noqa: PLC0415 - see `enable`

    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=1):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink(missing_ok=True)
