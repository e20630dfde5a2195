"""DIR-Lab's ten 4DCT cases as they are handed out: headerless volumes, and landmarks counted from 1.

Cases as published in Castillo et al., Phys. Med. Biol. 2009 and 2010. The fixed scan is T00 (end of inhalation), the
moving one T50 (end of exhalation): the landmarks of T00 are carried to T50, as in the tables of the literature. The
field then lives on the inflated lung, whose voxels are the finer sampling of the tissue.

Arrays have the axes x, y, z, as a NIfTI file of the same scan would. The files say nothing of their place in space: it
is ITK's identity, what an .mhd header without a direction gives, with the first voxel at the origin.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from monai.transforms.io.array import SUPPORTED_READERS

from common.data._arrays import ArrayReader
from common.data._rows import Item, PathLike, read_text
from common.errors import InputError
from common.geometry.spaces import swap_lps_ras

__all__ = [
    "DIRLAB_CASES",
    "DirLabCase",
    "DirLabReader",
    "is_dirlab",
    "is_dirlab_landmarks",
    "read_dirlab",
    "read_dirlab_image",
    "read_dirlab_landmarks",
]


@dataclass(frozen=True)
class DirLabCase:
    """What the files of a case do not say.

    Attributes:
        shape: voxels along x, y, z.
        spacing: mm along x, y, z.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


DIRLAB_CASES: dict[int, DirLabCase] = {
    1: DirLabCase((256, 256, 94), (0.97, 0.97, 2.5)),
    2: DirLabCase((256, 256, 112), (1.16, 1.16, 2.5)),
    3: DirLabCase((256, 256, 104), (1.15, 1.15, 2.5)),
    4: DirLabCase((256, 256, 99), (1.13, 1.13, 2.5)),
    5: DirLabCase((256, 256, 106), (1.10, 1.10, 2.5)),
    6: DirLabCase((512, 512, 128), (0.97, 0.97, 2.5)),
    7: DirLabCase((512, 512, 136), (0.97, 0.97, 2.5)),
    8: DirLabCase((512, 512, 128), (0.97, 0.97, 2.5)),
    9: DirLabCase((512, 512, 128), (0.97, 0.97, 2.5)),
    10: DirLabCase((512, 512, 120), (0.97, 0.97, 2.5)),
}
"""By number; as printed beside the downloads."""

_OFFSET = 1024  # stored intensity of 0 HU
_HU = (-1024, 3071)  # what a scanner stores; beyond lies the filling outside the reconstructed circle
# Names differ from case to case in case and in form.
_FOLDER = re.compile(r"case(\d+)(?:pack|deploy)", re.IGNORECASE)
_IMAGE = re.compile(r"case(\d+)_T(\d\d)(?:[_-]s+m?)?\.img", re.IGNORECASE)  # caseN_Txx_s, caseN_Txx, caseN_Txx-ssm
_LANDMARKS = {
    300: re.compile(r"case(\d+)_(?:dirlab)?300_T(\d\d)_xyz\.txt", re.IGNORECASE),
    75: re.compile(r"case(\d+)_4D-?75_T(\d\d)\.txt", re.IGNORECASE),
}
_DEPTH = 4  # of folders: DIRLAB/Case1Pack/Case1Pack/Images, as some programs unpack


def is_dirlab(folder: PathLike) -> bool:
    """Whether a folder holds DIR-Lab's cases, or is one of them."""
    return any(_case_of(name) for _, folders, files in _walk(Path(folder)) for name in (*folders, *files))


def read_dirlab(
    folder: PathLike,
    *,
    cases: Sequence[int] | None = None,
    fixed: str = "T00",
    moving: str = "T50",
    landmarks: int = 300,
) -> list[Item]:
    """Pairs of DIR-Lab's 4DCT cases.

    Args:
        folder: where the downloaded archives were unpacked: CaseNPack, Case8Deploy.
        cases: their numbers; all that are there by default.
        fixed: phase of the fixed scan.
        moving: phase of the moving scan.
        landmarks: 300 for those of the extreme phases T00 and T50, 75 for those of the phases T00 to T50.

    Returns:
        one dict per case, by number: "id" ("case8"), "fixed", "moving", "fixed_keypoints", "moving_keypoints". The
        scans are for MONAI's `LoadImage`, the key points for `read_keypoints`.

    Raises:
        InputError: when a case or a file is missing or there twice, when a scan's size is not its case's, or when the
            landmarks are not as many, not whole numbers or outside the scan.
        ValueError: for another number of landmarks.
    """
    if landmarks not in _LANDMARKS:
        raise ValueError(f"DIR-Lab has {' or '.join(map(str, _LANDMARKS))} landmarks, not {landmarks}")
    root = Path(folder)
    files = [(path / name) for path, _, names in _walk(root) for name in names]
    there = sorted({case for _, dirs, names in _walk(root) for name in (*dirs, *names) if (case := _case_of(name))})
    if not there:
        raise InputError(f"'{root}': there is no case of DIR-Lab in it, no folder such as Case1Pack")
    pairs = []
    for case in there if cases is None else cases:
        if case not in there:
            raise InputError(f"'{root}': case {case} is missing; there are the cases {', '.join(map(str, there))}")
        pair: Item = {"id": f"case{case}"}
        for role, phase in (("fixed", fixed), ("moving", moving)):
            image = _only(root, files, _IMAGE, case, phase, "scan")
            _check_size(image, case)
            pair[role] = os.path.abspath(image)
        for role, phase in (("fixed", fixed), ("moving", moving)):
            points = _only(root, files, _LANDMARKS[landmarks], case, phase, f"file of {landmarks} landmarks")
            read_dirlab_landmarks(points)  # small files, and what is wrong with them is better said before the training
            pair[f"{role}_keypoints"] = os.path.abspath(points)
        pairs.append(pair)
    return pairs


