import pytest
import torch

from common.losses import BendingEnergyLoss, GradientLoss, NegativeJacobianLoss

SHAPES = [(9, 11, 14), (5, 4, 6)]


def _affine_field(shape, matrix):
    """u(p) = matrix @ p."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    return torch.einsum("cx,xijk->cijk", torch.tensor(matrix), torch.stack(axes))[None]


MATRIX = [[0.1, -0.2, 0.3], [0.0, 0.4, -0.5], [0.6, 0.2, 0.1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_loss_of_a_linear_field(shape):
    m = torch.tensor(MATRIX)
    ddf = _affine_field(shape, MATRIX)
    assert GradientLoss("l1")(ddf).item() == pytest.approx(m.abs().mean().item(), rel=1e-4)
    assert GradientLoss("l2")(ddf).item() == pytest.approx((m**2).mean().item(), rel=1e-4)


def test_gradient_loss_averages_axes_and_not_voxels():
    ddf = torch.zeros(1, 3, 2, 50, 50)
    ddf[:, :, 1] = 1.0  # derivative 1 along the first axis, 0 along the others
    assert GradientLoss("l2")(ddf).item() == pytest.approx(1 / 3)


def test_gradient_loss_in_mm():
    spacing = (0.7, 1.5, 3.0)
    s = torch.tensor(spacing)
    physical = torch.tensor(MATRIX) * s[:, None] / s[None, :]  # d(u_i s_i) / d(x_j s_j)
    ddf = _affine_field((6, 7, 8), MATRIX)
    assert GradientLoss("l2", spacing=spacing)(ddf).item() == pytest.approx((physical**2).mean().item(), rel=1e-4)
    assert GradientLoss("l1", spacing=spacing)(ddf).item() == pytest.approx(physical.abs().mean().item(), rel=1e-4)
    assert GradientLoss("l2", spacing=(2, 2, 2))(ddf).item() == pytest.approx(GradientLoss("l2")(ddf).item())


def test_gradient_loss_sees_a_checkerboard():
    ddf = torch.zeros(1, 3, 6, 6, 6)
    ddf[..., ::2] = 1.0
    assert GradientLoss("l2")(ddf).item() == pytest.approx(1 / 3)


def test_gradient_loss_of_a_single_slice():
    ddf = _affine_field((1, 7, 8), MATRIX)
    assert GradientLoss("l1")(ddf).item() == pytest.approx(torch.tensor(MATRIX)[:, 1:].abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_bending_energy(shape):
    assert BendingEnergyLoss()(_affine_field(shape, MATRIX)).item() == pytest.approx(0, abs=1e-9)
    ddf = torch.zeros(1, 3, *shape)
    ddf[:, 0] = torch.arange(shape[2]) ** 2 / 2.0  # second derivative 1 in one of three channels
    assert BendingEnergyLoss()(ddf).item() == pytest.approx(1 / 3, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_negative_jacobian(shape):
    assert NegativeJacobianLoss()(_affine_field(shape, MATRIX)).item() == 0
    assert NegativeJacobianLoss()(torch.zeros(1, 3, *shape)).item() == 0
    flip = [[-3.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]  # det = (1 - 3) * 1.5
    assert NegativeJacobianLoss()(_affine_field(shape, flip)).item() == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("loss", [GradientLoss("l1"), GradientLoss("l2"), BendingEnergyLoss(), NegativeJacobianLoss()])
def test_precision_and_gradients(loss):
    ddf = (3 * torch.randn(1, 3, 6, 7, 8)).requires_grad_()
    expected = loss(ddf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(ddf)
    assert torch.equal(actual, expected)
    actual.backward()
    assert torch.isfinite(ddf.grad).all()
    assert ddf.grad.abs().max() > 0
    zero = torch.zeros(1, 3, 6, 7, 8, requires_grad=True)
    loss(zero).backward()
    assert torch.isfinite(zero.grad).all()
    for wrong in (torch.zeros(1, 2, 6, 7, 8), torch.zeros(3, 6, 7, 8)):
        with pytest.raises(ValueError, match="B, 3, D, H, W"):
            loss(wrong)


def test_bad_options():
    with pytest.raises(ValueError, match="penalty"):
        GradientLoss("l3")
    with pytest.raises(ValueError, match="spacing"):
        GradientLoss(spacing=(1, 0, 1))
    with pytest.raises(ValueError, match="single voxel"):
        GradientLoss()(torch.zeros(1, 3, 1, 1, 1))
