"""How far a network can be trusted at each voxel: the spread of its answers to mirrored copies of the same pair."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from common.geometry.spaces import Grid

__all__ = ["TakeUncertaintyd", "mirrored_spread"]

# Axes of (B, C, D, H, W) along which the copies are mirrored; the first is the pair itself.
_MIRRORS: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (4,))


def mirrored_spread(
    estimate: Callable[[Tensor], Sequence[Tensor]], image: Tensor, *, mirrors: Sequence[Sequence[int]] = _MIRRORS
) -> tuple[Tensor, Tensor]:
    """Appearance uncertainty by test-time augmentation.

    A mirrored pair has the mirrored field for its answer. What a network answers differently comes from its weights
    and not from the anatomy. The spread is the root of the mean squared distance of the answers from their mean.

    Args:
        estimate: (B, 2, D, H, W) -> fields (B, 3, D, H, W), coarse to fine, all at the image's size, in voxels.
        image: (B, 2, D, H, W).
        mirrors: axes of each copy.

    Returns:
        the last field of the pair itself, (B, 3, D, H, W) in voxels, and the spread of each field, (B, L, D, H, W),
        in voxels, coarse to fine.
    """
    ddf = total = squares = None
    for axes in mirrors:
        fields = [_mirror(field.float(), axes) for field in estimate(image.flip(tuple(axes)) if axes else image)]
        answer = torch.stack(fields, dim=1)  # (B, L, 3, D, H, W)
        if total is None or squares is None:
            reference = answer  # its spread is the same about any point; near the answers, it is also exact
            ddf, total, squares = fields[-1], torch.zeros_like(answer), answer.new_zeros(answer[:, :, 0].shape)
        answer = answer - reference
        total += answer
        squares += answer.square().sum(dim=2)
    if ddf is None or total is None or squares is None:
        raise ValueError("a spread needs at least one answer")
    mean = total / len(mirrors)
    variance = squares / len(mirrors) - mean.square().sum(dim=2)
    return ddf, variance.clamp_min(0).sqrt()


def _mirror(field: Tensor, axes: Sequence[int]) -> Tensor:
    """A field mirrored along axes of space: its component along each of them changes sign."""
    if not axes:
        return field
    sign = field.new_tensor([-1.0 if axis + 2 in axes else 1.0 for axis in range(3)]).view(1, 3, 1, 1, 1)
    return field.flip(tuple(axes)) * sign


class TakeUncertaintyd(Transform):
    """Part what `PaddedInferer(uncertainty=True)` returns: `pred`, and `uncertainty` (L, D, H, W) in mm.

    Does nothing where there is a field alone.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        pred = result["pred"].as_tensor() if isinstance(result["pred"], MetaTensor) else result["pred"]
        pred = pred[0] if pred.ndim == 5 else pred
        if pred.shape[0] > 3:
            grid: Grid = result["network_grid"]
            result["pred"] = pred[:3]
            result["uncertainty"] = pred[3:] * float(grid.spacing.mean())  # network grids are isotropic
        return result
