"""RWCNet and its sub-network against the published sizes, the paper's equations and its contract."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rwcnet_net import RWCNet
from rwcnet_net.network import StageState
from rwcnet_net.subnetwork import FeatureEncoder, SubNetwork
from small_rwcnet import Stub, count, cut, enliven, lively, noise, positions, small, smooth_noise, whole
from torch import Tensor, nn

from common.geometry.fields import compose, jacobian_determinant
from common.layers.correlation import correlation_offsets
from common.layers.warp import warp

SHAPE = (16, 24, 16)
VARIANTS = ["paper", "published"]


@pytest.fixture
def image() -> Tensor:
    """(1, 2, 16, 24, 16): smooth moving and fixed image."""
    return torch.cat([smooth_noise(1, SHAPE, 4, seed) for seed in (0, 1)], 1)


def subnetwork(variant: str = "paper", *, radius: int = 1, **options: Any) -> SubNetwork:
    torch.manual_seed(0)
    options = {"hidden_channels": 8, "dropout": 0.0, **options}
    return enliven(SubNetwork(radius=radius, variant=variant, **options)).eval()  # type: ignore[arg-type]


class Known(nn.Module):
    """In an encoder's place: features that were decided before."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> Tensor:
        return self.features


class KnownUpdates(nn.Module):
    """In the update block's place: known increments, and a record of what it was given."""

    def __init__(self, *increments: Tensor) -> None:
        super().__init__()
        self.increments = increments
        self.given: list[dict[str, Tensor]] = []

    def forward(self, hidden: Tensor, correlation: Tensor, flow: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
        self.given.append({"hidden": hidden, "correlation": correlation, "flow": flow, "moving": moving})
        return hidden + 1, self.increments[len(self.given) - 1]


def standard(features: Tensor) -> Tensor:
    """Each channel at mean 0 and variance 1, as the paper's variant makes them."""
    flat = features.flatten(2)
    return ((flat - flat.mean(2, keepdim=True)) / flat.std(2, keepdim=True, correction=0)).view_as(features)


def matched(network: SubNetwork, fixed: Tensor, moving: Tensor) -> Tensor:
    """The correlation volume of known features."""
    network.feature_encoder = Known(torch.cat([fixed, moving]))  # type: ignore[assignment]
    network.update_block = KnownUpdates(torch.zeros(1, 3, *fixed.shape[2:]))  # type: ignore[assignment]
    empty = torch.zeros(1, 1, *fixed.shape[2:])
    network(empty, empty, steps=1)
    return network.update_block.given[0]["correlation"]


class TestPublishedSizes:
    @pytest.mark.parametrize(
        ("variant", "radius", "parameters", "update_block"),
        [
            ("published", 3, 2_932_400, 578_696),
            ("published", 2, 2_930_656, 576_952),
            ("paper", 3, 3_098_352, 744_648),
            ("paper", 2, 3_096_608, 742_904),
        ],
    )
    def test_parameters(self, variant: Any, radius: int, parameters: int, update_block: int) -> None:
        network = SubNetwork(radius=radius, variant=variant)
        assert count(network) == parameters
        assert count(network.feature_encoder) == 1_176_312
        assert count(network.context_encoder) == 1_177_392
        assert count(network.update_block) == update_block
        # The public code makes 3,098,844 and 3,097,100: with a reset gate and an upsampling that it never uses.
        if variant == "published":
            assert parameters + 165_952 + 492 == {3: 3_098_844, 2: 3_097_100}[radius]

    def test_whole_network(self) -> None:
        network = RWCNet()
        assert count(network) == 9_293_312
        assert network.stride == 4
        assert network.steps == (12, 12, 4)

    @pytest.mark.parametrize(("radius", "channels", "centre"), [(3, 343, 171), (2, 125, 62)])
    def test_correlation_channels(self, radius: int, channels: int, centre: int) -> None:
        for variant in VARIANTS:
            network = subnetwork(variant, radius=radius)
            assert network.correlation is not None
            assert network.correlation.out_channels == channels
            offsets = correlation_offsets(radius, network.correlation.order)
            assert offsets[centre] == (0, 0, 0)
            k = 2 * radius + 1  # W is the slowest
            assert offsets == [(n % k - radius, n // k % k - radius, n // k**2 - radius) for n in range(channels)]

    def test_published_patches(self) -> None:
        network = RWCNet(variant="published", overlap=0)
        for full, stages in (
            ((160, 224, 192), [((40, 56, 48), 1, (40, 56, 48)), ((80, 112, 96), 8, (40, 56, 48))]),
            ((224, 192, 224), [((56, 48, 56), 1, (56, 48, 56)), ((112, 96, 112), 8, (56, 48, 56))]),
        ):
            for stage, (shape, tiles, size) in enumerate([*stages, (full, 8, tuple(n // 2 for n in full))]):
                assert tuple(n // network.scales[stage] for n in full) == shape
                grid = network.patch_grid(stage, shape)
                assert (len(grid.boxes), grid.size) == (tiles, size)


class TestMatching:
    @pytest.mark.parametrize(("radius", "centre"), [(3, 171), (2, 62)])
    def test_identical_features_differ_by_nothing_in_the_middle_channel(self, radius: int, centre: int) -> None:
        """Published: also after the 3^3 mean, and nowhere else."""
        features = noise(1, 16, 8, 9, 7)
        volume = matched(subnetwork("published", radius=radius), features, features)
        assert volume[:, centre].abs().max() == 0
        others = [n for n in range(volume.shape[1]) if n != centre]
        assert float(volume[:, others].min()) > 0

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("offset", [(2, -1, 0), (0, 3, -2), (-3, 0, 1)])
    def test_a_shift_shows_in_its_channel(self, variant: str, offset: tuple[int, int, int]) -> None:
        """fixed(p) = moving(p + offset): a dip of the difference, a peak of the product."""
        full = torch.randn(1, 16, 20, 20, 20, generator=torch.Generator().manual_seed(0))

        def at(shift: tuple[int, int, int]) -> Tensor:
            return full[(..., *(slice(4 + o, 14 + o) for o in shift))]

        volume = matched(subnetwork(variant, radius=3), at(offset), at((0, 0, 0)))
        inner = volume[..., 4:-4, 4:-4, 4:-4]  # zeros come in from beyond the border
        means = inner.mean(dim=(0, 2, 3, 4))
        d, h, w = offset
        channel = 49 * (w + 3) + 7 * (h + 3) + d + 3
        others = torch.cat([means[:channel], means[channel + 1 :]])
        if variant == "published":
            assert float(means[channel]) == 0.0
            assert float(others.min()) > 10
        else:
            assert float(means[channel]) > 3.5  # 16 / sqrt(16) on average
            assert float(others.abs().max()) < 1.5

    def test_published_matching_is_the_mean_of_absolute_differences(self) -> None:
        fixed, moving = noise(1, 16, 6, 7, 5), noise(1, 16, 6, 7, 5, seed=1)
        volume = matched(subnetwork("published", radius=2), fixed, moving)
        shifted = F.pad(moving, (2,) * 6)[..., 3:9, 0:7, 4:9]  # D + 1, H - 2, W + 2
        cost = F.pad((fixed - shifted).abs().sum(1), (1,) * 6)[0]
        expected = sum(cost[i : i + 6, j : j + 7, k : k + 5] for i in range(3) for j in range(3) for k in range(3)) / 27
        torch.testing.assert_close(volume[0, 25 * 4 + 5 * 0 + 3], expected)

    def test_paper_matching_is_equation_7(self) -> None:
        fixed, moving = noise(1, 16, 6, 7, 5), noise(1, 16, 6, 7, 5, seed=1)
        volume = matched(subnetwork("paper", radius=2), fixed, moving)
        expected = (standard(fixed) * standard(moving)).sum(1) / 4
        torch.testing.assert_close(volume[:, 62], expected, atol=1e-3, rtol=0)

    def test_paper_matching_knows_no_common_offset(self) -> None:
        """A dot product of plain features is largest where they are, not where they match."""
        features = noise(1, 16, 8, 8, 8) + 10 * torch.arange(16.0).view(1, 16, 1, 1, 1)
        volume = matched(subnetwork("paper", radius=1), features, features)
        inner = volume[..., 1:-1, 1:-1, 1:-1]
        assert float((inner.argmax(1) == 13).float().mean()) > 0.95
        torch.testing.assert_close(volume, matched(subnetwork("paper", radius=1), 5 - features, 5 - features))

    def test_without_correlation_the_features_take_its_place(self) -> None:
        fixed, moving = noise(1, 16, 6, 7, 5), noise(1, 16, 6, 7, 5, seed=1)
        network = subnetwork("published", correlation=False)
        assert network.update_block.motion_encoder.correlation[0].in_channels == 32
        assert torch.equal(matched(network, fixed, moving), torch.cat([fixed, moving], 1))


class TestGradients:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_of_the_volume(self, variant: str, image: Tensor) -> None:
        """Cut off as published; in the paper's variant the encoder learns from the matches alone, if need be."""

        class OnlyMatches(nn.Module):
            def forward(self, hidden: Tensor, volume: Tensor, flow: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
                self.volume = volume
                return hidden, volume[:, :3]

        network = subnetwork(variant)
        network.update_block = OnlyMatches()  # type: ignore[assignment]
        sequence, _ = network(image[:, 1:], image[:, :1], steps=1)
        assert network.update_block.volume.requires_grad is (variant == "paper")
        if variant == "paper":
            sequence[-1].square().sum().backward()
            for name, parameter in network.feature_encoder.named_parameters():
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.any(), name
        else:
            assert not sequence[-1].requires_grad

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_reach_every_parameter_and_are_finite(self, variant: str, image: Tensor) -> None:
        network = subnetwork(variant).train()
        sequence, hidden = network(image[:, 1:], image[:, :1], steps=2)
        (sum((field - 1).square().mean() for field in sequence) + hidden.square().mean()).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name


class TestRecurrence:
    INCREMENTS = ((1.0, 0.0, -0.5), (0.3, 0.7, 0.0), (-0.4, 0.25, 1.5))

    @pytest.fixture
    def increments(self) -> list[Tensor]:
        """Constants on top of smooth fields: adding the steps is neither composing them nor warping in turn."""
        smooth = [smooth_noise(3, SHAPE, 6, seed) - 0.5 for seed in range(3)]
        return [field + torch.tensor(c).view(1, 3, 1, 1, 1) for field, c in zip(smooth, self.INCREMENTS, strict=True)]

    def run(self, variant: str, increments: list[Tensor], **options: Any) -> tuple[Tensor, KnownUpdates, list[Tensor]]:
        network = subnetwork(variant, **options)
        features = standard(smooth_noise(32, SHAPE, 3, 9).view(2, 16, *SHAPE))  # fixed, moving
        network.feature_encoder = Known(features)  # type: ignore[assignment]
        network.update_block = updates = KnownUpdates(*increments)  # type: ignore[assignment]
        empty = torch.zeros(1, 1, *SHAPE)
        sequence, _ = network(empty, empty, steps=len(increments))
        return features[1:], updates, sequence

    def test_published_warps_again_and_again(self, increments: list[Tensor]) -> None:
        features, updates, _ = self.run("published", increments)
        expected = features
        flow = torch.zeros_like(increments[0])
        for given, increment in zip(updates.given, increments, strict=True):
            torch.testing.assert_close(given["moving"], expected)
            torch.testing.assert_close(given["flow"], flow)
            expected = warp(expected, increment, padding_mode="zeros")
            flow = increment

    def test_paper_warps_once(self, increments: list[Tensor]) -> None:
        features, updates, _ = self.run("paper", increments)
        running = torch.zeros_like(increments[0])
        for given, increment in zip(updates.given, increments, strict=True):
            expected = warp(features, running, padding_mode="zeros")
            torch.testing.assert_close(given["moving"], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(given["flow"], running)
            running = running + increment

    def test_the_variants_differ_from_the_third_step_on(self, increments: list[Tensor]) -> None:
        """So the two tests above can tell them apart."""
        given = [self.run(variant, increments)[1].given for variant in VARIANTS]
        torch.testing.assert_close(given[0][1]["moving"], given[1][1]["moving"], atol=1e-4, rtol=0)
        assert (given[0][2]["moving"] - given[1][2]["moving"]).abs().max() > 0.1
        assert (given[0][2]["flow"] - given[1][2]["flow"]).abs().max() > 0.5

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_matches_the_warped_features(self, variant: str, increments: list[Tensor]) -> None:
        _, updates, _ = self.run(variant, increments)
        network = subnetwork(variant)
        features = standard(smooth_noise(32, SHAPE, 3, 9).view(2, 16, *SHAPE))
        for given in updates.given:
            assert network.correlation is not None
            expected = network.correlation(features[:1], given["moving"])
            if variant == "published":
                expected = F.avg_pool3d(expected, 3, stride=1, padding=1)
            torch.testing.assert_close(given["correlation"], expected, atol=1e-3, rtol=0)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_displacement_is_the_sum(self, variant: str, increments: list[Tensor]) -> None:
        _, _, sequence = self.run(variant, increments)
        assert len(sequence) == 3
        for n, field in enumerate(sequence):
            torch.testing.assert_close(field, sum(increments[: n + 1]))
        exact = compose(compose(increments[0], increments[1]), increments[2])
        assert (sequence[-1] - exact).abs().max() > 0.1

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("detach", [False, True])
    def test_steps_may_answer_for_themselves(self, variant: str, detach: bool, increments: list[Tensor]) -> None:
        for increment in increments:
            increment.requires_grad_()
        _, _, sequence = self.run(variant, increments, detach=detach)
        sequence[-1].sum().backward()
        for increment in increments[:-1]:
            assert (increment.grad is None) is detach
        last = increments[-1].grad
        assert last is not None and torch.equal(last, torch.ones_like(last))
        plain = self.run(variant, [increment.detach() for increment in increments])[2]
        assert all(torch.equal(a, b) for a, b in zip(sequence, plain, strict=True))

    def test_hidden_state_is_added_to_the_context(self, image: Tensor) -> None:
        hidden = torch.randn(1, 8, *SHAPE, generator=torch.Generator().manual_seed(0))
        states = []
        for prior in (None, hidden):
            network = subnetwork()
            network.update_block = updates = KnownUpdates(*[torch.zeros(1, 3, *SHAPE)] * 2)  # type: ignore[assignment]
            _, last = network(image[:, 1:], image[:, :1], steps=2, hidden=prior)
            states.append(updates.given[0]["hidden"])
            torch.testing.assert_close(updates.given[1]["hidden"], states[-1] + 1)  # handed from step to step
            torch.testing.assert_close(last, states[-1] + 2)
        assert states[0].abs().max() <= 1
        assert states[0].std() > 0.01
        torch.testing.assert_close(states[1], states[0] + hidden)

    def test_the_context_is_of_the_moving_image(self, image: Tensor) -> None:
        def context(fixed: Tensor, moving: Tensor) -> Tensor:
            network = subnetwork()
            network.update_block = updates = KnownUpdates(torch.zeros(1, 3, *SHAPE))  # type: ignore[assignment]
            network(fixed, moving, steps=1)
            return updates.given[0]["hidden"]

        moving, fixed = image[:, :1], image[:, 1:]
        assert torch.equal(context(fixed**2, moving), context(fixed, moving))
        assert not torch.allclose(context(fixed, moving**2), context(fixed, moving), atol=1e-3)

    def test_gates(self) -> None:
        published, paper = (subnetwork(variant) for variant in VARIANTS[::-1])
        assert published.update_block.gru.reset_gate is None
        assert not any("reset" in name for name in published.state_dict())
        assert any("reset_gate" in name for name in paper.state_dict())

    def test_starts_next_to_the_identity(self, image: Tensor) -> None:
        """The paper's variant; the published one starts from PyTorch's default."""
        with torch.no_grad():
            largest = [
                float(small(variant=variant, patches=(1, 1, 1)).eval()(image).abs().max()) for variant in VARIANTS
            ]
        assert 0 < largest[0] < 5e-3
        assert largest[1] > 0.05


class TestOptions:
    def test_diffeomorphic(self) -> None:
        """The public code has the switch, too, but drops the result."""
        increments = [8 * (smooth_noise(3, SHAPE, 6, seed) - 0.5) for seed in (0, 1)]
        sequences = {flag: TestRecurrence().run("paper", increments, diffeomorphic=flag)[2] for flag in (False, True)}
        for plain, exponential in zip(sequences[False], sequences[True], strict=True):
            assert int((jacobian_determinant(plain) <= 0).sum()) > 0
            assert int((jacobian_determinant(exponential) <= 0).sum()) == 0
            assert float(exponential.abs().max()) > 2
        # one format of weights
        small(diffeomorphic=True).load_state_dict(small().state_dict(), strict=True)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_mind_features_know_no_contrast(self, variant: str, image: Tensor) -> None:
        intensity, mind = (subnetwork(variant, features=features) for features in ("intensity", "mind"))
        assert mind.feature_encoder.network.in_channels == 12
        assert mind.context_encoder.network.in_channels == 15
        moving, fixed = image[:, :1], image[:, 1:]
        with torch.no_grad():
            for network, invariant in ((mind, True), (intensity, False)):
                first = network(fixed, moving, steps=2)[0][-1]
                second = network(1 - 0.5 * fixed, 0.3 + 0.6 * moving, steps=2)[0][-1]
                assert float(first.std()) > 0.05
                difference = float((first - second).abs().max())
                assert difference < 2e-3 if invariant else difference > 0.05

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("shape", [(5, 9, 13), (16, 8, 20), (3, 4, 1)])
    def test_features_have_the_size_of_the_image(self, variant: str, shape: tuple[int, int, int]) -> None:
        network = subnetwork(variant)
        with torch.no_grad():
            assert network.feature_encoder(noise(2, 1, *shape)).shape == (2, 16, *shape)
            assert network.context_encoder(noise(2, 4, *shape)).shape == (2, 8, *shape)

    def test_multiples_of_8_are_not_padded(self) -> None:
        encoder = FeatureEncoder(in_channels=1, out_channels=16, dropout=0.0).eval()
        image = noise(1, 1, 16, 8, 24)
        with torch.no_grad():
            assert torch.equal(encoder(image), encoder.network(image))
            odd = encoder(image[..., :21])  # filled up at the end: the first voxels stay where they are
            # the border's content changes statistics and all, but not the place of what is far from it
            assert F.cosine_similarity(odd[..., :12].flatten(), encoder(image)[..., :12].flatten(), dim=0) > 0.9

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"variant": "public"}, "paper or published, not 'public'"),
            ({"features": "edges"}, "intensity or mind, not 'edges'"),
            ({"scales": (4, 2)}, "each stage has a scale"),
            ({"radii": (1, 1)}, "each stage has a scale"),
            ({"patches": (1, 2, 2, 2)}, "each stage has a scale"),
            ({"scales": (), "steps": (), "radii": (), "patches": ()}, "each stage has a scale"),
            ({"scales": (1, 2, 4)}, r"from coarse to fine, got \[1, 2, 4\]"),
            ({"scales": (4, 4, 1)}, "from coarse to fine"),
            ({"scales": (4, 3, 1)}, "from coarse to fine"),
            ({"steps": (1, 0, 1)}, r"positive, got \[4, 2, 1\] and \[1, 0, 1\]"),
            ({"scales": (2, 1, 0)}, "positive"),
        ],
    )
    def test_impossible_options_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small(**options)


@pytest.mark.usefixtures("shallow_encoders")
class TestForward:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_is_the_last_of_the_sequence(self, variant: Any, image: Tensor) -> None:
        network = lively(variant=variant)
        with torch.no_grad():
            sequence = network.forward_sequence(image)
            assert torch.equal(network(image), sequence[-1])
        assert [tuple(field.shape) for field in sequence] == [(1, 3, *SHAPE)] * 3
        assert all(field.dtype == torch.float32 and torch.isfinite(field).all() for field in sequence)
        assert all(float((a - b).abs().max()) > 0.05 for a, b in pairwise(sequence))

    def test_sizes_that_no_patch_divides(self) -> None:
        network = lively(overlap=4)
        with torch.no_grad():
            field = network(noise(1, 2, 36, 52, 36))
        assert field.shape == (1, 3, 36, 52, 36)
        assert torch.isfinite(field).all()

    @pytest.mark.parametrize("shape", [(18, 16, 16), (16, 16, 21), (2, 16, 16)])
    def test_sizes_off_the_stride_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="stride 4") as caught:
            small()(torch.zeros(1, 2, *shape))
        assert str(shape) in str(caught.value)

    @pytest.mark.parametrize("shape", [(1, 1, 16, 16, 16), (1, 3, 16, 16, 16), (2, 16, 16, 16)])
    def test_other_inputs_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="B, 2, D, H, W"):
            small()(torch.zeros(shape))

    def test_an_estimate_needs_a_stage(self, image: Tensor) -> None:
        with pytest.raises(ValueError, match="at least one stage"):
            small().estimate(image, 0)

    def test_members_of_a_batch_do_not_meet(self) -> None:
        network = lively(patches=(1, 1, 1))
        pairs = torch.cat([smooth_noise(2, SHAPE, 4, seed) for seed in (0, 1)])
        with torch.no_grad():
            together = network(pairs)
            alone = torch.cat([network(pair[None]) for pair in pairs])
        torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
        assert (together[0] - together[1]).abs().max() > 0.1

    def test_moving_is_channel_0(self, image: Tensor) -> None:
        network = small()
        stub = Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]))
        network(image)
        last = stub.of_stage(2)[0]
        torch.testing.assert_close(last.moving, cut(image[:, :1], last.box), atol=1e-6, rtol=0)
        torch.testing.assert_close(last.fixed, cut(image[:, 1:], last.box), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("shallow_encoders")
class TestWeights:
    def test_the_number_of_steps_is_free(self, image: Tensor) -> None:
        few = lively(patches=(1, 1, 1))
        many = small(steps=(3, 2, 4), patches=(1, 1, 1)).eval()
        many.load_state_dict(few.state_dict(), strict=True)
        with torch.no_grad():
            assert not torch.allclose(many(image), few(image), atol=1e-2)

    def test_number_of_trained_stages_travels_along(self, image: Tensor) -> None:
        source = lively(patches=(1, 1, 1))
        for trained in (1, 2, 3):
            source.train_stage(trained - 1)
            target = small(seed=5, patches=(1, 1, 1)).eval()
            assert target.stages_in_use == 3
            target.load_state_dict(source.state_dict(), strict=True)
            assert target.stages_in_use == trained
            with torch.no_grad():
                state = target.estimate(image, trained)
                assert len(target.forward_sequence(image)) == trained
                scale = (4, 2, 1)[trained - 1]
                assert state.ddf.shape[2:] == tuple(n // scale for n in SHAPE)
                upsampled = F.interpolate(state.ddf, size=SHAPE, mode="trilinear") * scale
                torch.testing.assert_close(target(image), upsampled)

    def test_weights_of_fewer_stages(self, image: Tensor) -> None:
        """Fill the first stages, and no other runs; weights that lack what they claim to have are refused."""
        source = lively(scales=(1,), steps=(1,), radii=(1,), patches=(1,))
        source.train_stage(0)
        target = small(seed=5, patches=(1, 1, 1)).eval()
        untouched = {name: value.clone() for name, value in target.stages[1].state_dict().items()}
        target.load_state_dict(source.state_dict())
        assert target.stages_in_use == 1
        for name, value in source.stages[0].state_dict().items():
            assert torch.equal(value, target.stages[0].state_dict()[name])
        assert all(torch.equal(value, target.stages[1].state_dict()[name]) for name, value in untouched.items())
        with pytest.raises(RuntimeError, match=r"Missing key.*stages\.1"):
            target.load_state_dict({**source.state_dict(), "trained_stages": torch.tensor(2)})

    def test_training_a_stage_again_forgets_no_other(self) -> None:
        network = small()
        assert (network.stages_in_use, network.stage_in_training) == (3, None)  # none has any training: all
        for stage, in_use in ((0, 1), (1, 2), (0, 2), (2, 3), (1, 3)):
            network.train_stage(stage)
            assert (network.stages_in_use, network.stage_in_training) == (in_use, stage)

    def test_a_stage_copied(self, image: Tensor) -> None:
        """A narrower window takes the weights of the offsets that it has."""
        network = small(radii=(2, 2, 1))
        network.copy_stage(0, 1)
        network.copy_stage(1, 2)
        first, second, third = (stage.state_dict() for stage in network.stages)
        name = "update_block.motion_encoder.correlation.0.weight"
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        assert all(torch.equal(value, third[key]) for key, value in first.items() if key != name)
        wide, narrow = (correlation_offsets(radius, "whd") for radius in (2, 1))
        for channel, offset in enumerate(narrow):
            assert torch.equal(third[name][:, channel], first[name][:, wide.index(offset)])
        with torch.no_grad():  # copied, not shared
            next(network.stages[0].parameters()).add_(1)
        assert not torch.equal(next(network.stages[0].parameters()), next(network.stages[1].parameters()))
        with pytest.raises(ValueError, match=r"3\^3 voxels do not fill one of 5\^3"):
            network.copy_stage(2, 0)

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_only_one_stage_is_trained(self, stage: int) -> None:
        network = small(dropout=0.5).train()
        network.train_stage((stage + 1) % 3)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        network.train_stage(stage)
        for index, subnetwork in enumerate(network.stages):
            assert all(parameter.requires_grad is (index == stage) for parameter in subnetwork.parameters())
            # Adam moves what has a gradient, be it 0
            assert all((parameter.grad is not None) is (index == stage) for parameter in subnetwork.parameters())

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_dropout_is_for_the_stage_in_training(self, stage: int, image: Tensor) -> None:
        network = lively(dropout=0.5)
        network.train_stage(stage)

        def twice_the_same(index: int) -> bool:
            shape = (8, 8, 8)
            results = []
            with torch.no_grad():
                for _ in range(2):
                    sequence, _ = network.stages[index](cut_to(shape, image), cut_to(shape, image**2), steps=1)
                    results.append(sequence[-1])
            return torch.equal(*results)

        assert all(twice_the_same(index) for index in range(3))  # as it is for use
        network.train()
        assert [twice_the_same(index) for index in range(3)] == [index != stage for index in range(3)]
        network.eval()
        assert all(twice_the_same(index) for index in range(3))
        network.train()
        assert not twice_the_same(stage)

    def test_no_dropout(self, image: Tensor) -> None:
        network = lively(dropout=0.0, patches=(1, 1, 1)).train()
        with torch.no_grad():
            assert torch.equal(network(image), network(image))


def cut_to(shape: tuple[int, ...], image: Tensor) -> Tensor:
    return image[(slice(None), slice(0, 1), *(slice(0, n) for n in shape))]


class Affine:
    """A field that is an affine function of the place: what trilinear interpolation and averaging keep exactly."""

    def __init__(self, seed: int, scale: float = 0.06) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.matrix = scale * (2 * torch.rand(3, 3, generator=generator) - 1)
        self.shift = 2 * torch.rand(3, generator=generator) - 1

    def __call__(self, points: Tensor) -> Tensor:
        """(1, 3, D, H, W) -> the same."""
        return torch.einsum("xc,bcijk->bxijk", self.matrix, points) + self.shift.view(1, 3, 1, 1, 1)


def at_next_stage(field: Any, ratio: int = 2) -> Any:
    """The same field as a function of the voxels of a finer stage: centres, not corners, lie over one another."""
    return lambda points: ratio * field((points - (ratio - 1) / 2) / ratio)


def composed(prior: Any, own: Any) -> Any:
    return lambda points: own(points) + prior(points + own(points))


class TestComposition:
    """Stand-ins for the sub-networks return known fields; what the network makes of them can be worked out."""

    @pytest.mark.parametrize("overlap", [0, 4])
    @pytest.mark.parametrize("stages", [2, 3])
    def test_fields_are_composed_exactly(self, stages: int, overlap: int) -> None:
        shape = (32, 40, 36)
        own = [Affine(seed) for seed in range(3)]
        network = small(patches=(1, 2, (2, 3, 1)), overlap=overlap)
        network.train_stage(stages - 1)
        Stub(network, lambda patch: cut(own[patch.stage](positions(patch_shape(patch))), patch.box))

        def patch_shape(patch: Any) -> list[int]:
            return [n // network.scales[patch.stage] for n in shape]

        expected = composed(at_next_stage(own[0]), own[1])
        expected = composed(at_next_stage(expected), own[2]) if stages == 3 else at_next_stage(expected)
        inner = (..., *(slice(10, -10),) * 3)  # beyond the border the field is repeated
        exact = expected(positions(shape))
        torch.testing.assert_close(network(noise(1, 2, *shape))[inner], exact[inner], atol=2e-4, rtol=0)
        # the test tells composing from adding, and from composing in the other order
        summed = at_next_stage(at_next_stage(own[0]))(positions(shape)) + at_next_stage(own[1])(positions(shape))
        summed = summed + own[2](positions(shape)) if stages == 3 else summed
        assert (summed - exact)[inner].abs().max() > 0.03

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_displacements_grow_with_the_resolution(self, variant: Any) -> None:
        shifts = [torch.tensor(v).view(1, 3, 1, 1, 1) for v in ((1.0, 0.0, -0.5), (0.0, 2.0, 0.25), (0.125, 1.0, 3.0))]
        network = small(variant=variant)
        Stub(network, lambda patch: shifts[patch.stage].expand(1, 3, *patch.fixed.shape[2:]))
        expected = [4 * shifts[0], 4 * shifts[0] + 2 * shifts[1], 4 * shifts[0] + 2 * shifts[1] + shifts[2]]
        for field, exact in zip(network.forward_sequence(noise(1, 2, *SHAPE)), expected, strict=True):
            torch.testing.assert_close(field, exact.expand_as(field), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("overlap", [0, 2])
    def test_the_moving_image_is_warped_as_a_whole_and_then_cut(self, variant: Any, overlap: int) -> None:
        shape, shift = (16, 16, 24), (1.0, -1.0, 2.0)
        image = noise(1, 2, *shape)
        network = small(variant=variant, scales=(2, 1), steps=(1, 1), radii=(1, 1), patches=(1, 2), overlap=overlap)
        constant = torch.tensor(shift).view(1, 3, 1, 1, 1)
        stub = Stub(network, lambda patch: constant.expand(1, 3, *patch.fixed.shape[2:]) * (patch.stage == 0))
        network(image)
        moving, fixed = image[:, :1], image[:, 1:]
        expected = torch.zeros_like(moving)  # moving(p + (2, -2, 4)), and nothing beyond the border
        expected[..., :-2, 2:, :-4] = moving[..., 2:, :-2, 4:]
        patches = stub.of_stage(1)
        assert len(patches) == 8
        for patch in patches:
            torch.testing.assert_close(patch.moving, cut(expected, patch.box), atol=1e-5, rtol=0)
            assert torch.equal(patch.fixed, cut(fixed, patch.box))
        # what lies two voxels beyond a patch's end has come in
        first = patches[0]
        size = first.box[0].stop
        torch.testing.assert_close(
            first.moving[..., size - 1, 2:, :4], moving[..., size + 1, : first.moving.shape[3] - 2, 4:8]
        )

    def test_what_a_stage_sees_is_averaged_or_picked(self) -> None:
        image = noise(1, 2, *SHAPE)
        for variant, expected in (("paper", F.avg_pool3d(image, 4)), ("published", image[..., ::4, ::4, ::4])):
            network = small(variant=variant)
            stub = Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]))
            network(image)
            seen = stub.of_stage(0)[0]
            assert torch.equal(torch.cat([seen.moving, seen.fixed], 1), expected)
            assert seen.hidden is None and seen.prior is None

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("overlap", [0, 3])
    @pytest.mark.parametrize(
        ("scales", "patches"), [((2, 1), ((2, 1, 2), 3)), ((4, 1), (1, (2, 3, 2))), ((4, 2, 1), (1, 2, (4, 2, 1)))]
    )
    def test_hidden_states_are_those_of_the_whole(
        self, scales: tuple[int, ...], patches: Any, overlap: int, variant: Any
    ) -> None:
        """Upsampled within the patch alone, yet equal to the upsampled whole, cut."""
        shape, stages = (24, 16, 32), len(scales)
        network = small(
            variant=variant, scales=scales, steps=(1,) * stages, radii=(1,) * stages, patches=patches, overlap=overlap
        )
        hiddens = [noise(1, 8, *(n // scale for n in shape), seed=s) for s, scale in enumerate(scales)]
        stub = Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]), whole(hiddens))
        network(noise(1, 2, *shape))
        mode = "nearest" if variant == "published" else "trilinear"
        for stage in range(1, stages):
            expected = F.interpolate(hiddens[stage - 1], size=hiddens[stage].shape[2:], mode=mode)
            for patch in stub.of_stage(stage):
                assert patch.hidden is not None
                torch.testing.assert_close(patch.hidden, cut(expected, patch.box), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("overlap", [0, 2, 8])
    def test_no_seams_in_a_smooth_field(self, overlap: int) -> None:
        """Made patch by patch from where the patch lies, in two stages, it is the field of the whole."""
        shape = (24, 28, 32)
        fields = [4 * (smooth_noise(3, [n // s for n in shape], 12, s) - 0.5) for s in (4, 2, 1)]
        network, single = small(patches=(1, 2, 3), overlap=overlap), small(patches=(1, 1, 1))
        image = noise(1, 2, *shape)
        for one in (network, single):
            Stub(one, whole(fields))
        torch.testing.assert_close(network(image), single(image), atol=1e-5, rtol=0)
        # the comparison sees a seam: a patch at another place shows
        Stub(network, lambda patch: whole(fields)(patch) + 0.1 * (patch.box[0].start > 0))
        assert (network(image) - single(image)).abs().max() > 0.05

    def test_the_last_state_of_a_stage_is_the_whole_one(self) -> None:
        """`estimate` hands on composed fields and joined hidden states, also of a stage in patches."""
        shape = (16, 16, 16)
        fields = [smooth_noise(3, [n // s for n in shape], 8, s) for s in (4, 2, 1)]
        hiddens = [noise(1, 8, *(n // s for n in shape), seed=s) for s in (4, 2, 1)]
        network = small(overlap=0)
        Stub(network, whole(fields), whole(hiddens))
        state = network.estimate(noise(1, 2, *shape), 2)
        assert isinstance(state, StageState)
        assert torch.equal(state.hidden, hiddens[1])
        prior = 2 * F.interpolate(fields[0], scale_factor=2, mode="trilinear")
        torch.testing.assert_close(state.ddf, compose(prior, fields[1]), atol=1e-5, rtol=0)
