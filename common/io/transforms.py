"""Registration results as ITK transforms.

A transform maps fixed physical points to moving ones, LPS mm (ITK's resampling convention). Its deformable stage acts
first, on the fixed side: total(x) = A(x + u(x)).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
from torch import Tensor

from common.errors import InputError, OutputError
from common.geometry.spaces import Grid, array_to_itk, itk_to_array, swap_lps_ras
from common.io.atomic import atomic_path, file_extension
from common.io.images import write_image
from common.io.quiet import quiet_itk

__all__ = [
    "build_transform",
    "read_transform",
    "resample_image",
    "transform_points",
    "transform_to_displacement",
    "write_displacement",
    "write_learn2reg",
    "write_scalar_maps",
    "write_transform",
]

_TRANSFORM_OVERHEAD = 32_768  # bytes of a transform file beside its displacements


def build_transform(
    affine: np.ndarray | None = None, displacement: np.ndarray | None = None, grid: Grid | None = None
) -> Any:
    """ITK transform of an affine and a deformable stage, total(x) = A(x + u(x)).

    Outside `grid` (half a voxel beyond its outermost centres) u is 0, ITK's rule.

    Args:
        affine: (4, 4), LPS mm fixed -> moving; identity when None.
        displacement: (D, H, W, 3), LPS mm on `grid`; no deformable stage when None.
        grid: where the displacement lives; any grid that covers the fixed image, coarser ones included.

    Returns:
        `itk.CompositeTransform[itk.D, 3]` of one or two stages.
    """
    return _compose(affine, displacement, grid, itk.D)


def write_transform(
    path: str | os.PathLike[str],
    *,
    affine: np.ndarray | None = None,
    displacement: np.ndarray | None = None,
    grid: Grid | None = None,
) -> None:
    """Write the transform of `build_transform` as an ITK file, which SimpleITK, ANTs and 3D Slicer read.

    Stored in single precision, as ANTs' `--float` does: half the size, every reader converts, and 1e-4 mm is kept.

    Args:
        path: `.h5`, or `.tfm` for an affine alone.
        affine: as for `build_transform`.
        displacement: as for `build_transform`.
        grid: as for `build_transform`.

    Raises:
        OutputError: when it cannot be written.
    """
    extension = file_extension(path)
    if extension not in (".h5", ".tfm") or (extension == ".tfm" and displacement is not None):
        raise OutputError(f"{path} cannot be written: a transform's file ends in .h5")
    transform = _compose(affine, displacement, grid, itk.F)
    with atomic_path(path) as temporary, quiet_itk():
        # First, the room: a disk that fills up under HDF5 leaves it in a state that crashes the process at its end.
        _reserve(temporary, 4 * (0 if displacement is None else displacement.size) + _TRANSFORM_OVERHEAD)
        writer = itk.TransformFileWriterTemplate[itk.F].New()
        writer.SetInput(transform)
        writer.SetFileName(str(temporary))
        writer.Update()


def _reserve(path: Path, size: int) -> None:
    """Take up `size` bytes of the disk for a file that is about to be written; OSError where there are fewer."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def read_transform(path: str | os.PathLike[str]) -> Any:
    """Read an ITK transform file (`.h5`, `.tfm`, `.txt`, ANTs' `.mat`).

    Returns:
        an `itk.Transform[itk.D, 3, 3]` of the stored class.

    Raises:
        InputError: when it is missing, unreadable, not 3D or more than one transform.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    with quiet_itk():
        try:
            transforms = itk.transformread(str(path))
        except RuntimeError as error:
            raise InputError(f"{path} is not a transform that ITK can read, or is damaged") from error
    if len(transforms) != 1:
        raise InputError(f"{path} holds {len(transforms)} transforms; one, possibly composite, is needed")
    transform = transforms[0]
    if transform.GetInputSpaceDimension() != 3:
        raise InputError(f"{path} is a transform of {transform.GetInputSpaceDimension()}D space; a 3D one is needed")
    return transform


def resample_image(
    moving: Any, grid: Grid, transform: Any, *, interpolation: str = "linear", default: float = 0.0
) -> Any:
    """Resample a moving image through a transform, once.

    Args:
        moving: `itk.Image` of type SS, UC, US, F or D.
        grid: the fixed grid.
        transform: fixed -> moving, LPS mm.
        interpolation: "linear", or "nearest" for labels.
        default: value where the transform leaves the moving image.

    Returns:
        an image of the moving image's type on `grid`.
    """
    interpolators = {
        "linear": itk.LinearInterpolateImageFunction,
        "nearest": itk.NearestNeighborInterpolateImageFunction,
    }
    if interpolation not in interpolators:
        raise ValueError(f"interpolation is 'linear' or 'nearest', got {interpolation!r}")
    image_type = type(moving)
    resample = itk.ResampleImageFilter[image_type, image_type].New(moving)
    resample.SetTransform(transform)
    resample.SetInterpolator(interpolators[interpolation][image_type, itk.D].New())
    resample.SetDefaultPixelValue(default if image_type in (itk.Image[itk.F, 3], itk.Image[itk.D, 3]) else int(default))
    _set_output_grid(resample, grid)
    resample.Update()
    return resample.GetOutput()


def transform_points(transform: Any, points: np.ndarray) -> np.ndarray:
    """Map points one by one.

    Args:
        transform: any ITK transform; a registration's maps fixed points to moving ones.
        points: (N, 3), LPS mm.

    Returns:
        (N, 3) float64, LPS mm.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points are an array (N, 3), got {points.shape}")
    mapped = [list(transform.TransformPoint(point)) for point in points.tolist()]
    return np.array(mapped, dtype=np.float64).reshape(-1, 3)


