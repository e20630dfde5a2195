"""Where half precision is used, and where not."""

from __future__ import annotations

import pytest
import torch

from common.precision import bfloat16_region, float32_below


def product_type(*volumes: torch.Tensor) -> torch.dtype:
    """What a matrix product of the volumes' values computes in, here and now."""
    return (volumes[0].reshape(1, -1) @ volumes[-1].reshape(-1, 1)).dtype


class TestBfloat16Region:
    @pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_computes_in_it_where_enabled(self, enabled: bool, dtype: torch.dtype) -> None:
        volume = torch.rand(1, 1, 2, 3, 4)
        with bfloat16_region(volume, enabled):
            assert product_type(volume) == dtype
        assert product_type(volume) == torch.float32


class TestFloat32Below:
    @pytest.mark.parametrize("shape", [(7, 9, 12), (12, 7, 9), (9, 12, 7), (1, 1, 1)])
    def test_a_short_side_is_enough(self, shape: tuple[int, ...]) -> None:
        first, second = (torch.rand(1, 2, *shape).bfloat16() for _ in range(2))
        with bfloat16_region(first):
            precision, volumes = float32_below(8, first, second)
            assert [volume.dtype for volume in volumes] == [torch.float32] * 2
            assert torch.equal(volumes[1], second.float())
            with precision:
                assert product_type(*volumes) == torch.float32
            assert product_type(*volumes) == torch.bfloat16  # and only there

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("enabled", [True, False])
    def test_nothing_happens_to_others(self, dtype: torch.dtype, enabled: bool) -> None:
        volumes = tuple(torch.rand(1, 2, 8, 9, 10).to(dtype) for _ in range(2))
        with bfloat16_region(volumes[0], enabled):
            before = product_type(*volumes)
            precision, same = float32_below(8, *volumes)
            assert all(one is other for one, other in zip(same, volumes, strict=True))
            with precision:
                assert product_type(*volumes) == before

    def test_gradients_pass(self) -> None:
        volume = torch.rand(1, 1, 2, 2, 2).bfloat16().requires_grad_()
        precision, (exact,) = float32_below(8, volume)
        with precision:
            exact.square().sum().backward()
        assert volume.grad is not None and volume.grad.dtype == torch.bfloat16
        torch.testing.assert_close(volume.grad, 2 * volume.detach())
