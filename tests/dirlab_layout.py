"""DIR-Lab's 4DCT cases on disk under the names of the downloads, with generated landmarks and volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import stats

from common.data.dirlab import DIRLAB_CASES

TABLE = {
    1: (3.89, 2.78),
    2: (4.34, 3.90),
    3: (6.94, 4.05),
    4: (9.83, 4.86),
    5: (7.48, 5.51),
    6: (10.89, 6.97),
    7: (11.03, 7.43),
    8: (14.99, 9.01),
    9: (7.92, 3.98),
    10: (7.30, 6.35),
}
"""Mean and standard deviation (n - 1) of the 300 landmarks' distances before registration, mm."""


def case_folder(folder: Path, case: int) -> Path:
    return folder / ("Case8Deploy" if case == 8 else f"Case{case}Pack")


def image_path(folder: Path, case: int, phase: str) -> Path:
    """Cases 1 to 5 end in _s, but for the other spelling that occurs; 6 to 10 in nothing."""
    ending = "-ssm" if case == 2 else "_s" if case <= 5 else ""
    return case_folder(folder, case) / "Images" / f"case{case}_{phase}{ending}.img"


def landmarks_path(folder: Path, case: int, phase: str, count: int = 300) -> Path:
    if count == 75:
        return case_folder(folder, case) / "Sampled4D" / f"case{case}_4D-75_{phase}.txt"
    if case <= 5:
        return case_folder(folder, case) / "ExtremePhases" / f"Case{case}_300_{phase}_xyz.txt"
    return case_folder(folder, case) / "extremePhases" / f"case{case}_dirLab300_{phase}_xyz.txt"


def write_volume(path: Path, stored: np.ndarray | None, shape: tuple[int, int, int]) -> None:
    """(X, Y, Z) int16 as stored, HU + 1024; None writes zeros that take no place on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        if stored is None:
            file.truncate(2 * int(np.prod(shape)))
        else:
            file.write(stored.astype("<i2").tobytes(order="F"))  # x fastest


def write_landmarks(path: Path, voxels: np.ndarray) -> None:
    """(N, 3) voxels from 0, as x y z from 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{x:6d}\t{y:6d} {z:6d}  \r\n" for x, y, z in voxels + 1) + "\r\n")


def make_landmarks(case: int, mean: float, std: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """300 pairs of voxels whose distances have the given mean and standard deviation (n - 1), to 0.005 mm.

    Returns:
        T00 and T50, (300, 3) int64 each, from 0.
    """
    generator = np.random.default_rng(seed)
    shape, spacing = np.array(DIRLAB_CASES[case].shape), np.array(DIRLAB_CASES[case].spacing)
    reach = np.minimum((45 / spacing).astype(int), shape // 3)
    steps = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij"), -1).reshape(-1, 3)
    lengths = np.linalg.norm(steps * spacing, axis=1)
    order = np.argsort(lengths, kind="stable")
    quantiles = (np.arange(300) + 0.5) / 300
    wanted = stats.gamma((mean / std) ** 2, scale=std**2 / mean).ppf(quantiles)  # positive, with a long tail
    for _ in range(50):
        at = np.searchsorted(lengths[order], wanted).clip(1, len(order) - 1)
        at -= wanted - lengths[order[at - 1]] < lengths[order[at]] - wanted
        found = lengths[order[at]]
        if abs(found.mean() - mean) < 0.004 and abs(found.std(ddof=1) - std) < 0.004:
            break
        wanted = (wanted - wanted.mean()) * (std / found.std(ddof=1)) + wanted.mean() + mean - found.mean()
        wanted = np.abs(wanted)
    else:
        raise AssertionError(f"no landmarks of {mean} ({std}) mm were found")
    step = steps[order[at]]
    fixed = generator.integers(np.maximum(0, -step), np.minimum(shape, shape - step))
    return fixed, fixed + step


def make_case(
    folder: Path,
    case: int,
    *,
    volumes: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    landmarks: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """One case, with the 300 landmarks of its row of `TABLE` by default, and 75 of them in Sampled4D.

    Returns:
        the landmarks of T00 and T50.
    """
    points = make_landmarks(case, *TABLE[case], seed=seed) if landmarks is None else landmarks
    for phase, voxels, stored in zip(("T00", "T50"), points, volumes, strict=True):
        write_volume(image_path(folder, case, phase), stored, DIRLAB_CASES[case].shape)
        write_landmarks(landmarks_path(folder, case, phase), voxels)
        write_landmarks(landmarks_path(folder, case, phase, 75), voxels[:75])
    return points
