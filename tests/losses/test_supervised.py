import numpy as np
import pytest
import torch
from scipy import ndimage

from common.layers.warp import warp
from common.losses import EndpointErrorLoss, GradientLoss, LandmarkLoss, SequenceLoss, SoftDiceLoss

SHAPE = (9, 11, 14)


def _boxes(shift=0):
    label = torch.zeros(1, 1, *SHAPE, dtype=torch.int16)
    label[..., 2:6, 3:7, 3 + shift : 8 + shift] = 3
    label[..., 2:6, 7:10, 3 + shift : 8 + shift] = 5
    return label


def _shift_field(amount):
    ddf = torch.zeros(1, 3, *SHAPE)
    ddf[:, 2] = amount
    return ddf


def test_soft_dice_of_shifted_boxes():
    loss = SoftDiceLoss([3, 5])
    assert loss(_boxes(), _boxes(), _shift_field(0)).item() == pytest.approx(0, abs=1e-5)
    # boxes of 5 voxels, 3 of them shared
    assert loss(_boxes(), _boxes(2), _shift_field(0)).item() == pytest.approx(0.4, abs=1e-5)
    assert loss(_boxes(), _boxes(2), _shift_field(2)).item() == pytest.approx(0, abs=1e-5)
    # half a voxel off: 4 * 1 + 0.5 shared of 5
    assert loss(_boxes(), _boxes(), _shift_field(0.5)).item() == pytest.approx(0.1, abs=1e-5)


def test_soft_dice_has_a_gradient_where_nearest_has_none():
    ddf = _shift_field(0.3).requires_grad_()
    SoftDiceLoss([3, 5])(_boxes(), _boxes(1), ddf).backward()
    assert torch.isfinite(ddf.grad).all()
    assert ddf.grad[:, 2].sum() < 0  # a larger displacement along the last axis is better

    ddf = _shift_field(0.3).requires_grad_()
    fixed, moving = (_boxes() == 3).float(), (_boxes(1) == 3).float()
    warped = warp(moving, ddf, mode="nearest")
    (1 - 2 * (fixed * warped).sum() / (fixed + warped).sum()).backward()
    assert ddf.grad.abs().max() == 0


def test_soft_dice_averages_the_labels_of_both_images():
    only_fixed = _boxes()
    only_fixed[..., 0, 0, 0] = 9
    loss = SoftDiceLoss([3, 5, 9, 77])
    assert loss(only_fixed, _boxes(2), _shift_field(0)).item() == pytest.approx(0.4, abs=1e-5)
    ddf = _shift_field(0.2).requires_grad_()
    nothing = SoftDiceLoss([77])(_boxes(), _boxes(), ddf)
    nothing.backward()
    assert nothing.item() == 0
    assert torch.isfinite(ddf.grad).all()


def test_soft_dice_weighs_small_and_large_labels_alike():
    fixed, moving = torch.zeros(2, 1, 1, *SHAPE)
    fixed[..., :5, :] = moving[..., :5, :] = 1
    fixed[..., 8, 9] = 2
    moving[..., 8, 10] = 2
    assert SoftDiceLoss([1, 2])(fixed, moving, _shift_field(0)).item() == pytest.approx(0.5, abs=1e-5)


def test_soft_dice_does_not_repeat_the_border():
    fixed, moving = torch.zeros(2, 1, 1, *SHAPE)
    fixed[..., 10:] = 1
    moving[..., 11:] = 1
    # warped: voxels 10 to 12; what voxel 13 points at is unknown
    assert SoftDiceLoss([1])(fixed, moving, _shift_field(1)).item() == pytest.approx(1 - 6 / 7, abs=1e-5)


def test_soft_dice_under_autocast():
    arguments = (_boxes(), _boxes(1), _shift_field(0.37))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = SoftDiceLoss([3, 5])(*arguments)
    assert torch.equal(actual, SoftDiceLoss([3, 5])(*arguments))


def test_soft_dice_errors():
    with pytest.raises(ValueError, match="different values"):
        SoftDiceLoss([])
    with pytest.raises(ValueError, match="grid"):
        SoftDiceLoss([3])(_boxes()[..., 1:], _boxes(), _shift_field(0))
    with pytest.raises(ValueError, match="moving label"):
        SoftDiceLoss([3])(_boxes(), _boxes().repeat(2, 1, 1, 1, 1), _shift_field(0))


