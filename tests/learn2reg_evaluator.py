"""The figures of a Learn2Reg submission folder, from the challenge's rules alone.

A second implementation to hold the first one against: numpy and scipy only, its own reader, nothing of `common`. The
rules are those of the challenges' evaluation (github.com/MDL-UzL/L2R, version 2.0) and of DeepMind's surface-distance.
"""

from __future__ import annotations

import gzip
import json
import struct
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
from scipy.ndimage import correlate, correlate1d, distance_transform_edt, map_coordinates

_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2"}


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, scaled as the header says, and the (3,) spacing in mm of a NIfTI-1 `.nii.gz`."""
    content = gzip.decompress(path.read_bytes())
    assert struct.unpack_from("<i", content, 0)[0] == 348, path
    dim = struct.unpack_from("<8h", content, 40)
    datatype = struct.unpack_from("<h", content, 70)[0]
    pixdim = struct.unpack_from("<8f", content, 76)
    offset, slope, intercept = struct.unpack_from("<3f", content, 108)
    shape = dim[1 : 1 + dim[0]]
    data = np.frombuffer(content, "<" + _TYPES[datatype], int(np.prod(shape)), int(offset)).reshape(shape, order="F")
    if np.isfinite([slope, intercept]).all() and (slope, intercept) not in ((0, 0), (1, 0)):
        data = data * float(slope) + float(intercept)
    return data, np.array(pixdim[1:4], dtype=np.float64)


def field_names(fixed: str, moving: str) -> list[str]:
    """Names that the evaluation accepts for the field of a pair of images."""
    a, b = fixed[-16:-12], moving[-16:-12]
    c, d = fixed[-11:-7], moving[-11:-7]
    names = [f"disp_{a}_{c}_{b}_{d}.nii.gz"]
    return [*names, f"disp_{a}_{b}.nii.gz"] if (c, d) == ("0000", "0001") else names


def evaluate(dataset_json: Path, submission: Path | None) -> dict[tuple[str, str], dict[str, float]]:
    """Figures of every pair of `registration_val`.

    Args:
        dataset_json: TASK_dataset.json.
        submission: folder of disp_*.nii.gz; zero fields when None.

    Returns:
        (fixed, moving) file names -> figure -> value.
    """
    folder = dataset_json.parent
    content = json.loads(dataset_json.read_text())
    shape = tuple(content["tensorImageShape"]["0"])
    results = {}
    for pair in content["registration_val"]:
        fixed, moving = Path(pair["fixed"]).name, Path(pair["moving"]).name
        if submission is None:
            field = np.zeros((*shape, 3))
        else:
            found = [submission / name for name in field_names(fixed, moving) if (submission / name).is_file()]
            assert len(found) == 1, (fixed, moving, found)
            field = read_nifti(found[0])[0].astype(np.float64)
        assert field.shape == (*shape, 3) and np.isfinite(field).all(), field.shape
        results[fixed, moving] = _figures(folder, fixed, moving, field, masked=content["pairings"] != "unpaired")
    return results


def _figures(folder: Path, fixed: str, moving: str, field: np.ndarray, *, masked: bool) -> dict[str, float]:
    # "masked_evaluation" of the challenges' configs: NLST and AbdomenMRCT, not OASIS and AbdomenCTCT
    mask = read_nifti(folder / "masksTr" / fixed)[0] > 0 if masked else None
    determinant = jacobian(field)
    values = {
        "sdlogj": sdlogj(determinant, mask),
        "folding_percent": 100 * float(np.mean(determinant[1:-1, 1:-1, 1:-1] <= 0)),
    }
    if (folder / "labelsTr" / fixed).is_file():
        fixed_label, moving_label = (read_nifti(folder / "labelsTr" / name)[0].astype(int) for name in (fixed, moving))
        identity = np.stack(np.meshgrid(*(np.arange(n) for n in fixed_label.shape), indexing="ij"))
        warped = map_coordinates(moving_label, identity + np.moveaxis(field, -1, 0), order=0)
        values |= overlap(fixed_label, moving_label, warped)
    name = fixed.replace(".nii.gz", ".csv")
    if (folder / "keypointsTr" / name).is_file():
        points = [
            np.loadtxt(folder / "keypointsTr" / n.replace(".nii.gz", ".csv"), delimiter=",") for n in (fixed, moving)
        ]
        spacing = read_nifti(folder / "imagesTr" / moving)[1]
        moved = points[0] + np.stack([map_coordinates(field[..., c], points[0].T, order=3) for c in range(3)], axis=1)
        values["tre_mm"] = float(np.linalg.norm((moved - points[1]) * spacing, axis=1).mean())
    return values


def jacobian(field: np.ndarray) -> np.ndarray:
    """(D, H, W) determinants of p + field(p): central differences, zeros beyond the border."""
    gradient = np.empty((*field.shape[:3], 3, 3))
    for c, axis in product(range(3), range(3)):
        gradient[..., c, axis] = correlate1d(field[..., c], [-0.5, 0, 0.5], axis=axis, mode="constant")
    return np.linalg.det(gradient + np.eye(3))


def sdlogj(determinant: np.ndarray, mask: np.ndarray | None) -> float:
    """Standard deviation of log(det + 3), two voxels away from the border, in the mask where there is one."""
    inner = (slice(2, -2),) * 3
    values = np.log(np.clip(determinant[inner] + 3, 1e-9, 1e9))
    return float(values.std() if mask is None else values[mask[inner]].std())


def overlap(fixed: np.ndarray, moving: np.ndarray, warped: np.ndarray) -> dict[str, float]:
    """Dice and HD95 over the labels that both scans have; Dice over all volumes together."""
    dice, distance = [], []
    for label in range(1, int(max(fixed.max(), moving.max())) + 1):
        a, b = fixed == label, warped == label
        if not a.any() or not (moving == label).any():
            continue
        dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
        distance.append(hd95(a, b))
    both = ((fixed == warped) & (fixed > 0)).sum()
    return {
        "dice": float(np.mean(dice)),
        "hd95": float(np.mean(distance)),
        "dice_micro": float(2 * both / ((fixed > 0).sum() + (warped > 0).sum())),
    }


def hd95(a: np.ndarray, b: np.ndarray) -> float:
    """Robust Hausdorff distance of DeepMind's surface-distance at spacing 1: the 95th percentile by surface area."""
    if not b.any():
        return float("inf")
    codes = [_neighbour_codes(mask) for mask in (a, b)]
    borders = [(code != 0) & (code != 255) for code in codes]
    worst = 0.0
    for here, there in ((0, 1), (1, 0)):
        distances = distance_transform_edt(~borders[there])[borders[here]]
        areas = surface_areas()[codes[here][borders[here]]]
        order = np.argsort(distances, kind="stable")
        share = np.cumsum(areas[order]) / areas.sum()
        worst = max(worst, float(distances[order][min(int(np.searchsorted(share, 0.95)), len(order) - 1)]))
    return worst


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """For each corner of the voxels the pattern of the eight voxels around it, a number from 0 to 255."""
    weights = 2 ** np.arange(8).reshape(2, 2, 2)
    return correlate(np.pad(mask.astype(int), 2), weights, mode="constant")[1:, 1:, 1:]


