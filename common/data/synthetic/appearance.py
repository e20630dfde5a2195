"""How generated images look: contrasts, texture, and what a scanner adds."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.synthetic.draw import Draw, smooth_noise
from common.data.synthetic.recipe import SyntheticRecipe

__all__ = ["acquire", "field_of_view", "gaussian_blur", "random_contrast"]

# Of CT in a wide window: share of the shapes, lowest and highest intensity.
_TISSUES = ((0.2, 0.0, 0.12), (0.15, 0.42, 0.47), (0.5, 0.48, 0.58), (0.15, 0.6, 1.0))  # air, fat, soft tissue, bone


def random_contrast(labels: int, draw: Draw, *, ct: bool = False) -> Tensor:
    """Intensity by label, (labels + 1,); background is dark."""
    contrast = draw.vector(labels + 1, 0.1, 1.0)
    if ct:
        chosen = draw.vector(labels + 1, 0.0, 1.0)
        edge = 0.0
        position = (contrast - 0.1) / 0.9
        for share, low, high in _TISSUES:
            of_this = (chosen >= edge) & (chosen < edge + share)
            contrast = torch.where(of_this, low + (high - low) * position, contrast)
            edge += share
    contrast[0] = 0.0 if ct else draw.uniform(0.0, 0.05)
    return contrast


def acquire(clean: Tensor, recipe: SyntheticRecipe, draw: Draw, *, ct: bool = False) -> Tensor:
    """What a scanner makes of an image (1, D, H, W): blur, bias field, gamma, noise, artefacts; in [0, 1]."""
    image = gaussian_blur(clean, draw.uniform(*recipe.blur))
    if not ct:
        image = image * torch.exp(
            draw.uniform(*recipe.bias) * smooth_noise(image.shape, (max(image.shape[1:]) / 3,), draw)
        )
        low, high = image.amin(), image.amax()
        image = ((image - low) / (high - low).clamp_min(1e-6)) ** math.exp(draw.uniform(*recipe.gamma))
    if draw.chance(recipe.artefacts):
        image = _artefact(image, draw)
    return _noisy(image, recipe, draw, ct=ct).clamp(0, 1)


def _noisy(image: Tensor, recipe: SyntheticRecipe, draw: Draw, *, ct: bool) -> Tensor:
    strength = draw.uniform(*recipe.noise)
    noise = strength * draw.normal(image.shape)
    if ct:  # reconstruction leaves a grain; blurring takes some of the noise, hence the factor
        return image + 1.5 * gaussian_blur(noise, 0.6)
    if draw.chance(recipe.rician):
        other = strength * draw.normal(image.shape)
        return ((image + noise) ** 2 + other**2).sqrt()
    return image + noise


def _artefact(image: Tensor, draw: Draw) -> Tensor:
    """A ghost of the patient's movement, slices of uneven brightness, or stripes."""
    axis = draw.integer(1, 3)
    n = image.shape[axis]
    kind = draw.integer(0, 2)
    if kind == 0:
        shift = draw.integer(max(1, n // 8), max(1, n // 2))
        part = draw.uniform(0.05, 0.25)
        return (1 - part) * image + part * image.roll(shift, dims=axis)
    view = [1, 1, 1, 1]
    view[axis] = n
    if kind == 1:
        gain = 1 + draw.uniform(0.0, 0.15) * draw.normal((n,))
        return image * gain.view(view)
    position = torch.arange(n, device=image.device)
    stripes = torch.cos(2 * math.pi * position / draw.uniform(3, 12) + draw.uniform(0, 6.3))
    return image + draw.uniform(0.0, 0.08) * stripes.view(view)


def field_of_view(size: tuple[int, ...], recipe: SyntheticRecipe, draw: Draw) -> Tensor | None:
    """(1, D, H, W): 0 where the scan has ended; None where it covers everything."""
    if not draw.chance(recipe.missing):
        return None
    axis = draw.integer(0, 2)
    n = size[axis]
    blank = max(1, round(n * draw.uniform(*recipe.missing_part)))
    position = torch.arange(n, device=draw.device)
    seen = position >= blank if draw.chance(0.5) else position < n - blank
    view = [1, 1, 1, 1]
    view[1 + axis] = n
    return seen.float().view(view).expand(1, *size)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Of an image (C, D, H, W); a standard deviation below 0.1 voxels leaves it as it is."""
    if sigma < 0.1:
        return image
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    blurred = image[None]
    for axis in range(3):
        view = [1, 1, 1, 1, 1]
        view[2 + axis] = -1
        pad = [0, 0, 0]
        pad[axis] = radius
        padded = F.pad(blurred, (pad[2], pad[2], pad[1], pad[1], pad[0], pad[0]), mode="replicate")
        blurred = F.conv3d(padded, kernel.view(view))
    return blurred[0]
