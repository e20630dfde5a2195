"""Taking the folds out of a displacement field."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from common.geometry.fields import jacobian_determinant
from common.geometry.spaces import Grid, resample_to_grid

__all__ = ["remove_folding"]

_REACH = 2  # voxels around a fold that give way, too
_LEAST_AT_REST = 0.75  # below, the affine stage alone takes much of what the filter allows: good fields would suffer
_STEPS = 8  # for one group, before what is left of it is grouped anew: less and less is looked at
_ROUNDS = 25  # of such steps
_LOOKS = 10  # at another grid, at most
_SLAB = 16  # of that grid at a time: scans may be much larger than what a network sees
_RATE = 0.2  # voxels for a lack of 1
_SPARE = 0.02  # what a step aims at beyond the smallest determinant


def remove_folding(
    ddf: Tensor,
    *,
    grid: Grid | None = None,
    fixed_to_moving: np.ndarray | None = None,
    seen_on: Grid | None = None,
    smallest: float = 0.02,
) -> tuple[Tensor, int]:
    """Change a field where it folds, as little as that takes, and nowhere else.

    Around each group of voxels whose Jacobian determinant is not above `smallest`, the field goes down the gradient of
    what the determinants lack, until the group is gone. What is left of it after 200 steps is smoothed by 3^3 mean
    filters. Nothing changes beyond 2 voxels away from a group, and a field without such voxels is returned as it is.
    The work is that of finding the groups, and small for each.

    ITK 5's DisplacementFieldJacobianDeterminantFilter, SimpleITK's, too, leaves the image's direction out
    (https://github.com/InsightSoftwareConsortium/ITK/issues/5358): along a flipped axis it takes a stretch for a
    compression, and one to more than the double length for a fold. With the `grid` given, its determinant has to be
    above `smallest`, too, so that those who check a registration by that filter find no folds either.

    A field without folds on one grid may still have some on another: derivatives of a coarser one reach farther, and
    those of a finer one see each cell by itself. The field is changed where it folds on `seen_on`, too (0 or less).

    Args:
        ddf: (3, D, H, W), voxels.
        grid: of `ddf`.
        fixed_to_moving: (4, 4), LPS mm: the affine stage after `ddf`; the filter sees both stages.
        seen_on: the fixed scan's grid, on which the field is written and measured; needs `grid`.
        smallest: determinant that every voxel is to exceed.

    Returns:
        (3, D, H, W), and the number of voxels that did not exceed `smallest` before. Of a field that folds by the per
        cent, some folds are left, smaller.
    """
    measures = _measures(grid, fixed_to_moving)
    ddf, before = _mend(ddf, measures, smallest)
    if grid is not None and seen_on is not None and not seen_on.is_close_to(grid):
        ddf, seen = _mend_seen(ddf, grid, seen_on, measures, _measures(seen_on, fixed_to_moving), smallest)
        before += seen
    return ddf, before


_Box = tuple[slice, ...]


class _Measure(NamedTuple):
    """A determinant: `factor * det(base + A)`, A the derivative of the field in voxels."""

    base: np.ndarray
    factor: float


def _measures(grid: Grid | None, fixed_to_moving: np.ndarray | None) -> list[_Measure]:
    true = _Measure(np.eye(3), 1.0)
    itk = None if grid is None else _itk_measure(grid, fixed_to_moving)
    return [true] if itk is None else [true, itk]


def _itk_measure(grid: Grid, fixed_to_moving: np.ndarray | None) -> _Measure | None:
    """What ITK's filter sees of p -> fixed_to_moving(p + ddf(p)); None where the affine stage alone looks folded to it.

    With the direction R, the spacings S and the affine stage's matrix L, the filter takes the derivative of the
    displacement in mm along the image's axes for one along those of the patient: I + L R S (I + A) S^-1 - R. Its
    determinant is det(L) det(R) det(base + A), base = I + S^-1 R^-1 L^-1 (I - R) S.
    """
    spacing, direction = np.diag(grid.spacing), grid.direction
    matrix = np.eye(3) if fixed_to_moving is None else np.asarray(fixed_to_moving)[:3, :3]
    off_axis = np.linalg.inv(matrix @ direction @ spacing) @ (np.eye(3) - direction) @ spacing
    measure = _Measure(np.eye(3) + off_axis, float(np.linalg.det(matrix) * np.linalg.det(direction)))
    at_rest = measure.factor * np.linalg.det(measure.base)
    return measure if at_rest > _LEAST_AT_REST and np.abs(off_axis).max() > 1e-6 else None


def _mend(ddf: Tensor, measures: Sequence[_Measure], smallest: float) -> tuple[Tensor, int]:
    folded = _smallest_determinant(ddf, measures) <= smallest  # (D, H, W)
    before = int(folded.sum())
    ddf = ddf.clone() if before else ddf
    boxes = _groups(folded)
    for turn in range(2 * _ROUNDS):
        smooth = turn >= _ROUNDS
        boxes = [rest for box in boxes for rest in _mend_group(ddf, box, measures, smallest, by_smoothing=smooth)]
    return ddf, before


def _mend_seen(
    ddf: Tensor, grid: Grid, other: Grid, measures: Sequence[_Measure], seen: Sequence[_Measure], smallest: float
) -> tuple[Tensor, int]:
    """Change `ddf`, (3, D, H, W) on `grid`, where the voxels of `other` see it fold, and keep it as `_mend` left it.

    Returns:
        the field, and the number of these voxels.
    """
    count = 0
    boxes: list[_Box] = []
    for start in range(0, other.shape[0], _SLAB):
        slab = (slice(start, min(start + _SLAB, other.shape[0])), *(slice(0, n) for n in other.shape[1:]))
        number, found = _look(ddf, grid, other, slab, seen)
        count, boxes = count + number, boxes + found
    ddf = ddf.clone() if boxes else ddf
    for _ in range(_LOOKS):
        for box in boxes:
            _mend_seen_group(ddf, grid, other, box, seen)
        if boxes:
            ddf, _ = _mend(ddf, measures, smallest)
        boxes = [rest for box in boxes for rest in _look(ddf, grid, other, _grown(box, 2, other), seen)[1]]
    return ddf, count


def _look(ddf: Tensor, grid: Grid, other: Grid, box: _Box, measures: Sequence[_Measure]) -> tuple[int, list[_Box]]:
    """The number of voxels in a box of `other` at which `ddf`, on `grid`, folds, and the boxes around their groups."""
    folded = _seen_determinant(ddf, grid, other, box, measures) <= 0
    return int(folded.sum()), [_moved(group, [side.start for side in box]) for group in _groups(folded)]


def _mend_seen_group(ddf: Tensor, grid: Grid, other: Grid, box: _Box, measures: Sequence[_Measure]) -> None:
    """Change `ddf`, (3, D, H, W) on `grid`, in place until it does not fold in a box of `other`."""
    corners = grid.to_voxels(_part(other, _grown(box, 1, other)).corners)
    last = np.array(grid.shape) - 1
    low = np.floor(corners.min(0)).clip(0, last - 1)  # two voxels at least, between which something can be sampled
    high = np.ceil(corners.max(0)).clip(low + 1, last) + 1
    inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    around, part = _part(grid, inside), ddf[:, *inside].clone()
    for _ in range(_STEPS * _ROUNDS):
        with torch.enable_grad():
            determinant = _seen_determinant(part.requires_grad_(), around, other, box, measures)
            lacking = (_SPARE - determinant).clamp_min(0).sum()
        if not (determinant <= 0).any():
            break
        (gradient,) = torch.autograd.grad(lacking, part)
        # Polyak's step: to where the lack would end if it were linear, but half a voxel at most
        step = float(lacking.detach() / gradient.square().sum().clamp_min(1e-12))
        part = part.detach() - min(step, 0.5 / max(float(gradient.abs().max()), 1e-6)) * gradient
    ddf[:, *inside] = part.detach()


def _seen_determinant(ddf: Tensor, grid: Grid, other: Grid, box: _Box, measures: Sequence[_Measure]) -> Tensor:
    """The smallest determinant of `ddf`, (3, D, H, W) on `grid`, at the voxels in a box of `other`."""
    wide = _grown(box, 1, other)
    sampled = resample_to_grid(ddf, grid, _part(other, wide), padding_mode="border")
    vectors = torch.from_numpy(np.linalg.inv(other.affine[:3, :3]) @ grid.affine[:3, :3]).to(sampled)
    determinant = _smallest_determinant(torch.einsum("ac,cijk->aijk", vectors, sampled), measures)
    return determinant[*_moved(box, [-side.start for side in wide])]


def _grown(box: _Box, voxels: int, grid: Grid) -> _Box:
    """As far as the grid goes."""
    ends = zip(box, grid.shape, strict=True)
    return tuple(slice(max(side.start - voxels, 0), min(side.stop + voxels, n)) for side, n in ends)


def _moved(box: _Box, by: Sequence[int]) -> _Box:
    return tuple(slice(side.start + n, side.stop + n) for side, n in zip(box, by, strict=True))


def _part(grid: Grid, box: Sequence[slice]) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_physical(np.array([[side.start for side in box]]))[0]
    d, h, w = (side.stop - side.start for side in box)
    return Grid((d, h, w), affine)


def _mend_group(
    ddf: Tensor, box: _Box, measures: Sequence[_Measure], smallest: float, *, by_smoothing: bool
) -> list[_Box]:
    """Mend `ddf`, (3, D, H, W), in place in the box around a group; the boxes around what is left of it."""
    around = tuple(slice(max(side.start - 2, 0), side.stop + 2) for side in box)
    part = ddf[:, *around].clone()
    movable = torch.zeros_like(part[:1])
    movable[:, *_moved(box, [-side.start for side in around])] = 1
    # Outermost voxels have no neighbours for a derivative here, unless the field itself ends with them.
    known = torch.zeros_like(part[0], dtype=torch.bool)
    ends = zip(around, ddf.shape[1:], strict=True)
    known[*(slice(int(a.start > 0), -1 if a.stop < n else None) for a, n in ends)] = True
    for turn in range(_STEPS + 1):
        with torch.enable_grad():
            determinant = _smallest_determinant(part.requires_grad_(), measures)
            lacking = (smallest + _SPARE - determinant)[known].clamp_min(0).sum()
        folded = (determinant.detach() <= smallest) & known
        if turn == _STEPS or not folded.any():
            break
        if by_smoothing:
            weight = _mean(F.max_pool3d(folded[None, None].float(), 3, stride=1, padding=1))[0] * movable
            part = part.detach()
            part = part + weight * (_mean(part[None])[0] - part)
        else:
            (gradient,) = torch.autograd.grad(lacking, part)
            part = part.detach() - _RATE * gradient * movable
    ddf[:, *around] = part.detach()
    return [_moved(group, [side.start for side in around]) for group in _groups(folded)]


def _groups(folded: Tensor) -> list[_Box]:
    """The boxes around the groups of voxels, (D, H, W), and what is near them."""
    if not folded.any():
        return []
    near = ndimage.binary_dilation(folded.cpu().numpy(), iterations=_REACH)
    return list(ndimage.find_objects(ndimage.label(near)[0]))


def _smallest_determinant(ddf: Tensor, measures: Sequence[_Measure]) -> Tensor:
    """(3, D, H, W) -> (D, H, W), of all measures; the field goes on beyond the border as it ends."""
    padded = F.pad(ddf[None], (1,) * 6, mode="replicate")
    determinants = [m.factor * jacobian_determinant(padded, base=m.base.tolist())[0, 0] for m in measures]
    return functools.reduce(torch.minimum, determinants)


def _mean(volume: Tensor) -> Tensor:
    return F.avg_pool3d(F.pad(volume, (1,) * 6, mode="replicate"), 3, stride=1)
