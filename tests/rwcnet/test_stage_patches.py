"""What a stage in training sees: patches as inference makes them, pairs swapped, priors out of a cache."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rwcnet_net.network import StageState
from rwcnet_net.training import StageBatch, StageInferer
from small_rwcnet import Stub, cut, lively, noise, small, smooth_noise
from stage_pairs import SHAPE, Pair, pair_of, prepared, smooth_field
from torch import Tensor

from common.errors import InputError
from common.layers.warp import warp

pytestmark = pytest.mark.usefixtures("shallow_encoders")


class TestPatchesInTraining:
    @pytest.mark.parametrize("variant", ["paper", "published"])
    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_training_sees_what_inference_makes(self, stage: int, variant: Any) -> None:
        """Of a stage in one patch: the composed field is the one of `estimate`."""
        network = lively(variant=variant, patches=(1, 1, 1))
        network.train_stage(stage)
        image = smooth_noise(2, (16, 16, 24), 5)
        with torch.no_grad():
            patch, _ = StageBatch(network, swap=0.0)({"image": image})
            field = StageInferer()(patch, network)[-1]
            expected = network.estimate(image, stage + 1).ddf
        torch.testing.assert_close(field, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_patches_lie_anywhere_on_the_grid_of_the_stage_before(self, stage: int) -> None:
        network = small(overlap=4)
        network.train_stage(stage)
        Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]))
        whole = tuple(n // network.scales[stage] for n in SHAPE)
        size = network.patch_grid(stage, whole).size
        starts: list[set[int]] = [set(), set(), set()]
        for seed in range(60):
            patch, _ = prepared(network, {"image": noise(1, 2, *SHAPE)}, seed)
            for side, n, found, length in zip(patch.box, size, starts, whole, strict=True):
                assert side.stop - side.start == n and side.start >= 0 and side.stop <= length
                found.add(side.start)
        for found, n, length in zip(starts, size, whole, strict=True):
            assert found == set(range(0, length - n + 1, 2))

    def test_sequence_or_last(self) -> None:
        network = lively(steps=(3, 1, 1))
        network.train_stage(0)
        patch, _ = prepared(network, pair_of(smooth_field()), 0)
        with torch.no_grad():
            every, last = (StageInferer(sequence=flag)(patch, network) for flag in (True, False))
        assert (len(every), len(last)) == (3, 1)
        assert torch.equal(every[-1], last[0])

    def test_displacements_are_counted_from_the_patch(self) -> None:
        """A field of 0 within a patch points at the patch's own place in the stage's moving image."""
        network = small(overlap=4)
        network.train_stage(2)
        Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]))
        patch, target = prepared(network, pair_of(smooth_field()), 3)
        field = StageInferer()(patch, network)[-1]
        origin = [float(side.start) for side in patch.box]
        assert any(origin)
        assert field.flatten(2).amin(2)[0].tolist() == field.flatten(2).amax(2)[0].tolist() == origin
        torch.testing.assert_close(
            warp(target["moving"], field, padding_mode="zeros"), cut(target["moving"], patch.box), atol=1e-5, rtol=0
        )


class TestSwap:
    def unlabelled(self, **changes: Any) -> Pair:
        pair = {key: value for key, value in pair_of(smooth_field()).items() if key not in ("ddf", "mask")}
        return {**pair, **changes}

    def test_exchanges_all(self) -> None:
        network = small()
        network.train_stage(0)
        pair = self.unlabelled()
        (plain, target), (swapped, other) = (prepared(network, pair, 0, swap=p) for p in (0.0, 1.0))
        assert torch.equal(swapped.fixed, plain.moving) and torch.equal(swapped.moving, plain.fixed)
        assert torch.equal(other["fixed"], target["moving"]) and torch.equal(other["moving"], target["fixed"])
        assert torch.equal(other["fixed_one_hot"], target["moving_one_hot"])
        assert torch.equal(other["moving_one_hot"], target["fixed_one_hot"])
        assert not torch.equal(target["fixed_one_hot"], target["moving_one_hot"])
        # points outside the (new) fixed image are left out
        kept = torch.isfinite(other["fixed_keypoints"]).all(-1)
        assert kept.any()
        scale = network.scales[0]
        expected = (pair["moving_keypoints"] + 0.5) / scale - 0.5
        torch.testing.assert_close(other["fixed_keypoints"][kept], expected[kept])
        expected = (pair["fixed_keypoints"] + 0.5) / scale - 0.5
        torch.testing.assert_close(other["moving_keypoints"], expected, equal_nan=True)

    def test_never_with_an_exact_field(self) -> None:
        """Which leads one way only."""
        network = small()
        network.train_stage(0)
        pair = pair_of(smooth_field())
        for seed in range(5):
            patch, _ = prepared(network, pair, seed, swap=1.0)
            assert torch.equal(patch.fixed, network.to_stage(pair["image"][:, 1:], 0))

    @pytest.mark.parametrize("stage", [1, 2])
    def test_never_in_a_later_stage(self, stage: int) -> None:
        network = small(patches=(1, 1, 1))
        network.train_stage(stage)
        Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]))
        pair = self.unlabelled()
        patch, _ = prepared(network, pair, 0, swap=1.0)
        assert torch.equal(patch.fixed, network.to_stage(pair["image"][:, 1:], stage))

    def test_now_and_then_by_default(self) -> None:
        network = small()
        network.train_stage(0)
        pair = self.unlabelled()
        fixed = network.to_stage(pair["image"][:, 1:], 0)
        swapped = [not torch.equal(prepared(network, pair, seed)[0].fixed, fixed) for seed in range(40)]
        assert 8 < sum(swapped) < 32

    def test_is_decided_by_pytorch_s_generator(self) -> None:
        """Whose state is saved with the training."""
        network = small()
        network.train_stage(0)
        pair = self.unlabelled()
        for seed in range(8):
            first, second = (prepared(network, pair, seed)[0] for _ in range(2))
            assert torch.equal(first.fixed, second.fixed)


class TestPriorOfACache:
    class Cache:
        def __init__(self, state: StageState) -> None:
            self.state = state
            self.asked: list[int] = []

        def get(self, index: int, image: Tensor, compute: Callable[[], StageState]) -> StageState:
            self.asked.append(index)
            return self.state

    def test_is_used_from_the_second_stage_on(self) -> None:
        network = lively()
        shape = (16, 16, 16)
        state = StageState(ddf=torch.full((1, 3, 4, 4, 4), 0.5), hidden=noise(1, 8, 4, 4, 4))
        cache: Any = self.Cache(state)
        batch = StageBatch(network, cache=cache)
        pair = {"image": noise(1, 2, *shape), "pair_index": torch.tensor([6])}
        network.train_stage(0)
        assert batch(pair)[0].prior is None
        assert cache.asked == []
        network.train_stage(1)
        patch, _ = batch(pair)
        assert cache.asked == [6]
        torch.testing.assert_close(patch.prior, torch.ones(1, 3, 8, 8, 8))

    def test_takes_one_pair_at_a_time(self) -> None:
        network = small()
        network.train_stage(1)
        cache: Any = SimpleNamespace()
        pair = {"image": noise(2, 2, 16, 16, 16), "pair_index": torch.tensor([0, 1])}
        with pytest.raises(
            InputError, match=r"^the cache takes one pair at a time, got a batch of 2: use --batch_size 1$"
        ):
            StageBatch(network, cache=cache)(pair)
