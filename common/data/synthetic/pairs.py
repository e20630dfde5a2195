"""Pairs of generated images, and the data set of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.data.synthetic.appearance import acquire, field_of_view, gaussian_blur, random_contrast
from common.data.synthetic.draw import Draw, smooth_noise
from common.data.synthetic.motion import Slide, draw_field, points_inside
from common.data.synthetic.recipe import SyntheticRecipe
from common.data.synthetic.shapes import MAP_LABELS, LabelMapView, Size, list_label_maps, random_shapes
from common.layers.warp import warp

__all__ = ["SyntheticPairs", "generate_pair"]


def generate_pair(
    shape: Sequence[int],
    *,
    generator: torch.Generator,
    recipe: SyntheticRecipe | None = None,
    between: bool = False,
) -> dict[str, Tensor]:
    """Draw one pair.

    Args:
        shape: (D, H, W), at least 16 each.
        generator: source of all randomness; its device is where the pair is made.
        recipe: what to draw.
        between: of two people's label maps instead, which the recipe must name.

    Returns:
        `image` (2, D, H, W): moving and fixed, in [0, 1]; `moving_label`, `fixed_label` (1, D, H, W): 0 is background.
        Within one person, also: `ddf` (3, D, H, W): the exact field in voxels, pull-back, `fixed`'s structure at p is
        `moving`'s at p + ddf(p); `mask` (1, D, H, W): 1 where the fixed image shows something that the moving one
        shows too.

    Raises:
        ValueError: when an axis is shorter than 16.
        InputError: when the recipe names a folder without label maps, or one with less than two for `between`.
    """
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"a synthetic pair needs three axes of at least 16 voxels, got {tuple(shape)}")
    recipe = recipe or SyntheticRecipe()
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    draw = Draw(generator)
    return _between_people(size, recipe, draw) if between else _within(size, recipe, draw)


def _within(size: Size, recipe: SyntheticRecipe, draw: Draw) -> dict[str, Tensor]:
    """One anatomy, seen twice."""
    painted = recipe.label_maps is not None and draw.chance(recipe.label_map_share)
    ct = not painted and draw.chance(recipe.ct)
    if painted:
        paths = list_label_maps(str(recipe.label_maps))
        label = LabelMapView(size, recipe, draw).of(paths[draw.integer(0, len(paths) - 1)], draw.device)
        labels = MAP_LABELS
    else:
        label = random_shapes(size, recipe, draw)  # (1, D, H, W)
        labels = recipe.labels + (recipe.tubes > 0)
    ddf = draw_field(size, recipe, draw)  # (3, D, H, W)
    if not painted and draw.chance(recipe.sliding):
        slide = Slide(size, recipe, draw)
        ddf = slide.after(ddf)
        # Other classes inside, so that the surface along which it slides can be seen; tubes stay tubes.
        shape_inside = slide.inside & (label > 0) & (label <= recipe.labels)
        label = torch.where(shape_inside, 1 + label % recipe.labels, label)

    texture = draw.uniform(*recipe.texture) * smooth_noise((1, *size), (3.0, 6.0), draw)
    if ct:
        texture = 0.5 * texture
    moving_contrast = random_contrast(labels, draw, ct=ct)
    fixed_contrast = moving_contrast
    texture_sign = 1.0
    if draw.uniform(0, 1) > recipe.same_contrast and not ct:
        fixed_contrast = random_contrast(labels, draw)
        texture_sign = -1.0 if draw.uniform(0, 1) > 0.5 else 1.0
    softness = draw.uniform(*recipe.softness) if recipe.softness[1] > 0 else 0.0

    moving_clean = gaussian_blur(moving_contrast[label], softness) + texture * (label > 0)
    fixed_clean = gaussian_blur(fixed_contrast[label], softness) + texture_sign * texture * (label > 0)
    fixed_clean = warp(fixed_clean[None], ddf[None], padding_mode="border")[0]
    fixed_label = warp(label[None].float(), ddf[None], mode="nearest", padding_mode="border")[0].long()
    moving, fixed = (acquire(clean, recipe, draw, ct=ct) for clean in (moving_clean, fixed_clean))
    mask = points_inside(ddf) * (fixed_label > 0)
    moving_view, fixed_view = field_of_view(size, recipe, draw), field_of_view(size, recipe, draw)
    if moving_view is not None:
        moving = moving * moving_view
        mask = mask * warp(moving_view[None].contiguous(), ddf[None], mode="nearest")[0]
    if fixed_view is not None:
        fixed, mask = fixed * fixed_view, mask * fixed_view
    return {
        "image": torch.cat([moving, fixed]),
        "ddf": ddf,
        "moving_label": label,
        "fixed_label": fixed_label,
        "mask": mask,
    }


def _between_people(size: Size, recipe: SyntheticRecipe, draw: Draw) -> dict[str, Tensor]:
    """Two people's label maps in one contrast, the moving one moved a little further."""
    paths = list_label_maps(str(recipe.label_maps))
    first = draw.integer(0, len(paths) - 1)
    second = (first + draw.integer(1, max(1, len(paths) - 1))) % len(paths)
    view = LabelMapView(size, recipe, draw)
    fixed_map, moving_map = (view.of(paths[i], draw.device) for i in (first, second))
    ddf = draw_field(size, recipe, draw)
    moving_map = warp(moving_map[None].float(), ddf[None], mode="nearest", padding_mode="border")[0].long()
    contrast = random_contrast(MAP_LABELS, draw)
    softness = draw.uniform(*recipe.softness) if recipe.softness[1] > 0 else 0.0
    images = []
    for label in (moving_map, fixed_map):
        texture = draw.uniform(*recipe.texture) * smooth_noise((1, *size), (3.0, 6.0), draw)
        clean = gaussian_blur(contrast[label], softness) + texture * (label > 0)
        images.append(acquire(clean, recipe, draw))
    chosen = _structures(moving_map, fixed_map, recipe.labels, draw)
    moving_label, fixed_label = (chosen[label] for label in (moving_map, fixed_map))
    return {"image": torch.cat(images), "moving_label": moving_label, "fixed_label": fixed_label}


def _structures(moving: Tensor, fixed: Tensor, count: int, draw: Draw) -> Tensor:
    """(MAP_LABELS,): number, from 1, of some of the structures that both maps show; 0 for the others."""
    both = torch.bincount(moving.flatten(), minlength=MAP_LABELS) * torch.bincount(
        fixed.flatten(), minlength=MAP_LABELS
    )
    both[0] = 0
    shown = torch.nonzero(both).flatten()
    order = torch.argsort(draw.vector(len(shown), 0, 1))[:count]
    chosen = torch.zeros(MAP_LABELS, dtype=torch.long, device=moving.device)
    chosen[shown[order]] = torch.arange(1, len(order) + 1, device=moving.device)
    return chosen


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

    Raises:
        InputError: when the recipe names a folder without label maps.
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
        if self.recipe.label_maps is not None:
            list_label_maps(self.recipe.label_maps)
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
        between = self._between_people()
        generator = torch.Generator(self.device).manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + index)
        item: dict[str, Any] = generate_pair(self.shape, generator=generator, recipe=self.recipe, between=between)
        return self.transform(item) if self.transform else item

    def _between_people(self) -> bool:
        """Of this epoch: a whole epoch of one kind, as pairs with and without exact field do not mix in a batch."""
        share = self.recipe.between_share
        if self.recipe.label_maps is None or self.epoch == 0 or share <= 0:
            return False
        # The shares of the epochs up to this one and to the one before differ by a whole one: evenly spread.
        return int(self.epoch * share) > int((self.epoch - 1) * share)
