"""Generated pairs: the field that comes with a pair is the one that made it; what a recipe can add."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.ndimage import label as label_components
from torch import Tensor

import common.data.synthetic.appearance as module
from common.data import SyntheticPairs
from common.data.synthetic import SyntheticRecipe, generate_pair
from common.errors import InputError
from common.geometry.fields import jacobian_determinant
from common.layers.warp import warp
from common.metrics import dice_macro

SHAPE = (32, 40, 36)
# what a scanner adds is left out, and both images have one contrast
CLEAN = SyntheticRecipe(
    same_contrast=1.0, texture=(0, 0), bias=(0, 0), noise=(0, 0), blur=(0, 0), gamma=(0, 0), labels=6
)


def pair(seed: int = 0, recipe: SyntheticRecipe | None = None, shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    return generate_pair(shape, generator=torch.Generator().manual_seed(seed), recipe=recipe)


def visible(item: dict[str, Tensor]) -> Tensor:
    """(1, D, H, W), where the moving image has what the fixed one shows."""
    ddf = item["ddf"]
    position = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in SHAPE], indexing="ij")) + ddf
    last = torch.tensor(SHAPE).view(3, 1, 1, 1) - 1
    return ((position >= 0) & (position <= last)).all(0, keepdim=True)


class TestGeneratePair:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_the_field_made_the_fixed_image(self, seed: int) -> None:
        item = pair(seed, CLEAN)
        moving, fixed = item["image"][:1], item["image"][1:]
        warped = warp(moving[None], item["ddf"][None])[0]
        inside = visible(item)
        # the images are rescaled to [0, 1] each for itself, so they agree up to one linear map
        x, y = warped[inside].double(), fixed[inside].double()
        slope, offset = np.polyfit(x.numpy(), y.numpy(), 1)
        assert slope == pytest.approx(1.0, abs=0.15)
        assert float((slope * x + offset - y).abs().max()) < 1e-3
        assert float((moving[inside] - fixed[inside]).abs().mean()) > 0.05  # and the field was needed

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_the_labels_go_with_it(self, seed: int) -> None:
        item = pair(seed)
        warped = warp(item["moving_label"][None].float(), item["ddf"][None], mode="nearest")[0].round().long()
        assert dice_macro(item["fixed_label"], warped) > 0.95
        assert dice_macro(item["fixed_label"], item["moving_label"]) < 0.9

    @pytest.mark.parametrize("seed", range(6))
    def test_the_field_is_a_diffeomorphism(self, seed: int) -> None:
        item = pair(seed)
        assert float(jacobian_determinant(item["ddf"][None]).min()) > 0
        length = item["ddf"].norm(dim=0)
        assert 0.5 < float(length.mean()) < 16
        assert float(length.std()) > 0.1  # it is no shift

    def test_stated_ranges_hold(self) -> None:
        item = pair(3)
        assert item["image"].shape == (2, *SHAPE) and item["ddf"].shape == (3, *SHAPE)
        assert item["image"].dtype == item["ddf"].dtype == torch.float32
        assert float(item["image"].min()) >= 0 and float(item["image"].max()) <= 1
        for key in ("moving_label", "fixed_label"):
            assert set(item[key].unique().tolist()) <= set(range(17))
            assert len(item[key].unique()) > 5
        assert set(item["mask"].unique().tolist()) <= {0.0, 1.0}

    def test_the_mask_leaves_out_what_comes_from_outside(self) -> None:
        recipe = replace(SyntheticRecipe(), translation=0.3, background=0.0)
        item = pair(4, recipe)
        inside = visible(item)
        assert 0.1 < float(inside.float().mean()) < 0.95
        assert torch.equal(item["mask"].bool(), inside)

    def test_the_mask_leaves_out_the_background(self) -> None:
        item = pair(5, replace(SyntheticRecipe(), background=1.0))
        background = item["fixed_label"] == 0
        assert background.any()
        assert not item["mask"][background].any()
        assert item["mask"].any()

    def test_contrasts_differ_where_asked(self) -> None:
        correlations = []
        for same in (0.0, 1.0):
            item = pair(6, replace(CLEAN, same_contrast=same, background=0.0))
            warped = warp(item["image"][None, :1], item["ddf"][None])[0]
            inside = visible(item)
            correlations.append(float(torch.corrcoef(torch.stack([warped[inside], item["image"][1:][inside]]))[0, 1]))
        assert correlations[1] > 0.999
        assert correlations[0] < 0.9

    def test_strength_of_the_field_is_the_recipes(self) -> None:
        still = replace(
            SyntheticRecipe(), field_strength=(0.0, 0.0), rotation=0.0, scaling=0.0, shear=0.0, translation=0.0
        )
        assert not pair(7, still)["ddf"].any()
        shift = pair(7, replace(still, translation=0.1))["ddf"]
        assert float(shift.std(dim=(1, 2, 3)).max()) < 1e-5
        assert (shift[:, 0, 0, 0].abs() <= 0.1 * torch.tensor(SHAPE)).all() and shift.any()
        rotated = pair(7, replace(still, rotation=10.0))["ddf"]
        torch.testing.assert_close(
            jacobian_determinant(rotated[None]), torch.ones(1, 1, *(n - 2 for n in SHAPE)), atol=1e-4, rtol=0
        )
        assert float(rotated[:, 15:17, 19:21, 17:19].abs().max()) < 0.5  # about the centre
        assert float(rotated.abs().max()) > 1

    @pytest.mark.parametrize("shape", [(32, 32, 15), (32, 32), (32, 32, 32, 32)])
    def test_small_or_flat_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="three axes of at least 16 voxels") as caught:
            pair(0, shape=shape)
        assert str(shape) in str(caught.value)

    def test_blur_against_scipy(self) -> None:
        image = pair(8)["image"][:1]
        expected = gaussian_filter(image[0].double().numpy(), 0.8, mode="nearest", radius=3)
        np.testing.assert_allclose(module.gaussian_blur(image, 0.8)[0].numpy(), expected, atol=1e-5)


class TestFeatures:
    """What a recipe can add; each alone, all else as ever."""

    def test_a_feature_left_out_changes_no_other_pair(self) -> None:
        # The figures of the shipped weights are those of pairs that must stay what they were.
        item = SyntheticPairs(length=1, shape=(16, 18, 20), seed=3)[0]
        assert float(item["ddf"].double().sum()) == pytest.approx(-8572.65, rel=1e-3)

    def test_tubes_are_thin_and_connected(self) -> None:
        recipe = replace(CLEAN, tubes=3, background=0.0, shape_scales=(16.0,), tube_radius=(1.5, 1.5))
        found = []
        for seed in range(8):
            tube = pair(seed, recipe)["moving_label"][0] == recipe.labels + 1
            found.append(float(tube.float().mean()))
            if found[-1] > 0.01:
                distance = distance_transform_edt(np.pad(tube.numpy(), 1))
                assert 1 <= np.median(distance[distance > 0]) < 3
                pieces = np.bincount(label_components(tube.numpy())[0].ravel())[1:]  # the border cuts them
                assert len(pieces) < 40 and pieces.max() > 100
        assert max(found) > 0.01 and max(found) < 0.2

    @pytest.mark.parametrize("seed", range(4))
    def test_sliding_jumps_across_a_surface_and_folds_nothing_else(self, seed: int) -> None:
        still = replace(CLEAN, field_strength=(0.0, 0.0), rotation=0.0, scaling=0.0, shear=0.0, translation=0.0)
        item = pair(seed, replace(still, sliding=1.0, slip=(4.0, 4.0)))
        moved = item["ddf"].abs().amax(dim=(1, 2, 3)) > 0
        assert int(moved.sum()) == 1  # along one axis
        axis = int(moved.nonzero())
        field = item["ddf"][axis].movedim(axis, 0)
        torch.testing.assert_close(field, field[:1].expand_as(field), atol=1e-4, rtol=0)  # volumes are kept
        length = field[0].abs()
        assert bool((length == 0).any()) and 3 < float(length[length > 0].mean()) < 5
        determinant = jacobian_determinant(item["ddf"][None])
        torch.testing.assert_close(determinant, torch.ones_like(determinant), atol=1e-4, rtol=0)

    def test_the_slide_comes_after_the_field(self) -> None:
        item, plain = (pair(5, replace(SyntheticRecipe(), sliding=share, slip=(6.0, 6.0))) for share in (1.0, 0.0))
        assert bool((item["ddf"] != plain["ddf"]).any())
        warped = warp(item["moving_label"][None].float(), item["ddf"][None], mode="nearest", padding_mode="border")
        assert torch.equal(warped[0].long(), item["fixed_label"])

    def test_tubes_stay_tubes_inside_a_slide(self) -> None:
        recipe = replace(CLEAN, tubes=3, background=0.0, shape_scales=(16.0,), tube_radius=(2.0, 2.0))
        shares = [
            [float((pair(seed, replace(recipe, sliding=share))["moving_label"] == recipe.labels + 1).float().mean())]
            for share in (0.0, 1.0)
            for seed in range(4)
        ]
        assert shares[:4] == shares[4:] and max(shares)[0] > 0.01

    def test_ct_has_one_scale_of_intensities(self) -> None:
        recipe = replace(
            SyntheticRecipe(), ct=1.0, noise=(0.0, 0.0), blur=(0.0, 0.0), texture=(0.0, 0.0), background=0.0
        )
        for seed in range(4):
            item = pair(seed, recipe)
            of_label = [
                [float(image[label[0] == value].median()) for value in range(1, 17) if (label == value).sum() > 50]
                for image, label in ((item["image"][0], item["moving_label"]), (item["image"][1], item["fixed_label"]))
            ]
            both = [
                value
                for value in range(1, 17)
                if min(int((item[f"{role}_label"] == value).sum()) for role in ("moving", "fixed")) > 50
            ]
            moving, fixed = (
                [float(item["image"][i][item[f"{role}_label"][0] == value].median()) for value in both]
                for i, role in enumerate(("moving", "fixed"))
            )
            np.testing.assert_allclose(moving, fixed, atol=0.02)
            soft = [value for value in of_label[0] if 0.4 < value < 0.6]
            assert len(soft) >= len(of_label[0]) // 4

    def test_missing_parts_are_blank_and_not_in_the_mask(self) -> None:
        recipe = replace(SyntheticRecipe(), missing=1.0, missing_part=(0.2, 0.2), background=0.0, noise=(0.05, 0.05))
        for seed in range(4):
            item = pair(seed, recipe)
            moving, fixed = item["image"]
            for image in (moving, fixed):
                blank = [
                    axis
                    for axis, n in enumerate(SHAPE)
                    for end in (slice(0, round(0.2 * n)), slice(n - round(0.2 * n), n))
                    if not image.movedim(axis, 0)[end].any()
                ]
                assert len(blank) == 1
            seen = (moving > 0).float()
            found = warp(seen[None, None], item["ddf"][None], mode="nearest")[0]
            mask = item["mask"].bool()
            assert (
                bool(mask.any())
                and float(found[mask].mean()) > 0.8
                and float((fixed[None][mask] > 0).float().mean()) > 0.8
            )

    @pytest.mark.parametrize("feature", ["artefacts", "rician"])
    def test_what_a_scanner_adds_leaves_the_field_alone(self, feature: str) -> None:
        plain = pair(9, replace(SyntheticRecipe(), noise=(0.05, 0.05)))
        other = pair(9, replace(SyntheticRecipe(), noise=(0.05, 0.05), **{feature: 1.0}))
        assert torch.equal(plain["ddf"], other["ddf"]) and torch.equal(plain["fixed_label"], other["fixed_label"])
        assert not torch.equal(plain["image"], other["image"])
        assert float(other["image"].min()) >= 0 and float(other["image"].max()) <= 1

    def test_motion_scales_all_of_it(self) -> None:
        lengths = []
        for factor in (0.0, 0.1, 0.999):
            ddf = pair(3, replace(SyntheticRecipe(), motion=(factor, factor)))["ddf"]
            lengths.append(float(ddf.norm(dim=0).mean()))
        assert lengths[0] < 1e-5
        assert lengths[1] == pytest.approx(0.1 * lengths[2], rel=0.2)

    def test_soft_edges(self) -> None:
        sharp, soft = (pair(2, replace(CLEAN, background=0.0, softness=(s, s)))["image"][0] for s in (0.0, 1.5))
        steps = [float(image.diff(dim=0).abs().quantile(0.99)) for image in (sharp, soft)]
        assert steps[1] < 0.6 * steps[0]


@pytest.fixture
def maps(tmp_path: Path) -> str:
    """Three people's maps: a head of 40 voxels with three structures, at another place in each."""
    for person in range(3):
        label = np.zeros((60, 56, 64), dtype=np.int16)
        first = 4 + 4 * person
        label[first : first + 40, 6:46, 8:56] = 500
        label[first + 4 : first + 20, 10:40, 12:50] = 2
        label[first + 22 : first + 36, 10:40, 12:50] = 41
        nib.save(nib.Nifti1Image(label, np.diag([-1.0, 1.0, 1.0, 1.0])), tmp_path / f"person_{person}.nii.gz")
    return str(tmp_path)


