"""Folders that appear in one rename, and folders in which one process works at a time."""

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
# What a file system answers that has no locks.
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder, which becomes `path` on success and is removed otherwise.

    It lies in a folder beside `path` that nobody could have made before, and its files are on the
    disk before it gets its name.

    Args:
      path: of the folder; may exist if it is empty.
      replace: whether it may exist with files in it, all of which are removed then.

    Raises:
      OSError: if a folder cannot be made, renamed or removed.
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
    """Returns when the files in a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


@contextlib.contextmanager
def alone(folder: Path, name: str = LOCK_NAME, *, waiting: str | None = None) -> Iterator[int]:
    """Holds the lock of a folder, which the system takes back when the process ends, however.

    Args:
      folder: exists.
      name: of the file in it that is locked; it is made, and stays.
      waiting: printed before waiting for whoever has the lock; None does not wait.

    Yields:
      A descriptor; a process that inherits it holds the lock, too.

    Raises:
      ValueError: if somebody else has the lock, and this is not to wait.
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
                f"another process works in {folder}; wait for its end, or choose another "
                "--output-dir"
            ) from None
        print(waiting, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        print(f"the file system of {folder} has no locks: let no other run work there")
