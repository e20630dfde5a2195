"""Grids in physical space: the one owner of units, axes and orientation.

Everything here is LPS mm (ITK's world). A `Grid` maps voxel indices (i, j, k) to LPS mm; the tensor axes D, H, W of
this project are i, j, k, nibabel's order. ITK's own arrays are (k, j, i): only this module transposes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import itk
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from common.layers.warp import sample_at, warp

__all__ = [
    "Grid",
    "PairGrids",
    "array_to_itk",
    "ddf_to_displacement",
    "displacement_to_ddf",
    "grid_of",
    "itk_to_array",
    "resample_to_grid",
    "sample_points",
    "swap_lps_ras",
]


@dataclass(frozen=True)
class Grid:
    """A regular lattice of voxels in physical space.

    Attributes:
        shape: number of voxels along i, j, k.
        affine: (4, 4) float64, voxel index -> LPS mm.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        if affine.shape != (4, 4):
            raise ValueError(f"a grid's affine must be 4 x 4, got {affine.shape}")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
            raise ValueError("a grid's affine is singular: its axes do not span the space")
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def spacing(self) -> np.ndarray:
        """(3,) mm between neighbouring voxels along i, j, k."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def direction(self) -> np.ndarray:
        """(3, 3) unit vectors of i, j, k in its columns."""
        return self.affine[:3, :3] / self.spacing

    @property
    def origin(self) -> np.ndarray:
        """(3,) LPS mm of voxel (0, 0, 0)."""
        return self.affine[:3, 3]

    @property
    def corners(self) -> np.ndarray:
        """(8, 3) LPS mm of the outermost voxel centres."""
        unit = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3)
        return self.to_physical(unit * (np.array(self.shape) - 1))

    @property
    def centre(self) -> np.ndarray:
        """(3,) LPS mm of the middle of the field of view."""
        return self.to_physical((np.array([self.shape]) - 1) / 2)[0]

    def to_physical(self, voxels: np.ndarray) -> np.ndarray:
        """(N, 3) voxel coordinates to (N, 3) LPS mm."""
        return np.asarray(voxels, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_voxels(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) LPS mm to (N, 3) voxel coordinates."""
        return np.linalg.solve(self.affine[:3, :3], (np.asarray(points, dtype=np.float64) - self.affine[:3, 3]).T).T

    def is_close_to(self, other: Grid) -> bool:
        """Whether both have the same voxels, but for rounding."""
        return self.shape == other.shape and np.allclose(self.affine, other.affine, rtol=0, atol=1e-4)

    def extended(self, voxels: int) -> Grid:
        """The grid with so many voxels more at each end of each axis."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_physical(np.full((1, 3), -float(voxels)))[0]
        d, h, w = (n + 2 * voxels for n in self.shape)
        return Grid((d, h, w), affine)

    def with_spacing(self, spacing: float | np.ndarray) -> Grid:
        """Grid of the same axes that covers this one's field of view (its voxels' outer faces) at another spacing.

        The counts are rounded to whole voxels and the two fields of view share their centre.
        """
        new = np.broadcast_to(np.asarray(spacing, dtype=np.float64), (3,))
        extent = np.array(self.shape) * self.spacing
        shape = np.maximum(1, np.ceil(extent / new - 1e-6)).astype(int)
        matrix = self.direction * new
        centre = self.to_physical((np.array(self.shape)[None] - 1) / 2)[0]
        affine = np.eye(4)
        affine[:3, :3] = matrix
        affine[:3, 3] = centre - matrix @ ((shape - 1) / 2)
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


@dataclass(frozen=True, kw_only=True)
class PairGrids:
    """The arrays of two scans and the grid on which a network saw them: its field in terms of the scans' own voxels.

    `total(x) = fixed_to_moving(x + u(x))` in LPS mm, with u the network's field.

    Attributes:
        fixed, moving: grids of the two scans.
        network: grid of the network's field, in the fixed scan's space.
        fixed_to_moving: (4, 4), LPS mm, what was done to the pair before the network saw it.
    """

    fixed: Grid
    moving: Grid
    network: Grid
    fixed_to_moving: np.ndarray

    def displacement(self, ddf: Tensor | np.ndarray) -> np.ndarray:
        """The whole map from the fixed to the moving array: what Learn2Reg calls the displacement field.

        Where both scans and the network share one grid it is `ddf`, bit for bit.

        Args:
            ddf: (3, D, H, W), voxels of the network's grid; between voxels trilinear, beyond the border repeated.

        Returns:
            (3, *fixed.shape) float32, voxels of the moving array: `total(p) - p`, p a voxel of the fixed array.

        Raises:
            ValueError: when the field is not on the network's grid.
        """
        to_moving_voxels = np.linalg.inv(self.moving.affine) @ self.fixed_to_moving
        vectors = _snapped((to_moving_voxels @ self.network.affine)[:3, :3])
        field = np.einsum("ac,cijk->aijk", vectors, self._at_fixed_voxels(ddf))
        field += _affine_field(self._fixed_to_moving_voxels, self.fixed.shape)
        return field.astype(np.float32)

    def deformation(self, displacement: np.ndarray) -> np.ndarray:
        """The same map without what separates the two arrays, so that its Jacobian is that of the deformation alone.

        Two scans of other spacings or orientations differ by a Jacobian of their own, negative where one array is
        mirrored.

        Args:
            displacement: (3, *fixed.shape), voxels of the moving array.

        Returns:
            (3, *fixed.shape) float32, voxels of the fixed array; `displacement` itself where the scans share one grid.
        """
        back = np.linalg.inv(self._fixed_to_moving_voxels)
        field = np.einsum("ac,cijk->aijk", back[:3, :3], np.asarray(displacement, dtype=np.float64))
        return (field + _affine_field(back, self.fixed.shape)).astype(np.float32)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As plain arrays, which a data loader can collate."""
        grids = {"fixed": self.fixed, "moving": self.moving, "network": self.network}
        shapes = {f"{name}_shape": np.array(grid.shape) for name, grid in grids.items()}
        affines = {f"{name}_affine": grid.affine for name, grid in grids.items()}
        return {**shapes, **affines, "fixed_to_moving": self.fixed_to_moving}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor | np.ndarray]) -> PairGrids:
        """Back from `to_arrays`, with or without the batch axis of a batch of one."""
        values = {key: np.asarray(value) for key, value in arrays.items()}
        grids = {}
        for name in ("fixed", "moving", "network"):
            d, h, w = values[f"{name}_shape"].reshape(3).tolist()
            grids[name] = Grid((d, h, w), values[f"{name}_affine"].reshape(4, 4))
        return cls(**grids, fixed_to_moving=values["fixed_to_moving"].reshape(4, 4))

    @property
    def _fixed_to_moving_voxels(self) -> np.ndarray:
        return _snapped(np.linalg.inv(self.moving.affine) @ self.fixed_to_moving @ self.fixed.affine)

    def _at_fixed_voxels(self, ddf: Tensor | np.ndarray) -> np.ndarray:
        """(3, *fixed.shape) float64, the field's vectors, still voxels of the network's grid."""
        field = np.asarray(ddf.detach().cpu() if isinstance(ddf, Tensor) else ddf, dtype=np.float64)
        if field.shape != (3, *self.network.shape):
            raise ValueError(f"a field {field.shape} does not fit a network grid {self.network.shape}")
        to_network = _snapped(np.linalg.inv(self.network.affine) @ self.fixed.affine)
        start = to_network[:3, 3]
        stop = start + self.fixed.shape
        whole = np.array_equal(to_network[:3, :3], np.eye(3)) and np.array_equal(start, np.rint(start))
        if whole and (start >= 0).all() and (stop <= self.network.shape).all():
            i, j, k = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
            return field[:, i, j, k]
        at = _affine_field(to_network, self.fixed.shape) + np.indices(self.fixed.shape)
        return np.stack([ndimage.map_coordinates(channel, at, order=1, mode="nearest") for channel in field])


