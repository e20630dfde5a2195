"""Grids and voxel fields in physical space; SimpleITK, MONAI's ITK bridge and scipy are the references."""

from __future__ import annotations

import itk
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data.itk_torch_bridge import monai_to_itk_ddf
from scipy.ndimage import map_coordinates
from torch import Tensor

from common.geometry.spaces import (
    Grid,
    array_to_itk,
    ddf_to_displacement,
    displacement_to_ddf,
    grid_of,
    itk_to_array,
    resample_to_grid,
    sample_points,
    swap_lps_ras,
)

SHAPE = (9, 11, 7)
KINDS = ["axis-aligned", "oblique", "left-handed", "permuted"]


def affine_of(kind: str, oblique: np.ndarray) -> np.ndarray:
    return {
        "axis-aligned": np.array([[-1.0, 0, 0, 30], [0, -1.5, 0, -4], [0, 0, 2, 7], [0, 0, 0, 1]]),
        "oblique": oblique,
        "left-handed": oblique @ np.diag([1.0, 1.0, -1.0, 1.0]),
        "permuted": oblique[:, [2, 0, 1, 3]],
    }[kind]


@pytest.fixture(params=KINDS)
def grid(request: pytest.FixtureRequest, oblique_affine: np.ndarray) -> Grid:
    """Anisotropic grids of all kinds."""
    return Grid(SHAPE, affine_of(request.param, oblique_affine))


def to_sitk(array: np.ndarray, grid: Grid) -> sitk.Image:
    """(i, j, k) or (i, j, k, 3)"""
    vector = array.ndim == 4
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.swapaxes(array, 0, 2)), isVector=vector)
    image.SetSpacing(grid.spacing.tolist())
    image.SetOrigin(grid.origin.tolist())
    image.SetDirection(grid.direction.ravel().tolist())
    return image


def random_ddf(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return 4 * torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed)) - 2


