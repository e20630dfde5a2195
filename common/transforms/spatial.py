"""Two scans of different grids onto one grid that a network takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from common.errors import InputError
from common.geometry.spaces import Grid, PairGrids, resample_to_grid, swap_lps_ras

__all__ = ["ResampleToNetworkGridd", "network_grid"]

_SAME_GRID_TOLERANCE = 1e-2  # mm, at the corners; the tolerance of `common.io`
_KEYS = tuple(f"{role}{suffix}" for suffix in ("", "_label", "_mask", "_keypoints") for role in ("fixed", "moving"))


def network_grid(
    fixed: Grid,
    *,
    shape: Sequence[int] | None = None,
    spacing: float | Sequence[float] | None = None,
    multiple: int = 16,
) -> Grid:
    """Grid along the fixed scan's axes, with its centre, that a network can take.

    Args:
        fixed: the fixed scan's grid.
        shape: number of voxels, each a multiple of `multiple`; what of the scan lies outside is cropped. By default the
            smallest shape that covers the scan.
        spacing: mm, one number or one per axis. By default the fixed scan's.
        multiple: the network's stride.

    Returns:
        the grid.

    Raises:
        ValueError: when `shape` or `spacing` cannot be.
    """
    _check_shape(shape, multiple)
    _check_spacing(spacing)
    covering = fixed.with_spacing(fixed.spacing if spacing is None else np.asarray(spacing, dtype=np.float64))
    wanted = [-(-n // multiple) * multiple for n in covering.shape] if shape is None else [int(n) for n in shape]
    matrix = covering.affine[:3, :3]
    affine = covering.affine.copy()
    affine[:3, 3] = fixed.centre - matrix @ ((np.array(wanted) - 1) / 2)
    return Grid((wanted[0], wanted[1], wanted[2]), affine)


def _check_shape(shape: Sequence[int] | None, multiple: int) -> None:
    if shape is not None and (len(shape) != 3 or any(n < 1 or n % multiple for n in shape)):
        raise ValueError(f"a network's shape is three multiples of {multiple}, not {tuple(shape)}")


def _check_spacing(spacing: float | Sequence[float] | None) -> None:
    if spacing is not None:
        array = np.asarray(spacing, dtype=np.float64)
        if array.shape not in ((), (3,)) or not (np.isfinite(array).all() and (array > 0).all()):
            raise ValueError(f"a spacing is one or three positive numbers of mm, not {spacing}")


class ResampleToNetworkGridd(MapTransform):
    """Bring a pair, with its labels, masks and key points, onto one grid (`network_grid` of the fixed scan).

    Outside a scan's field of view the result is 0, the images' minimum once `NormalizeImaged` has run; so put it first.
    Nothing is smoothed before a coarser spacing, as in inference.

    Args:
        keys: any of "fixed", "moving" (C, D, H, W, trilinear), these with "_label" or "_mask" (nearest neighbour), and
            with "_keypoints" ((N, 3) voxels of the role's image before, voxels of the common grid after). Those that
            the dict lacks are passed over, but "fixed" and "moving" are needed.
        shape: see `network_grid`. Given, it makes all pairs batchable.
        spacing: see `network_grid`.
        multiple: see `network_grid`.
        centre_align: shift the moving scan so that the centre of its field of view is on the fixed's. Crops of a
            structure carry its place in the crop, not in the world: the 40 validation pairs of Task04_Hippocampus
            have a Dice of 0.50 without and of 0.58 with it. The shift is not part of the field that the network
            then predicts.
        grids_key: where to put the arrays of the pair's `PairGrids`; not at all when None. Given, the labels, masks and
            key points that are not among `keys` stay on their scan's own array, for figures that are measured there.

    Raises:
        ValueError: when an option is none of the above.
        InputError: when the dict lacks a scan, or a scan is not 3D or has no place in space, or when a label or mask
            that stays is not on its scan's grid.
    """

    def __init__(
        self,
        keys: KeysCollection = _KEYS,
        *,
        shape: Sequence[int] | None = None,
        spacing: float | Sequence[float] | None = None,
        multiple: int = 16,
        centre_align: bool = True,
        grids_key: str | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        unknown = [str(key) for key in self.keys if key not in _KEYS]
        if unknown:
            raise ValueError(f"the keys are of {', '.join(_KEYS)}, not '{unknown[0]}'")
        _check_shape(shape, multiple)
        _check_spacing(spacing)
        self.shape = shape
        self.spacing = spacing
        self.multiple = multiple
        self.centre_align = centre_align
        self.grids_key = grids_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample the pair."""
        result = dict(data)
        grids = {role: _image_grid(role, data) for role in ("fixed", "moving")}
        target = network_grid(grids["fixed"], shape=self.shape, spacing=self.spacing, multiple=self.multiple)
        shift = {"fixed": np.zeros(3), "moving": np.zeros(3)}  # network's space -> role's space, mm
        if self.centre_align:
            shift["moving"] = grids["moving"].centre - grids["fixed"].centre
        if self.grids_key is not None:
            for role in ("fixed", "moving"):
                for key in {f"{role}_label", f"{role}_mask"}.difference(map(str, self.keys)).intersection(data):
                    _check_on_grid(key, data[key], grids[role])
            fixed_to_moving = np.eye(4)
            fixed_to_moving[:3, 3] = shift["moving"]
            pair = PairGrids(network=target, fixed_to_moving=fixed_to_moving, **grids)
            result[self.grids_key] = pair.to_arrays()
        for key in self.key_iterator(result):
            role, _, kind = str(key).partition("_")
            if kind == "keypoints":
                physical = grids[role].to_physical(np.asarray(result[key])) - shift[role]
                result["spacing"] = torch.from_numpy(target.spacing.astype(np.float32))  # for errors in mm
                result[key] = torch.from_numpy(target.to_voxels(physical).astype(np.float32))
            else:
                result[key] = _resample(str(key), result[key], grids[role], target, shift[role], nearest=bool(kind))
        return result


def _image_grid(key: str, data: Mapping[Hashable, Any]) -> Grid:
    if key not in data:
        raise InputError(f"a pair needs 'fixed' and 'moving', and there is no '{key}'")
    if not isinstance(data[key], MetaTensor):
        raise InputError(f"'{key}' has no place in space: it is not a MetaTensor, as LoadImaged makes it")
    return _grid(key, data[key])


def _grid(key: str, volume: Tensor, default: Grid | None = None) -> Grid:
    if volume.ndim != 4:
        raise InputError(
            f"'{key}' must be 3D with a channel axis, (C, D, H, W), and its shape is {tuple(volume.shape)}"
        )
    shape = tuple(int(n) for n in volume.shape[1:])
    if isinstance(volume, MetaTensor):  # MONAI's affines are RAS
        return Grid((shape[0], shape[1], shape[2]), swap_lps_ras(volume.affine.cpu().numpy()))
    if default is None or default.shape != shape:
        raise InputError(f"'{key}' has no place in space and another shape than its image: {shape}")
    return default


def _check_on_grid(key: str, volume: Tensor, image_grid: Grid) -> None:
    grid = _grid(key, volume, image_grid)
    name = f"'{volume.meta.get('filename_or_obj', key) if isinstance(volume, MetaTensor) else key}'"
    if grid.shape != image_grid.shape:
        raise InputError(f"{name} has the shape {grid.shape}, but its image has the shape {image_grid.shape}")
    distance = float(np.abs(grid.corners - image_grid.corners).max())
    if distance > _SAME_GRID_TOLERANCE:
        raise InputError(f"{name} is not on the grid of its image: their corners are up to {distance:.2f} mm apart")


def _resample(key: str, value: Any, image_grid: Grid, target: Grid, shift: np.ndarray, *, nearest: bool) -> MetaTensor:
    source = _grid(key, value, image_grid)
    physical = np.eye(4)
    physical[:3, 3] = shift
    volume = torch.as_tensor(value.as_tensor() if isinstance(value, MetaTensor) else value)
    mode = "nearest" if nearest else "bilinear"
    resampled = resample_to_grid(volume, source, target, target_to_source=physical, mode=mode)
    resampled = resampled.to(volume.dtype) if nearest else resampled
    meta = dict(value.meta) if isinstance(value, MetaTensor) else {}
    meta["affine"] = torch.from_numpy(swap_lps_ras(target.affine))
    return MetaTensor(resampled, meta=meta)
