"""Applying a registration network to images of any size, choosing the grid it works on."""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from torch import Tensor

from common.errors import InputError
from common.geometry.fields import compose, resize_ddf
from common.geometry.spaces import Grid
from common.inference.uncertainty import mirrored_spread
from common.layers.warp import warp
from common.options import as_flag
from common.precision import bfloat16_region

__all__ = ["PaddedInferer", "SequenceInferer", "choose_network_grid"]


class PaddedInferer(Inferer):
    """Pads the pair to the network's stride, runs the network, and crops the field back.

    The border is repeated on both sides, so a voxel displacement needs no correction.

    A network reaches as far as it has seen in training, in voxels. Coarse passes carry that further: the pair is first
    registered at a half, a quarter, ... of the resolution, coarsest first, and each pass goes on from the moving image
    that the passes before have warped. An eighth of the work doubles the reach; weights need no training for it.

    Args:
        multiple: sizes become multiples of this.
        minimum: smallest size along any axis.
        amp: run the network in float16 on a GPU, never on a CPU.
        uncertainty: also estimate the spread of each of the network's fields, see `mirrored_spread`; four times the
            work. Of the last pass.
        coarse_passes: number of passes before the one at full resolution. One that would leave fewer than `minimum`
            voxels along an axis is left out.

    Raises:
        InputError: when `coarse_passes` is not a number, 0 or more.
    """

    def __init__(
        self,
        *,
        multiple: int,
        minimum: int = 32,
        amp: bool = False,
        uncertainty: bool = False,
        coarse_passes: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(coarse_passes, bool) or not isinstance(coarse_passes, int) or coarse_passes < 0:
            raise InputError(f"coarse_passes must be a whole number, 0 or more, got {coarse_passes!r}")
        self.coarse_passes = coarse_passes
        self.multiple = multiple
        self.minimum = minimum
        self.amp = as_flag(amp, "amp")
        self.uncertainty = as_flag(uncertainty, "uncertainty")

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """(B, 2, D, H, W) of any size -> ddf (B, 3, D, H, W), then the spreads (B, L, D, H, W) where asked for."""
        shape = inputs.shape[2:]
        ddf: Tensor | None = None
        for factor in (2**n for n in range(self.coarse_passes, 0, -1)):
            coarse = [round(size / factor) for size in shape]
            if min(coarse) < self.minimum:
                continue
            found = self._run(_shrink(_continued(inputs, ddf), coarse), network, False, *args, **kwargs)
            ddf = _joined(ddf, resize_ddf(found, shape))
        result = self._run(_continued(inputs, ddf), network, self.uncertainty, *args, **kwargs)
        return torch.cat([_joined(ddf, result[:, :3]), result[:, 3:]], dim=1)

    def _run(self, inputs: Tensor, network: Any, uncertainty: bool, *args: Any, **kwargs: Any) -> Tensor:
        padding: list[int] = []
        for size in reversed(inputs.shape[2:]):
            target = max(math.ceil(size / self.multiple) * self.multiple, self.minimum)
            before = (target - size) // 2
            padding += [before, target - size - before]
        padded = F.pad(inputs, padding, mode="replicate") if any(padding) else inputs
        with torch.autocast(device_type="cuda", enabled=self.amp and inputs.device.type == "cuda"):
            if uncertainty:
                field = torch.cat(mirrored_spread(network.forward_sequence, padded), dim=1)
            else:
                field = network(padded, *args, **kwargs)
        start = padding[4], padding[2], padding[0]
        d, h, w = (slice(s, s + n) for s, n in zip(start, inputs.shape[2:], strict=True))
        return field[:, :, d, h, w].float()


def _continued(image: Tensor, ddf: Tensor | None) -> Tensor:
    """The pair with its moving image warped by what was found so far."""
    if ddf is None:
        return image
    moving, fixed = image.float().split(1, dim=1)
    return torch.cat([warp(moving, ddf, padding_mode="border"), fixed], dim=1)


def _joined(ddf: Tensor | None, found: Tensor) -> Tensor:
    return found if ddf is None else compose(ddf, found)


def _shrink(image: Tensor, shape: list[int]) -> Tensor:
    """Averaged, on a grid whose corners are the full grid's, as `resize_ddf` has it."""
    averaged = F.avg_pool3d(image.float(), 3, stride=1, padding=1, count_include_pad=False)
    return F.interpolate(averaged, size=shape, mode="trilinear", align_corners=True)


class SequenceInferer(Inferer):
    """Asks a network for all its intermediate fields, which training supervises.

    Args:
        sequence: ask for all, or else for the last one only.
        bfloat16: compute in bfloat16, see `common.precision.bfloat16_region`.
    """

    def __init__(self, *, sequence: bool = True, bfloat16: bool = False) -> None:
        super().__init__()
        self.sequence = sequence
        self.bfloat16 = as_flag(bfloat16, "bfloat16")

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        """(B, 2, D, H, W) -> list of ddf (B, 3, D, H, W), coarse to fine."""
        with bfloat16_region(inputs, self.bfloat16):
            return network.forward_sequence(inputs, *args, **kwargs) if self.sequence else [network(inputs)]


def choose_network_grid(
    fixed: Grid,
    *,
    bytes_per_voxel: float,
    spacing: float | None = None,
    max_voxels: int = 192**3,
    min_size: int = 96,
    device: str | torch.device = "cpu",
) -> Grid:
    """The isotropic grid a network registers on: the fixed image's field of view and axes.

    By default as fine as the fixed image (geometric mean of its spacing); up to twice as fine where an axis would have
    fewer than `min_size` voxels, of which the coarsest level of a pyramid would leave too few to match; coarser where
    it would exceed `max_voxels` or half of the memory that is free now.

    Args:
        fixed: the fixed image's grid.
        bytes_per_voxel: what a forward pass takes at its peak.
        spacing: mm; chosen when None.
        max_voxels: upper limit of the choice; an explicit `spacing` may exceed it, but not the memory.
        min_size: see above.
        device: where the network runs.

    Returns:
        a grid that covers the fixed image's field of view.

    Raises:
        InputError: when `spacing` is not positive, or asks for more than the free memory.
    """
    if spacing is not None:
        if not (isinstance(spacing, int | float) and spacing > 0):
            raise InputError(f"the network grid's spacing must be a positive number of mm, got {spacing!r}")
        grid = fixed.with_spacing(float(spacing))
        check_memory(grid, bytes_per_voxel=bytes_per_voxel, device=device)
        return grid
    volume = math.prod(n * float(s) for n, s in zip(fixed.shape, fixed.spacing, strict=True))
    native = float(fixed.spacing.prod() ** (1 / 3))
    shortest = min(n * float(s) for n, s in zip(fixed.shape, fixed.spacing, strict=True)) / native
    finest = native / min(max(min_size / shortest, 1.0), 2.0)
    affordable = min(float(max_voxels), 0.5 * _free_bytes(torch.device(device)) / bytes_per_voxel)
    return fixed.with_spacing(max(finest, (volume / affordable) ** (1 / 3)))


def check_memory(grid: Grid, *, bytes_per_voxel: float, device: str | torch.device = "cpu") -> None:
    """Refuse a network grid that the free memory cannot hold.

    Raises:
        InputError: with the figures.
    """
    free = _free_bytes(torch.device(device))
    needed = math.prod(grid.shape) * bytes_per_voxel
    if needed > free:
        size = f"{float(grid.spacing.min()):g} mm"
        raise InputError(
            f"a network grid of {size} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
            "free; choose a larger spacing"
        )


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        # What PyTorch keeps of earlier pairs is free to it, and not to the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return float(psutil.virtual_memory().available)
