"""A network's field in terms of the scans' own voxels; ITK and the transforms of training are the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from grids import CENTRE, centred_grid, rotation
from monai.data import DataLoader, MetaTensor
from scipy.ndimage import map_coordinates
from torch import Tensor

from common.errors import InputError
from common.geometry.fields import jacobian_determinant
from common.geometry.spaces import Grid, PairGrids, ddf_to_displacement, swap_lps_ras
from common.io import build_transform, transform_points
from common.transforms import ResampleToNetworkGridd

SHAPE = (14, 11, 9)
AXES = rotation(25, 2) @ rotation(-15, 0)
MIRROR = np.diag([1.0, 1.0, -1.0])


def smooth_ddf(shape: tuple[int, ...], amplitude: float = 1.5, seed: int = 0) -> Tensor:
    """(3, D, H, W)"""
    generator = torch.Generator().manual_seed(seed)
    coarse = amplitude * torch.randn((1, 3, 4, 4, 4), generator=generator)
    return torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0]


def moved(degrees: float, *mm: float) -> np.ndarray:
    """(4, 4) LPS mm: a turn about `CENTRE` and a shift."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees, 1)
    affine[:3, 3] = CENTRE - affine[:3, :3] @ CENTRE + mm
    return affine


@pytest.fixture(params=["oblique", "mirrored", "permuted"])
def grids(request: pytest.FixtureRequest) -> PairGrids:
    """Three grids of their own axes, spacings and sizes; the network's covers the fixed scan."""
    direction = {"oblique": AXES, "mirrored": AXES @ MIRROR, "permuted": AXES[:, [2, 0, 1]]}[request.param]
    return PairGrids(
        fixed=centred_grid(SHAPE, AXES, [1.2, 0.8, 2.5]),
        moving=centred_grid((10, 17, 13), direction, [1.7, 1.1, 0.9]),
        network=centred_grid((14, 16, 30), rotation(7, 0) @ AXES, [1.9, 1.3, 1.1]),
        fixed_to_moving=moved(6, 4, -3, 2),
    )


def test_every_voxel_lands_where_the_map_takes_its_place_in_space(grids: PairGrids) -> None:
    ddf = smooth_ddf(grids.network.shape)
    transform = build_transform(grids.fixed_to_moving, ddf_to_displacement(ddf, grids.network), grids.network)
    voxels = np.indices(SHAPE).reshape(3, -1).T
    inside = grids.network.to_voxels(grids.fixed.to_physical(voxels))
    assert ((inside >= 0) & (inside <= np.array(grids.network.shape) - 1)).all()
    expected = grids.moving.to_voxels(transform_points(transform, grids.fixed.to_physical(voxels)))
    displacement = grids.displacement(ddf)
    assert displacement.dtype == np.float32 and displacement.shape == (3, *SHAPE)
    np.testing.assert_allclose(voxels + displacement.reshape(3, -1).T, expected, atol=2e-4)
    assert np.abs(displacement).max() > 5  # much is done by the grids alone
    unmoved = grids.displacement(torch.zeros_like(ddf))
    assert np.abs(displacement - unmoved).max() > 0.5  # and something by the field


def test_deformation_is_the_map_without_the_grids(grids: PairGrids) -> None:
    """Its Jacobian is the field's own, also where the moving array is mirrored."""
    ddf = smooth_ddf(grids.network.shape, amplitude=0.6)
    assert float(jacobian_determinant(ddf[None]).min()) > 0.2
    displacement = grids.displacement(ddf)
    deformation = grids.deformation(displacement)
    determinant = jacobian_determinant(torch.from_numpy(deformation)[None])
    assert 0 < float(determinant.min()) < 0.9 and float(determinant.max()) > 1.1
    transform = build_transform(None, ddf_to_displacement(ddf, grids.network), grids.network)
    voxels = np.indices(SHAPE).reshape(3, -1).T
    expected = grids.fixed.to_voxels(transform_points(transform, grids.fixed.to_physical(voxels)))
    np.testing.assert_allclose(voxels + deformation.reshape(3, -1).T, expected, atol=2e-4)
    if np.linalg.det(grids.moving.direction) < 0:  # what the measured field would be without this
        assert float(jacobian_determinant(torch.from_numpy(displacement)[None]).max()) < 0


