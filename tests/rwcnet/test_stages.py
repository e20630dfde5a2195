"""What is trained when, what a stage in training sees, and what its result is measured against."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from rwcnet_net import RWCNet
from rwcnet_net.network import StagePatch, StageState
from rwcnet_net.training import StageBatch, StageInferer, StageObjective, StageRates, StageSchedule
from small_rwcnet import Stub, cut, lively, noise, positions, small, smooth_noise
from torch import Tensor

from common.errors import InputError
from common.layers.warp import warp
from common.losses import GradientLoss, MSELoss
from common.training import RegistrationObjective

pytestmark = pytest.mark.usefixtures("shallow_encoders")

SHAPE = (32, 40, 32)
SPACING = (1.5, 0.8, 2.0)
LABELS = [3, 7]
Pair = dict[str, Tensor]


@pytest.fixture
def three_stages() -> RWCNet:
    return small()


def schedule(network: RWCNet, **options: Any) -> StageSchedule:
    return StageSchedule(network, **{"max_epochs": 9, "output_dir": "unused", **options})


class TestSchedule:
    @pytest.mark.parametrize(
        ("max_epochs", "ends"), [(9, [2, 5, 9]), (18, [4, 10, 18]), (3, [1, 2, 3]), (30, [7, 17, 30])]
    )
    def test_shares(self, three_stages: RWCNet, max_epochs: int, ends: list[int]) -> None:
        """The paper's 2, 3 and 4 of 9."""
        plan = schedule(three_stages, max_epochs=max_epochs)
        assert plan.ends == ends
        stages = [plan.stage_of(epoch) for epoch in range(1, max_epochs + 1)]
        assert [stages.count(stage) for stage in range(3)] == [ends[0], ends[1] - ends[0], ends[2] - ends[1]]
        assert stages == sorted(stages)
        assert (plan.start_epoch, plan.last_epoch, plan.initial_weights) == (0, max_epochs, None)

    def test_every_stage_has_an_epoch_and_every_epoch_a_stage(self, three_stages: RWCNet) -> None:
        draw = random.Random(0)
        shares = [(2, 3, 4), (4, 1, 4), (100, 1, 1), (1, 1, 100), (1, 100, 1), (5, 0.001, 5)]
        shares += [tuple(draw.randint(1, 20) for _ in range(3)) for _ in range(40)]
        for max_epochs, share in product(range(3, 20), shares):
            plan = schedule(three_stages, max_epochs=max_epochs, shares=share)
            stages = [plan.stage_of(epoch) for epoch in range(1, max_epochs + 1)]
            assert stages == sorted(stages)
            counts = [stages.count(stage) for stage in range(3)]
            assert min(counts) >= 1, (max_epochs, share, counts)
            assert sum(counts) == max_epochs
            ends = [sum(counts[: stage + 1]) for stage in range(3)]
            assert plan.ends == ends

    @pytest.mark.parametrize(("max_epochs", "stages"), [(1, [0]), (2, [0, 1])])
    def test_fewer_epochs_than_stages(self, three_stages: RWCNet, max_epochs: int, stages: list[int]) -> None:
        """The last stages get none."""
        plan = schedule(three_stages, max_epochs=max_epochs)
        assert [plan.stage_of(epoch) for epoch in range(1, max_epochs + 1)] == stages
        rates = StageRates(plan, epoch_length=10)
        values = [rates(step) for step in range(10 * max_epochs + 1)]  # LambdaLR asks once more after the last step
        assert values[::10][:-1] == pytest.approx([0.05] * max_epochs)
        assert all(0 < value <= 1 for value in values)

    @pytest.mark.parametrize(("stage", "start", "last"), [(1, 0, 4), (2, 4, 10), (3, 10, 18)])
    def test_a_single_stage(self, three_stages: RWCNet, stage: int, start: int, last: int) -> None:
        """Its epochs are those that it has in the whole; it goes on from the weights of the stage before."""
        plan = schedule(three_stages, max_epochs=18, stage=stage, output_dir="runs/there")
        assert (plan.start_epoch, plan.last_epoch) == (start, last)
        before = str(Path("runs/there") / f"stage_{stage - 1}.pt")
        assert plan.initial_weights == (None if stage == 1 else before)
        assert {plan.stage_of(epoch) for epoch in range(start + 1, last + 1)} == {stage - 1}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shares": (1, 2)}, r"^stage_shares must be 3 positive numbers, one for each stage, got \[1, 2\]$"),
            ({"shares": (1, 0, 2)}, r"^stage_shares must be 3 positive numbers.* got \[1, 0, 2\]$"),
            ({"stage": 4}, "^there is no stage 4: the network has stages 1 to 3$"),
            ({"stage": 0}, "^there is no stage 0: the network has stages 1 to 3$"),
            ({"max_epochs": 0}, "^max_epochs 0 leaves no epoch for stage 1$"),
            ({"max_epochs": 2, "stage": 3}, "^max_epochs 2 leaves no epoch for stage 3$"),
        ],
    )
    def test_impossible_plans(self, three_stages: RWCNet, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            schedule(three_stages, **options)

    def test_a_larger_window_cannot_start_from_a_smaller_one(self) -> None:
        growing = small(radii=(1, 2, 2))
        with pytest.raises(
            InputError, match=r"^a stage of a larger window .* radii \[1, 2, 2\]: use --warm_start False$"
        ):
            schedule(growing)
        assert schedule(growing, warm_start=False).ends


class TestRates:
    LENGTH = 50

    def rates(self, network: RWCNet, policy: str = "one_cycle", **options: Any) -> StageRates:
        return StageRates(schedule(network, **options), epoch_length=self.LENGTH, policy=policy)

    def test_each_stage_has_a_cycle_of_its_own(self, three_stages: RWCNet) -> None:
        factor = self.rates(three_stages)
        for start, stop in pairwise([0, 100, 250, 450]):
            values = [factor(step) for step in range(start, stop)]
            assert values[0] == pytest.approx(0.05)
            assert max(values) == pytest.approx(1.0, abs=0.01)
            assert values[-1] == pytest.approx(0.01, abs=2e-3)
            peak = values.index(max(values))
            assert peak == pytest.approx(0.05 * (stop - start), abs=1)
            assert all(a < b for a, b in pairwise(values[: peak + 1]))
            assert all(a > b for a, b in pairwise(values[peak:]))
        # LambdaLR asks once more after the last step
        assert factor(450) == pytest.approx(0.01)

    def test_a_single_stage_runs_its_cycle(self, three_stages: RWCNet) -> None:
        whole, third = self.rates(three_stages), self.rates(three_stages, stage=3)
        assert [third(step) for step in range(200)] == [whole(250 + step) for step in range(200)]

    def test_constant(self, three_stages: RWCNet) -> None:
        factor = self.rates(three_stages, policy="constant")
        assert {factor(step) for step in range(451)} == {1.0}

    def test_unknown_policy(self, three_stages: RWCNet) -> None:
        with pytest.raises(InputError, match=r"^the learning rate's policy is one_cycle or constant, got 'cosine'$"):
            self.rates(three_stages, policy="cosine")

    def test_survives_being_saved(self, three_stages: RWCNet, tmp_path: Path) -> None:
        """Also where another plan was built before it was read back."""

        def scheduler(rates: StageRates) -> Any:
            parameter = torch.nn.Parameter(torch.zeros(1))
            return torch.optim.lr_scheduler.LambdaLR(torch.optim.Adam([parameter], lr=0.2), rates)

        def follow(one: Any, steps: int) -> list[float]:
            values = []
            for _ in range(steps):
                one.optimizer.step()
                one.step()
                values += one.get_last_lr()
            return values

        first = scheduler(self.rates(three_stages, stage=2))
        follow(first, 30)
        torch.save([first.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
        second = scheduler(self.rates(three_stages))
        state, optimizer = torch.load(tmp_path / "state.pt", weights_only=True)
        second.load_state_dict(state)
        second.optimizer.load_state_dict(optimizer)
        expected = follow(first, 300)
        assert follow(second, 300) == expected
        assert len(set(expected)) > 100


class TestFreezing:
    def test_momentum_does_not_move_a_frozen_stage(self, three_stages: RWCNet) -> None:
        network = three_stages
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        frozen: dict[str, Tensor] = {}
        for stage in range(3):
            network.train_stage(stage)
            before = {name: value.clone() for name, value in network.state_dict().items()}
            for _ in range(2):
                optimizer.zero_grad()
                sum((p - 3).square().sum() for p in network.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
                optimizer.step()
            for name, value in network.named_parameters():
                assert torch.equal(value, before[name]) is not name.startswith(f"stages.{stage}."), name
            frozen |= {n: p.detach().clone() for n, p in network.named_parameters() if n.startswith(f"stages.{stage}.")}
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, frozen[name]), name
            assert optimizer.state[parameter]["exp_avg"].any(), name  # which would have moved it


# Pairs with an exactly known field


def linear_part(points: Tensor) -> Tensor:
    """A slight shear and turn, and a shift."""
    matrix = torch.tensor([[0.03, -0.05, 0.0], [0.06, 0.02, 0.03], [-0.02, 0.04, -0.03]])
    return torch.einsum("xc,bcijk->bxijk", matrix, points - 16) + torch.tensor([1.5, -2.0, 1.0]).view(1, 3, 1, 1, 1)


def smooth_field() -> Tensor:
    return linear_part(positions(SHAPE)) + 2 * (smooth_noise(3, SHAPE, 12, 5) - 0.5)


def shift_field() -> Tensor:
    """Whole voxels at every stage, so that sampling, averaging and picking lose nothing."""
    return torch.tensor([4.0, -4.0, 8.0]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE).contiguous()


def pair_of(field: Tensor) -> Pair:
    """The fixed image is the moving one through the field; two labels; key points, the last of them unknown."""
    moving = smooth_noise(1, SHAPE, 8, 0)
    texture = smooth_noise(1, SHAPE, 8, 1)
    label = torch.where(texture > 0.65, 3, torch.where(texture < 0.4, 7, 0))
    fixed_points = (torch.tensor(SHAPE) - 1.0) * noise(1, 40, 3, seed=3)
    grid = (2 * fixed_points / (torch.tensor(SHAPE) - 1) - 1).flip(-1).view(1, 40, 1, 1, 3)
    at_points = torch.nn.functional.grid_sample(field, grid, align_corners=True)[0, :, :, 0, 0].T
    moving_points = fixed_points + at_points
    fixed_points[:, -1] = float("nan")
    return {
        "image": torch.cat([moving, warp(moving, field, padding_mode="zeros")], 1),
        "ddf": field,
        "mask": torch.ones(1, 1, *SHAPE),
        "moving_label": label,
        "fixed_label": warp(label.float(), field, mode="nearest", padding_mode="zeros").long(),
        "fixed_keypoints": fixed_points,
        "moving_keypoints": moving_points,
    }


def stage_field(network: RWCNet, field: Tensor, stage: int) -> Tensor:
    return network.to_stage(field, stage) / network.scales[stage]


def exact_residuals(network: RWCNet, field: Tensor) -> Stub:
    """Earlier stages return 0.6 and 0.8 of the field; the one in training what is missing, by fixed-point iteration."""

    def answer(patch: StagePatch) -> Tensor:
        exact = stage_field(network, field, patch.stage)
        assert network.stage_in_training is not None
        if patch.stage < network.stage_in_training:
            share = (0.6, 0.5)[patch.stage]
            return share * cut(exact if patch.prior is None else exact - patch.prior, patch.box)
        if patch.prior is None:
            return cut(exact, patch.box)
        residual = torch.zeros_like(exact)
        for _ in range(40):
            residual = exact - warp(patch.prior, residual, padding_mode="border")
        return cut(residual, patch.box)

    return Stub(network, answer)


def objective(**options: Any) -> RegistrationObjective:
    return RegistrationObjective(**{"similarity": MSELoss(), "smoothness_weight": 0.0, **options})


def terms(field: Tensor, target: dict[str, Any]) -> dict[str, float]:
    """Each term of the objective by itself."""
    similarity = objective(supervision="similarity")
    both = {
        "field": objective(background_weight=1.0),
        "similarity": similarity,
        "labels": objective(supervision="similarity", similarity_weight=0.0, labels=LABELS, label_weight=1.0),
        "landmarks": objective(supervision="similarity", similarity_weight=0.0, landmark_weight=1.0),
    }
    return {name: float(loss(field, target)) for name, loss in both.items()}


def prepared(network: RWCNet, pair: Pair, seed: int, **options: Any) -> tuple[StagePatch, dict[str, Any]]:
    torch.manual_seed(seed)
    return StageBatch(network, labels=LABELS, spacing=SPACING, **options)(dict(pair), "cpu")


class TestExactResidual:
    """A sub-network that returns exactly what is missing must cost nothing, wherever the patch lies."""

    @pytest.mark.parametrize("variant", ["paper", "published"])
    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_of_a_shift(self, stage: int, variant: Any) -> None:
        network = small(variant=variant, overlap=4)
        network.train_stage(stage)
        field = shift_field()
        exact_residuals(network, field)
        pair = pair_of(field)
        boxes = set()
        for seed in range(6):
            patch, target = prepared(network, pair, seed)
            estimates = StageInferer()(patch, network)
            boxes.add(tuple(side.start for side in patch.box))
            errors = terms(estimates[-1], target)
            assert errors["field"] < 1e-4
            assert errors["similarity"] < 1e-9
            assert errors["labels"] < 1e-4
            assert errors["landmarks"] < 1e-3
            nothing = terms(estimates[-1] + 1, target)
            assert nothing["field"] == pytest.approx(3**0.5, rel=1e-3)
            assert nothing["similarity"] > 1e-4
            assert nothing["labels"] > 0.05
        assert len(boxes) > (0 if stage == 0 else 3)

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_of_a_smooth_field(self, stage: int) -> None:
        network = small(overlap=4)
        network.train_stage(stage)
        field = smooth_field()
        exact_residuals(network, field)
        pair = pair_of(field)
        for seed in range(4):
            patch, target = prepared(network, pair, seed)
            estimate = StageInferer()(patch, network)[-1]
            errors = terms(estimate, target)
            origin = torch.tensor([float(side.start) for side in patch.box]).view(1, 3, 1, 1, 1)
            still = terms(torch.zeros_like(estimate) + origin, target)
            assert errors["field"] < 1e-3
            # averaging a warped image is not warping an averaged one, but at the full resolution nothing is left
            limit = (0.1, 0.02, 1e-6)[stage]
            assert errors["similarity"] < limit * still["similarity"]
            assert errors["labels"] < (0.3, 0.2, 0.15)[stage] * still["labels"]
            assert errors["landmarks"] < (0.1, 0.05, 1e-3)[stage] * still["landmarks"]

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_gradients_reach_the_stage_alone(self, stage: int) -> None:
        network = lively(patches=(1, 2, 2)).train()
        network.train_stage(stage)
        pair = {key: value for key, value in pair_of(smooth_field()).items() if "keypoints" not in key}
        patch, target = prepared(network, {k: v[..., :16, :16, :16] for k, v in pair.items()}, 0)
        loss = objective(labels=LABELS, label_weight=1.0, smoothness=GradientLoss(), smoothness_weight=1.0)
        loss(StageInferer()(patch, network), target).backward()
        for index, subnetwork in enumerate(network.stages):
            for name, parameter in subnetwork.named_parameters():
                if index == stage:
                    assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
                else:
                    assert parameter.grad is None, name


class TestMatching:
    """Supervision of the features, by what is left for the stage to find."""

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_residual(self, stage: int) -> None:
        """Composed with the prior it is the whole field; a stage that returns it returns what is exact."""
        network = small(overlap=4)
        network.train_stage(stage)
        field = smooth_field()
        stub = exact_residuals(network, field)
        for seed in range(3):
            patch, target = prepared(network, pair_of(field), seed)
            torch.testing.assert_close(target["residual"], stub.field(patch), atol=2e-3, rtol=0)
            assert torch.equal(target["warped"], patch.moving) and torch.equal(target["fixed"], patch.fixed)
            assert target["stage"] == stage

    def loss(self, network: RWCNet, weight: float) -> StageObjective:
        return StageObjective(network=network, matching_weight=weight, similarity=MSELoss(), smoothness_weight=0.0)

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_teaches_the_encoder_of_the_stage(self, stage: int) -> None:
        network = lively(patches=(1, 2, 2)).train()
        network.train_stage(stage)
        patch, target = prepared(network, pair_of(smooth_field()), 0)
        estimate = StageInferer()(patch, network)[-1].detach()
        without, once, thrice = (self.loss(network, weight) for weight in (0.0, 1.0, 3.0))
        values = []
        for loss in (without, once, thrice):
            torch.manual_seed(0)  # which voxels it looks at
            values.append(loss(estimate, target))
        values[1].backward()
        plain, single, triple = (float(value.detach()) for value in values)
        assert triple - plain == pytest.approx(3 * (single - plain), rel=1e-4)
        assert 1 < single - plain < 10  # ln 27 of features that know nothing
        for name, parameter in network.named_parameters():
            touched = name.startswith(f"stages.{stage}.feature_encoder")
            assert (parameter.grad is not None) is touched, name
        assert len(list(once.parameters())) == 0  # the network's are not its own

    def test_without_an_exact_field(self) -> None:
        network = lively(patches=(1, 2, 2))
        network.train_stage(0)
        pair = {key: value for key, value in pair_of(smooth_field()).items() if key not in ("ddf", "mask")}
        patch, target = prepared(network, pair, 0)
        assert "residual" not in target
        with torch.no_grad():
            estimate = StageInferer()(patch, network)[-1]
        first, second = (self.loss(network, weight)(estimate, target) for weight in (0.0, 3.0))
        assert torch.equal(first, second)


class TestTarget:
    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_landmarks_in_mm(self, stage: int) -> None:
        """An error of voxels of the stage counts by the size of those voxels."""
        network = small(overlap=4)
        network.train_stage(stage)
        field = shift_field()
        exact_residuals(network, field)
        patch, target = prepared(network, pair_of(field), 1)
        estimate = StageInferer()(patch, network)[-1] + torch.tensor([1.0, 0.0, -0.5]).view(1, 3, 1, 1, 1)
        scale = network.scales[stage]
        expected = scale * (SPACING[0] ** 2 + (0.5 * SPACING[2]) ** 2) ** 0.5
        assert target["spacing"] == pytest.approx([scale * s for s in SPACING])
        assert terms(estimate, target)["landmarks"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("variant", ["paper", "published"])
    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_key_points_outside_the_patch_do_not_count(self, stage: int, variant: Any) -> None:
        network = small(variant=variant, overlap=4)
        network.train_stage(stage)
        field = shift_field()
        exact_residuals(network, field)
        scale = network.scales[stage]
        centre = (scale - 1) / 2 if variant == "paper" else 0.0  # of a stage's first voxel
        numbers = set()
        for seed in range(4):
            pair = pair_of(field)
            patch, _ = prepared(network, pair, seed)
            points = (pair["fixed_keypoints"][0] - centre) / scale
            low = torch.tensor([float(side.start) for side in patch.box])
            high = torch.tensor([float(side.stop - 1) for side in patch.box])
            inside = ((points >= low) & (points <= high)).all(-1)
            pair["moving_keypoints"][0, ~inside] += 1000.0
            patch, target = prepared(network, pair, seed)
            kept = torch.isfinite(target["fixed_keypoints"][0]).all(-1)
            assert torch.equal(kept, inside)
            torch.testing.assert_close(target["fixed_keypoints"][0, kept], (points - low)[kept])
            assert terms(StageInferer()(patch, network)[-1], target)["landmarks"] < 1e-3
            numbers.add(int(kept.sum()))
        assert min(numbers) > 0 and max(numbers) < 40

    def test_without_a_spacing_it_is_1_mm(self) -> None:
        network = small()
        network.train_stage(1)
        pair = {"image": noise(1, 2, *SHAPE)}
        Stub(network, lambda patch: torch.zeros(1, 3, *patch.fixed.shape[2:]))
        assert StageBatch(network)(pair)[1]["spacing"] == [2.0, 2.0, 2.0]
        assert StageBatch(network, spacing=1.5)(pair)[1]["spacing"] == [3.0, 3.0, 3.0]
        measured = {**pair, "spacing": torch.tensor([[1.5, 1.0, 2.0]])}  # the pair knows best
        assert StageBatch(network, spacing=1.5)(measured)[1]["spacing"] == [3.0, 2.0, 4.0]

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_shapes(self, stage: int) -> None:
        """What belongs to the fixed image has the patch's size, what belongs to the moving one the stage's."""
        network = small(overlap=4)
        network.train_stage(stage)
        field = smooth_field()
        exact_residuals(network, field)
        patch, target = prepared(network, pair_of(field), 0)
        size = patch.fixed.shape[2:]
        whole = tuple(n // network.scales[stage] for n in SHAPE)
        assert tuple(size) == network.patch_grid(stage, whole).size
        channels = {"fixed": 1, "fixed_one_hot": 2, "ddf": 3, "mask": 1}
        assert {key: tuple(target[key].shape) for key in channels} == {k: (1, c, *size) for k, c in channels.items()}
        for key, c in {"moving": 1, "moving_one_hot": 2}.items():
            assert tuple(target[key].shape) == (1, c, *whole)
        assert not patch.fixed.requires_grad and not target["moving"].requires_grad

    def test_labels_are_shares_of_a_voxel(self) -> None:
        network = small()
        network.train_stage(0)
        _, target = prepared(network, pair_of(smooth_field()), 0)
        label = pair_of(smooth_field())["fixed_label"]
        for channel, value in enumerate(LABELS):
            block = (label[0, 0, 4:8, 8:12, 12:16] == value).float().mean()
            assert float(target["fixed_one_hot"][0, channel, 1, 2, 3]) == pytest.approx(float(block))
        assert target["fixed_one_hot"].frac().any()  # some are between 0 and 1

    def test_what_is_not_in_the_pair_is_not_in_the_target(self) -> None:
        network = small()
        network.train_stage(0)
        _, target = StageBatch(network)({"image": noise(1, 2, *SHAPE), "pair_index": torch.tensor([4])})
        assert set(target) == {"spacing", "fixed", "moving", "warped", "stage"}

    def test_a_batch_of_two_pairs(self) -> None:
        network = lively(overlap=2)
        network.train_stage(1)
        pairs = [pair_of(smooth_field()), pair_of(shift_field())]
        both = {key: torch.cat([pair[key] for pair in pairs]) for key in pairs[0]}
        _, together = prepared(network, both, 2)
        for n, pair in enumerate(pairs):
            _, alone = prepared(network, pair, 2)
            for key, value in alone.items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(
                        together[key][n : n + 1], value, atol=2e-4, rtol=1e-4, equal_nan=True, msg=key
                    )

    def test_monai_tensors_are_taken(self) -> None:
        network = small()
        network.train_stage(0)
        pair = {key: MetaTensor(value) for key, value in pair_of(smooth_field()).items()}
        patch, target = prepared(network, pair, 0)  # type: ignore[arg-type]
        assert not isinstance(patch.fixed, MetaTensor)
        assert not any(isinstance(value, MetaTensor) for value in target.values())


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
