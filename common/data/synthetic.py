"""Generated image pairs with an exactly known displacement field.

Random shapes are painted with random contrasts and deformed by a random affine and a random multi-scale diffeomorphism,
in the spirit of SynthMorph (Hoffmann et al., IEEE TMI 2022): a network that has only seen such pairs has to learn to
match shapes, not the appearance of one modality. Torch only; runs where its generator's device is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from common.geometry.fields import exponentiate, resize_ddf
from common.layers.warp import warp

__all__ = ["SyntheticPairs", "SyntheticRecipe", "generate_pair", "random_field"]


@dataclass(frozen=True, kw_only=True)
class SyntheticRecipe:
    """What generated pairs look like. A (low, high) is the range of a uniform draw, made anew for each pair.

    Attributes:
        labels: number of shape classes.
        shape_scales: voxels between the control points of the noise that the shapes are cut from.
        background: probability that the shapes end at a random body outline, beyond which there is background.
        same_contrast: probability that both images have the same intensities per shape.
        texture: amplitude of the texture inside the shapes, common to both images.
        bias: amplitude of the smooth multiplicative field of each image (log scale).
        noise: standard deviation of each image's noise.
        blur: standard deviation in voxels of each image's blur.
        gamma: exponent range of each image, on log scale.
        field_scales: voxels between the control points of the velocity field.
        field_strength: standard deviation of the velocity at each scale, as a fraction of that scale.
        rotation: largest rotation about each axis, degrees.
        scaling: largest relative change of size along each axis.
        shear: largest shear.
        translation: largest shift along each axis, as a fraction of the axis.
    """

    labels: int = 16
    shape_scales: tuple[float, ...] = (6.0, 12.0, 24.0)
    background: float = 0.75
    same_contrast: float = 0.6
    texture: tuple[float, float] = (0.0, 0.12)
    bias: tuple[float, float] = (0.0, 0.3)
    noise: tuple[float, float] = (0.0, 0.05)
    blur: tuple[float, float] = (0.0, 0.8)
    gamma: tuple[float, float] = (-0.3, 0.3)
    field_scales: tuple[float, ...] = (8.0, 16.0, 32.0)
    field_strength: tuple[float, float] = (0.02, 0.2)
    rotation: float = 8.0
    scaling: float = 0.08
    shear: float = 0.05
    translation: float = 0.04


def generate_pair(
    shape: Sequence[int], *, generator: torch.Generator, recipe: SyntheticRecipe | None = None
) -> dict[str, Tensor]:
    """Draw one pair.

    Args:
        shape: (D, H, W), at least 16 each.
        generator: source of all randomness; its device is where the pair is made.
        recipe: what to draw.

    Returns:
        `image` (2, D, H, W): moving and fixed, in [0, 1]; `ddf` (3, D, H, W): the exact field in voxels, pull-back,
        `fixed`'s structure at p is `moving`'s at p + ddf(p); `moving_label`, `fixed_label` (1, D, H, W): 0 is
        background; `mask` (1, D, H, W): 1 where the fixed image shows something that the moving one shows too.

    Raises:
        ValueError: when an axis is shorter than 16.
    """
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"a synthetic pair needs three axes of at least 16 voxels, got {tuple(shape)}")
    recipe = recipe or SyntheticRecipe()
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    draw = _Draw(generator)

    label = _random_shapes(size, recipe, draw)  # (1, D, H, W)
    ddf = _random_field(size, recipe, draw)  # (3, D, H, W)
    texture = draw.uniform(*recipe.texture) * _noise((1, *size), (3.0, 6.0), draw)
    moving_contrast = _random_contrast(recipe.labels, draw)
    fixed_contrast = moving_contrast
    if draw.uniform(0, 1) > recipe.same_contrast:
        fixed_contrast = _random_contrast(recipe.labels, draw)
        texture_sign = -1.0 if draw.uniform(0, 1) > 0.5 else 1.0
    else:
        texture_sign = 1.0

    moving_clean = moving_contrast[label] + texture * (label > 0)
    fixed_clean = fixed_contrast[label] + texture_sign * texture * (label > 0)
    fixed_clean = warp(fixed_clean[None], ddf[None], padding_mode="border")[0]
    fixed_label = warp(label[None].float(), ddf[None], mode="nearest", padding_mode="border")[0].long()
    image = torch.cat([_acquire(moving_clean, recipe, draw), _acquire(fixed_clean, recipe, draw)])
    return {
        "image": image,
        "ddf": ddf,
        "moving_label": label,
        "fixed_label": fixed_label,
        "mask": _points_inside(ddf) * (fixed_label > 0),
    }


def random_field(shape: Sequence[int], *, generator: torch.Generator, recipe: SyntheticRecipe | None = None) -> Tensor:
    """Draw a field alone: (3, D, H, W), voxels; random diffeomorphism, then random affine about the centre."""
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    return _random_field(size, recipe or SyntheticRecipe(), _Draw(generator))


class SyntheticPairs(Dataset):
    """Generated pairs as a data set: item i of epoch e is always the same pair for one seed.

    Args:
        length: pairs per epoch.
        shape: (D, H, W).
        seed: with the epoch and the index it decides each pair.
        recipe: fields of `SyntheticRecipe` that differ from the defaults.
        device: where pairs are made.
        transform: applied to each item.
        fixed_epoch: every epoch repeats the first one, for validation.
    """

    def __init__(
        self,
        *,
        length: int,
        shape: Sequence[int],
        seed: int = 0,
        recipe: dict[str, Any] | None = None,
        device: str | torch.device = "cpu",
        transform: Callable[[dict[str, Any]], Any] | None = None,
        fixed_epoch: bool = False,
    ) -> None:
        self.length = length
        self.shape = tuple(shape)
        self.seed = seed
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (recipe or {}).items()}
        self.recipe = SyntheticRecipe(**options)
        self.device = torch.device(device)
        self.transform = transform
        self.fixed_epoch = fixed_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose pairs are drawn next."""
        self.epoch = 0 if self.fixed_epoch else epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        generator = torch.Generator(self.device).manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + index)
        item: dict[str, Any] = generate_pair(self.shape, generator=generator, recipe=self.recipe)
        return self.transform(item) if self.transform else item