def transform_to_displacement(transform: Any, grid: Grid) -> np.ndarray:
    """Total displacement of a transform, sampled at a grid's voxel centres.

    Args:
        transform: any ITK transform.
        grid: any grid.

    Returns:
        (D, H, W, 3) float32, LPS mm: T(x) - x.
    """
    field_type = itk.Image[itk.Vector[itk.F, 3], 3]
    sample = itk.TransformToDisplacementFieldFilter[field_type, itk.D].New()
    sample.SetTransform(transform)
    _set_output_grid(sample, grid)
    sample.Update()
    return itk_to_array(sample.GetOutput())


def write_displacement(path: str | os.PathLike[str], displacement: np.ndarray, grid: Grid) -> None:
    """Write a displacement field as the vector NIfTI of ITK and ANTs: 5-D (i, j, k, 1, 3), intent 1007, LPS mm.

    ANTs and ITK keep LPS vectors beside the header's RAS affine; their reader does not turn them either.

    Args:
        path: `.nii` or `.nii.gz`.
        displacement: (D, H, W, 3), LPS mm; stored in single precision.
        grid: where it lives; its RAS affine becomes both sform and qform.

    Raises:
        OutputError: when it cannot be written.
    """
    if file_extension(path) not in (".nii", ".nii.gz"):
        raise OutputError(f"{path} cannot be written: a displacement field's file ends in .nii.gz")
    write_image(array_to_itk(np.asarray(displacement, dtype=np.float32), grid), path)


def write_scalar_maps(path: str | os.PathLike[str], maps: np.ndarray, grid: Grid) -> None:
    """Write maps of one number a voxel as NIfTI: 3-D for one map, 4-D (i, j, k, map) for several.

    Args:
        path: `.nii` or `.nii.gz`.
        maps: (L, D, H, W); stored in single precision.
        grid: where they live.

    Raises:
        OutputError: when it cannot be written.
    """
    if file_extension(path) not in (".nii", ".nii.gz"):
        raise OutputError(f"{path} cannot be written: the file of a map ends in .nii.gz")
    if len(maps) == 1:
        write_image(array_to_itk(np.asarray(maps[0], dtype=np.float32), grid), path)
        return
    volumes = np.moveaxis(np.asarray(maps, dtype=np.float32), 0, -1)
    with atomic_path(path) as temporary:
        nib.save(nib.Nifti1Image(volumes, swap_lps_ras(grid.affine)), temporary)


def write_learn2reg(path: str | os.PathLike[str], ddf: Tensor | np.ndarray, *, grid: Grid | None = None) -> None:
    """Write a field in the form of the Learn2Reg challenges: NIfTI (D, H, W, 3), voxels, pull-back, float32.

    That form says nothing of physical space: voxel p of the fixed array lies at p + ddf(p) of the moving array, so
    where the two scans differ in their grids, `ddf` has to contain that (`PairGrids.displacement`).

    Args:
        path: `.nii` or `.nii.gz`.
        ddf: (3, D, H, W), voxels.
        grid: gives the header its affine; identity when None, as the challenges' own files.

    Raises:
        OutputError: when it cannot be written, or holds a value that is not finite, which makes a submission void.
    """
    if file_extension(path) not in (".nii", ".nii.gz"):
        raise OutputError(f"{path} cannot be written: a Learn2Reg field's file ends in .nii.gz")
    field = np.asarray(ddf, dtype=np.float32)
    if field.ndim != 4 or field.shape[0] != 3:
        raise ValueError(f"a field is an array (3, D, H, W), got {field.shape}")
    if not np.isfinite(field).all():
        raise OutputError(f"{path} is not written: the field holds values that are not finite")
    affine = np.eye(4) if grid is None else swap_lps_ras(grid.affine)
    with atomic_path(path) as temporary:
        nib.save(nib.Nifti1Image(np.moveaxis(field, 0, -1), affine), temporary)


def _compose(affine: np.ndarray | None, displacement: np.ndarray | None, grid: Grid | None, precision: Any) -> Any:
    matrix = np.eye(4) if affine is None else np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise ValueError("an affine is a 4 x 4 matrix whose last row is 0 0 0 1")
    dtype = np.float64 if precision is itk.D else np.float32
    linear = itk.AffineTransform[precision, 3].New()
    linear.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(matrix[:3, :3], dtype=dtype)))
    linear.SetTranslation(matrix[:3, 3].tolist())
    composite = itk.CompositeTransform[precision, 3].New()
    composite.AddTransform(linear)
    if displacement is not None:
        if grid is None:
            raise ValueError("a displacement needs the grid that it lives on")
        field = itk.DisplacementFieldTransform[precision, 3].New()
        field.SetDisplacementField(array_to_itk(np.asarray(displacement, dtype=dtype), grid))
        composite.AddTransform(field)  # ITK applies the one added last first
    return composite


def _set_output_grid(image_filter: Any, grid: Grid) -> None:
    image_filter.SetSize(list(grid.shape))
    image_filter.SetOutputSpacing(grid.spacing.tolist())
    image_filter.SetOutputOrigin(grid.origin.tolist())
    image_filter.SetOutputDirection(itk.matrix_from_array(np.ascontiguousarray(grid.direction)))
