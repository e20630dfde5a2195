"""AD-RegNet's backbone: a 3D U-Net whose weights the fixed and the moving image share (section III-B1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.precision import float32_below

__all__ = ["SMALL", "SharedUNet"]

SMALL = 8  # voxels; levels of a shorter side are computed in float32


class SharedUNet(nn.Module):
    """Five levels; two convolutions a level going down and two coming up. 7,998,400 parameters with the defaults.

    The paper has the levels and the kinds of layers; widths, normalisation and activation are ours.

    Args:
        channels: of each level, from fine to coarse.
        checkpointing: keep no activations of the two finest levels for the backward pass, but compute them again.
    """

    def __init__(self, *, channels: Sequence[int] = (16, 32, 64, 128, 256), checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.encoders = nn.ModuleList(_double(1 if level == 0 else c, c) for level, c in enumerate(channels))
        self.downs = nn.ModuleList(nn.Conv3d(a, b, 3, stride=2, padding=1) for a, b in pairwise(channels))
        self.ups = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in pairwise(channels))
        self.decoders = nn.ModuleList(_double(2 * c, c) for c in channels[:-1])

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) -> decoder features d^1 to d^5: (B, channels[l], D / 2^l, ...), equations 4 to 7."""
        skips = []
        x = image
        for level, encoder in enumerate(self.encoders):
            x = self._run(encoder, x, again=level < 2)  # e^l
            skips.append(x)
            if level < len(self.downs):
                x = self._run(self.downs[level], x)
        pyramid = [x]
        for level in reversed(range(len(self.decoders))):
            x = torch.cat([self._run(self.ups[level], x), skips[level]], dim=1)
            x = self._run(self.decoders[level], x, again=level < 2)  # d^l
            pyramid.append(x)
        return pyramid[::-1]

    def _run(self, block: Callable[[Tensor], Tensor], x: Tensor, *, again: bool = False) -> Tensor:
        precision, (x,) = float32_below(SMALL, x)
        with precision:
            if again and self.checkpointing and torch.is_grad_enabled():
                result: Tensor = checkpoint(block, x, use_reentrant=False)
                return result
            return block(x)


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (in_channels, out_channels):
        layers += [
            nn.Conv3d(before, out_channels, 3, padding=1),
            nn.InstanceNorm3d(out_channels, affine=True),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(*layers)
