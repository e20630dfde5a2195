"""Evaluation of a registration: label overlap, landmarks, quality of the field and image similarity."""

from common.metrics.deformation import folding_percent, inverse_consistency_error, jacobian_statistics, sdlogj
from common.metrics.landmarks import tre_mm
from common.metrics.overlap import (
    dice_macro,
    dice_micro,
    dice_per_label,
    hd95,
    hd95_per_label,
    surface_distance_percentile,
)
from common.metrics.similarity import mse, ncc, nmi, ssim
from common.metrics.structures import dice_per_structure, warp_labels

__all__ = [
    "dice_macro",
    "dice_micro",
    "dice_per_label",
    "dice_per_structure",
    "folding_percent",
    "hd95",
    "hd95_per_label",
    "inverse_consistency_error",
    "jacobian_statistics",
    "mse",
    "ncc",
    "nmi",
    "sdlogj",
    "ssim",
    "surface_distance_percentile",
    "tre_mm",
    "warp_labels",
]
