"""What a registration network is trained to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.layers.warp import warp
from common.losses import (
    EndpointErrorLoss,
    GradientLoss,
    LandmarkLoss,
    NegativeJacobianLoss,
    SequenceLoss,
    SoftDiceLoss,
)

__all__ = ["RegistrationObjective", "Supervision"]

Supervision = Literal["auto", "field", "similarity"]


class RegistrationObjective(nn.Module):
    """Weighted sum of the field's, image's, labels' and landmarks' error and of the field's roughness and folding.

    Applied to every estimate of a network that makes a sequence of them, later ones weighing more: ReCorr's
    gamma-weighted loss. Only folding counts in the last one alone.

    Args:
        supervision: "field": distance to the exact field of generated pairs; "similarity": of the warped to the fixed
            image; "auto": the field where the pair has an exact one, else the similarity.
        similarity: image loss, called as similarity(fixed, warped).
        similarity_weight: its weight, and that of the distance to the exact field.
        smoothness: field loss, called as smoothness(ddf).
        smoothness_weight: its weight.
        folding_weight: weight of the negative Jacobian determinants of the last estimate; 0 leaves them out.
        labels: label values for the soft Dice loss, which needs labelled pairs.
        label_weight: weight of the soft Dice loss; 0 leaves it out.
        landmark_weight: weight of the landmarks' TRE in mm; 0 leaves it out.
        spacing: mm of the training grid, for the TRE.
        background_weight: weight of voxels without visible correspondence in the field's error.
        gamma: weight of an estimate relative to its successor.
    """

    def __init__(
        self,
        *,
        similarity: nn.Module,
        smoothness: nn.Module | None = None,
        supervision: Supervision = "auto",
        similarity_weight: float = 1.0,
        smoothness_weight: float = 1.0,
        folding_weight: float = 0.0,
        labels: Sequence[int] = (),
        label_weight: float = 0.0,
        landmark_weight: float = 0.0,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        background_weight: float = 0.1,
        gamma: float = 0.8,
    ) -> None:
        super().__init__()
        self.supervision = supervision
        self.similarity = similarity
        self.similarity_weight = similarity_weight
        self.smoothness = smoothness or GradientLoss(penalty="l2")
        self.smoothness_weight = smoothness_weight
        self.folding = NegativeJacobianLoss()
        self.folding_weight = folding_weight
        self.field_error = EndpointErrorLoss()
        self.soft_dice = SoftDiceLoss(labels) if label_weight else None
        self.label_weight = label_weight
        self.landmark_error = LandmarkLoss() if landmark_weight else None
        self.landmark_weight = landmark_weight
        self.spacing = tuple(spacing)
        self.background_weight = background_weight
        self.sequence = SequenceLoss(self.estimate_loss, gamma=gamma)

    def forward(self, estimates: Tensor | Sequence[Tensor], pair: Mapping[str, Any]) -> Tensor:
        """Loss of a network's estimates.

        Args:
            estimates: one ddf (B, 3, D, H, W) or a sequence from first to last.
            pair: `image` (B, 2, D, H, W), or `fixed` and `moving`, which may be of different sizes, as where `fixed` is
                a patch; and what the chosen terms need: `ddf` and `mask`; `fixed_label` and `moving_label`, or
                `fixed_one_hot` and `moving_one_hot` (B, labels, D, H, W) in [0, 1]; `fixed_keypoints` and
                `moving_keypoints`. `spacing`, mm, takes the place of the constructor's.

        Returns:
            scalar.

        Raises:
            InputError: when the pair lacks what a term needs.
        """
        loss: Tensor = self.sequence(estimates, pair)
        if self.folding_weight:
            last = estimates if isinstance(estimates, Tensor) else estimates[-1]
            loss = loss + self.folding_weight * self.folding(last)
        return loss

    def estimate_loss(self, ddf: Tensor, pair: Mapping[str, Any]) -> Tensor:
        """The same for a single estimate."""
        exact = self.supervision == "field" or (self.supervision == "auto" and "ddf" in pair)
        if exact:
            mask = _needed(pair, "mask", "an exact field").to(ddf)
            weight = self.background_weight + (1 - self.background_weight) * mask
            loss = self.field_error(ddf, _needed(pair, "ddf", "an exact field"), weight)
        else:
            moving, fixed = _images(pair)
            loss = self.similarity(fixed, warp(moving, ddf, padding_mode="zeros"))
        loss = self.similarity_weight * loss
        if self.smoothness_weight:
            loss = loss + self.smoothness_weight * self.smoothness(ddf)
        if self.soft_dice is not None:
            loss = loss + self.label_weight * self._dice(ddf, pair)
        if self.landmark_error is not None:
            points = (_needed(pair, key, "key points") for key in ("fixed_keypoints", "moving_keypoints"))
            loss = loss + self.landmark_weight * self.landmark_error(*points, ddf, _spacing(pair, self.spacing))
        return loss

    def _dice(self, ddf: Tensor, pair: Mapping[str, Any]) -> Tensor:
        assert self.soft_dice is not None
        if "fixed_one_hot" in pair:
            return self.soft_dice.of_one_hot(pair["fixed_one_hot"], pair["moving_one_hot"], ddf)
        return self.soft_dice(*(_needed(pair, key, "labels") for key in ("fixed_label", "moving_label")), ddf)


def _images(pair: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Moving and fixed image."""
    if "image" in pair:
        moving, fixed = torch.split(pair["image"], 1, dim=1)
        return moving, fixed
    return pair["moving"], pair["fixed"]


def _spacing(pair: Mapping[str, Any], default: Sequence[float]) -> Sequence[float]:
    """mm; a collated batch has the same for each of its pairs."""
    spacing = pair.get("spacing", default)
    return spacing.view(-1, 3)[0].tolist() if isinstance(spacing, Tensor) else spacing


def _needed(pair: Mapping[str, Any], key: str, what: str) -> Tensor:
    if key not in pair:
        raise InputError(f"training or validation with {what} needs pairs that have it; '{key}' is missing")
    return pair[key]