def _shares(offset=0, size=16):
    """A ball and a slab, averaged from four times the resolution; `offset` along the last axis in fine voxels."""
    d, h, w = torch.meshgrid(*(torch.arange(4.0 * size),) * 3, indexing="ij")
    ball = (d - 30) ** 2 + (h - 31) ** 2 + (w - 28 - offset) ** 2 < 15**2
    slab = (w > 50 + offset) & (w < 57 + offset) & (d > 8) & (d < 50) & (h > 8) & (h < 50)
    return torch.nn.functional.avg_pool3d(torch.stack([ball, slab])[None].float(), 4)


def _uniform(amount, size=16):
    ddf = torch.zeros(1, 3, size, size, size)
    ddf[:, 2] = amount
    return ddf


def test_soft_dice_of_equal_shares_is_perfect():
    loss = SoftDiceLoss([1, 2])
    shares = _shares()
    assert ((shares > 0) & (shares < 1)).any()
    assert loss.of_one_hot(shares, shares, _uniform(0)).item() == pytest.approx(0, abs=1e-5)
    # of whole numbers the square changes nothing
    whole = shares.round()
    shifted = _shares(8).round()
    label = whole[:, :1] + 2 * whole[:, 1:]
    moving = shifted[:, :1] + 2 * shifted[:, 1:]
    expected = loss(label, moving, _uniform(0)).item()
    assert 0.1 < expected < 0.9
    assert loss.of_one_hot(whole, shifted, _uniform(0)).item() == pytest.approx(expected, abs=1e-5)


def test_soft_dice_of_shares_feels_a_quarter_of_a_voxel():
    loss = SoftDiceLoss([1, 2])
    fixed, moving = _shares(), _shares(1)
    off = loss.of_one_hot(fixed, moving, _uniform(0)).item()
    back = loss.of_one_hot(fixed, moving, _uniform(0.25)).item()
    away = loss.of_one_hot(fixed, moving, _uniform(-0.25)).item()
    assert 0.005 < off < away
    assert back < 0.7 * off
    # which a coarse label map does not, for the ball at least
    coarse = [(shares[:, :1] > 0.5).to(torch.uint8) for shares in (_shares(), _shares(1))]
    assert (coarse[0] != coarse[1]).float().mean() < 0.01


def test_soft_dice_of_shares_has_a_gradient():
    ddf = _uniform(0).requires_grad_()
    SoftDiceLoss([1, 2]).of_one_hot(_shares(), _shares(1), ddf).backward()
    assert torch.isfinite(ddf.grad).all()
    assert ddf.grad[:, 2].sum() < 0  # a larger displacement along the last axis is better
    # and not by chance: all in all, and much more than along the other axes
    assert ddf.grad[:, 2].sum().abs() > 5 * ddf.grad[:, :2].sum(dim=(0, 2, 3, 4)).abs().max()


def test_soft_dice_of_shares_averages_the_labels_of_both_images():
    fixed, moving = _shares(), _shares(4)
    moving[:, 1] = 0  # the slab is in the fixed image only
    expected = SoftDiceLoss([1]).of_one_hot(fixed[:, :1], moving[:, :1], _uniform(0)).item()
    assert SoftDiceLoss([1, 2]).of_one_hot(fixed, moving, _uniform(0)).item() == pytest.approx(expected, abs=1e-6)
    nothing = SoftDiceLoss([2]).of_one_hot(fixed[:, 1:], moving[:, 1:], _uniform(0))
    assert nothing.item() == 0


def test_soft_dice_of_a_patch_of_the_fixed_shares():
    fixed, moving = _shares(), _shares(8)
    patch = fixed[..., 4:12, 2:14, 4:14]
    ddf = torch.tensor([4.0, 2.0, 4.0 + 2.0]).view(1, 3, 1, 1, 1).expand(1, 3, *patch.shape[2:])
    assert SoftDiceLoss([1, 2]).of_one_hot(patch, moving, ddf).item() == pytest.approx(0, abs=1e-5)


def test_soft_dice_of_shares_errors():
    loss = SoftDiceLoss([1, 2])
    shares = _shares()
    for fixed, moving in (
        (shares[:, :1], shares),
        (shares, shares[:, :1]),
        (shares[..., 1:], shares),
        (shares, shares.repeat(2, 1, 1, 1, 1)),
    ):
        with pytest.raises(ValueError, match="maps of 2 labels"):
            loss.of_one_hot(fixed, moving, _uniform(0))


def _points(n=20, seed=0):
    generator = np.random.default_rng(seed)
    return generator.uniform(0, np.array(SHAPE) - 1, (n, 3))


