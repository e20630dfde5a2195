"""Attention with positions against explicit softmaxes, forward and backward; memory by what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.layers.attention import positional_attention

SHAPE = (5, 4, 7)
HEADS = 2


def maps(
    channels: int = 8, shape: tuple[int, ...] = SHAPE, batch: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, channels, *shape, generator=generator) for _ in range(3))  # type: ignore[return-value]


def locality(heads: int = HEADS) -> Tensor:
    """Different for each head, of the order of the features' similarities at a few voxels' distance."""
    return torch.tensor([0.3, 0.02, 0.0, 1.5])[:heads]


def sharp(shape: tuple[int, ...], channels: int = 16) -> Tensor:
    """Features that match themselves and nothing else."""
    generator = torch.Generator().manual_seed(0)
    return 40 * F.normalize(torch.randn(1, channels, *shape, generator=generator), dim=1)


def naive(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, locality: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: one matrix of weights over all pairs of voxels for each head."""
    shape = query.shape[2:]
    position = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1).reshape(-1, 3)
    offset = (position[None] - position[:, None]).to(query.dtype)  # (p, q, 3): q - p
    cube = position // (window or max(shape))
    seen = (cube[None] == cube[:, None]).all(-1)  # (p, q)
    values, offsets = [], []
    parts = (x.flatten(2).chunk(heads, 1) for x in (query, key, value))
    for head, (q, k, v) in enumerate(zip(*parts, strict=True)):
        logits = torch.einsum("bcp,bcq->bpq", q, k) / q.shape[1] ** 0.5 - locality[head] * offset.square().sum(-1)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        values.append(torch.einsum("bpq,bcq->bcp", weights, v))
        offsets.append(torch.einsum("bpq,pqi->bip", weights, offset))
    return tuple(torch.cat(x, 1).unflatten(2, shape) for x in (values, offsets))  # type: ignore[return-value]


