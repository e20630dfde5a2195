"""Grids of the kinds that break careless code."""

from __future__ import annotations

import numpy as np
import pytest
from grids import centred_grid, rotation

from common.geometry.spaces import Grid

GRIDS = {
    "oblique": centred_grid((18, 16, 14), rotation(20, 2) @ rotation(-15, 0), [1.5, 2.0, 2.5]),
    "left-handed": centred_grid((16, 18, 12), np.diag([1.0, 1.0, -1.0]), [2.0, 1.5, 3.0]),
    "permuted": centred_grid((14, 12, 18), np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]), [1.0, 3.0, 2.0]),
}


@pytest.fixture(params=list(GRIDS))
def grid(request: pytest.FixtureRequest) -> Grid:
    """A fixed grid."""
    return GRIDS[request.param]


@pytest.fixture
def moving_grid() -> Grid:
    """A grid that shares neither axes nor spacing nor handedness with any fixed one."""
    return centred_grid((20, 22, 24), np.diag([-1.0, 1.0, 1.0]) @ rotation(10, 1), [1.8, 1.7, 1.6])
