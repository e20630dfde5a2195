"""RWCNet's sub-network: recurrence with correlation at one resolution (section 4.2 and figure 2 of the paper)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from common.geometry.fields import exponentiate
from common.layers.correlation import LocalCorrelation, correlation_offsets
from common.layers.motion import FlowHead, MotionEncoder
from common.layers.recurrent import ConvGRU
from common.layers.warp import warp
from common.losses import mind_ssc
from common.precision import float32_region

__all__ = ["FeatureEncoder", "SubNetwork", "UpdateBlock", "Variant"]

Variant = Literal["paper", "published"]
Features = Literal["intensity", "mind"]

_MIND_CHANNELS = 12


class FeatureEncoder(nn.Module):
    """MONAI's SegResNet; features at the resolution of the input. 1,176,312 parameters from 1 to 16 channels.

    Three strided convolutions need multiples of 8. Other sizes are filled up by repeating the last voxels and cropped
    again, so that only these convolutions, a small part of the work, see more than the image. Always in float32, as
    its deepest level may be smaller than its kernels, see `common.precision.float32_below`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the features.
        dropout: probability that a channel is dropped after the first convolution, in training.
    """

    def __init__(self, *, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.network = SegResNet(in_channels=in_channels, out_channels=out_channels, dropout_prob=dropout or None)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in, D, H, W) -> (B, out, D, H, W)."""
        d, h, w = image.shape[2:]
        padding = (0, -w % 8, 0, -h % 8, 0, -d % 8)
        with float32_region(image):
            image = image.float()
            features = self.network(F.pad(image, padding, mode="replicate") if any(padding) else image)
        return features[:, :, :d, :h, :w]


