"""Key points that come with the scans of a data set, in voxels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from common.data._rows import PathLike, read_text
from common.data.dirlab import is_dirlab_landmarks, read_dirlab_landmarks
from common.errors import InputError

__all__ = ["read_keypoints"]


def read_keypoints(path: PathLike) -> np.ndarray:
    """Key points of a Learn2Reg CSV file, or landmarks of DIR-Lab.

    Args:
        path: three comma-separated numbers a row and no header, voxel coordinates along the array axes, from 0; a file
            that is named as DIR-Lab's are is read by `read_dirlab_landmarks`.

    Returns:
        (N, 3) float64, voxels.

    Raises:
        InputError: when the file is missing or empty, or when a row is not three finite numbers.
    """
    if is_dirlab_landmarks(path):
        return read_dirlab_landmarks(path)
    points = []
    for number, line in enumerate(read_text(Path(path)).splitlines(), start=1):
        if not line.strip():
            continue
        cells = line.split(",")
        if len(cells) != 3:
            raise InputError(f"'{path}', row {number}: key points have 3 comma-separated columns, not {len(cells)}")
        try:
            point = [float(cell) for cell in cells]
        except ValueError:
            raise InputError(f"'{path}', row {number}: '{line.strip()}' is not three numbers") from None
        if not all(math.isfinite(value) for value in point):
            raise InputError(f"'{path}', row {number}: '{line.strip()}' is not three finite numbers")
        points.append(point)
    if not points:
        raise InputError(f"'{path}': there are no key points in it")
    return np.array(points, dtype=np.float64)
