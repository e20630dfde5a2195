import monai.losses
import monai.metrics
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.losses import LocalNCC, MINDSSCLoss, MSELoss, SSIMLoss, WeightedSimilarity, mind_ssc
from common.losses.similarity import ssim_map

SHAPES = [(9, 11, 14), (13, 9, 10)]
LOSSES = [LocalNCC(5), LocalNCC(5, squared=False), MSELoss(), SSIMLoss(), MINDSSCLoss()]


def _images(shape, *, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(batch, 1, *shape, generator=generator) for _ in range(2))


def _ncc_by_hand(a, b, window, eps):
    """Squared NCC of each whole window, float64, one window at a time."""
    a, b = (x[0, 0].double().numpy() for x in (a, b))
    out = np.zeros([n - window + 1 for n in a.shape])
    for index in np.ndindex(*out.shape):
        box = tuple(slice(i, i + window) for i in index)
        x, y = a[box] - a[box].mean(), b[box] - b[box].mean()
        out[index] = (x * y).sum() ** 2 / ((x * x).sum() * (y * y).sum() + eps)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [3, 5, 9])
def test_local_ncc_equals_brute_force(shape, window):
    a, b = _images(shape)
    expected = -_ncc_by_hand(a, b, window, 1e-5).mean()
    assert LocalNCC(window)(a, b).item() == pytest.approx(expected, abs=1e-6)


def test_local_ncc_equals_monai_where_no_padding_is_seen():
    a, b = _images((13, 12, 15))
    full = monai.losses.LocalNormalizedCrossCorrelationLoss(kernel_size=5, reduction="none")(b, a)
    assert LocalNCC(5)(a, b).item() == pytest.approx(full[:, :, 2:-2, 2:-2, 2:-2].mean().item(), abs=1e-5)
    assert LocalNCC(5)(a, b).item() != pytest.approx(full.mean().item(), abs=1e-3)


def test_local_ncc_mask_selects_window_centres():
    a, b = _images((9, 11, 14))
    mask = torch.zeros(1, 1, 9, 11, 14)
    mask[:, :, 3:5, 4:9, 2:4] = 1
    by_hand = _ncc_by_hand(a, b, 5, 1e-5)[1:3, 2:7, 0:2]
    assert LocalNCC(5)(a, b, mask).item() == pytest.approx(-by_hand.mean(), abs=1e-6)


def test_local_ncc_survives_a_large_offset():
    a, b = _images((11, 11, 11))
    assert LocalNCC(5)(a + 1000, b).item() == pytest.approx(LocalNCC(5)(a, b).item(), abs=2e-3)


def test_sign_of_the_correlation():
    a, _ = _images((9, 11, 14))
    assert LocalNCC(9)(a, 1 - a).item() == pytest.approx(-1, abs=1e-4)
    assert LocalNCC(9, squared=False)(a, 1 - a).item() == pytest.approx(1, abs=1e-4)
    assert LocalNCC(9, squared=False)(a, 0.5 * a + 0.2).item() == pytest.approx(-1, abs=1e-4)


def test_flat_windows_count_zero():
    a = torch.full((1, 1, 9, 11, 20), 0.8)
    a[..., 10:] = _images((9, 11, 10))[0]
    score = LocalNCC(5)(a, a).item()
    flat, windows = 6, 16  # windows along the last axis that see the constant half only
    assert score == pytest.approx(-(windows - flat) / windows, abs=0.01)


def test_rounding_leaves_no_negative_variance():
    flat, image = torch.full((1, 1, 9, 11, 40), 7.7), _images((9, 11, 40))[0]
    flat[..., :10] = image[..., :10]
    assert torch.isfinite(LocalNCC(5, squared=False, eps=1e-14)(flat, image))


