"""Supervision by segmentations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn

from common.layers.warp import warp
from common.losses._checks import check_field
from common.precision import float32_region

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
        options = {"include_background": True, "reduction": "none", "smooth_nr": 0.0, "smooth_dr": 1e-5}
        self.dice = DiceLoss(**options)
        # Squared in the denominator, so that two equal maps of fractions have a Dice of 1, too.
        self.dice_of_fractions = DiceLoss(**options, squared_pred=True)

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
        return self._mean_over_labels(self.dice, self.one_hot(fixed_label), self.one_hot(moving_label), ddf)

    def of_one_hot(self, fixed: Tensor, moving: Tensor, ddf: Tensor) -> Tensor:
        """The same for maps of the share that each label has of a voxel, as averaging `one_hot` to a coarser grid
        makes them: they keep the surface's place within the voxel, which a coarse label map has lost.

        Args:
            fixed: (B, L, D, H, W), in [0, 1].
            moving: (B, L, D', H', W').
            ddf: (B, 3, D, H, W), voxels of the moving map.

        Returns:
            as `forward`; the denominator has squares, so that two equal maps score 0.

        Raises:
            ValueError: when the shapes do not fit.
        """
        check_field(ddf)
        wanted = (ddf.shape[0], len(self.labels))
        if tuple(fixed.shape[:2]) != wanted or tuple(moving.shape[:2]) != wanted or fixed.shape[2:] != ddf.shape[2:]:
            raise ValueError(
                f"maps of {len(self.labels)} labels for a field {tuple(ddf.shape)} cannot be {tuple(fixed.shape)} and "
                f"{tuple(moving.shape)}"
            )
        return self._mean_over_labels(self.dice_of_fractions, fixed, moving, ddf)

    def one_hot(self, label: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> (B, L, D, H, W), float32."""
        return torch.cat([label == value for value in self.labels], dim=1).float()

    def _mean_over_labels(self, dice: DiceLoss, fixed: Tensor, moving: Tensor, ddf: Tensor) -> Tensor:
        with float32_region(ddf):
            # zeros outside: a structure must not be smeared out by a border that repeats it
            warped = warp(moving.float(), ddf, padding_mode="zeros")
            loss = dice(warped, fixed.float()).flatten(1)  # (B, L)
            present = (fixed.flatten(2).any(dim=2) & moving.flatten(2).any(dim=2)).to(loss)
            total: Tensor = (loss * present).sum() / present.sum().clamp_min(1.0)
            return total
