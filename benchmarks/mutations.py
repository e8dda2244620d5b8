"""Seeded damage to files: JSON, safetensors, text, and the contents of folders."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Random = random.Random
# Bytes, and a short description of the damage.
Mutated = tuple[bytes, str]

_SLOW = r"((\w|\.|/)+)+!"
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, -(2**63), 10**12, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "a", "0", "True", "null", "../../etc/passwd", "\x00", "\U0001f600", "\u202e\u0645"),
    *("a" * 100_000, _SLOW, "(a|a)*b", "(", "[", r"(?P<layer>\d+)", ".*", "\\", "(?R)"),
    *([], [[]], [None], ["a"], [0], [-1], [2**70], [1.5], [True], ["a", "a"], ["x" * 9] * 9999),
    *({}, {"a": 1}, {"kind": "full"}, {"kind": "lora"}, [{}], [{"kind": "lora"}], ["*", "("]),
    *("feed_forward", "query", ["query"], ["query", "query"], "lora", "bert", "t5", "float12"),
)
_NAMES = ("zzz", "__proto__", "", "kind", "sites", "members", "parts", "r", "weights", "\x00")


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value inside a JSON value, except its own."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _changed(r: Random, value: Any) -> str:
    """Changes one place of a JSON value, and returns a description of the change."""
    places = list(_places(value))
    if not places:
        return "nothing"
    path = r.choice(places)
    parent, key = _at(value, path[:-1]), path[-1]
    how = r.choice(["set", "set", "set", "set", "delete", "rename", "add", "scale", "wrap", "copy"])
    if how == "delete":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        other = r.choice([str(key).upper(), f"{key} ", "", f"\u202e{key}", "__class__", "self"])
        parent[other] = parent.pop(key)
    elif how == "add" and isinstance(parent, dict):
        parent[r.choice(_NAMES)] = copy.deepcopy(r.choice(NASTY))
    elif how == "scale" and type(parent[key]) in (int, float):
        old = parent[key]
        fraction = float(old) if abs(old) < 10**300 else math.inf
        parent[key] = r.choice([old * 2, old + 1, -old, old * 10**12, fraction, str(old), 0])
    elif how == "wrap":
        parent[key] = r.choice([[parent[key]], {"x": parent[key]}, [parent[key]] * 2])
    elif how == "copy":
        parent[key] = copy.deepcopy(_at(value, r.choice(places)))
    else:
        parent[key] = copy.deepcopy(r.choice(NASTY))
    return f"{how} {path!r:.80}"


def _with(r: Random, value: dict[str, Any], text: str) -> bytes:
    """Returns JSON with a text in place of one value."""
    changed = {**value, r.choice(list(value)): "@@"}
    return json.dumps(changed).encode().replace(b'"@@"', text.encode())


_BROKEN: dict[str, Callable[[Random, dict[str, Any], bytes], bytes]] = {
    "truncate": lambda r, v, data: data[: r.randrange(len(data))],
    "flip": lambda r, v, data: flipped(r, data, r.choice([1, 4, 32])),
    "deep lists": lambda r, v, data: b"[" * 100_000 + b"]" * 100_000,
    "deep objects": lambda r, v, data: b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "deep inside": lambda r, v, data: _with(
        r, v, "[" * (n := r.choice([60, 300, 900, 5000])) + "]" * n
    ),
    "empty": lambda r, v, data: b"",
    "byte order mark": lambda r, v, data: b"\xef\xbb\xbf" + data,
    "utf-16": lambda r, v, data: data.decode().encode("utf-16"),
    "nul": lambda r, v, data: data + b"\0" * 4096,
    "twice": lambda r, v, data: data[:-1] + b', "' + r.choice(list(v)).encode() + b'": 5}',
    "digits": lambda r, v, data: _with(r, v, "9" * r.choice([400, 5000, 10**6])),
    "nan": lambda r, v, data: _with(r, v, r.choice(["NaN", "Infinity", "1e999"])),
    "scalar": lambda r, v, data: r.choice([b"1", b"null", b'"x"', b"true", b"NaN", b"1e999"]),
    "list": lambda r, v, data: b"[" + data + b"]",
    "latin-1": lambda r, v, data: data[:-1] + b', "x": "\xff\xfe"}',
    "long text": lambda r, v, data: data[:-1] + b', "x": "' + b"a" * 2**22 + b'"}',
    "surrogate": lambda r, v, data: _with(r, v, r'"\ud800"'),
}


def mutated_json(r: Random, value: dict[str, Any]) -> Mutated:
    """Returns the bytes of a JSON file with one to three changes to its values or its text."""
    if r.random() < 0.25:
        how = r.choice(list(_BROKEN))
        return _BROKEN[how](r, value, json.dumps(value).encode()), how
    value = copy.deepcopy(value)
    done = [_changed(r, value) for _ in range(r.choice([1, 1, 1, 2, 3]))]
    return json.dumps(value).encode(errors="surrogatepass"), "; ".join(done)


def flipped(r: Random, data: bytes, count: int, end: int | None = None) -> bytes:
    """Returns the bytes with `count` of the first `end` replaced."""
    changed = bytearray(data)
    for _ in range(count if data else 0):
        changed[r.randrange(end or len(data))] = r.randrange(256)
    return bytes(changed)


# --- safetensors --------------------------------------------------------------------------------

_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}


def split_tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a safetensors file, and the bytes after it."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return header, data[8 + size :]


def join_tensors(header: Any, body: bytes) -> bytes:
    """Returns the bytes of a safetensors file; inverse of `split_tensors`.

    The header may be bytes already.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def of_type(r: Random, data: bytes, name: str, dtype: str) -> bytes:
    """Returns a valid safetensors file in which one tensor has another type and random bits."""
    header, body = split_tensors(data)
    out, end = b"", 0
    for each, entry in header.items():
        begin, stop = entry["data_offsets"]
        part = body[begin:stop]
        if each == name:
            count = math.prod(entry["shape"]) * _SIZES[dtype]
            part = bytes(r.randrange(2 if dtype == "BOOL" else 256) for _ in range(count))
            entry["dtype"] = dtype
        out, end = out + part, end + len(part)
        entry["data_offsets"] = [end - len(part), end]
    return join_tensors(header, out)


