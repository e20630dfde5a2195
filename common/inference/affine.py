"""The affine stage: rigid or affine alignment before the network, by ITK's Mattes mutual information.

The one place that uses SimpleITK: the `itk` package loads its registration templates for five seconds and more in each
process, the same ITK code in SimpleITK for a third of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import SimpleITK as sitk
import torch
from scipy import ndimage
from torch import Tensor

from common.errors import InputError
from common.geometry.spaces import Grid, resample_to_grid

__all__ = ["AffineMode", "align_affine", "overlap_fraction"]

AffineMode = Literal["none", "centers", "moments", "rigid", "affine"]

_BINS = 32
# Voxels of the fixed image at each level, coarse to fine: enough for twelve parameters, and cheap whatever the scan.
_LEVEL_VOXELS = (24_000, 120_000)
_SAMPLES = 20_000
_SEED = 1


def align_affine(
    fixed: Tensor, fixed_grid: Grid, moving: Tensor, moving_grid: Grid, *, mode: AffineMode = "affine"
) -> np.ndarray:
    """Estimate the linear map from the fixed to the moving image.

    Starts from the best, by mutual information, of the identity, the centres of the fields of view and the centres of
    mass; "rigid" and "affine" then refine it on two coarse levels (about 8 and 4 mm for a head).

    Args:
        fixed: (1, D, H, W), normalised intensities.
        fixed_grid: its grid.
        moving: (1, D', H', W'), normalised intensities.
        moving_grid: its grid.
        mode: "none": identity, images have to overlap in space; "centers": the centres of the fields of view on each
            other, as crops around an organ need it; "moments": the start alone, a translation; "rigid":
            6 parameters; "affine": 12, after a rigid stage.

    Returns:
        (4, 4) float64: fixed LPS mm -> moving LPS mm.

    Raises:
        InputError: for an unknown mode, or when the images do not overlap and `mode` is "none".
    """
    if mode not in get_args(AffineMode):
        raise InputError(f"the affine stage must be one of {', '.join(get_args(AffineMode))}, got {mode!r}")
    if mode == "none":
        if overlap_fraction(fixed_grid, moving_grid) == 0.0:
            raise InputError(
                "the fixed and the moving image do not overlap in space; use an affine stage other than none"
            )
        return np.eye(4)
    if mode == "centers":
        matrix = np.eye(4)
        matrix[:3, 3] = moving_grid.centre - fixed_grid.centre
        return matrix

    levels = [
        (_level_image(fixed, fixed_grid, count), _level_image(moving, moving_grid, count)) for count in _LEVEL_VOXELS
    ]
    with _one_thread():
        return _align(levels, fixed, fixed_grid, moving, moving_grid, mode)


@contextmanager
def _one_thread() -> Iterator[None]:
    """ITK on one thread: several add up the metric in changing order, which gives another result on each run."""
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _align(
    levels: Sequence[tuple[sitk.Image, sitk.Image]],
    fixed: Tensor,
    fixed_grid: Grid,
    moving: Tensor,
    moving_grid: Grid,
    mode: AffineMode,
) -> np.ndarray:
    centre = _centre_of_mass(fixed, fixed_grid)
    shift = _best_start(
        *levels[0],
        [
            np.zeros(3),
            moving_grid.centre - fixed_grid.centre,
            _centre_of_mass(moving, moving_grid) - centre,
        ],
    )
    rigid: sitk.Transform = sitk.Euler3DTransform(centre.tolist(), 0.0, 0.0, 0.0, shift.tolist())
    if mode == "moments":
        return _matrix_of(rigid)
    rigid = _refine(rigid, levels if mode == "rigid" else levels[:1], learning_rate=2.0)
    if mode == "rigid":
        return _matrix_of(rigid)
    matrix = _matrix_of(rigid)
    affine = sitk.AffineTransform(3)
    affine.SetCenter(centre.tolist())
    affine.SetMatrix(matrix[:3, :3].ravel().tolist())
    affine.SetTranslation((matrix[:3, :3] @ centre + matrix[:3, 3] - centre).tolist())
    return _matrix_of(_refine(affine, levels, learning_rate=1.0))


def overlap_fraction(fixed_grid: Grid, moving_grid: Grid, fixed_to_moving: np.ndarray | None = None) -> float:
    """Part of a coarse lattice of the fixed field of view that falls into the moving one, 0 to 1."""
    ticks = [np.linspace(0, n - 1, 12) for n in fixed_grid.shape]
    points = fixed_grid.to_physical(np.stack(np.meshgrid(*ticks, indexing="ij"), -1).reshape(-1, 3))
    if fixed_to_moving is not None:
        points = points @ fixed_to_moving[:3, :3].T + fixed_to_moving[:3, 3]
    voxels = moving_grid.to_voxels(points)
    inside = ((voxels >= -0.5) & (voxels <= np.array(moving_grid.shape) - 0.5)).all(axis=1)
    return float(inside.mean())


def _level_image(volume: Tensor, grid: Grid, voxels: int) -> sitk.Image:
    """Isotropic, anti-aliased copy with about `voxels` voxels; never finer than the image's finest axis."""
    extent = np.array(grid.shape) * grid.spacing
    spacing = max(float((extent.prod() / voxels) ** (1 / 3)), float(grid.spacing.min()))
    target = grid.with_spacing(spacing)
    smooth = volume[0].numpy()
    for axis, size in enumerate(grid.spacing):
        window = round(spacing / size) // 2 * 2 + 1  # odd: an even one moves the image by half a voxel
        if window > 1:
            smooth = ndimage.uniform_filter1d(smooth, window, axis=axis, mode="nearest")
    array = resample_to_grid(torch.from_numpy(smooth)[None], grid, target, padding_mode="border")[0].numpy()
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(target.spacing.tolist())
    image.SetOrigin(target.origin.tolist())
    image.SetDirection(target.direction.ravel().tolist())
    return image


def _centre_of_mass(volume: Tensor, grid: Grid) -> np.ndarray:
    weights = volume[0].double().clamp_min(0)
    total = float(weights.sum())
    if total <= 0:
        return grid.centre
    voxel = []
    for axis, n in enumerate(grid.shape):
        profile = weights.sum(dim=[a for a in range(3) if a != axis])
        voxel.append(float((profile * torch.arange(n)).sum()) / total)
    return grid.to_physical(np.array([voxel]))[0]


def _method() -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetInterpolator(sitk.sitkLinear)
    return method


def _best_start(fixed: sitk.Image, moving: sitk.Image, candidates: Sequence[np.ndarray]) -> np.ndarray:
    """The translation of the highest mutual information; one without overlap cannot win."""
    best, best_value = candidates[0], math.inf
    for shift in candidates:
        method = _method()
        method.SetInitialTransform(sitk.TranslationTransform(3, shift.tolist()))
        try:
            value = method.MetricEvaluate(fixed, moving)
        except RuntimeError:
            continue
        if value < best_value:
            best, best_value = shift, value
    return best


def _refine(
    start: sitk.Transform, levels: Sequence[tuple[sitk.Image, sitk.Image]], *, learning_rate: float
) -> sitk.Transform:
    """Regular-step gradient descent on mutual information, level after level.

    A stage that ends worse than it began, or loses the overlap, is dropped.
    """
    transform = start
    for fixed, moving in levels:
        method = _method()
        voxels = fixed.GetNumberOfPixels()
        if voxels > _SAMPLES:
            # A regular lattice with a fixed seed: the same result on every run.
            method.SetMetricSamplingStrategy(method.REGULAR)
            method.SetMetricSamplingPercentage(_SAMPLES / voxels, _SEED)
        # At 0.6 the steps shrink to nothing in the narrow valleys of rotation and scale, millimetres from the optimum.
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=learning_rate, minStep=1e-3, numberOfIterations=100, relaxationFactor=0.9
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(transform, False)
        try:
            before = method.MetricEvaluate(fixed, moving)
            refined = method.Execute(fixed, moving)
        except RuntimeError:
            continue
        if method.GetMetricValue() <= before:
            transform = refined
        learning_rate /= 2
    return transform


def _matrix_of(transform: sitk.Transform) -> np.ndarray:
    """(4, 4) matrix of a linear transform."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    for axis, unit in enumerate(np.eye(3)):
        matrix[:3, axis] = np.array(transform.TransformPoint(unit.tolist())) - origin
    matrix[:3, 3] = origin
    return matrix
