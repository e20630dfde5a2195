"""Sampling an image where a displacement field points (the spatial transformer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import float32_region

__all__ = ["sample_at", "warp"]

# Below this many output voxels a second thread costs more than it brings.
_MIN_VOXELS_PER_SLAB = 32_768


def warp(image: Tensor, ddf: Tensor, *, mode: str = "bilinear", padding_mode: str = "border") -> Tensor:
    """Resample `image` at `p + ddf(p)` for every voxel p of the field's grid (pull-back).

    Computed in float32, also under autocast: at half precision a coordinate near 192 is off by a voxel and more.
    `F.grid_sample` uses one core for a batch of one, so the output is cut into slabs along the first spatial axis and
    the slabs are put on the batch axis.

    MONAI's `Warp` has the same convention; it is not used because it samples in the field's precision and rebuilds its
    grid on the CPU at each call (https://github.com/Project-MONAI/MONAI/pull/9082).

    Args:
        image: (B, C, D, H, W).
        ddf: (B, 3, D', H', W') displacement in voxels of `image`'s grid, channel i along tensor axis i.
            D', H', W' may differ from the image's size when the two grids share their first voxel and spacing.
        mode: "bilinear" (that is, trilinear) or "nearest".
        padding_mode: "border", "zeros" or "reflection", for points outside the image.

    Returns:
        (B, C, D', H', W') in `image`'s dtype.

    Raises:
        ValueError: when the shapes do not fit together.
    """
    if image.ndim != 5 or ddf.ndim != 5 or ddf.shape[1] != 3 or image.shape[0] != ddf.shape[0]:
        raise ValueError(
            f"warp needs an image (B, C, D, H, W) and a ddf (B, 3, D, H, W) of one batch size, "
            f"got {tuple(image.shape)} and {tuple(ddf.shape)}"
        )
    with float32_region(image):
        grid = _sampling_grid(ddf.float(), image.shape[2:])  # (B, D', H', W', 3)
        warped = _sample(image.float(), grid, mode, padding_mode)
    return warped.to(image.dtype)


def sample_at(image: Tensor, points: Tensor) -> Tensor:
    """Trilinear values of an image at points; beyond the border, the border's value.

    Args:
        image: (1, C, D, H, W).
        points: (N, 3) voxel coordinates along the tensor axes.

    Returns:
        (N, C) float32, differentiable with respect to both.
    """
    size = points.new_tensor([max(n - 1, 1) for n in image.shape[2:]])
    grid = (2 * points / size - 1).flip(-1).view(1, -1, 1, 1, 3)
    with float32_region(image):
        values = F.grid_sample(image.float(), grid.float(), padding_mode="border", align_corners=True)
    return values[0, :, :, 0, 0].T


def _sampling_grid(ddf: Tensor, image_shape: torch.Size) -> Tensor:
    """Absolute positions in `grid_sample`'s normalised coordinates: axes reversed, p -> 2p/(N-1) - 1."""
    parts = []
    for axis in (2, 1, 0):
        size = ddf.shape[2 + axis]
        view = [1, 1, 1, 1]
        view[1 + axis] = size
        position = torch.arange(size, dtype=ddf.dtype, device=ddf.device).view(view)
        # An axis of length 1 has the single position 0, wherever normalised; do not divide by 0 there.
        scale = 2.0 / max(image_shape[axis] - 1, 1)
        parts.append((ddf[:, axis] + position).mul_(scale).sub_(1.0))
    return torch.stack(parts, dim=-1)


def _sample(image: Tensor, grid: Tensor, mode: str, padding_mode: str) -> Tensor:
    slabs = _slab_count(image, grid)
    if slabs == 1:
        return F.grid_sample(image, grid, mode=mode, padding_mode=padding_mode, align_corners=True)
    _, depth, height, width, _ = grid.shape
    per_slab = -(-depth // slabs)
    # The last slab is filled up with the volume's centre, sampled for nothing and dropped.
    filled = F.pad(grid[0], (0, 0, 0, 0, 0, 0, 0, per_slab * slabs - depth))
    grid = filled.view(slabs, per_slab, height, width, 3)
    warped = F.grid_sample(
        image.expand(slabs, -1, -1, -1, -1), grid, mode=mode, padding_mode=padding_mode, align_corners=True
    )  # (slabs, C, per_slab, H', W')
    channels = image.shape[1]
    return warped.transpose(0, 1).reshape(1, channels, slabs * per_slab, height, width)[:, :, :depth]


def _slab_count(image: Tensor, grid: Tensor) -> int:
    batch, depth, height, width, _ = grid.shape
    if image.device.type != "cpu" or batch > 1:
        return 1
    slabs = min(torch.get_num_threads(), depth, depth * height * width // _MIN_VOXELS_PER_SLAB)
    if image.requires_grad:
        slabs = min(slabs, 4)  # each slab holds an image-sized gradient of its own
    return max(1, slabs)
