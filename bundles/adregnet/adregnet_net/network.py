"""AD-RegNet: attention-driven framework for non-rigid medical image registration.

"Attention-Driven Framework for Non-Rigid Medical Image Registration", arXiv 2602.07088. The text at hand has neither
the equations in full nor most of the numbers, and no code is public: what is ours is said where it stands. Equation
numbers are the preprint's.

One U-Net sees both images. At each of its five levels the two images ask each other for matches (bidirectional
cross-attention), regions of the result weigh each other (regional adaptive attention), and a head reads a displacement.
From coarse to fine, a learned map decides where a level's own displacement replaces what comes from below. The moving
image is warped once, by the finest field.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adregnet_net.attention import BidirectionalCrossAttention, RegionalAdaptiveAttention
from adregnet_net.backbone import SMALL, SharedUNet
from common.layers.contract import check_pair
from common.precision import float32_below

__all__ = ["ADRegNet", "FieldFusion", "LevelFeatures"]


class LevelFeatures(nn.Module):
    """What one level knows of the correspondence, A^l: both attentions on the features of both images.

    Args:
        channels: of the level.
        window: of the cross-attention: 0 for the whole volume, None for no cross-attention.
        region: of the regional attention, in voxels; None for none.
    """

    def __init__(self, *, channels: int, window: int | None, region: int | None) -> None:
        super().__init__()
        self.cross_attention = (
            None if window is None else BidirectionalCrossAttention(channels=channels, window=window or None)
        )
        self.regional_attention = (
            None if region is None else RegionalAdaptiveAttention(channels=channels, region=region)
        )
        found = channels + 3 * self.cross_attention.heads if self.cross_attention is not None else 0
        self.join = nn.Conv3d(2 * channels + found, channels, 1)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """d_M^l and d_F^l, (B, C, D, H, W) -> (B, C, D, H, W)."""
        precision, (moving, fixed) = float32_below(SMALL, moving, fixed)
        with precision:
            return self._correspond(moving, fixed)

    def _correspond(self, moving: Tensor, fixed: Tensor) -> Tensor:
        parts = [moving, fixed]
        if self.cross_attention is not None:
            found = self.cross_attention(moving, fixed)
            parts += [found.features, found.displacement.to(moving.dtype)]
        features = self.join(torch.cat(parts, dim=1))
        return features if self.regional_attention is None else self.regional_attention(features)


class FieldFusion(nn.Module):
    """Blends a level's displacement with the one from below, equations 14 and 15.

    Args:
        channels: of the level's features.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // 2)
        self.weight_map = nn.Sequential(
            nn.Conv3d(channels + 3, hidden, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv3d(hidden, 1, 1)
        )

    def forward(self, features: Tensor, own: Tensor, below: Tensor) -> Tensor:
        """(B, C, D, H, W), phi^l (B, 3, D, H, W), upsampled Phi^(l+1) (B, 3, D, H, W) -> Phi^l (B, 3, D, H, W)."""
        precision, (features, below) = float32_below(SMALL, features, below)
        with precision:
            weight = torch.sigmoid(self.weight_map(torch.cat([features, below.to(features.dtype)], dim=1)).float())
        return weight * own + (1 - weight) * below


class ADRegNet(nn.Module):
    """Attention-driven registration network. 9,405,426 parameters with the defaults.

    Args:
        channels: of the levels, from fine to coarse.
        windows: of the cross-attention at each level, in the level's voxels: 0 for the whole volume, null for none.
        regions: side of the regional attention's regions at each level, in the level's voxels; null for none.
        multi_resolution: a field at each level, fused from coarse to fine; otherwise the levels' features are summed
            at the finest level and a single head reads the field (the paper's ablation).
        checkpointing: see `SharedUNet`.
    """

    def __init__(
        self,
        *,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        windows: Sequence[int | None] = (None, 4, 8, 0, 0),
        regions: Sequence[int | None] = (8, 8, 4, 2, 2),
        multi_resolution: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= len(channels) == len(windows) == len(regions):
            given = f"{list(channels)}, {list(windows)} and {list(regions)}"
            raise ValueError(f"each of two or more levels has channels, a window and a region, got {given}")
        self.stride = 2 ** (len(channels) - 1)
        self.multi_resolution = multi_resolution
        self.backbone = SharedUNet(channels=channels, checkpointing=checkpointing)
        self.levels = nn.ModuleList(
            LevelFeatures(channels=c, window=window, region=region)
            for c, window, region in zip(channels, windows, regions, strict=True)
        )
        with_head = channels if multi_resolution else channels[:1]
        self.heads = nn.ModuleList(_head(c) for c in with_head)
        self.fusions = nn.ModuleList(FieldFusion(channels=c) for c in with_head[:-1])
        others = () if multi_resolution else channels[1:]
        self.gather = nn.ModuleList(nn.Conv3d(c, channels[0], 1) for c in others)

    def forward(self, image: Tensor) -> Tensor:
        """Register a pair.

        Args:
            image: (B, 2, D, H, W), channel 0 moving, channel 1 fixed, intensities in [0, 1].

        Returns:
            (B, 3, D, H, W): ddf in voxels, pull-back, on the fixed grid.

        Raises:
            ValueError: when a size is not a multiple of 16, or all three are 16.
        """
        return self._fields(image)[-1]

    def forward_sequence(self, image: Tensor) -> list[Tensor]:
        """The fused field of each level, coarse to fine, at full resolution; the last is `forward`'s.

        Args:
            image: as for `forward`.

        Returns:
            one field (B, 3, D, H, W) a level, in voxels.
        """
        fields = self._fields(image)
        return [_enlarge(field, 2 ** (len(fields) - 1 - i)) for i, field in enumerate(fields)]

    def _fields(self, image: Tensor) -> list[Tensor]:
        """Phi^5 to Phi^1, each in voxels of its level."""
        self._check(image)
        moving, fixed = self._features(image)
        levels = [level(m, f) for level, m, f in zip(self.levels, moving, fixed, strict=True)]
        if not self.multi_resolution:
            size = levels[0].shape[2:]
            for gather, features in zip(self.gather, levels[1:], strict=True):
                levels[0] = levels[0] + F.interpolate(gather(features), size=size, mode="trilinear")
            return [self._displacement(0, levels[0])]
        fields = [self._displacement(-1, levels[-1])]  # Phi^5 = phi^5
        for level in reversed(range(len(self.fusions))):
            own = self._displacement(level, levels[level])
            fields.append(self.fusions[level](levels[level], own, _enlarge(fields[-1], 2)))
        return fields

    def _displacement(self, level: int, features: Tensor) -> Tensor:
        """phi^l, equation 13."""
        precision, (features,) = float32_below(SMALL, features)
        with precision:
            return self.heads[level](features).float()

    def _features(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Decoder features of the moving and of the fixed image, fine to coarse."""
        batch = image.shape[0]
        pyramid = self.backbone(torch.cat([image[:, :1], image[:, 1:]]))  # each (2B, C, ...)
        return [d[:batch] for d in pyramid], [d[batch:] for d in pyramid]

    def _check(self, image: Tensor) -> None:
        check_pair(image, network="AD-RegNet", stride=self.stride)
        if all(size == self.stride for size in image.shape[2:]):  # instance normalisation of one voxel
            raise ValueError(
                f"AD-RegNet needs two voxels or more at its stride {self.stride}, got {tuple(image.shape[2:])}"
            )


def _head(channels: int) -> nn.Conv3d:
    head = nn.Conv3d(channels, 3, 3, padding=1)
    nn.init.normal_(head.weight, std=1e-5)  # training starts from the identity
    assert head.bias is not None
    nn.init.zeros_(head.bias)
    return head


def _enlarge(field: Tensor, factor: int) -> Tensor:
    """Field at `factor` times the resolution, by voxel centres (not corners): displacements grow by exactly that."""
    return field if factor == 1 else factor * F.interpolate(field, scale_factor=factor, mode="trilinear")
