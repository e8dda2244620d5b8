"""JSON and safetensors, each read by one function that trusts nothing, and one atomic writer."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import tempfile
import threading
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from compacter_jax.messages import listing, quote, shorten

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


# Tokenizers of many languages have 20 MB; all files that are read here are much smaller.
LARGEST_JSON = 64 * 2**20


# Nesting depth of brackets. Functions that walk through a value may recurse: Python allows 1,000
# calls.
DEEPEST_JSON = 64


# Locks for threads; each folder has one, which it may share with other folders.
_HELD = [threading.Lock() for _ in range(64)]


# The umask, read once: the only way to read it is to set it, for all threads.
_UMASK = os.umask(0o077)


os.umask(_UMASK)


def read_json(
    path: str | os.PathLike[str],
    fields: Mapping[str, Any] | None = None,
    *,
    required: Iterable[str] = (),
    what: str = "a JSON object",
) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Args:
      path: path of the file.
      fields: name -> type of the field if it is present, as `check_fields` takes it.
      required: names of fields that must be present.
      what: description of the file for messages, such as "the configuration of an adapter".

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is too large, is not UTF-8, not JSON, too deep, or not an object;
        holds NaN, an infinite number or half a surrogate; or a field is missing or of another
        type. The message names the file.
    """
    path = Path(path)
    settings = parse_json(read_text(path, LARGEST_JSON), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold {what}, a JSON object, not {_kind(settings)}")
    missing = [name for name in required if name not in settings]
    if missing:
        raise ValueError(f"{path} is not {what}: it has no {listing(missing)}")
    if fields is not None:
        check_fields(str(path), settings, fields)
    return settings


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON by the letter of its standard, without NaN and infinities.

    Args:
      text: the JSON.
      where: origin of the text, for messages.

    Raises:
      ValueError: if the text is not JSON, is too deep, or holds a number or a string that Python or
        UTF-8 cannot write again.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
        is_deep = _depth(value) > DEEPEST_JSON
    except RecursionError:
        is_deep = True
    except UnicodeEncodeError:
        raise ValueError(
            f"{where} holds half of a surrogate pair, which is not valid text"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {shorten(str(error), 200)}") from None
    if is_deep:
        raise ValueError(
            f"{where} is not valid JSON: its brackets are nested more than {DEEPEST_JSON} deep"
        )
    return value


def _depth(value: Any) -> int:
    """Returns the nesting depth of the brackets in a value; 0 for a number."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [x for item in level for x in (item.values() if isinstance(item, dict) else item)]
    return depth


def check_fields(where: str, settings: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Checks the types of the fields that are present.

    Args:
      where: origin of the settings, for messages.
      settings: fields as JSON has them.
      fields: name -> type, such as `int`, `str | None`, `list[str]`, `dict[str, int]`,
        `Literal["a", "b"]` or `Any`. A bool is no int, and an int is a float.

    Raises:
      ValueError: if a field has another type; the message names the place, the field, its value and
        the type wanted.
    """
    for name, hint in fields.items():
        if name in settings and not conforms(settings[name], hint):
            raise ValueError(
                f"{where}: {name}={quote(settings[name], 100)} must be {_type_name(hint)}"
            )


def conforms(value: Any, hint: Any) -> bool:
    """Returns True if a JSON value is of the type `hint`, by the rules of `check_fields`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is list:
        return isinstance(value, list) and all(conforms(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            conforms(item, arguments[1]) for item in value.values()
        )
    exact = {Any: (type(value),), float: (int, float), None: (type(None),)}
    return type(value) in exact.get(hint, (hint,))


def read_text(path: Path, most: int) -> str:
    """Reads a file of UTF-8; refuses a pipe or a device unread.

    Args:
      path: path of the file.
      most: largest size in bytes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the path is not a file, or the file is larger or not UTF-8; the message names
        it.
    """
    if (size := check_file(path)) > most:
        raise ValueError(f"{path} has {size:,} bytes, more than the limit of {most:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def check_file(path: Path) -> int:
    """Checks that there is a file, with one system call, since another process may replace it.

    Returns:
      Its size in bytes.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if it is a folder, a pipe or a device, or no file can have such a name.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{shorten(str(path), 300)} does not exist") from None
    except OSError as error:  # the name is too long, for example, and would be repeated
        raise type(error)(error.errno, error.strerror, shorten(str(path), 300)) from None
    except ValueError as error:  # a null character in the name, for example
        raise ValueError(f"{quote(str(path))} is not a valid file name: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a file")
    return status.st_size


def expanded(path: str | os.PathLike[str]) -> Path:
    """Returns a path with `~` replaced by the home folder; unchanged if the user is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(path: Path) -> bool:
    """Returns True if the path exists; False also for a name that no file can have."""
    try:
        return path.exists()
    except OSError:  # the name is longer than the system allows
        return False


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shorten(digits, 40)} is too large for a number")
    return value


_KINDS = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is list:
        return f"a list, each item {_type_name(arguments[0])}"
    if origin is dict:
        return f"an object, each value {_type_name(arguments[1])}"
    names = {**_KINDS, int: "a whole number", float: "a number", Any: "anything"}
    return names.get(type(None) if hint is None else hint, str(hint))


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed to `path`.

    Nobody else can create the temporary file first. It gets the mode of other new files, and the
    folder is synced after the rename. On an exception the temporary file is removed and `path`
    stays unchanged. An OSError that names no file, or the temporary one, is changed to name `path`.

    Args:
      path: path of the file to write, in an existing folder.
    """
    path = Path(path)
    _check_replaceable(path)
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(
            prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent
        )
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        ours = temporary is None or error.filename == str(temporary)
        if error.errno is not None and (error.filename is None or ours):
            error.filename = str(path)
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def hold_folder(folder: str | os.PathLike[str]) -> Iterator[bool]:
    """Waits until no other thread or process holds a folder, and holds it meanwhile.

    The lock is for short operations on several files. It is a lock of the system and ends with the
    process. File systems without such locks keep apart only threads of one process.

    Args:
      folder: path of an existing folder.

    Yields:
      True if other processes are kept away as well.
    """
    with _HELD[hash(os.path.realpath(folder)) % len(_HELD)]:
        if fcntl is None:
            yield False
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            is_locked = False
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                is_locked = True
            yield is_locked
        finally:
            os.close(descriptor)


def _check_replaceable(path: Path) -> None:
    """Raises OSError if no file can have this name, before anything is written."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Waits until the names in a folder are on the disk, if the system can tell."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems lack this call; there is nothing else to wait for.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
