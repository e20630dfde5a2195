"""Labels warped one by one: the argmax over warped one-hot channels is the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.layers.warp import warp
from common.metrics import dice_per_label, dice_per_structure, warp_labels
from common.metrics import structures as module

SHAPES = [(9, 11, 14), (16, 8, 9)]


def blobs(shape: tuple[int, ...], labels: int = 6, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((1, labels, 4, 4, 4), generator=generator)
    return torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0].argmax(0).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slab", [100, 10**9])
def test_equals_the_argmax_of_one_hot_channels(
    shape: tuple[int, int, int], slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLAB", slab)
    labels = blobs(shape)
    ddf = 3 * torch.randn((1, 3, *shape), generator=torch.Generator().manual_seed(1))  # leaves the volume, too
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels)).permute(3, 0, 1, 2)[None].double()
    channels = warp(one_hot, ddf.double(), padding_mode="zeros")[0]
    top = channels.topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-4).numpy()  # rounding decides the others
    expected = channels.argmax(0).numpy()
    warped = warp_labels(labels, ddf)
    assert clear.mean() > 0.5 and len(np.unique(warped)) == 6
    far_outside = (channels.sum(0) < 1e-6).numpy()
    assert far_outside.any() and not warped[far_outside].any()
    np.testing.assert_array_equal(warped[clear], expected[clear])


def test_whole_shifts_and_ties() -> None:
    labels = blobs(SHAPES[0])
    nothing = np.zeros((3, *SHAPES[0]), np.float32)
    np.testing.assert_array_equal(warp_labels(labels, nothing), labels)
    shift = nothing + np.array([2.0, -1.0, 3.0], np.float32).reshape(3, 1, 1, 1)
    np.testing.assert_array_equal(warp_labels(labels, shift)[:-2, 1:, :-3], labels[2:, :-1, 3:])
    two = np.full((4, 4, 4), 7)
    two[2:] = 3
    half = np.zeros((3, 4, 4, 4), np.float32)
    half[0] = 0.5
    assert warp_labels(two, half)[:, 0, 0].tolist() == [7, 3, 3, 3]  # half 7 and half 3; half 3 and half outside
    assert warp_labels(two, np.zeros((3, 2, 3, 5), np.float32)).shape == (2, 3, 5)


def test_means_of_left_and_right() -> None:
    fixed, warped = blobs(SHAPES[0]), blobs(SHAPES[0], seed=1)
    structures = {"pair": (1, 2), "single": (3,), "half": (4, 9), "none": (8, 9)}
    dice = dice_per_label(fixed, warped, range(1, 5))
    found = dice_per_structure(fixed, warped, structures)
    assert found["pair"] == pytest.approx((dice[1] + dice[2]) / 2)
    assert found["single"] == pytest.approx(dice[3])
    assert found["half"] == pytest.approx(dice[4])  # 9 is nowhere
    assert math.isnan(found["none"])
    moving = np.where(warped == 3, 0, warped)
    assert math.isnan(dice_per_structure(fixed, warped, structures, moving=moving)["single"])
