"""Figures on the scans' own arrays by the rules of the Learn2Reg challenges, and the names of their submissions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from common.geometry.spaces import PairGrids
from common.metrics import (
    dice_macro,
    dice_micro,
    dice_per_label,
    dice_per_structure,
    folding_percent,
    hd95,
    sdlogj,
    tre_mm,
    warp_labels,
)
from common.training.objective import _needed

__all__ = ["MeasuredPair", "structure_figures", "submission_name"]

Structures = Sequence[tuple[str, Sequence[int]]]

_OFFICIAL_NAME = re.compile(r"_([0-9]{4})_([0-9]{4})\.nii\.gz$")  # TASK_CASE_MODALITY.nii.gz


class MeasuredPair:
    """A field and what it does to the labels and key points of a pair, on the scans' own arrays.

    - dice, dice_micro, hd95 (voxels): the moving label map, nearest neighbour at p + displacement(p), 0 outside. Dice
      and HD95 are means over the labels that both scans have.
    - tre_mm: mean over the key points; the displacement between voxels by cubic spline, the moving scan's spacing.
      tre_std_mm: their standard deviation in this pair (n - 1), which tables of DIR-Lab print in brackets.
      tre_snapped_mm: the mean with each carried point rounded to the nearest voxel, as parts of that literature do.
    - sdlogj: with Learn2Reg's +3, inside the fixed mask if `masked`. folding_percent: of the whole volume.
      Both without what separates the two arrays, see `PairGrids.deformation`.
    - with `structures`, all after `warp_labels`: dice_NAME of each, the mean of its left and right label; dice_17, the
      mean over them, if they are 17; dice_30, the mean over their labels, if these are 30.

    Args:
        pair: a batch of one, with what the figures need: "fixed_label", "moving_label" (1, 1, D, H, W), "fixed_mask",
            "fixed_keypoints", "moving_keypoints" (1, N, 3), voxels of the scans' arrays.
        ddf: (1, 3, D, H, W), voxels of the network's grid.
        grids: the pair's.
        masked: take SDlogJ inside the fixed mask where there is one.
        structures: see `EvaluationRules`.
    """

    def __init__(
        self,
        pair: Mapping[str, Any],
        ddf: Tensor,
        *,
        grids: PairGrids,
        masked: bool = True,
        structures: Structures = (),
    ) -> None:
        self.pair = pair
        self.grids = grids
        self.masked = masked
        self.displacement = grids.displacement(ddf[0])
        """(3, D, H, W) float32 on the fixed array, voxels of the moving array: what a submission holds."""
        self.structures = dict(structures)
        self._figures: dict[str, Callable[[], float]] = {
            "dice": lambda: dice_macro(*self._labels, moving=self._moving_label),
            "dice_micro": lambda: dice_micro(*self._labels),
            "hd95": lambda: hd95(*self._labels, moving=self._moving_label),
            "tre_mm": lambda: float(np.mean(self._tre())),
            "tre_std_mm": lambda: float(np.std(self._tre(), ddof=1)),
            "tre_snapped_mm": lambda: float(np.mean(self._tre(snapped=True))),
            "folding_percent": lambda: folding_percent(self._deformation),
            "sdlogj": lambda: sdlogj(self._deformation, self._mask),
        }
        if self.structures:
            overall, of_labels, *each = structure_figures(structures)
            self._figures[overall] = lambda: _mean(self._structure_dice.values())
            self._figures[of_labels] = lambda: _mean(self._structure_label_dice.values())
            for figure, name in zip(each, self.structures, strict=True):
                self._figures[figure] = partial(self._dice_of, name)

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

    @cached_property
    def _smooth_labels(self) -> np.ndarray:
        return warp_labels(self._moving_label, self.displacement)

    @cached_property
    def _structure_dice(self) -> dict[str, float]:
        fixed = _volume(_needed(self.pair, "fixed_label", "labels"))
        return dice_per_structure(fixed, self._smooth_labels, self.structures, moving=self._moving_label)

    def _dice_of(self, structure: str) -> float:
        return self._structure_dice[structure]

    @cached_property
    def _structure_label_dice(self) -> dict[int, float]:
        fixed = _volume(_needed(self.pair, "fixed_label", "labels"))
        labels = [label for group in self.structures.values() for label in group]
        return dice_per_label(fixed, self._smooth_labels, labels, moving=self._moving_label)

    def _tre(self, snapped: bool = False) -> list[float]:
        keys = ("fixed_keypoints", "moving_keypoints")
        fixed, moving = (_needed(self.pair, key, "key points")[0].cpu() for key in keys)
        return tre_mm(fixed, moving, self.displacement, self.grids.moving.spacing, snapped, order=3)


def structure_figures(structures: Structures) -> list[str]:
    """Names of the figures of the structures: of their mean, of that over their labels, and of each."""
    if not structures:
        return []
    count = sum(len(labels) for _, labels in structures)
    return [f"dice_{len(structures)}", f"dice_{count}", *(f"dice_{name}" for name, _ in structures)]


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


def _mean(values: Iterable[float]) -> float:
    """Of those that are there; NaN without any."""
    present = [value for value in values if not math.isnan(value)]
    return float(np.mean(present)) if present else math.nan
