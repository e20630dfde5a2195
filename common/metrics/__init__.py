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

__all__ = [
    "dice_macro",
    "dice_micro",
    "dice_per_label",
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
]
