"""AD-RegNet's two attentions: they find what was shifted, turn round with the images, and weigh what is informative."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from adregnet_net.attention import BidirectionalCrossAttention, Correspondence, RegionalAdaptiveAttention
from small_adregnet import count, noise, sharp
from torch import Tensor, nn

AXES = (2, 3, 4)
FIELDS = ("features", "displacement", "moving_to_fixed", "fixed_to_moving")


def cross_attention(window: int | None = None, channels: int = 16, locality: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    module = BidirectionalCrossAttention(channels=channels, window=window)
    if locality is not None:  # near places are preferred by this much
        nn.init.constant_(module.locality, torch.tensor(locality).expm1().log().item())
    return module.requires_grad_(False)


def matching(window: int | None = None) -> nn.Module:
    """Compares the features themselves, and hardly minds how far it has to look."""
    module = cross_attention(window, locality=1e-3)
    for name, projection in module.projections.items():
        if not name.startswith("value"):
            nn.init.dirac_(projection.weight)
    return module


class TestCrossAttention:
    @pytest.mark.parametrize("shift", [(2, -1, 0), (0, 3, -2), (-3, 0, 1)])
    def test_displacement_is_the_shift(self, shift: tuple[int, int, int]) -> None:
        """moving(p + shift) = fixed(p), pull-back: both directions say so."""
        fixed = sharp(8, 9, 10)
        found = matching()(fixed.roll(shift, AXES), fixed).displacement[..., 3:-3, 3:-3, 3:-3]
        expected = torch.tensor(shift).view(1, 3, 1, 1, 1).expand_as(found).float()
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)

    def test_untrained_compares_like_with_like(self) -> None:
        """A key projection starts as the query projection that it answers to; others would know nothing."""
        shift, fixed = (2, -1, 1), 10 * sharp(8, 8, 8)
        exact = torch.tensor(shift).float()
        shares = []
        for strangers in (False, True):
            module = cross_attention(locality=1e-3)
            if strangers:
                for image in ("moving", "fixed"):
                    nn.init.normal_(module.projections[f"key_{image}"].weight, std=0.15)
            found = module(fixed.roll(shift, AXES), fixed).displacement[..., 2:-2, 2:-2, 2:-2]
            shares.append(float(found.mean((0, 2, 3, 4)) @ exact / exact.square().sum()))
        assert shares[0] > 0.6
        assert abs(shares[1]) < 0.3

    def test_equal_features_stay_where_they_are(self) -> None:
        found = matching()(sharp(6, 5, 7), sharp(6, 5, 7))
        assert found.displacement.abs().max() < 1e-2
        torch.testing.assert_close(found.moving_to_fixed, matching().projections["value_fixed"](sharp(6, 5, 7)))

    def test_output_follows_the_moving_features_by_a_window(self) -> None:
        """What the moving voxels found comes along; what the fixed ones found stays, a window further away."""
        module, fixed, moving = matching(), sharp(8, 12, 8), sharp(8, 12, 8)
        before, after = module(moving, fixed), module(moving.roll(4, 3), fixed)
        near = {"atol": 1e-2, "rtol": 0.0}
        inner = (..., slice(4, -4), slice(None))  # the rest has come round from the other end
        torch.testing.assert_close(after.moving_to_fixed[inner], before.moving_to_fixed.roll(4, 3)[inner], **near)
        torch.testing.assert_close(after.fixed_to_moving[inner], before.fixed_to_moving[inner], **near)
        expected = torch.tensor([0.0, 4.0, 0.0]).view(1, 3, 1, 1, 1)
        moved = (after.displacement - before.displacement)[inner]
        torch.testing.assert_close(moved, expected.expand_as(moved), **near)
        assert (after.moving_to_fixed - before.moving_to_fixed)[inner].abs().max() > 1

    @pytest.mark.parametrize("axis", AXES)
    def test_windowed_output_follows_both_images_by_a_window(self, axis: int) -> None:
        """Exactly; by less than a window, voxels see other ones."""
        module = cross_attention(window=4)
        moving, fixed = noise(1, 16, 8, 12, 8), noise(1, 16, 8, 12, 8, seed=1)
        before = module(moving, fixed)
        by = {n: module(moving.roll(n, axis), fixed.roll(n, axis)) for n in (4, 2)}
        for name in FIELDS:
            expected = getattr(before, name)
            torch.testing.assert_close(getattr(by[4], name), expected.roll(4, axis), atol=1e-4, rtol=0)
            assert (getattr(by[2], name) - expected.roll(2, axis)).abs().max() > 1e-3

    def test_windows_bound_the_displacement(self) -> None:
        far = sharp(12, 8, 8)
        found = matching(window=4)(far.roll(4, 2), far)
        assert found.displacement.abs().max() < 4
        assert matching()(far.roll(4, 2), far).displacement[:, 0, 4:8].min() > 3.9

    @pytest.mark.parametrize("window", [None, 3])
    @pytest.mark.parametrize("balance", [0.0, 0.8])
    def test_swapping_the_images_swaps_the_directions(self, window: int | None, balance: float) -> None:
        module = cross_attention(window, channels=32)
        module.balance.fill_(balance)
        for role in ("query", "key", "value"):
            weights = module.projections[f"{role}_moving"].state_dict()
            module.projections[f"{role}_fixed"].load_state_dict(weights)
        moving, fixed = noise(2, 32, 5, 4, 6), noise(2, 32, 5, 4, 6, seed=1)
        found: Correspondence = module(moving, fixed)
        module.balance.fill_(-balance)
        swapped: Correspondence = module(fixed, moving)
        exact = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(swapped.fixed_to_moving, found.moving_to_fixed, **exact)
        torch.testing.assert_close(swapped.moving_to_fixed, found.fixed_to_moving, **exact)
        torch.testing.assert_close(swapped.displacement, -found.displacement, **exact)
        torch.testing.assert_close(swapped.features, found.features, **exact)
        assert (found.moving_to_fixed - found.fixed_to_moving).abs().max() > 0.1
        assert found.displacement.abs().max() > 0.1

    def test_balance_is_the_share_of_the_primary_direction(self) -> None:
        module, fixed = cross_attention(), noise(1, 16, 4, 5, 6)
        moving = noise(1, 16, 4, 5, 6, seed=1)
        for balance, share in ((30.0, 1.0), (-30.0, 0.0), (0.0, 0.5), (-1.0986123, 0.25)):
            module.balance.fill_(balance)
            found = module(moving, fixed)
            expected = share * found.moving_to_fixed + (1 - share) * found.fixed_to_moving
            torch.testing.assert_close(found.features, expected)

    @pytest.mark.parametrize(("channels", "heads"), [(8, 1), (16, 1), (32, 2), (256, 16)])
    def test_heads(self, channels: int, heads: int) -> None:
        """Each prefers near places to a degree of its own: the first one looks a voxel around, the last one up to 8."""
        module = cross_attention(2, channels=channels)
        assert module.heads == heads
        reach = (0.5 / F.softplus(module.locality)).sqrt()
        assert float(reach[0]) == pytest.approx(1.0, rel=1e-4)
        if heads > 1:
            assert float(reach[-1]) == pytest.approx(8.0, rel=1e-3)
            assert (reach.diff() > 0).all()
        features = noise(1, channels, 2, 3, 2)
        assert module(features, features).displacement.shape == (1, 3 * heads, 2, 3, 2)
        assert count(module) == 6 * channels**2 + heads + 1

    @pytest.mark.parametrize("asking", ["moving", "fixed"])
    def test_each_direction_has_projections_of_its_own(self, asking: str) -> None:
        """And values come from the image that answers."""
        module, other = cross_attention(), cross_attention()
        answering = "fixed" if asking == "moving" else "moving"
        for name in (f"query_{asking}", f"key_{answering}", f"value_{answering}"):
            nn.init.normal_(other.projections[name].weight)
        moving, fixed = noise(1, 16, 4, 4, 4), noise(1, 16, 4, 4, 4, seed=1)
        before, after = module(moving, fixed), other(moving, fixed)
        changed, kept = f"{asking}_to_{answering}", f"{answering}_to_{asking}"
        assert torch.equal(getattr(before, kept), getattr(after, kept))
        assert (getattr(before, changed) - getattr(after, changed)).abs().max() > 0.1


def regional(region: int = 4, channels: int = 6) -> RegionalAdaptiveAttention:
    torch.manual_seed(0)
    return RegionalAdaptiveAttention(channels=channels, region=region).requires_grad_(False)


class TestRegionalAttention:
    @pytest.mark.parametrize("shape", [(8, 12, 8), (7, 9, 5), (3, 8, 1), (2, 2, 3)])
    def test_starts_as_the_identity(self, shape: tuple[int, ...]) -> None:
        """Also where regions are cut, and where the map is smaller than one."""
        features = noise(2, 6, *shape)
        torch.testing.assert_close(regional()(features), features)

    def test_an_informative_region_gets_more_weight(self) -> None:
        module = regional()
        module.score.weight[0, 2] = 2.0
        features = noise(2, 6, 8, 12, 8).clamp(-1, 1)
        features[0, 2, 4:, 8:, :4] += 3.0  # region (1, 2, 0) of the first, (0, 1, 1) of the second
        features[1, 2, :4, 4:8, 4:] += 3.0
        gain, context = module.weigh(features)
        assert gain.shape == (2, 1, 2, 3, 2)
        assert not context.any()
        torch.testing.assert_close(gain.mean((2, 3, 4)), torch.ones(2, 1))
        assert gain.flatten(1).argmax(1).tolist() == [6 + 4 + 0, 0 + 2 + 1]
        assert float(gain.flatten(1).amax(1).min()) > 5
        weighed = module(features)
        for sample, where in ((0, (1, 2, 0)), (1, (0, 1, 1))):
            box = (..., *(slice(4 * i, 4 * i + 4) for i in where))
            torch.testing.assert_close(weighed[sample][box], features[sample][box] * gain[sample, 0][where])
        assert float(weighed[0, :, :4].norm()) < float(features[0, :, :4].norm())

    @pytest.mark.parametrize("shape", [(8, 12, 8), (7, 9, 5), (3, 8, 1)])
    def test_equations(self, shape: tuple[int, ...]) -> None:
        """Each region by hand, cut ones by the voxels that they have."""
        module = regional()
        for layer in (module.value, module.score):
            nn.init.normal_(layer.weight)
        features = noise(1, 6, *shape)
        corners = product(*(range(0, n, 4) for n in shape))
        boxes = [tuple(slice(start, start + 4) for start in corner) for corner in corners]
        tokens = torch.stack([features[(0, slice(None), *box)].mean((1, 2, 3)) for box in boxes])
        query, key, value = (layer(tokens) for layer in (module.query, module.key, module.value))
        context = (query @ key.T / 6**0.5).softmax(-1) @ value
        gain = len(boxes) * module.score(tokens + context).softmax(0)
        expected = torch.empty_like(features)
        for n, box in enumerate(boxes):
            where = (0, slice(None), *box)
            expected[where] = features[where] * gain[n] + context[n].view(6, 1, 1, 1)
        torch.testing.assert_close(module(features), expected, atol=1e-5, rtol=1e-4)
        assert gain.max() > 1.05

    def test_regions_of_a_voxel(self) -> None:
        module = regional(1)
        nn.init.normal_(module.score.weight)
        features = noise(1, 6, 3, 4, 2)
        scores = (features * module.score.weight.view(1, 6, 1, 1, 1)).sum(1, keepdim=True)
        gain = 24 * scores.flatten(1).softmax(1).view_as(scores)
        torch.testing.assert_close(module(features), features * gain, atol=1e-5, rtol=1e-4)

    def test_far_apart_scores_stay_finite(self) -> None:
        """One region has all the weight there is."""
        module = regional(1, channels=1)
        module.score.weight.fill_(1e4)
        features = torch.zeros(1, 1, 8, 8, 8)
        features[..., 3, 4, 5] = 1.0
        gain, _ = module.weigh(features.requires_grad_())
        assert float(gain[0, 0, 3, 4, 5].detach()) == pytest.approx(512, rel=1e-5)
        assert float(gain.detach().sum()) == pytest.approx(512, rel=1e-5)
        module(features).sum().backward()
        assert features.grad is not None and torch.isfinite(features.grad).all()

    def test_half_precision(self) -> None:
        module = regional(2)
        for layer in (module.value, module.score):
            nn.init.normal_(layer.weight)
        features = noise(1, 6, 8, 8, 8)
        expected: Tensor = module(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = module(features)
        torch.testing.assert_close(result.float(), expected, atol=0.05, rtol=0.05)
