"""A pair of different grids onto the network's grid; SimpleITK is the reference for the resampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, ConcatItemsd, ResampleToMatchd

from common.errors import InputError
from common.geometry.spaces import Grid, swap_lps_ras
from common.transforms import ResampleToNetworkGridd, network_grid

FLIP = np.diag([1.0, 1.0, -1.0, 1.0])  # a left-handed matrix from a right-handed one


@pytest.fixture(params=["axis-aligned", "oblique", "left-handed", "permuted"])
def affine(request: pytest.FixtureRequest, oblique_affine: np.ndarray) -> np.ndarray:
    """(4, 4) voxel -> LPS mm, anisotropic."""
    return {
        "axis-aligned": np.array([[-1.0, 0, 0, 30], [0, -1.5, 0, -4], [0, 0, 2, 7], [0, 0, 0, 1]]),
        "oblique": oblique_affine,
        "left-handed": oblique_affine @ FLIP,
        "permuted": oblique_affine[:, [2, 0, 1, 3]],
    }[request.param]


def scan(affine: np.ndarray, shape: tuple[int, int, int], seed: int = 0, **meta: Any) -> MetaTensor:
    values = np.random.default_rng(seed).random((1, *shape), dtype=np.float32)
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(swap_lps_ras(affine)), meta=meta)


def label(affine: np.ndarray, shape: tuple[int, int, int]) -> MetaTensor:
    values = np.random.default_rng(9).integers(0, 4, (1, *shape)).astype(np.uint8)
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(swap_lps_ras(affine)))


def to_sitk(array: np.ndarray, grid: Grid) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(grid.spacing.tolist())
    image.SetOrigin(grid.origin.tolist())
    image.SetDirection(grid.direction.ravel().tolist())
    return image


def shifted(affine: np.ndarray, *mm: float) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 3] += mm
    return moved


def centre(grid: Grid) -> np.ndarray:
    return grid.to_physical((np.array([grid.shape]) - 1) / 2)[0]


@pytest.mark.parametrize("centre_align", [True, False])
def test_resampling_agrees_with_simpleitk(affine: np.ndarray, oblique_affine: np.ndarray, centre_align: bool) -> None:
    moving_affine = shifted(oblique_affine @ np.diag([1.4, 1.9, 0.7, 1]), 2.0, -3.0, 1.0)
    if not centre_align:  # near the fixed scan, so that they overlap
        moving_affine[:3, 3] = affine[:3, 3] + affine[:3, :3] @ [2, 3, 1]
    data = {
        "fixed": scan(affine, (17, 14, 12)),
        "moving": scan(moving_affine, (15, 16, 13), seed=1),
        "moving_label": label(moving_affine, (15, 16, 13)),
    }
    spacing = (1.1, 1.3, 1.7)
    result = ResampleToNetworkGridd(shape=(16, 32, 16), spacing=spacing, centre_align=centre_align)(data)
    target = Grid((16, 32, 16), swap_lps_ras(result["fixed"].affine.numpy()))
    np.testing.assert_allclose(target.spacing, spacing)

    compared = 0
    for key, role, interpolator in (
        ("fixed", "fixed", SimpleITK.sitkLinear),
        ("moving", "moving", SimpleITK.sitkLinear),
        ("moving_label", "moving", SimpleITK.sitkNearestNeighbor),
    ):
        source = Grid(tuple(data[role].shape[1:]), swap_lps_ras(data[role].affine.numpy()))
        shift = np.zeros(3)
        if role == "moving" and centre_align:
            shift = centre(source) - centre(Grid((17, 14, 12), affine))
        expected = SimpleITK.Resample(
            to_sitk(data[key][0].numpy(), source),
            to_sitk(np.zeros(target.shape, np.float32), target),
            SimpleITK.TranslationTransform(3, shift.tolist()),
            interpolator,
            0.0,
        )
        expected_array = SimpleITK.GetArrayFromImage(expected).transpose(2, 1, 0)
        indices = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), -1).reshape(-1, 3)
        at = source.to_voxels(target.to_physical(indices) + shift)
        inside = ((at > 0) & (at < np.array(source.shape) - 1)).all(1).reshape(target.shape)
        if "label" in key:  # a tie between two voxels may go either way
            inside &= (np.abs(at % 1 - 0.5) > 1e-3).all(1).reshape(target.shape)
            assert result[key].dtype == torch.uint8
        compared += inside.sum()
        np.testing.assert_allclose(result[key][0].numpy()[inside], expected_array[inside], atol=2e-4)
        outside = ((at < -1) | (at > np.array(source.shape))).any(1).reshape(target.shape)
        assert not result[key][0].numpy()[outside].any()
    assert compared > 1000


def test_key_points_follow_their_voxels(affine: np.ndarray) -> None:
    """A bright voxel in each scan is found again at its key point."""
    fixed, moving = scan(affine, (16, 16, 16)) * 0, scan(shifted(affine @ FLIP, 5, 6, 7), (18, 17, 16)) * 0
    fixed_point, moving_point = (5, 9, 7), (8, 6, 10)
    fixed[(0, *fixed_point)] = moving[(0, *moving_point)] = 1
    data = {
        "fixed": fixed,
        "moving": moving,
        "fixed_keypoints": torch.tensor([fixed_point, (0, 0, 0)]).float(),
        "moving_keypoints": np.array([moving_point, (1.5, 2.5, 3.5)]),
    }
    result = ResampleToNetworkGridd(spacing=np.linalg.norm(affine[:3, :3], axis=0) / 2, multiple=1)(data)
    for role in ("fixed", "moving"):
        image, point = result[role][0].as_tensor(), result[f"{role}_keypoints"][0]
        weights = image / image.sum()
        mass = torch.stack(
            [(weights.sum(tuple({0, 1, 2} - {axis})) * torch.arange(image.shape[axis])).sum() for axis in range(3)]
        )
        torch.testing.assert_close(mass, point, atol=0.02, rtol=0)
        assert result[f"{role}_keypoints"].dtype == torch.float32
        assert result[f"{role}_keypoints"].shape == (2, 3)


def test_centre_align_cancels_a_shift_of_the_crop(affine: np.ndarray) -> None:
    fixed = scan(affine, (16, 16, 16))
    moving = MetaTensor(fixed.as_tensor(), affine=torch.from_numpy(swap_lps_ras(shifted(affine, 40, -70, 9))))
    data = {"fixed": fixed, "moving": moving}
    aligned = ResampleToNetworkGridd()(data)
    torch.testing.assert_close(aligned["moving"].as_tensor(), fixed.as_tensor(), atol=2e-4, rtol=0)
    torch.testing.assert_close(aligned["fixed"].as_tensor(), fixed.as_tensor(), atol=2e-4, rtol=0)
    assert float(ResampleToNetworkGridd(centre_align=False)(data)["moving"].max()) < 0.5 * float(moving.max())


def test_grid_has_the_scans_axes_and_centre(affine: np.ndarray) -> None:
    fixed = Grid((17, 30, 16), affine)
    covering = network_grid(fixed)
    assert covering.shape == (32, 32, 16)
    np.testing.assert_allclose(covering.affine[:3, :3], affine[:3, :3])
    fine = network_grid(fixed, spacing=0.5, multiple=8)
    assert all(n % 8 == 0 for n in fine.shape)
    assert (np.array(fine.shape) * 0.5 >= np.array(fixed.shape) * fixed.spacing - 1e-6).all()
    cropped = network_grid(fixed, shape=(16, 32, 48), spacing=(1, 2, 3))
    assert cropped.shape == (16, 32, 48)
    for grid in (covering, fine, cropped):
        np.testing.assert_allclose(centre(grid), centre(fixed))
        np.testing.assert_allclose(grid.direction, fixed.direction)


def test_both_scans_are_on_one_grid_for_monai(affine: np.ndarray, oblique_affine: np.ndarray) -> None:
    """Same result as MONAI's ResampleToMatchd, and the channel order of the network contract."""
    moving_affine = affine @ np.diag([1.5, 0.8, 1.2, 1])
    data = {
        "fixed": scan(affine, (16, 16, 16), filename_or_obj="f.nii"),
        "moving": scan(moving_affine, (14, 18, 15), 1),
    }
    ours = Compose(
        [
            ResampleToNetworkGridd(centre_align=False),
            ConcatItemsd(keys=["moving", "fixed"], name="image"),
        ]
    )(data)
    monai = ResampleToMatchd(keys="moving", key_dst="fixed", padding_mode="zeros", align_corners=True)(data)
    torch.testing.assert_close(ours["moving"].as_tensor(), monai["moving"].as_tensor().float(), atol=2e-4, rtol=0)
    assert torch.equal(ours["image"][0], ours["moving"][0])
    assert torch.equal(ours["image"][1], ours["fixed"][0])
    torch.testing.assert_close(ours["image"].affine, data["fixed"].affine)
    assert ours["fixed"].meta["filename_or_obj"] == "f.nii"


