"""Voxels and key points of a pair stay together through a crop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from common.errors import InputError
from common.geometry.spaces import swap_lps_ras
from common.transforms import CropOrPadPaird, ResampleToNetworkGridd

SHAPE = (13, 10, 9)


@pytest.fixture
def pair(oblique_affine: np.ndarray) -> dict[str, Any]:
    """Every voxel has a number of its own, and some voxels of the middle are key points."""
    affine = torch.from_numpy(swap_lps_ras(oblique_affine))
    volume = 5 + torch.arange(float(np.prod(SHAPE))).reshape(1, *SHAPE)
    points = torch.from_numpy(np.random.default_rng(0).integers((5, 4, 3), (9, 7, 6), (20, 3))).float()
    data = {f"{role}_keypoints": points for role in ("fixed", "moving")}
    for key in ("fixed", "moving", "fixed_label", "moving_mask"):
        data[key] = MetaTensor(volume.clone(), affine=affine.clone())
    return data


def at(volume: Tensor, points: Tensor) -> Tensor:
    return volume.as_tensor()[0][tuple(points.long().T)]


@pytest.mark.parametrize("shape", [(7, 12, 9), (8, 6, 16), (20, 21, None), (None, 5, None), (13, 10, 9), None])
@pytest.mark.parametrize("multiple", [1, 8])
def test_points_stay_on_their_voxels(pair: dict[str, Any], shape: Any, multiple: int) -> None:
    result = CropOrPadPaird(shape=shape, multiple=multiple)(pair)
    wanted = [None] * 3 if shape is None else shape
    expected = tuple(w or -(-n // multiple) * multiple for w, n in zip(wanted, SHAPE, strict=True))
    for key in ("fixed", "moving", "fixed_label", "moving_mask"):
        assert result[key].shape == (1, *expected)
        points = result[f"{key.partition('_')[0]}_keypoints"]
        assert torch.equal(at(result[key], points), at(pair[key], pair["fixed_keypoints"]))
    # and in their place in space
    both = [torch.cat([p.double(), torch.ones(20, 1)], 1) for p in (pair["fixed_keypoints"], points)]
    before, after = both[0] @ pair["fixed"].affine.T, both[1] @ result["fixed"].affine.T
    np.testing.assert_allclose(after, before, atol=1e-9)
    if any(a > b for a, b in zip(expected, SHAPE, strict=True)):
        padding = [float(result[key].min()) for key in ("fixed", "fixed_label", "moving_mask")]
        assert padding == [float(pair["fixed"].min()), 0, 0]


def test_points_outside_keep_their_rows(pair: dict[str, Any]) -> None:
    pair["fixed_keypoints"] = torch.tensor([[0.0, 0.0, 0.0], [12.0, 9.0, 8.0]])
    result = CropOrPadPaird(shape=(5, 10, 9))(pair)
    assert result["fixed_keypoints"].tolist() == [[-4.0, 0.0, 0.0], [8.0, 9.0, 8.0]]
    assert pair["fixed"].shape == (1, *SHAPE)  # what came in is as it was


def test_then_the_network_grid_interpolates_nothing(pair: dict[str, Any]) -> None:
    """Without it an odd difference of length puts the network's voxels between the scan's."""
    for key in ("fixed_label", "moving_mask"):
        del pair[key]
    grid = ResampleToNetworkGridd(multiple=8, grids_key="grids")
    blurred = grid(pair)["fixed"].as_tensor()
    cropped = CropOrPadPaird(shape=(8, 8, None), multiple=8)(pair)
    exact = grid(cropped)["fixed"].as_tensor()
    assert exact.shape == (1, 8, 8, 16)
    np.testing.assert_allclose(exact, cropped["fixed"].as_tensor(), atol=1e-2)
    assert not torch.isin(blurred.round(decimals=2), pair["fixed"].as_tensor().float()).all()


def test_refusals(pair: dict[str, Any]) -> None:
    for shape in ((8, 8), (8, 8, 0)):
        with pytest.raises(ValueError, match="a crop has three lengths in voxels"):
            CropOrPadPaird(shape=shape)
    with pytest.raises(ValueError, match="multiples of 1 or more"):
        CropOrPadPaird(multiple=0)
    with pytest.raises(InputError, match="there is no 'moving'"):
        CropOrPadPaird()({"fixed": pair["fixed"]})
    with pytest.raises(InputError, match=r"'moving' must be 3D with a channel axis, and its shape is \(13, 10, 9\)"):
        CropOrPadPaird()({**pair, "moving": pair["moving"][0]})
