"""The demonstration: a head-like phantom pair whose true transform is a formula.

`python -m common.data.phantom create FOLDER` writes the pair, `check FOLDER` compares a registration with the truth.
"""

from __future__ import annotations

from pathlib import Path

import fire
import numpy as np

from common.errors import RegistrationError
from common.geometry.spaces import Grid, array_to_itk, grid_of, itk_to_array
from common.io import read_image, read_transform, transform_points, write_image

__all__ = ["check", "create", "head", "true_transform"]

# Structures of the phantom, later ones painted over earlier ones: label, intensity, centre and half axes in mm.
_STRUCTURES = (
    (1, 0.85, (0.0, 0.0, 0.0), (70.0, 88.0, 76.0)),  # skin and fat
    (2, 0.12, (0.0, 0.0, 0.0), (66.0, 84.0, 72.0)),  # skull
    (3, 0.45, (0.0, 0.0, 2.0), (61.0, 78.0, 66.0)),  # cortex
    (4, 0.75, (-27.0, 2.0, 4.0), (27.0, 62.0, 50.0)),  # white matter
    (4, 0.75, (27.0, 2.0, 4.0), (27.0, 62.0, 50.0)),
    (5, 0.20, (-11.0, -4.0, 10.0), (7.0, 28.0, 12.0)),  # ventricles
    (5, 0.20, (11.0, -4.0, 10.0), (7.0, 28.0, 12.0)),
    (6, 0.55, (-24.0, -6.0, 2.0), (9.0, 18.0, 11.0)),  # basal ganglia
    (6, 0.55, (24.0, -6.0, 2.0), (9.0, 18.0, 11.0)),
    (7, 0.62, (0.0, 48.0, -34.0), (40.0, 24.0, 20.0)),  # cerebellum
    (8, 0.70, (0.0, 18.0, -44.0), (10.0, 10.0, 30.0)),  # brain stem
)
# Bumps of the true displacement: centre, width and vector, all in mm.
_BUMPS = (
    ((-35.0, -30.0, 20.0), 34.0, (7.0, 6.0, -4.0)),
    ((30.0, 35.0, 25.0), 32.0, (-6.0, 7.0, 5.0)),
    ((10.0, -5.0, 5.0), 26.0, (3.0, -6.0, 6.0)),
    ((-10.0, 45.0, -30.0), 30.0, (-5.0, -5.0, 6.0)),
    ((38.0, -40.0, -15.0), 30.0, (5.0, 4.0, 7.0)),
)
_ROTATION_DEGREES = 4.0
_SHIFT = np.array([6.0, -5.0, 4.0])
_CHECKED_POINTS = 4000


def true_transform(points: np.ndarray, rotation: float = _ROTATION_DEGREES) -> np.ndarray:
    """Fixed LPS mm -> moving LPS mm, (N, 3): smooth bumps, then a rotation about the body axis and a shift."""
    moved = points.astype(np.float64).copy()
    for centre, width, vector in _BUMPS:
        weight = np.exp(-0.5 * ((points - np.array(centre)) ** 2).sum(1) / (width / 1.5) ** 2)
        moved += weight[:, None] * np.array(vector)
    angle = np.radians(rotation)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return moved @ turn.T + _SHIFT