class TestDefinition:
    @pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 7, 9])
    @pytest.mark.parametrize(("shape", "heads", "batch"), [(SHAPE, 2, 2), ((3, 6, 4), 1, 1), ((1, 5, 3), 4, 3)])
    def test_against_explicit_softmaxes(
        self, shape: tuple[int, ...], heads: int, batch: int, window: int | None
    ) -> None:
        """Most windows reach beyond the volume along one axis or all."""
        inputs = maps(shape=shape, batch=batch)
        options: dict[str, Any] = {"heads": heads, "locality": locality(heads), "window": window}
        values, offsets = positional_attention(*inputs, **options)
        assert offsets.shape == (batch, 3 * heads, *shape)
        expected = naive(*inputs, **options)
        torch.testing.assert_close(values, expected[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(offsets, expected[1], atol=5e-5, rtol=1e-5)

    @pytest.mark.parametrize("window", [None, 2, 4])
    def test_gradients_against_explicit_softmaxes(self, window: int | None) -> None:
        weights = [torch.randn(2, n, *SHAPE, generator=torch.Generator().manual_seed(n)) for n in (8, 3 * HEADS)]
        gradients = []
        for function in (positional_attention, naive):
            inputs = [x.requires_grad_() for x in (*maps(), locality())]
            *features, near = inputs
            found = function(*features, heads=HEADS, locality=near, window=window)
            sum((x * weight).sum() for x, weight in zip(found, weights, strict=True)).backward()
            gradients.append([x.grad for x in inputs])
        for ours, expected in zip(*gradients, strict=True):
            assert ours is not None and expected is not None
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("shape", [SHAPE, (4, 4, 4)])
    def test_a_window_around_everything_is_no_window(self, shape: tuple[int, ...]) -> None:
        options: dict[str, Any] = {"heads": HEADS, "locality": locality()}
        whole = positional_attention(*maps(shape=shape), **options)
        for window in (max(shape), max(shape) + 5):
            for ours, expected in zip(
                positional_attention(*maps(shape=shape), window=window, **options), whole, strict=True
            ):
                torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)

    def test_large_features_stay_finite(self) -> None:
        """Logits of some hundred thousand."""
        inputs = [(300 * x).requires_grad_() for x in maps()]
        values, offsets = positional_attention(*inputs, heads=HEADS, locality=locality(), window=3)
        (values.sum() + offsets.sum()).backward()
        for x in (values, offsets, *(x.grad for x in inputs)):
            assert x is not None and torch.isfinite(x).all()

    def test_nothing_is_seen_beyond_the_volume(self) -> None:
        """However unlike all voxels of the volume are; the zeros that fill a window up are alike to a degree."""
        query, _, _ = maps(shape=(4, 4, 3), batch=1)
        ones = torch.ones_like(query)
        values, offsets = positional_attention(
            200 * ones, -200 * ones, ones, heads=1, locality=torch.tensor([0.0]), window=4
        )
        torch.testing.assert_close(values, ones)
        middle = torch.tensor([1.5, 1.5, 1.0]).view(1, 3, 1, 1, 1)
        axes = torch.meshgrid(*(torch.arange(float(n)) for n in (4, 4, 3)), indexing="ij")
        torch.testing.assert_close(offsets, middle - torch.stack(axes)[None], atol=1e-3, rtol=0)


class TestMatches:
    @pytest.mark.parametrize("shift", [(2, -1, 0), (0, 3, -2), (-3, 0, 1)])
    def test_the_position_follows_shifted_keys(self, shift: tuple[int, int, int]) -> None:
        """key(p + shift) = query(p): found there, whatever the values say."""
        query = sharp((8, 9, 10))
        key = query.roll(shift, (2, 3, 4))
        value = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
        values, offsets = positional_attention(query, key, value, heads=1, locality=torch.tensor([1e-3]))
        inner = (..., slice(3, -3), slice(3, -3), slice(3, -3))
        expected = torch.tensor(shift).view(1, 3, 1, 1, 1).expand_as(offsets).float()
        torch.testing.assert_close(offsets[inner], expected[inner], atol=1e-2, rtol=0)
        back = value.roll([-s for s in shift], (2, 3, 4))
        torch.testing.assert_close(values[inner], back[inner], atol=1e-2, rtol=0)

    def test_of_equal_matches_the_near_one_is_taken(self) -> None:
        """Features that repeat every three voxels: without locality the copies' mean, with it the one at hand."""
        query = sharp((3, 3, 3)).repeat(1, 1, 3, 3, 3)
        middle = (0, slice(None), 4, 4, 4)
        corner = (0, slice(None), 0, 0, 0)
        for strength, expected in ((0.0, 3.0), (5.0, 0.0)):
            _, offsets = positional_attention(query, query, query, heads=1, locality=torch.tensor([strength]))
            torch.testing.assert_close(offsets[corner], torch.full((3,), expected), atol=1e-2, rtol=0)
            torch.testing.assert_close(offsets[middle], torch.zeros(3), atol=1e-2, rtol=0)

    def test_windows_do_not_see_each_other(self) -> None:
        changed = list(maps(shape=(8, 4, 4), batch=1))
        before = positional_attention(*changed, heads=HEADS, locality=locality(), window=4)
        changed[1] = torch.cat([changed[1][:, :, :4], changed[1][:, :, 4:].flip(1)], 2)
        after = positional_attention(*changed, heads=HEADS, locality=locality(), window=4)
        for first, second in zip(before, after, strict=True):
            assert torch.equal(first[:, :, :4], second[:, :, :4])
            assert (first[:, :, 4:] - second[:, :, 4:]).abs().max() > 0.1


class TestPrecision:
    def test_autocast_computes_in_float32(self) -> None:
        options: dict[str, Any] = {"heads": HEADS, "locality": locality(), "window": 4}
        expected = positional_attention(*maps(), **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for ours, exact in zip(positional_attention(*maps(), **options), expected, strict=True):
                assert torch.equal(ours, exact)

    def test_bfloat16_features_give_positions_of_float32(self) -> None:
        options: dict[str, Any] = {"heads": HEADS, "locality": locality(), "window": 4}
        rounded = [x.bfloat16() for x in maps()]
        values, offsets = positional_attention(*rounded, **options)
        expected = positional_attention(*(x.float() for x in rounded), **options)
        assert (values.dtype, offsets.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(values.float(), expected[0], atol=0.02, rtol=0.01)
        assert torch.equal(offsets, expected[1])

    def test_float64_is_computed_in_float32(self) -> None:
        exact = [x.double() for x in maps()]
        values, _ = positional_attention(*exact, heads=HEADS, locality=locality().double())
        assert values.dtype == torch.float64
        expected, _ = naive(*exact, heads=HEADS, locality=locality().double())
        torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("window", [None, 5])
    def test_autograd_keeps_no_matrix_of_weights(self, window: int | None) -> None:
        shape = (10, 10, 10)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        inputs = [x.requires_grad_() for x in maps(shape=shape, batch=1)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            positional_attention(*inputs, heads=HEADS, locality=locality(), window=window)
        assert max(kept.values()) == HEADS * 1000 * 8  # 4 channels a head and 4 of the position


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(2, 8, 5, 4, 6)}, r"one shape.*\(2, 8, 5, 4, 6\)"),
        ({"value": torch.zeros(2, 4, 5, 4, 7)}, r"one shape.*\(2, 4, 5, 4, 7\)"),
        ({"query": torch.zeros(8, 5, 4, 7)}, r"one shape.*\(8, 5, 4, 7\)"),
        ({"heads": 3, "locality": locality(3)}, "8 channels.*3 heads"),
        ({"heads": 0, "locality": locality(0)}, "8 channels.*0 heads"),
        ({"locality": locality(4)}, r"locality \(4,\).*2 heads"),
        ({"window": 0}, "at least one voxel a side, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    query, key, value = maps()
    options: dict[str, Any] = {"query": query, "key": key, "value": value, "heads": HEADS, "locality": locality()}
    with pytest.raises(ValueError, match=message):
        positional_attention(**{**options, **changes})
