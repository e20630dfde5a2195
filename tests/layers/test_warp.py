"""Warping against MONAI's `Warp`, against plain `grid_sample`, and against finite differences."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import Warp
from torch import Tensor

import common.layers.warp as module
from common.layers.warp import sample_at, warp

SHAPE = (7, 6, 9)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def reference(image: Tensor, ddf: Tensor, mode: str, padding_mode: str) -> Tensor:
    """Plain `grid_sample` of the whole volume, as the conventions define it."""
    sizes = torch.tensor([max(n - 1, 1) for n in image.shape[2:]]).view(1, 3, 1, 1, 1)
    axes = [torch.arange(float(n)) for n in ddf.shape[2:]]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + ddf
    grid = (2 * position / sizes - 1).flip(1).permute(0, 2, 3, 4, 1)
    return F.grid_sample(image, grid, mode=mode, padding_mode=padding_mode, align_corners=True)


@pytest.fixture
def many_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Four threads and tiny slabs; the list receives the batch size of each call of `grid_sample`."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(module, "_MIN_VOXELS_PER_SLAB", 16)
    batches: list[int] = []
    plain = F.grid_sample

    def spy(image: Tensor, *args: object, **kwargs: object) -> Tensor:
        batches.append(image.shape[0])
        return plain(image, *args, **kwargs)

    monkeypatch.setattr(module.F, "grid_sample", spy)
    yield batches
    torch.set_num_threads(before)


@pytest.mark.parametrize("padding_mode", ["border", "zeros"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_against_monai(mode: str, padding_mode: str) -> None:
    image, ddf = rand(2, 3, *SHAPE), 8 * rand(2, 3, *SHAPE, seed=1) - 4  # far beyond the border, too
    expected = Warp(mode=mode, padding_mode=padding_mode)(image, ddf)
    torch.testing.assert_close(warp(image, ddf, mode=mode, padding_mode=padding_mode), expected, atol=2e-5, rtol=0)


def test_integer_shift_pulls_back() -> None:
    """warped(p) = moving(p + u): channel i of the field along tensor axis i."""
    image = rand(1, 1, *SHAPE)
    ddf = torch.tensor([1.0, 2.0, -3.0]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    warped = warp(image, ddf, padding_mode="zeros")
    torch.testing.assert_close(warped[..., :-1, :-2, 3:], image[..., 1:, 2:, :-3], atol=1e-5, rtol=0)
    assert not warped[..., -1:, :, :].any()
    assert not warped[..., :3].any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axis_of_one_voxel(axis: int) -> None:
    shape = list(SHAPE)
    shape[axis] = 1
    image, ddf = rand(1, 2, *shape), torch.zeros(1, 3, *shape)
    torch.testing.assert_close(warp(image, ddf), image, atol=1e-5, rtol=0)
    ddf[:, (axis + 1) % 3] = 1.0
    expected = image.roll(-1, 2 + (axis + 1) % 3)
    inner = [slice(None)] * 5
    inner[2 + (axis + 1) % 3] = slice(0, -1)
    torch.testing.assert_close(warp(image, ddf)[tuple(inner)], expected[tuple(inner)], atol=1e-5, rtol=0)
    sampled = sample_at(image, torch.zeros(1, 3))
    torch.testing.assert_close(sampled[0], image[0, :, 0, 0, 0], atol=1e-6, rtol=0)


def test_autocast_computes_in_float32() -> None:
    image, ddf = rand(1, 1, 200, 4, 4), 3 * rand(1, 3, 200, 4, 4, seed=1)
    expected = warp(image, ddf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(warp(image, ddf), expected)
        assert torch.equal(
            sample_at(image, torch.tensor([[150.3, 1.2, 2.1]])), sample_at(image, torch.tensor([[150.3, 1.2, 2.1]]))
        )
    # a half-precision image keeps its type, but positions near 200 are those of float32
    warped = warp(image.bfloat16(), ddf)
    assert warped.dtype == torch.bfloat16
    torch.testing.assert_close(warped.float(), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding_mode", ["border", "zeros", "reflection"])
@pytest.mark.parametrize("depth", [13, 16, 5])
def test_slabs_equal_one_pass(many_slabs: list[int], depth: int, padding_mode: str, mode: str) -> None:
    image, ddf = rand(1, 2, depth, 5, 6), 6 * rand(1, 3, depth, 5, 6, seed=1) - 3
    expected = reference(image, ddf, mode, padding_mode)
    many_slabs.clear()
    result = warp(image, ddf, mode=mode, padding_mode=padding_mode)
    assert many_slabs == [4]
    assert torch.equal(result, expected) or (result - expected).abs().max() < 1e-5


def test_slabs_of_an_image_of_another_size(many_slabs: list[int]) -> None:
    image, ddf = rand(1, 1, 9, 8, 7), 2 * rand(1, 3, 11, 5, 6, seed=1)
    expected = reference(image, ddf, "bilinear", "border")
    many_slabs.clear()
    torch.testing.assert_close(warp(image, ddf), expected, atol=1e-5, rtol=0)
    assert many_slabs == [4]


def test_slabs_have_the_gradient_of_one_pass(many_slabs: list[int]) -> None:
    weight = rand(1, 2, 13, 5, 6, seed=2)
    gradients = []
    for function in (warp, lambda image, ddf: reference(image, ddf, "bilinear", "border")):
        image = rand(1, 2, 13, 5, 6).requires_grad_()
        ddf = (3 * rand(1, 3, 13, 5, 6, seed=1)).requires_grad_()
        (function(image, ddf) * weight).sum().backward()
        gradients.append((image.grad, ddf.grad))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        assert expected.abs().max() > 0.1


def test_few_voxels_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        image, grid = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 32, 32, 32, 3)
        assert module._slab_count(image, grid) == 1  # 32,768 voxels make one slab
        assert module._slab_count(image, torch.zeros(1, 64, 32, 32, 3)) == 2
        assert module._slab_count(torch.zeros(2, 1, 8, 8, 8), torch.zeros(2, 64, 32, 32, 3)) == 1  # batches have cores
    finally:
        torch.set_num_threads(before)


def test_gradients_against_finite_differences() -> None:
    """Trilinear interpolation is linear along each axis within a cell, so differences are exact but for rounding."""
    shape = (4, 5, 3)
    image = rand(1, 2, *shape)
    whole = torch.randint(-1, 2, (1, 3, *shape), generator=torch.Generator().manual_seed(3))
    ddf = whole + 0.3 + 0.4 * rand(1, 3, *shape, seed=1)  # away from the cells' faces
    weight = rand(1, 2, *shape, seed=2) - 0.5

    def value(a: Tensor, u: Tensor) -> float:
        return float((warp(a, u, padding_mode="zeros").double() * weight).sum())

    a, u = image.clone().requires_grad_(), ddf.clone().requires_grad_()
    (warp(a, u, padding_mode="zeros") * weight).sum().backward()
    for tensor, gradient, step in ((image, a.grad, 0.5), (ddf, u.grad, 0.1)):
        assert gradient is not None
        for index in torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(4))[:40].tolist():
            original = float(tensor.view(-1)[index])
            values = []
            for sign in (1, -1):
                tensor.view(-1)[index] = original + sign * step
                values.append(value(image, ddf))
            tensor.view(-1)[index] = original
            assert float(gradient.reshape(-1)[index]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-4)
        assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("shape", [(4, 3, 5), (9, 8, 12)])
def test_field_on_a_grid_of_another_size(shape: tuple[int, int, int]) -> None:
    """The grids share the first voxel and the spacing."""
    image, ddf = rand(1, 1, *SHAPE), 2 * rand(1, 3, *shape, seed=1) - 1
    result = warp(image, ddf)
    assert result.shape == (1, 1, *shape)
    torch.testing.assert_close(result, reference(image, ddf, "bilinear", "border"), atol=1e-5, rtol=0)
    common = tuple(slice(0, min(n, m)) for n, m in zip(shape, SHAPE, strict=True))
    same = warp(image, torch.zeros(1, 3, *shape))[(..., *common)]
    torch.testing.assert_close(same, image[(..., *common)], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("image", "ddf"),
    [((1, 1, 4, 4), (1, 3, 4, 4, 4)), ((1, 1, 4, 4, 4), (1, 2, 4, 4, 4)), ((2, 1, 4, 4, 4), (1, 3, 4, 4, 4))],
)
def test_shapes_that_do_not_fit_are_refused(image: tuple[int, ...], ddf: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="warp needs an image") as caught:
        warp(torch.zeros(image), torch.zeros(ddf))
    assert str(image) in str(caught.value)
    assert str(ddf) in str(caught.value)