def test_values_outside_the_mask_may_be_anything():
    a, b = _images((9, 11, 14))
    mask = torch.ones(1, 1, 9, 11, 14)
    mask[..., 0] = 0
    expected = MSELoss()(a, b, mask)
    b[..., 0] = float("nan")
    assert torch.equal(MSELoss()(a, b, mask), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
def test_identical_images_are_the_minimum(loss, shape):
    a, b = _images(shape)
    best = -1.0 if isinstance(loss, LocalNCC) else 0.0
    assert loss(a, a).item() == pytest.approx(best, abs=1e-4)
    assert loss(a, b).item() > best + 1e-3


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(loss, dtype):
    a, b = (0.5 + 1e-2 * x for x in _images((9, 11, 14)))  # low contrast is what half precision loses
    expected = loss(a, b)
    with torch.autocast("cpu", dtype=dtype):
        actual = loss(a, b)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("fixed_value", [None, 0.0, 0.7])
def test_gradient_is_finite_on_constant_images(loss, fixed_value):
    fixed = _images((9, 11, 14))[0] if fixed_value is None else torch.full((1, 1, 9, 11, 14), fixed_value)
    warped = torch.full((1, 1, 9, 11, 14), 0.7, requires_grad=True)
    value = loss(fixed, warped)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(warped.grad).all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_empty_mask_gives_a_finite_value(loss):
    a, b = _images((9, 11, 14))
    b.requires_grad_()
    value = loss(a, b, torch.zeros(1, 1, 9, 11, 14))
    value.backward()
    assert torch.isfinite(value)
    assert b.grad.abs().max() == 0


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_mask_keeps_the_rest_out(loss):
    a, b = _images((9, 11, 24))
    mask = torch.zeros(1, 1, 9, 11, 24)
    mask[..., :8] = 1
    spoilt = b.clone()
    spoilt[..., 16:] = torch.rand(1, 1, 9, 11, 8)
    if isinstance(loss, (MSELoss, LocalNCC, SSIMLoss)):  # MIND's clamp depends weakly on the whole sample
        assert loss(a, spoilt, mask).item() == pytest.approx(loss(a, b, mask).item(), abs=1e-5)
    assert loss(a, spoilt).item() != pytest.approx(loss(a, b).item(), abs=1e-5)
    assert loss(a, b, mask).item() != pytest.approx(loss(a, b).item(), abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_shapes_that_do_not_fit(loss):
    a, b = _images((9, 11, 14))
    with pytest.raises(ValueError, match="one shape"):
        loss(a, b[..., :-1])
    with pytest.raises(ValueError, match="one shape"):
        loss(a[0], b[0])
    with pytest.raises(ValueError, match="mask"):
        loss(a, b, torch.ones(1, 1, 9, 11, 13))


def test_windows_that_do_not_fit():
    a, b = _images((9, 11, 14))
    with pytest.raises(ValueError, match="window of 11"):
        LocalNCC(11)(a, b)
    with pytest.raises(ValueError, match="odd"):
        LocalNCC(4)
    with pytest.raises(ValueError, match="odd"):
        SSIMLoss(6)
    with pytest.raises(ValueError, match="eps"):
        LocalNCC(eps=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("data_range", [1.0, 4.0])
def test_ssim_equals_monai(shape, data_range):
    a, b = _images(shape, batch=2)
    b = 0.6 * a + 0.4 * b
    oracle = monai.metrics.SSIMMetric(3, data_range=data_range, kernel_type="uniform", win_size=7)(a, b).mean()
    assert SSIMLoss(7, data_range=data_range)(a, b).item() == pytest.approx(1 - oracle.item(), abs=1e-5)
    assert ssim_map(a, b).shape == (2, 1, *(n - 6 for n in shape))


def _mind_by_hand(image, radius, dilation):
    """MIND-SSC in float64 numpy, one displacement at a time, channels in the published order."""
    x = image[0, 0].double().numpy()
    neighbours = dilation * (np.array([[0, 1, 1], [1, 1, 0], [1, 0, 1], [1, 1, 2], [2, 1, 1], [1, 2, 1]]) - 1)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in x.shape), indexing="ij"))
    top = np.array(x.shape).reshape(3, 1, 1, 1) - 1

    def shifted(volume, offset):
        return volume[tuple(np.clip(grid + np.reshape(offset, (3, 1, 1, 1)), 0, top))]

    reach = range(-radius, radius + 1)
    distances = []
    for i in range(6):
        for j in range(i):
            if np.any(neighbours[i] + neighbours[j]):  # not opposite
                ssd = (shifted(x, neighbours[i]) - shifted(x, neighbours[j])) ** 2
                distances.append(
                    np.mean([shifted(ssd, (p, q, r)) for p in reach for q in reach for r in reach], axis=0)
                )
    excess = np.array(distances) - np.min(distances, axis=0)
    variance = excess.mean(axis=0)
    variance = np.clip(variance, 0.001 * variance.mean(), 1000 * variance.mean())
    return np.exp(-excess / variance)[[6, 8, 1, 11, 2, 10, 0, 7, 9, 4, 5, 3]]


