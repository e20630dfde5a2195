"""Keeping the C++ libraries' own chatter from the user."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import itk

__all__ = ["quiet_itk"]

_LOCK = threading.RLock()
_depth = 0


@contextmanager
def quiet_itk() -> Iterator[None]:
    """Silence ITK's warnings and what its third-party readers (niftilib, HDF5, GDCM) print on the error stream.

    The latter write to file descriptor 2 and know no switch, so the descriptor itself points to nowhere meanwhile. The
    lock keeps two threads from restoring each other's redirection.
    """
    global _depth
    with _LOCK:
        if _depth:  # already silent: only the outermost block restores
            yield
            return
        warnings = itk.Object.GetGlobalWarningDisplay()
        itk.Object.GlobalWarningDisplayOff()
        saved = _redirect()
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            if saved is not None:
                os.dup2(saved, 2)
                os.close(saved)
            itk.Object.SetGlobalWarningDisplay(warnings)


def _redirect() -> int | None:
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, ValueError, AttributeError):  # a process without an error stream has nothing to silence
        return None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return saved
