"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans; they are not part of the repository."""
    folder = Path(
        os.environ.get("REGISTRATION_TEST_DATA") or Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    )
    if not folder.is_dir():
        pytest.skip("no real scans: neither ../shared/data nor REGISTRATION_TEST_DATA is a folder")
    return folder.resolve()


@pytest.fixture
def oblique_affine() -> np.ndarray:
    """(4, 4) voxel -> LPS mm: turned about two axes, 1.2 x 0.8 x 2.5 mm, far from the origin, right-handed."""
    a, b = np.deg2rad([25.0, -15.0])
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn_z @ turn_x * np.array([1.2, 0.8, 2.5])
    affine[:3, 3] = [-140.0, 63.5, 412.25]
    return affine


_ANTS = """
import sys, ants
fixed, moving, *transforms = sys.argv[1:]
for transform in transforms:
    arguments = ants.image_read(fixed), ants.image_read(moving), [transform]
    ants.image_write(ants.apply_transforms(*arguments, interpolator="linear"), transform + ".ants.nii.gz")
"""


@pytest.fixture(scope="session")
def ants_resample() -> Callable[..., list[np.ndarray]]:
    """Resample by ANTs, (i, j, k), once for each transform file.

    In a process of its own: ANTs' and ITK's HDF5 libraries in one process crash it when it ends.
    """

    def resample(fixed: Path, moving: Path, *transforms: Path) -> list[np.ndarray]:
        subprocess.run([sys.executable, "-c", _ANTS, fixed, moving, *transforms], check=True, capture_output=True)
        return [np.asarray(nib.load(f"{transform}.ants.nii.gz").dataobj) for transform in transforms]

    return resample