@cache
def surface_areas() -> np.ndarray:
    """(256,) area of the surface between the corners of a unit cube that are set and those that are not.

    Each group of corners, of the kind that is rarer, that hang together along edges is cut off by one patch whose
    outline runs through the middles of the cut edges. The triangles of the package's table are those of the largest
    area over that outline.
    """
    corners = list(product((0, 1), repeat=3))
    areas = np.zeros(256)
    for code in range(256):
        rest = {corner for bit, corner in enumerate(corners) if code >> bit & 1}
        rest = rest if len(rest) <= 4 else set(corners) - rest
        while rest:
            group, new = set(), {rest.pop()}
            while new:
                group |= new
                new = {c for c in rest for g in group if _is_edge(c, g)}
                rest -= new
            areas[code] += _largest_area(_outline(group, corners))
    return areas


def _is_edge(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) == 1


def _outline(group: set[tuple[int, ...]], corners: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Middles of the cut edges in the order in which the patch's outline passes them, from face to face."""
    cut = [(c, n) for c in group for n in corners if n not in group and _is_edge(c, n)]
    links: dict[tuple, list[tuple]] = {edge: [] for edge in cut}
    for axis, side in product(range(3), (0, 1)):
        in_face = [edge for edge in cut if edge[0][axis] == edge[1][axis] == side]
        for first, second in combinations(in_face, 2):
            if len(in_face) == 2 or first[0] == second[0]:
                links[first].append(second)
                links[second].append(first)
    outline = [cut[0], links[cut[0]][0]]
    while len(outline) < len(cut):
        outline += [edge for edge in links[outline[-1]] if edge != outline[-2]]
    return [np.add(*edge) / 2 for edge in outline]


def _largest_area(outline: list[np.ndarray]) -> float:
    @cache
    def best(first: int, last: int) -> float:
        if last - first < 2:
            return 0.0
        corner, side = outline[first], outline[last] - outline[first]
        return max(
            best(first, k) + best(k, last) + np.linalg.norm(np.cross(outline[k] - corner, side)) / 2
            for k in range(first + 1, last)
        )

    return best(0, len(outline) - 1)
