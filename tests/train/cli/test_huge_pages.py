"""Processes of the command line request huge pages."""

import platform
import subprocess
import sys

import pytest

from train.cli import huge_pages

PROGRAM = """
import os, sys
from train.cli import huge_pages
before = os.environ.get("GLIBC_TUNABLES")
huge_pages.use_huge_pages()
print(os.getpid(), before, os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""
SETTING = "glibc.malloc.hugetlb=1"


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


@pytest.mark.parametrize(
    ("given", "libc", "pages", "wanted"),
    [
        ({}, "2.36", "always [madvise] never", SETTING),
        ({}, "2.35", "always [madvise] never", SETTING),
        ({"GLIBC_TUNABLES": "a.b=1"}, "2.40", "always [madvise] never", f"a.b=1:{SETTING}"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "2.36", "always [madvise] never", None),
        ({}, "2.31", "always [madvise] never", None),
        ({}, "2.36", "[always] madvise never", None),
        ({}, "2.36", "always madvise [never]", None),
    ],
)
def test_what_is_asked_for(given, libc, pages, wanted, kernel, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", libc))
    kernel.write_text(pages)
    assert huge_pages.tunables(given, kernel) == wanted


def test_elsewhere_nothing_is(kernel, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert huge_pages.tunables({}, kernel) is None
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert huge_pages.tunables({}, kernel.with_name("nowhere")) is None


def test_a_process_begins_again_once_and_with_its_arguments():
    if huge_pages.tunables({}) is None:
        pytest.skip("this kernel or C library has no huge pages to ask for")
    command = [sys.executable, "-c", PROGRAM, "one", "two words"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={}) as process:
        output, _ = process.communicate(timeout=60)
    # The second call has nothing left to do, and the process id stays the same.
    assert output == f"{process.pid} {SETTING} {SETTING} ['one', 'two words']\n"