class TestGrid:
    def test_positions_against_simpleitk(self, grid: Grid) -> None:
        image = to_sitk(np.zeros(SHAPE, np.float32), grid)
        voxels = np.array([[0, 0, 0], [8, 10, 6], [3.25, 1.5, 5.75]])
        expected = [image.TransformContinuousIndexToPhysicalPoint(v.tolist()) for v in voxels]
        np.testing.assert_allclose(grid.to_physical(voxels), expected, atol=1e-9)
        points = grid.to_physical(voxels) + 0.7
        expected = [image.TransformPhysicalPointToContinuousIndex(p.tolist()) for p in points]
        np.testing.assert_allclose(grid.to_voxels(points), expected, atol=1e-9)

    def test_round_trip(self, grid: Grid) -> None:
        voxels = np.random.default_rng(0).uniform(-5, 20, (50, 3))
        np.testing.assert_allclose(grid.to_voxels(grid.to_physical(voxels)), voxels, atol=1e-9)

    def test_corners_are_the_outermost_centres(self, grid: Grid) -> None:
        voxels = grid.to_voxels(grid.corners)
        assert {tuple(v) for v in voxels.round(9) + 0.0} == {(i, j, k) for i in (0, 8) for j in (0, 10) for k in (0, 6)}

    def test_extended_by_voxels_at_each_end(self, grid: Grid) -> None:
        larger = grid.extended(3)
        assert larger.shape == tuple(n + 6 for n in grid.shape)
        voxels = np.array([[0.0, 0.0, 0.0], [4.0, 2.5, 1.0]])
        np.testing.assert_allclose(larger.to_physical(voxels + 3), grid.to_physical(voxels), atol=1e-9)

    @pytest.mark.parametrize("spacing", [1.0, 0.37, 3.3, (2.0, 1.0, 0.5), 1000.0])
    def test_with_spacing_covers_the_field_of_view_around_its_centre(
        self, grid: Grid, spacing: float | tuple[float, ...]
    ) -> None:
        new = grid.with_spacing(np.array(spacing))
        np.testing.assert_allclose(new.spacing, np.broadcast_to(spacing, 3))
        np.testing.assert_allclose(new.direction, grid.direction, atol=1e-12)
        centres = [g.to_physical((np.array([g.shape]) - 1) / 2)[0] for g in (grid, new)]
        np.testing.assert_allclose(centres[0], centres[1], atol=1e-9)
        faces = grid.to_physical(np.array([[-0.5] * 3, np.array(SHAPE) - 0.5]))
        inside = new.to_voxels(faces)
        assert (inside >= -0.5 - 1e-5).all()
        assert (inside <= np.array(new.shape) - 0.5 + 1e-5).all()
        # and no voxel more than needed
        assert ((np.array(new.shape) - 1) * new.spacing < np.array(SHAPE) * grid.spacing).all()

    def test_with_its_own_spacing_is_the_same_grid(self, grid: Grid) -> None:
        same = grid.with_spacing(grid.spacing)
        assert same.shape == grid.shape
        np.testing.assert_allclose(same.affine, grid.affine, atol=1e-9)

    def test_itk_round_trip(self, grid: Grid) -> None:
        array = np.random.default_rng(0).random(SHAPE).astype(np.float32)
        image = array_to_itk(array, grid)
        again = grid_of(image)
        assert again.shape == grid.shape
        np.testing.assert_allclose(again.affine, grid.affine, atol=1e-9)
        assert np.array_equal(itk_to_array(image), array)
        assert image.GetPixel([3, 7, 2]) == array[3, 7, 2]  # ITK's index is (i, j, k)

    def test_array_of_another_shape_is_refused(self, grid: Grid) -> None:
        with pytest.raises(ValueError, match=r"\(7, 11, 9\).*\(9, 11, 7\)"):
            array_to_itk(np.zeros(SHAPE[::-1], np.float32), grid)

    @pytest.mark.parametrize("column", [0, 1, 2])
    def test_singular_affine_is_refused(self, column: int) -> None:
        affine = np.eye(4)
        affine[:3, column] = affine[:3, column - 1]
        with pytest.raises(ValueError, match="singular"):
            Grid(SHAPE, affine)

    def test_affine_of_another_size_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"4 x 4.*\(3, 3\)"):
            Grid(SHAPE, np.eye(3))

    def test_swap_turns_x_and_y(self, oblique_affine: np.ndarray) -> None:
        ras = swap_lps_ras(oblique_affine)
        np.testing.assert_array_equal(ras[:2], -oblique_affine[:2])
        np.testing.assert_array_equal(ras[2:], oblique_affine[2:])
        np.testing.assert_array_equal(swap_lps_ras(ras), oblique_affine)


class TestDisplacement:
    def test_against_simpleitk(self, grid: Grid) -> None:
        ddf = random_ddf()
        image = to_sitk(ddf_to_displacement(ddf, grid).astype(np.float64), grid)
        transform = sitk.DisplacementFieldTransform(image)
        for voxel in [(0, 0, 0), (8, 10, 6), (2, 7, 3), (5, 1, 4)]:
            (start,) = grid.to_physical(np.array([voxel]))
            (end,) = grid.to_physical(np.array([voxel]) + ddf[(slice(None), *voxel)].numpy())
            np.testing.assert_allclose(transform.TransformPoint(start.tolist()), end, atol=2e-5)

    def test_against_monai(self, grid: Grid) -> None:
        ddf = random_ddf(seed=1)
        itk_order = np.ascontiguousarray(ddf.numpy()[::-1].transpose(0, 3, 2, 1))  # (3, k, j, i), channel 0 along k
        image = array_to_itk(np.zeros(SHAPE, np.float32), grid)
        expected = itk.array_from_image(monai_to_itk_ddf(image, itk_order.copy()))
        np.testing.assert_allclose(ddf_to_displacement(ddf, grid).swapaxes(0, 2), expected, atol=2e-6)

    def test_and_back(self, grid: Grid) -> None:
        ddf = random_ddf(seed=2)
        torch.testing.assert_close(displacement_to_ddf(ddf_to_displacement(ddf, grid), grid), ddf, atol=1e-5, rtol=0)


