"""What every network of the collection takes (docs/conventions.md)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_pair"]


def check_pair(image: Tensor, *, network: str, stride: int) -> None:
    """Refuse what is not a pair of a size that a network can take; padding belongs to the inferer.

    Args:
        image: should be (B, 2, D, H, W).
        network: its name, for the message.
        stride: of which sizes must be multiples.

    Raises:
        ValueError: naming the shape and the stride.
    """
    if image.ndim != 5 or image.shape[1] != 2:
        raise ValueError(f"{network} needs an image (B, 2, D, H, W), got {tuple(image.shape)}")
    if any(size % stride for size in image.shape[2:]):
        raise ValueError(
            f"{network} needs sizes that are multiples of its stride {stride}, got {tuple(image.shape[2:])}"
        )
