"""The known pair, and the bundle's command in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grids import rotation
from known_pair import BUNDLE, OBLIQUE, OTHER, Known, affine_about_centre
from monai.bundle import ConfigWorkflow


@pytest.fixture(scope="session")
def known() -> Known:
    """Oblique, anisotropic, one grid left-handed; an affine and a wave between the images."""
    matrix = rotation(7, 0) @ rotation(-5, 2) @ np.diag([1.05, 0.96, 1.03])
    return Known(OBLIQUE, OTHER, affine_about_centre(matrix, [6.0, -5.0, 4.0]), amplitude=1.0)


@pytest.fixture
def register(workflow: Callable[..., ConfigWorkflow]) -> Callable[..., None]:
    """Runs inference.json in this process, coarsely, with the command's arguments."""

    def run(**arguments: Any) -> None:
        quick = {"device": "cpu", "affine": "moments", "spacing": 4.0, "report": False}
        workflow(BUNDLE, ["inference"], "infer", bundle_root=str(BUNDLE), **{**quick, **arguments}).run()

    return run
