"""Taking the folds out of a displacement field."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from common.geometry.fields import jacobian_determinant

__all__ = ["remove_folding"]

_REACH = 2  # voxels around a fold that give way, too
_ROUNDS = 4  # over the field: smoothing one fold away may leave another beside it


def remove_folding(ddf: Tensor, *, smallest: float = 0.05, iterations: int = 60) -> tuple[Tensor, int]:
    """Smooth a field where it folds, and nowhere else.

    Around each group of voxels whose Jacobian determinant is not above `smallest`, 3^3 mean filters are blended in,
    in full at the group and not at all beyond 2 voxels away from it, until the group is gone. A field without such
    voxels is returned as it is. The work is that of finding the groups, and small for each.

    Args:
        ddf: (3, D, H, W), voxels.
        smallest: determinant that every voxel is to exceed.
        iterations: most filters for one group in one of four rounds.

    Returns:
        (3, D, H, W), and the number of voxels that did not exceed `smallest` before. Of a field that folds by the per
        cent, some folds are left, smaller.
    """
    before = 0
    for turn in range(_ROUNDS):
        folded = _determinant(ddf) <= smallest  # (D, H, W)
        if turn == 0:
            before = int(folded.sum())
            ddf = ddf.clone() if before else ddf
        if not folded.any():
            break
        near = ndimage.binary_dilation(folded.cpu().numpy(), iterations=_REACH)
        groups, _ = ndimage.label(near)
        for found in ndimage.find_objects(groups):
            box = (slice(None), *(slice(max(side.start - 2, 0), side.stop + 2) for side in found))
            movable = torch.zeros_like(ddf[box][:1])
            movable[:, *(slice(s.start - b.start, s.stop - b.start) for s, b in zip(found, box[1:], strict=True))] = 1
            ddf[box] = _smooth_until_flat(ddf[box], movable, smallest, iterations)
    return ddf, before


def _smooth_until_flat(ddf: Tensor, movable: Tensor, smallest: float, iterations: int) -> Tensor:
    """Of a box, the part that is `movable`, (1, D, H, W), 0 or 1."""
    for _ in range(iterations):
        folded = _determinant(ddf) <= smallest
        if not folded.any():
            break
        weight = F.max_pool3d(folded[None, None].float(), 3, stride=1, padding=1)
        weight = _mean(weight)[0] * movable
        ddf = ddf + weight * (_mean(ddf[None])[0] - ddf)
    return ddf


def _determinant(ddf: Tensor) -> Tensor:
    """(3, D, H, W) -> (D, H, W); the field goes on beyond the border as it ends."""
    return jacobian_determinant(F.pad(ddf[None], (1,) * 6, mode="replicate"))[0, 0]


def _mean(volume: Tensor) -> Tensor:
    return F.avg_pool3d(F.pad(volume, (1,) * 6, mode="replicate"), 3, stride=1)
