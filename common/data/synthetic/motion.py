"""How generated pairs are deformed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.data.synthetic.draw import Draw, smooth_noise
from common.data.synthetic.recipe import SyntheticRecipe
from common.data.synthetic.shapes import Size, random_outline
from common.geometry.fields import exponentiate, resize_ddf
from common.layers.warp import warp

__all__ = ["Slide", "draw_field", "points_inside", "random_field"]


def random_field(shape: Sequence[int], *, generator: torch.Generator, recipe: SyntheticRecipe | None = None) -> Tensor:
    """Draw a field alone: (3, D, H, W), voxels; random diffeomorphism, then random affine about the centre."""
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    return draw_field(size, recipe or SyntheticRecipe(), Draw(generator))


def draw_field(size: Size, recipe: SyntheticRecipe, draw: Draw) -> Tensor:
    """Exact field (3, D, H, W) in voxels: random diffeomorphism, then random affine about the centre."""
    recipe = _scaled(recipe, draw)
    # At half size: scaling and squaring is seven samplings, and the field is smooth.
    half = (max(8, size[0] // 2), max(8, size[1] // 2), max(8, size[2] // 2))
    velocity = torch.zeros((3, *half), device=draw.device)
    for scale in recipe.field_scales:
        strength = draw.uniform(*recipe.field_strength)
        velocity += 0.5 * strength * scale * smooth_noise((3, *half), (scale / 2,), draw)
    ddf = resize_ddf(exponentiate(velocity[None]), size)[0]

    matrix = _random_matrix(recipe, draw)
    extent = torch.tensor([float(n) for n in size], device=draw.device)
    shift = draw.vector(3, -recipe.translation, recipe.translation) * extent
    axes = [torch.arange(n, device=draw.device) - (n - 1) / 2 for n in size]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij")) + ddf  # (3, D, H, W), from the centre
    residual = matrix - torch.eye(3, device=draw.device)
    return ddf + torch.einsum("xc,cijk->xijk", residual, position) + shift.view(3, 1, 1, 1)


def _scaled(recipe: SyntheticRecipe, draw: Draw) -> SyntheticRecipe:
    """The recipe with its motion made smaller or larger as a whole."""
    if recipe.motion == (1.0, 1.0):  # draws nothing, see `Draw.chance`
        return recipe
    factor = draw.uniform(*recipe.motion)
    low, high = recipe.field_strength
    return replace(
        recipe,
        field_strength=(factor * low, factor * high),
        rotation=factor * recipe.rotation,
        scaling=factor * recipe.scaling,
        shear=factor * recipe.shear,
        translation=factor * recipe.translation,
    )


def _random_matrix(recipe: SyntheticRecipe, draw: Draw) -> Tensor:
    matrix = torch.eye(3, device=draw.device)
    for axis in range(3):
        angle = math.radians(draw.uniform(-recipe.rotation, recipe.rotation))
        i, j = (axis + 1) % 3, (axis + 2) % 3
        rotation = torch.eye(3, device=draw.device)
        rotation[i, i] = rotation[j, j] = math.cos(angle)
        rotation[i, j], rotation[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ rotation
    scaling = torch.diag(1 + draw.vector(3, -recipe.scaling, recipe.scaling))
    shear = torch.eye(3, device=draw.device)
    shear[0, 1], shear[0, 2], shear[1, 2] = draw.vector(3, -recipe.shear, recipe.shear)
    return matrix @ scaling @ shear


class Slide:
    """An organ that slides: the inside of a cylinder moves along the cylinder's axis, its outside stays.

    The surface maps onto itself, so nothing overlaps and nothing tears open, and the field jumps across it as it does
    between lung and ribs. Lies in the moving image's frame: a field is followed by it.

    Args:
        size: of the pair.
        recipe: what to draw.
        draw: source of randomness.
    """

    def __init__(self, size: Size, recipe: SyntheticRecipe, draw: Draw) -> None:
        self.axis = draw.integer(0, 2)
        across = tuple(n for axis, n in enumerate(size) if axis != self.axis)
        sign = 1 if draw.chance(0.5) else -1
        # The slip varies across the cylinder, not along it: so it keeps volumes.
        slip = sign * draw.uniform(*recipe.slip) * (1 + 0.2 * smooth_noise((1, *across), (max(across) / 2,), draw))
        inside = random_outline(across, draw)
        self.inside = inside.unsqueeze(1 + self.axis).expand(1, *size)  # (1, D, H, W)
        self.slip = slip.unsqueeze(1 + self.axis).expand(1, *size)

    def after(self, ddf: Tensor) -> Tensor:
        """The field (3, D, H, W), then the slide."""
        inside = warp(self.inside[None].float(), ddf[None], mode="nearest", padding_mode="border")[0]
        slip = warp(self.slip[None].contiguous(), ddf[None], padding_mode="border")[0]
        total = ddf.clone()
        total[self.axis] += (inside * slip)[0]
        return total


def points_inside(ddf: Tensor) -> Tensor:
    """(1, D, H, W): 1 where p + ddf(p) lies inside the grid."""
    inside = torch.ones(ddf.shape[1:], device=ddf.device)
    for axis in range(3):
        n = ddf.shape[1 + axis]
        view = [1, 1, 1]
        view[axis] = n
        position = ddf[axis] + torch.arange(n, device=ddf.device).view(view)
        inside = inside * ((position >= 0) & (position <= n - 1))
    return inside[None]