def test_landmark_loss_equals_map_coordinates():
    torch.manual_seed(0)
    ddf, spacing = torch.randn(1, 3, *SHAPE), (0.8, 1.5, 2.5)
    fixed, moving = _points(), _points(seed=1)
    u = np.stack([ndimage.map_coordinates(c.numpy(), fixed.T, order=1) for c in ddf[0]], axis=1)
    expected = np.linalg.norm((fixed + u - moving) * spacing, axis=1).mean()
    tensors = torch.from_numpy(fixed), torch.from_numpy(moving)
    assert LandmarkLoss()(*tensors, ddf, spacing).item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LandmarkLoss()(*tensors, ddf, torch.tensor(spacing)).item() == pytest.approx(expected, rel=1e-5)


def test_landmark_loss_gradient_touches_the_eight_neighbours():
    ddf = torch.zeros(1, 3, *SHAPE, requires_grad=True)
    LandmarkLoss()(torch.tensor([[3.5, 4.5, 5.5]]), torch.tensor([[6.0, 4.5, 5.5]]), ddf, (2.0, 1.0, 1.0)).backward()
    assert (ddf.grad[0, 0] != 0).sum() == 8
    assert ddf.grad[0, 0].sum().item() == pytest.approx(-2.0)  # 2 mm less per voxel of displacement
    assert ddf.grad[0, 1:].abs().max() == 0


def test_landmark_loss_skips_filled_up_rows():
    ddf = torch.zeros(2, 3, *SHAPE, requires_grad=True)
    fixed = torch.full((2, 3, 3), float("nan"))
    fixed[0, :2] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    moving = torch.zeros(2, 3, 3)
    moving[0, :2] = torch.tensor([[1.0, 2.0, 5.0], [4.0, 4.0, 4.0]])
    loss = LandmarkLoss()(fixed, moving, ddf, (1, 1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert torch.isfinite(ddf.grad).all()
    empty = LandmarkLoss()(fixed[1:], moving[1:], ddf[1:], (1, 1, 1))
    assert empty.item() == 0
    assert empty.requires_grad


def test_landmark_loss_errors():
    ddf = torch.zeros(1, 3, *SHAPE)
    with pytest.raises(ValueError, match="corresponding"):
        LandmarkLoss()(torch.zeros(4, 3), torch.zeros(5, 3), ddf, (1, 1, 1))
    with pytest.raises(ValueError, match="spacing"):
        LandmarkLoss()(torch.zeros(4, 3), torch.zeros(4, 3), ddf, (1, 1))
    with pytest.raises(ValueError, match="batch"):
        LandmarkLoss()(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), ddf, (1, 1, 1))


def test_sequence_loss_weights_the_last_field_most():
    fields = [torch.full((1, 3, 2, 2, 2), float(v)) for v in (1, 2, 4)]
    loss = SequenceLoss(lambda field: field.mean(), gamma=0.5)
    assert loss(fields).item() == pytest.approx(0.25 * 1 + 0.5 * 2 + 4)
    assert loss(fields[2]).item() == 4  # a tensor is one field, not a sequence of samples
    assert SequenceLoss(lambda field: field.mean())([torch.ones(1)] * 11).item() == pytest.approx(4.5705, abs=1e-4)


def test_sequence_loss_passes_arguments_on_and_reaches_every_field():
    fields = [torch.randn(1, 3, 4, 4, 4, requires_grad=True) for _ in range(3)]
    target = torch.zeros(1, 3, 4, 4, 4)
    SequenceLoss(EndpointErrorLoss(), 0.8)(fields, target, mask=torch.ones(1, 1, 4, 4, 4)).backward()
    assert all(f.grad.abs().max() > 0 for f in fields)
    assert SequenceLoss(GradientLoss())(fields) > 0


def test_sequence_loss_errors():
    with pytest.raises(ValueError, match="at least one"):
        SequenceLoss(GradientLoss())([])
    with pytest.raises(ValueError, match="gamma"):
        SequenceLoss(GradientLoss(), gamma=0)


def test_endpoint_error():
    target = torch.zeros(1, 3, *SHAPE)
    ddf = target.clone()
    ddf[:, 0], ddf[:, 1] = 3.0, 4.0
    mask = torch.zeros(1, 1, *SHAPE)
    mask[..., :3] = 1
    ddf[..., 3:] = 0
    assert EndpointErrorLoss()(ddf, target, mask).item() == pytest.approx(5)
    assert EndpointErrorLoss()(ddf, target).item() == pytest.approx(5 * 3 / 14)
    perfect = target.clone().requires_grad_()
    EndpointErrorLoss()(perfect, target).backward()
    assert torch.isfinite(perfect.grad).all()
    with pytest.raises(ValueError, match="one shape"):
        EndpointErrorLoss()(ddf, target[..., 1:])
    with pytest.raises(ValueError, match="mask"):
        EndpointErrorLoss()(ddf, target, mask[..., 1:])
