"""What the losses and the similarity metrics share: shape checks, box windows and masked means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError

__all__ = ["box_mean", "centre_crop", "check_field", "check_images", "masked_mean"]


def check_images(fixed: Tensor, warped: Tensor, mask: Tensor | None = None, *, window: int = 1) -> None:
    """Refuse images (B, C, D, H, W) of different shapes, masks that do not fit, and volumes smaller than the window.

    Raises:
        ValueError: naming the offending shapes.
        InputError: when the window is larger than the volume.
    """
    if fixed.ndim != 5 or fixed.shape != warped.shape:
        raise ValueError(
            f"the images must both be (B, C, D, H, W) of one shape, got {tuple(fixed.shape)} and {tuple(warped.shape)}"
        )
    if mask is not None and tuple(mask.shape) != (fixed.shape[0], 1, *fixed.shape[2:]):
        raise ValueError(
            f"the mask must be (B, 1, D, H, W) and fit the images {tuple(fixed.shape)}, got {tuple(mask.shape)}"
        )
    if min(fixed.shape[2:]) < window:
        raise InputError(f"a window of {window} voxels does not fit into a volume of {tuple(fixed.shape[2:])}")


def check_field(ddf: Tensor) -> None:
    """Refuse anything but a displacement field (B, 3, D, H, W).

    Raises:
        ValueError: naming the shape.
    """
    if ddf.ndim != 5 or ddf.shape[1] != 3:
        raise ValueError(f"a displacement field must be (B, 3, D, H, W), got {tuple(ddf.shape)}")


def box_mean(volume: Tensor, window: int) -> Tensor:
    """Mean over cubic windows that lie wholly inside the volume.

    Three 1-D passes, equal to one window^3 filter up to rounding and far cheaper. Average pooling rather than
    convolution: a GPU convolution may round its input to TF32 (10 bits), which ruins E[x^2] - E[x]^2.

    Args:
        volume: (B, C, D, H, W) float32.
        window: edge length in voxels.

    Returns:
        (B, C, D - window + 1, H - window + 1, W - window + 1).
    """
    for kernel in ((window, 1, 1), (1, window, 1), (1, 1, window)):
        volume = F.avg_pool3d(volume, kernel, stride=1)
    return volume


def centre_crop(volume: Tensor, window: int) -> Tensor:
    """Values at the centres of the windows of `box_mean` (odd window)."""
    r = window // 2
    _, _, d, h, w = volume.shape
    return volume[:, :, r : d - r, r : h - r, r : w - r]


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all channels and voxels, weighted by the mask; 0 (and a zero gradient) for an empty mask.

    Args:
        values: (B, C, D, H, W).
        mask: (B, 1, D, H, W), booleans or weights, or None.
    """
    if mask is None:
        return values.mean()
    weight = mask.to(values)
    # `where` first: a value outside the mask may be anything, and NaN * 0 is NaN
    inside = torch.where(weight > 0, values, torch.zeros_like(values)) * weight
    return inside.sum() / (weight.sum() * values.shape[1]).clamp_min(1e-6)
