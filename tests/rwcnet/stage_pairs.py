"""Pairs with an exactly known field, and what a stage in training sees of them."""

from __future__ import annotations

from typing import Any

import torch
from rwcnet_net import RWCNet
from rwcnet_net.network import StagePatch
from rwcnet_net.training import StageBatch
from small_rwcnet import noise, positions, smooth_noise
from torch import Tensor

from common.layers.warp import warp

SHAPE = (32, 40, 32)
SPACING = (1.5, 0.8, 2.0)
LABELS = [3, 7]
Pair = dict[str, Tensor]


def linear_part(points: Tensor) -> Tensor:
    """A slight shear and turn, and a shift."""
    matrix = torch.tensor([[0.03, -0.05, 0.0], [0.06, 0.02, 0.03], [-0.02, 0.04, -0.03]])
    return torch.einsum("xc,bcijk->bxijk", matrix, points - 16) + torch.tensor([1.5, -2.0, 1.0]).view(1, 3, 1, 1, 1)


def smooth_field() -> Tensor:
    return linear_part(positions(SHAPE)) + 2 * (smooth_noise(3, SHAPE, 12, 5) - 0.5)


def shift_field() -> Tensor:
    """Whole voxels at every stage, so that sampling, averaging and picking lose nothing."""
    return torch.tensor([4.0, -4.0, 8.0]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE).contiguous()


def pair_of(field: Tensor) -> Pair:
    """The fixed image is the moving one through the field; two labels; key points, the last of them unknown."""
    moving = smooth_noise(1, SHAPE, 8, 0)
    texture = smooth_noise(1, SHAPE, 8, 1)
    label = torch.where(texture > 0.65, 3, torch.where(texture < 0.4, 7, 0))
    fixed_points = (torch.tensor(SHAPE) - 1.0) * noise(1, 40, 3, seed=3)
    grid = (2 * fixed_points / (torch.tensor(SHAPE) - 1) - 1).flip(-1).view(1, 40, 1, 1, 3)
    at_points = torch.nn.functional.grid_sample(field, grid, align_corners=True)[0, :, :, 0, 0].T
    moving_points = fixed_points + at_points
    fixed_points[:, -1] = float("nan")
    return {
        "image": torch.cat([moving, warp(moving, field, padding_mode="zeros")], 1),
        "ddf": field,
        "mask": torch.ones(1, 1, *SHAPE),
        "moving_label": label,
        "fixed_label": warp(label.float(), field, mode="nearest", padding_mode="zeros").long(),
        "fixed_keypoints": fixed_points,
        "moving_keypoints": moving_points,
    }


def prepared(network: RWCNet, pair: Pair, seed: int, **options: Any) -> tuple[StagePatch, dict[str, Any]]:
    torch.manual_seed(seed)
    return StageBatch(network, labels=LABELS, spacing=SPACING, **options)(dict(pair), "cpu")
