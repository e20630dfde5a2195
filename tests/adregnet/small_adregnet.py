"""Small AD-RegNets and known features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from adregnet_net import ADRegNet
from torch import Tensor, nn


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def small(seed: int = 0, **options: Any) -> ADRegNet:
    """All five levels with few channels, two heads at the coarsest one."""
    torch.manual_seed(seed)
    return ADRegNet(**{"channels": (4, 8, 16, 16, 32), **options})


def lively(seed: int = 0, head_std: float = 0.05, **options: Any) -> ADRegNet:
    """Displacements of the order of a voxel, and regions that do more than hand on what they got."""
    network = small(seed, **options)
    for head in network.heads:
        nn.init.normal_(head.weight, std=head_std)
    for level in network.levels:
        if level.regional_attention is not None:
            nn.init.normal_(level.regional_attention.value.weight, std=0.3)
            nn.init.normal_(level.regional_attention.score.weight, std=0.3)
    return network


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_pair(shape: Sequence[int], seed: int = 0) -> Tensor:
    """(1, 2, D, H, W) in [0, 1], control points 5 voxels apart."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 2, *(n // 5 + 2 for n in shape), generator=generator)
    return F.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)


def sharp(*shape: int, seed: int = 0) -> Tensor:
    """(1, 16, D, H, W) features that match themselves and nothing else."""
    return 40 * F.normalize(noise(1, 16, *shape, seed=seed), dim=1)
