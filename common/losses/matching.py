"""Supervision of the features that a local correlation compares."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers.correlation import correlation_offsets
from common.layers.warp import sample_at
from common.losses._checks import check_field
from common.precision import float32_region

__all__ = ["MatchingLoss"]


class MatchingLoss(nn.Module):
    """Cross-entropy of finding a voxel's true counterpart among all places of the correlation's window around it.

    The similarities are the correlation's own, dot product / sqrt(C), so a network learns features that its correlation
    can use, from the first step and at every voxel; the endpoint error alone reaches them through the recurrent steps
    only. ln (2r+1)^3 for features that know nothing (5.8 for r = 3), 0 for unmistakable ones.

    Needs the exact field. Stochastic: a random set of voxels each time, drawn by PyTorch's generator.
    """

    def __init__(self, *, radius: int, points: int = 512) -> None:
        """
        Args:
            radius: of the window.
            points: number of voxels a pair to take the mean over.

        Raises:
            ValueError: when one of them is not positive.
        """
        super().__init__()
        if radius < 1 or points < 1:
            raise ValueError(f"the radius and the number of points must be positive, got {radius} and {points}")
        self.points = points
        self.offsets: Tensor
        self.register_buffer("offsets", torch.tensor(correlation_offsets(radius), dtype=torch.float32), False)

    def forward(self, fixed: Tensor, moving: Tensor, ddf: Tensor, mask: Tensor) -> Tensor:
        """
        Args:
            fixed: (B, C, D, H, W), features.
            moving: (B, C, D, H, W), features.
            ddf: (B, 3, D, H, W), voxels, exact.
            mask: (B, 1, D, H, W); voxels above 0.5 count.

        Returns:
            scalar >= 0; 0 with a zero gradient when no voxel counts.

        Raises:
            ValueError: when the shapes do not fit.
        """
        check_field(ddf)
        if fixed.shape != moving.shape or fixed.shape[0] != ddf.shape[0] or fixed.shape[2:] != ddf.shape[2:]:
            raise ValueError(
                f"features {tuple(fixed.shape)} and {tuple(moving.shape)} do not fit a field {tuple(ddf.shape)}"
            )
        with float32_region(ddf):
            terms = [
                self._of_pair(*item) for item in zip(fixed.float(), moving.float(), ddf.float(), mask, strict=True)
            ]
            return torch.stack(terms).mean()

    def _of_pair(self, fixed: Tensor, moving: Tensor, ddf: Tensor, mask: Tensor) -> Tensor:
        chosen = (mask[0] > 0.5).nonzero()  # (N, 3)
        if not len(chosen):
            return (fixed * 0.0).sum() + (moving * 0.0).sum()
        if len(chosen) > self.points:
            chosen = chosen[torch.randperm(len(chosen), device="cpu")[: self.points].to(chosen.device)]
        d, h, w = chosen.T
        counterparts = chosen + ddf[:, d, h, w].T  # (N, 3)
        places = counterparts[:, None] + self.offsets  # (N, K^3, 3), the counterpart itself in the middle
        candidates = sample_at(moving[None], places.flatten(0, 1)).view(len(chosen), len(self.offsets), -1)
        similarity = torch.einsum("cn,nkc->nk", fixed[:, d, h, w], candidates) / math.sqrt(fixed.shape[0])
        middle = torch.full((len(chosen),), len(self.offsets) // 2, device=chosen.device)
        return F.cross_entropy(similarity, middle)
