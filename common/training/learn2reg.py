"""Figures on the scans' own arrays by the rules of the Learn2Reg challenges, and the names of their submissions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from common.geometry.spaces import PairGrids
from common.metrics import dice_macro, dice_micro, folding_percent, hd95, sdlogj, tre_mm
from common.training.objective import _needed

__all__ = ["MeasuredPair", "submission_name"]

_OFFICIAL_NAME = re.compile(r"_([0-9]{4})_([0-9]{4})\.nii\.gz$")  # TASK_CASE_MODALITY.nii.gz


class MeasuredPair:
    """A field and what it does to the labels and key points of a pair, on the scans' own arrays.

    - dice, dice_micro, hd95 (voxels): the moving label map, nearest neighbour at p + displacement(p), 0 outside. Dice
      and HD95 are means over the labels that both scans have.
    - tre_mm: mean over the key points; the displacement between voxels by cubic spline, the moving scan's spacing.
    - sdlogj: with Learn2Reg's +3, inside the fixed mask if `masked`. folding_percent: of the whole volume.
      Both without what separates the two arrays, see `PairGrids.deformation`.

    Args:
        pair: a batch of one, with what the figures need: "fixed_label", "moving_label" (1, 1, D, H, W), "fixed_mask",
            "fixed_keypoints", "moving_keypoints" (1, N, 3), voxels of the scans' arrays.
        ddf: (1, 3, D, H, W), voxels of the network's grid.
        grids: the pair's.
        masked: take SDlogJ inside the fixed mask where there is one.
    """

    def __init__(self, pair: Mapping[str, Any], ddf: Tensor, *, grids: PairGrids, masked: bool = True) -> None:
        self.pair = pair
        self.grids = grids
        self.masked = masked
        self.displacement = grids.displacement(ddf[0])
        """(3, D, H, W) float32 on the fixed array, voxels of the moving array: what a submission holds."""
        self._figures = {
            "dice": lambda: dice_macro(*self._labels, moving=self._moving_label),
            "dice_micro": lambda: dice_micro(*self._labels),
            "hd95": lambda: hd95(*self._labels, moving=self._moving_label),
            "tre_mm": self._tre,
            "folding_percent": lambda: folding_percent(self._deformation),
            "sdlogj": lambda: sdlogj(self._deformation, self._mask),
        }

    def figures(self) -> list[str]:
        """Names of the figures, whether the pair has what they need or not."""
        return list(self._figures)

    def figure(self, name: str) -> float:
        """One of them.

        Raises:
            InputError: when the pair lacks what it needs.
            ValueError: when what it has does not fit together.
        """
        return self._figures[name]()

    @cached_property
    def _deformation(self) -> np.ndarray:
        return self.grids.deformation(self.displacement)

    @cached_property
    def _mask(self) -> np.ndarray | None:
        return _volume(self.pair["fixed_mask"]) if self.masked and "fixed_mask" in self.pair else None

    @cached_property
    def _moving_label(self) -> np.ndarray:
        return _volume(_needed(self.pair, "moving_label", "labels"))

    @cached_property
    def _labels(self) -> tuple[np.ndarray, np.ndarray]:
        fixed = _volume(_needed(self.pair, "fixed_label", "labels"))
        at = np.indices(self.grids.fixed.shape) + self.displacement.astype(np.float64)
        return fixed, ndimage.map_coordinates(self._moving_label, at, order=0)

    def _tre(self) -> float:
        keys = ("fixed_keypoints", "moving_keypoints")
        fixed, moving = (_needed(self.pair, key, "key points")[0].cpu() for key in keys)
        return float(np.mean(tre_mm(fixed, moving, self.displacement, self.grids.moving.spacing, order=3)))


def submission_name(fixed: str, moving: str, pair_id: str) -> str:
    """File name of a pair's field, as the challenges' evaluation looks for it.

    Args:
        fixed, moving: paths of the scans. TASK_CASE_MODALITY.nii.gz give disp_FIXED_MOVING for the modalities 0000
            and 0001, the only ones for which the short form is accepted, else
            disp_FIXED_MODALITY_MOVING_MODALITY.
        pair_id: for scans of other names, disp_ID.
    """
    found = [_OFFICIAL_NAME.search(PurePath(path).name) for path in (fixed, moving)]
    if found[0] is None or found[1] is None:
        return f"disp_{pair_id}.nii.gz"
    (fixed_case, fixed_modality), (moving_case, moving_modality) = found[0].groups(), found[1].groups()
    if (fixed_modality, moving_modality) == ("0000", "0001"):
        return f"disp_{fixed_case}_{moving_case}.nii.gz"
    return f"disp_{fixed_case}_{fixed_modality}_{moving_case}_{moving_modality}.nii.gz"


def _volume(batch: Tensor) -> np.ndarray:
    """(D, H, W) of (1, 1, D, H, W)."""
    return torch.as_tensor(batch).cpu().numpy()[0, 0]