def test_refusals(oblique_affine: np.ndarray) -> None:
    fixed = scan(oblique_affine, (16, 16, 16))
    transform = ResampleToNetworkGridd()
    for data, message in (
        ({"fixed": fixed}, "there is no 'moving'"),
        ({"fixed": fixed, "moving": fixed.as_tensor()}, "'moving' has no place in space"),
        ({"fixed": fixed, "moving": fixed[0]}, r"'moving' must be 3D .* \(16, 16, 16\)"),
        ({"fixed": fixed, "moving": fixed, "fixed_label": torch.zeros(1, 3, 3, 3)}, "another shape than its image"),
    ):
        with pytest.raises(InputError, match=message):
            transform(data)
    plain = transform({"fixed": fixed, "moving": fixed, "moving_mask": torch.ones(1, 16, 16, 16)})
    assert plain["moving_mask"].min() == 1  # a tensor without a place takes its image's
    for options, message in (
        ({"shape": (16, 16, 20)}, "multiples of 16"),
        ({"shape": (16, 16)}, "three multiples"),
        ({"spacing": (1, 0, 1)}, "positive"),
        ({"keys": ("fixed", "moving", "label")}, "not 'label'"),
    ):
        with pytest.raises(ValueError, match=message):
            ResampleToNetworkGridd(**options)  # type: ignore[arg-type]
