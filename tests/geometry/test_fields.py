"""Fields against closed forms: linear fields, rotations, explicit two-step warping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.blocks import DVF2DDF
from scipy.linalg import expm
from torch import Tensor

from common.geometry.fields import compose, exponentiate, invert, jacobian_determinant, resize_ddf
from common.layers.warp import warp

SHAPE = (14, 12, 17)
M1 = np.array([[1.04, 0.05, -0.03], [-0.04, 0.95, 0.02], [0.03, -0.02, 1.03]])
M2 = np.array([[0.96, -0.06, 0.02], [0.05, 1.02, 0.04], [-0.02, 0.03, 0.97]])


def positions(shape: tuple[int, ...]) -> np.ndarray:
    """(D, H, W, 3)"""
    return np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)


def as_field(vectors: np.ndarray) -> Tensor:
    """(D, H, W, 3) -> (1, 3, D, H, W)"""
    return torch.from_numpy(np.moveaxis(vectors, -1, 0)[None].astype(np.float32).copy())


def affine_field(matrix: np.ndarray, shift: np.ndarray | float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Displacement of x -> centre + matrix (x - centre) + shift."""
    x = positions(shape) - (np.array(shape) - 1) / 2
    return as_field(x @ (matrix - np.eye(3)).T + shift)


def smooth_field(
    shape: tuple[int, ...] = (26, 28, 24), amplitude: float = 1.5, seed: int = 0, batch: int = 1
) -> Tensor:
    """Random long waves, up to `amplitude` voxels; 0 at the border."""
    generator = np.random.default_rng(seed)
    x = np.pi * positions(shape) / (np.array(shape) - 1)
    window = np.sin(x).prod(-1)
    fields = []
    for _ in range(batch):
        waves, phases = generator.uniform(-1.5, 1.5, (3, 3)), generator.uniform(0, 2 * np.pi, 3)
        fields.append(as_field(amplitude * window[..., None] * np.sin(x @ waves.T + phases)))
    return torch.cat(fields)


def inner(field: Tensor, margin: int = 3) -> Tensor:
    cut = slice(margin, -margin)
    return field[..., cut, cut, cut]


class TestResize:
    @pytest.mark.parametrize("new", [(27, 23, 33), (7, 30, 9), (14, 12, 17)])
    def test_keeps_a_linear_physical_field_exactly(self, new: tuple[int, ...]) -> None:
        matrix, shift = np.random.default_rng(0).normal(size=(3, 3)) / 10, np.array([0.1, -0.2, 0.05])

        def field_on(shape: tuple[int, ...]) -> Tensor:
            # a displacement in units of the extent, first to last voxel centre, which both grids share
            last = np.array(shape) - 1
            return as_field(((positions(shape) / last) @ matrix.T + shift) * last)

        torch.testing.assert_close(resize_ddf(field_on(SHAPE), new), field_on(new), atol=2e-5, rtol=0)

    @pytest.mark.parametrize("n", [4, 10, 24])
    def test_ratio_of_doubling_is_exact_and_not_two(self, n: int) -> None:
        resized = resize_ddf(torch.ones(1, 3, n, n + 1, n + 2), (2 * n, 2 * n + 2, 2 * n + 4))
        for axis, m in enumerate((n, n + 1, n + 2)):
            ratio = (2 * m - 1) / (m - 1)
            torch.testing.assert_close(resized[:, axis], torch.full_like(resized[:, axis], ratio))

    def test_warping_before_and_after_resizing_means_the_same_place(self) -> None:
        """The end points of the vectors, as fractions of the extent, are the same on the coarse and the fine grid."""
        coarse = smooth_field((9, 8, 7), seed=4)
        fine = resize_ddf(coarse, (17, 15, 13))  # every second voxel of the fine grid is one of the coarse
        for axis, (n, m) in enumerate(zip((9, 8, 7), (17, 15, 13), strict=True)):
            torch.testing.assert_close(fine[:, axis, ::2, ::2, ::2] / (m - 1), coarse[:, axis] / (n - 1))

    def test_axis_of_one_voxel_keeps_its_displacement(self) -> None:
        field = torch.full((1, 3, 1, 4, 4), 3.0)
        resized = resize_ddf(field, (5, 4, 7))
        assert torch.equal(resized[:, 0], torch.full((1, 5, 4, 7), 3.0))
        torch.testing.assert_close(resized[:, 2], torch.full((1, 5, 4, 7), 6.0))
        assert torch.equal(resize_ddf(torch.full((1, 3, 4, 4, 4), 3.0), (1, 4, 4)), torch.full((1, 3, 1, 4, 4), 3.0))

    def test_half_precision_is_computed_in_float32(self) -> None:
        field = torch.full((1, 3, 100, 4, 4), 1.0, dtype=torch.float16)
        assert float(resize_ddf(field, (200, 4, 4))[0, 0, 5, 1, 1]) == pytest.approx(199 / 99, abs=1e-6)


