"""The known pair, and the bundle's command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from known_pair import BUNDLE, OBLIQUE, OTHER, Known, affine_about_centre, rotation
from monai.bundle import ConfigWorkflow


@pytest.fixture(scope="session")
def known() -> Known:
    """Oblique, anisotropic, one grid left-handed; an affine and a wave between the images."""
    matrix = rotation(7, 0) @ rotation(-5, 2) @ np.diag([1.05, 0.96, 1.03])
    return Known(OBLIQUE, OTHER, affine_about_centre(matrix, [6.0, -5.0, 4.0]), amplitude=1.0)


@pytest.fixture
def _restored_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A workflow changes the search path, the hook for exceptions and determinism."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.deterministic = False
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def register(_restored_process: None) -> Callable[..., None]:
    """Runs inference.json in this process, coarsely, with the command's arguments."""

    def run(**arguments: Any) -> None:
        quick = {"device": "cpu", "affine": "moments", "spacing": 4.0, "report": False}
        workflow = ConfigWorkflow(
            config_file=str(BUNDLE / "configs" / "inference.json"),
            workflow_type="infer",
            logging_file=False,
            bundle_root=str(BUNDLE),
            **{**quick, **arguments},
        )
        workflow.initialize()
        workflow.run()

    return run
