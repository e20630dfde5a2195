"""Figures of one registration, for metrics.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from common.geometry.fields import jacobian_determinant
from common.geometry.spaces import itk_to_array
from common.inference.pair import Registration
from common.io import build_transform, transform_points
from common.metrics import dice_macro, dice_per_label, folding_percent, hd95, ncc, nmi, sdlogj

__all__ = ["registration_metrics"]


def registration_metrics(registration: Registration) -> dict[str, Any]:
    """Similarity, regularity and, where labels or landmarks came along, overlap and TRE.

    "before" is the identity in physical space, "affine" after the affine stage, "after" after both stages.

    Returns:
        nested plain numbers, ready for JSON; what cannot be computed (HD95 of a vanished label) is None.
    """
    pair = registration.pair
    stages = {
        "before": (registration.unaligned, build_transform()),
        "affine": (registration.aligned, build_transform(registration.fixed_to_moving)),
        "after": (registration.warped, registration.transform),
    }
    fixed = itk_to_array(pair.fixed)
    mask = itk_to_array(pair.fixed_mask) > 0 if pair.fixed_mask is not None else None
    metrics: dict[str, Any] = {"similarity": {"ncc": {}, "nmi": {}}}
    for stage, (image, _) in stages.items():
        moving = itk_to_array(image)
        metrics["similarity"]["ncc"][stage] = _number(ncc(fixed, moving, mask))
        metrics["similarity"]["nmi"][stage] = _number(nmi(fixed, moving, mask))

    length = np.linalg.norm(registration.deformation, axis=-1)
    metrics["deformation"] = {
        "folding_percent": _number(folding_percent(registration.deformation_ddf)),
        "sdlogj": _number(sdlogj(registration.deformation_ddf)),
        "mean_mm": _number(length.mean()),
        "max_mm": _number(length.max()),
    }
    if registration.uncertainty is not None:
        finest = registration.uncertainty[-1]
        metrics["uncertainty_mm"] = {"mean": _number(finest.mean()), "max": _number(finest.max())}
    if pair.fixed_label is not None and pair.moving_label is not None:
        metrics["overlap"] = _overlap(registration, {name: transform for name, (_, transform) in stages.items()})
    if pair.fixed_landmarks is not None and pair.moving_landmarks is not None:
        metrics["tre_mm"] = {}
        for stage, (_, transform) in stages.items():
            error = np.linalg.norm(transform_points(transform, pair.fixed_landmarks) - pair.moving_landmarks, axis=1)
            metrics["tre_mm"][stage] = {
                "mean": _number(error.mean()),
                "std": _number(error.std()),
                "max": _number(error.max()),
            }
    return metrics


def jacobian_map(registration: Registration) -> np.ndarray:
    """(D-2, H-2, W-2) determinants of the deformable stage."""
    return jacobian_determinant(registration.deformation_ddf)[0, 0].numpy()


def _overlap(registration: Registration, transforms: dict[str, Any]) -> dict[str, Any]:
    fixed = itk_to_array(registration.pair.fixed_label)
    overlap: dict[str, Any] = {"dice": {}, "hd95_voxels": {}}
    for stage, transform in transforms.items():
        warped = itk_to_array(registration.warp_label(transform))
        overlap["dice"][stage] = _number(dice_macro(fixed, warped))
        overlap["hd95_voxels"][stage] = _number(hd95(fixed, warped))
        if stage == "after":
            overlap["dice_per_label"] = {str(k): _number(v) for k, v in dice_per_label(fixed, warped).items()}
    return overlap


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
