"""Huge pages for the arrays of a step on a CPU.

XLA frees the memory of a step's intermediate arrays when the step ends, and the next step allocates
it again from the kernel, page by page. Huge pages reduce this to 200 pages instead of 85,000 for a
step of MiniLM, and make the step 14 % shorter (`benchmarks/NOTES.md`). glibc requests them if a
variable is set when a process starts.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

_VARIABLE, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_FIRST_GLIBC = (2, 35)
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Restarts this process with the same arguments, if huge pages are to be requested.

    It must be the first action of a program. A setting of the user is preserved.
    """
    if added := environment():
        os.environ.update(added)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def environment() -> dict[str, str]:
    """Returns the variable that makes a new process request huge pages; empty if none does."""
    wanted = tunables(os.environ)
    return {} if wanted is None else {_VARIABLE: wanted}


def tunables(environment: Mapping[str, str], kernel: Path = _KERNEL) -> str | None:
    """Returns GLIBC_TUNABLES with huge pages; None if they are set, unavailable, or always used."""
    given = environment.get(_VARIABLE, "")
    name, version = platform.libc_ver()
    if _SETTING in given or name != "glibc":
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < _FIRST_GLIBC:
        return None
    if not kernel.exists() or "[madvise]" not in kernel.read_text(encoding="ascii"):
        return None
    return ":".join(filter(None, (given, f"{_SETTING}=1")))
