"""ReCorr: recurrent dynamic correlation for deformable 3D registration.

T. Li, M. Staring, Y. Qiao: "Efficient Large-Deformation Medical Image Registration via Recurrent Dynamic Correlation",
IEEE TMI 2025, arXiv 2510.22380. Written from a description of the architecture; the authors' code has no licence and
none of it is used. "Published" in the comments is that code's behaviour (YQiaoGroup/Registration-ReCorr).

One encoder makes a five-scale pyramid of both images. From 1/16 to 1/2 of the resolution, each level warps the moving
features by the running displacement, correlates them with the fixed features in a 3x3x3 window, and a recurrent update
block turns the 27 similarities into a better displacement. The window follows the displacement, so a reach of one voxel
an iteration adds up to 84 voxels of the image. One convolution makes the full-resolution field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.geometry.fields import exponentiate
from common.layers.contract import check_pair
from common.layers.correlation import LocalCorrelation
from common.layers.motion import FlowHead, MotionEncoder
from common.layers.recurrent import SepConvGRU
from common.layers.warp import warp
from common.precision import float32_below

__all__ = ["FeatureEncoder", "FinalFlow", "ReCorr", "UpdateBlock"]

_LARGEST_KERNEL = 7  # of the motion encoder


class FeatureEncoder(nn.Module):
    """Five convolutions, five scales; no decoder and no skips. 116,576 parameters."""

    stride = 16

    def __init__(self, *, widths: Sequence[int] = (16, 32, 32, 32, 32)) -> None:
        super().__init__()
        blocks = [_encoder_block(1, widths[0], kernel_size=3, stride=1)]
        # The first strided kernel is 4^3 as published; with padding 1 it still halves an even size exactly.
        kernels = (4, 3, 3, 3)
        for i, kernel in enumerate(kernels):
            blocks.append(_encoder_block(widths[i], widths[i + 1], kernel_size=kernel, stride=2))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 1, D, H, W) in [-1, 1] -> maps at 1, 1/2, 1/4, 1/8 and 1/16 of the size."""
        pyramid = []
        features = image
        for block in self.blocks:
            features = block(features)
            pyramid.append(features)
        return pyramid


def _encoder_block(in_channels: int, out_channels: int, *, kernel_size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel_size, stride=stride, padding=1),
        nn.BatchNorm3d(out_channels),
        nn.LeakyReLU(0.2),
    )


