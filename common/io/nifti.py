"""NIfTI-1 files, where ITK cannot be relied on.

ITK fills a truncated file up with zeros, reads NaN and infinity as 0, reads the voxels of `a.nii` when asked for
`a.nii.gz` beside it, ends a write on a full disk with success, takes a voxel size of 0 for 1 and falls back to the
qform when the sform is unusable: all without an exception (ITK 5.4.7). Only its choice between the two is kept.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from common.geometry.spaces import Grid, swap_lps_ras

__all__ = [
    "describe_nifti_problem",
    "is_nifti",
    "is_nifti_complete",
    "is_sheared_nifti",
    "read_nifti_header",
    "read_nifti_voxels",
]

_HEADER_BYTES = 348
_CHUNK = 1 << 20
_MM = {"meter": 1e3, "micron": 1e-3}


def is_nifti(path: Path) -> bool:
    """Whether a file's name says that it is one NIfTI file."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_nifti_header(path: Path) -> nib.Nifti1Header | None:
    """The NIfTI-1 header of a file, or None when it has none.

    Raises:
        OSError: when the file cannot be read.
    """
    try:
        with _open(path) as file:
            block = file.read(_HEADER_BYTES)
        header = nib.Nifti1Header(block, check=False)  # checking would mend what is to be reported
    except (EOFError, zlib.error, gzip.BadGzipFile, WrapStructError, HeaderDataError):
        return None
    return header if bytes(header["magic"]).rstrip(b"\0") == b"n+1" else None


def describe_nifti_problem(header: nib.Nifti1Header) -> str | None:
    """What is wrong with a header, as the rest of a sentence that starts with the file's name; None when nothing is."""
    dimensions = int(header["dim"][0])
    # ITK drops trailing axes of length 1, except where a vector's components follow them
    while dimensions > 3 and header["dim"][dimensions] == 1:
        dimensions -= 1
    if dimensions < 3:
        return f"has {dimensions} dimensions; a 3D image is needed"
    if dimensions == 4:
        return "has 4 dimensions; a 3D image is needed, so choose one of its volumes"
    sizes = header["pixdim"][1:4]
    if not np.isfinite(sizes).all() or (sizes == 0).any():
        return f"has a voxel size of {' x '.join(f'{s:g}' for s in sizes)} mm; every size must be above 0"
    if int(header["sform_code"]) > 0:
        matrix = header.get_sform()[:3, :3]
        lengths = np.linalg.norm(matrix, axis=0)
        if not np.isfinite(matrix).all() or (lengths == 0).any() or abs(np.linalg.det(matrix / lengths)) < 1e-3:
            return "has a singular affine (sform): its voxel axes do not span the space"
    elif int(header["qform_code"]) > 0:
        try:
            header.get_qform()
        except ValueError:
            return "has a singular affine (qform): its quaternion is no rotation"
    return None


def is_sheared_nifti(header: nib.Nifti1Header, grid: Grid, *, tolerance: float = 1e-2) -> bool:
    """Whether the grid that ITK made of a file is neither its sform nor its qform.

    Args:
        header: the file's header.
        grid: the grid that ITK reports.
        tolerance: mm, allowed distance of the grid's corners.
    """
    affines = [header.get_sform(coded=True)[0]]
    try:
        affines.append(header.get_qform(coded=True)[0])
    except ValueError:  # an invalid quaternion beside a valid sform
        affines.append(None)
    to_mm = np.diag([*[_MM.get(header.get_xyzt_units()[0], 1.0)] * 3, 1.0])  # ITK's grids are in mm
    coded = [swap_lps_ras(to_mm @ affine) for affine in affines if affine is not None]
    if not coded:
        return False
    corners = grid.corners
    voxels = grid.to_voxels(corners)
    return all(np.abs(voxels @ affine[:3, :3].T + affine[:3, 3] - corners).max() > tolerance for affine in coded)


def is_nifti_complete(path: Path, header: nib.Nifti1Header) -> bool:
    """Whether a file holds all the voxels that its header announces."""
    shape = header["dim"][1 : int(header["dim"][0]) + 1].astype(np.int64)
    expected = _data_offset(header) + int(shape.prod()) * int(header["bitpix"]) // 8
    if not _is_gzip(path):
        return path.stat().st_size >= expected
    with path.open("rb") as file:
        file.seek(-4, 2)
        announced = int.from_bytes(file.read(4), "little")  # gzip's trailer: uncompressed size modulo 2^32
    if announced == expected % 2**32:
        return True
    # Padding, or several gzip members in one file, which is legal: only now pay for unpacking it all.
    try:
        with gzip.open(path) as file:
            total = 0
            while chunk := file.read(_CHUNK):
                total += len(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return False
    return total >= expected


def read_nifti_voxels(path: Path, header: nib.Nifti1Header) -> np.ndarray | None:
    """Scaled voxels (i, j, k) of a real scalar 3D file, NaN and infinity included; None when the file is cut short."""
    dtype = header.get_data_dtype()
    shape = tuple(int(n) for n in header["dim"][1:4])
    try:
        with _open(path) as file:
            file.seek(_data_offset(header))
            block = file.read(math.prod(shape) * dtype.itemsize)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return None
    if len(block) < math.prod(shape) * dtype.itemsize:
        return None
    voxels = np.frombuffer(block, dtype=dtype).reshape(shape, order="F")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite([slope, intercept]).all() or slope == 0 or (slope, intercept) == (1, 0):
        return voxels
    return voxels * slope + intercept


def _data_offset(header: nib.Nifti1Header) -> int:
    return max(int(header["vox_offset"]), _HEADER_BYTES)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if _is_gzip(path) else path.open("rb")
