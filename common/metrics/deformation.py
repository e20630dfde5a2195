"""Quality of a displacement field on its own: folding, SDlogJ, Jacobian statistics, inverse consistency.

Fields are (3, D, H, W) or (1, 3, D, H, W) in voxels, pull-back, identity not included; masks are (D, H, W) on the same
grid. Every function raises ValueError for other shapes and for fields with values that are not finite.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from common.geometry.fields import compose, jacobian_determinant
from common.metrics._arrays import ArrayLike, to_field, to_mask

__all__ = ["folding_percent", "inverse_consistency_error", "jacobian_statistics", "sdlogj"]


def _determinants(ddf: ArrayLike, mask: ArrayLike | None, crop: int) -> np.ndarray:
    """Determinants `crop` >= 1 voxels away from the border, those inside the mask when there is one; float64."""
    field = to_field(ddf)
    shape = tuple(field.shape[2:])
    if min(shape) <= 2 * crop:
        raise ValueError(f"a field of {shape} voxels has none left {crop} voxels away from its border")
    determinant = jacobian_determinant(field)[0, 0].cpu().numpy().astype(np.float64)
    inner = (slice(crop - 1, -(crop - 1) or None),) * 3
    inside = to_mask(mask, shape)
    if inside is None:
        return determinant[inner].ravel()
    return determinant[inner][inside[(slice(crop, -crop),) * 3]]


def folding_percent(ddf: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Share of voxels where the field folds, det J <= 0, in per cent.

    Central differences at the interior voxels (all but the outermost layer), where they are defined. TransMorph and
    VoxelMorph count all voxels, with one-sided differences at the border; Learn2Reg's `num_foldings` counts after
    adding 3 and is always 0.

    Args:
        ddf: field, voxels.
        mask: count inside only.

    Returns:
        [0, 100]; NaN for an empty mask.
    """
    determinant = _determinants(ddf, mask, crop=1)
    return float(100.0 * np.mean(determinant <= 0)) if determinant.size else math.nan


def sdlogj(ddf: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Standard deviation of the log Jacobian determinant, as Learn2Reg computes it.

    `std(log(clip(det + 3, 1e-9, 1e9)))` two voxels and more away from the border, population standard deviation. The
    +3 is Learn2Reg's, so the figure is not the spread of log det J; it is kept because all published numbers have it.
    (Learn2Reg pads with zeros and crops by 2, which leaves no voxel that saw the padding.)

    Args:
        ddf: field, voxels, at least 5 voxels along each axis.
        mask: restrict to this region (Learn2Reg: NLST and LungCT).

    Returns:
        >= 0, dimensionless; NaN for an empty mask.
    """
    determinant = _determinants(ddf, mask, crop=2)
    return float(np.std(np.log(np.clip(determinant + 3.0, 1e-9, 1e9)))) if determinant.size else math.nan


def jacobian_statistics(ddf: ArrayLike, mask: ArrayLike | None = None) -> dict[str, float]:
    """Distribution of det J over the interior voxels (1: volume kept, < 1: shrinks towards the moving image).

    Args:
        ddf: field, voxels.
        mask: restrict to this region.

    Returns:
        `min`, `p01`, `median`, `p99`, `max`, `mean`, `std` of det J and `folding_percent`; NaN for an empty mask.
    """
    determinant = _determinants(ddf, mask, crop=1)
    names = ("min", "p01", "median", "p99", "max")
    if determinant.size == 0:
        return dict.fromkeys((*names, "mean", "std", "folding_percent"), math.nan)
    quantiles = np.percentile(determinant, (0, 1, 50, 99, 100))
    return {
        **{name: float(q) for name, q in zip(names, quantiles, strict=True)},
        "mean": float(determinant.mean()),
        "std": float(determinant.std()),
        "folding_percent": float(100.0 * np.mean(determinant <= 0)),
    }


def inverse_consistency_error(forward: ArrayLike, backward: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Mean distance in voxels between p and where `forward`, then `backward`, takes it.

    `mean |forward(p) + backward(p + forward(p))|` over the voxels p that `forward` keeps inside the grid; beyond it
    the other field is unknown.

    Args:
        forward: fixed to moving, voxels.
        backward: moving to fixed, voxels of the same grid.
        mask: (D, H, W), average inside only.

    Returns:
        >= 0, voxels; NaN when no voxel is left.
    """
    f, b = to_field(forward), to_field(backward)
    if f.shape != b.shape:
        raise ValueError(f"the fields have different shapes, {tuple(f.shape)} and {tuple(b.shape)}")
    inside = np.ones(tuple(f.shape[2:]), dtype=bool)
    for axis in range(3):
        n = f.shape[2 + axis]
        position = torch.arange(n, device=f.device).view([-1 if a == axis else 1 for a in range(3)]) + f[0, axis]
        inside &= ((position >= 0) & (position <= n - 1)).cpu().numpy()
    region = to_mask(mask, inside.shape)
    if region is not None:
        inside &= region
    distance = compose(b, f.to(b)).norm(dim=1)[0].cpu().numpy().astype(np.float64)[inside]
    return float(distance.mean()) if distance.size else math.nan
