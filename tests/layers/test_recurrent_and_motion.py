"""Recurrent cells and motion layers against their equations, and against the parameter counts of the papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers.motion import FlowHead, MotionEncoder
from common.layers.recurrent import ConvGRU, SepConvGRU


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def state(channels: int, seed: int, shape: tuple[int, ...] = (5, 6, 7)) -> Tensor:
    return torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(seed))


def gru_pass(cell: ConvGRU, h: Tensor, x: Tensor, *, tied: bool = False) -> Tensor:
    def conv(layer: nn.Module, joint: Tensor) -> Tensor:
        weight = layer.weight
        return F.conv3d(joint, weight, layer.bias, padding=[k // 2 for k in weight.shape[2:]])

    z = torch.sigmoid(conv(cell.update_gate, torch.cat([h, x], 1)))
    r = z if tied else torch.sigmoid(conv(cell.reset_gate, torch.cat([h, x], 1)))
    q = torch.tanh(conv(cell.candidate, torch.cat([r * h, x], 1)))
    return (1 - z) * h + z * q


def scaled(cell: nn.Module, factor: float = 4.0) -> nn.Module:
    """Larger weights, so that the gates leave the middle of their range."""
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(factor)
    return cell


class TestConvGRU:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("kernel", [3, (1, 3, 5)])
    def test_equations(self, tied: bool, kernel: int | tuple[int, ...]) -> None:
        torch.manual_seed(0)
        cell = ConvGRU(hidden_channels=4, input_channels=3, kernel_size=kernel, tied_gates=tied)
        scaled(cell)
        h, x = state(4, 1), state(3, 2)
        torch.testing.assert_close(cell(h, x), gru_pass(cell, h, x, tied=tied))

    def test_published_size(self) -> None:
        """RWCNet: hidden 64, input 32."""
        assert count(ConvGRU(hidden_channels=64, input_channels=32)) == 497_856
        assert count(ConvGRU(hidden_channels=64, input_channels=32, tied_gates=True)) == 497_856 - 165_952

    def test_tied_gates_reset_by_the_update_gate(self) -> None:
        torch.manual_seed(0)
        cell = ConvGRU(hidden_channels=2, input_channels=1, tied_gates=True)
        assert cell.update_gate.bias is not None
        with torch.no_grad():
            cell.update_gate.bias.fill_(-50.0)  # no update, no memory either
        h = state(2, 1)
        torch.testing.assert_close(cell(h, state(1, 2)), h)

    def test_gates_at_their_ends(self) -> None:
        torch.manual_seed(0)
        cell = ConvGRU(hidden_channels=2, input_channels=1)
        assert cell.update_gate.bias is not None and cell.reset_gate is not None and cell.reset_gate.bias is not None
        h, x = state(2, 1), state(1, 2)
        with torch.no_grad():
            cell.update_gate.bias.fill_(50.0)
            cell.reset_gate.bias.fill_(-50.0)
        forgotten = torch.tanh(cell.candidate(torch.cat([torch.zeros_like(h), x], 1)))
        torch.testing.assert_close(cell(h, x), forgotten)


class TestSepConvGRU:
    def test_passes_along_w_then_h_then_d(self) -> None:
        torch.manual_seed(0)
        cell = SepConvGRU(hidden_channels=4, input_channels=3)
        scaled(cell)
        by_shape = {tuple(gru.candidate.weight.shape[2:]): gru for gru in cell.passes}
        h, x = state(4, 1), state(3, 2)
        expected = h
        for kernel in ((1, 1, 5), (1, 5, 1), (5, 1, 1)):
            expected = gru_pass(by_shape[kernel], expected, x)
        torch.testing.assert_close(cell(h, x), expected)

    def test_published_size(self) -> None:
        assert count(SepConvGRU(hidden_channels=16, input_channels=48)) == 46_224

    def test_reaches_four_voxels_along_each_axis(self) -> None:
        torch.manual_seed(0)
        cell = SepConvGRU(hidden_channels=3, input_channels=2)
        h, x = state(3, 1, (9, 9, 9)), state(2, 2, (9, 9, 9))
        changed = x.clone()
        changed[:, :, 4, 4, 4] += 1
        touched = ((cell(h, changed) - cell(h, x)).abs().amax((0, 1)) > 1e-9).nonzero()
        assert (touched - 4).abs().amax(0).tolist() == [4, 4, 4]  # two by the gates, two more by the reset state


class TestMotionEncoder:
    def encoder(self) -> MotionEncoder:
        torch.manual_seed(0)
        return MotionEncoder(
            correlation_channels=27,
            correlation_widths=(16, 32),
            flow_widths=(16, 32),
            out_channels=32,
            negative_slope=0.01,
        )

    def test_published_size(self) -> None:
        assert count(self.encoder()) == 94_781

    def test_published_size_of_rwcnet(self) -> None:
        sizes = [
            count(MotionEncoder(correlation_channels=k, correlation_widths=(8, 8), flow_widths=(4, 8), out_channels=16))
            for k in (343, 125)
        ]
        assert sizes == [15_109, 13_365]

    def test_equations(self) -> None:
        encoder = self.encoder()
        correlation, ddf = state(27, 1), 3 * state(3, 2)
        p = dict(encoder.named_parameters())

        def act(value: Tensor) -> Tensor:
            return F.leaky_relu(value, 0.01)

        c = act(F.conv3d(correlation, p["correlation.0.weight"], p["correlation.0.bias"]))
        c = act(F.conv3d(c, p["correlation.2.weight"], p["correlation.2.bias"], padding=1))
        f = act(F.conv3d(ddf, p["flow.0.weight"], p["flow.0.bias"], padding=3))
        f = act(F.conv3d(f, p["flow.2.weight"], p["flow.2.bias"], padding=1))
        joint = act(F.conv3d(torch.cat([c, f], 1), p["fuse.0.weight"], p["fuse.0.bias"], padding=1))
        result = encoder(correlation, ddf)
        torch.testing.assert_close(result, torch.cat([joint, ddf], 1), atol=1e-5, rtol=1e-5)
        assert torch.equal(result[:, -3:], ddf)  # the displacement itself, unchanged

    def test_slope_zero_is_relu(self) -> None:
        torch.manual_seed(0)
        encoder = MotionEncoder(correlation_channels=3, correlation_widths=(4, 4), flow_widths=(4, 4), out_channels=8)
        features = encoder(state(3, 1), state(3, 2))[:, :-3]
        assert float(features.detach().min()) == 0.0
        assert float(features.detach().max()) > 0


class TestFlowHead:
    def test_published_sizes(self) -> None:
        assert count(FlowHead(in_channels=16, hidden_channels=16, negative_slope=0.2)) == 8_227
        assert count(FlowHead(in_channels=64, hidden_channels=128, negative_slope=0.01, init_std=None)) == 231_683

    def test_starts_near_the_identity(self) -> None:
        torch.manual_seed(0)
        head = FlowHead(in_channels=16, hidden_channels=16, negative_slope=0.2)
        assert float(head.flow.weight.detach().std()) == pytest.approx(1e-5, rel=0.1)
        assert head.flow.bias is not None and not head.flow.bias.any()
        assert 0 < float(head(state(16, 1)).detach().abs().max()) < 1e-3
        published = FlowHead(in_channels=16, hidden_channels=16, negative_slope=0.2, init_std=None)
        assert float(published(state(16, 1)).detach().abs().max()) > 0.05

    def test_equation(self) -> None:
        torch.manual_seed(0)
        head = FlowHead(in_channels=4, hidden_channels=6, negative_slope=0.2, init_std=0.5)
        h = state(4, 1)
        middle = F.leaky_relu(F.conv3d(h, head.hidden.weight, head.hidden.bias, padding=1), 0.2)
        torch.testing.assert_close(head(h), F.conv3d(middle, head.flow.weight, head.flow.bias, padding=1))
