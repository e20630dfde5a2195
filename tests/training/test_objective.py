"""The training objective and the validation figures by values that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from common.layers.warp import warp
from common.losses import GradientLoss, LocalNCC, MSELoss
from common.training import RegistrationObjective, ValidationFigure, better, validation_metrics

SHAPE = (12, 14, 10)


def smooth(channels: int, seed: int, batch: int = 1) -> Tensor:
    coarse = torch.rand(batch, channels, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=SHAPE, mode="trilinear", align_corners=True)


@pytest.fixture
def pair() -> dict[str, Tensor]:
    """The fixed image is the moving one through `ddf`; two labels, four key points."""
    ddf = 3 * smooth(3, 1) - 1.5
    moving = smooth(1, 0)
    label = 1 + (moving > moving.median()).long()
    points = torch.tensor([[3.0, 4, 5], [8, 9, 3], [5.5, 6.25, 4], [2, 11, 7]])
    mask = torch.zeros(1, 1, *SHAPE)
    mask[..., 2:-2] = 1
    return {
        "image": torch.cat([moving, warp(moving, ddf, padding_mode="zeros")], 1),
        "ddf": ddf,
        "mask": mask,
        "moving_label": label,
        "fixed_label": warp(label.float(), ddf, mode="nearest", padding_mode="zeros").round().long(),
        "fixed_keypoints": points[None],
        "moving_keypoints": points[None] + 2,
    }


def objective(**options: Any) -> RegistrationObjective:
    return RegistrationObjective(**{"similarity": MSELoss(), "smoothness_weight": 0.0, **options})


class TestObjective:
    def test_the_exact_field_costs_nothing(self, pair: dict[str, Tensor]) -> None:
        assert float(objective()(pair["ddf"], pair)) == 0.0
        assert float(objective(supervision="similarity")(pair["ddf"], pair)) == pytest.approx(0.0, abs=1e-10)
        assert float(objective()([torch.zeros_like(pair["ddf"]), pair["ddf"]], pair)) > 0.1

    def test_field_error_weighs_the_background_less(self, pair: dict[str, Tensor]) -> None:
        wrong = pair["ddf"] + torch.tensor([3.0, 0, 4]).view(1, 3, 1, 1, 1) * (1 - pair["mask"])
        share = float(1 - pair["mask"].mean())
        expected = 5 * 0.1 * share / (0.1 * share + (1 - share))
        assert float(objective()(wrong, pair)) == pytest.approx(expected, rel=1e-5)
        assert float(objective(background_weight=0.0)(wrong, pair)) == 0.0
        assert float(objective(background_weight=1.0)(wrong, pair)) == pytest.approx(5 * share, rel=1e-5)

    def test_supervision(self, pair: dict[str, Tensor]) -> None:
        """ "auto" takes the field where there is one."""
        zero = torch.zeros_like(pair["ddf"])
        without = {key: value for key, value in pair.items() if key != "ddf"}
        by_field, by_image = (float(objective(supervision=s)(zero, pair)) for s in ("field", "similarity"))
        assert by_field != pytest.approx(by_image)
        assert float(objective()(zero, pair)) == by_field
        assert float(objective()(zero, without)) == by_image

    @pytest.mark.parametrize("similarity", [MSELoss(), LocalNCC(window=5)])
    def test_a_step_against_the_gradient_of_similarity_gets_closer(
        self, pair: dict[str, Tensor], similarity: torch.nn.Module
    ) -> None:
        loss = objective(similarity=similarity, supervision="similarity", smoothness_weight=0.0)
        ddf = (0.5 * pair["ddf"]).requires_grad_()
        before = loss(ddf, pair)
        before.backward()
        assert ddf.grad is not None
        inner = (slice(None), slice(None), *(slice(2, -2),) * 3)
        remaining = pair["ddf"] - ddf.detach()
        # over all voxels the descent direction points towards the exact field
        assert float((-ddf.grad * remaining)[inner].sum()) > 0
        after = loss(ddf.detach() - 0.2 * ddf.grad / ddf.grad.abs().max(), pair)
        assert float(after) < float(before.detach())

    def test_the_moving_image_is_channel_0(self, pair: dict[str, Tensor]) -> None:
        swapped = {**pair, "image": pair["image"].flip(1)}
        loss = objective(supervision="similarity")
        assert float(loss(pair["ddf"], swapped)) > 1e3 * float(loss(pair["ddf"], pair)) + 1e-4

    @pytest.mark.parametrize("supervision", ["field", "similarity"])
    def test_the_first_term_can_be_weighted(self, pair: dict[str, Tensor], supervision: str) -> None:
        """It alone: the others have weights of their own."""
        zero = torch.zeros_like(pair["ddf"])
        options = {"supervision": supervision, "labels": [1, 2], "label_weight": 1.0, "landmark_weight": 1.0}
        without, once, tenfold = (float(objective(similarity_weight=w, **options)(zero, pair)) for w in (0, 1, 10))
        first = float(objective(supervision=supervision)(zero, pair))
        assert once - without == pytest.approx(first, rel=1e-4)
        assert tenfold - without == pytest.approx(10 * first, rel=1e-4)
        others = objective(similarity_weight=10, smoothness_weight=0.7)(pair["ddf"], pair)
        assert float(others) == pytest.approx(0.7 * float(GradientLoss(penalty="l2")(pair["ddf"])), rel=1e-5)

    def test_smoothness(self, pair: dict[str, Tensor]) -> None:
        weighted = objective(smoothness_weight=0.7)(pair["ddf"], pair)
        assert float(weighted) == pytest.approx(0.7 * float(GradientLoss(penalty="l2")(pair["ddf"])), rel=1e-5)
        other = objective(smoothness_weight=0.7, smoothness=GradientLoss(penalty="l1"))(pair["ddf"], pair)
        assert float(other) == pytest.approx(0.7 * float(GradientLoss(penalty="l1")(pair["ddf"])), rel=1e-5)

    def test_folding_counts_in_the_last_estimate_alone(self, pair: dict[str, Tensor]) -> None:
        mirrored = torch.zeros_like(pair["ddf"])
        mirrored[:, 0] = (-3 * torch.arange(12.0)).view(12, 1, 1)  # p -> -2 p along one axis: det = -2
        even = torch.zeros_like(mirrored)
        plain, weighted = objective(), objective(folding_weight=0.5)
        for estimates, folds in ((mirrored, 1), (even, 0), ([even, mirrored], 1), ([mirrored, even], 0)):
            extra = float(weighted(estimates, pair)) - float(plain(estimates, pair))
            assert extra == pytest.approx(0.5 * 2 * folds, abs=1e-4)

    def test_folding_has_a_gradient(self, pair: dict[str, Tensor]) -> None:
        ddf = torch.zeros(1, 3, *SHAPE)
        ddf[:, 0] = (-1.5 * torch.arange(12.0)).view(12, 1, 1)
        ddf.requires_grad_()
        loss = objective(similarity_weight=0.0, folding_weight=1.0)
        loss(ddf, pair).backward()
        assert ddf.grad is not None and torch.isfinite(ddf.grad).all()
        before = float(loss(ddf, pair).detach())
        assert before == pytest.approx(0.5, rel=1e-4)
        assert float(loss((ddf - 10 * ddf.grad).detach(), pair)) < before

    def test_labels(self, pair: dict[str, Tensor]) -> None:
        loss = objective(labels=[1, 2], label_weight=2.0)
        exact, none = loss(pair["ddf"], pair), loss(torch.zeros_like(pair["ddf"]), pair)
        base = objective()(torch.zeros_like(pair["ddf"]), pair)
        assert float(exact) < 0.8 * float(none - base)
        double = objective(labels=[1, 2], label_weight=4.0)(pair["ddf"], pair)
        assert float(double) == pytest.approx(2 * float(exact), rel=1e-5)

    def test_landmarks(self, pair: dict[str, Tensor]) -> None:
        shift = torch.tensor([2.0, 2, 2]).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
        still = {**pair, "ddf": torch.zeros_like(shift)}
        loss = objective(landmark_weight=3.0, spacing=(1.0, 2.0, 0.5))
        assert float(loss(shift, {**pair, "ddf": shift})) == pytest.approx(0.0, abs=1e-5)
        assert float(loss(torch.zeros_like(shift), still)) == pytest.approx(3 * 2 * (1 + 4 + 0.25) ** 0.5, rel=1e-5)

    @pytest.mark.parametrize(
        ("options", "key"),
        [
            ({"labels": [1], "label_weight": 1.0}, "fixed_label"),
            ({"labels": [1], "label_weight": 1.0}, "moving_label"),
            ({"landmark_weight": 1.0}, "fixed_keypoints"),
            ({"landmark_weight": 1.0}, "moving_keypoints"),
            ({"supervision": "field"}, "ddf"),
            ({}, "mask"),
        ],
    )
    def test_what_a_term_lacks_is_named(self, options: dict[str, Any], key: str, pair: dict[str, Tensor]) -> None:
        estimate = pair["ddf"]
        del pair[key]
        with pytest.raises(InputError, match=f"'{key}' is missing"):
            objective(**options)(estimate, pair)

    def test_a_given_spacing_takes_the_place_of_the_constructor_s(self, pair: dict[str, Tensor]) -> None:
        still = {**pair, "ddf": torch.zeros_like(pair["ddf"]), "spacing": [3.0, 0.0, 0.0]}
        loss = objective(landmark_weight=1.0, spacing=(1.0, 2.0, 0.5))
        # the points are 2 voxels apart along each axis
        assert float(loss(still["ddf"], still)) == pytest.approx(6.0, rel=1e-5)
        del still["spacing"]
        assert float(loss(still["ddf"], still)) == pytest.approx(2 * (1 + 4 + 0.25) ** 0.5, rel=1e-5)

    def test_later_estimates_weigh_more(self, pair: dict[str, Tensor]) -> None:
        errors = [4.0, 2.0, 1.0]
        estimates = [pair["ddf"] + torch.tensor([e, 0, 0]).view(1, 3, 1, 1, 1) for e in errors]
        loss = objective(gamma=0.5, background_weight=1.0)
        assert float(loss(estimates, pair)) == pytest.approx(0.25 * 4 + 0.5 * 2 + 1, rel=1e-5)
        assert float(loss(estimates[2], pair)) == pytest.approx(1.0, rel=1e-5)


class TestPatch:
    """The fixed side a patch, the moving side whole; displacements are counted from the patch's first voxel."""

    BOX = (slice(3, 9), slice(4, 12), slice(2, 8))

    @pytest.fixture
    def patch(self, pair: dict[str, Tensor]) -> dict[str, Any]:
        def cut(volume: Tensor) -> Tensor:
            return volume[(..., *self.BOX)]

        origin = torch.tensor([float(side.start) for side in self.BOX])
        points = torch.tensor([[[0.0, 1.0, 2.0], [5.0, 6.5, 3.0]]])
        ddf = cut(pair["ddf"]) + origin.view(1, 3, 1, 1, 1)
        shares = {
            role: torch.cat([pair[f"{role}_label"] == value for value in (1, 2)], 1).float()
            for role in ("fixed", "moving")
        }
        return {
            "moving": pair["image"][:, :1],
            "fixed": cut(pair["image"][:, 1:]),
            "ddf": ddf,
            "mask": cut(pair["mask"]),
            "fixed_one_hot": cut(shares["fixed"]),
            "moving_one_hot": shares["moving"],
            "fixed_keypoints": points,
            "moving_keypoints": points + warp(ddf, points.new_zeros(1, 3, *ddf.shape[2:]))[0, :, 0, 0, 0],
        }

    def test_the_exact_field_costs_nothing(self, patch: dict[str, Any]) -> None:
        assert float(objective()(patch["ddf"], patch)) == 0.0
        similarity = objective(supervision="similarity")
        assert float(similarity(patch["ddf"], patch)) == pytest.approx(0.0, abs=1e-10)
        # from the volume's first voxel, where the patch is not
        origin = torch.tensor([3.0, 4.0, 2.0]).view(1, 3, 1, 1, 1)
        assert float(similarity(patch["ddf"] - origin, patch)) > 1e-3

    def test_moving_content_from_outside_the_patch_counts(self, patch: dict[str, Any]) -> None:
        similarity = objective(supervision="similarity")
        cut = {**patch, "moving": patch["moving"][(..., *self.BOX)]}
        origin = torch.tensor([3.0, 4.0, 2.0]).view(1, 3, 1, 1, 1)
        assert float(similarity(patch["ddf"] - origin, cut)) > 1e-3

    def test_shares_of_labels(self, pair: dict[str, Tensor], patch: dict[str, Any]) -> None:
        """Given as maps, the labels themselves are not needed; whole ones have the loss of the label maps or less."""
        loss = objective(similarity_weight=0.0, labels=[1, 2], label_weight=1.0)
        still = torch.tensor([3.0, 4.0, 2.0]).view(1, 3, 1, 1, 1).expand_as(patch["ddf"])
        assert float(loss(patch["ddf"], patch)) < 0.5 * float(loss(still, patch))
        same = {**patch, "moving_one_hot": patch["fixed_one_hot"]}
        assert float(loss(torch.zeros_like(still), same)) == pytest.approx(0.0, abs=1e-5)
        whole = {**pair, "fixed_one_hot": 1 - patch["moving_one_hot"], "moving_one_hot": patch["moving_one_hot"]}
        # the maps come first: no overlap
        assert float(loss(torch.zeros_like(pair["ddf"]), whole)) == pytest.approx(1.0, abs=1e-5)

    def test_labels_of_a_patch(self, pair: dict[str, Tensor], patch: dict[str, Any]) -> None:
        """Label maps may be of two sizes as well; here the patch is cut one voxel further along two axes."""
        loss = objective(similarity_weight=0.0, labels=[1, 2], label_weight=1.0)
        further = pair["moving_label"][..., 4:10, 4:12, 3:9]
        maps = {key: value for key, value in patch.items() if "one_hot" not in key}
        maps |= {"fixed_label": further, "moving_label": pair["moving_label"]}
        exact = torch.tensor([4.0, 4.0, 3.0]).view(1, 3, 1, 1, 1).expand_as(patch["ddf"])
        assert float(loss(exact, maps)) == pytest.approx(0.0, abs=1e-5)
        assert float(loss(exact - 1, maps)) > 0.05

    def test_landmarks_of_a_patch(self, patch: dict[str, Any]) -> None:
        loss = objective(similarity_weight=0.0, landmark_weight=1.0)
        constant = torch.tensor([3.0, 4.0, 2.0]).view(1, 3, 1, 1, 1).expand_as(patch["ddf"])
        moving = patch["fixed_keypoints"] + torch.tensor([3.0, 4.0, 2.0])
        assert float(loss(constant, {**patch, "moving_keypoints": moving})) == pytest.approx(0.0, abs=1e-5)
        moving[:, 1] += torch.tensor([0.0, 3.0, 4.0])
        assert float(loss(constant, {**patch, "moving_keypoints": moving})) == pytest.approx(2.5, rel=1e-5)
        hidden = patch["fixed_keypoints"].clone()
        hidden[:, 1] = float("nan")  # as those outside the patch are
        left_out = {**patch, "fixed_keypoints": hidden, "moving_keypoints": moving}
        assert float(loss(constant, left_out)) == pytest.approx(0.0, abs=1e-5)


