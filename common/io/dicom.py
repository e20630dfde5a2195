"""One 3D image from a folder of DICOM slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import itk

from common.errors import InputError
from common.io.quiet import quiet_itk

__all__ = ["read_series"]

_MIN_SLICES = 4  # fewer make no volume: localizers, structure sets and reports that lie beside one
_MAX_UNEVEN = 0.1  # of the slice distance: a missing slice makes it 1


def read_series(folder: Path, image_type: Any, *, check: Callable[[Path, Any], None]) -> Any:
    """Read the DICOM series of a folder.

    Series of fewer than four files are passed over when there is a longer one beside them.

    Args:
        folder: a folder with the slices of one series; subfolders are not searched.
        image_type: `itk.Image[itk.F, 3]` or of another component.
        check: called with the folder and a reader of the first file when the series is a single multi-frame file.

    Returns:
        an image of `image_type`.

    Raises:
        InputError: when the folder holds no series or several, or slices are missing.
    """
    with quiet_itk():
        try:
            names = itk.GDCMSeriesFileNames.New()
            names.SetUseSeriesDetails(True)
            names.SetDirectory(str(folder))
            series = {uid: list(names.GetFileNames(uid)) for uid in names.GetSeriesUIDs()}
        except RuntimeError as error:
            raise InputError(f"{folder} cannot be read as a folder of DICOM files") from error
        if not series:
            raise InputError(f"{folder} is a folder without DICOM files")
        volumes = {uid: files for uid, files in series.items() if len(files) >= _MIN_SLICES}
        chosen = volumes or series
        if len(chosen) > 1:
            listed = ", ".join(_describe(files) for files in list(chosen.values())[:6])
            more = ", ..." if len(chosen) > 6 else ""
            raise InputError(
                f"{folder} holds {len(chosen)} DICOM series ({listed}{more}); give a folder with one series"
            )
        files = next(iter(chosen.values()))
        try:
            first = itk.GDCMImageIO.New()
            first.SetFileName(files[0])
            first.ReadImageInformation()
            if len(files) == 1:
                check(folder, first)
            elif first.GetNumberOfComponents() != 1:
                raise InputError(f"{folder} holds colour images; one value per voxel is needed")
            elif not volumes:
                raise InputError(f"{folder} holds {len(files)} DICOM slices; at least {_MIN_SLICES} are needed")
            reader = itk.ImageSeriesReader[image_type].New()
            reader.SetImageIO(itk.GDCMImageIO.New())
            reader.SetFileNames(files)
            reader.Update()
        except RuntimeError as error:
            raise InputError(f"{folder} holds a DICOM series that cannot be read as one 3D image") from error
        image = reader.GetOutput()
        _check_slices(folder, image)
    return image


def _check_slices(folder: Path, image: Any) -> None:
    dictionary = image.GetMetaDataDictionary()
    key = "ITK_non_uniform_sampling_deviation"
    if not dictionary.HasKey(key):
        return
    deviation, distance = float(dictionary[key]), float(image.GetSpacing()[2])
    if deviation > _MAX_UNEVEN * distance:
        raise InputError(
            f"{folder} holds a DICOM series of unevenly spaced slices "
            f"(up to {deviation:.2f} mm from {distance:.2f} mm); is one missing?"
        )


def _describe(files: list[str]) -> str:
    """A series in words: its description, where it has one, and its number of slices."""
    try:
        reader = itk.GDCMImageIO.New()
        reader.SetFileName(files[0])
        reader.ReadImageInformation()
        dictionary = reader.GetMetaDataDictionary()
        tags = [dictionary[tag].strip() for tag in ("0020|0011", "0008|103e") if dictionary.HasKey(tag)]
    except RuntimeError:  # an object without an image
        tags = []
    name = " ".join(tag for tag in tags if tag) or Path(files[0]).name
    return f"{name}: {len(files)} files"