class TestResampleToGrid:
    @pytest.mark.parametrize("target_kind", KINDS)
    @pytest.mark.parametrize("mode", ["bilinear", "nearest"])
    def test_against_simpleitk(self, grid: Grid, target_kind: str, mode: str, oblique_affine: np.ndarray) -> None:
        generator = np.random.default_rng(0)
        target = Grid((8, 6, 10), affine_of(target_kind, oblique_affine))
        target.affine[:3, :3] *= 0.6
        # so that the centres coincide up to a part of a voxel
        target.affine[:3, 3] += (
            grid.to_physical((np.array([grid.shape]) - 1) / 2) - target.to_physical((np.array([target.shape]) - 1) / 2)
        )[0] + 0.123
        centre = grid.to_physical((np.array([grid.shape]) - 1) / 2)[0]
        matrix = np.eye(4)
        matrix[:3, :3] += generator.normal(size=(3, 3)) / 20
        matrix[:3, 3] = centre - matrix[:3, :3] @ centre + [0.4, -0.3, 0.6]
        volume = generator.random(SHAPE).astype(np.float32) + 1
        transform = sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist())
        interpolator = sitk.sitkLinear if mode == "bilinear" else sitk.sitkNearestNeighbor
        reference = to_sitk(np.zeros(target.shape, np.float32), target)
        expected = sitk.Resample(to_sitk(volume, grid), reference, transform, interpolator, 0.0)
        expected = sitk.GetArrayFromImage(expected).swapaxes(0, 2)

        result = resample_to_grid(torch.from_numpy(volume)[None], grid, target, target_to_source=matrix, mode=mode)
        # where the sample is inside the source: ITK ends half a voxel beyond the last centre, grid_sample fades to 0
        points = target.to_physical(np.indices(target.shape).reshape(3, -1).T) @ matrix[:3, :3].T + matrix[:3, 3]
        voxels = grid.to_voxels(points)
        inside = ((voxels > 0.01) & (voxels < np.array(SHAPE) - 1.01)).all(1).reshape(target.shape)
        assert inside.sum() > 100
        differs = np.abs(result[0].numpy() - expected)[inside] > 2e-4
        assert differs.mean() < (0.01 if mode == "nearest" else 1e-9)  # a nearest neighbour may be a tie
        assert np.ptp(expected[inside]) > 0.5

    def test_padding(self) -> None:
        source, far = Grid((4, 4, 4), np.eye(4)), np.eye(4)
        far[:3, 3] = [50, 0, 0]
        volume = torch.arange(64.0).view(1, 4, 4, 4) + 1
        beyond = Grid((4, 4, 4), far)
        assert not resample_to_grid(volume, source, beyond).any()
        assert torch.equal(
            resample_to_grid(volume, source, beyond, padding_mode="border"), volume[:, -1:].expand(1, 4, 4, 4)
        )


def test_sample_points_against_scipy() -> None:
    ddf = random_ddf(seed=3).double().float()
    points = np.random.default_rng(0).uniform([-2, -2, -2], np.array(SHAPE) + 1, (60, 3))  # some beyond the border
    expected = np.stack([map_coordinates(c, points.T, order=1, mode="nearest") for c in ddf.double().numpy()], -1)
    np.testing.assert_allclose(sample_points(ddf, torch.from_numpy(points)).numpy(), expected, atol=1e-5)


def test_sample_points_gradient_reaches_the_eight_corners() -> None:
    ddf = random_ddf(seed=4).requires_grad_()
    sample_points(ddf, torch.tensor([[2.25, 3.5, 4.75]]))[0, 1].backward()
    assert ddf.grad is not None
    assert torch.equal(ddf.grad[0], torch.zeros(SHAPE))
    touched = ddf.grad[1].nonzero().tolist()
    assert sorted(touched) == [[i, j, k] for i in (2, 3) for j in (3, 4) for k in (4, 5)]
    torch.testing.assert_close(ddf.grad[1, 3, 4, 5], torch.tensor(0.25 * 0.5 * 0.75))