class TestLabelMaps:
    def recipe(self, maps: str, **more: Any) -> SyntheticRecipe:
        return replace(CLEAN, label_maps=maps, label_map_share=1.0, label_map_spacing=(1.5, 1.5), **more)

    def test_are_painted_in_place_of_shapes(self, maps: str) -> None:
        item = pair(1, self.recipe(maps))
        assert set(item["moving_label"].unique().tolist()) <= {0, 2, 41, 500}
        assert len(item["moving_label"].unique()) >= 3
        warped = warp(item["image"][None, :1], item["ddf"][None])[0]
        inside = visible(item)
        assert float(torch.corrcoef(torch.stack([warped[inside], item["image"][1:][inside]]))[0, 1]) > 0.999

    def test_two_people_have_one_contrast_and_no_field(self, maps: str) -> None:
        generator = torch.Generator().manual_seed(0)
        item = generate_pair(SHAPE, generator=generator, recipe=self.recipe(maps, noise=(0, 0)), between=True)
        assert "ddf" not in item and "mask" not in item
        assert set(item["moving_label"].unique().tolist()) == set(item["fixed_label"].unique().tolist()) == {0, 1, 2, 3}
        assert not torch.equal(item["moving_label"], item["fixed_label"])
        for value in (1, 2, 3):
            moving, fixed = (
                float(item["image"][i][item[f"{role}_label"][0] == value].median())
                for i, role in enumerate(("moving", "fixed"))
            )
            assert moving == pytest.approx(fixed, abs=0.1)

    def test_epochs_are_of_one_kind(self, maps: str) -> None:
        data = SyntheticPairs(
            length=2, shape=(16, 16, 16), recipe={"label_maps": maps, "between_share": 0.25, "labels": 4}
        )
        kinds = []
        for epoch in range(9):
            data.set_epoch(epoch)
            kinds.append({"ddf" in data[i] for i in range(2)})
        assert kinds == [{epoch not in (4, 8)} for epoch in range(9)]

    def test_no_maps_no_pairs(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no NIfTI label maps"):
            SyntheticPairs(length=1, shape=(16, 16, 16), recipe={"label_maps": str(tmp_path)})

    def test_an_image_is_no_label_map(self, tmp_path: Path) -> None:
        nib.save(nib.Nifti1Image(np.full((20, 20, 20), -1.5, dtype=np.float32), np.eye(4)), tmp_path / "t1.nii.gz")
        with pytest.raises(InputError, match="is no label map"):
            pair(0, self.recipe(str(tmp_path)))