@pytest.mark.parametrize(
    "direction", [AXES, AXES @ MIRROR, AXES[:, [2, 0, 1]]], ids=["oblique", "mirrored", "permuted"]
)
@pytest.mark.parametrize("centre", [(0.0, 0.0, 0.0), (-512.3, 1203.7, 91.1)])
def test_one_grid_leaves_the_field_as_it_is(direction: np.ndarray, centre: tuple[float, ...]) -> None:
    """Bit for bit: also where the network's grid was computed from the scans', and where it is larger."""
    affine = centred_grid((16, 32, 16), direction, [1.2, 0.7, 2.5]).affine
    affine[:3, 3] += centre
    for shape, first in (((16, 32, 16), (0, 0, 0)), ((14, 30, 12), (1, 1, 2))):
        volume = MetaTensor(torch.rand(1, *shape), affine=torch.from_numpy(swap_lps_ras(affine)))
        arrays = ResampleToNetworkGridd(["fixed", "moving"], grids_key="grids")({"fixed": volume, "moving": volume})
        grids = PairGrids.from_arrays(arrays["grids"])
        assert grids.network.shape == (16, 32, 16)
        ddf = 5 * torch.randn(3, 16, 32, 16)
        displacement = grids.displacement(ddf)
        i, j, k = (slice(a, a + n) for a, n in zip(first, shape, strict=True))
        np.testing.assert_array_equal(displacement, ddf[:, i, j, k].numpy())
        np.testing.assert_array_equal(grids.deformation(displacement), displacement)


@pytest.mark.parametrize("centre_align", [True, False])
def test_agrees_with_the_grid_of_training(grids: PairGrids, centre_align: bool) -> None:
    """There both scans' key points come onto the network's grid, where `ddf` leads from one to the other."""
    scans = {
        role: MetaTensor(torch.rand(1, *grid.shape), affine=torch.from_numpy(swap_lps_ras(grid.affine)))
        for role, grid in (("fixed", grids.fixed), ("moving", grids.moving))
    }
    scans["moving"].affine[0, 3] += 3.0
    options = {"spacing": 1.3, "multiple": 8, "centre_align": centre_align}
    own = ResampleToNetworkGridd(["fixed", "moving"], grids_key="grids", **options)(scans)
    pair = PairGrids.from_arrays(own["grids"])
    ddf = smooth_ddf(pair.network.shape)
    p = np.random.default_rng(0).integers(0, SHAPE, (50, 3))
    partner = p + pair.displacement(ddf)[:, *p.T].T
    points = ResampleToNetworkGridd(**options)({**scans, "fixed_keypoints": p, "moving_keypoints": partner})
    q, r = (points[f"{role}_keypoints"].double().numpy() for role in ("fixed", "moving"))
    u = np.stack([map_coordinates(channel, q.T, order=1, mode="nearest") for channel in ddf.double().numpy()], axis=1)
    np.testing.assert_allclose(r, q + u, atol=2e-4)


def test_through_a_data_loader(grids: PairGrids) -> None:
    (batch,) = DataLoader([{"grids": grids.to_arrays()}], batch_size=1)
    again = PairGrids.from_arrays(batch["grids"])
    for name in ("fixed", "moving", "network"):
        assert getattr(again, name).shape == getattr(grids, name).shape
        np.testing.assert_array_equal(getattr(again, name).affine, getattr(grids, name).affine)
    np.testing.assert_array_equal(again.fixed_to_moving, grids.fixed_to_moving)


def test_labels_stay_where_they_are(grids: PairGrids) -> None:
    affine = torch.from_numpy(swap_lps_ras(grids.fixed.affine))
    scan = MetaTensor(torch.rand(1, *SHAPE), affine=affine)
    label = MetaTensor(torch.randint(0, 5, (1, *SHAPE)), affine=affine)
    points = torch.rand(4, 3)
    data = {"fixed": scan, "moving": scan, "fixed_label": label, "moving_mask": label, "moving_keypoints": points}
    result = ResampleToNetworkGridd(["fixed", "moving"], grids_key="grids")(data)
    assert result["fixed"].shape == (1, 16, 16, 16)
    for key in ("fixed_label", "moving_mask", "moving_keypoints"):
        assert result[key] is data[key]
    assert "grids" not in ResampleToNetworkGridd(["fixed", "moving"])(data)
    with pytest.raises(InputError, match=r"'moving_mask' has the shape \(14, 11, 8\), but its image"):
        ResampleToNetworkGridd(["fixed", "moving"], grids_key="grids")({**data, "moving_mask": label[..., 1:]})


def test_a_field_of_another_grid(grids: PairGrids) -> None:
    with pytest.raises(ValueError, match=r"\(3, 14, 11, 9\) does not fit a network grid \(14, 16, 30\)"):
        grids.displacement(torch.zeros(3, *SHAPE))


def test_beyond_a_cropped_network_grid_the_border_is_repeated() -> None:
    fixed = Grid(SHAPE, np.eye(4))
    network = Grid((8, 11, 9), np.eye(4))
    ddf = smooth_ddf(network.shape)
    displacement = PairGrids(fixed=fixed, moving=fixed, network=network, fixed_to_moving=np.eye(4)).displacement(ddf)
    np.testing.assert_array_equal(displacement[:, :8], ddf.numpy())
    np.testing.assert_array_equal(displacement[:, 8:], np.repeat(ddf.numpy()[:, 7:8], 6, axis=1))