def _set_shape(r: Random, header: Any, name: str) -> None:
    shape = header[name]["shape"]
    size = math.prod(shape)
    header[name]["shape"] = r.choice(
        [
            *([size], [1, *shape], [*shape, 1], shape[::-1], [], [-n for n in shape]),
            *([0, *shape[1:]], [2**32, 2**32], [2**63], [10**30], [2**31] * 40, [1] * 3000),
        ]
    )


def _set_offsets(r: Random, header: Any, name: str) -> None:
    other = r.choice(list(header))
    header[name]["data_offsets"] = r.choice(
        [
            *([0, 4], [-4, 0], [4, 0], [0], [0, 4, 8], [2**63, 2**63 + 4], [0.5, 4], ["0", "4"]),
            *(None, [2**64, 2**65], list(header[other]["data_offsets"])),
        ]
    )


def _set_type(r: Random, header: Any, name: str) -> None:
    header[name]["dtype"] = r.choice([*_SIZES, "F4", "nonsense", "", 5])


def _set_name(r: Random, header: Any, name: str) -> None:
    names = [f"{name}x", name.upper(), "", f"/{name}", name.replace("/", "."), "a" * 10_000]
    header[r.choice(names)] = header.pop(name)


def _swap(r: Random, header: Any, name: str) -> None:
    other = r.choice(list(header))
    header[name], header[other] = header[other], header[name]


def _set_metadata(r: Random, header: Any, name: str) -> None:
    header["__metadata__"] = r.choice([5, [], {"a": 1}, {"a": "b" * 10**6}, {"a": {"b": "c"}}])


_HEADER: dict[str, Callable[[Random, Any, str], Any]] = {
    "shape": _set_shape,
    "offsets": _set_offsets,
    "type in the header": _set_type,
    "name": _set_name,
    "swap": _swap,
    "metadata": _set_metadata,
    "missing": lambda r, header, name: header.pop(name),
    "values in the header": lambda r, header, name: _changed(r, header),
}


