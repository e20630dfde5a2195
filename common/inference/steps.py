"""The steps of a registration as MONAI dictionary transforms.

Before the network: `LoadPaird`, `AlignPaird`, `SampleNetworkGridd`; after it: `TakeUncertaintyd`,
`OptimizeInstanced`, `FinishRegistrationd`, `WriteRegistrationd`. The dictionary carries, beside the request itself,

- `pair`: `ImagePair`
- `fixed_to_moving`: (4, 4) array, LPS mm
- `network_grid`: `Grid`
- `image`: (2, D, H, W) tensor on the network grid, moving and fixed
- `pred`: the network's ddf (3, D, H, W) on the network grid; after `FinishRegistrationd` what a server shows
- `uncertainty`: (L, D, H, W) in mm on the network grid, where asked for; see `TakeUncertaintyd`
- `registration`: `Registration`
- `seconds`: time of each step; the network's runs from `network_started` to the next step
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from common.errors import InputError
from common.geometry.folding import remove_folding
from common.geometry.spaces import Grid, itk_to_array, resample_to_grid, swap_lps_ras
from common.inference.affine import AffineMode, align_affine
from common.inference.inferer import check_memory, choose_network_grid
from common.inference.instance import (
    LEARNING_RATE,
    SMOOTHNESS,
    UPDATE_SMOOTHNESS,
    InstanceSimilarity,
    optimize_instance,
)
from common.inference.output import write_registration
from common.inference.pair import ImagePair, Registration, load_pair
from common.inference.weights import file_sha256
from common.options import as_flag
from common.transforms.intensity import Modality

__all__ = [
    "AlignPaird",
    "FinishRegistrationd",
    "LoadPaird",
    "OptimizeInstanced",
    "SampleNetworkGridd",
    "WriteRegistrationd",
]

Data = dict[Hashable, Any]


@contextmanager
def _timed(data: Data, step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    data["seconds"] = {**data.get("seconds", {}), step: time.perf_counter() - start}


class LoadPaird(Transform):
    """Read the pair and all that belongs to it; see `load_pair`.

    Args:
        modality: "mr", "ct" or "auto".
        window: of CT, the one that the weights were trained with; a name of `CT_WINDOWS` or its two ends in HU.
    """

    def __init__(self, *, modality: Modality = "auto", window: str | tuple[float, float] = "balanced") -> None:
        self.modality = modality
        self.window = window

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        result = dict(data)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of this pair
        with _timed(result, "reading"):
            files = {str(key): value for key, value in data.items()}
            result["pair"] = load_pair(files, modality=self.modality, window=self.window)
        return result


class AlignPaird(Transform):
    """The affine stage; see `align_affine`.

    Args:
        mode: "none", "centers", "moments", "rigid" or "affine".
    """

    def __init__(self, *, mode: AffineMode = "affine") -> None:
        self.mode = mode

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        result = dict(data)
        pair: ImagePair = result["pair"]
        with _timed(result, "affine"):
            result["fixed_to_moving"] = align_affine(
                pair.fixed_intensity, pair.fixed_grid, pair.moving_intensity, pair.moving_grid, mode=self.mode
            )
        return result


class SampleNetworkGridd(Transform):
    """Resample both scans onto the network grid, the moving one through the affine stage.

    Args:
        bytes_per_voxel: what a forward pass of the network takes at its peak.
        spacing: mm of the network grid; chosen by `choose_network_grid` when None.
        max_voxels: upper limit of the choice.
        margin: mm around the fixed image's field of view in which the network sees the moving image, too: a crop's
            counterpart may lie outside of it.
        device: where the network runs.
    """

    def __init__(
        self,
        *,
        bytes_per_voxel: float,
        spacing: float | None = None,
        max_voxels: int = 192**3,
        margin: float = 0.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.bytes_per_voxel = bytes_per_voxel
        self.spacing = spacing
        self.max_voxels = max_voxels
        self.margin = margin
        self.device = device

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        result = dict(data)
        pair: ImagePair = result["pair"]
        if not (isinstance(self.margin, int | float) and self.margin >= 0):
            raise InputError(f"the margin must be a number of mm, 0 or more, got {self.margin!r}")
        with _timed(result, "resampling"):
            grid = choose_network_grid(
                pair.fixed_grid,
                bytes_per_voxel=self.bytes_per_voxel,
                spacing=self.spacing,
                max_voxels=self.max_voxels,
                device=self.device,
            )
            if self.margin:
                grid = grid.extended(math.ceil(self.margin / float(grid.spacing.min()) - 1e-6))
                check_memory(grid, bytes_per_voxel=self.bytes_per_voxel, device=self.device)
            moving = resample_to_grid(
                pair.moving_intensity, pair.moving_grid, grid, target_to_source=result["fixed_to_moving"]
            )
            padding = "zeros" if self.margin else "border"
            fixed = resample_to_grid(pair.fixed_intensity, pair.fixed_grid, grid, padding_mode=padding)
        result["network_grid"] = grid
        result["image"] = torch.cat([moving, fixed]).to(self.device)
        _wait_for(result["image"])
        result["network_started"] = time.perf_counter()
        # MONAI Label restores its result onto this grid: the fixed image's own.
        affine = swap_lps_ras(pair.fixed_grid.affine)
        result["image_meta_dict"] = {
            "spatial_shape": np.array(pair.fixed_grid.shape),
            "affine": affine,
            "original_affine": affine,
        }
        return result


class OptimizeInstanced(Transform):
    """Instance optimisation of the network's field; see `optimize_instance`.

    Args:
        iterations: Adam steps; 0 leaves the field as it is.
        similarity: "auto", "mind" or "ncc".
        smoothness, update_smoothness: weights of the two diffusion terms.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        *,
        iterations: int = 0,
        similarity: InstanceSimilarity = "auto",
        smoothness: float = SMOOTHNESS,
        update_smoothness: float = UPDATE_SMOOTHNESS,
        learning_rate: float = LEARNING_RATE,
    ) -> None:
        self.iterations = iterations
        self.similarity = similarity
        self.smoothness = smoothness
        self.update_smoothness = update_smoothness
        self.learning_rate = learning_rate

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        result = dict(data)
        if "network_started" in result:
            _wait_for(result["image"])
            network = time.perf_counter() - result["network_started"]
            result["seconds"] = {**result["seconds"], "network": network}
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int):
            raise InputError(f"instance optimisation takes a number of steps, got {self.iterations!r}")
        with _timed(result, "instance_optimization"):
            result["pred"] = optimize_instance(
                _unbatched(result["image"]),
                _unbatched(result["pred"]),
                iterations=self.iterations,
                similarity=self.similarity,
                smoothness=self.smoothness,
                update_smoothness=self.update_smoothness,
                learning_rate=self.learning_rate,
            )
            _wait_for(result["pred"])
        return result


