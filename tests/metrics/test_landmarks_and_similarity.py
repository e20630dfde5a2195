import math

import monai.metrics
import numpy as np
import pytest
import torch
from scipy import ndimage

from common.metrics import mse, ncc, nmi, ssim, tre_mm

SHAPES = [(9, 11, 14), (16, 8, 9)]
SPACING = (0.8, 1.5, 2.5)


def _case(shape, n=25):
    generator = np.random.default_rng(0)
    ddf = generator.standard_normal((3, *shape)).astype(np.float32)
    fixed, moving = (generator.uniform(0, np.array(shape) - 1, (n, 3)) for _ in range(2))
    return fixed, moving, ddf


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [1, 3])
def test_tre_equals_map_coordinates(shape, order):
    fixed, moving, ddf = _case(shape)
    u = np.stack([ndimage.map_coordinates(c.astype(np.float64), fixed.T, order=order) for c in ddf], axis=1)
    expected = np.linalg.norm((fixed + u - moving) * SPACING, axis=1)
    np.testing.assert_allclose(tre_mm(fixed, moving, ddf, SPACING, order=order), expected, atol=1e-4)
    tensors = [torch.from_numpy(x) for x in (fixed, moving, ddf[None])]
    np.testing.assert_allclose(tre_mm(*tensors, torch.tensor(SPACING), order=order), expected, atol=1e-4)


def test_the_orders_differ():
    fixed, moving, ddf = _case(SHAPES[0])
    assert (
        np.abs(np.subtract(tre_mm(fixed, moving, ddf, SPACING), tre_mm(fixed, moving, ddf, SPACING, order=3))).max()
        > 0.01
    )


def test_tre_of_a_constant_field():
    ddf = np.zeros((3, 9, 11, 14))
    ddf[0], ddf[1] = 1.5, 2.0
    points = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert tre_mm(points, points, ddf, (2.0, 2.0, 7.0)) == pytest.approx([5.0, 5.0])
    exact = points + np.array([1.5, 2.0, 0.0])
    assert tre_mm(points, exact, ddf, (2.0, 2.0, 7.0)) == pytest.approx([0.0, 0.0], abs=1e-5)
    errors = tre_mm(points, exact, ddf * 0, SPACING)
    assert errors == pytest.approx([math.hypot(1.2, 3.0)] * 2)
    assert all(type(e) is float for e in errors)


def test_snapping_rounds_the_mapped_point():
    ddf = np.zeros((3, 9, 11, 14))
    ddf[2] = 0.4
    points = np.array([[1.0, 2.0, 3.0]])
    assert tre_mm(points, points, ddf, SPACING) == pytest.approx([1.0])
    assert tre_mm(points, points, ddf, SPACING, snapped=True) == [0.0]
    assert tre_mm(points, points, ddf * 2, SPACING, True) == pytest.approx([2.5])


def test_tre_errors():
    fixed, moving, ddf = _case(SHAPES[0])
    with pytest.raises(ValueError, match="correspond"):
        tre_mm(fixed, moving[1:], ddf, SPACING)
    with pytest.raises(ValueError, match="order"):
        tre_mm(fixed, moving, ddf, SPACING, order=2)
    with pytest.raises(ValueError, match="spacing"):
        tre_mm(fixed, moving, ddf, (1.0, 1.0))
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        tre_mm(fixed.T, moving.T, ddf, SPACING)


def _images(shape=SHAPES[0]):
    generator = np.random.default_rng(1)
    a = generator.random(shape).astype(np.float32)
    return a, (0.7 * a + 0.3 * generator.random(shape)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_ncc_and_mse_equal_numpy(shape):
    a, b = _images(shape)
    mask = np.zeros(shape)
    mask[2:7, :, 3:] = 1
    inside = mask > 0
    assert ncc(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-6)
    assert ncc(a, b, mask) == pytest.approx(np.corrcoef(a[inside], b[inside])[0, 1], abs=1e-6)
    assert mse(a, b) == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)
    assert mse(torch.from_numpy(a)[None, None], b, mask) == pytest.approx(((a - b)[inside] ** 2).mean(), rel=1e-5)


def test_ncc_extremes():
    a, b = _images()
    assert ncc(a, 3 * a + 2) == pytest.approx(1)
    assert ncc(a, 1 - a) == pytest.approx(-1)
    assert ncc(np.full_like(a, 0.3), b) == 0
    assert ncc(a + 1e4, b) == pytest.approx(ncc(a, b), abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_equals_monai(shape):
    a, b = _images(shape)
    ta, tb = (torch.from_numpy(x)[None, None] for x in (a, b))
    oracle = monai.metrics.SSIMMetric(3, kernel_type="uniform", win_size=7)(ta, tb).item()
    assert ssim(a, b) == pytest.approx(oracle, abs=1e-5)
    assert ssim(a, a) == pytest.approx(1, abs=1e-6)
    mask = np.zeros(shape)
    mask[3, 3, 3] = 1  # the first window
    first = monai.metrics.SSIMMetric(3, kernel_type="uniform", win_size=7)(ta[..., :7, :7, :7], tb[..., :7, :7, :7])
    assert ssim(a, b, mask) == pytest.approx(first.item(), abs=1e-5)


def test_nmi_equals_counted_entropies():
    a, b = _images((16, 18, 20))
    bins = 12
    da, db = (np.minimum(((x - x.min()) / np.ptp(x) * bins).astype(int), bins - 1).ravel() for x in (a, b))

    def entropy(*digits):
        p = np.unique(np.stack(digits), axis=1, return_counts=True)[1] / a.size
        return -(p * np.log(p)).sum()

    expected = (entropy(da) + entropy(db)) / entropy(da, db)
    assert 1.05 < expected < 1.95
    assert nmi(a, b, bins=bins) == pytest.approx(expected, abs=1e-3)
    assert nmi(a, 1 - a, bins=bins) == pytest.approx(2, abs=1e-2)
    assert nmi(a, np.random.default_rng(5).random(a.shape), bins=bins) == pytest.approx(1, abs=0.02)
    assert nmi(np.ones_like(a), np.ones_like(a)) == 1
    mask = np.zeros(a.shape)
    mask[..., :10] = 1
    assert nmi(a, b, mask) == pytest.approx(nmi(a[..., :10], b[..., :10]))


@pytest.mark.parametrize("metric", [ncc, mse, ssim, nmi])
def test_similarity_errors_and_empty_masks(metric):
    a, b = _images()
    assert type(metric(a, b)) is float
    assert math.isnan(metric(a, b, np.zeros(a.shape)))
    with pytest.raises(ValueError, match="different shapes"):
        metric(a, b[1:])
    with pytest.raises(ValueError, match="mask"):
        metric(a, b, np.ones((2, 2, 2)))


def test_ssim_window():
    a, b = _images()
    with pytest.raises(ValueError, match="window"):
        ssim(a, b, window=10)
    with pytest.raises(ValueError, match="window"):
        ssim(a, b, window=11)
