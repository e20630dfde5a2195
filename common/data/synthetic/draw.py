"""Random numbers and smooth noise from one seeded generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Draw", "smooth_noise"]


class Draw:
    """Uniform and normal numbers from one generator, on its device."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.device = generator.device

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, device=self.device))

    def vector(self, n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=self.generator, device=self.device)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, device=self.device)

    def chance(self, probability: float) -> bool:
        """Draws nothing when there is nothing to decide, so that a feature left out changes no other number."""
        return probability > 0 and self.uniform(0, 1) < probability

    def integer(self, low: int, high: int) -> int:
        """Of low..high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator, device=self.device))


def smooth_noise(shape: Sequence[int], scales: Sequence[float], draw: Draw) -> Tensor:
    """Sum of smooth unit-variance noises (C, *size), of two or three axes, with these distances of control points."""
    channels, *size = shape
    total = torch.zeros(tuple(shape), device=draw.device)
    for scale in scales:
        control = [max(2, math.ceil(n / scale) + 1) for n in size]
        coarse = draw.normal((1, channels, *control))
        mode = "trilinear" if len(size) == 3 else "bilinear"
        total += F.interpolate(coarse, size=tuple(size), mode=mode, align_corners=True)[0]
    return total / math.sqrt(len(scales))
