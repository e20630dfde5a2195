"""Instance optimisation: refining one pair's field by gradient descent on its own similarity.

After the Adam stage of ConvexAdam (Siebert et al., 2021), which RWCNet (arXiv 2302.02283) applies to a network's field,
too; here it is the change of the field that is optimised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from common.geometry.fields import resize_ddf
from common.layers.warp import warp
from common.losses import LocalNCC, mind_ssc

__all__ = [
    "LEARNING_RATE",
    "SMOOTHNESS",
    "UPDATE_SMOOTHNESS",
    "InstanceSimilarity",
    "have_one_contrast",
    "optimize_instance",
]

# Chosen on some of the pairs of `benchmarks.accuracy`; benchmarks/README.md names them.
SMOOTHNESS, UPDATE_SMOOTHNESS, LEARNING_RATE = 1.0, 0.5, 2.0

_MIND_CHANNELS = 12
_NCC_EPS = 1e-2  # a window that varies by less than 0.03 is noise, not structure
_NCC_WEIGHT = 3.0  # at the end, beside 12 * MIND

InstanceSimilarity = Literal["auto", "mind", "ncc"]


def optimize_instance(
    image: Tensor,
    ddf: Tensor,
    *,
    iterations: int,
    similarity: InstanceSimilarity = "auto",
    smoothness: float = SMOOTHNESS,
    update_smoothness: float = UPDATE_SMOOTHNESS,
    learning_rate: float = LEARNING_RATE,
    grid_factor: int = 2,
) -> Tensor:
    """Refine a field by Adam on a coarser displacement grid.

    Minimises 12 * mean squared difference of the MIND-SSC descriptors (radius 1, dilation 2), plus `smoothness` times
    the roughness of the field and `update_smoothness` times that of what is added to it: the sum over the axes of the
    mean squared forward difference. Where the pair turns out to be of one contrast half-way, see `have_one_contrast`,
    1 + the local NCC loss joins with a weight that rises from 0 to 3: descriptors find what is far away, correlation
    then sees more of small structures. With it from the beginning, motion is left over (chest CT, 2.3 in place of
    1.9 mm); between two contrasts it leads astray.

    Different from ConvexAdam:
    - It optimises the field itself, with a weight of 1.25, from a start that has no detail yet. A network's field has:
      put through the coarse grid and smoothed like that it loses what the network has seen in small structures.
    - Its descriptors are averaged to the coarse grid, ours are sampled: they are sums over patches already, and
      averaged once more they no longer tell small structures apart.
    - The rate rises, then falls to 0: half of its steps get as far, and a start that is good already is not lost.

    Args:
        image: (2, D, H, W), moving and fixed, in [0, 1].
        ddf: (3, D, H, W), voxels: where to start.
        iterations: Adam steps; 0 returns `ddf`.
        similarity: "auto" as above, "mind" never with local NCC, "ncc" with nothing else.
        smoothness, update_smoothness: weights of the two diffusion terms.
        learning_rate: the highest, in voxels of the coarse grid per step before smoothing, roughly.
        grid_factor: full-resolution voxels per grid point along each axis.

    Returns:
        (3, D, H, W), voxels.

    Raises:
        InputError: for a negative number of iterations, a rate that is not positive or an unknown similarity.
    """
    if iterations < 0:
        raise InputError(f"the number of instance optimisation steps must not be negative, got {iterations}")
    if isinstance(learning_rate, bool) or not (isinstance(learning_rate, int | float) and 0 < learning_rate < math.inf):
        raise InputError(f"the rate of instance optimisation must be a positive number, got {learning_rate!r}")
    if similarity not in get_args(InstanceSimilarity):
        raise InputError(f"instance optimisation by {similarity!r} is unknown; choose auto, mind or ncc")
    if iterations == 0:
        return ddf
    shape = ddf.shape[1:]
    coarse = [max(4, round(n / grid_factor)) for n in shape]
    with torch.no_grad():
        moving, fixed = (_features(channel[None, None], coarse) for channel in image)
    local_ncc = _local_ncc(coarse)
    mind_weight, ncc_weight = (0.0, 1.0) if similarity == "ncc" else (12.0, 0.0)
    one_contrast = False
    with torch.enable_grad():
        start = resize_ddf(ddf[None].detach(), coarse)
        parameters = torch.zeros_like(start, requires_grad=True)
        # Short memories: in so few steps the usual (0.9, 0.999) would go on by what the first, largest gradients said.
        optimizer = torch.optim.Adam([parameters], lr=learning_rate, betas=(0.8, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, iterations))
        for step in range(iterations):
            update = _smooth(parameters)
            field = start + update
            if similarity == "auto" and step == (iterations + 1) // 2:
                one_contrast = have_one_contrast(image, resize_ddf(field.detach(), shape)[0])
            if one_contrast:
                ncc_weight = _NCC_WEIGHT * (2 * step / iterations - 1)
            loss = smoothness * _diffusion(field) + update_smoothness * _diffusion(update)
            if mind_weight:
                mind = warp(moving[:, :_MIND_CHANNELS], field, padding_mode="border")
                loss = loss + mind_weight * (mind - fixed[:, :_MIND_CHANNELS]).square().mean()
            if ncc_weight:
                warped = warp(moving[:, _MIND_CHANNELS:], field, padding_mode="border")
                loss = loss + ncc_weight * (1 + local_ncc(fixed[:, _MIND_CHANNELS:], warped))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return ddf + resize_ddf(_smooth(parameters.detach()), shape)[0]


def have_one_contrast(image: Tensor, ddf: Tensor) -> bool:
    """Whether two images that lie on each other show the same tissues bright.

    Then the local correlation is positive nearly everywhere and on average larger than its square; windows of inverted
    contrast take from the first and add to the second.

    Args:
        image: (2, D, H, W), moving and fixed, in [0, 1].
        ddf: (3, D, H, W), voxels: how the moving image comes to lie on the fixed one.
    """
    with torch.no_grad():
        moving, fixed = warp(image[None, :1], ddf[None], padding_mode="border"), image[None, 1:]
        signed, squared = (-_local_ncc(image.shape[1:], squared=squared)(fixed, moving) for squared in (False, True))
    return bool(signed > squared)


def _local_ncc(shape: Sequence[int], *, squared: bool = True) -> LocalNCC:
    """Windows of 5^3 where they fit."""
    return LocalNCC(min(5, (min(shape) - 1) // 2 * 2 + 1), squared=squared, eps=_NCC_EPS)


def _features(channel: Tensor, coarse: list[int]) -> Tensor:
    """(1, 1, D, H, W) -> (1, 13, *coarse): descriptors, then intensities; the grid has the full grid's corners."""
    descriptors = mind_ssc(channel, radius=1, dilation=2)
    intensities = F.avg_pool3d(channel, 3, stride=1, padding=1, count_include_pad=False)
    shrunk = (F.interpolate(f, size=coarse, mode="trilinear", align_corners=True) for f in (descriptors, intensities))
    return torch.cat(list(shrunk), dim=1)


def _rate(step: int, iterations: int, warm_up: float = 0.3) -> float:
    """A line up and a line down, 1 at its top: Adam's first steps are as long as the rate, whatever the gradient."""
    return min((step + 1) / (warm_up * iterations), (iterations - step) / ((1 - warm_up) * iterations), 1.0)


def _smooth(field: Tensor) -> Tensor:
    """Three 3^3 mean filters: nearly a Gaussian."""
    for _ in range(3):
        field = F.avg_pool3d(F.pad(field, (1,) * 6, mode="replicate"), 3, stride=1)
    return field


def _diffusion(field: Tensor) -> Tensor:
    total = field.new_zeros(())
    for axis in (2, 3, 4):
        total = total + field.diff(dim=axis).square().mean()
    return total
