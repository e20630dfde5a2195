"""Similarity of two images (D, H, W): NCC, MSE, SSIM and normalised mutual information, with an optional mask.

Images and masks may have leading axes of length 1. Every function raises ValueError when the shapes differ and returns
NaN for an empty mask.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from common.losses._checks import centre_crop, masked_mean
from common.losses.similarity import ssim_map
from common.metrics._arrays import ArrayLike, to_mask, to_volume

__all__ = ["mse", "ncc", "nmi", "ssim"]


def _volumes(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = to_volume(a).astype(np.float64), to_volume(b).astype(np.float64)
    if x.shape != y.shape:
        raise ValueError(f"the images have different shapes, {x.shape} and {y.shape}")
    return x, y


def _values(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    x, y = _volumes(a, b)
    inside = to_mask(mask, x.shape)
    return (x.ravel(), y.ravel()) if inside is None else (x[inside], y[inside])


def ncc(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Global normalised cross-correlation (Pearson), in [-1, 1], 1 for linearly related images.

    0 when one image is constant: nothing correlates with it.
    """
    x, y = _values(a, b, mask)
    if x.size == 0:
        return math.nan
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))


def mse(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Mean squared difference, intensity squared, in [0, inf)."""
    x, y = _values(a, b, mask)
    return float(np.mean((x - y) ** 2)) if x.size else math.nan


def ssim(
    a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None, *, window: int = 7, data_range: float = 1.0
) -> float:
    """Mean structural similarity over uniform 3-D windows wholly inside the volume, in [-1, 1], 1 for equal images.

    Args:
        a, b: images (D, H, W).
        mask: (D, H, W), average the windows centred inside.
        window: odd edge length in voxels.
        data_range: intensity range of the images.

    Raises:
        ValueError: also when the window is even or does not fit into the volume.
    """
    x, y = _volumes(a, b)
    if window % 2 == 0 or min(x.shape) < window:
        raise ValueError(f"the window must be odd and fit into {x.shape}, got {window}")
    inside = to_mask(mask, x.shape)
    ta, tb = (torch.from_numpy(v.astype(np.float32))[None, None] for v in (x, y))
    values = ssim_map(ta, tb, window=window, data_range=data_range)
    if inside is None:
        return float(values.mean())
    centres = centre_crop(torch.from_numpy(inside)[None, None], window)
    return float(masked_mean(values, centres)) if bool(centres.any()) else math.nan


def nmi(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None, *, bins: int = 64) -> float:
    """Normalised mutual information (Studholme), `(H(a) + H(b)) / H(a, b)`, in [1, 2].

    1 for independent images, 2 for images that determine each other. From a joint histogram over each image's own
    range; few voxels per bin raise the value. 1 when both images are constant.

    Args:
        a, b: images (D, H, W).
        mask: (D, H, W), voxels to count.
        bins: bins per image.
    """
    x, y = _values(a, b, mask)
    if x.size == 0:
        return math.nan
    joint = np.histogram2d(x, y, bins=bins)[0] / x.size
    h_joint = _entropy(joint)
    return (_entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=0))) / h_joint if h_joint > 0 else 1.0


def _entropy(p: np.ndarray) -> float:
    positive = p[p > 0]
    return float(-(positive * np.log(positive)).sum())
