"""Operations on displacement fields.

A field `ddf` is a float32 tensor (B, 3, D, H, W): channel i is the displacement along tensor axis i in voxels of that
grid, pull-back (`warped(p) = moving(p + ddf(p))`), identity not included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.layers.warp import warp

__all__ = ["compose", "exponentiate", "invert", "jacobian_determinant", "resize_ddf"]


def resize_ddf(ddf: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a field to another number of voxels over the same extent (first and last voxel centres coincide).

    Channel i is multiplied by its exact grid ratio (m - 1) / (n - 1), for instance (2n - 1) / (n - 1) from n to 2n
    voxels. An axis of length 1 keeps its displacement.

    Args:
        ddf: (B, 3, D, H, W), voxels.
        shape: the new (D, H, W).

    Returns:
        (B, 3, *shape), voxels of the new grid.
    """
    old = ddf.shape[2:]
    if tuple(old) == tuple(shape):
        return ddf
    resized = F.interpolate(ddf.float(), size=tuple(shape), mode="trilinear", align_corners=True)
    ratio = [(m - 1) / (n - 1) if n > 1 and m > 1 else 1.0 for n, m in zip(old, shape, strict=True)]
    return resized * resized.new_tensor(ratio).view(1, 3, 1, 1, 1)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Field of warping with `first`, then warping the result with `second`.

    `total(p) = second(p) + first(p + second(p))`; adding the two is not composing.

    Args:
        first: (B, 3, D, H, W), the field applied first to the moving image.
        second: (B, 3, D, H, W), the field applied to the image that `first` warped.

    Returns:
        (B, 3, D, H, W).
    """
    return second + warp(first, second, padding_mode="border")


def invert(ddf: Tensor, *, iterations: int = 30) -> tuple[Tensor, Tensor]:
    """Inverse field by fixed-point iteration, `v <- -u(p + v)`.

    Converges where the field's Lipschitz constant is below 1; the residual says how well it did elsewhere.

    Args:
        ddf: (B, 3, D, H, W), voxels.
        iterations: number of steps.

    Returns:
        the inverse (B, 3, D, H, W), and the residual (B, 1, D, H, W): the length in voxels of `compose(ddf, inverse)`,
        which is 0 for a perfect inverse.
    """
    inverse = torch.zeros_like(ddf)
    for _ in range(iterations):
        inverse = -warp(ddf, inverse, padding_mode="border")
    residual = compose(ddf, inverse).norm(dim=1, keepdim=True)
    return inverse, residual


def exponentiate(velocity: Tensor, *, steps: int = 7) -> Tensor:
    """Displacement field of a stationary velocity field, by scaling and squaring.

    Args:
        velocity: (B, 3, D, H, W), voxels per unit time.
        steps: number of squarings.

    Returns:
        (B, 3, D, H, W), voxels. Samples beyond the border repeat it, so a constant velocity is returned unchanged.
    """
    ddf = velocity.float() / 2**steps  # float32: v / 128 underflows at half precision
    for _ in range(steps):
        ddf = compose(ddf, ddf)
    return ddf


def jacobian_determinant(ddf: Tensor, *, base: Sequence[Sequence[float]] | None = None) -> Tensor:
    """Determinant of the Jacobian of p + ddf(p), by central differences at the interior voxels.

    In voxel units; for two images of one grid it equals the determinant in mm, whatever the spacing.

    Args:
        ddf: (B, 3, D, H, W), voxels.
        base: (3, 3), the Jacobian of another map in place of that of p: the identity.

    Returns:
        (B, 1, D-2, H-2, W-2).

    Raises:
        ValueError: when an axis is shorter than 3.
    """
    if min(ddf.shape[2:]) < 3:
        raise ValueError(f"central differences need at least 3 voxels along each axis, got {tuple(ddf.shape[2:])}")
    u = ddf.float()
    inner = slice(1, -1)
    d_d = (u[:, :, 2:, inner, inner] - u[:, :, :-2, inner, inner]) / 2  # (B, 3, D-2, H-2, W-2)
    d_h = (u[:, :, inner, 2:, inner] - u[:, :, inner, :-2, inner]) / 2
    d_w = (u[:, :, inner, inner, 2:] - u[:, :, inner, inner, :-2]) / 2
    base = base or ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    (a, b, c), (d, e, f), (g, h, i) = (
        [derivative[:, row] + constant for derivative, constant in zip((d_d, d_h, d_w), constants, strict=True)]
        for row, constants in enumerate(base)
    )
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    return determinant.unsqueeze(1)
