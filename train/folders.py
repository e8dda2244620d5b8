"""Folders that are created by one rename, and folders in which one process works at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from compacter_jax.files import sync_folder

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".lock"
# Errors of file systems without locks.
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder, which becomes `path` on success and is removed otherwise.

    The folder lies in a new folder beside `path`, and its files are on disk before it gets its
    name.

    Args:
      path: the path of the folder; it may exist if it is empty.
      replace: whether the folder may exist with files in it, all of which are then removed.

    Raises:
      OSError: if a folder cannot be created, renamed or removed.
    """
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:40]}."
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=path.parent) as temporary:
        made, replaced = Path(temporary, "new"), Path(temporary, "old")
        made.mkdir()
        yield made
        _sync_files(made)
        if replace and path.exists():
            path.rename(replaced)
        try:
            made.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        sync_folder(path.parent)


def _sync_files(folder: Path) -> None:
    """Waits until the files in a folder are on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


@contextlib.contextmanager
def alone(folder: Path, name: str = LOCK_NAME, *, waiting: str | None = None) -> Iterator[int]:
    """Holds the lock of a folder; the system releases it when the process ends for any reason.

    Args:
      folder: the folder, which exists.
      name: the name of the lock file in the folder; it is created, and stays.
      waiting: a message to print before waiting for the holder of the lock; None does not wait.

    Yields:
      A file descriptor; a process that inherits it holds the lock, too.

    Raises:
      ValueError: if another process holds the lock and `waiting` is None.
      OSError: if the file cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(folder / name, flags, 0o666)
    try:
        if sys.platform != "win32":
            _lock(descriptor, folder, waiting)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, waiting: str | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise ValueError(
                f"another process works in {folder}; wait until it ends, or choose another "
                "--output-dir"
            ) from None
        print(waiting, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        print(
            f"the file system of {folder} does not support locks; make sure that no other run "
            "works there"
        )
