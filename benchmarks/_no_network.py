"""No network: ReCorr's inference.json with a field of zeros in its place, so that what instance optimisation brings by
itself, from the affine stage, can stand beside what it brings after a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.io import atomic_path

INFERENCE: dict[str, Any] = {
    "network_def": {"_target_": "benchmarks._no_network.NoNetwork"},
    "coarse_passes": 0,
    "postprocessing#transforms#3#settings#bundle": "none",
    "postprocessing#transforms#3#settings#iterations": None,
}
"""What replaces ReCorr's entries in its inference.json."""


class NoNetwork(nn.Module):
    """Finds no motion; has no weights."""

    stride = 1

    def forward(self, image: Tensor) -> Tensor:
        """(B, 2, D, H, W) -> zeros (B, 3, D, H, W)."""
        return image.new_zeros(image.shape[0], 3, *image.shape[2:])


def write_weights(path: Path) -> Path:
    """The empty weights that the command asks for."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(NoNetwork().state_dict(), temporary)
    return path
