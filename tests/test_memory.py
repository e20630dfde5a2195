"""Freed pages stay with a process that asked for it, and nothing breaks where the C library has no such option."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common import memory

# Makes and frees 64 MiB again and again; each page that the kernel has to give and clear is a page fault. The block has
# no alignment: of aligned ones, such as tensors, glibc 2.36 takes up to nine before each fits into what another left.
FAULTS = """
import resource, sys
from common.memory import keep_freed_pages

for _ in range(int(sys.argv[1])):
    keep_freed_pages()
bytearray(2**26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# Blocks of two sizes, of which the small ones stay: the pages between them are free, but not at the end of the heap.
RESIDENT = """
import psutil
from common.memory import keep_freed_pages, return_freed_pages

keep_freed_pages()
resident = lambda: psutil.Process().memory_info().rss >> 20
before = resident()
blocks = [(bytearray(2**24), bytearray(2**14)) for _ in range(16)]
small = [pair[1] for pair in blocks]
del blocks
kept = resident()
return_freed_pages()
print(kept - before, resident() - before)
"""


def page_faults(calls: int) -> int:
    """Of ten blocks."""
    return int(in_a_process_of_its_own(FAULTS, str(calls)))


def in_a_process_of_its_own(code: str, *arguments: str) -> str:
    """What the code prints, with the C library's own settings."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("LD_PRELOAD", "GLIBC_TUNABLES") and not key.startswith("MALLOC_")
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=Path(__file__).resolve().parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@needs_glibc
def test_freed_pages_are_used_again() -> None:
    returned, kept, called_twice = (page_faults(calls) for calls in range(3))
    assert returned > 100  # as few as these where the kernel gives pages of 2 MiB
    assert kept < 0.1 * returned
    assert called_twice < 0.1 * returned


@needs_glibc
def test_freed_pages_go_back_when_asked_to() -> None:
    kept, left = (int(figure) for figure in in_a_process_of_its_own(RESIDENT).split())  # MiB
    assert kept > 200
    assert left < 20


def raises(error: type[Exception]) -> Any:
    def load(name: None) -> None:
        raise error

    return load


@pytest.mark.parametrize(
    "library", [raises(OSError), raises(TypeError), lambda name: object()], ids=["none", "windows", "not glibc"]
)
def test_other_c_libraries_are_left_alone(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", library)
    memory.keep_freed_pages()
    memory.return_freed_pages()
