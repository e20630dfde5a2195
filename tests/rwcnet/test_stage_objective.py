"""What the result of a stage in training is measured against: exact residuals cost nothing, targets fit the patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from rwcnet_net import RWCNet
from rwcnet_net.network import StagePatch
from rwcnet_net.training import StageBatch, StageInferer, StageObjective
from small_rwcnet import Stub, cut, lively, noise, small
from stage_pairs import LABELS, SHAPE, SPACING, pair_of, prepared, shift_field, smooth_field
from torch import Tensor

from common.layers.warp import warp
from common.losses import GradientLoss, MSELoss
from common.training import RegistrationObjective

pytestmark = pytest.mark.usefixtures("shallow_encoders")


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
