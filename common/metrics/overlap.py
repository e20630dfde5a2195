"""Agreement of label maps: Dice (macro and micro) and the 95th percentile Hausdorff distance of Learn2Reg."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from itertools import product

import numpy as np
from scipy import ndimage

from common.metrics._arrays import ArrayLike, to_labels

__all__ = ["dice_macro", "dice_micro", "dice_per_label", "hd95", "hd95_per_label", "surface_distance_percentile"]


def dice_per_label(
    fixed: ArrayLike, warped: ArrayLike, labels: Iterable[int] | None = None, *, moving: ArrayLike | None = None
) -> dict[int, float]:
    """Dice coefficient of each label, in [0, 1].

    Args:
        fixed: label map (D, H, W).
        warped: the moving label map on the fixed grid (nearest neighbour), same shape.
        labels: the values to compare; by default every non-zero value of either map.
        moving: the moving label map before warping, any shape. Given, a label missing there is NaN, as in Learn2Reg;
            otherwise a label that `warped` lacks scores 0.

    Returns:
        label -> Dice; NaN for a label missing in the fixed (or moving) map.

    Raises:
        ValueError: when the maps' shapes differ or hold no label values.
    """
    f, w = _pair(fixed, warped)
    values = _labels(f, w, labels)
    in_moving = None if moving is None else set(np.unique(to_labels(moving)).tolist())
    both, volume_f, volume_w = _counts(f, w, values)
    scores = {}
    for i, label in enumerate(values):
        missing = volume_f[i] == 0 or (in_moving is not None and label not in in_moving)
        scores[label] = math.nan if missing else float(2 * both[i] / (volume_f[i] + volume_w[i]))
    return scores


def dice_macro(
    fixed: ArrayLike, warped: ArrayLike, labels: Iterable[int] | None = None, *, moving: ArrayLike | None = None
) -> float:
    """Mean Dice over the labels present (Learn2Reg's figure), in [0, 1]; NaN when there is none.

    Arguments as for `dice_per_label`.
    """
    return _nanmean(dice_per_label(fixed, warped, labels, moving=moving).values())


def dice_micro(fixed: ArrayLike, warped: ArrayLike, labels: Iterable[int] | None = None) -> float:
    """Volume-weighted Dice, `2 * sum of intersections / sum of volumes` over the labels, in [0, 1]; NaN without any.

    The figure that RWCNet's code reports. Large structures dominate, so it is usually above `dice_macro`; the two must
    not be compared. Arguments as for `dice_per_label`.
    """
    f, w = _pair(fixed, warped)
    both, volume_f, volume_w = _counts(f, w, _labels(f, w, labels))
    total = volume_f.sum() + volume_w.sum()
    return float(2 * both.sum() / total) if total else math.nan


def hd95_per_label(
    fixed: ArrayLike, warped: ArrayLike, labels: Iterable[int] | None = None, *, moving: ArrayLike | None = None
) -> dict[int, float]:
    """95th percentile Hausdorff distance of each label in voxels, as the Learn2Reg evaluation computes it.

    Args:
        fixed: label map (D, H, W).
        warped: the moving label map on the fixed grid (nearest neighbour), same shape.
        labels: the values to compare; by default every non-zero value of either map.
        moving: the moving label map before warping; given, a label missing there is NaN, as in Learn2Reg.

    Returns:
        label -> distance in voxels, whatever the spacing; NaN for a label missing in the fixed (or moving) map, inf
        for one that `warped` lacks. See `surface_distance_percentile`.

    Raises:
        ValueError: when the maps' shapes differ or hold no label values.
    """
    f, w = _pair(fixed, warped)
    in_moving = None if moving is None else set(np.unique(to_labels(moving)).tolist())
    distances = {}
    for label in _labels(f, w, labels):
        mask = f == label
        missing = not mask.any() or (in_moving is not None and label not in in_moving)
        distances[label] = math.nan if missing else surface_distance_percentile(mask, w == label)
    return distances


def hd95(
    fixed: ArrayLike, warped: ArrayLike, labels: Iterable[int] | None = None, *, moving: ArrayLike | None = None
) -> float:
    """Mean of `hd95_per_label` over the labels present, voxels; NaN when there is none, inf when one vanished."""
    return _nanmean(hd95_per_label(fixed, warped, labels, moving=moving).values())


def surface_distance_percentile(a: np.ndarray, b: np.ndarray, percentile: float = 95.0) -> float:
    """Surface-area weighted percentile of the distances between two surfaces, the larger of both directions.

    Agrees with `compute_robust_hausdorff` of the package surface-distance (DeepMind) at spacing (1, 1, 1): a surface
    element sits at each corner of the voxel lattice whose 2 x 2 x 2 neighbourhood is mixed; its weight is the area of
    the marching-cubes surface there (`_surfel_areas`, all 256 equal to the package's table to 1e-15); its distance is
    the one to the other mask's nearest element; the percentile is the first distance at which the cumulated area
    reaches the fraction. Voxels outside the array count as background, so a mask at the border has a surface there.

    Args:
        a, b: (D, H, W) bool.
        percentile: in (0, 100].

    Returns:
        voxels; inf when one mask is empty, NaN when both are.
    """
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"the masks must be (D, H, W) of one shape, got {a.shape} and {b.shape}")
    a, b = a.astype(bool), b.astype(bool)
    if not a.any() or not b.any():
        return math.inf if a.any() or b.any() else math.nan
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    border_a, area_a = _surfels(a[box])
    border_b, area_b = _surfels(b[box])
    to_b = ndimage.distance_transform_edt(~border_b)[border_a]
    to_a = ndimage.distance_transform_edt(~border_a)[border_b]
    fraction = percentile / 100.0
    return max(_weighted_percentile(to_b, area_a, fraction), _weighted_percentile(to_a, area_b, fraction))


def _surfels(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lattice corners (n + 1 along each axis) that carry surface, and the areas of those that do."""
    padded = np.pad(mask, 1).astype(np.uint8)
    d, h, w = (n - 1 for n in padded.shape)
    code = np.zeros((d, h, w), dtype=np.uint8)
    for bit, (i, j, k) in enumerate(product((0, 1), repeat=3)):
        code |= padded[i : i + d, j : j + h, k : k + w] << bit
    border = (code != 0) & (code != 255)
    return border, _surfel_areas()[code[border]]


@cache
def _surfel_areas() -> np.ndarray:
    """(256,) area of the surface within a 2 x 2 x 2 neighbourhood, unit spacing, for each pattern of its corners.

    The surface passes through the midpoints of the edges between unlike corners and separates the rarer kind of
    corner. Each group of such corners that hang together along edges has a patch of its own:
    one corner: a triangle of side sqrt(1/2), area t = sqrt(3)/8; two: a rectangle, sqrt(1/2); three (an L): a right
    triangle of area 1/2 and a trapezium of three t; four in a square: 1; a corner with its three neighbours: a regular
    hexagon, 6 t; four in a chain: 4 t + sqrt(1/2).
    """
    t = math.sqrt(3.0) / 8.0
    corners = list(product((0, 1), repeat=3))
    areas = np.zeros(256)
    for code in range(256):
        rest = {c for bit, c in enumerate(corners) if code >> bit & 1}
        if len(rest) > 4:
            rest = set(corners) - rest
        while rest:
            group = [rest.pop()]
            for c in group:  # grows while it is walked through
                near = {n for n in rest if _adjacent(c, n)}
                rest -= near
                group.extend(near)
            degrees = sorted(sum(_adjacent(c, n) for n in group) for c in group)
            if degrees == [2, 2, 2, 2]:
                areas[code] += 1.0
            elif degrees == [1, 1, 1, 3]:
                areas[code] += 6 * t
            else:
                areas[code] += (t, math.sqrt(0.5), 0.5 + 3 * t, 4 * t + math.sqrt(0.5))[len(group) - 1]
    return areas


def _adjacent(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return sum(x != y for x, y in zip(a, b, strict=True)) == 1


def _weighted_percentile(distances: np.ndarray, areas: np.ndarray, fraction: float) -> float:
    order = np.lexsort((areas, distances))
    cumulated = np.cumsum(areas[order]) / areas.sum()
    index = min(int(np.searchsorted(cumulated, fraction)), len(order) - 1)
    return float(distances[order][index])


def _pair(fixed: ArrayLike, warped: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    f, w = to_labels(fixed), to_labels(warped)
    if f.shape != w.shape:
        raise ValueError(f"the label maps have different shapes, {f.shape} and {w.shape}")
    return f, w


def _labels(f: np.ndarray, w: np.ndarray, labels: Iterable[int] | None) -> list[int]:
    if labels is not None:
        wanted = [int(label) for label in labels]
        if min(wanted, default=0) < 0:
            raise ValueError(f"labels must not be negative, got {wanted}")
        return wanted
    return [int(v) for v in np.union1d(np.unique(f), np.unique(w)) if v != 0]


def _counts(f: np.ndarray, w: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels of each label in both maps at once, in the first and in the second."""
    size = max([int(f.max()), int(w.max()), *labels], default=0) + 1
    counts = [np.bincount(x.ravel(), minlength=size) for x in (f[f == w], f, w)]
    both, volume_f, volume_w = (c[labels] if labels else np.zeros(0, dtype=np.int64) for c in counts)
    return both, volume_f, volume_w


def _nanmean(values: Iterable[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return float(np.mean(present)) if present else math.nan
