"""What the metrics accept: numpy arrays and tensors, with or without leading axes of length 1."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["ArrayLike", "to_field", "to_labels", "to_mask", "to_points", "to_volume"]

ArrayLike = np.ndarray | Tensor


def _to_numpy(array: ArrayLike) -> np.ndarray:
    if isinstance(array, Tensor):
        tensor = array.detach().cpu()
        # numpy knows no bfloat16
        return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    return np.asarray(array)


def to_volume(array: ArrayLike) -> np.ndarray:
    """(D, H, W) of an array (D, H, W), (1, D, H, W) or (1, 1, D, H, W).

    Raises:
        ValueError: for another shape.
    """
    volume = _to_numpy(array)
    if volume.ndim < 3 or any(n != 1 for n in volume.shape[:-3]):
        raise ValueError(f"a metric takes one volume (D, H, W) at a time, got {volume.shape}")
    return volume.reshape(volume.shape[-3:])


def to_labels(array: ArrayLike) -> np.ndarray:
    """(D, H, W) int64 of a label map.

    Raises:
        ValueError: for another shape, for fractions (a label map that was interpolated) and for negative labels.
    """
    volume = to_volume(array)
    labels = volume.astype(np.int64)
    if volume.dtype.kind == "f" and not np.array_equal(labels, volume):
        raise ValueError("a label map holds values that are not integers; warp labels with mode='nearest'")
    if labels.size and labels.min() < 0:
        raise ValueError(f"a label map holds negative values, down to {labels.min()}")
    return labels


def to_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """(D, H, W) bool of a mask that must have the given shape, None for None.

    Raises:
        ValueError: when the shape differs.
    """
    if mask is None:
        return None
    volume = to_volume(mask) > 0
    if volume.shape != shape:
        raise ValueError(f"a mask of shape {volume.shape} does not fit a volume of shape {shape}")
    return volume


def to_field(ddf: ArrayLike) -> Tensor:
    """(1, 3, D, H, W) float32 of a field (3, D, H, W) or (1, 3, D, H, W), on its own device.

    Raises:
        ValueError: for another shape (Learn2Reg's (D, H, W, 3) must be converted first), and for values that are not
            finite, which every comparison with 0 would overlook.
    """
    if isinstance(ddf, Tensor):
        field = ddf.detach().float()
    else:
        field = torch.from_numpy(np.ascontiguousarray(ddf, dtype=np.float32))
    if field.ndim == 4:
        field = field[None]
    if field.ndim != 5 or tuple(field.shape[:2]) != (1, 3):
        raise ValueError(f"a metric takes one field (3, D, H, W) at a time, got {tuple(ddf.shape)}")
    if not bool(torch.isfinite(field).all()):
        raise ValueError("the field holds values that are not finite")
    return field


def to_points(points: ArrayLike) -> np.ndarray:
    """(N, 3) float64.

    Raises:
        ValueError: for another shape.
    """
    array = _to_numpy(points).astype(np.float64)
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"points must be (N, 3), got {array.shape}")
    return array