class TestCompose:
    def test_equals_warping_twice(self) -> None:
        """An image that is linear in the position is sampled without error, so the two ways must agree exactly."""
        slope = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.5, -1.0]])  # two channels
        image = torch.einsum("ci,dhwi->cdhw", slope, torch.from_numpy(positions((26, 28, 24))).float())[None]
        first, second = smooth_field(seed=1), smooth_field(seed=2)
        twice = warp(warp(image, first), second)
        torch.testing.assert_close(inner(warp(image, compose(first, second))), inner(twice), atol=5e-4, rtol=0)
        assert (inner(warp(image, compose(second, first))) - inner(twice)).abs().max() > 0.1  # the order matters
        assert (inner(warp(image, first + second)) - inner(twice)).abs().max() > 0.1  # adding is not composing

    def test_affine_closed_form(self) -> None:
        first, second = affine_field(M1, [0.3, -0.2, 0.1]), affine_field(M2, [-0.4, 0.2, 0.3])
        total = affine_field(M1 @ M2, M1 @ [-0.4, 0.2, 0.3] + [0.3, -0.2, 0.1])
        torch.testing.assert_close(inner(compose(first, second)), inner(total), atol=2e-5, rtol=0)
        assert (inner(compose(second, first)) - inner(total)).abs().max() > 0.01

    def test_constant_and_its_negative_cancel(self) -> None:
        constant = torch.tensor([1.5, -2.25, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
        assert float(compose(constant, -constant).abs().max()) < 1e-6

    def test_identity_is_neutral(self) -> None:
        field = smooth_field(seed=3)
        torch.testing.assert_close(compose(field, torch.zeros_like(field)), field, atol=1e-5, rtol=0)
        assert torch.equal(compose(torch.zeros_like(field), field), field)


class TestInvert:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_smooth_field(self, seed: int) -> None:
        field = smooth_field(seed=seed, batch=2)
        inverse, residual = invert(field)
        assert float(residual.max()) < 1e-4
        assert float(compose(field, inverse).abs().max()) < 1e-4
        # the other way round up to interpolation
        assert float(compose(inverse, field).norm(dim=1).max()) < 0.05 * float(field.norm(dim=1).max())

    def test_affine_closed_form(self) -> None:
        inverse, residual = invert(affine_field(M1, 0.0))
        expected = affine_field(np.linalg.inv(M1), 0.0)
        torch.testing.assert_close(inner(inverse), inner(expected), atol=2e-4, rtol=0)
        assert float(inner(residual).max()) < 2e-4

    def test_residual_is_the_length_of_what_is_left(self) -> None:
        field = smooth_field(amplitude=2.0)
        inverse, residual = invert(field, iterations=2)
        torch.testing.assert_close(residual[:, 0], compose(field, inverse).norm(dim=1))
        assert float(residual.max()) > 0.01  # two steps do not suffice, and it says so

    def test_residual_tells_a_fold(self) -> None:
        x = torch.arange(24.0)
        field = torch.zeros(1, 3, 24, 4, 4)
        field[:, 0] = (4 * torch.sin(x / 1.5)).view(1, 24, 1, 1)  # slope up to 2.7: folds
        assert float(jacobian_determinant(field).min()) < 0
        assert float(invert(field)[1].max()) > 0.5


class TestExponentiate:
    def test_constant_returns_itself(self) -> None:
        velocity = torch.tensor([5.0, -3.0, 0.25]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
        torch.testing.assert_close(exponentiate(velocity), velocity.contiguous(), atol=1e-5, rtol=0)

    def test_rotation_generator_against_expm(self) -> None:
        generator = np.array([[0, -0.3, 0.1], [0.3, 0, -0.2], [-0.1, 0.2, 0]])
        shape = (21, 21, 21)
        velocity = affine_field(np.eye(3) + generator, 0.0, shape)
        exact = affine_field(expm(generator), 0.0, shape)
        error = inner(exponentiate(velocity) - exact, 6).abs().max()
        assert float(error) < 0.01
        # what is left is (1 + G / 2^n)^(2^n) - exp(G), which halves with each squaring
        steps_3, steps_4 = (inner(exponentiate(velocity, steps=n) - exact, 6).abs().max() for n in (3, 4))
        assert float(steps_3 / steps_4) == pytest.approx(2.0, abs=0.15)
        # the rotation moves the voxels concerned; velocity itself is not the answer
        assert float(inner(velocity - exact, 6).abs().max()) > 0.1

    def test_against_monai(self) -> None:
        velocity = smooth_field(amplitude=2.0, seed=5, batch=2)
        expected = DVF2DDF(num_steps=7)(velocity)
        torch.testing.assert_close(inner(exponentiate(velocity)), inner(expected), atol=2e-4, rtol=0)
        border = DVF2DDF(num_steps=5, padding_mode="border")(velocity)
        torch.testing.assert_close(exponentiate(velocity, steps=5), border, atol=2e-4, rtol=0)

    def test_half_precision_does_not_underflow(self) -> None:
        velocity = torch.full((1, 3, 5, 5, 5), 1e-5, dtype=torch.float16)
        result = exponentiate(velocity)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, velocity.float(), atol=1e-9, rtol=1e-3)

    def test_negative_velocity_is_the_inverse(self) -> None:
        velocity = smooth_field(amplitude=1.5, seed=6)
        left = compose(exponentiate(velocity), exponentiate(-velocity)).norm(dim=1)
        assert float(left.max()) < 0.02 * float(velocity.norm(dim=1).max())


class TestJacobianDeterminant:
    def test_linear_fields(self) -> None:
        field = torch.cat([affine_field(M1, 2.0), affine_field(M2, 0.0)])
        determinant = jacobian_determinant(field)
        assert determinant.shape == (2, 1, *(n - 2 for n in SHAPE))
        for item, matrix in enumerate((M1, M2)):
            expected = torch.full_like(determinant[item], float(np.linalg.det(matrix)))
            torch.testing.assert_close(determinant[item], expected, atol=1e-5, rtol=0)

    def test_cross_terms(self) -> None:
        """u = (a z, b y, c x) has a matrix off the diagonal in D and W: det = (1 + b)(1 - a c)."""
        a, b, c = 0.3, -0.2, 0.5
        z = positions(SHAPE)
        field = as_field(np.stack([a * z[..., 2], b * z[..., 1], c * z[..., 0]], -1))
        determinant = jacobian_determinant(field)
        torch.testing.assert_close(determinant, torch.full_like(determinant, (1 + b) * (1 - a * c)), atol=1e-5, rtol=0)

    def test_reflection_is_negative(self) -> None:
        determinant = jacobian_determinant(affine_field(np.diag([1.0, -1.0, 1.0]), 0.0))
        torch.testing.assert_close(determinant, -torch.ones_like(determinant), atol=1e-5, rtol=0)

    def test_values_belong_to_their_voxels(self) -> None:
        x = positions(SHAPE)[..., 1]
        field = as_field(np.stack([0 * x, 0.01 * x**2, 0 * x], -1))  # central differences are exact for a parabola
        expected = 1 + 0.02 * torch.arange(1, SHAPE[1] - 1)
        torch.testing.assert_close(jacobian_determinant(field)[0, 0, 3, :, 4], expected, atol=1e-5, rtol=0)

    def test_short_axis_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"at least 3 voxels.*\(2, 5, 5\)"):
            jacobian_determinant(torch.zeros(1, 3, 2, 5, 5))
