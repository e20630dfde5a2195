"""Grids of the kinds that break careless code, and a disk that is soon full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest

from common.geometry.spaces import Grid


def _rotation(degrees: float, axis: int) -> np.ndarray:
    angle = np.deg2rad(degrees)
    i, j = [a for a in range(3) if a != axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def _grid(shape: tuple[int, int, int], direction: np.ndarray, spacing: list[float]) -> Grid:
    """A grid whose centre is (20, -30, 40) mm, so that grids of different kinds cover each other."""
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = np.array([20.0, -30.0, 40.0]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


GRIDS = {
    "oblique": _grid((18, 16, 14), _rotation(20, 2) @ _rotation(-15, 0), [1.5, 2.0, 2.5]),
    "left-handed": _grid((16, 18, 12), np.diag([1.0, 1.0, -1.0]), [2.0, 1.5, 3.0]),
    "permuted": _grid((14, 12, 18), np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]), [1.0, 3.0, 2.0]),
}


@pytest.fixture(params=list(GRIDS))
def grid(request: pytest.FixtureRequest) -> Grid:
    """A fixed grid."""
    return GRIDS[request.param]


@pytest.fixture
def moving_grid() -> Grid:
    """A grid that shares neither axes nor spacing nor handedness with any fixed one."""
    return _grid((20, 22, 24), np.diag([-1.0, 1.0, 1.0]) @ _rotation(10, 1), [1.8, 1.7, 1.6])


@pytest.fixture
def small_disk() -> Callable[[], AbstractContextManager[None]]:
    """Context in which no file may grow beyond 3000 bytes: to a writer, a disk that fills up.

    Not for the whole test: pytest's own output may go to a file.
    """
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit() -> Iterator[None]:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limit