class UpdateBlock(nn.Module):
    """One recurrent step: motion features, GRU, increment of the displacement.

    744,648 parameters with a radius of 3, 742,904 with 2; 578,696 and 576,952 with tied gates.

    Args:
        correlation_channels: channels of the correlation volume, or of what stands in its place.
        feature_channels: of the moving features.
        hidden_channels: of the hidden state.
        tied_gates: see `ConvGRU`.
        head_init_std: see `FlowHead`.
    """

    def __init__(
        self,
        *,
        correlation_channels: int,
        feature_channels: int,
        hidden_channels: int,
        tied_gates: bool,
        head_init_std: float | None,
    ) -> None:
        super().__init__()
        motion_channels = 16
        self.motion_encoder = MotionEncoder(
            correlation_channels=correlation_channels,
            correlation_widths=(8, 8),
            flow_widths=(4, 8),
            out_channels=motion_channels,
        )
        self.gru = ConvGRU(
            hidden_channels=hidden_channels,
            input_channels=motion_channels + feature_channels,
            tied_gates=tied_gates,
        )
        self.flow_head = FlowHead(
            in_channels=hidden_channels, hidden_channels=128, negative_slope=0.01, init_std=head_init_std
        )

    def forward(self, hidden: Tensor, correlation: Tensor, flow: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """(B, hidden, ...), (B, K^3, ...), (B, 3, ...), (B, feature, ...) -> hidden state, increment (B, 3, ...)."""
        motion = self.motion_encoder(correlation, flow)  # (B, 16, D, H, W)
        hidden = self.gru(hidden, torch.cat([motion, moving], dim=1))  # (B, 64, D, H, W)
        return hidden, self.flow_head(hidden)


class SubNetwork(nn.Module):
    """Aligns two images of one resolution by N recurrent steps.

    Args:
        radius: of the correlation's window; 3 has 343 channels, 2 has 125.
        variant: what paper and public code do differently,

            | | "paper" | "published" (the public code) |
            |---|---|---|
            | matching | dot product / sqrt(C), equation 7 | sum of absolute differences, 3^3 mean filter |
            | its gradient | reaches the features | cut off |
            | features | each channel at mean 0, variance 1 (ours) | as the encoder leaves them |
            | reset gate | of its own | the update gate |
            | moving features | warped once, by the running displacement D | warped again and again, by each increment |
            | the motion encoder sees | D | the previous increment |
            | last convolution starts | next to the identity | from PyTorch's default |
            | motion encoder starts | from the window's moments (ours) | from PyTorch's default |

        correlation: without it the features of both images take the volume's place (the paper's ablation).
        features: "intensity", or "mind": 12 MIND-SSC channels of each image (radius 1, dilation 2).
        feature_channels: of the encoder.
        hidden_channels: of the hidden state.
        dropout: of both encoders, in training.
        detach: let each step answer for its own increment only, as RAFT does. Training on the fields of all steps is
            calmer with it; training on the last field alone needs it off, as published.
        diffeomorphic: take the summed increments as a stationary velocity and return its exponential. The public code
            has this switch, too, but drops the result.
    """

    def __init__(
        self,
        *,
        radius: int,
        variant: Variant = "paper",
        correlation: bool = True,
        features: Features = "intensity",
        feature_channels: int = 16,
        hidden_channels: int = 64,
        dropout: float = 0.5,
        detach: bool = False,
        diffeomorphic: bool = False,
    ) -> None:
        super().__init__()
        if variant not in ("paper", "published"):
            raise ValueError(f"the variant is paper or published, not {variant!r}")
        if features not in ("intensity", "mind"):
            raise ValueError(f"the features are of intensity or mind, not {features!r}")
        self.published = variant == "published"
        self.features = features
        self.hidden_channels = hidden_channels
        self.detach = detach
        self.diffeomorphic = diffeomorphic
        channels = 1 if features == "intensity" else _MIND_CHANNELS
        self.feature_encoder = FeatureEncoder(in_channels=channels, out_channels=feature_channels, dropout=dropout)
        # The three other input channels are a displacement, always 0; as published.
        self.context_encoder = FeatureEncoder(in_channels=3 + channels, out_channels=hidden_channels, dropout=dropout)
        self.correlation = (
            LocalCorrelation(
                radius=radius,
                metric="sad" if self.published else "dot",
                normalization="none" if self.published else "sqrt_channels",
                padding="zeros",
                order="whd",  # W is the slowest channel axis; as published
            )
            if correlation
            else None
        )
        self.update_block = UpdateBlock(
            correlation_channels=self.correlation.out_channels if self.correlation else 2 * feature_channels,
            feature_channels=feature_channels,
            hidden_channels=hidden_channels,
            tied_gates=self.published,
            head_init_std=None if self.published else 1e-5,
        )
        if not self.published:
            self._initialize_motion_encoder()

    def forward(
        self, fixed: Tensor, moving: Tensor, *, steps: int, hidden: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Align.

        Args:
            fixed: (B, 1, D, H, W), in [0, 1].
            moving: (B, 1, D, H, W).
            steps: number of recurrent steps.
            hidden: (B, hidden, D, H, W), added to the context: the hidden state of the next coarser resolution.

        Returns:
            the field (B, 3, D, H, W) after each step, in voxels of this resolution, and the last hidden state.
        """
        features_f, features_m = self.encode(fixed, moving)  # (B, 16, D, H, W)
        moving_input = self._input(moving)
        zero = moving.new_zeros((moving.shape[0], 3, *moving.shape[2:]))
        state = torch.tanh(self.context_encoder(torch.cat([zero, moving_input], dim=1)))
        if hidden is not None:
            state = state + hidden  # added, as text and code say; the caption of figure 1 says concatenated
        ddf = increment = zero.float()
        warped = features_m
        sequence: list[Tensor] = []
        for _ in range(steps):
            if sequence:
                ddf = ddf.detach() if self.detach else ddf
                if self.published:
                    warped = warp(warped, increment, padding_mode="zeros")
                else:
                    warped = warp(features_m, ddf, padding_mode="zeros")
            volume = self._match(features_f, warped)  # (B, K^3, D, H, W)
            state, increment = self.update_block(state, volume, increment if self.published else ddf, warped)
            increment = increment.float()
            ddf = ddf + increment  # summed, where composing would be exact; in paper and code
            sequence.append(exponentiate(ddf) if self.diffeomorphic else ddf)
        return sequence, state

    def encode(self, fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        """Features of both images, (B, 1, D, H, W) -> (B, 16, D, H, W)."""
        features = self.feature_encoder(torch.cat([self._input(fixed), self._input(moving)]))
        if not self.published:
            # A dot product of features with a common offset is largest where they are, not where they match.
            variance, mean = torch.var_mean(features, dim=(2, 3, 4), keepdim=True, correction=0)
            features = (features - mean) * torch.rsqrt(variance + 1e-5)
        features_f, features_m = torch.chunk(features, 2)
        return features_f, features_m

    def _initialize_motion_encoder(self) -> None:
        """Start the convolution on the correlation volume from its moments: on which side of the window, how near its
        centre and how high the similarity is. What 343 random weights see of a peak that moves by a voxel is noise.
        The other convolutions start by He et al., so that the signal arrives at the GRU."""
        encoder = self.update_block.motion_encoder
        for layer in encoder.modules():
            if isinstance(layer, nn.Conv3d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        if self.correlation is None:
            return
        offsets = torch.tensor(correlation_offsets(self.correlation.radius, self.correlation.order)).float()  # (K^3, 3)
        near = torch.exp(-0.5 * offsets.square().sum(dim=1))
        moments = [sign * offsets[:, axis] for axis in range(3) for sign in (1, -1)] + [near, torch.ones_like(near)]
        first = encoder.correlation[0]
        with torch.no_grad():
            first.weight.copy_(torch.stack([moment / moment.norm() for moment in moments])[..., None, None, None])

    def _input(self, image: Tensor) -> Tensor:
        return image if self.features == "intensity" else mind_ssc(image, radius=1, dilation=2).to(image.dtype)

    def _match(self, fixed: Tensor, moving: Tensor) -> Tensor:
        if self.correlation is None:
            return torch.cat([fixed, moving], dim=1)
        if not self.published:
            return self.correlation(fixed, moving)
        with torch.no_grad():  # the encoder learns through the GRU's input alone; as published
            return F.avg_pool3d(self.correlation(fixed, moving), 3, stride=1, padding=1)
