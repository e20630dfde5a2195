"""Local correlation: similarity of each voxel of one feature map with a neighbourhood of voxels of another."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.precision import float32_region

__all__ = ["LocalCorrelation", "correlation_offsets", "local_correlation"]

Metric = Literal["dot", "ssd", "sad"]
Normalization = Literal["none", "channels", "sqrt_channels"]
Padding = Literal["replicate", "zeros"]
Order = Literal["dhw", "whd"]

# Feature bytes of one slab: small enough that a slab of both maps stays in a core's L2 or its share of L3 while all
# K^3 offsets read it, large enough that the operations on it are not mere overhead.
_SLAB_BYTES = 2 * 2**20


def correlation_offsets(radius: int, order: Order = "dhw") -> list[tuple[int, int, int]]:
    """Offsets (o_D, o_H, o_W) by channel.

    Args:
        radius: r; there are (2r+1)^3 offsets.
        order: "dhw": D is the slowest, W the fastest; "whd": W slowest, D fastest, as ReCorr and RWCNet publish.
    """
    steps = range(-radius, radius + 1)
    if order == "dhw":
        return [(d, h, w) for d in steps for h in steps for w in steps]
    return [(d, h, w) for w in steps for h in steps for d in steps]


def local_correlation(
    fixed: Tensor,
    moving: Tensor,
    *,
    radius: int = 1,
    metric: Metric = "dot",
    normalization: Normalization = "channels",
    padding: Padding = "replicate",
    order: Order = "dhw",
) -> Tensor:
    """Match every voxel of `fixed` with the (2r+1)^3 voxels of `moving` around the same place.

    `dot`: sum_c f_c(p) m_c(p+o); `ssd`: sum_c (f_c(p) - m_c(p+o))^2; `sad`: sum_c |f_c(p) - m_c(p+o)|, each divided
    by the normalisation. `dot` is a similarity, the other two are costs.

    Computed in float32, also under autocast. Forward and backward keep the two feature maps and walk the volume in
    cache-sized slabs, so the memory is the output's, K^3 V, and never C K^3 V.

    Args:
        fixed: (B, C, D, H, W).
        moving: (B, C, D, H, W), usually already warped by the running displacement.
        radius: r of the window of K = 2r+1 voxels.
        metric: "dot", "ssd" or "sad".
        normalization: divide by 1 ("none"), C ("channels") or sqrt(C) ("sqrt_channels").
        padding: what `moving` is outside its grid: "replicate" or "zeros".
        order: channel order, see `correlation_offsets`.

    Returns:
        (B, K^3, D, H, W), float32.

    Raises:
        ValueError: when the two maps differ in shape or an option is unknown.
    """
    if fixed.shape != moving.shape or fixed.ndim != 5:
        raise ValueError(
            f"correlation needs two maps (B, C, D, H, W) of one shape, got {tuple(fixed.shape)} and "
            f"{tuple(moving.shape)}"
        )
    if metric not in ("dot", "ssd", "sad"):
        raise ValueError(f"metric must be dot, ssd or sad, got {metric!r}")
    if padding not in ("replicate", "zeros"):
        raise ValueError(f"padding must be replicate or zeros, got {padding!r}")
    if order not in ("dhw", "whd"):
        raise ValueError(f"order must be dhw or whd, got {order!r}")
    channels = fixed.shape[1]
    divisors = {"none": 1.0, "channels": float(channels), "sqrt_channels": math.sqrt(channels)}
    if normalization not in divisors:
        raise ValueError(f"normalization must be one of {sorted(divisors)}, got {normalization!r}")
    with float32_region(fixed):
        mode = "replicate" if padding == "replicate" else "constant"
        padded = F.pad(moving.float(), (radius,) * 6, mode=mode) if radius else moving.float()
        volume: Tensor = _WindowedMatch.apply(
            fixed.float(), padded, correlation_offsets(radius, order), radius, metric, 1.0 / divisors[normalization]
        )
    return volume


class LocalCorrelation(nn.Module):
    """`local_correlation` with its options, as an injectable layer without parameters."""

    def __init__(
        self,
        *,
        radius: int = 1,
        metric: Metric = "dot",
        normalization: Normalization = "channels",
        padding: Padding = "replicate",
        order: Order = "dhw",
    ) -> None:
        super().__init__()
        self.radius = radius
        self.metric = metric
        self.normalization = normalization
        self.padding = padding
        self.order = order

    @property
    def out_channels(self) -> int:
        return (2 * self.radius + 1) ** 3

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        return local_correlation(
            fixed,
            moving,
            radius=self.radius,
            metric=self.metric,
            normalization=self.normalization,
            padding=self.padding,
            order=self.order,
        )

    def extra_repr(self) -> str:
        return f"radius={self.radius}, metric={self.metric}, normalization={self.normalization}"


def _slabs(fixed: Tensor) -> list[tuple[int, int]]:
    """[start, stop) along the first spatial axis."""
    depth = fixed.shape[2]
    if fixed.device.type != "cpu":
        return [(0, depth)]
    plane_bytes = fixed[:1, :, :1].numel() * fixed.element_size()
    height = max(1, _SLAB_BYTES // max(plane_bytes, 1))
    return [(start, min(start + height, depth)) for start in range(0, depth, height)]


class _WindowedMatch(torch.autograd.Function):
    """The loop over offsets, slab by slab, with a backward that recomputes what it needs from the two maps."""

    @staticmethod
    def forward(
        ctx: Any,
        fixed: Tensor,
        padded: Tensor,
        offsets: list[tuple[int, int, int]],
        radius: int,
        metric: str,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(fixed, padded)
        ctx.offsets, ctx.radius, ctx.metric, ctx.scale = offsets, radius, metric, scale
        batch, _, depth, height, width = fixed.shape
        volume = fixed.new_empty((batch, len(offsets), depth, height, width))
        for item in range(batch):
            for start, stop in _slabs(fixed):
                f = fixed[item, :, start:stop]  # (C, s, H, W)
                product = torch.empty_like(f)
                for n, offset in enumerate(offsets):
                    m = _window(padded[item], offset, radius, start, stop, height, width)
                    if metric == "dot":
                        torch.mul(f, m, out=product)
                    else:
                        torch.sub(f, m, out=product)
                        product = product.square_() if metric == "ssd" else product.abs_()
                    torch.sum(product, dim=0, out=volume[item, n, start:stop])
        return volume.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        fixed, padded = ctx.saved_tensors
        grad_volume = grad_outputs[0]
        radius, metric = ctx.radius, ctx.metric
        height, width = fixed.shape[3:]
        # d cost / d difference, per unit of cost gradient; for `dot` the other map itself takes this place
        factor = ctx.scale * (2.0 if metric == "ssd" else 1.0)
        grad_fixed = torch.zeros_like(fixed)
        grad_padded = torch.zeros_like(padded)
        for item in range(fixed.shape[0]):
            for start, stop in _slabs(fixed):
                f = fixed[item, :, start:stop]
                grad_f = grad_fixed[item, :, start:stop]
                difference = torch.empty_like(f) if metric != "dot" else None
                for n, offset in enumerate(ctx.offsets):
                    m = _window(padded[item], offset, radius, start, stop, height, width)
                    grad_m = _window(grad_padded[item], offset, radius, start, stop, height, width)
                    g = grad_volume[item, n, start:stop]  # (s, H, W), broadcast over channels
                    if difference is None:
                        grad_f.addcmul_(g, m, value=factor)
                        grad_m.addcmul_(g, f, value=factor)
                    else:
                        torch.sub(f, m, out=difference)
                        if metric == "sad":
                            difference.sign_()  # 0 at ties: a subgradient
                        grad_f.addcmul_(g, difference, value=factor)
                        grad_m.addcmul_(g, difference, value=-factor)
        return grad_fixed, grad_padded, None, None, None, None


def _window(
    padded: Tensor, offset: tuple[int, int, int], radius: int, start: int, stop: int, height: int, width: int
) -> Tensor:
    """View of the padded map (C, D+2r, H+2r, W+2r) at p + offset for the slab's voxels p."""
    d, h, w = (radius + o for o in offset)
    return padded[:, start + d : stop + d, h : h + height, w : w + width]
