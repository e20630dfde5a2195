import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from common.geometry.fields import invert
from common.metrics import folding_percent, inverse_consistency_error, jacobian_statistics, sdlogj

SHAPES = [(9, 11, 14), (16, 7, 8)]


def _coordinates(shape):
    return np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(np.float32)


def _shear_scale(shape, a, b, c):
    """u = (a z, b y, c x) with z, y, x along the tensor axes."""
    return _coordinates(shape) * np.float32([a, b, c]).reshape(3, 1, 1, 1)


def _smooth(shape, amplitude, seed=0):
    noise = np.random.default_rng(seed).standard_normal((3, *shape))
    return (amplitude * ndimage.gaussian_filter(noise, (0, 2, 2, 2))).astype(np.float32)


def _learn2reg_determinants(ddf):
    """Central differences with zero padding, crop 2, in float64: the evaluation as methods.md describes it."""
    kernel = np.array([-0.5, 0.0, 0.5])
    jacobian = np.stack(
        [
            np.stack([ndimage.correlate1d(c, kernel, axis=x, mode="constant", cval=0.0) for x in range(3)])
            for c in ddf.astype(np.float64)
        ]
    )
    jacobian += np.eye(3).reshape(3, 3, 1, 1, 1)
    return np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))[2:-2, 2:-2, 2:-2]


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_field(shape):
    a, b, c = 0.2, -0.3, 0.1
    statistics = jacobian_statistics(_shear_scale(shape, a, b, c))
    for name in ("min", "p01", "median", "p99", "max", "mean"):
        assert statistics[name] == pytest.approx((1 + a) * (1 + b) * (1 + c), rel=1e-4)
    assert statistics["std"] == pytest.approx(0, abs=1e-5)
    assert sdlogj(_shear_scale(shape, a, b, c)) == pytest.approx(0, abs=1e-5)
    assert folding_percent(_shear_scale(shape, a, b, c)) == 0
    assert folding_percent(_shear_scale(shape, -1.5, b, c)) == 100
    assert folding_percent(_shear_scale(shape, -1.0, 0, 0)) == 100  # collapsed: det is 0


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_field(shape):
    zero = torch.zeros(1, 3, *shape)
    assert sdlogj(zero) == pytest.approx(0, abs=1e-12)
    assert folding_percent(zero) == 0
    assert inverse_consistency_error(zero, zero) == 0
    assert all(type(v) is float for v in (sdlogj(zero), folding_percent(zero), *jacobian_statistics(zero).values()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("amplitude", [3.0, 30.0])
def test_sdlogj_equals_the_evaluation_of_learn2reg(shape, amplitude):
    ddf = _smooth(shape, amplitude)
    logarithms = np.log(np.clip(_learn2reg_determinants(ddf) + 3, 1e-9, 1e9))
    assert sdlogj(ddf) == pytest.approx(logarithms.std(), rel=1e-4)
    assert sdlogj(torch.from_numpy(ddf)[None]) == sdlogj(ddf)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[: shape[0] // 2, :, 3:] = 1
    assert sdlogj(ddf, mask) == pytest.approx(logarithms[mask[2:-2, 2:-2, 2:-2] > 0].std(), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_counts_interior_voxels(shape):
    ddf = _smooth(shape, 60.0)
    jacobian = np.stack([np.stack(np.gradient(c.astype(np.float64))) for c in ddf]) + np.eye(3).reshape(3, 3, 1, 1, 1)
    determinant = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1)))[1:-1, 1:-1, 1:-1]
    expected = 100 * (determinant <= 0).mean()
    assert 1 < expected < 99
    assert folding_percent(ddf) == pytest.approx(expected)
    assert jacobian_statistics(ddf)["folding_percent"] == pytest.approx(expected)
    assert jacobian_statistics(ddf)["min"] == pytest.approx(determinant.min(), rel=1e-3)
    mask = np.zeros(shape, dtype=bool)
    mask[1:4, :, :5] = True
    assert folding_percent(ddf, mask) == pytest.approx(100 * (determinant[mask[1:-1, 1:-1, 1:-1]] <= 0).mean())


def test_empty_masks_are_nan():
    ddf, mask = _smooth((9, 11, 14), 3.0), np.zeros((9, 11, 14))
    assert math.isnan(folding_percent(ddf, mask))
    assert math.isnan(sdlogj(ddf, mask))
    assert math.isnan(jacobian_statistics(ddf, mask)["mean"])
    assert math.isnan(inverse_consistency_error(ddf, ddf, mask))


def test_inverse_consistency():
    shape = (16, 18, 20)
    backward = torch.from_numpy(_smooth(shape, 6.0))[None]
    forward, _ = invert(backward)  # forward(p) + backward(p + forward(p)) = 0 at the voxels p
    mask = np.zeros(shape)
    mask[3:-3, 3:-3, 3:-3] = 1
    assert forward.abs().max() > 0.5
    assert inverse_consistency_error(forward, backward, mask) < 1e-3
    assert inverse_consistency_error(forward, -forward, mask) > 0.05  # the negative is not the inverse
    shift = torch.zeros(1, 3, *shape)
    shift[:, 2] = 3.0
    assert inverse_consistency_error(shift, torch.zeros_like(shift)) == pytest.approx(3.0)
    assert inverse_consistency_error(shift, -shift) == pytest.approx(0, abs=1e-6)


def test_voxels_that_leave_the_grid_are_not_judged():
    shape = (6, 6, 10)
    forward, backward = torch.zeros(2, 1, 3, *shape)
    forward[:, 2] = 4.0
    backward[:, 2] = -4.0
    backward[..., -1] = 50.0  # seen by the border padding, and by the one voxel that lands there
    lands_on_the_border = 1 / 6
    assert inverse_consistency_error(forward, backward) == pytest.approx(lands_on_the_border * math.hypot(50, 50, 54))
    assert math.isnan(inverse_consistency_error(forward + 100, backward))


def test_fields_that_cannot_be():
    with pytest.raises(ValueError, match="one field"):
        sdlogj(np.zeros((9, 11, 14, 3)))
    with pytest.raises(ValueError, match="one field"):
        folding_percent(torch.zeros(2, 3, 9, 11, 14))
    with pytest.raises(ValueError, match="not finite"):
        folding_percent(np.full((3, 9, 11, 14), np.nan))
    with pytest.raises(ValueError, match="2 voxels away"):
        sdlogj(np.zeros((3, 4, 11, 14)))
    with pytest.raises(ValueError, match="mask"):
        sdlogj(np.zeros((3, 9, 11, 14)), np.ones((9, 11, 13)))
    with pytest.raises(ValueError, match="different shapes"):
        inverse_consistency_error(np.zeros((3, 9, 11, 14)), np.zeros((3, 9, 11, 13)))
