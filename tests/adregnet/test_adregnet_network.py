"""AD-RegNet against its sizes, its equations and the contract of the bundles' networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adregnet_net import ADRegNet
from adregnet_net.backbone import SharedUNet
from adregnet_net.network import FieldFusion, LevelFeatures, _enlarge
from small_adregnet import count, lively, noise, small, smooth_pair
from torch import Tensor, nn

from common.losses import SequenceLoss

SHAPE = (16, 48, 32)
SIZES = [(32, 32, 32), (16, 32, 48)]
ABLATIONS: list[dict[str, Any]] = [
    {"windows": [None] * 5},
    {"regions": [None] * 5},
    {"windows": [None] * 5, "regions": [None] * 5},
    {"multi_resolution": False},
    {"multi_resolution": False, "windows": [None] * 5, "regions": [None] * 5},
    {"windows": [4, 4, 4, 4, 0], "regions": [None, 8, None, 1, 1]},
]


@pytest.fixture
def image() -> Tensor:
    return smooth_pair(SHAPE)


class TestSizes:
    def test_parameters(self) -> None:
        network = ADRegNet()
        assert count(network) == 9_405_426
        assert count(network.backbone) == 7_998_400
        assert network.stride == 16

    def test_heads_of_the_cross_attention(self) -> None:
        attentions = [level.cross_attention for level in ADRegNet().levels]
        assert attentions[0] is None  # at full resolution
        assert [(a.heads, a.window) for a in attentions[1:]] == [(2, 4), (4, 8), (8, None), (16, None)]

    def test_pyramid_halves_exactly(self) -> None:
        with torch.no_grad():
            pyramid = SharedUNet(channels=(2, 3, 4, 5, 6))(torch.zeros(2, 1, *SHAPE))
        assert [tuple(level.shape) for level in pyramid] == [
            (2, 2, 16, 48, 32), (2, 3, 8, 24, 16), (2, 4, 4, 12, 8), (2, 5, 2, 6, 4), (2, 6, 1, 3, 2)
        ]  # fmt: skip

    @pytest.mark.parametrize("levels", [2, 3])
    def test_other_numbers_of_levels(self, levels: int) -> None:
        network = lively(channels=[8] * levels, windows=[4] * levels, regions=[4] * levels)
        assert network.stride == 2 ** (levels - 1)
        with torch.no_grad():
            fields = network.forward_sequence(smooth_pair((8, 12, 16)))
        assert [tuple(field.shape) for field in fields] == [(1, 3, 8, 12, 16)] * levels

    @pytest.mark.parametrize(
        "options", [{"windows": (None, 4)}, {"regions": (8,) * 6}, {"channels": (8,), "windows": (4,), "regions": (4,)}]
    )
    def test_each_level_needs_its_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="levels has channels, a window and a region"):
            ADRegNet(**options)


class TestForward:
    def test_untrained_is_next_to_the_identity(self) -> None:
        torch.manual_seed(0)
        with torch.no_grad():
            fields = ADRegNet().forward_sequence(smooth_pair((16, 32, 16)))
        assert len(fields) == 5
        for field in fields:
            assert field.shape == (1, 3, 16, 32, 16) and field.dtype == torch.float32
            assert 0 < float(field.abs().max()) < 0.02

    @pytest.mark.parametrize("options", [{}, *ABLATIONS], ids=str)
    @pytest.mark.parametrize("shape", SIZES)
    def test_forward_is_the_last_of_the_sequence(self, options: dict[str, Any], shape: tuple[int, ...]) -> None:
        network, image = lively(**options), smooth_pair(shape)
        with torch.no_grad():
            fields = network.forward_sequence(image)
            last = network(image)
        assert len(fields) == (5 if options.get("multi_resolution", True) else 1)
        assert all(field.shape == (1, 3, *shape) for field in fields)
        torch.testing.assert_close(last, fields[-1], atol=1e-5, rtol=1e-5)
        assert 0.05 < float(last.abs().mean()) < 20

    def test_moving_is_channel_0(self, image: Tensor) -> None:
        """The levels' features are joined from the moving image's, the fixed one's and what they found."""
        network = lively(windows=[None] * 5)
        with torch.no_grad():
            for level in network.levels:
                level.join.weight[:, level.join.out_channels :] = 0
            field = network(image)
            other_fixed = network(torch.cat([image[:, :1], image[:, 1:] ** 2], 1))
            other_moving = network(torch.cat([image[:, :1] ** 2, image[:, 1:]], 1))
        torch.testing.assert_close(other_fixed, field, atol=1e-5, rtol=1e-5)
        assert (other_moving - field).abs().max() > 0.05

    def test_both_images_see_one_backbone(self, image: Tensor) -> None:
        network = lively()
        with torch.no_grad():
            moving, fixed = network._features(image)
            fixed_again, moving_again = network._features(image.flip(1))
        for first, second in ((moving, moving_again), (fixed, fixed_again)):
            for one, other in zip(first, second, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert (moving[0] - fixed[0]).abs().max() > 0.1

    def test_members_of_a_batch_do_not_meet(self) -> None:
        network = lively()
        pairs = torch.cat([smooth_pair((16, 32, 16), seed) for seed in (0, 1)])
        with torch.no_grad():
            together = network(pairs)
            alone = torch.cat([network(pair[None]) for pair in pairs])
        torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
        assert (together[0] - together[1]).abs().max() > 0.1

    @pytest.mark.parametrize("shape", [(32, 40, 32), (33, 32, 32), (32, 32, 8)])
    def test_sizes_off_the_stride_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="stride 16") as caught:
            small()(torch.zeros(1, 2, *shape))
        assert str(shape) in str(caught.value)

    def test_a_single_voxel_at_the_coarsest_level_is_refused(self) -> None:
        """Its normalisation would have nothing to compare with."""
        for network, side in ((small(), 16), (lively(channels=[4] * 3, windows=[4] * 3, regions=[4] * 3), 4)):
            with pytest.raises(ValueError, match=f"two voxels or more at its stride {side}, got .{side}, {side}"):
                network(torch.zeros(1, 2, side, side, side))
            network(torch.rand(1, 2, side, side, 2 * side))

    @pytest.mark.parametrize("shape", [(1, 1, 32, 32, 32), (1, 3, 32, 32, 32), (2, 32, 32, 32)])
    def test_other_inputs_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="B, 2, D, H, W"):
            small()(torch.zeros(shape))


