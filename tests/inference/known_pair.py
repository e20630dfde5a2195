"""A pair with a known transform, on two grids that share nothing; as arrays and as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from bundle_list import ROOT
from grids import CENTRE, centred_grid, rotation

from common.geometry.spaces import Grid, swap_lps_ras

BUNDLE = ROOT / "bundles" / "recorr"
"""Its inference.json is every bundle's but for what tests/bundles/test_shared_configs.py lists."""
CONFIG = f"bundles/{BUNDLE.name}/configs/inference.json"
"""As the command names it, from the repository's root."""


def affine_about_centre(matrix: np.ndarray, shift: list[float]) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = matrix
    result[:3, 3] = CENTRE + shift - matrix @ CENTRE
    return result


def apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ affine[:3, :3].T + affine[:3, 3]


def anatomy(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intensity and label at (N, 3) LPS mm: a lopsided egg with four balls and shading in it; smooth."""
    x = points - CENTRE
    balls = [(-12, 4, 6, 9, 60), (9, -8, -6, 8, -45), (6, 9, -10, 6, 80), (2, -4, 16, 5, 110)]
    radius = np.sqrt((x[:, 0] / 26) ** 2 + (x[:, 1] / 20) ** 2 + ((x[:, 2] + 0.25 * x[:, 0]) / 31) ** 2)
    shading = np.sin(x[:, 0] / 7 + 1) * np.cos(x[:, 1] / 6) + np.sin(x[:, 1] / 8 - x[:, 2] / 7)
    image = (100 + 20 * shading) / (1 + np.exp((radius - 1) * 10))
    label = (radius < 1).astype(np.uint8)
    for number, (*centre, size, height) in enumerate(balls, start=2):
        distance = np.linalg.norm(x - centre, axis=1)
        image += height / (1 + np.exp((distance - size) / 1.2))
        label[distance < size] = number
    return image, label


def wave(points: np.ndarray) -> np.ndarray:
    """Displacement in mm, up to 4 along each axis."""
    x = points - CENTRE
    return 4 * np.stack([np.sin(x[:, 1] / 12), np.cos(x[:, 2] / 14 + 0.5), np.sin(x[:, 0] / 13 + 1)], -1)


@dataclass
class Known:
    """`fixed(x)` is `moving(fixed_to_moving(x + amplitude * wave(x)))`."""

    fixed_grid: Grid
    moving_grid: Grid
    fixed_to_moving: np.ndarray
    amplitude: float = 0.0

    def map(self, points: np.ndarray) -> np.ndarray:
        return apply(self.fixed_to_moving, points + self.amplitude * wave(points))

    def fixed(self) -> tuple[np.ndarray, np.ndarray]:
        points = voxel_centres(self.fixed_grid)
        image, label = anatomy(points + self.amplitude * wave(points))
        return image.reshape(self.fixed_grid.shape), label.reshape(self.fixed_grid.shape)

    def moving(self) -> tuple[np.ndarray, np.ndarray]:
        image, label = anatomy(apply(np.linalg.inv(self.fixed_to_moving), voxel_centres(self.moving_grid)))
        return image.reshape(self.moving_grid.shape), label.reshape(self.moving_grid.shape)

    def landmarks(self) -> np.ndarray:
        return CENTRE + np.array([[-12, 4, 6], [9, -8, -6], [6, 9, -10], [2, -4, 16], [-10, -8, -12.0]])

    def write(self, folder: Path) -> dict[str, str]:
        """Files of the pair by the names of the command's arguments."""
        paths = {}
        for name, grid, (image, label) in (
            ("fixed", self.fixed_grid, self.fixed()),
            ("moving", self.moving_grid, self.moving()),
        ):
            for key, array in ((name, image.astype(np.float32)), (f"{name}_label", label)):
                paths[key] = str(folder / f"{key}.nii.gz")
                nib.save(nib.Nifti1Image(array, swap_lps_ras(grid.affine)), paths[key])
        for key, points in (
            ("fixed_landmarks", self.landmarks()),
            ("moving_landmarks", self.map(self.landmarks())),
        ):
            paths[key] = str(folder / f"{key}.csv")
            np.savetxt(paths[key], points, delimiter=",")
        return paths


def voxel_centres(grid: Grid) -> np.ndarray:
    return grid.to_physical(np.indices(grid.shape).reshape(3, -1).T)


OBLIQUE = centred_grid((44, 36, 28), rotation(25, 2) @ rotation(-15, 0), [2.0, 2.4, 3.2])
OTHER = centred_grid((34, 46, 50), np.diag([1.0, 1.0, -1.0]) @ rotation(-12, 1), [2.6, 2.0, 1.9])