class UpdateBlock(nn.Module):
    """One recurrent step: motion features, GRU, displacement update. 149,232 parameters.

    The hidden state and the constant texture input both come from the fixed features; motion comes from the
    correlation and the running displacement. Keeping the two apart is the paper's decoupling of texture and motion.
    """

    def __init__(self, *, correlation_channels: int = 27, hidden_channels: int = 16, motion_channels: int = 32) -> None:
        super().__init__()
        self.motion_encoder = MotionEncoder(
            correlation_channels=correlation_channels,
            correlation_widths=(16, 32),
            flow_widths=(16, 32),
            out_channels=motion_channels,
            negative_slope=0.01,  # the functional default, unlike the 0.2 elsewhere; as published
        )
        self.gru = SepConvGRU(hidden_channels=hidden_channels, input_channels=hidden_channels + motion_channels)
        self.flow_head = FlowHead(in_channels=hidden_channels, hidden_channels=16, negative_slope=0.2)

    def forward(self, hidden: Tensor, texture: Tensor, correlation: Tensor, ddf: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state and texture (B, 16, ...), correlation (B, 27, ...), ddf (B, 3, ...) -> hidden, update."""
        motion = self.motion_encoder(correlation, ddf)  # (B, 32, D, H, W)
        hidden = self.gru(hidden, torch.cat([texture, motion], dim=1))  # (B, 16, D, H, W)
        return hidden, self.flow_head(hidden)


class FinalFlow(nn.Module):
    """Full-resolution field from both unwarped full-resolution maps and the upsampled field. 2,838 parameters.

    It replaces the field and does not add to it; as published.

    Args:
        feature_channels: channels of one full-resolution map.
        init: "default", PyTorch's initialisation, as published: an untrained network then ends in noise of about 0.4
            voxel; or "identity", which passes the incoming field through until training says otherwise, and makes
            short trainings work. The architecture and its weights' format are the same.
    """

    def __init__(self, *, feature_channels: int = 16, init: Literal["default", "identity"] = "default") -> None:
        super().__init__()
        self.conv = nn.Conv3d(2 * feature_channels + 3, 3, 3, padding=1)
        if init == "identity":
            nn.init.zeros_(self.conv.weight)
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)
            with torch.no_grad():
                for i in range(3):
                    self.conv.weight[i, 2 * feature_channels + i, 1, 1, 1] = 1.0
        elif init != "default":
            raise ValueError(f"init must be default or identity, got {init!r}")

    def forward(self, fixed: Tensor, moving: Tensor, ddf: Tensor) -> Tensor:
        """Two maps (B, 16, D, H, W) and the field (B, 3, D, H, W) -> (B, 3, D, H, W)."""
        return self.conv(torch.cat([fixed, moving, ddf], dim=1)).float()


class ReCorr(nn.Module):
    """Recurrent dynamic correlation network. 716,342 parameters with the defaults.

    Args:
        iterations: recurrent steps at 1/16, 1/8, 1/4 and 1/2 of the resolution. A level with 0 steps only hands the
            field on: (3, 3, 2, 0) trains the coarse levels at a third of the cost.
        diffeomorphic: replace the field by its exponential after every update (the paper's optional mode); the next
            update is added to the exponentiated field.
        final_init: initialisation of the last convolution, see `FinalFlow`.
    """

    stride = FeatureEncoder.stride

    def __init__(
        self,
        *,
        iterations: Sequence[int] = (3, 3, 2, 2),
        diffeomorphic: bool = False,
        final_init: Literal["default", "identity"] = "default",
    ) -> None:
        super().__init__()
        if len(iterations) != 4 or min(iterations) < 0:
            raise ValueError(f"iterations must be four numbers, for 1/16, 1/8, 1/4 and 1/2, got {iterations}")
        self.iterations = tuple(iterations)
        self.diffeomorphic = diffeomorphic
        self.encoder = FeatureEncoder()
        # radius 1 is the published "radius = 3": the window's width. W is the slowest channel axis; as published.
        self.correlation = LocalCorrelation(
            radius=1, metric="dot", normalization="channels", padding="replicate", order="whd"
        )
        self.update_blocks = nn.ModuleList(
            UpdateBlock(correlation_channels=self.correlation.out_channels) for _ in iterations
        )
        self.final_flow = FinalFlow(init=final_init)

    def forward(self, image: Tensor) -> Tensor:
        """Register a pair.

        Args:
            image: (B, 2, D, H, W), channel 0 moving, channel 1 fixed, intensities in [0, 1].

        Returns:
            (B, 3, D, H, W): ddf in voxels, pull-back, on the fixed grid.

        Raises:
            ValueError: when a size is not a multiple of 16.
        """
        return self._register(image, keep_sequence=False)[-1]

    def forward_sequence(self, image: Tensor) -> list[Tensor]:
        """All estimates from coarse to fine, for training.

        Args:
            image: as for `forward`.

        Returns:
            sum(iterations) + 1 fields (B, 3, D, H, W) at full resolution, in voxels; the last is `forward`'s.
        """
        return self._register(image, keep_sequence=True)

    def _register(self, image: Tensor, *, keep_sequence: bool) -> list[Tensor]:
        check_pair(image, network="ReCorr", stride=self.stride)
        scaled = 2 * image - 1
        both = torch.cat([scaled[:, 1:], scaled[:, :1]])  # (2B, 1, D, H, W): fixed, moving; joint batch statistics
        pyramid = [torch.chunk(features, 2) for features in self.encoder(both)]

        sequence = []
        ddf = image.new_zeros((image.shape[0], 3, *pyramid[-1][0].shape[2:]), dtype=torch.float32)
        for level, (update, steps) in enumerate(zip(self.update_blocks, self.iterations, strict=True)):
            scale = self.stride >> level  # 16, 8, 4, 2
            fixed, moving = pyramid[4 - level]  # each (B, 32, D/scale, H/scale, W/scale)
            precision, (fixed, moving) = float32_below(_LARGEST_KERNEL, fixed, moving)
            with precision:
                hidden, texture = torch.chunk(fixed, 2, dim=1)  # the hidden state starts anew at each level
                hidden, texture = torch.tanh(hidden), torch.relu(texture)
                for _ in range(steps):
                    ddf = ddf.detach()  # each step answers for its own update only
                    correlation = self.correlation(fixed, warp(moving, ddf, padding_mode="border"))
                    hidden, step = update(hidden, texture, correlation, ddf)
                    ddf = ddf + step.float()  # adding, where composing would be exact; as published
                    if self.diffeomorphic:
                        ddf = exponentiate(ddf)
                    if keep_sequence:
                        sequence.append(_upsample(ddf, scale))
            ddf = _upsample(ddf, 2)
        full_fixed, full_moving = pyramid[0]  # (B, 16, D, H, W)
        sequence.append(self.final_flow(full_fixed, full_moving, ddf))
        return sequence


def _upsample(ddf: Tensor, scale: int) -> Tensor:
    """Field at `scale` times the resolution.

    The published factor is `scale` itself, where align_corners=True makes the exact one (scale n - 1) / (n - 1); the
    weights have learned around it, so it stays inside the network.
    """
    return scale * F.interpolate(ddf, scale_factor=scale, mode="trilinear", align_corners=True)
