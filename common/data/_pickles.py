"""Arrays out of a pickle that comes from elsewhere, without running anything that it asks for.

A pickle is a program: it names functions and has them called. The unpickler here knows no other names than those which
numpy's arrays are rebuilt by, so that anything else is refused by its name, before it is imported.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError

__all__ = ["read_pickled_arrays"]


class _Encode:
    """`_codecs.encode`, by which pickles of the protocols 0 to 2 hold bytes; for no other encoding."""

    __slots__ = ()  # nothing for a pickle to set

    def __call__(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it asks for the encoding '{encoding}'")
        return text.encode("latin-1")


class _FromBuffer:
    """`numpy._core.numeric._frombuffer`, by which pickles of protocol 5 hold arrays."""

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> np.ndarray:
        array = np.frombuffer(buffer, dtype=dtype)
        if order == "K" and axes is not None:
            return array.reshape(shape, order="C").transpose(axes)
        return array.reshape(shape, order="F" if order == "F" else "C")


class _Reconstruct:
    """`numpy._core.multiarray._reconstruct`: an empty array, which the pickle then fills."""

    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, dtype: Any) -> np.ndarray:
        if kind is not np.ndarray or shape != (0,):
            raise pickle.UnpicklingError("it asks for another kind of array")
        return np.ndarray((0,), dtype=dtype)


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("_codecs", "encode"): _Encode(),
}
for _package in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _KNOWN[f"{_package}.multiarray", "_reconstruct"] = _Reconstruct()
    _KNOWN[f"{_package}.numeric", "_frombuffer"] = _FromBuffer()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickle names; by default it would be imported."""
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for '{module}.{name}', which is no part of an array") from None


def read_pickled_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of a pickled tuple or list.

    Args:
        path: the pickle, of any protocol.

    Returns:
        numeric arrays.

    Raises:
        InputError: when the file is missing or broken, or holds anything else; nothing of it has run then.
    """
    try:
        with path.open("rb") as file:
            # latin1 is what Python 2's arrays need, and changes nothing about others
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise InputError(f"'{path}': no such file") from None
    except OSError as error:
        raise InputError(f"'{path}': cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError as error:
        raise InputError(f"'{path}' is refused, for it is no pickle of plain numpy arrays: {error}") from None
    except Exception as error:  # whatever a broken pickle may bring about
        raise InputError(f"'{path}' is a broken pickle ({type(error).__name__})") from None
    if not isinstance(content, tuple | list):
        raise InputError(f"'{path}' holds no tuple of arrays")
    for item in content:
        if not isinstance(item, np.ndarray) or item.dtype.kind not in "fiub":
            raise InputError(f"'{path}' holds something other than arrays of numbers")
    return list(content)
