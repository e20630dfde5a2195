"""Target registration error of corresponding points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from common.geometry.spaces import sample_points
from common.metrics._arrays import ArrayLike, to_field, to_points

__all__ = ["tre_mm"]


def tre_mm(
    fixed_points: ArrayLike,
    moving_points: ArrayLike,
    ddf: ArrayLike,
    spacing: Sequence[float] | ArrayLike,
    snapped: bool = False,
    *,
    order: int = 1,
) -> list[float]:
    """Distance in mm of each mapped fixed point to its moving partner, `|| (x_F + u(x_F) - x_M) * spacing ||`.

    Args:
        fixed_points: (N, 3) voxel coordinates on the field's grid.
        moving_points: (N, 3) voxel coordinates on the moving image's grid.
        ddf: (3, D, H, W) or (1, 3, D, H, W), voxels.
        spacing: (3,) mm between the moving image's voxels along the tensor axes.
        snapped: round the mapped point to the nearest voxel before measuring, as parts of the DIR-Lab literature do
            (tenths of a mm different). The unsnapped figure is the primary one.
        order: 1 for trilinear interpolation of the field, the border repeated outside; 3 for Learn2Reg's cubic spline
            (`scipy.ndimage.map_coordinates`, 0 outside).

    Returns:
        N distances, mm.

    Raises:
        ValueError: when the shapes do not fit, or for another order.
    """
    fixed, moving = to_points(fixed_points), to_points(moving_points)
    if fixed.shape != moving.shape:
        raise ValueError(f"{len(fixed)} fixed points do not correspond to {len(moving)} moving points")
    scale = np.asarray(spacing, dtype=np.float64)
    if scale.shape != (3,):
        raise ValueError(f"the spacing must be three numbers in mm, got shape {scale.shape}")
    field = to_field(ddf)[0]
    if order == 1:
        u = sample_points(field, torch.from_numpy(fixed)).cpu().numpy().astype(np.float64)
    elif order == 3:
        u = np.stack([ndimage.map_coordinates(c, fixed.T, order=3) for c in field.cpu().double().numpy()], axis=1)
    else:
        raise ValueError(f"the order of interpolation must be 1 or 3, got {order}")
    mapped = fixed + u
    if snapped:
        mapped = np.rint(mapped)
    return [float(e) for e in np.linalg.norm((mapped - moving) * scale, axis=1)]
