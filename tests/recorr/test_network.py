"""The ReCorr network against its published sizes and its contract, and what the bundle's weights can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorr_net import ReCorr
from recorr_net.network import FinalFlow
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import common.layers.correlation
from common.geometry.fields import jacobian_determinant
from common.inference import SequenceInferer
from common.layers.correlation import correlation_offsets
from common.losses import SequenceLoss

WEIGHTS = Path(__file__).resolve().parents[2] / "bundles" / "recorr" / "models" / "model.pt"
SHAPE = (32, 48, 32)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def untrained(seed: int = 0, **options: Any) -> ReCorr:
    torch.manual_seed(seed)
    return ReCorr(**options).eval()


def lively(head_std: float = 0.05, **options: Any) -> ReCorr:
    """Random flow heads whose updates are of the order of a voxel."""
    network = untrained(**options)
    for block in network.update_blocks:
        nn.init.normal_(block.flow_head.flow.weight, std=head_std)
    return network


def smooth_noise(shape: tuple[int, ...], scale: int, seed: int) -> Tensor:
    """(1, 1, D, H, W) in [0, 1]"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *(n // scale + 1 for n in shape), generator=generator)
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)


@pytest.fixture
def image() -> Tensor:
    return torch.cat([smooth_noise(SHAPE, 5, 0), smooth_noise(SHAPE, 5, 1)], 1)