def _snapped(matrix: np.ndarray) -> np.ndarray:
    """Rid of rounding errors near whole numbers, so that equal grids map to each other exactly."""
    whole = np.rint(matrix)
    return np.where(np.abs(matrix - whole) < 1e-9, whole, matrix)


def _affine_field(voxel_map: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(3, *shape) float64: where a (4, 4) map takes each voxel, minus where it is."""
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    rows = voxel_map[:3] - np.eye(4)[:3]
    return np.stack([np.broadcast_to(a * i + b * j + c * k + d, shape) for a, b, c, d in rows])


def swap_lps_ras(affine: np.ndarray) -> np.ndarray:
    """Turn a voxel-to-LPS affine into voxel-to-RAS, or back."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine, dtype=np.float64)


def grid_of(image: Any) -> Grid:
    """The grid of a 3D `itk.Image`."""
    affine = np.eye(4)
    direction = np.asarray(itk.array_from_matrix(image.GetDirection()))
    affine[:3, :3] = direction * np.asarray(image.GetSpacing())
    affine[:3, 3] = np.asarray(image.GetOrigin())
    shape = tuple(int(n) for n in image.GetLargestPossibleRegion().GetSize())
    return Grid((shape[0], shape[1], shape[2]), affine)


def itk_to_array(image: Any) -> np.ndarray:
    """Voxels of an `itk.Image` as (i, j, k), or (i, j, k, components) for a vector image."""
    array = itk.array_from_image(image)
    return array.transpose(2, 1, 0, *range(3, array.ndim))


def array_to_itk(array: np.ndarray, grid: Grid) -> Any:
    """`itk.Image` of an array (i, j, k), or vector image of an array (i, j, k, 3), on `grid`.

    Raises:
        ValueError: when the array's shape is not the grid's.
    """
    if array.shape[:3] != grid.shape:
        raise ValueError(f"an array of shape {array.shape[:3]} does not fit a grid of shape {grid.shape}")
    data = np.ascontiguousarray(array.transpose(2, 1, 0, *range(3, array.ndim)))
    vector = array.ndim == 4
    image = itk.image_from_array(data, is_vector=vector) if not vector else _vector_image(data)
    image.SetSpacing(grid.spacing.tolist())
    image.SetOrigin(grid.origin.tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(grid.direction)))
    return image


