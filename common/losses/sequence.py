"""Losses over the sequence of fields that a recurrent network predicts, and against a known field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.losses._checks import check_field, masked_mean
from common.precision import float32_region

__all__ = ["EndpointErrorLoss", "SequenceLoss"]


class SequenceLoss(nn.Module):
    """`sum_i gamma^(N-1-i) * loss(field_i)`: the last of N predictions weighs 1, earlier ones less.

    ReCorr's training loss (RAFT's scheme), N = 11 fields at full size. Not normalised: with gamma = 0.8 the weights of
    11 fields sum to 4.57, so range and sign are the inner loss's times that sum.
    """

    def __init__(self, loss: Callable[..., Tensor], gamma: float = 0.8) -> None:
        """
        Args:
            loss: called as `loss(field, *args, **kwargs)`, returns a scalar.
            gamma: weight of a prediction relative to its successor, in (0, 1].

        Raises:
            ValueError: when gamma is outside (0, 1].
        """
        super().__init__()
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        self.loss = loss
        self.gamma = gamma

    def forward(self, fields: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """
        Args:
            fields: the predictions (B, 3, D, H, W), first to last; one tensor counts as a sequence of one.
            *args: passed on to the inner loss, the same for each field.
            **kwargs: likewise.

        Returns:
            scalar.

        Raises:
            ValueError: when there is no field.
        """
        sequence = [fields] if isinstance(fields, Tensor) else list(fields)
        if not sequence:
            raise ValueError("a sequence loss needs at least one field")
        total = self.loss(sequence[-1], *args, **kwargs)
        for age, field in enumerate(reversed(sequence[:-1]), start=1):
            total = total + self.gamma**age * self.loss(field, *args, **kwargs)
        return total


class EndpointErrorLoss(nn.Module):
    """Mean Euclidean distance in voxels between a predicted field and the exact one. Range [0, inf).

    For synthetic pairs, whose deformation is known.
    """

    def forward(self, ddf: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            ddf: (B, 3, D, H, W), voxels.
            target: (B, 3, D, H, W), voxels.
            mask: (B, 1, D, H, W), the mean is taken inside.

        Returns:
            scalar, voxels.

        Raises:
            ValueError: when the shapes do not fit.
        """
        check_field(ddf)
        if ddf.shape != target.shape:
            raise ValueError(f"the fields must have one shape, got {tuple(ddf.shape)} and {tuple(target.shape)}")
        if mask is not None and tuple(mask.shape) != (ddf.shape[0], 1, *ddf.shape[2:]):
            raise ValueError(f"the mask must be (B, 1, D, H, W) and fit {tuple(ddf.shape)}, got {tuple(mask.shape)}")
        with float32_region(ddf):
            distance = torch.linalg.vector_norm(ddf.float() - target.float(), dim=1, keepdim=True)
            return masked_mean(distance, mask)
