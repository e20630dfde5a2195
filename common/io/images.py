"""Reading and writing images, label maps and masks.

Every defect of a file is an `InputError` of one sentence that begins with the file's name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import itk
import numpy as np

from common.errors import InputError, OutputError
from common.geometry.spaces import Grid, array_to_itk, grid_of, itk_to_array
from common.io.atomic import atomic_path, file_extension
from common.io.dicom import read_series
from common.io.nifti import (
    describe_nifti_problem,
    is_nifti,
    is_nifti_complete,
    is_sheared_nifti,
    read_nifti_header,
    read_nifti_voxels,
)
from common.io.quiet import quiet_itk

__all__ = ["MIN_VOXELS", "WRITABLE_EXTENSIONS", "read_image", "read_label", "read_mask", "write_image"]

MIN_VOXELS = 5
"""Fewest voxels along an axis of a readable image: a few slices have no third dimension to register or measure."""

WRITABLE_EXTENSIONS = (".nii", ".nii.gz", ".mha", ".nrrd")
"""Formats of one file each; `.mhd` and `.nhdr` are two files, which cannot be replaced at one instant."""

_SAME_GRID_TOLERANCE = 1e-2  # mm, at the corners


def read_image(path: str | os.PathLike[str]) -> Any:
    """Read a 3D scalar image.

    Args:
        path: NIfTI, MetaImage (`.mha`, `.mhd`), NRRD or another file that ITK reads, or a folder with one DICOM series.

    Returns:
        `itk.Image[itk.F, 3]`, stored values with the file's scaling applied; NaN and infinities are replaced by the
        smallest finite value.

    Raises:
        InputError: when there is no such file or it holds no usable 3D image.
    """
    path = Path(path)
    image = _read_volume(path, itk.F)
    values = itk.array_view_from_image(image)
    finite = np.isfinite(values)
    if not finite.any():
        raise InputError(f"{path} has no finite voxel (all are NaN or infinite)")
    if not finite.all():
        values[~finite] = values[finite].min()
    if values.min() == values.max():
        raise InputError(f"{path} is constant: every voxel is {values.flat[0]:g}")
    return image


def read_label(
    path: str | os.PathLike[str], image: Any, image_path: str | os.PathLike[str], *, background_only: bool = False
) -> Any:
    """Read the label map that belongs to an image.

    Args:
        path: as for `read_image`; whole numbers from 0 to 65535, in any pixel type.
        image: the `itk.Image` that the labels belong to.
        image_path: its file, for messages.
        background_only: accept a map without any label.

    Returns:
        `itk.Image[itk.SS, 3]`, or `itk.Image[itk.US, 3]` where a value is above 32767, on the image's own grid.

    Raises:
        InputError: when the file is unusable or its grid is not the image's.
    """
    path = Path(path)
    grid = grid_of(image)
    values = _read_on_grid(path, grid, image_path)
    rounded = np.rint(values)
    # A scale factor in the header brings rounding errors of its own.
    if not np.isfinite(values).all() or np.abs(values - rounded).max() > 1e-3:
        raise InputError(f"{path} is no label map: it holds values that are not whole numbers")
    low, high = int(rounded.min()), int(rounded.max())
    if low == high == 0 and not background_only:
        raise InputError(f"{path} holds no label: every voxel is 0")
    if low < 0 or high >= 2**16:
        raise InputError(f"{path} holds labels from {low} to {high}; labels go from 0, the background, to 65535")
    return array_to_itk(rounded.astype(np.int16 if high < 2**15 else np.uint16), grid)


def read_mask(path: str | os.PathLike[str], image: Any, image_path: str | os.PathLike[str]) -> Any:
    """Read the mask that belongs to an image: every value other than 0 is inside.

    Args:
        path: as for `read_image`.
        image: the `itk.Image` that the mask belongs to.
        image_path: its file, for messages.

    Returns:
        `itk.Image[itk.UC, 3]` of 0 and 1, on the image's own grid.

    Raises:
        InputError: when the file is unusable, its grid is not the image's, or the mask is empty.
    """
    path = Path(path)
    grid = grid_of(image)
    inside = np.nan_to_num(_read_on_grid(path, grid, image_path)) != 0
    if not inside.any():
        raise InputError(f"{path} is an empty mask: every voxel is 0")
    return array_to_itk(inside.astype(np.uint8), grid)


def write_image(image: Any, path: str | os.PathLike[str]) -> None:
    """Write an image, scalar or vector, whole or not at all.

    A vector image becomes a 5-D NIfTI (i, j, k, 1, 3) of intent 1007, its vectors untouched (ITK's and ANTs' LPS).

    Args:
        image: an `itk.Image`.
        path: its extension, one of `WRITABLE_EXTENSIONS`, gives the format; `.nii.gz`, `.mha` and `.nrrd` are packed.

    Raises:
        OutputError: naming the path and the problem.
    """
    path = Path(path)
    extension = file_extension(path)
    if extension not in WRITABLE_EXTENSIONS:
        raise OutputError(f"{path} cannot be written: its extension is none of {', '.join(WRITABLE_EXTENSIONS)}")
    with atomic_path(path) as temporary:
        _write(image, temporary)
        if is_nifti(temporary):
            header = read_nifti_header(temporary)  # ITK reports success on a full disk
            if header is None or not is_nifti_complete(temporary, header):
                raise OutputError(f"{path} cannot be written: the file came out incomplete (is the disk full?)")


def _write(image: Any, path: Path) -> None:
    with quiet_itk():
        itk.imwrite(image, str(path), compression=file_extension(path) != ".nii")


def _read_on_grid(path: Path, grid: Grid, image_path: str | os.PathLike[str]) -> np.ndarray:
    """Voxels (i, j, k) in double precision, which holds every integer type, of a file that must lie on `grid`."""
    volume = _read_volume(path, itk.D)
    own = grid_of(volume)
    if own.shape != grid.shape:
        raise InputError(f"{path} has shape {_times(own)} but its image {image_path} has shape {_times(grid)}")
    distance = np.abs(own.corners - grid.corners).max()
    if distance > _SAME_GRID_TOLERANCE:
        raise InputError(
            f"{path} (shape {_times(own)}) does not lie on the grid of its image {image_path} "
            f"(shape {_times(grid)}): their corners are up to {distance:.2f} mm apart"
        )
    return itk_to_array(volume)


def _read_volume(path: Path, component: Any) -> Any:
    """Any readable 3D scalar image as `itk.Image[component, 3]`, its geometry checked."""
    try:
        if path.is_dir():
            return read_series(path, itk.Image[component, 3], check=_check_geometry)
        with path.open("rb") as file:
            if not file.read(1):
                raise InputError(f"{path} is empty")
        header = read_nifti_header(path) if is_nifti(path) else None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    if is_nifti(path):
        if header is None:
            raise InputError(f"{path} is not a NIfTI-1 file, or is cut short or damaged")
        problem = describe_nifti_problem(header)
        if problem:
            raise InputError(f"{path} {problem}")
    sheared = InputError(f"{path} has an affine with shear, whose axes are not at right angles; resample it first")
    with quiet_itk():
        try:
            reader = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
            if reader is None:
                raise InputError(f"{path} is not an image of a known format (NIfTI, MetaImage, NRRD, DICOM folder)")
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            _check_geometry(path, reader)
            if header is None:
                return itk.imread(str(path), component)
        except RuntimeError as error:
            if "orthonormal" in str(error):
                raise sheared from error
            raise InputError(f"{path} cannot be read: it is cut short, damaged or lacks its data file") from error
    grid = _grid_of_file(reader)
    if is_sheared_nifti(header, grid):
        raise sheared
    voxels = read_nifti_voxels(path, header)
    if voxels is None:
        raise InputError(f"{path} is cut short or damaged: voxels are missing at its end")
    return array_to_itk(voxels.astype(np.float64 if component is itk.D else np.float32), grid)


def _grid_of_file(reader: Any) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = np.array([reader.GetDirection(i) for i in range(3)]).T * [reader.GetSpacing(i) for i in range(3)]
    affine[:3, 3] = [reader.GetOrigin(i) for i in range(3)]
    shape = [int(reader.GetDimensions(i)) for i in range(3)]
    return Grid((shape[0], shape[1], shape[2]), affine)


def _check_geometry(path: Path, reader: Any) -> None:
    """Refuse, before any voxel is read, what is no 3D scalar image. `reader` is an `itk.ImageIOBase`."""
    dimensions = reader.GetNumberOfDimensions()
    if dimensions != 3:
        raise InputError(f"{path} has {dimensions} dimensions; a 3D image is needed")
    components = reader.GetNumberOfComponents()
    if components != 1:
        raise InputError(f"{path} has {components} values per voxel (colour, vector or complex); one is needed")
    shape = [int(reader.GetDimensions(i)) for i in range(3)]
    if min(shape) < MIN_VOXELS:
        hint = "; give the folder of its series" if "GDCM" in reader.GetNameOfClass() and shape[2] == 1 else ""
        raise InputError(
            f"{path} has {' x '.join(map(str, shape))} voxels; at least {MIN_VOXELS} are needed along each axis{hint}"
        )
    spacing = np.array([reader.GetSpacing(i) for i in range(3)])
    if not np.isfinite(spacing).all() or (spacing == 0).any():
        sizes = " x ".join(f"{s:g}" for s in spacing)
        raise InputError(f"{path} has a voxel size of {sizes} mm; every size must be above 0")
    direction = np.array([reader.GetDirection(i) for i in range(3)])
    if not np.isfinite(direction).all() or abs(np.linalg.det(direction)) < 1e-6:
        raise InputError(f"{path} has a singular affine: its voxel axes do not span the space")
    if np.abs(direction @ direction.T - np.eye(3)).max() > 1e-3:
        raise InputError(f"{path} has an affine with shear, whose axes are not at right angles; resample it first")


def _times(grid: Grid) -> str:
    return " x ".join(map(str, grid.shape))
