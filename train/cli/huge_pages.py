"""Large pages for the arrays of a step on a CPU.

XLA gives the memory of a step's intermediate arrays back when the step ends, and the next step
takes it again from the kernel, page by page. With huge pages that is 200 pages instead of 85,000
for a step of MiniLM, and the step 14 % shorter (`benchmarks/NOTES.md`). glibc asks for them if
a variable says so when a process begins.
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
    """Begins this process again, with the same arguments, if huge pages are to be asked for.

    It must be the first thing that a program does. What the user has set stays.
    """
    wanted = tunables(os.environ)
    if wanted is not None:
        os.environ[_VARIABLE] = wanted
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def tunables(environment: Mapping[str, str], kernel: Path = _KERNEL) -> str | None:
    """GLIBC_TUNABLES with huge pages; None where they are set, not to be had, or always used."""
    given = environment.get(_VARIABLE, "")
    name, version = platform.libc_ver()
    if _SETTING in given or name != "glibc":
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < _FIRST_GLIBC:
        return None
    if not kernel.exists() or "[madvise]" not in kernel.read_text(encoding="ascii"):
        return None
    return ":".join(filter(None, (given, f"{_SETTING}=1")))
