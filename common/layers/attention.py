"""Attention between the voxels of two feature maps, which also says where each voxel looked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import float32_region

__all__ = ["positional_attention"]

_MASKED = -1e9  # logit of what lies outside the volume, below that of any voxel


def positional_attention(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, locality: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention over all voxels or within windows, its matches found near by preference.

    The weight of key voxel q for query voxel p is softmax_q(<Q_p, K_q> / sqrt(c) - locality |p - q|^2). Beside the
    averaged values, the averaged position q - p is returned: appearance alone does not say where it was found.

    Both the locality and the position ride on a few additional channels of query, key and value, so that PyTorch's
    fused kernels do all the work and no matrix of weights is ever stored. In float32, also under autocast.

    Args:
        query: (B, C, D, H, W).
        key: (B, C, D, H, W).
        value: (B, C, D, H, W).
        heads: number of heads, a divisor of C; each has c = C / heads channels.
        locality: (heads,), >= 0, in 1 / voxel^2.
        window: side of the cubes, in voxels, within which voxels see each other; the last ones may reach beyond the
            volume, where nothing is seen. The whole volume when None.

    Returns:
        averaged values (B, C, D, H, W), and averaged positions relative to the query voxel, (B, 3 * heads, D, H, W) in
        voxels, the three axes of the first head first.

    Raises:
        ValueError: when shapes, heads or window do not fit.
    """
    if query.ndim != 5 or not query.shape == key.shape == value.shape:
        shapes = [tuple(x.shape) for x in (query, key, value)]
        raise ValueError(f"attention needs query, key and value (B, C, D, H, W) of one shape, got {shapes}")
    channels, size = query.shape[1], query.shape[2:]
    if heads < 1 or channels % heads or locality.shape != (heads,):
        raise ValueError(f"{channels} channels and a locality {tuple(locality.shape)} do not make {heads} heads")
    if window is not None and window < 1:
        raise ValueError(f"a window needs at least one voxel a side, got {window}")
    sides = list(size) if window is None else [window] * 3
    with float32_region(query):
        q, k, v = (_tokens(x.float(), heads, sides) for x in (query, key, value))  # (B n, heads, T, c)
        position = _positions(sides, q)  # (T, 3)
        locality = locality.float().view(heads, 1, 1)
        squared = position.square().sum(dim=1, keepdim=True)
        # -locality |p - q|^2 less what is the same for all keys of a query: 2 locality <p, q> - locality |q|^2
        q = _append(q * q.shape[-1] ** -0.5, 2 * locality * position, -locality.expand(-1, len(position), 1))
        k = _append(k, position, squared)
        v = _append(v, position)
        if any(n % side for n, side in zip(size, sides, strict=True)):
            inside = _tokens(query.new_ones((query.shape[0], heads, *size), dtype=torch.float32), heads, sides)
            q = torch.cat([q, torch.ones_like(inside)], dim=-1)
            k = torch.cat([k, (1 - inside) * _MASKED], dim=-1)
        # The fused kernels want one width for all three, GPUs a multiple of 8.
        width = -(-q.shape[-1] // 8) * 8
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        c = channels // heads
        values = _volume(found[..., :c], size, sides)
        offsets = _volume(found[..., c : c + 3] - position, size, sides)
    return values.to(value.dtype), offsets


def _tokens(x: Tensor, heads: int, sides: Sequence[int]) -> Tensor:
    """(B, C, D, H, W) -> (B * windows, heads, voxels of a window, C / heads), filled up with zeros."""
    padding = [
        amount for n, side in zip(reversed(x.shape[2:]), reversed(sides), strict=True) for amount in (0, -n % side)
    ]
    x = F.pad(x, padding) if any(padding) else x
    batch, channels, *size = x.shape
    (d, h, w), (sd, sh, sw) = (n // side for n, side in zip(size, sides, strict=True)), sides
    x = x.reshape(batch, heads, channels // heads, d, sd, h, sh, w, sw)
    x = x.permute(0, 3, 5, 7, 1, 4, 6, 8, 2)  # (B, d, h, w, heads, sd, sh, sw, c)
    return x.reshape(batch * d * h * w, heads, sd * sh * sw, channels // heads)


def _volume(tokens: Tensor, size: Sequence[int], sides: Sequence[int]) -> Tensor:
    """The inverse of `_tokens`."""
    (d, h, w), (sd, sh, sw) = (-(-n // side) for n, side in zip(size, sides, strict=True)), sides
    windows, heads, _, c = tokens.shape
    x = tokens.view(windows // (d * h * w), d, h, w, heads, sd, sh, sw, c)
    x = x.permute(0, 4, 8, 1, 5, 2, 6, 3, 7)  # (B, heads, c, d, sd, h, sh, w, sw)
    x = x.reshape(x.shape[0], heads * c, d * sd, h * sh, w * sw)
    return x[:, :, : size[0], : size[1], : size[2]]


def _positions(sides: Sequence[int], like: Tensor) -> Tensor:
    """(T, 3): coordinates of a window's voxels about its centre, which keeps them small and so exact."""
    axes = [torch.arange(n, device=like.device, dtype=like.dtype) - (n - 1) / 2 for n in sides]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def _append(tokens: Tensor, *channels: Tensor) -> Tensor:
    return torch.cat([tokens, *(c.expand(*tokens.shape[:-1], c.shape[-1]) for c in channels)], dim=-1)
