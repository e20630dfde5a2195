"""One judge for all methods of the accuracy table: figures of a pair from the files that a method wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from benchmarks._peers import DISPLACEMENT, FIGURES, MATRIX, has_two_contrasts
from common.geometry.spaces import Grid, displacement_to_ddf, grid_of, itk_to_array
from common.io import (
    build_transform,
    read_image,
    read_label,
    read_landmark_pair,
    read_transform,
    resample_image,
    transform_points,
    transform_to_displacement,
)
from common.metrics import dice_macro, folding_percent, hd95, ncc, nmi, sdlogj

TRUTH = "truth"
"""Key of a pair's exact field: a file of `displacement` (D, H, W, 3), LPS mm on the fixed grid, and `mask`."""

_STEPS = (
    "affine",
    "resampling",
    "network",
    "instance_optimization",
    "unfolding",
)  # of a bundle, without files and figures


def judge_zero(pair: dict[str, str]) -> dict[str, Any]:
    """Nothing moves: the identity in physical space."""
    return {**_figures(pair, build_transform(), np.eye(4)), "seconds": 0.0}


def judge_peer(pair: dict[str, str], folder: Path, affine_folder: Path) -> dict[str, Any]:
    """What `benchmarks._peers` wrote: the affine stage alone, or with a deformable stage before it."""
    matrix = np.loadtxt(affine_folder / MATRIX)
    told = json.loads((folder / FIGURES).read_text())
    seconds = told["seconds"]
    field = None
    if folder != affine_folder:
        seconds += json.loads((affine_folder / FIGURES).read_text())["seconds"]
        field = np.asarray(nib.load(folder / DISPLACEMENT).dataobj, dtype=np.float32)
        field = field.reshape(*field.shape[:3], 3)
        if not np.isfinite(field).all():
            return {"problem": "the field holds values that are not finite"}
    grid = grid_of(read_image(pair["fixed"])) if field is not None else None
    transform = build_transform(matrix, field, grid)
    return {**_figures(pair, transform, matrix), "seconds": seconds, "note": told.get("note", "")}


def judge_bundle(pair: dict[str, str], folder: Path) -> dict[str, Any]:
    """What an inference command wrote."""
    metrics = json.loads((folder / "metrics.json").read_text())
    matrix = np.array(metrics["settings"]["fixed_to_moving_affine_lps"])
    transform = read_transform(folder / "transform.h5")
    seconds = sum(metrics["seconds"].get(step, 0.0) for step in _STEPS)
    size = "x".join(map(str, metrics["settings"]["network_grid_shape"]))
    return {**_figures(pair, transform, matrix), "seconds": seconds, "note": f"network grid {size}"}


def _figures(pair: dict[str, str], transform: Any, fixed_to_moving: np.ndarray) -> dict[str, float]:
    """Figures of the map total(x) = fixed_to_moving(x + u(x)); folding and SDlogJ are those of x + u(x)."""
    fixed, moving = read_image(pair["fixed"]), read_image(pair["moving"])
    grid = grid_of(fixed)
    total = transform_to_displacement(transform, grid)
    ddf = displacement_to_ddf(_deformation(total, fixed_to_moving, grid), grid)
    warped = resample_image(moving, grid, transform, default=float(itk_to_array(moving).min()))
    images = itk_to_array(fixed), itk_to_array(warped)
    figures = {
        "ncc": ncc(*images),
        "sdlogj": sdlogj(ddf),
        "folding_percent": folding_percent(ddf),
    }
    if has_two_contrasts(pair["id"]):  # of which a correlation says little
        figures["nmi"] = nmi(*images)
    if "fixed_label" in pair and "moving_label" in pair:
        fixed_label = read_label(pair["fixed_label"], fixed, pair["fixed"])
        moving_label = read_label(pair["moving_label"], moving, pair["moving"])
        carried = resample_image(moving_label, grid, transform, interpolation="nearest")
        labels = itk_to_array(fixed_label), itk_to_array(carried)
        figures["dice"] = dice_macro(*labels, moving=itk_to_array(moving_label))
        figures["hd95"] = hd95(*labels, moving=itk_to_array(moving_label))
    if "fixed_landmarks" in pair and "moving_landmarks" in pair:
        there, here = read_landmark_pair(pair["fixed_landmarks"], pair["moving_landmarks"])
        figures["tre_mm"] = float(np.linalg.norm(transform_points(transform, there) - here, axis=1).mean())
    if TRUTH in pair:
        with np.load(pair[TRUTH]) as truth:
            error = np.linalg.norm(total - truth["displacement"], axis=-1)[truth["mask"]]
        figures["epe_mm"] = float(error.mean())
    return {name: round(float(value), 6) if math.isfinite(value) else value for name, value in figures.items()}


def _deformation(total: np.ndarray, fixed_to_moving: np.ndarray, grid: Grid) -> np.ndarray:
    """(D, H, W, 3), LPS mm: u of total(x) - x."""
    back = np.linalg.inv(fixed_to_moving)
    i, j, k = np.ogrid[: grid.shape[0], : grid.shape[1], : grid.shape[2]]
    place = np.stack([a * i + b * j + c * k + d for a, b, c, d in grid.affine[:3]], axis=-1)
    mapped = np.einsum("xc,ijkc->ijkx", back[:3, :3], place + total) + back[:3, 3]
    return (mapped - place).astype(np.float32)
