"""Folds go, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from common.geometry.fields import jacobian_determinant
from common.geometry.folding import remove_folding
from common.geometry.spaces import Grid, ddf_to_displacement, resample_to_grid

SHAPE = (30, 36, 33)


def random_field(strength: float, seed: int = 0) -> Tensor:
    """(3, D, H, W), control points 5 voxels apart."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, *(n // 5 for n in SHAPE), generator=generator)
    return strength * F.interpolate(coarse, size=SHAPE, mode="trilinear", align_corners=True)[0]


def folds(ddf: Tensor) -> Tensor:
    """(D-2, H-2, W-2)"""
    return jacobian_determinant(ddf[None])[0, 0] <= 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strength", [1.5, 2.0])
def test_no_fold_is_left(strength: float, seed: int) -> None:
    ddf = random_field(strength, seed)
    assert 0 < folds(ddf).float().mean() < 0.03
    result, voxels = remove_folding(ddf)
    assert not folds(result).any()
    assert voxels >= int(folds(ddf).sum())
    assert result.isfinite().all()


def test_only_the_neighbourhood_changes() -> None:
    """A hill that is too steep, in a field that is not: the rest stays, bit for bit, and so does the argument."""
    ddf = 0.2 * random_field(1.0)
    ddf[0, 12:15, 20:23, 15:18] += 4.0
    given = ddf.clone()
    result, voxels = remove_folding(ddf)
    assert torch.equal(ddf, given)
    assert voxels > 0
    assert not folds(result).any()
    changed = (result != ddf).any(dim=0)
    assert changed.any()
    changed[6:21, 14:29, 9:24] = False
    assert not changed.any()
    assert result[0, 12:15, 20:23, 15:18].mean() > 0.5  # the hill is smoothed, not cut off


@pytest.mark.parametrize("axis", range(3))
def test_at_the_border(axis: int) -> None:
    ddf = torch.zeros(3, *SHAPE)
    ddf[axis].select(axis, 0)[10:14, 10:14] = 2.5
    assert folds(ddf).any()
    result, _ = remove_folding(ddf)
    assert not folds(result).any()


def test_a_field_without_folds_is_returned_as_it_is() -> None:
    ddf = 0.3 * random_field(1.0)
    result, voxels = remove_folding(ddf)
    assert (voxels, result is ddf) == (0, True)


class TestOnAnotherGrid:
    """The network's grid need not be that of the fixed scan, on which the field is written and measured."""

    GRID = Grid(SHAPE, np.diag([1.2, 0.9, 1.0, 1.0]))
    COARSER = ((2.4, 1.8, 2.0), (1.2, 2.2, 3.1))
    FINER = ((0.8, 0.6, 0.7), (1.1, 0.85, 0.95))

    def seen(self, ddf: Tensor, other: Grid) -> Tensor:
        vectors = torch.from_numpy(np.diag(self.GRID.spacing / other.spacing)).float()
        return torch.einsum("ac,cijk->aijk", vectors, resample_to_grid(ddf, self.GRID, other, padding_mode="border"))

    @pytest.mark.parametrize("strength", [2.3, 2.7])
    @pytest.mark.parametrize("spacing", COARSER + FINER)
    def test_no_fold_is_left(self, spacing: tuple[float, float, float], strength: float) -> None:
        ddf, other = random_field(strength, seed=1), self.GRID.with_spacing(np.array(spacing))
        alone, fewer = remove_folding(ddf, grid=self.GRID)
        assert not folds(alone).any()
        assert folds(self.seen(alone, other)).any()
        result, voxels = remove_folding(ddf, grid=self.GRID, seen_on=other)
        assert voxels > fewer
        assert not folds(result).any()
        assert not folds(self.seen(result, other)).any()
        assert (result == alone).all(dim=0).float().mean() > 0.7

    def test_a_scan_that_reaches_beyond_the_field(self) -> None:
        """There the field goes on as it ends, and far outside nothing of it can fold."""
        affine = self.GRID.affine.copy()
        affine[:3, 3] -= 12.0
        other = Grid((60, 60, 60), affine)
        result, _ = remove_folding(random_field(2.7, seed=1), grid=self.GRID, seen_on=other)
        assert not folds(self.seen(result, other)).any()

    def test_a_field_without_folds_is_returned_as_it_is(self) -> None:
        ddf = 0.3 * random_field(1.0)
        result, voxels = remove_folding(ddf, grid=self.GRID, seen_on=self.GRID.with_spacing(1.7))
        assert (voxels, result is ddf) == (0, True)


FLIPPED = np.diag([-1.0, -1.0, 1.0])  # RAS
PERMUTED = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
OBLIQUE = Rotation.from_euler("xyz", [20, -15, 30], degrees=True).as_matrix() @ PERMUTED


class TestByItk:
    """What SimpleITK's filter says of the displacement of both stages."""

    @staticmethod
    def grid(direction: np.ndarray) -> Grid:
        affine = np.eye(4)
        affine[:3, :3] = direction * [1.5, 0.8, 2.0]
        return Grid(SHAPE, affine)

    @staticmethod
    def determinant(ddf: Tensor, grid: Grid, matrix: np.ndarray) -> np.ndarray:
        """(D-2, H-2, W-2) of p -> matrix (p + u)."""
        index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1)
        points = grid.to_physical(index.reshape(-1, 3)).reshape(*grid.shape, 3)
        total = (points + ddf_to_displacement(ddf, grid)) @ matrix.T - points
        image = sitk.GetImageFromArray(np.ascontiguousarray(total.transpose(2, 1, 0, 3)), isVector=True)
        image.SetSpacing(grid.spacing.tolist())
        image.SetDirection(grid.direction.ravel().tolist())
        determinant = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(image))
        return determinant.transpose(2, 1, 0)[1:-1, 1:-1, 1:-1]

    @pytest.mark.parametrize("direction", [FLIPPED, PERMUTED, OBLIQUE], ids=["flipped", "permuted", "oblique"])
    def test_no_fold_is_left(self, direction: np.ndarray) -> None:
        grid, (ddf, _) = self.grid(direction), remove_folding(random_field(1.5))
        affine = np.eye(4)
        affine[:3, :3] = [[1.05, 0.06, 0.0], [-0.04, 0.94, 0.05], [0.02, -0.05, 1.03]]
        assert not folds(ddf).any()
        assert (self.determinant(ddf, grid, affine[:3, :3]) <= 0).any()
        result, voxels = remove_folding(ddf, grid=grid, fixed_to_moving=affine)
        assert voxels > 0
        assert not folds(result).any()
        assert not (self.determinant(result, grid, affine[:3, :3]) <= 0).any()

    def test_a_grid_along_the_axes_has_one_determinant(self) -> None:
        ddf = random_field(1.5)
        alone, with_grid = remove_folding(ddf), remove_folding(ddf, grid=self.grid(np.eye(3)))
        assert torch.equal(alone[0], with_grid[0])
        assert alone[1] == with_grid[1]

    def test_an_affine_stage_that_looks_folded_by_itself_is_let_be(self) -> None:
        """A scan of the double size and a flipped axis: to the filter no field is without folds."""
        affine = np.diag([2.5, 1.0, 1.0, 1.0])
        grid, ddf = self.grid(FLIPPED), 0.3 * random_field(1.0)
        assert (self.determinant(ddf, grid, affine[:3, :3]) <= 0).mean() > 0.9
        result, voxels = remove_folding(ddf, grid=grid, fixed_to_moving=affine)
        assert (voxels, result is ddf) == (0, True)
