"""Files that hold an array and little else, for MONAI's `LoadImage`."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.data import ImageReader

from common.data._rows import PathLike

__all__ = ["ArrayReader"]


class ArrayReader(ImageReader):
    """Reads one file into an array and its affine; chosen by the file's name, not by its extension alone."""

    @abstractmethod
    def knows(self, name: str) -> bool:
        """Whether a path is one of this reader's."""

    @abstractmethod
    def load(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The array, and its (4, 4) affine to RAS mm, as MONAI's are."""

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """See `knows`."""
        return all(self.knows(os.fspath(name)) for name in _listed(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        """See `load`."""
        (name,) = _listed(data)
        return self.load(os.fspath(name))

    def get_data(self, img: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
        """The array and what MONAI wants to know of it."""
        array, affine = img
        return array, {
            "affine": affine,
            "original_affine": affine.copy(),
            "spatial_shape": np.array(array.shape),
            "space": "RAS",
            "original_channel_dim": float("nan"),  # MONAI's word for none
        }


def _listed(names: Sequence[PathLike] | PathLike) -> list[PathLike]:
    return [names] if isinstance(names, str | os.PathLike) else list(names)