def _number(r: Random, data: bytes, name: str) -> bytes:
    """Returns the bytes with a float32 of one tensor replaced by a number that no weight has."""
    header, body = split_tensors(data)
    begin = header[name]["data_offsets"][0]
    number = r.choice([math.nan, math.inf, -math.inf, 3e38])
    return join_tensors(header, body[:begin] + struct.pack("<f", number) + body[begin + 4 :])


def _extra(r: Random, data: bytes, name: str) -> bytes:
    header, body = split_tensors(data)
    names = ["zzz", "../../x", "", "encoder", "adapters/occupied", "a" * 10_000, "/", "\u202e"]
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    return join_tensors({**header, r.choice(names): entry}, body + b"\0\0\x80\x3f")


_FILE: dict[str, Callable[[Random, bytes, str], bytes]] = {
    "truncate": lambda r, data, name: data[: r.randrange(len(data))],
    "length": lambda r, data, name: (
        struct.pack("<Q", r.choice([2**63, 2**64 - 1, 0, 1, len(data), 2**32])) + data[8:]
    ),
    "flip header": lambda r, data, name: flipped(
        r, data, r.choice([1, 2, 8]), 8 + struct.unpack("<Q", data[:8])[0]
    ),
    "flip": lambda r, data, name: flipped(r, data, r.choice([1, 8, 64])),
    "type": lambda r, data, name: of_type(r, data, name, r.choice(list(_SIZES))),
    "number": _number,
    "extra": _extra,
    "empty": lambda r, data, name: r.choice([b"", b"\0", b"\0" * 100, b"{}", b"PK\x03\x04"]),
    "deep": lambda r, data, name: join_tensors(
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", split_tensors(data)[1]
    ),
    "trailing": lambda r, data, name: data + b"\0" * r.choice([1, 4, 4096]),
}


def mutated_tensors(r: Random, data: bytes) -> Mutated:
    """Returns the bytes of a safetensors file with one defect, or one unusual property."""
    header, body = split_tensors(data)
    name = r.choice(list(header))
    how = r.choice([*_HEADER, *_FILE, "type", "number"])
    if how in _FILE:
        return _FILE[how](r, data, name), f"{how} {name:.80}"
    _HEADER[how](r, header, name)
    return join_tensors(header, body), f"{how} {name:.80}"


# --- text and folders ---------------------------------------------------------------------------


def mutated_text(r: Random, data: bytes) -> Mutated:
    """Returns the bytes of a text file as another program, or a broken disk, would leave them."""
    at = r.randrange(len(data) + 1)
    ways: dict[str, Callable[[], bytes]] = {
        "as it is": lambda: data,
        "byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "carriage returns": lambda: data.replace(b"\n", b"\r\n"),
        "old Mac": lambda: data.replace(b"\n", b"\r"),
        "nul": lambda: data[:at] + b"\0" * r.choice([1, 512]) + data[at:],
        "utf-16": lambda: data.decode("utf-8", "replace").encode("utf-16"),
        "latin-1": lambda: data[:at] + b"\xe9\xff" + data[at:],
        "truncate": lambda: data[:at],
        "flip": lambda: flipped(r, data, 3),
        "blank lines": lambda: data.replace(b"\n", b"\n\n\n"),
        "quote": lambda: data[:at] + b'"' + data[at:],
        "no end": lambda: data.rstrip(b"\n"),
        "long": lambda: data + b'"' + b"x" * r.choice([131_073, 2**22]) + b'",negative\n',
    }
    how = r.choice([*["as it is"] * 5, *ways])
    return ways[how](), how


def odd_file(r: Random, path: Path) -> str:
    """Replaces a file by something else, and returns a description."""
    path.unlink()
    how = r.choice(["missing", "folder", "dangling", "loop", "device", "empty", "no text"])
    if how == "folder":
        path.mkdir()
    elif how == "dangling":
        path.symlink_to("/nonexistent/x")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "device":
        path.symlink_to(r.choice(["/dev/null", "/proc/self/environ", "/dev/zero"]))
    elif how in ("empty", "no text"):
        path.write_bytes(b"" if how == "empty" else bytes(range(256)))
    return f"{path.name}: {how}"
