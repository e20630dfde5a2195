"""Regularisers of displacement fields (B, 3, D, H, W) in voxels. All are >= 0 and 0 for a constant field."""

from __future__ import annotations

from collections.abc import Sequence

import monai.losses
from torch import Tensor, nn

from common.geometry.fields import jacobian_determinant
from common.losses._checks import check_field
from common.precision import float32_region

__all__ = ["BendingEnergyLoss", "GradientLoss", "NegativeJacobianLoss"]


class GradientLoss(nn.Module):
    """Mean absolute ("l1") or squared ("l2", diffusion) forward difference of the field, averaged over the three axes.

    The form of VoxelMorph, RWCNet and ReCorr. Forward differences see an oscillation of period two voxels, to which
    central differences (MONAI's `DiffusionLoss`) are blind. Range [0, inf); dimensionless.
    """

    def __init__(self, penalty: str = "l2", *, spacing: Sequence[float] | None = None) -> None:
        """
        Args:
            penalty: "l1" or "l2".
            spacing: mm between voxels along the tensor axes. Given, the derivative is the one of the displacement in
                mm by the position in mm, so anisotropic voxels are regularised alike in all directions; otherwise
                voxels per voxel, as published.

        Raises:
            ValueError: for another penalty, or a spacing that is not three positive numbers.
        """
        super().__init__()
        if penalty not in ("l1", "l2"):
            raise ValueError(f'the penalty must be "l1" or "l2", got {penalty!r}')
        if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
            raise ValueError(f"the spacing must be three positive numbers in mm, got {tuple(spacing)}")
        self.penalty = penalty
        self.spacing = None if spacing is None else tuple(float(s) for s in spacing)

    def forward(self, ddf: Tensor) -> Tensor:
        """
        Args:
            ddf: (B, 3, D, H, W), voxels. An axis of one voxel has no derivative and is left out of the mean.

        Returns:
            scalar >= 0.

        Raises:
            ValueError: when `ddf` is not a field, or is a single voxel.
        """
        check_field(ddf)
        axes = [axis for axis in range(3) if ddf.shape[2 + axis] > 1]
        if not axes:
            raise ValueError(f"a field of a single voxel has no gradient, got {tuple(ddf.shape)}")
        with float32_region(ddf):
            field = ddf.float()
            if self.spacing is not None:
                field = field * field.new_tensor(self.spacing).view(1, 3, 1, 1, 1)
            terms = []
            for axis in axes:
                step = field.diff(dim=2 + axis)
                if self.spacing is not None:
                    step = step / self.spacing[axis]
                terms.append(step.abs().mean() if self.penalty == "l1" else (step * step).mean())
            return sum(terms[1:], start=terms[0]) / len(terms)


class BendingEnergyLoss(nn.Module):
    """Mean squared second derivatives, mixed ones twice, over the interior; 0 for every affine field. Range [0, inf).

    MONAI's (>= 1.6: compact stencil [1, -2, 1], voxel units; older versions give other values), kept in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.energy = monai.losses.BendingEnergyLoss()

    def forward(self, ddf: Tensor) -> Tensor:
        """
        Args:
            ddf: (B, 3, D, H, W), voxels, at least 3 voxels along each axis.

        Returns:
            scalar >= 0, 1 / voxel^2.

        Raises:
            ValueError: when `ddf` is not a field or is too small.
        """
        check_field(ddf)
        with float32_region(ddf):
            energy: Tensor = self.energy(ddf.float())
        return energy


class NegativeJacobianLoss(nn.Module):
    """Mean of `relu(-det J)` over the interior voxels: 0 for a field that folds nowhere. Range [0, inf)."""

    def forward(self, ddf: Tensor) -> Tensor:
        """
        Args:
            ddf: (B, 3, D, H, W), voxels, at least 3 voxels along each axis.

        Returns:
            scalar >= 0, dimensionless.

        Raises:
            ValueError: when `ddf` is not a field or is too small.
        """
        check_field(ddf)
        with float32_region(ddf):
            return jacobian_determinant(ddf).neg().relu().mean()