class TestPublishedSizes:
    def test_parameters(self) -> None:
        network = ReCorr()
        assert count(network) == 716_342
        assert count(network.encoder) == 116_576
        assert [count(block) for block in network.update_blocks] == [149_232] * 4
        for block in network.update_blocks:
            assert [count(part) for part in (block.motion_encoder, block.gru, block.flow_head)] == [
                94_781,
                46_224,
                8_227,
            ]
        assert count(network.final_flow) == 2_838

    @pytest.mark.parametrize(("shape", "gmac"), [((192, 192, 192), 394.58), ((160, 192, 224), 383.62)])
    def test_convolutions(self, shape: tuple[int, int, int], gmac: float, monkeypatch: pytest.MonkeyPatch) -> None:
        # in one slab: tensors without data have no cache to stay in
        monkeypatch.setattr(common.layers.correlation, "_SLAB_BYTES", 2**60)
        with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            ReCorr().eval()(torch.empty(1, 2, *shape))
        by_operation = counter.get_flop_counts()["Global"]
        assert {str(operation) for operation in by_operation} == {"aten.convolution"}
        assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.01)

    def test_correlation(self) -> None:
        correlation = ReCorr().correlation
        assert correlation.out_channels == 27
        offsets = correlation_offsets(correlation.radius, correlation.order)
        assert offsets[13] == (0, 0, 0)
        # n = 9 (o_W + 1) + 3 (o_H + 1) + (o_D + 1)
        assert all(offsets[9 * (w + 1) + 3 * (h + 1) + d + 1] == (d, h, w) for d, h, w in offsets)
        fixed, moving = (torch.randn(1, 32, 4, 5, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
        torch.testing.assert_close(correlation(fixed, moving)[:, 13], (fixed * moving).mean(1))  # mean, not sqrt

    def test_encoder_halves_exactly(self) -> None:
        pyramid = ReCorr().eval().encoder(torch.zeros(1, 1, *SHAPE))
        assert [tuple(level.shape[1:]) for level in pyramid] == [
            (16, 32, 48, 32), (32, 16, 24, 16), (32, 8, 12, 8), (32, 4, 6, 4), (32, 2, 3, 2)
        ]  # fmt: skip


class TestForward:
    def test_untrained(self, image: Tensor) -> None:
        with torch.no_grad():
            sequence = untrained().forward_sequence(image)
        assert len(sequence) == 11
        assert all(field.shape == (1, 3, *SHAPE) and field.dtype == torch.float32 for field in sequence)
        assert max(float(field.abs().max()) for field in sequence[:10]) < 1.5e-3
        assert all(field.any() for field in sequence[:10])
        # PyTorch's default initialisation of the last convolution, as published
        assert 0.02 < float(sequence[10].std()) < 1.0

    @pytest.mark.parametrize("iterations", [(3, 3, 2, 2), (1, 2, 1, 3), (2, 1, 1, 0)])
    def test_forward_is_the_last_of_the_sequence(self, image: Tensor, iterations: tuple[int, ...]) -> None:
        network = lively(iterations=iterations)
        with torch.no_grad():
            sequence = network.forward_sequence(image)
            assert torch.equal(network(image), sequence[-1])
        assert len(sequence) == sum(iterations) + 1

    def test_identity_of_the_last_convolution_passes_the_field(self, image: Tensor) -> None:
        with torch.no_grad():
            sequence = lively(final_init="identity").forward_sequence(image)
        assert float(sequence[9].abs().max()) > 1
        torch.testing.assert_close(sequence[10], sequence[9], atol=1e-5, rtol=0)

    def test_last_convolution_sees_unwarped_maps_and_the_field(self, image: Tensor) -> None:
        """It replaces the field; the order is fixed, moving, field."""
        network = lively(final_init="identity")
        assert torch.equal(network.final_flow.conv.weight[:, 32:].sum((0, 2, 3, 4)), torch.ones(3))
        with torch.no_grad():
            network.final_flow.conv.weight.zero_()
            network.final_flow.conv.weight[0, 16, 1, 1, 1] = 1.0  # the first channel of the moving map
            scaled = 2 * image[:, :1] - 1
            expected = network.encoder.blocks[0](scaled)[:, 0]
            torch.testing.assert_close(network(image)[:, 0], expected)

    def test_moving_is_channel_0_and_the_field_lives_on_the_fixed_grid(self, image: Tensor) -> None:
        """Hidden state and texture come from the fixed image alone: it decides the update where nothing correlates."""
        network = lively()
        network.correlation.forward = lambda fixed, moving: torch.zeros_like(fixed[:, :1]).expand(-1, 27, -1, -1, -1)  # type: ignore[method-assign]
        with torch.no_grad():
            fields = network.forward_sequence(image)[9]
            other_moving = network.forward_sequence(torch.cat([image[:, :1] ** 2, image[:, 1:]], 1))[9]
            other_fixed = network.forward_sequence(torch.cat([image[:, :1], image[:, 1:] ** 2], 1))[9]
        assert torch.equal(other_moving, fields)
        assert not torch.allclose(other_fixed, fields)

    @pytest.mark.parametrize("shape", [(32, 40, 32), (33, 32, 32), (32, 32, 8)])
    def test_sizes_off_the_stride_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="stride 16") as caught:
            untrained()(torch.zeros(1, 2, *shape))
        assert str(shape) in str(caught.value)

    @pytest.mark.parametrize("shape", [(1, 1, 32, 32, 32), (1, 3, 32, 32, 32), (2, 32, 32, 32)])
    def test_other_inputs_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="B, 2, D, H, W"):
            untrained()(torch.zeros(shape))

    @pytest.mark.parametrize("options", [{"iterations": (3, 3, 2)}, {"iterations": (3, -1, 2, 2)}])
    def test_impossible_iterations_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="four numbers"):
            ReCorr(**options)

    def test_unknown_initialisation_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"default or identity.*'zero'"):
            FinalFlow(init="zero")  # type: ignore[arg-type]

    def test_members_of_a_batch_do_not_meet(self) -> None:
        network = lively()
        pairs = torch.cat([torch.cat([smooth_noise(SHAPE, 5, s), smooth_noise(SHAPE, 7, s + 9)], 1) for s in (0, 1)])
        with torch.no_grad():
            together = network(pairs)
            alone = torch.cat([network(pair[None]) for pair in pairs])
        torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
        assert (together[0] - together[1]).abs().max() > 0.1

    def test_diffeomorphic_mode(self, image: Tensor) -> None:
        plain, diffeomorphic = (lively(0.5, final_init="identity", diffeomorphic=flag) for flag in (False, True))
        diffeomorphic.load_state_dict(plain.state_dict())  # one format of weights
        with torch.no_grad():
            fields = [network(image) for network in (plain, diffeomorphic)]
        folds = [int((jacobian_determinant(field) <= 0).sum()) for field in fields]
        assert folds[0] > 0
        assert folds[1] == 0
        assert float(fields[1].abs().max()) > 1.0


