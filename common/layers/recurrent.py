"""Recurrent update cells: convolutional GRUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ConvGRU", "SepConvGRU"]


class ConvGRU(nn.Module):
    """Gated recurrent unit with convolutions in place of matrix products (RAFT's update cell, in 3D).

    z = s(W_z [h, x]);  r = s(W_r [h, x]);  q = tanh(W_q [r * h, x]);  h <- (1 - z) h + z q

    Args:
        hidden_channels: channels of the hidden state h.
        input_channels: channels of the input x.
        kernel_size: of the three convolutions, one number or one per axis.
        tied_gates: use the update gate z as reset gate too, as RWCNet's published code does; W_r then exists not.
    """

    def __init__(
        self,
        *,
        hidden_channels: int,
        input_channels: int,
        kernel_size: int | Sequence[int] = 3,
        tied_gates: bool = False,
    ) -> None:
        super().__init__()
        kd, kh, kw = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        kernel, padding = (kd, kh, kw), (kd // 2, kh // 2, kw // 2)
        channels = hidden_channels + input_channels
        self.update_gate = nn.Conv3d(channels, hidden_channels, kernel, padding=padding)
        self.reset_gate = None if tied_gates else nn.Conv3d(channels, hidden_channels, kernel, padding=padding)
        self.candidate = nn.Conv3d(channels, hidden_channels, kernel, padding=padding)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        """(B, hidden, D, H, W), (B, input, D, H, W) -> the new hidden state (B, hidden, D, H, W)."""
        joint = torch.cat([hidden, x], dim=1)
        update = torch.sigmoid(self.update_gate(joint))
        reset = update if self.reset_gate is None else torch.sigmoid(self.reset_gate(joint))
        candidate = torch.tanh(self.candidate(torch.cat([reset * hidden, x], dim=1)))
        return hidden + update * (candidate - hidden)


class SepConvGRU(nn.Module):
    """Three GRU passes with one-dimensional kernels, along W, then H, then D.

    Reaches `kernel_size` voxels along each axis at 3k instead of k^3 weights (RAFT's SepConvGRU, in 3D).
    """

    def __init__(self, *, hidden_channels: int, input_channels: int, kernel_size: int = 5) -> None:
        super().__init__()
        k = kernel_size
        self.passes = nn.ModuleList(
            ConvGRU(hidden_channels=hidden_channels, input_channels=input_channels, kernel_size=kernel)
            for kernel in ((1, 1, k), (1, k, 1), (k, 1, 1))
        )

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        """(B, hidden, D, H, W), (B, input, D, H, W) -> the new hidden state (B, hidden, D, H, W)."""
        for gru in self.passes:
            hidden = gru(hidden, x)
        return hidden
