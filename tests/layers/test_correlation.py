"""Local correlation against a naive loop, forward and backward; memory by what autograd keeps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import common.layers.correlation as module
from common.layers.correlation import LocalCorrelation, correlation_offsets, local_correlation

SHAPE = (5, 4, 7)


def maps(channels: int = 6, shape: tuple[int, ...] = SHAPE, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, channels, *shape, generator=generator) for _ in range(2))  # type: ignore[return-value]


def naive(
    fixed: Tensor, moving: Tensor, *, radius: int, metric: str, normalization: str, padding: str, order: str
) -> Tensor:
    r, (d, h, w) = radius, fixed.shape[2:]
    padded = F.pad(moving, (r,) * 6, mode="replicate" if padding == "replicate" else "constant")
    channels = []
    for slow, middle, fast in itertools.product(range(2 * r + 1), repeat=3):
        i, j, k = (slow, middle, fast) if order == "dhw" else (fast, middle, slow)
        shifted = padded[:, :, i : i + d, j : j + h, k : k + w]
        match = {
            "dot": fixed * shifted,
            "ssd": (fixed - shifted) ** 2,
            "sad": (fixed - shifted).abs(),
        }[metric]
        channels.append(match.sum(1))
    divisor = {"none": 1.0, "channels": fixed.shape[1], "sqrt_channels": math.sqrt(fixed.shape[1])}[normalization]
    return torch.stack(channels, 1) / divisor


@pytest.mark.parametrize("order", ["dhw", "whd"])
@pytest.mark.parametrize("padding", ["replicate", "zeros"])
@pytest.mark.parametrize("normalization", ["none", "channels", "sqrt_channels"])
@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("metric", ["dot", "ssd", "sad"])
def test_against_the_naive_loop(metric: str, radius: int, normalization: str, padding: str, order: str) -> None:
    options: dict[str, Any] = {
        "radius": radius, "metric": metric, "normalization": normalization, "padding": padding, "order": order
    }  # fmt: skip
    weight = torch.randn(2, (2 * radius + 1) ** 3, *SHAPE, generator=torch.Generator().manual_seed(9))
    results = []
    for function in (local_correlation, naive):
        fixed, moving = (m.requires_grad_() for m in maps())
        volume = function(fixed, moving, **options)
        (volume * weight).sum().backward()
        results.append((volume, fixed.grad, moving.grad))
    for ours, expected in zip(*results, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_the_layer_passes_its_options_on() -> None:
    fixed, moving = maps()
    options: dict[str, Any] = {
        "radius": 2, "metric": "sad", "normalization": "none", "padding": "zeros", "order": "whd"
    }  # fmt: skip
    layer = LocalCorrelation(**options)
    torch.testing.assert_close(layer(fixed, moving), naive(fixed, moving, **options))
    assert layer.out_channels == 125
    assert not list(layer.parameters())


@pytest.mark.parametrize("slab_bytes", [1, 2 * 6 * 4 * 7 * 4])  # one plane; two planes, so the last slab is short
@pytest.mark.parametrize("metric", ["dot", "ssd", "sad"])
def test_slabs_equal_one_slab(metric: Any, slab_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for budget in (module._SLAB_BYTES, slab_bytes):
        monkeypatch.setattr(module, "_SLAB_BYTES", budget)
        fixed, moving = (m.requires_grad_() for m in maps())
        slabs = module._slabs(fixed)
        volume = local_correlation(fixed, moving, metric=metric)
        (volume**2).sum().backward()
        results.append((volume, fixed.grad, moving.grad, len(slabs)))
    assert results[0][3] == 1
    assert results[1][3] == (5 if slab_bytes == 1 else 3)
    for one, many in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("order", ["dhw", "whd"])
@pytest.mark.parametrize("metric", ["dot", "ssd", "sad"])
@pytest.mark.parametrize("shift", [(1, 2, 3), (-3, 0, 2)])
def test_integer_shift_is_found_in_its_channel(metric: Any, order: Any, shift: tuple[int, int, int]) -> None:
    fixed = F.normalize(maps(channels=32, shape=(10, 11, 12), batch=1)[0], dim=1)
    moving = fixed.roll(shift, (2, 3, 4))  # moving(p + shift) = fixed(p)
    volume = local_correlation(fixed, moving, radius=3, metric=metric, order=order)
    found = volume.argmax(1) if metric == "dot" else volume.argmin(1)
    inner = found[0, 3:-3, 3:-3, 3:-3]
    channel = correlation_offsets(3, order).index(shift)
    assert torch.equal(inner, torch.full_like(inner, channel))
    d, h, w = (s + 3 for s in shift)
    assert channel == (49 * d + 7 * h + w if order == "dhw" else 49 * w + 7 * h + d)
    if metric != "dot":
        assert float(volume[0, channel, 3:-3, 3:-3, 3:-3].abs().max()) == 0.0


@pytest.mark.parametrize("order", ["dhw", "whd"])
@pytest.mark.parametrize(("radius", "centre"), [(1, 13), (2, 62), (3, 171)])
def test_zero_offset_is_the_middle_channel(order: Any, radius: int, centre: int) -> None:
    fixed, _ = maps(batch=1)
    volume = local_correlation(fixed, fixed, radius=radius, metric="sad", order=order)
    assert torch.equal(volume[:, centre], torch.zeros(1, *SHAPE))
    assert float(volume[:, [n for n in range(volume.shape[1]) if n != centre]].mean((2, 3, 4)).min()) > 0.1
    assert correlation_offsets(radius, order)[centre] == (0, 0, 0)


def test_sad_at_ties_has_no_gradient() -> None:
    fixed = maps(batch=1)[0].requires_grad_()
    moving = fixed.detach().clone().requires_grad_()
    local_correlation(fixed, moving, metric="sad")[:, 13].sum().backward()
    assert fixed.grad is not None and moving.grad is not None
    assert not fixed.grad.any()
    assert not moving.grad.any()


@pytest.mark.parametrize("metric", ["dot", "ssd", "sad"])
def test_autograd_keeps_only_the_two_maps(metric: Any) -> None:
    fixed, moving = (m.requires_grad_() for m in maps(channels=16, shape=(8, 8, 8), batch=1))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        local_correlation(fixed, moving, radius=2, metric=metric)
    padded = 16 * 12**3
    assert sum(kept.values()) <= fixed.numel() + moving.numel() + padded
    assert sum(kept.values()) < 125 * 8**3  # less than the result itself; C K^3 V would be 16 times that


@pytest.mark.parametrize("metric", ["dot", "ssd", "sad"])
def test_no_tensor_is_larger_than_the_result(metric: Any) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.elements = max(self.elements, out.untyped_storage().nbytes() // 4)
            return out

    fixed, moving = (m.requires_grad_() for m in maps(channels=32, shape=(8, 8, 8), batch=1))
    with Largest() as largest:
        volume = local_correlation(fixed, moving, metric=metric)
        (volume**2).sum().backward()
    padded = 32 * 10**3
    assert largest.elements == max(27 * 8**3, padded)


def test_autocast_computes_in_float32() -> None:
    fixed, moving = maps(channels=64)
    expected = local_correlation(fixed, moving)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(local_correlation(fixed, moving), expected)
    assert local_correlation(fixed.bfloat16(), moving.bfloat16()).dtype == torch.float32


def test_half_precision_maps_get_gradients_of_their_type() -> None:
    fixed, moving = (m.half().requires_grad_() for m in maps())
    local_correlation(fixed, moving).sum().backward()
    assert fixed.grad is not None and moving.grad is not None
    assert fixed.grad.dtype == moving.grad.dtype == torch.float16
    assert torch.isfinite(fixed.grad).all() and fixed.grad.any() and moving.grad.any()


def test_radius_zero_compares_in_place() -> None:
    fixed, moving = maps()
    volume = local_correlation(fixed, moving, radius=0)
    torch.testing.assert_close(volume, (fixed * moving).mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"metric": "cosine"}, "metric.*'cosine'"), ({"normalization": "sqrt"}, "normalization.*'sqrt'")],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_correlation(*maps(), **options)


def test_unknown_padding_and_order_are_refused() -> None:
    for options in ({"padding": "reflect"}, {"order": "hwd"}):
        with pytest.raises(ValueError, match=next(iter(options.values()))):
            local_correlation(*maps(), **options)


def test_maps_of_two_shapes_are_refused() -> None:
    fixed, moving = maps()
    with pytest.raises(ValueError, match=r"\(2, 6, 5, 4, 7\).*\(2, 6, 5, 4, 6\)"):
        local_correlation(fixed, moving[..., :-1])
