"""What generated images show: random shapes, thin tubes, or label maps of real people."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from torch import Tensor

from common.data.synthetic.draw import Draw, smooth_noise
from common.data.synthetic.recipe import SyntheticRecipe
from common.errors import InputError

__all__ = ["MAP_LABELS", "LabelMapView", "list_label_maps", "random_outline", "random_shapes"]

Size = tuple[int, int, int]

MAP_LABELS = 1024
"""Values of a label map are below."""


def random_shapes(size: Size, recipe: SyntheticRecipe, draw: Draw) -> Tensor:
    """Label map (1, D, H, W), 1..labels, tubes, and 0 beyond a body outline when there is one."""
    scales = (max(recipe.shape_scales),) if draw.chance(recipe.coarse_share) else recipe.shape_scales
    label = smooth_noise((recipe.labels, *size), scales, draw).argmax(0, keepdim=True) + 1
    if recipe.tubes:
        label = torch.where(_tubes(size, recipe, draw), recipe.labels + 1, label)
    if draw.uniform(0, 1) > recipe.background:
        return label
    return label * random_outline(size, draw)


def random_outline(size: tuple[int, ...], draw: Draw) -> Tensor:
    """(1, *size), of two or three axes: the inside of a wobbly ellipse or ellipsoid.

    The smooth noise moves its surface by up to a third of the radius.
    """
    axes = len(size)
    radii = draw.vector(axes, 0.6, 0.95)
    centre = draw.vector(axes, -0.1, 0.1)
    squared = torch.zeros(size, device=draw.device)
    for axis, n in enumerate(size):
        view = [1] * axes
        view[axis] = n
        position = torch.linspace(-1, 1, n, device=draw.device)
        squared = squared + (((position - centre[axis]) / radii[axis]) ** 2).view(view)
    outline = 1 + 0.3 * smooth_noise((1, *size), (max(size) / 4,), draw)
    return squared.sqrt()[None] < outline


def _tubes(size: Size, recipe: SyntheticRecipe, draw: Draw) -> Tensor:
    """(1, D, H, W). Where two smooth noises are both zero there are curves; around them, tubes."""
    tubes = torch.zeros((1, *size), dtype=torch.bool, device=draw.device)
    for _ in range(draw.integer(0, recipe.tubes)):
        scale = draw.uniform(min(recipe.shape_scales), max(recipe.shape_scales))
        pair = smooth_noise((2, *size), (scale,), draw)
        slope = 1.2 / scale  # of such a noise, a voxel, about
        tubes |= pair.norm(dim=0, keepdim=True) < slope * draw.uniform(*recipe.tube_radius)
    return tubes


def list_label_maps(folder: str) -> list[str]:
    """NIfTI files of a folder.

    Raises:
        InputError: when there is none.
    """
    paths = sorted(str(path) for path in Path(folder).glob("*.nii*"))
    if not paths:
        raise InputError(f"there are no NIfTI label maps in the folder '{folder}'")
    return paths


@lru_cache(maxsize=64)
def _load_label_map(path: str) -> Tensor:
    """(D, H, W) int16 in RAS order; kept, as each pair takes another."""
    try:
        image = nib.as_closest_canonical(nib.load(path))
        values = np.asanyarray(image.dataobj)
    except (OSError, ValueError, ImageFileError) as error:
        raise InputError(f"the label map '{os.path.basename(path)}' cannot be read: {error}") from error
    if values.ndim != 3 or values.min() < 0 or values.max() >= MAP_LABELS:
        raise InputError(f"'{path}' is no label map: it should be 3D with values of 0 to {MAP_LABELS - 1}")
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int16))


class LabelMapView:
    """The part of a label map that a pair shows, the same of each map: spacing, mirroring and place in the head.

    Args:
        size: of the pair.
        recipe: what to draw.
        draw: source of randomness.
    """

    def __init__(self, size: Size, recipe: SyntheticRecipe, draw: Draw) -> None:
        self.size = size
        self.spacing = draw.uniform(*recipe.label_map_spacing)
        self.mirrored = [draw.chance(0.5) for _ in size]
        self.place = draw.vector(3, -0.3, 0.3).tolist()  # of the centre, from that of what the map shows

    def of(self, path: str, device: torch.device) -> Tensor:
        """(1, D, H, W)."""
        label = _load_label_map(path)
        at = []
        for axis, n in enumerate(self.size):
            shown = torch.nonzero(label.amax(dim=[i for i in range(3) if i != axis])).flatten()
            low, high = (int(shown[0]), int(shown[-1])) if len(shown) else (0, label.shape[axis] - 1)
            centre = (low + high) / 2 + self.place[axis] * max(0.0, high - low - n * self.spacing)
            index = (centre + (torch.arange(n) - (n - 1) / 2) * self.spacing).round().long()
            at.append(index.flip(0) if self.mirrored[axis] else index)
        inside = [(index >= 0) & (index < n) for index, n in zip(at, label.shape, strict=True)]
        i, j, k = (index.clamp(0, n - 1) for index, n in zip(at, label.shape, strict=True))
        view = label[i][:, j][:, :, k] * (inside[0][:, None, None] & inside[1][:, None] & inside[2])
        return view[None].long().to(device)