def figure(name: str, pair: dict[str, Tensor], ddf: Tensor, **options: Any) -> float:
    return float(ValidationFigure(name, **options)({"pred": ddf, "label": pair}))


class TestValidationFigures:
    def test_endpoint_error_inside_the_mask(self, pair: dict[str, Tensor]) -> None:
        wrong = pair["ddf"] + torch.tensor([3.0, 0, 4]).view(1, 3, 1, 1, 1) * pair["mask"] + 9 * (1 - pair["mask"])
        assert figure("endpoint_error", pair, pair["ddf"]) == 0.0
        assert figure("endpoint_error", pair, wrong) == pytest.approx(5.0, rel=1e-5)

    def test_labels(self, pair: dict[str, Tensor]) -> None:
        pair["image"][...] = 0  # not used
        assert figure("dice", pair, pair["ddf"]) == 1.0
        assert figure("dice", pair, torch.zeros_like(pair["ddf"])) < 0.9
        still = {**pair, "fixed_label": pair["moving_label"]}
        assert figure("dice", still, torch.zeros_like(pair["ddf"])) == 1.0
        assert figure("hd95", still, torch.zeros_like(pair["ddf"])) == 0.0
        assert figure("hd95", pair, torch.zeros_like(pair["ddf"])) > 0.5

    def test_tre_in_mm(self, pair: dict[str, Tensor]) -> None:
        shift = torch.full((1, 3, *SHAPE), 1.0)  # one of two voxels along each axis
        assert figure("tre_mm", pair, shift, spacing=(2.0, 3.0, 6.0)) == pytest.approx(7.0, rel=1e-5)
        assert figure("tre_mm", pair, 2 * shift) == pytest.approx(0.0, abs=1e-5)

    def test_ncc(self, pair: dict[str, Tensor]) -> None:
        assert figure("ncc", pair, pair["ddf"]) == pytest.approx(1.0, abs=1e-5)
        assert figure("ncc", pair, torch.zeros_like(pair["ddf"])) < 0.9
        moving, fixed = pair["image"].double().flatten(2)[0]
        expected = float(torch.corrcoef(torch.stack([moving, fixed]))[0, 1])
        assert figure("ncc", pair, torch.zeros_like(pair["ddf"])) == pytest.approx(expected, abs=1e-4)

    def test_regularity(self, pair: dict[str, Tensor]) -> None:
        still = torch.zeros_like(pair["ddf"])
        mirrored = still.clone()
        mirrored[:, 0] = (-2 * torch.arange(12.0)).view(12, 1, 1)  # p -> -p along one axis: det = -1
        assert figure("folding_percent", pair, still) == figure("sdlogj", pair, still) == 0.0
        assert figure("folding_percent", pair, mirrored) == 100.0
        assert figure("sdlogj", pair, pair["ddf"]) > 0.01

    def test_a_batch_is_averaged(self, pair: dict[str, Tensor]) -> None:
        pairs = {key: torch.cat([value, value]) for key, value in pair.items()}
        ddf = torch.cat([pair["ddf"], pair["ddf"] + torch.tensor([3.0, 0, 4]).view(1, 3, 1, 1, 1)])
        assert figure("endpoint_error", pairs, ddf) == pytest.approx(2.5, rel=1e-5)

    def test_ignite_averages_over_pairs(self, pair: dict[str, Tensor]) -> None:
        metrics = validation_metrics(["endpoint_error", "ncc"])
        assert list(metrics) == ["endpoint_error", "ncc"]
        metric = metrics["endpoint_error"]
        metric.reset()
        for error in (0.0, 1.0, 5.0):
            output = {"pred": pair["ddf"] + torch.tensor([error, 0, 0]).view(1, 3, 1, 1, 1), "label": pair}
            assert metric._output_transform is not None
            metric.update(metric._output_transform(output))
        assert float(metric.compute()) == pytest.approx(2.0, rel=1e-5)

    def test_direction(self) -> None:
        for name in ("endpoint_error", "tre_mm", "hd95", "folding_percent", "sdlogj"):
            assert better(name)(1.0, 2.0) and not better(name)(2.0, 1.0)
        for name in ("dice", "ncc"):
            assert better(name)(2.0, 1.0) and not better(name)(1.0, 2.0)

    def test_unknown_figures_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"endpoint_error.*'jaccard'"):
            ValidationFigure("jaccard")

    @pytest.mark.parametrize(("name", "key"), [("endpoint_error", "ddf"), ("dice", "moving_label")])
    def test_what_a_figure_lacks_is_named(self, name: str, key: str, pair: dict[str, Tensor]) -> None:
        ddf = pair["ddf"]
        del pair[key]
        with pytest.raises(InputError, match=f"'{key}' is missing"):
            figure(name, pair, ddf)
