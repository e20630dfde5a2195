"""Memory of a process that works on large volumes."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_pages", "return_freed_pages"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_pages() -> None:
    """Let the C library keep the pages of freed tensors for the next ones.

    By default it gives each large block back to the kernel, which clears the pages again for the next tensor of the
    same size: half of the time of a ReCorr forward on a CPU (benchmarks/README.md). The peak stays the same; what is
    freed stays with the process, until `return_freed_pages`. Does nothing where the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_pages() -> None:
    """Give the pages of freed tensors back to the kernel.

    Between two pairs of a list: volumes of other sizes do not fit into what the last ones left, so that a process that
    keeps all pages grows from pair to pair. Does nothing where the C library is not glibc.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    trim(0)
