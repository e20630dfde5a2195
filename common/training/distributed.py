"""Training on several GPUs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["SequenceForward"]


class SequenceForward(nn.Module):
    """A network whose `forward` gives what training needs.

    `DistributedDataParallel` exchanges the gradients only of what went through `forward`; a call of another method is
    trained on each GPU for itself, without a word.

    Args:
        network: with `forward` and `forward_sequence`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """All fields, coarse to fine, in training; else the last one."""
        return self.network.forward_sequence(image) if self.training else self.network(image)
