"""Dice of structures with a left and a right label, each label warped by itself: TransMorph's way with IXI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from common.metrics._arrays import ArrayLike, to_field, to_labels
from common.metrics.overlap import _nanmean, dice_per_label

__all__ = ["dice_per_structure", "warp_labels"]

_SLAB = 2**19  # voxels at a time, whose intermediate arrays fit into a cache


def warp_labels(labels: ArrayLike, ddf: ArrayLike) -> np.ndarray:
    """Warp the map of each label by itself, trilinearly, and keep the strongest label of each voxel.

    The boundaries come out smoother than by nearest neighbour, which brings 0.006 to 0.007 of Dice on IXI. Equal to an
    argmax over the warped one-hot channels, 0 outside, the lowest of equally strong labels; but no channels are made:
    only the labels of the eight voxels around a position can be the strongest.

    Args:
        labels: (D, H, W).
        ddf: (3, D', H', W') or (1, 3, D', H', W'), voxels: the value at p comes from p + ddf(p).

    Returns:
        (D', H', W') int64.

    Raises:
        ValueError: when an argument has another shape or holds no labels.
    """
    source = to_labels(labels)
    field = to_field(ddf)[0].cpu().numpy()
    shape = field.shape[1:]
    result = np.empty(shape, dtype=np.int64)
    step = max(1, _SLAB // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        slab = slice(start, min(start + step, shape[0]))
        base = np.indices(field[0, slab].shape)
        base[0] += start
        result[slab] = _strongest(source, base + field[:, slab].astype(np.float64))
    return result


def _strongest(source: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Label with the largest sum of trilinear weights at positions (3, ...)."""
    low = np.floor(at)
    fraction = at - low
    low = low.astype(np.int64)
    around, weights = [], []
    for corner in product((0, 1), repeat=3):
        index, weight = [], np.ones(at.shape[1:])
        for axis, offset in enumerate(corner):
            i, n = low[axis] + offset, source.shape[axis]
            weight = weight * (fraction[axis] if offset else 1 - fraction[axis]) * ((i >= 0) & (i < n))
            index.append(np.clip(i, 0, n - 1))
        around.append(source[tuple(index)])
        weights.append(weight)
    best = np.zeros(at.shape[1:])
    label = np.zeros(at.shape[1:], dtype=np.int64)
    for candidate in around:
        total = sum(np.where(other == candidate, weight, 0.0) for other, weight in zip(around, weights, strict=True))
        better = (total > best) | ((total == best) & (total > 0) & (candidate < label))
        best, label = np.where(better, total, best), np.where(better, candidate, label)
    return label


def dice_per_structure(
    fixed: ArrayLike,
    warped: ArrayLike,
    structures: Mapping[str, Sequence[int]],
    *,
    moving: ArrayLike | None = None,
) -> dict[str, float]:
    """Mean Dice of the labels of each structure, in [0, 1]; NaN where none of them can be compared.

    Args:
        fixed: label map (D, H, W).
        warped: the moving label map on the fixed grid, same shape.
        structures: the labels of each, left and right.
        moving: see `dice_per_label`.

    Raises:
        ValueError: when the maps' shapes differ or hold no label values.
    """
    labels = [label for group in structures.values() for label in group]
    scores = dice_per_label(fixed, warped, labels, moving=moving)
    return {name: _nanmean(scores[label] for label in group) for name, group in structures.items()}