def head(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intensity and label of the moving phantom at LPS mm points (N, 3), relative to its centre."""
    intensity = np.full(len(points), 0.02)
    label = np.zeros(len(points), dtype=np.int16)
    # Folds: the surfaces are wavy, so that there is something to align along them.
    folds = 0.05 * np.sin(points[:, 0] / 5.0) * np.sin(points[:, 1] / 6.0) * np.sin(points[:, 2] / 5.5)
    for value, brightness, centre, half_axes in _STRUCTURES:
        radius = np.sqrt((((points - np.array(centre)) / np.array(half_axes)) ** 2).sum(1))
        radius = radius + (folds if value >= 3 else 0.0)
        # A soft edge of about a millimetre, as of partial volume
        inside = 1 / (1 + np.exp((radius - 1) * min(half_axes) / 0.5))
        intensity = intensity * (1 - inside) + brightness * inside
        label[radius < 1] = value
    return intensity + 0.06 * _texture(points) * (label > 0), label


def _texture(points: np.ndarray) -> np.ndarray:
    """Aperiodic pattern in [-1, 1] with details of 8 to 25 mm: vessels and small structures, in one formula."""
    x, y, z = points.T
    coarse = np.sin(x / 7.3 + np.sin(y / 11.0)) * np.cos(y / 8.1 + np.sin(z / 9.0)) * np.sin(z / 6.7 + np.sin(x / 13.0))
    fine = np.sin(x / 2.9 + y / 4.1) * np.cos(y / 3.3 - z / 3.7) * np.sin(z / 2.7 + x / 5.3)
    return 0.6 * coarse + 0.4 * fine


def create(folder: str, rotation: float = _ROTATION_DEGREES) -> None:
    """Write fixed and moving image and label; the two differ in shape, spacing, orientation and origin.

    Args:
        folder: made when missing.
        rotation: of one head against the other about the body axis, degrees.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    fixed_grid = _grid((88, 104, 92), (1.8, 1.9, 1.8), tilt=12.0)
    moving_grid = _grid((96, 80, 112), (1.7, 2.4, 1.6), tilt=-7.0, offset=_SHIFT, permuted=True)
    for name, grid in (("fixed", fixed_grid), ("moving", moving_grid)):
        voxels = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1).reshape(-1, 3)
        points = grid.to_physical(voxels)
        intensity, label = head(true_transform(points, rotation) if name == "fixed" else points)
        intensity = 1000 * (intensity + generator.normal(0, 0.01, len(intensity)))
        write_image(array_to_itk(intensity.reshape(grid.shape).astype(np.float32), grid), f"{folder}/{name}.nii.gz")
        write_image(array_to_itk(label.reshape(grid.shape), grid), f"{folder}/{name}_label.nii.gz")
    print(f"phantom pair in {folder}")


def check(folder: str, result: str | None = None, rotation: float = _ROTATION_DEGREES) -> None:
    """Print the endpoint error inside the fixed phantom, in mm, before and after a registration.

    Args:
        folder: where `create` wrote the pair.
        result: where the registration wrote its results; `folder`/result by default.
        rotation: what `create` was given.
    """
    result = result or f"{folder}/result"
    try:
        fixed = read_image(f"{folder}/fixed.nii.gz")
        transform = read_transform(f"{result}/transform.h5")
    except RegistrationError as error:
        raise SystemExit(f"error: {error}") from None
    grid = grid_of(fixed)
    inside = np.argwhere(itk_to_array(read_image(f"{folder}/fixed_label.nii.gz")) > 0)
    chosen = np.random.default_rng(0).choice(len(inside), _CHECKED_POINTS, replace=False)
    points = grid.to_physical(inside[chosen])
    truth = true_transform(points, rotation)
    before = np.linalg.norm(points - truth, axis=1)
    after = np.linalg.norm(transform_points(transform, points) - truth, axis=1)
    print(f"endpoint error inside the head: before {before.mean():.2f} mm, after {after.mean():.2f} mm (mean)")
    print(
        f"                    worst of 100: before {np.percentile(before, 99):.2f} mm, after "
        f"{np.percentile(after, 99):.2f} mm"
    )
    print(f"picture: {result}/report.png")


def _grid(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    tilt: float,
    offset: np.ndarray | None = None,
    permuted: bool = False,
) -> Grid:
    """An oblique grid around the phantom; `permuted` exchanges and flips its axes."""
    angle = np.radians(tilt)
    direction = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    if permuted:
        direction = direction[:, [0, 2, 1]] * np.array([-1.0, 1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(spacing)
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    affine[:3, 3] = (np.zeros(3) if offset is None else offset) - centre
    return Grid(shape, affine)


if __name__ == "__main__":
    fire.Fire({"create": create, "check": check})
