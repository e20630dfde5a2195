"""Supervision by corresponding points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.geometry.spaces import sample_points
from common.losses._checks import check_field
from common.precision import float32_region

__all__ = ["LandmarkLoss"]


class LandmarkLoss(nn.Module):
    """Target registration error in mm: mean of `|| (x_F + u(x_F) - x_M) * spacing ||`. Range [0, inf).

    u is interpolated trilinearly, so the eight voxels around each fixed point get a gradient. RWCNet's code averages
    the two corners floor(x) and ceil(x) instead.
    """

    def forward(
        self, fixed_points: Tensor, moving_points: Tensor, ddf: Tensor, spacing: Tensor | Sequence[float]
    ) -> Tensor:
        """
        Args:
            fixed_points: (N, 3) for a batch of one, or (B, N, 3): voxel coordinates on the field's grid.
            moving_points: the same shape: voxel coordinates on the moving image's grid. Rows with a NaN in either set
                are left out, so point sets of different sizes can be filled up to one batch.
            ddf: (B, 3, D, H, W), voxels.
            spacing: (3,) mm between the moving image's voxels along the tensor axes.

        Returns:
            scalar, mm; 0 with a zero gradient when there are no points.

        Raises:
            ValueError: when the shapes do not fit.
        """
        check_field(ddf)
        if fixed_points.ndim == 2:
            fixed_points, moving_points = fixed_points[None], moving_points[None]
        if fixed_points.shape != moving_points.shape or fixed_points.ndim != 3 or fixed_points.shape[2] != 3:
            raise ValueError(
                f"corresponding points must both be (N, 3) or (B, N, 3), got {tuple(fixed_points.shape)} and "
                f"{tuple(moving_points.shape)}"
            )
        if fixed_points.shape[0] != ddf.shape[0]:
            raise ValueError(f"{fixed_points.shape[0]} point sets do not fit a batch of {ddf.shape[0]} fields")
        if len(spacing) != 3:
            raise ValueError(f"the spacing must be three numbers in mm, got {len(spacing)}")
        with float32_region(ddf):
            field = ddf.float()
            scale = torch.as_tensor(spacing, dtype=field.dtype, device=field.device)
            errors = []
            for fixed, moving, u in zip(fixed_points.to(field), moving_points.to(field), field, strict=True):
                keep = torch.isfinite(fixed).all(dim=1) & torch.isfinite(moving).all(dim=1)
                if keep.any():
                    mapped = fixed[keep] + sample_points(u, fixed[keep])
                    errors.append(torch.linalg.vector_norm((mapped - moving[keep]) * scale, dim=1))
            if not errors:
                return (field * 0.0).sum()
            return torch.cat(errors).mean()
