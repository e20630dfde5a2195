"""Motion features from a correlation volume and the running field, and the head that reads an update from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FlowHead", "MotionEncoder"]


class MotionEncoder(nn.Module):
    """Joins the correlation volume with the running displacement into motion features (RAFT, in 3D).

    Args:
        correlation_channels: K^3 of the correlation layer.
        correlation_widths: channels of the 1^3 and of the 3^3 convolution on the volume.
        flow_widths: channels of the 7^3 and of the 3^3 convolution on the displacement.
        out_channels: channels of the result, the last 3 of which are the displacement itself.
        negative_slope: of the leaky ReLUs; 0 for ReLU.
    """

    def __init__(
        self,
        *,
        correlation_channels: int,
        correlation_widths: Sequence[int],
        flow_widths: Sequence[int],
        out_channels: int,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        (c1, c2), (f1, f2) = correlation_widths, flow_widths
        activation = nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()
        self.correlation = nn.Sequential(
            nn.Conv3d(correlation_channels, c1, 1), activation, nn.Conv3d(c1, c2, 3, padding=1), activation
        )
        self.flow = nn.Sequential(
            nn.Conv3d(3, f1, 7, padding=3), activation, nn.Conv3d(f1, f2, 3, padding=1), activation
        )
        self.fuse = nn.Sequential(nn.Conv3d(c2 + f2, out_channels - 3, 3, padding=1), activation)

    def forward(self, correlation: Tensor, ddf: Tensor) -> Tensor:
        """(B, K^3, D, H, W), (B, 3, D, H, W) voxels -> (B, out_channels, D, H, W)."""
        joint = torch.cat([self.correlation(correlation), self.flow(ddf)], dim=1)
        return torch.cat([self.fuse(joint), ddf], dim=1)


class FlowHead(nn.Module):
    """Reads a displacement update from the hidden state.

    Args:
        in_channels: channels of the hidden state.
        hidden_channels: channels between the two convolutions.
        negative_slope: of the leaky ReLU between them.
        init_std: standard deviation of the last convolution's initial weights, so that training starts from the
            identity; PyTorch's default initialisation when None.
    """

    def __init__(
        self, *, in_channels: int, hidden_channels: int, negative_slope: float, init_std: float | None = 1e-5
    ) -> None:
        super().__init__()
        self.hidden = nn.Conv3d(in_channels, hidden_channels, 3, padding=1)
        self.activation = nn.LeakyReLU(negative_slope)
        self.flow = nn.Conv3d(hidden_channels, 3, 3, padding=1)
        if init_std is not None:
            nn.init.normal_(self.flow.weight, std=init_std)
            assert self.flow.bias is not None
            nn.init.zeros_(self.flow.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, in_channels, D, H, W) -> (B, 3, D, H, W), voxels."""
        return self.flow(self.activation(self.hidden(hidden)))
