"""Local correlation: similarity of each voxel of one feature map with a neighbourhood of voxels of another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LocalCorrelation", "correlation_offsets", "local_correlation"]

Metric = Literal["dot", "ssd", "sad"]
Normalization = Literal["none", "channels", "sqrt_channels"]
Padding = Literal["replicate", "zeros"]
Order = Literal["dhw", "whd"]

# Feature bytes of one slab: small enough that a slab of both maps stays in a core's L2 or its share of L3 while all
# K^3 offsets read it, large enough that the operations on it are not mere overhead.
_SLAB_BYTES = 2 * 2**20

# Up to this size (of an L2), one buffer takes a whole line of K offsets: below it calls cost more than their work.
_GROUP_BYTES = 2**20

# Longest row, in units of K^2 voxels, that is worth copying; see `_Walk`. Measured.
_COPIED_ROW = 5


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
    cache-sized slabs, so the memory is the output's, K^3 V, and a few slabs, never C K^3 V.

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
    divisors = {"none": 1.0, "channels": float(fixed.shape[1]), "sqrt_channels": math.sqrt(fixed.shape[1])}
    for name, value, known in (
        ("metric", metric, ("dot", "ssd", "sad")),
        ("normalization", normalization, divisors),
        ("padding", padding, ("replicate", "zeros")),
        ("order", order, ("dhw", "whd")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    with torch.autocast(device_type=fixed.device.type, enabled=False):
        mode = "replicate" if padding == "replicate" else "constant"
        padded = F.pad(moving.float(), (radius,) * 6, mode=mode) if radius else moving.float()
        volume: Tensor = _WindowedMatch.apply(
            fixed.float(), padded, radius, metric, order, 1.0 / divisors[normalization]
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


class _Scratch:
    """Buffers of one call, used again for every slab: the system's new pages cost more than many an operation."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)


