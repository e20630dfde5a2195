"""The affine stage finds a transform that is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from grids import centred_grid, rotation
from known_pair import Known, affine_about_centre, apply, voxel_centres
from torch import Tensor

from common.errors import InputError
from common.geometry.spaces import Grid
from common.inference import align_affine
from common.inference.affine import overlap_fraction

RIGID = affine_about_centre(rotation(9, 0) @ rotation(-6, 2), [14.0, -10.0, 9.0])
AFFINE = affine_about_centre(
    rotation(7, 1) @ np.array([[1.08, 0.04, 0], [0, 0.93, -0.03], [0.02, 0, 1.05]]), [-9.0, 12.0, 7.0]
)


def volume(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32) / 200)[None]


def found(pair: Known, mode: str) -> np.ndarray:
    return align_affine(
        volume(pair.fixed()[0]),
        pair.fixed_grid,
        volume(pair.moving()[0]),
        pair.moving_grid,
        mode=mode,  # type: ignore[arg-type]
    )


def errors_at(points: np.ndarray, estimate: np.ndarray, pair: Known) -> float:
    """Largest distance in mm."""
    return float(np.linalg.norm(apply(estimate, points) - apply(pair.fixed_to_moving, points), axis=1).max())


def corner_error(estimate: np.ndarray, pair: Known) -> float:
    return errors_at(pair.fixed_grid.corners, estimate, pair)


def anatomy_error(estimate: np.ndarray, pair: Known) -> float:
    """Where there is something to see; the corners are three times as far from the centre."""
    return errors_at(voxel_centres(pair.fixed_grid)[pair.fixed()[1].ravel() > 0], estimate, pair)


@pytest.fixture
def still(known: Known) -> Known:
    """The grids of the pair without its deformation."""
    return replace(known, amplitude=0.0)


def test_rigid_motion(still: Known) -> None:
    pair = replace(still, fixed_to_moving=RIGID)
    assert corner_error(np.eye(4), pair) > 15
    estimate = found(pair, "rigid")
    assert corner_error(estimate, pair) < 1.0
    np.testing.assert_allclose(estimate[:3, :3] @ estimate[:3, :3].T, np.eye(3), atol=1e-6)
    assert np.linalg.det(estimate[:3, :3]) == pytest.approx(1.0)
    assert anatomy_error(found(pair, "affine"), pair) < 1.2  # twelve parameters find the six


def test_affine_map(still: Known) -> None:
    pair = replace(still, fixed_to_moving=AFFINE)
    assert corner_error(np.eye(4), pair) > 10
    estimate = found(pair, "affine")
    assert anatomy_error(estimate, pair) < 1.2
    assert corner_error(estimate, pair) < 3.0
    assert anatomy_error(found(pair, "rigid"), pair) > 2.0  # which needs the twelve parameters


def test_contrast_does_not_matter(still: Known) -> None:
    pair = replace(still, fixed_to_moving=RIGID)
    inverted = 1 - volume(pair.fixed()[0])
    estimate = align_affine(inverted, pair.fixed_grid, volume(pair.moving()[0]), pair.moving_grid, mode="rigid")
    assert corner_error(estimate, pair) < 1.5


def test_centres_come_to_lie_on_each_other(still: Known) -> None:
    estimate = found(still, "centers")
    grids = (still.fixed_grid, still.moving_grid)
    fixed, moving = (grid.corners.mean(axis=0) for grid in grids)
    np.testing.assert_allclose(estimate[:3, :3] @ fixed + estimate[:3, 3], moving, atol=1e-9)
    np.testing.assert_array_equal(estimate[:3, :3], np.eye(3))


def test_moments_are_a_translation(still: Known) -> None:
    shift = [14.0, -12.0, 9.0]
    estimate = found(replace(still, fixed_to_moving=affine_about_centre(np.eye(3), shift)), "moments")
    np.testing.assert_allclose(estimate[:3, :3], np.eye(3), atol=1e-9)
    np.testing.assert_allclose(estimate[:3, 3], shift, atol=1.0)


def test_images_far_apart_are_brought_together(still: Known) -> None:
    """Scanner coordinates that have nothing in common: the centres decide."""
    moving_affine = still.moving_grid.affine.copy()
    moving_affine[:3, 3] += [900.0, -700.0, 300.0]
    away = affine_about_centre(np.eye(3), [900.0, -700.0, 300.0])
    pair = replace(still, moving_grid=Grid(still.moving_grid.shape, moving_affine), fixed_to_moving=away)
    assert corner_error(found(pair, "rigid"), pair) < 1.0


def test_the_same_twice(still: Known) -> None:
    pair = replace(still, fixed_to_moving=RIGID)
    assert np.array_equal(found(pair, "rigid"), found(pair, "rigid"))


def test_none_is_the_identity_and_needs_overlap(still: Known) -> None:
    assert np.array_equal(found(still, "none"), np.eye(4))
    moving_affine = still.moving_grid.affine.copy()
    moving_affine[:3, 3] += [300.0, 0, 0]
    with pytest.raises(InputError, match="do not overlap in space"):
        found(replace(still, moving_grid=Grid(still.moving_grid.shape, moving_affine)), "none")


def test_unknown_mode(still: Known) -> None:
    with pytest.raises(InputError, match=r"none, centers, moments, rigid, affine, got 'similarity'"):
        found(still, "similarity")


def test_overlap_fraction() -> None:
    grid = centred_grid((24, 24, 24), rotation(20, 2), [1.0, 1.0, 1.0])
    assert overlap_fraction(grid, grid) == 1.0
    half = grid.affine.copy()
    half[:3, 3] += 12 * grid.direction[:, 0]
    assert overlap_fraction(grid, Grid(grid.shape, half)) == pytest.approx(0.5, abs=0.05)
    back = np.eye(4)
    back[:3, 3] = 12 * grid.direction[:, 0]
    assert overlap_fraction(grid, Grid(grid.shape, half), back) == 1.0
    back[:3, 3] *= -2
    assert overlap_fraction(grid, Grid(grid.shape, half), back) == 0.0
