"""Writing what a registration writes: images, transforms, figures and the picture, all or none."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
from common.geometry.spaces import itk_to_array
from common.inference.metrics import jacobian_map, registration_metrics
from common.inference.pair import Registration
from common.io import (
    StagedOutput,
    write_displacement,
    write_image,
    write_landmarks,
    write_learn2reg,
    write_report,
    write_scalar_maps,
    write_transform,
)

__all__ = ["METRICS_FILE", "write_registration"]

METRICS_FILE = "metrics.json"
_OPTIONAL = (
    "report.png",
    "learn2reg.nii.gz",
    "warped_label.nii.gz",
    "warped_landmarks.txt",
    "uncertainty.nii.gz",
    "uncertainty_levels.nii.gz",
)
"""Removed where an earlier registration has left them and this one has none."""


def write_registration(
    output_dir: str,
    registration: Registration,
    *,
    seconds: Mapping[str, float],
    settings: Mapping[str, Any],
    report: bool = True,
    learn2reg: bool = False,
) -> dict[str, Any]:
    """Write warped.nii.gz, transform.h5, displacement.nii.gz, metrics.json, report.png and what labels, landmarks and
    an estimate of the uncertainty give.

    The files appear together at the end, or not at all.

    Args:
        output_dir: made when missing.
        registration: what to write.
        seconds: of the steps before this one.
        settings: repeated in metrics.json.
        report: draw report.png.
        learn2reg: also write learn2reg.nii.gz: both stages, from voxels of the fixed scan to those of the moving one.

    Returns:
        what metrics.json holds.

    Raises:
        OutputError: naming the path and the problem.
    """
    pair = registration.pair
    start = time.perf_counter()
    names = ["warped.nii.gz", "transform.h5", "displacement.nii.gz", METRICS_FILE]
    names += ["report.png"] if report else []
    names += ["learn2reg.nii.gz"] if learn2reg else []
    names += ["warped_label.nii.gz"] if registration.warped_label is not None else []
    names += ["warped_landmarks.txt"] if registration.mapped_landmarks is not None else []
    names += ["uncertainty.nii.gz", "uncertainty_levels.nii.gz"] if registration.uncertainty is not None else []
    with StagedOutput(output_dir, names, obsolete=_OPTIONAL) as stage:
        write_image(registration.warped, stage / "warped.nii.gz")
        write_transform(
            stage / "transform.h5",
            affine=registration.fixed_to_moving,
            displacement=registration.displacement,
            grid=registration.field_grid,
        )
        write_displacement(stage / "displacement.nii.gz", registration.total_displacement, pair.fixed_grid)
        if learn2reg:
            write_learn2reg(stage / "learn2reg.nii.gz", registration.voxel_displacement, grid=pair.fixed_grid)
        if registration.warped_label is not None:
            write_image(registration.warped_label, stage / "warped_label.nii.gz")
        if registration.mapped_landmarks is not None:
            write_landmarks(stage / "warped_landmarks.txt", registration.mapped_landmarks)
        if registration.uncertainty is not None:
            write_scalar_maps(stage / "uncertainty.nii.gz", registration.uncertainty[-1:], pair.fixed_grid)
            write_scalar_maps(stage / "uncertainty_levels.nii.gz", registration.uncertainty, pair.fixed_grid)
        written = time.perf_counter()
        figures = registration_metrics(registration)
        measured = time.perf_counter()
        if report:
            _write_report(stage / "report.png", registration, figures)
        steps = {
            **seconds,
            "writing": written - start,
            "metrics": measured - written,
            "report": time.perf_counter() - measured,
        }
        metrics = {
            **figures,
            "seconds": {name: round(value, 3) for name, value in {**steps, "total": sum(steps.values())}.items()},
            "peak_memory_mib": _peak_memory(),
            "settings": {
                **settings,
                "fixed_modality": pair.fixed_modality,
                "moving_modality": pair.moving_modality,
                "outside_value": registration.outside_value,
                "fixed_to_moving_affine_lps": np.asarray(registration.fixed_to_moving).round(9).tolist(),
            },
            "versions": _versions(),
        }
        (stage / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _write_report(path: Path, registration: Registration, figures: Mapping[str, Any]) -> None:
    pair = registration.pair
    write_report(
        path,
        fixed=itk_to_array(pair.fixed),
        moving=itk_to_array(registration.aligned),
        warped=itk_to_array(registration.warped),
        magnitude=np.linalg.norm(registration.deformation, axis=-1),
        jacobian=jacobian_map(registration),
        grid=pair.fixed_grid,
        uncertainty=registration.uncertainty,
        fixed_label=None if pair.fixed_label is None else itk_to_array(pair.fixed_label),
        warped_label=None if registration.warped_label is None else itk_to_array(registration.warped_label),
        metrics={k: v for k, v in figures.items() if k != "overlap"}
        | ({"dice": figures["overlap"]["dice"]} if "overlap" in figures else {}),
        title="Registration: fixed grid, affine and deformable stage",
    )


def _peak_memory() -> dict[str, float]:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 1) for name, value in peak.items()}


def _versions() -> dict[str, str]:
    packages = ("torch", "monai", "itk", "SimpleITK", "nibabel", "numpy")
    return {"common": common.__version__, "python": sys.version.split()[0]} | {p: version(p) for p in packages}