@pytest.mark.parametrize(("radius", "dilation"), [(1, 2), (2, 1), (0, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_mind_equals_a_direct_computation(shape, radius, dilation):
    image, _ = _images(shape)
    descriptor = mind_ssc(image, radius, dilation)
    assert descriptor.shape == (1, 12, *shape)
    np.testing.assert_allclose(descriptor[0].numpy(), _mind_by_hand(image, radius, dilation), atol=1e-4)


def test_mind_limits_the_variance():
    """Noise far below the sample's contrast is no structure: its variance is raised to 0.001 of the mean."""
    image, _ = _images((9, 11, 20))
    image[..., :10] *= 0.01
    np.testing.assert_allclose(mind_ssc(image)[0].numpy(), _mind_by_hand(image, 1, 2), atol=1e-3)
    assert mind_ssc(image)[..., :7].amin() > 0.5 > mind_ssc(image)[..., 13:].amin()


def test_mind_is_invariant_to_scaling_and_inversion():
    image, other = _images((9, 11, 14))
    descriptor = mind_ssc(image)
    torch.testing.assert_close(mind_ssc(1 - image), descriptor, atol=1e-4, rtol=0)
    torch.testing.assert_close(mind_ssc(0.3 * image + 0.1), descriptor, atol=1e-4, rtol=0)
    assert (mind_ssc(other) - descriptor).abs().max() > 0.1
    assert descriptor.amax(dim=1).min() == 1
    assert descriptor.min() >= 0


def test_mind_of_a_constant_image_is_one():
    assert torch.equal(mind_ssc(torch.full((1, 1, 9, 11, 14), 0.3)), torch.ones(1, 12, 9, 11, 14))


def test_mind_does_not_mix_samples():
    a, b = _images((9, 11, 14))
    torch.testing.assert_close(mind_ssc(torch.cat([a, 0.01 * b]))[:1], mind_ssc(a))


def test_mind_rejects_two_channels():
    with pytest.raises(ValueError, match="B, 1, D, H, W"):
        mind_ssc(torch.rand(1, 2, 9, 11, 14))
    with pytest.raises(ValueError, match="dilation"):
        mind_ssc(torch.rand(1, 1, 9, 11, 14), dilation=0)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_descent_moves_the_warped_image_towards_the_fixed(loss):
    """A step against the gradient lowers the loss: the sign is right."""
    fixed, start = (F.avg_pool3d(x, 3, 1) for x in _images((11, 13, 14)))
    warped = start.clone().requires_grad_()
    before = loss(fixed, warped)
    (gradient,) = torch.autograd.grad(before, warped)
    step = 1e-3 * gradient / gradient.abs().max()
    assert loss(fixed, start - step) < before


def test_weighted_similarity_is_the_sum():
    a, b = _images((9, 11, 14), batch=2)
    b.requires_grad_()
    losses, weights = [LocalNCC(5), SSIMLoss(), MSELoss()], [2.0, 0.5, 0.0]
    loss = WeightedSimilarity(losses, weights)(a, b)
    assert loss.ndim == 0
    expected = 2 * LocalNCC(5)(a, b) + 0.5 * SSIMLoss()(a, b)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, b)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-4


@pytest.mark.parametrize(("losses", "weights"), [([], []), ([MSELoss()], []), ([MSELoss()], [1, 2])])
def test_each_similarity_needs_its_weight(losses, weights):
    with pytest.raises(ValueError, match=f"{len(losses)} losses and {len(weights)} weights"):
        WeightedSimilarity(losses, weights)
