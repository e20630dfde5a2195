"""What the tests of the network, its stages and their training share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rwcnet_net.subnetwork
import torch
from monai.bundle import ConfigWorkflow
from small_rwcnet import smooth_noise
from stage_runs import BUNDLE, TINY
from torch import Tensor
from training_runs import Training


@pytest.fixture
def shallow_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels fewer, a twentieth of the weights: for tests of what is around the sub-networks."""
    shallow = partial(rwcnet_net.subnetwork.SegResNet, blocks_down=(1, 1), blocks_up=(1,))
    monkeypatch.setattr(rwcnet_net.subnetwork, "SegResNet", shallow)


@pytest.fixture
def image() -> Tensor:
    """(1, 2, 16, 24, 16): smooth moving and fixed image."""
    return torch.cat([smooth_noise(1, (16, 24, 16), 4, seed) for seed in (0, 1)], 1)


@pytest.fixture
def training(workflow: Callable[..., ConfigWorkflow], tmp_path: Path) -> Training:
    """Builds tiny trainings of the bundle's config."""

    def build(output: str = "out", overlay: str | None = None, **changes: Any) -> ConfigWorkflow:
        names = ["train", *([overlay] if overlay else [])]
        return workflow(BUNDLE, names, "train", **{**TINY, "output_dir": str(tmp_path / output), **changes})

    return build