def known_levels(network: ADRegNet, own: float) -> ADRegNet:
    """Level l has the displacement l along each axis, and takes it (or what comes from below) as `own` says."""
    with torch.no_grad():
        for level, head in enumerate(network.heads, start=1):
            head.weight.zero_()
            head.bias.fill_(float(level))
        for fusion in network.fusions:
            fusion.weight_map[-1].weight.zero_()
            fusion.weight_map[-1].bias.fill_(own)
    return network


class TestFusion:
    def test_is_a_convex_blend(self) -> None:
        torch.manual_seed(0)
        fusion = FieldFusion(channels=6)
        nn.init.normal_(fusion.weight_map[-1].weight)
        features, own, below = noise(2, 6, 9, 8, 10), noise(2, 3, 9, 8, 10, seed=1), noise(2, 3, 9, 8, 10, seed=2)
        with torch.no_grad():
            blend = fusion(features, own, below)
            share = (blend - below) / (own - below)
        assert (blend <= torch.maximum(own, below) + 1e-5).all()
        assert (blend >= torch.minimum(own, below) - 1e-5).all()
        clear = (own - below).abs().amin(dim=1) > 0.1
        spread = (share.amax(1) - share.amin(1))[clear]
        assert spread.max() < 1e-4  # one weight a voxel, for all three components
        assert share[:, 0][clear].std() > 0.05  # decided anew at each

    @pytest.mark.parametrize(("bias", "expected"), [(-100.0, "below"), (100.0, "own"), (0.0, "mean")])
    def test_weight_is_that_of_the_levels_own(self, bias: float, expected: str) -> None:
        fusion = FieldFusion(channels=4)
        with torch.no_grad():
            fusion.weight_map[-1].weight.zero_()
            fusion.weight_map[-1].bias.fill_(bias)
            own, below = noise(1, 3, 4, 5, 6), noise(1, 3, 4, 5, 6, seed=1)
            blend = fusion(noise(1, 4, 4, 5, 6), own, below)
        torch.testing.assert_close(blend, {"own": own, "below": below, "mean": (own + below) / 2}[expected])

    def test_takes_its_decision_from_features_and_field(self) -> None:
        torch.manual_seed(0)
        fusion = FieldFusion(channels=4)
        zero, one = torch.zeros(1, 3, 8, 8, 8), torch.ones(1, 3, 8, 8, 8)
        with torch.no_grad():
            weights = [
                fusion(features, one + below, below) - below
                for features, below in (
                    (noise(1, 4, 8, 8, 8), zero),
                    (noise(1, 4, 8, 8, 8, seed=1), zero),
                    (noise(1, 4, 8, 8, 8), 3 * one),
                )
            ]
        assert (weights[0] - weights[1]).abs().max() > 0.01
        assert (weights[0] - weights[2]).abs().max() > 0.01

    @pytest.mark.parametrize("own", [-100.0, 100.0])
    def test_coarse_displacements_are_in_voxels_of_the_image(self, own: float) -> None:
        """From below alone, the coarsest level's 5 voxels stay 80 of the image; taken anew, level l's are l 2^(l-1)."""
        with torch.no_grad():
            fields = known_levels(small(), own).forward_sequence(smooth_pair((16, 32, 16)))
        expected = [80.0] * 5 if own < 0 else [80.0, 32.0, 12.0, 4.0, 1.0]
        for field, value in zip(fields, expected, strict=True):
            torch.testing.assert_close(field, torch.full_like(field, value))

    @pytest.mark.parametrize("factor", [1, 2, 4, 16])
    def test_enlarging_keeps_positions(self, factor: int) -> None:
        """A field that is linear in space is the same one at every resolution: voxels are cubes, not points."""
        slope = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.25, 0.4], [-0.1, 0.2, 0.15]])

        def linear(shape: tuple[int, ...], size: int) -> Tensor:
            """In voxels of edge `size`."""
            axes = [(torch.arange(float(n)) + 0.5) * size for n in shape]
            place = torch.stack(torch.meshgrid(*axes, indexing="ij"))
            return torch.einsum("ij,j...->i...", slope, place)[None] / size

        coarse, shape = (4, 5, 3), tuple(n * factor for n in (4, 5, 3))
        inner = (..., *(slice(factor // 2, n - factor // 2) for n in shape))  # beyond them, the border is repeated
        enlarged = _enlarge(linear(coarse, factor), factor)
        torch.testing.assert_close(enlarged[inner], linear(shape, 1)[inner], atol=1e-4, rtol=1e-4)


class TestLevel:
    @pytest.mark.parametrize("window", [None, 0, 4])
    @pytest.mark.parametrize("region", [None, 2])
    def test_joins_what_there_is(self, window: int | None, region: int | None) -> None:
        level = LevelFeatures(channels=32, window=window, region=region)
        found = 0 if window is None else 32 + 3 * 2
        assert level.join.in_channels == 64 + found
        assert (level.cross_attention is None) is (window is None)
        assert (level.regional_attention is None) is (region is None)
        if level.cross_attention is not None:
            assert level.cross_attention.window == (window or None)
        assert level(noise(1, 32, 4, 5, 8), noise(1, 32, 4, 5, 8, seed=1)).shape == (1, 32, 4, 5, 8)

    def test_displacement_reaches_the_join(self) -> None:
        """A level that reads the displacements alone knows a shift."""
        torch.manual_seed(0)
        level = LevelFeatures(channels=16, window=0, region=None).requires_grad_(False)
        level.join.weight.zero_()
        level.join.bias.zero_()
        for axis in range(3):
            level.join.weight[axis, 3 * 16 + axis] = 1.0
        nn.init.constant_(level.cross_attention.locality, -7.0)
        for name in ("query_moving", "key_moving", "query_fixed", "key_fixed"):
            nn.init.dirac_(level.cross_attention.projections[name].weight)
        fixed = 40 * F.normalize(noise(1, 16, 8, 8, 8), dim=1)
        shifted = level(fixed.roll((2, -1, 1), (2, 3, 4)), fixed)[:, :3, 2:-2, 2:-2, 2:-2]
        torch.testing.assert_close(shifted.mean((0, 2, 3, 4)), torch.tensor([2.0, -1.0, 1.0]), atol=0.05, rtol=0)


def loss_of(network: ADRegNet, image: Tensor) -> Tensor:
    fields = network.forward_sequence(image)
    assert all(field.dtype == torch.float32 for field in fields)
    return SequenceLoss(lambda field: (field - 1).square().mean())(fields)


class TestGradients:
    @pytest.mark.parametrize("shape", SIZES)
    @pytest.mark.parametrize("autocast", [False, True])
    def test_are_finite(self, shape: tuple[int, ...], autocast: bool) -> None:
        """Levels shorter than the kernels are no place for oneDNN's bfloat16 gradients."""
        network = lively(channels=(8, 16, 32, 32, 64)) if autocast else lively()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(network, smooth_pair(shape))
        loss.backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name

    def test_levels_shorter_than_the_kernels_are_computed_in_float32(self) -> None:
        """The others are not; what the bug does there is a matter of luck, and the test above has it now and then."""
        network = lively()
        seen: dict[tuple[bool, torch.dtype], int] = {}

        def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            kind = min(inputs[0].shape[2:]) < 8, output.dtype
            seen[kind] = seen.get(kind, 0) + 1

        for module in network.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                module.register_forward_hook(note)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            network(smooth_pair((16, 32, 32)))
        assert set(seen) == {(True, torch.float32), (False, torch.bfloat16)}
        assert min(seen.values()) > 10

    @pytest.mark.parametrize("options", [{}, *ABLATIONS], ids=str)
    def test_reach_every_parameter(self, options: dict[str, Any]) -> None:
        network = lively(**options)
        loss_of(network, smooth_pair((16, 32, 32))).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            # a bias before a normalisation, or before a softmax, has none but rounding
            without = name.startswith("backbone") or name.endswith("score.bias")
            # and a single region has nobody to compare itself with
            without = without or (
                ".regional_attention." in name and name.startswith("levels.4") and "value" not in name
            )
            assert parameter.grad.any() or without, name
        backbone = [p for p in network.backbone.parameters() if p.ndim == 5]
        assert all(p.grad is not None and p.grad.any() for p in backbone)

    def test_half_precision_answers_alike(self) -> None:
        network, image = lively(), smooth_pair((16, 32, 32))
        with torch.no_grad():
            expected = network(image)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = network(image)
        error = (result - expected).norm() / expected.norm()
        assert 0 < float(error) < 0.1

    def test_checkpointing_changes_nothing(self) -> None:
        image = smooth_pair((16, 16, 16))
        options = {"channels": (8, 8, 8), "windows": (None, 4, 0), "regions": (4, 2, None)}
        kept, results = [], []
        for network in (lively(**options), lively(**options, checkpointing=True)):
            sizes: list[int] = []

            def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = loss_of(network, image)
            loss.backward()
            kept.append(sum(sizes))
            results.append([loss.detach(), *(p.grad for p in network.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        assert kept[1] < 0.7 * kept[0]

    def test_a_step_of_training_brings_the_loss_down(self) -> None:
        network, image = lively(), smooth_pair((16, 16, 32))
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            loss = loss_of(network, image)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[2] < losses[1] < losses[0]