@dataclass(frozen=True)
class _Walk:
    """How the offsets of one slab, the planes [start, stop), s of them, are walked.

    copied: copy the moving slab for each offset along W. The windows of a copy have no gaps between their rows, which
        more than halves the time at W = 10 and brings nothing at 100; copying adds (1 + 2r/s) / K^2 to the work.
    group: offsets along H in one operation: K where everything is small, else 1.
    """

    radius: int
    start: int
    stop: int
    copied: bool
    group: int

    @property
    def sweeps(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Offsets counted from 0: a w, and for it (d, h) of the first of each group.
        W outermost makes do with K copies; D outermost keeps only s planes in use.
        """
        steps = range(2 * self.radius + 1)
        planes = [[(d, h) for h in steps[:: self.group]] for d in steps]
        everything = list(itertools.chain(*planes))
        return [(w, everything) for w in steps] if self.copied else [(w, plane) for plane in planes for w in steps]

    def moving(self, padded: Tensor, w: int, scratch: _Scratch) -> Tensor:
        """Of the padded map (C, D+2r, H+2r, W+2r) what the slab sees at the offset w: (C, s+2r, H+2r, W)."""
        planes = self._planes(padded, w)
        return scratch("moving", planes.shape).copy_(planes) if self.copied else planes

    def windows(self, moving: Tensor, d: int, h: int) -> Tensor:
        """View of `moving` at the offsets (d, h) to (d, h + group - 1): (group, C, s, H, W)."""
        height = moving.shape[2] - 2 * self.radius
        planes = moving[:, d : d + self.stop - self.start]
        if self.group == 1:
            return planes[:, :, h : h + height].unsqueeze(0)
        return planes.unfold(2, height, 1).permute(2, 0, 1, 4, 3)

    def gradient(self, grad_padded: Tensor, w: int, scratch: _Scratch) -> Tensor:
        """Where gradients of `moving` are summed up, one for each of a group, as windows of a group overlap."""
        planes = self._planes(grad_padded, w)
        if not self.copied:
            return planes.unsqueeze(0)
        channels, depth, rows, width = planes.shape
        return scratch("grad_moving", (self.group, channels, depth, rows - self.group + 1, width)).zero_()

    def add(self, gradient: Tensor, grad_padded: Tensor, w: int) -> None:
        """Add what `gradient` has summed up to the gradient of the padded map, unless it is a part of that."""
        if self.copied:
            planes = self._planes(grad_padded, w)
            for h, part in enumerate(gradient):
                planes[:, :, h : h + part.shape[2]] += part

    def _planes(self, padded: Tensor, w: int) -> Tensor:
        return padded[:, self.start : self.stop + 2 * self.radius, :, w : w + padded.shape[3] - 2 * self.radius]


def _walks(fixed: Tensor, radius: int) -> list[_Walk]:
    """One for each slab along the first spatial axis; in one slab where there are no caches to think of."""
    size, depth = 2 * radius + 1, fixed.shape[2]
    plane_bytes = max(1, fixed[0, :, 0].numel() * fixed.element_size())
    planes = max(1, _SLAB_BYTES // plane_bytes) if fixed.device.type == "cpu" else depth
    walks = []
    for start in range(0, depth, planes):
        s = min(planes, depth - start)
        group = size if size * s * plane_bytes <= _GROUP_BYTES else 1
        copied = group > 1 or fixed.shape[-1] * (1 + 2 * radius / s) <= _COPIED_ROW * size**2
        walks.append(_Walk(radius, start, start + s, copied, group))
    return walks


def _by_offset(volume: Tensor, size: int, order: Order) -> Tensor:
    """View (B, K^3, D, H, W) as (B, K, K, K, D, H, W), offsets along D, H, W."""
    cells = volume.unflatten(1, (size, size, size))
    return cells if order == "dhw" else cells.transpose(1, 3)


class _WindowedMatch(torch.autograd.Function):
    """The loop over offsets, slab by slab, with a backward that recomputes what it needs from the two maps."""

    @staticmethod
    def forward(
        ctx: Any, fixed: Tensor, padded: Tensor, radius: int, metric: Metric, order: Order, scale: float
    ) -> Tensor:
        ctx.save_for_backward(fixed, padded)
        ctx.radius, ctx.metric, ctx.order, ctx.scale = radius, metric, order, scale
        size = 2 * radius + 1
        volume = fixed.new_empty((fixed.shape[0], size**3, *fixed.shape[2:]))
        cells = _by_offset(volume, size, order)
        scratch = _Scratch(fixed)
        for item, walk in itertools.product(range(fixed.shape[0]), _walks(fixed, radius)):
            f = fixed[item, :, walk.start : walk.stop]  # (C, s, H, W)
            if metric == "dot":
                f = torch.mul(f, scale, out=scratch("fixed", f.shape))
            product = scratch("product", (walk.group, *f.shape))
            for w, offsets in walk.sweeps:
                moving = walk.moving(padded[item], w, scratch)
                lines = cells[item, :, :, w, walk.start : walk.stop]
                for d, h in offsets:
                    m = walk.windows(moving, d, h)
                    if metric == "dot":
                        torch.mul(f, m, out=product)
                    else:
                        torch.sub(f, m, out=product)
                        product = product.square_() if metric == "ssd" else product.abs_()
                    torch.sum(product, dim=1, out=lines[d, h : h + walk.group])
        return volume if metric == "dot" else volume.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        fixed, padded = ctx.saved_tensors
        radius, metric = ctx.radius, ctx.metric
        size, height = 2 * radius + 1, fixed.shape[3]
        grad_cells = _by_offset(grad_outputs[0], size, ctx.order)
        # d cost / d difference, per unit of cost gradient; for `dot` the other map itself takes this place
        factor = ctx.scale * (2.0 if metric == "ssd" else 1.0)
        grad_fixed = torch.zeros_like(fixed)
        grad_padded = torch.zeros_like(padded)
        scratch = _Scratch(fixed)
        for item, walk in itertools.product(range(fixed.shape[0]), _walks(fixed, radius)):
            f = fixed[item, :, walk.start : walk.stop]
            total = grad_fixed[item, :, walk.start : walk.stop]
            shape = (walk.group, *f.shape)
            grad_f = total.unsqueeze(0) if walk.group == 1 else scratch("grad_fixed", shape).zero_()
            difference = scratch("difference", shape) if metric != "dot" else None
            for w, offsets in walk.sweeps:
                moving = walk.moving(padded[item], w, scratch)
                grad_moving = walk.gradient(grad_padded[item], w, scratch)
                grad_lines = grad_cells[item, :, :, w, walk.start : walk.stop].unsqueeze(2)  # (K, K, 1, s, H, W)
                for d, h in offsets:
                    m = walk.windows(moving, d, h)
                    grad_m = grad_moving[:, :, d : d + f.shape[1], h : h + height]
                    g = grad_lines[d, h : h + walk.group]  # (group, 1, s, H, W), broadcast over channels
                    if difference is None:
                        grad_f.addcmul_(g, m, value=factor)
                        grad_m.addcmul_(g, f, value=factor)
                    else:
                        torch.sub(f, m, out=difference)
                        if metric == "sad":
                            difference.sign_()  # 0 at ties: a subgradient
                        grad_f.addcmul_(g, difference, value=factor)
                        grad_m.addcmul_(g, difference, value=-factor)
                walk.add(grad_moving, grad_padded[item], w)
            if walk.group > 1:
                torch.sum(grad_f, dim=0, out=total)
        return grad_fixed, grad_padded, None, None, None, None
