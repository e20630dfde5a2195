"""Small RWCNets, known images and stand-ins for parts of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rwcnet_net import RWCNet
from rwcnet_net.network import StagePatch
from rwcnet_net.subnetwork import SubNetwork
from torch import Tensor, nn

from common.layers.patches import Box

VARIANTS = ["paper", "published"]

Refine = Callable[[StagePatch], tuple[list[Tensor], Tensor]]


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def small(seed: int = 0, **options: Any) -> RWCNet:
    """One step and a narrow window in each of three stages, few hidden channels; in training mode."""
    torch.manual_seed(seed)
    defaults = {"steps": (1, 1, 1), "radii": (1, 1, 1), "hidden_channels": 8, "overlap": 2, "dropout": 0.0}
    return RWCNet(**{**defaults, **options})


def lively(head_std: float = 0.1, **options: Any) -> RWCNet:
    """A small network whose random updates are of the order of a voxel; ready for use."""
    network = small(**options)
    for subnetwork in network.stages:
        enliven(subnetwork, head_std)
    return network.eval()


def enliven(subnetwork: SubNetwork, head_std: float = 0.1) -> SubNetwork:
    """Random last convolution, in place of one next to the identity."""
    nn.init.normal_(subnetwork.update_block.flow_head.flow.weight, std=head_std)
    return subnetwork


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_noise(channels: int, shape: Sequence[int], scale: int, seed: int = 0) -> Tensor:
    """(1, channels, D, H, W) in [0, 1], control points `scale` voxels apart."""
    coarse = noise(1, channels, *(n // scale + 2 for n in shape), seed=seed)
    return F.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)


def positions(shape: Sequence[int]) -> Tensor:
    """(1, 3, D, H, W): each voxel's own place."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))[None]


def cut(volume: Tensor, box: Box) -> Tensor:
    return volume[(..., *box)]


class Stub:
    """Stands in for the sub-networks: keeps what each saw, and answers by a function of (stage, box, patch).

    Args:
        network: whose `refine` it replaces.
        field: of a patch, (1, 3, d, h, w).
        hidden: of a patch, zeros when None.
    """

    def __init__(
        self,
        network: RWCNet,
        field: Callable[[StagePatch], Tensor],
        hidden: Callable[[StagePatch], Tensor] | None = None,
    ) -> None:
        self.seen: list[StagePatch] = []
        self.field = field
        self.hidden = hidden
        network.refine = self  # type: ignore[method-assign,assignment]

    def __call__(self, patch: StagePatch) -> tuple[list[Tensor], Tensor]:
        self.seen.append(patch)
        field = self.field(patch)
        hidden = patch.fixed.new_zeros(1, 8, *field.shape[2:]) if self.hidden is None else self.hidden(patch)
        return [field], hidden

    def of_stage(self, stage: int) -> list[StagePatch]:
        return [patch for patch in self.seen if patch.stage == stage]


def whole(fields: Sequence[Tensor]) -> Callable[[StagePatch], Tensor]:
    """A patch of each stage's known volume."""
    return lambda patch: cut(fields[patch.stage], patch.box)
