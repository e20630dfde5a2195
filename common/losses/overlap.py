"""Supervision by segmentations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn

from common.layers.warp import warp
from common.losses._checks import check_field, float32_region

__all__ = ["SoftDiceLoss"]


class SoftDiceLoss(nn.Module):
    """`1 - Dice` of one-hot labels, the moving ones warped trilinearly; in [0, 1], 0 for a perfect overlap.

    RWCNet's public code warps the label map by nearest neighbour, whose derivative by the field is 0, so that its Dice
    term trains nothing; here the field gets a gradient wherever labels meet. The mean is over the labels that occur in
    both images of a pair (Learn2Reg's Dice), one pair's labels weighing alike whatever their volume.

    Memory: two float32 volumes per label.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        """
        Args:
            labels: the values to compare, without the background.

        Raises:
            ValueError: when there is none, or one is given twice.
        """
        super().__init__()
        if len(labels) == 0 or len(set(labels)) != len(labels):
            raise ValueError(f"the labels must be a list of different values, got {list(labels)}")
        self.labels = tuple(int(label) for label in labels)
        self.dice = DiceLoss(include_background=True, reduction="none", smooth_nr=0.0, smooth_dr=1e-5)

    def forward(self, fixed_label: Tensor, moving_label: Tensor, ddf: Tensor) -> Tensor:
        """
        Args:
            fixed_label: (B, 1, D, H, W) label map, any dtype.
            moving_label: (B, 1, D', H', W') label map.
            ddf: (B, 3, D, H, W), voxels of the moving label map.

        Returns:
            scalar in [0, 1]; 0 with a zero gradient when no label occurs in both maps.

        Raises:
            ValueError: when the shapes do not fit.
        """
        check_field(ddf)
        for name, label in (("fixed", fixed_label), ("moving", moving_label)):
            if label.ndim != 5 or label.shape[1] != 1 or label.shape[0] != ddf.shape[0]:
                raise ValueError(
                    f"the {name} label map must be (B, 1, D, H, W) with the field's batch size, got "
                    f"{tuple(label.shape)} for a field {tuple(ddf.shape)}"
                )
        if fixed_label.shape[2:] != ddf.shape[2:]:
            raise ValueError(
                f"the field {tuple(ddf.shape)} does not live on the fixed label map's grid {tuple(fixed_label.shape)}"
            )
        with float32_region(ddf):
            fixed, moving = self._one_hot(fixed_label), self._one_hot(moving_label)
            # zeros outside: a structure must not be smeared out by a border that repeats it
            warped = warp(moving, ddf, padding_mode="zeros")
            loss = self.dice(warped, fixed).flatten(1)  # (B, L)
            present = (fixed.flatten(2).any(dim=2) & moving.flatten(2).any(dim=2)).to(loss)
            return (loss * present).sum() / present.sum().clamp_min(1.0)

    def _one_hot(self, label: Tensor) -> Tensor:
        return torch.cat([label == value for value in self.labels], dim=1).float()
