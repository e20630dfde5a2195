"""Computing in half precision where that is safe."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["bfloat16_region", "float32_below", "float32_region"]


def bfloat16_region(like: Tensor, enabled: bool = True) -> AbstractContextManager[Any]:
    """Context in which networks compute in bfloat16 on the device of `like`; without effect when not enabled.

    About twice as fast on processors with instructions for it, slower on others. Needs no loss scaling.
    """
    return torch.autocast(device_type=like.device.type, dtype=torch.bfloat16) if enabled else nullcontext()


def float32_region(like: Tensor) -> torch.autocast:
    """Context without autocast on the device of `like`: positions, variances and Jacobians need float32."""
    return torch.autocast(device_type=like.device.type, enabled=False)


def float32_below(size: int, *volumes: Tensor) -> tuple[AbstractContextManager[Any], tuple[Tensor, ...]]:
    """A context without autocast, and the volumes in float32, where a side is shorter than `size`.

    oneDNN's bfloat16 gradients of a convolution's weights contain memory that nobody has written, NaN sometimes, where
    the kernel is longer than the volume (seen with PyTorch 2.13, oneDNN 3.12, AVX512). Volumes that small cost nothing.

    Args:
        size: side of the largest kernel that follows.
        volumes: (B, C, D, H, W).
    """
    first = volumes[0]
    if min(first.shape[2:]) >= size:
        return nullcontext(), volumes
    return float32_region(first), tuple(volume.float() for volume in volumes)