class FinishRegistrationd(Transform):
    """Make the transform of both stages from the network's field.

    `pred` becomes the moving label on the fixed image's own grid where there is one, else the warped moving image:
    what MONAI Label sends back. The field itself is in `registration`.

    Args:
        unfold: change the field where it folds on the network's grid or the fixed scan's, or nearly does, or seems to
            by ITK's measure, see `remove_folding`; `unfolded_voxels` says at how many voxels.
    """

    def __init__(self, *, unfold: bool = True) -> None:
        self.unfold = as_flag(unfold, "unfold")

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        result = dict(data)
        grid: Grid = result["network_grid"]
        ddf = _unbatched(result["pred"]).detach()
        if not bool(torch.isfinite(ddf).all()):
            pair = f"{result.get('fixed')} and {result.get('moving')}"
            raise InputError(f"the field of {pair} holds values that are not finite; try --amp False, full precision")
        if self.unfold:
            with _timed(result, "unfolding"):
                ddf, result["unfolded_voxels"] = remove_folding(
                    ddf.float(),
                    grid=grid,
                    fixed_to_moving=result["fixed_to_moving"],
                    seen_on=result["pair"].fixed_grid,
                )
        with _timed(result, "warping"):
            registration = Registration(
                result["pair"],
                fixed_to_moving=result["fixed_to_moving"],
                ddf=ddf,
                network_grid=grid,
                uncertainty=result.get("uncertainty"),
            )
            shown = registration.warped if registration.warped_label is None else registration.warped_label
        result["registration"] = registration
        result["pred"] = MetaTensor(
            torch.from_numpy(np.ascontiguousarray(itk_to_array(shown)))[None],
            affine=torch.from_numpy(swap_lps_ras(registration.pair.fixed_grid.affine)),
        )
        return result


class WriteRegistrationd(Transform):
    """Write everything a registration writes; see `write_registration`. Does nothing without an output folder.

    Args:
        output_dir: the folder, unless the item itself names one under `output_dir`.
        weights: path of the network's weights, whose fingerprint goes into metrics.json.
        settings: what metrics.json repeats of the configuration.
        report: also draw report.png.
        learn2reg: also write the field in Learn2Reg's form.
    """

    def __init__(
        self,
        *,
        output_dir: str | None = None,
        weights: str | None = None,
        settings: Mapping[str, Any] | None = None,
        report: bool = True,
        learn2reg: bool = False,
    ) -> None:
        self.output_dir = output_dir
        self.weights = weights
        self.settings = dict(settings or {})
        self.report = as_flag(report, "report")
        self.learn2reg = as_flag(learn2reg, "learn2reg")

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        result = dict(data)
        folder = result.get("output_dir") or self.output_dir
        if not folder:
            return result
        result["metrics"] = write_registration(
            str(folder),
            result["registration"],
            seconds=result.get("seconds", {}),
            settings={
                **self.settings,
                **({"unfolded_voxels": result["unfolded_voxels"]} if "unfolded_voxels" in result else {}),
                "weights_sha256": file_sha256(self.weights) if self.weights else None,
                "fixed": str(result.get("fixed")),
                "moving": str(result.get("moving")),
                "network_grid_shape": list(result["network_grid"].shape),
                "network_grid_spacing_mm": [round(float(s), 6) for s in result["network_grid"].spacing],
            },
            report=self.report,
            learn2reg=self.learn2reg,
        )
        return result


def _wait_for(tensor: Tensor) -> None:
    """A GPU works on while the clock is read."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _unbatched(tensor: Tensor) -> Tensor:
    """A batch of one loses its batch axis: MONAI's evaluator keeps it, MONAI Label drops it."""
    plain = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
    return plain[0] if plain.ndim == 5 else plain