def _vector_image(data: np.ndarray) -> Any:
    component = itk.D if data.dtype == np.float64 else itk.F
    image = itk.Image[itk.Vector[component, 3], 3].New()
    image.SetRegions([int(n) for n in data.shape[2::-1]])
    image.Allocate()
    itk.array_view_from_image(image)[...] = data  # `image_from_array` cannot copy vectors of doubles
    return image


def ddf_to_displacement(ddf: Tensor | np.ndarray, grid: Grid) -> np.ndarray:
    """Voxel field (3, D, H, W) on `grid` to LPS mm vectors (D, H, W, 3)."""
    u = np.asarray(ddf, dtype=np.float32)
    return np.einsum("xc,cijk->ijkx", grid.affine[:3, :3].astype(np.float32), u, optimize=True)


def displacement_to_ddf(displacement: np.ndarray, grid: Grid) -> Tensor:
    """LPS mm vectors (D, H, W, 3) on `grid` to a voxel field (3, D, H, W)."""
    to_voxels = np.linalg.inv(grid.affine[:3, :3]).astype(np.float32)
    field = np.einsum("cx,ijkx->cijk", to_voxels, np.asarray(displacement, dtype=np.float32), optimize=True)
    return torch.from_numpy(np.ascontiguousarray(field))


def resample_to_grid(
    volume: Tensor,
    source: Grid,
    target: Grid,
    *,
    target_to_source: np.ndarray | None = None,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
) -> Tensor:
    """Resample a volume onto another grid through an affine map of physical space.

    Args:
        volume: (C, D, H, W) on `source`.
        source: the volume's grid.
        target: the grid to sample on.
        target_to_source: (4, 4), LPS mm of the target's space -> LPS mm of the source's; identity when None.
        mode: "bilinear" or "nearest".
        padding_mode: "zeros", "border" or "reflection".

    Returns:
        (C, D', H', W') on `target`.
    """
    physical = np.eye(4) if target_to_source is None else target_to_source
    voxel_map = np.linalg.inv(source.affine) @ physical @ target.affine
    axes = [torch.arange(n, dtype=torch.float32, device=volume.device) for n in target.shape]
    # ddf of the map: position in the source minus position in the target, built axis by axis
    ddf = torch.empty((1, 3, *target.shape), dtype=torch.float32, device=volume.device)
    for c in range(3):
        row = voxel_map[c].copy()
        row[c] -= 1.0
        ddf[0, c] = (
            float(row[0]) * axes[0][:, None, None]
            + float(row[1]) * axes[1][None, :, None]
            + float(row[2]) * axes[2][None, None, :]
            + float(row[3])
        )
    return warp(volume[None].float(), ddf, mode=mode, padding_mode=padding_mode)[0]


def sample_points(ddf: Tensor, points: Tensor) -> Tensor:
    """Trilinear values of a field at points.

    Args:
        ddf: (3, D, H, W), voxels.
        points: (N, 3) voxel coordinates along the tensor axes; beyond the border the border value is taken.

    Returns:
        (N, 3), differentiable with respect to the field.
    """
    return sample_at(ddf[None], points.to(ddf))