class _Draw:
    """Uniform and normal numbers from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.device = generator.device

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, device=self.device))

    def vector(self, n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator, device=self.device)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, device=self.device)


def _noise(shape: Sequence[int], scales: Sequence[float], draw: _Draw) -> Tensor:
    """Sum of smooth unit-variance noises (C, D, H, W) with the given distances between control points."""
    channels, *size = shape
    total = torch.zeros(tuple(shape), device=draw.device)
    for scale in scales:
        control = [max(2, math.ceil(n / scale) + 1) for n in size]
        coarse = draw.normal((1, channels, *control))
        total += F.interpolate(coarse, size=tuple(size), mode="trilinear", align_corners=True)[0]
    return total / math.sqrt(len(scales))


def _random_shapes(size: tuple[int, int, int], recipe: SyntheticRecipe, draw: _Draw) -> Tensor:
    """Label map (1, D, H, W), 1..labels, and 0 beyond a body outline when there is one."""
    label = _noise((recipe.labels, *size), recipe.shape_scales, draw).argmax(0, keepdim=True) + 1
    if draw.uniform(0, 1) > recipe.background:
        return label
    # A wobbly ellipsoid: the smooth noise moves its surface by up to a third of the radius.
    radii = draw.vector(3, 0.6, 0.95)
    centre = draw.vector(3, -0.1, 0.1)
    squared = torch.zeros(size, device=draw.device)
    for axis, n in enumerate(size):
        view = [1, 1, 1]
        view[axis] = n
        position = torch.linspace(-1, 1, n, device=draw.device)
        squared = squared + (((position - centre[axis]) / radii[axis]) ** 2).view(view)
    outline = 1 + 0.3 * _noise((1, *size), (max(size) / 4,), draw)
    return label * (squared.sqrt()[None] < outline)


def _random_contrast(labels: int, draw: _Draw) -> Tensor:
    """Intensity by label, (labels + 1,); background is dark."""
    contrast = draw.vector(labels + 1, 0.1, 1.0)
    contrast[0] = draw.uniform(0.0, 0.05)
    return contrast


def _random_field(size: tuple[int, int, int], recipe: SyntheticRecipe, draw: _Draw) -> Tensor:
    """Exact field (3, D, H, W) in voxels: random diffeomorphism, then random affine about the centre."""
    # At half size: scaling and squaring is seven samplings, and the field is smooth.
    half = (max(8, size[0] // 2), max(8, size[1] // 2), max(8, size[2] // 2))
    velocity = torch.zeros((3, *half), device=draw.device)
    for scale in recipe.field_scales:
        strength = draw.uniform(*recipe.field_strength)
        velocity += 0.5 * strength * scale * _noise((3, *half), (scale / 2,), draw)
    ddf = resize_ddf(exponentiate(velocity[None]), size)[0]

    matrix = _random_matrix(recipe, draw)
    extent = torch.tensor([float(n) for n in size], device=draw.device)
    shift = draw.vector(3, -recipe.translation, recipe.translation) * extent
    axes = [torch.arange(n, device=draw.device) - (n - 1) / 2 for n in size]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij")) + ddf  # (3, D, H, W), from the centre
    residual = matrix - torch.eye(3, device=draw.device)
    return ddf + torch.einsum("xc,cijk->xijk", residual, position) + shift.view(3, 1, 1, 1)


def _random_matrix(recipe: SyntheticRecipe, draw: _Draw) -> Tensor:
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


def _acquire(clean: Tensor, recipe: SyntheticRecipe, draw: _Draw) -> Tensor:
    """What a scanner makes of an image (1, D, H, W): blur, bias field, gamma, noise; rescaled to [0, 1]."""
    image = _gaussian_blur(clean, draw.uniform(*recipe.blur))
    image = image * torch.exp(draw.uniform(*recipe.bias) * _noise(image.shape, (max(image.shape[1:]) / 3,), draw))
    low, high = image.amin(), image.amax()
    image = ((image - low) / (high - low).clamp_min(1e-6)) ** math.exp(draw.uniform(*recipe.gamma))
    image = image + draw.uniform(*recipe.noise) * draw.normal(image.shape)
    return image.clamp(0, 1)


def _gaussian_blur(image: Tensor, sigma: float) -> Tensor:
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


def _points_inside(ddf: Tensor) -> Tensor:
    """(1, D, H, W): 1 where p + ddf(p) lies inside the grid."""
    inside = torch.ones(ddf.shape[1:], device=ddf.device)
    for axis in range(3):
        n = ddf.shape[1 + axis]
        view = [1, 1, 1]
        view[axis] = n
        position = ddf[axis] + torch.arange(n, device=ddf.device).view(view)
        inside = inside * ((position >= 0) & (position <= n - 1))
    return inside[None]
