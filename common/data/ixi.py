"""IXI as prepared for TransMorph (Chen et al., Medical Image Analysis 2022): one pickle a person, one of an atlas.

IXI_data/{Train,Val,Test}/subject_N.pkl and IXI_data/atlas.pkl each hold a pair of arrays, the skull-stripped T1 in
[0, 1] and its FreeSurfer labels. The task is to bring the atlas to each person: moving is the atlas, fixed the person.
The pickles know of no place in space; it is taken to be 1 mm along each array axis.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from monai.transforms.io.array import SUPPORTED_READERS

from common.data._arrays import ArrayReader
from common.data._pickles import read_pickled_arrays
from common.data._rows import Item, PathLike
from common.errors import InputError

__all__ = [
    "IXI_EVALUATED",
    "IXI_LABELS",
    "IXI_STRUCTURES",
    "IxiReader",
    "is_ixi",
    "read_ixi",
    "read_ixi_scan",
    "remap_ixi_labels",
]

# fmt: off
IXI_LABELS: tuple[int, ...] = (
    0, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28, 30, 31, 41, 42, 43, 44, 46, 47, 49, 50, 51, 52,
    53, 54, 58, 60, 62, 63, 72, 77, 80, 85, 251, 252, 253, 254, 255,
)
"""FreeSurfer's number of each label 0 to 45 that the figures count by."""
# fmt: on

_FREESURFER: dict[str, tuple[int, ...]] = {  # left, right
    "brain_stem": (16,),
    "thalamus": (10, 49),
    "cerebellum_cortex": (8, 47),
    "cerebral_white_matter": (2, 41),
    "cerebellum_white_matter": (7, 46),
    "putamen": (12, 51),
    "ventral_dc": (28, 60),
    "pallidum": (13, 52),
    "caudate": (11, 50),
    "lateral_ventricle": (4, 43),
    "hippocampus": (17, 53),
    "third_ventricle": (14,),
    "fourth_ventricle": (15,),
    "amygdala": (18, 54),
    "cerebral_cortex": (3, 42),
    "csf": (24,),
    "choroid_plexus": (31, 63),
}

IXI_STRUCTURES: dict[str, tuple[int, ...]] = {
    name: tuple(IXI_LABELS.index(number) for number in numbers) for name, numbers in _FREESURFER.items()
}
"""The 17 structures of the published tables, with their labels (0 to 45), left and right."""

IXI_EVALUATED: tuple[int, ...] = tuple(sorted(label for labels in IXI_STRUCTURES.values() for label in labels))
"""The 30 labels of these structures."""

_ATLAS = "atlas.pkl"
_FOLDERS = {"training": "Train", "validation": "Val", "test": "Test"}
_LABEL = "#label"  # after the name of a pickle: its second array


def is_ixi(folder: PathLike) -> bool:
    """Whether a folder is IXI_data, or one of its Train, Val and Test."""
    root = Path(os.path.abspath(folder))
    return (root / _ATLAS).is_file() or (_is_section(root) and (root.parent / _ATLAS).is_file())


def read_ixi(folder: PathLike, section: str | None = None) -> list[Item]:
    """Pairs of the atlas, moving, and each person, fixed.

    Args:
        folder: IXI_data, or one of its Train, Val and Test.
        section: "training", "validation" or "test"; needed with IXI_data.

    Returns:
        one dict per person, by number: "id" ("subject_7"), "fixed", "moving", "fixed_label", "moving_label", for
        MONAI's `LoadImage`. A label's name is that of its pickle and "#label", since a pickle holds both.

    Raises:
        InputError: when the folder, the atlas or the persons' pickles are missing.
        ValueError: for another section.
    """
    root = Path(os.path.abspath(folder))
    if section is not None:
        if section not in _FOLDERS:
            raise ValueError(f"IXI has the sections {', '.join(_FOLDERS)}, not '{section}'")
        root = root / _FOLDERS[section]
    atlas = root.parent / _ATLAS
    if not atlas.is_file():
        raise InputError(f"'{atlas}': no such file; it is the moving scan of each pair of IXI")
    if not root.is_dir():
        raise InputError(f"'{root}': no such folder; it is where IXI's pickles of this part lie")
    people = sorted((path for path in root.glob("*.pkl") if not path.name.startswith(".")), key=_by_number)
    if not people:
        raise InputError(f"'{root}': there is no pickle in it, such as subject_1.pkl")
    moving = os.path.abspath(atlas)
    return [
        {
            "id": person.stem,
            "fixed": (fixed := os.path.abspath(person)),
            "moving": moving,
            "fixed_label": fixed + _LABEL,
            "moving_label": moving + _LABEL,
        }
        for person in people
    ]


def read_ixi_scan(path: PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays of a pickle.

    Args:
        path: subject_N.pkl or atlas.pkl, of which nothing but arrays is accepted.

    Returns:
        image (D, H, W) float32 and labels (D, H, W) int16, 0 to 45 by `IXI_LABELS`.

    Raises:
        InputError: when the file is missing or broken, asks for anything but arrays, or is no image with its labels.
    """
    path = Path(path)
    arrays = read_pickled_arrays(path)
    if len(arrays) != 2 or arrays[0].ndim != 3 or arrays[0].shape != arrays[1].shape or not arrays[0].size:
        shapes = ", ".join(str(array.shape) for array in arrays) or "none"
        raise InputError(f"'{path}' holds no image and labels of one 3D shape, but arrays of the shapes {shapes}")
    image, label = arrays
    if not np.isfinite(image).all():
        raise InputError(f"'{path}': the image holds values that are not finite")
    if label.dtype.kind == "f" and not np.array_equal(label, np.rint(label)):
        raise InputError(f"'{path}': the labels are not whole numbers")
    return image.astype(np.float32), remap_ixi_labels(label)


def remap_ixi_labels(label: np.ndarray) -> np.ndarray:
    """FreeSurfer's numbers to 0 to 45, int16; what is none of `IXI_LABELS` becomes background."""
    numbers = np.array(IXI_LABELS)  # ascending
    at = np.searchsorted(numbers, label).clip(max=len(numbers) - 1)
    return np.where(numbers[at] == label, at, 0).astype(np.int16)


class IxiReader(ArrayReader):
    """MONAI's `LoadImage` reads IXI's pickles by it, once `common.data` is imported; see `read_ixi_scan`."""

    def knows(self, name: str) -> bool:
        """A pickle, or the labels of one."""
        return name.removesuffix(_LABEL).endswith(".pkl")

    def load(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The image, or the labels."""
        image, label = read_ixi_scan(name.removesuffix(_LABEL))
        return (label if name.endswith(_LABEL) else image), np.eye(4)


# The place for readers of one's own, says MONAI; a LoadImaged that a config makes later on chooses by file name.
SUPPORTED_READERS["ixireader"] = IxiReader


def _is_section(folder: Path) -> bool:
    return folder.name in _FOLDERS.values() or any(folder.glob("subject_*.pkl"))


def _by_number(path: Path) -> tuple[int, str]:
    """subject_9 before subject_10."""
    number = re.search(r"(\d+)$", path.stem)
    return (int(number[1]) if number else -1, path.stem)
