"""The two scans of a registration with everything that came with them, and what a registration makes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from common.geometry.spaces import (
    Grid,
    PairGrids,
    ddf_to_displacement,
    displacement_to_ddf,
    grid_of,
    itk_to_array,
    resample_to_grid,
)
from common.io import (
    build_transform,
    read_image,
    read_label,
    read_landmark_pair,
    read_landmarks,
    read_mask,
    resample_image,
    transform_points,
    transform_to_displacement,
)
from common.transforms import normalize_intensity
from common.transforms.intensity import Modality

__all__ = ["ImagePair", "Registration", "load_pair"]

# Voxels by which a field is continued beyond the network grid, so that no fixed voxel centre lies outside it, where
# ITK would take the displacement for zero.
_MARGIN = 2


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """A fixed and a moving scan, read and checked.

    Attributes:
        fixed, moving: `itk.Image[itk.F, 3]`, original intensities.
        fixed_intensity, moving_intensity: (1, D, H, W) in [0, 1], what networks see.
        fixed_modality, moving_modality: "mr" or "ct".
        fixed_label, moving_label, fixed_mask: label images on the grids of their scans, or None.
        fixed_landmarks, moving_landmarks: (N, 3) LPS mm, or None.
    """

    fixed: Any
    moving: Any
    fixed_intensity: Tensor
    moving_intensity: Tensor
    fixed_modality: str
    moving_modality: str
    fixed_label: Any = None
    moving_label: Any = None
    fixed_mask: Any = None
    fixed_landmarks: np.ndarray | None = None
    moving_landmarks: np.ndarray | None = None

    @cached_property
    def fixed_grid(self) -> Grid:
        return grid_of(self.fixed)

    @cached_property
    def moving_grid(self) -> Grid:
        return grid_of(self.moving)


def load_pair(
    files: Mapping[str, Any], *, modality: Modality = "auto", window: str | tuple[float, float] = "balanced"
) -> ImagePair:
    """Read everything that belongs to a pair.

    Args:
        files: paths under `fixed` and `moving`, and optionally `fixed_label`, `moving_label`, `fixed_mask`,
            `fixed_landmarks`, `moving_landmarks`.
        modality: "mr", "ct" or "auto", see `normalize_intensity`.
        window: of CT, see there.

    Returns:
        the checked pair.

    Raises:
        InputError: naming the file and the problem.
    """
    if modality not in get_args(Modality):
        raise InputError(f"the modality must be mr, ct or auto, got {modality!r}")
    paths = {key: os.fspath(value) for key, value in files.items() if isinstance(value, str | os.PathLike) and value}
    for key in ("fixed", "moving"):
        if key not in paths:
            raise InputError(f"there is no {key} image: give its path as --{key}")
    fixed, moving = read_image(paths["fixed"]), read_image(paths["moving"])

    def label_of(key: str, image: Any, image_key: str) -> Any:
        return read_label(paths[key], image, paths[image_key]) if key in paths else None

    fixed_landmarks = moving_landmarks = None
    if "fixed_landmarks" in paths and "moving_landmarks" in paths:
        fixed_landmarks, moving_landmarks = read_landmark_pair(paths["fixed_landmarks"], paths["moving_landmarks"])
    elif "fixed_landmarks" in paths:
        fixed_landmarks = read_landmarks(paths["fixed_landmarks"])
    elif "moving_landmarks" in paths:
        raise InputError(
            f"the moving landmarks {paths['moving_landmarks']} need fixed ones to be compared with: "
            "give --fixed_landmarks"
        )
    fixed_intensity, fixed_modality = _normalized(fixed, modality, window)
    moving_intensity, moving_modality = _normalized(moving, modality, window)
    return ImagePair(
        fixed=fixed,
        moving=moving,
        fixed_intensity=fixed_intensity,
        moving_intensity=moving_intensity,
        fixed_modality=fixed_modality,
        moving_modality=moving_modality,
        fixed_label=label_of("fixed_label", fixed, "fixed"),
        moving_label=label_of("moving_label", moving, "moving"),
        fixed_mask=read_mask(paths["fixed_mask"], fixed, paths["fixed"]) if "fixed_mask" in paths else None,
        fixed_landmarks=fixed_landmarks,
        moving_landmarks=moving_landmarks,
    )


def _normalized(image: Any, modality: Modality, window: str | tuple[float, float]) -> tuple[Tensor, str]:
    volume = torch.from_numpy(np.ascontiguousarray(itk_to_array(image)))[None]
    try:
        return normalize_intensity(volume, modality, window=window)
    except ValueError as error:
        raise InputError(str(error)) from error


class Registration:
    """The transform of a pair, affine and deformable stage, and what it makes of the moving scan.

    Args:
        pair: the two scans.
        fixed_to_moving: (4, 4), LPS mm, the affine stage.
        ddf: (3, D, H, W), voxels of the network grid: the deformable stage, applied before the affine one,
            `total(x) = fixed_to_moving(x + u(x))`.
        network_grid: where `ddf` lives; covers the fixed image.
        uncertainty: (L, D, H, W) on the network grid, in mm, coarse to fine; None where nobody asked for it.
    """

    def __init__(
        self,
        pair: ImagePair,
        *,
        fixed_to_moving: np.ndarray,
        ddf: Tensor,
        network_grid: Grid,
        uncertainty: Tensor | None = None,
    ) -> None:
        if tuple(ddf.shape) != (3, *network_grid.shape):
            raise ValueError(f"a field {tuple(ddf.shape)} does not fit a network grid {network_grid.shape}")
        self.pair = pair
        self.fixed_to_moving = fixed_to_moving
        padded = torch.nn.functional.pad(ddf[None].float().cpu(), (_MARGIN,) * 6, mode="replicate")[0]
        self.field_grid = network_grid.extended(_MARGIN)
        self.displacement = ddf_to_displacement(padded, self.field_grid)  # (D, H, W, 3) LPS mm
        self.transform = build_transform(fixed_to_moving, self.displacement, self.field_grid)
        self._uncertainty = uncertainty
        self._network_grid = network_grid

    @cached_property
    def uncertainty(self) -> np.ndarray | None:
        """(L, D, H, W), mm on the fixed grid: how far the deformable stage may be off, coarse to fine."""
        if self._uncertainty is None:
            return None
        maps = self._uncertainty.detach().float().cpu()
        return resample_to_grid(maps, self._network_grid, self.pair.fixed_grid, padding_mode="border").numpy()

    @property
    def outside_value(self) -> float:
        """Intensity where the transform leaves the moving scan: air for CT, 0 for MR."""
        return float(itk_to_array(self.pair.moving).min()) if self.pair.moving_modality == "ct" else 0.0

    @cached_property
    def warped(self) -> Any:
        """The original moving scan resampled once onto the fixed grid."""
        return resample_image(self.pair.moving, self.pair.fixed_grid, self.transform, default=self.outside_value)

    @cached_property
    def aligned(self) -> Any:
        """The moving scan on the fixed grid after the affine stage alone."""
        transform = build_transform(self.fixed_to_moving)
        return resample_image(self.pair.moving, self.pair.fixed_grid, transform, default=self.outside_value)

    @cached_property
    def unaligned(self) -> Any:
        """The moving scan on the fixed grid as the scanner's coordinates have it."""
        return resample_image(self.pair.moving, self.pair.fixed_grid, build_transform(), default=self.outside_value)

    def warp_label(self, transform: Any) -> Any:
        """The moving label on the fixed grid, nearest neighbour."""
        return resample_image(self.pair.moving_label, self.pair.fixed_grid, transform, interpolation="nearest")

    @cached_property
    def warped_label(self) -> Any:
        return self.warp_label(self.transform) if self.pair.moving_label is not None else None

    @cached_property
    def mapped_landmarks(self) -> np.ndarray | None:
        """(N, 3) LPS mm: where the fixed landmarks lie in the moving scan."""
        if self.pair.fixed_landmarks is None:
            return None
        return transform_points(self.transform, self.pair.fixed_landmarks)

    @cached_property
    def total_displacement(self) -> np.ndarray:
        """(D, H, W, 3), LPS mm on the fixed grid: affine and deformable stage together."""
        return transform_to_displacement(self.transform, self.pair.fixed_grid)

    @property
    def voxel_displacement(self) -> np.ndarray:
        """(3, D, H, W): what to add to a fixed voxel's index for the moving one's, both stages; as Learn2Reg has it."""
        grids = PairGrids(
            fixed=self.pair.fixed_grid,
            moving=self.pair.moving_grid,
            network=self.field_grid,
            fixed_to_moving=self.fixed_to_moving,
        )
        return grids.displacement(displacement_to_ddf(self.displacement, self.field_grid))

    @cached_property
    def deformation(self) -> np.ndarray:
        """(D, H, W, 3), LPS mm on the fixed grid: the deformable stage alone."""
        stage = build_transform(None, self.displacement, self.field_grid)
        return transform_to_displacement(stage, self.pair.fixed_grid)

    @cached_property
    def deformation_ddf(self) -> Tensor:
        """(1, 3, D, H, W), voxels of the fixed grid: the deformable stage alone."""
        return displacement_to_ddf(self.deformation, self.pair.fixed_grid)[None]