class TestGradients:
    @pytest.mark.parametrize("autocast", [False, True])
    def test_reach_every_parameter_and_are_finite(self, image: Tensor, autocast: bool) -> None:
        network = lively(0.01, iterations=(2, 1, 1, 1)).train()
        image = image[..., :16, :16]
        # oneDNN's bfloat16 gradient of a (5, 1, 1) kernel reads memory it never wrote (torch 2.13): NaN now and then
        with torch.backends.mkldnn.flags(enabled=not autocast):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                sequence = network.forward_sequence(image)
                loss = SequenceLoss(lambda field: (field - 1).square().mean())(sequence)
            loss.backward()
        assert all(field.dtype == torch.float32 for field in sequence)
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            # a bias before batch normalisation has none but rounding
            assert parameter.grad.any() or name.endswith(".0.bias"), name

    def test_a_step_of_training_in_bfloat16(self) -> None:
        """With oneDNN: levels shorter than the kernels are computed in float32, the others are not."""
        network = lively(0.01, iterations=(1, 1, 1, 1)).train()
        seen: set[tuple[bool, torch.dtype]] = set()

        def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen.add((min(inputs[0].shape[2:]) < 7, output.dtype))

        for block in network.update_blocks:
            block.motion_encoder.correlation[0].register_forward_hook(note)
        image = torch.cat([smooth_noise((32, 32, 32), 5, seed) for seed in (0, 1)], 1)
        sequence = SequenceInferer(bfloat16=True)(image, network)
        SequenceLoss(lambda field: (field - 1).square().mean())(sequence).backward()
        assert seen == {(True, torch.float32), (False, torch.bfloat16)}
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        optimizer.step()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert torch.isfinite(parameter).all(), name
        assert all(field.dtype == torch.float32 for field in sequence)

    def test_each_step_answers_for_itself(self, image: Tensor) -> None:
        """The field is detached between steps: the last estimate of a level gives the level before no gradient."""
        network = lively()
        sequence = network.forward_sequence(image)
        sequence[5].sum().backward()  # the last of 1/8
        assert network.update_blocks[0].flow_head.flow.weight.grad is None
        assert network.update_blocks[1].flow_head.flow.weight.grad is not None


class TestWeights:
    @pytest.fixture(scope="class")
    def network(self) -> ReCorr:
        network = ReCorr()
        network.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True), strict=True)
        return network.eval()

    @pytest.mark.parametrize(("shift", "seed"), [((2.0, -3.0, 1.0), 0), ((-1.0, 2.0, 4.0), 1)])
    def test_recover_a_shift(self, network: ReCorr, shift: tuple[float, ...], seed: int) -> None:
        pair = shifted_pair(shift, seed)
        exact = torch.tensor(shift).view(1, 3, 1, 1, 1)
        with torch.no_grad():
            forward = network(pair)
            backward = network(pair.flip(1))
        inner = (slice(None), slice(None), *(slice(8, -8),) * 3)
        error = (forward - exact)[inner].norm(dim=1).mean()
        assert float(error) < 0.6 * float(exact.norm())
        # the images swapped, the field turns round
        error = (backward + exact)[inner].norm(dim=1).mean()
        assert float(error) < 0.6 * float(exact.norm())

    def test_leave_equal_images_alone(self, network: ReCorr) -> None:
        image = smooth_noise((48, 48, 48), 5, 2)
        with torch.no_grad():
            field = network(torch.cat([image, image], 1))
        assert float(field.norm(dim=1).mean()) < 1.0


def shifted_pair(shift: tuple[float, ...], seed: int, size: int = 48, margin: int = 8) -> Tensor:
    """Blobs cut out of a larger volume at two places: fixed(p) = moving(p + shift), whole voxels, no border."""
    full = smooth_noise((size + 2 * margin,) * 3, 5, seed)
    full = (full - full.amin()) / (full.amax() - full.amin())

    def cut(offset: tuple[float, ...]) -> Tensor:
        where = (slice(margin + int(o), margin + int(o) + size) for o in offset)
        return full[(..., *where)]

    # fixed(p) = full(p + shift), moving(p) = full(p)
    return torch.cat([cut((0, 0, 0)), cut(shift)], 1)
