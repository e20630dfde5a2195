"""Cutting a volume into patches and putting results of the patches together again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import torch
from torch import Tensor

__all__ = ["PatchGrid"]

Box = tuple[slice, slice, slice]


class PatchGrid:
    """Patches of one size that cover a volume, with weights that blend them without seams.

    MONAI's `SlidingWindowInferer` takes everything that a patch needs as channels of one tensor of the volume's size
    (for RWCNet's finest stage 66 channels, 1.8 GiB for a brain at 1 mm), and its Gaussian weights do not end at 0, so
    that a small jump stays at the patches' borders. Here the caller cuts what it needs, and the weights fall linearly
    to 0 across the overlap.

    Args:
        shape: (D, H, W) of the volume.
        patches: number of patches along each axis.
        overlap: voxels that neighbours share along an axis, at least; rounding up to `multiple` can make it more.
        multiple: patches start at and end on multiples of this; the volume's sizes must be multiples of it.

    Raises:
        ValueError: when the numbers are not positive, or a size is no multiple of `multiple`.
    """

    def __init__(self, shape: Sequence[int], *, patches: Sequence[int], overlap: int = 0, multiple: int = 1) -> None:
        if len(shape) != 3 or len(patches) != 3 or min(*shape, *patches, multiple) < 1 or overlap < 0:
            raise ValueError(f"cannot cut {tuple(shape)} into {tuple(patches)} patches with an overlap of {overlap}")
        if any(n % multiple for n in shape):
            raise ValueError(f"a volume {tuple(shape)} cannot be cut at multiples of {multiple} only")
        self.shape = tuple(int(n) for n in shape)
        self.multiple = multiple
        size, self.starts = [], []
        for n, count in zip(self.shape, patches, strict=True):
            covering = -(-(n + overlap * (count - 1)) // count)
            extent = min(-(-covering // multiple) * multiple, n)
            starts = _starts(n, extent, count, multiple)
            # Rounding the starts to multiples can have left two neighbours too far apart.
            while extent < n and any(later > start + extent - overlap for start, later in pairwise(starts)):
                extent += multiple
                starts = _starts(n, extent, count, multiple)
            size.append(extent)
            self.starts.append(starts)
        self.size = size[0], size[1], size[2]

    @property
    def boxes(self) -> list[Box]:
        """Each patch as slices, the last axis changing fastest."""
        d, h, w = self.size
        return [(slice(i, i + d), slice(j, j + h), slice(k, k + w)) for i, j, k in product(*self.starts)]

    def cut(self, volume: Tensor) -> list[Tensor]:
        """(B, C, D, H, W) -> views (B, C, d, h, w) in the order of `boxes`.

        Raises:
            ValueError: when the volume has another shape.
        """
        if tuple(volume.shape[2:]) != self.shape:
            raise ValueError(f"a volume {tuple(volume.shape)} is not of the shape {self.shape} that is cut")
        return [volume[(..., *box)] for box in self.boxes]

    def join(self, patches: Sequence[Tensor]) -> Tensor:
        """Patches (B, C, d, h, w) in the order of `boxes` -> (B, C, D, H, W), blended where they overlap."""
        if len(patches) == 1:
            return patches[0]
        first = patches[0]
        joined = first.new_zeros((*first.shape[:2], *self.shape))
        windows = [
            _windows(starts, size, n) for starts, size, n in zip(self.starts, self.size, self.shape, strict=True)
        ]
        for patch, box, (wd, wh, ww) in zip(patches, self.boxes, product(*windows), strict=True):
            weight = wd[:, None, None] * wh[None, :, None] * ww[None, None, :]
            joined[(..., *box)] += weight.to(patch) * patch
        return joined


def _starts(length: int, size: int, count: int, multiple: int) -> list[int]:
    """First and last patch touch the border, the others stand evenly between; equal ones count once."""
    last = (length - size) // multiple
    return sorted({round(i * last / max(count - 1, 1)) * multiple for i in range(count)})


def _windows(starts: Sequence[int], size: int, length: int) -> list[Tensor]:
    """Weights (size,) of each patch along one axis; at every voxel they add up to 1."""
    windows = []
    for i, start in enumerate(starts):
        window = torch.ones(size)
        if i > 0:
            shared = starts[i - 1] + size - start
            window[:shared] *= (torch.arange(shared) + 0.5) / max(shared, 1)
        if i + 1 < len(starts):
            shared = start + size - starts[i + 1]
            window[size - shared :] *= (torch.arange(shared).flip(0) + 0.5) / max(shared, 1)
        windows.append(window)
    total = torch.zeros(length)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + size] += window  # 1 already, but where three patches meet on one axis
    return [window / total[start : start + size] for start, window in zip(starts, windows, strict=True)]