def read_dirlab_image(path: PathLike) -> tuple[np.ndarray, DirLabCase]:
    """One volume.

    Args:
        path: caseN_Txx_s.img, caseN_Txx.img or caseN_Txx-ssm.img; the number tells the shape.

    Returns:
        Hounsfield units, (X, Y, Z) float32, from -1024 to 3071, and the case.

    Raises:
        InputError: when the file is missing, or its name or size is none of a case.
    """
    path = Path(path)
    found = _IMAGE.fullmatch(path.name)
    if found is None or int(found[1]) not in DIRLAB_CASES:
        raise InputError(f"'{path}': no name of a DIR-Lab scan, such as case1_T00_s.img")
    case = DIRLAB_CASES[int(found[1])]
    _check_size(path, int(found[1]))
    try:
        raw = np.fromfile(path, dtype="<i2")
    except OSError as error:
        raise InputError(f"'{path}': cannot be read ({error.strerror})") from None
    # x runs fastest: the file is (Z, Y, X) in C order
    volume = raw.reshape(case.shape[::-1]).transpose(2, 1, 0).astype(np.float32)
    return np.clip(volume - _OFFSET, *_HU), case


def is_dirlab_landmarks(path: PathLike) -> bool:
    """Whether a file has the name of DIR-Lab's landmarks."""
    return any(pattern.fullmatch(Path(path).name) for pattern in _LANDMARKS.values())


def read_dirlab_landmarks(path: PathLike) -> np.ndarray:
    """Landmarks of one scan.

    Args:
        path: caseN_300_Txx_xyz.txt, caseN_dirLab300_Txx_xyz.txt or caseN_4D-75_Txx.txt: three whole numbers a row, x y
            z, counted from 1.

    Returns:
        (N, 3) float64: voxels of the array that `read_dirlab_image` returns, counted from 0.

    Raises:
        InputError: when the file is missing, its rows are not 300 (75), or one is not a voxel of the scan.
    """
    path = Path(path)
    count, found = next(((n, m) for n, pattern in _LANDMARKS.items() if (m := pattern.fullmatch(path.name))), (0, None))
    if found is None or int(found[1]) not in DIRLAB_CASES:
        raise InputError(f"'{path}': no name of DIR-Lab landmarks, such as Case1_300_T00_xyz.txt")
    shape = DIRLAB_CASES[int(found[1])].shape
    points = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            point = [float(word) for word in line.split()]
        except ValueError:
            point = []
        if len(point) != 3 or any(value % 1 for value in point):  # also of nan and inf
            raise InputError(f"'{path}', row {number}: '{line.strip()}' is not three whole numbers x y z")
        if any(not 1 <= value <= n for value, n in zip(point, shape, strict=True)):
            size = " x ".join(map(str, shape))
            raise InputError(f"'{path}', row {number}: '{line.strip()}' is outside the scan, which has {size} voxels")
        points.append(point)
    if len(points) != count:
        raise InputError(f"'{path}': it has {len(points)} landmarks where DIR-Lab's has {count}")
    return np.array(points, dtype=np.float64) - 1


class DirLabReader(ArrayReader):
    """MONAI's `LoadImage` reads DIR-Lab's scans by it, once `common.data` is imported; see `read_dirlab_image`."""

    def knows(self, name: str) -> bool:
        """By the whole name: others use .img as well."""
        return _IMAGE.fullmatch(Path(name).name) is not None

    def load(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """One volume."""
        volume, case = read_dirlab_image(name)
        return volume, swap_lps_ras(np.diag([*case.spacing, 1.0]))


# The place for readers of one's own, says MONAI; a LoadImaged that a config makes later on chooses by file name.
SUPPORTED_READERS["dirlabreader"] = DirLabReader


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` of the cases' folders, without what an operating system has hidden between them."""
    for path, folders, files in os.walk(root, followlinks=True):
        here = Path(path)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield here, folders, sorted(name for name in files if not name.startswith("."))
        depth = len(here.relative_to(root).parts)
        if depth >= _DEPTH:
            folders.clear()


def _case_of(name: str) -> int | None:
    """Number of the case that a folder or file belongs to."""
    for pattern in (_FOLDER, _IMAGE, *_LANDMARKS.values()):
        found = pattern.fullmatch(name)
        if found and int(found[1]) in DIRLAB_CASES:
            return int(found[1])
    return None


def _only(root: Path, files: Sequence[Path], pattern: re.Pattern[str], case: int, phase: str, what: str) -> Path:
    """The one file of a case and phase."""
    found = []
    for path in files:
        match = pattern.fullmatch(path.name)
        if match and (int(match[1]), f"T{match[2]}") == (case, phase):
            found.append(path)
    if not found:
        raise InputError(f"'{root}': case {case} has no {what} of {phase}")
    if len(found) > 1:
        raise InputError(f"'{found[0]}' and '{found[1]}' are both the {what} of case {case}, {phase}; keep one")
    return found[0]


def _check_size(path: Path, case: int) -> None:
    """Refuse a file that is not as long as the voxels of its case."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"'{path}': no such file") from None
    except OSError as error:
        raise InputError(f"'{path}': cannot be read ({error.strerror})") from None
    shape = DIRLAB_CASES[case].shape
    expected = 2 * int(np.prod(shape))
    if size != expected:
        raise InputError(
            f"'{path}' has {size} bytes, but case {case} has {' x '.join(map(str, shape))} voxels of 2 bytes, "
            f"{expected} bytes"
        )
