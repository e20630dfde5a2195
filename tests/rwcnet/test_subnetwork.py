"""RWCNet's sub-network against the paper's equations and the published code: matching, recurrence, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rwcnet_net.subnetwork import FeatureEncoder, SubNetwork
from small_rwcnet import VARIANTS, count, enliven, noise, small, smooth_noise
from torch import Tensor, nn

from common.geometry.fields import compose, jacobian_determinant
from common.layers.correlation import correlation_offsets
from common.layers.warp import warp

SHAPE = (16, 24, 16)  # of `image`


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
