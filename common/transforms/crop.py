"""Both scans of a pair cropped or padded about their centre, voxel by voxel, with all that belongs to them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, ResizeWithPadOrCrop
from torch import Tensor

from common.errors import InputError

__all__ = ["CropOrPadPaird"]

_VOLUMES = tuple(f"{role}{kind}" for kind in ("", "_label", "_mask") for role in ("fixed", "moving"))
_ROLES = ("fixed", "moving")


class CropOrPadPaird(MapTransform):
    """Crop or pad a pair about its centre to a given number of voxels; nothing is interpolated.

    MONAI's `ResizeWithPadOrCrop` for each volume, its padding the image's minimum and 0 for labels and masks. Key
    points, which MONAI's cropping leaves where they are, move along; one that lies outside afterwards stays in its row.

    Args:
        shape: voxels along each array axis; None for an axis that keeps its length. All keep it when None.
        multiple: the lengths of the other axes are padded to multiples of it.

    Raises:
        InputError: when the pair lacks a scan, or a volume is not 3D; the scans are MetaTensors, as LoadImaged's are.
        ValueError: when an option cannot be.
    """

    def __init__(self, *, shape: Sequence[int | None] | None = None, multiple: int = 1) -> None:
        super().__init__(_VOLUMES, allow_missing_keys=True)
        if shape is not None and (len(shape) != 3 or any(n is not None and n < 1 for n in shape)):
            raise ValueError(f"a crop has three lengths in voxels, each above 0 or None, not {shape}")
        if multiple < 1:
            raise ValueError(f"lengths are multiples of 1 or more voxels, not of {multiple}")
        self.shape: Sequence[int | None] = [None] * 3 if shape is None else list(shape)
        self.multiple = multiple

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop or pad the pair."""
        result = dict(data)
        for key in _ROLES:
            if key not in data:
                raise InputError(f"a pair needs 'fixed' and 'moving', and there is no '{key}'")
        for key in self.key_iterator(result):
            volume = result[key]
            if volume.ndim != 4:
                raise InputError(f"'{key}' must be 3D with a channel axis, and its shape is {tuple(volume.shape)}")
            padding = float(volume.min()) if key in _ROLES else 0.0
            result[key] = ResizeWithPadOrCrop(self._target(volume.shape[1:]), value=padding)(volume)
        for role in _ROLES:
            key = f"{role}_keypoints"
            if key in result:
                points = torch.as_tensor(result[key])
                result[key] = points - _first_voxel(data[role], result[role]).to(points.dtype)
        return result

    def _target(self, size: Sequence[int]) -> list[int]:
        lengths = zip(self.shape, size, strict=True)
        return [-(-int(n) // self.multiple) * self.multiple if wanted is None else wanted for wanted, n in lengths]


def _first_voxel(before: MetaTensor, after: MetaTensor) -> Tensor:
    """(3,) voxel that has become voxel 0, negative where the volume was padded: as MONAI's affines tell."""
    moved = np.linalg.solve(before.affine.cpu().double().numpy(), after.affine.cpu().double().numpy())
    return torch.from_numpy(np.rint(moved[:3, 3]))
