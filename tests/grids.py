"""Oblique, anisotropic grids about one centre, so that grids of different kinds cover each other."""

from __future__ import annotations

import numpy as np

from common.geometry.spaces import Grid

CENTRE = np.array([20.0, -30.0, 40.0])
"""LPS mm"""


def rotation(degrees: float, axis: int) -> np.ndarray:
    """(3, 3)"""
    angle = np.deg2rad(degrees)
    i, j = [a for a in range(3) if a != axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def centred_grid(shape: tuple[int, int, int], direction: np.ndarray, spacing: list[float]) -> Grid:
    """A grid whose middle is `CENTRE`."""
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)
