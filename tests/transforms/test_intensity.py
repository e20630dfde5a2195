"""Intensities to [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage

from common.errors import InputError
from common.transforms import CT_WINDOWS, NormalizeImaged, ZScoreInMaskd, normalize_intensity


def ct() -> torch.Tensor:
    hu = torch.linspace(-1024, 2000, 1000).reshape(1, 10, 10, 10)
    return hu[:, torch.randperm(10, generator=torch.Generator().manual_seed(0))]


def brain(background: float = 0.0) -> torch.Tensor:
    """A ramp 100..1100 in a box, on a constant background that fills most of the scan."""
    image = torch.full((1, 20, 20, 20), background)
    image[:, 5:15, 5:15, 5:15] = torch.linspace(100, 1100, 1000).reshape(1, 10, 10, 10)
    return image


def test_ct_windows() -> None:
    image = ct()
    scaled, used = normalize_intensity(image, window="wide")
    assert used == "ct"
    torch.testing.assert_close(scaled, ((image + 1000) / 2000).clamp(0, 1))
    scaled, _ = normalize_intensity(image, "ct", window="rwcnet_nlst")
    torch.testing.assert_close(scaled, (image + 4000) / 20000)
    scaled, _ = normalize_intensity(image, "ct", window=(0, 100))
    torch.testing.assert_close(scaled, (image / 100).clamp(0, 1))
    for curve in CT_WINDOWS.values():
        assert list(curve) == sorted(curve)
        assert (curve[0][1], curve[-1][1]) == (0.0, 1.0)


def test_balanced_window_shows_organs_and_keeps_lung_and_bone() -> None:
    hounsfield = torch.tensor(
        [-1200.0, -1000.0, -600.0, -200.0, -150.0, -100.0, 0.0, 50.0, 200.0, 600.0, 1000.0, 3000.0]
    )
    scaled, _ = normalize_intensity(hounsfield, "ct")
    knots = ([-1000, -200, -100, 200, 1000], [0, 0.2, 0.3, 0.85, 1])
    torch.testing.assert_close(scaled, torch.from_numpy(np.interp(hounsfield.numpy(), *knots)).float())
    wide, _ = normalize_intensity(hounsfield, "ct", window="wide")
    liver_to_water = slice(6, 8)
    assert scaled[liver_to_water].diff() > 3 * wide[liver_to_water].diff()
    assert (scaled[1:-1].diff() > 0).all()


@pytest.mark.parametrize("background", [0.0, -50.0, 600.0])
def test_mr_percentiles_are_those_of_the_foreground(background: float) -> None:
    scaled, used = normalize_intensity(brain(background))
    assert used == "mr"
    low, high = 105.0, 1095.0  # 0.5 % and 99.5 % of the ramp
    torch.testing.assert_close(scaled, ((brain(background) - low) / (high - low)).clamp(0, 1), atol=1e-5, rtol=0)


def test_mr_without_a_background_uses_all_voxels() -> None:
    image = torch.linspace(0, 1, 8000).reshape(1, 20, 20, 20)
    scaled, _ = normalize_intensity(image, percentiles=(10, 90))
    torch.testing.assert_close(scaled, ((image - 0.1) / 0.8).clamp(0, 1))


def test_one_outlier_neither_decides_the_modality_nor_the_range() -> None:
    image = brain()
    image[0, 0, 0, 0], image[0, 7, 7, 7] = -800, 50_000
    scaled, used = normalize_intensity(image)
    assert used == "mr"
    torch.testing.assert_close(scaled[:, 8:], normalize_intensity(brain())[0][:, 8:], atol=0.01, rtol=0)


def test_values_that_are_not_finite_become_the_minimum() -> None:
    image = brain()
    broken = image.clone()
    broken[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    torch.testing.assert_close(normalize_intensity(broken)[0], normalize_intensity(image)[0])
    with pytest.raises(InputError, match="no finite voxel"):
        normalize_intensity(torch.full((1, 2, 2, 2), torch.nan))


def test_degenerate_images() -> None:
    assert normalize_intensity(torch.full((1, 3, 3, 3), 7.0))[0].unique().tolist() == [0.0]
    mask = torch.zeros(1, 4, 4, 4)
    mask[0, 1:3] = 5
    assert torch.equal(normalize_intensity(mask)[0], mask / 5)


def test_input_is_kept() -> None:
    image = np.random.default_rng(0).integers(0, 500, (1, 6, 6, 6)).astype(np.int16)
    before = image.copy()
    scaled, _ = normalize_intensity(image)
    np.testing.assert_array_equal(image, before)
    assert scaled.dtype == torch.float32
    tensor = brain()
    normalize_intensity(tensor)
    assert torch.equal(tensor, brain())


def test_dictionary_form_judges_each_image_and_keeps_its_place() -> None:
    affine = torch.diag(torch.tensor([1.0, 2, 3, 1], dtype=torch.float64))
    data = {"fixed": MetaTensor(ct(), affine=affine, meta={"filename_or_obj": "f"}), "moving": brain(), "id": "x"}
    result = NormalizeImaged(("fixed", "moving"))(data)
    assert (result["fixed_modality"], result["moving_modality"], result["id"]) == ("ct", "mr", "x")
    assert torch.equal(result["fixed"].affine, affine)
    assert result["fixed"].meta["filename_or_obj"] == "f"
    assert "fixed_modality" not in data
    assert NormalizeImaged("fixed", modality="mr")(data)["fixed_modality"] == "mr"
    with pytest.raises(InputError, match="'moving': the image has no finite voxel"):
        NormalizeImaged("moving")({"moving": torch.full((1, 2, 2, 2), torch.inf)})


def test_wrong_options_are_refused_at_once() -> None:
    for options, message in (
        ({"modality": "pet"}, "modality is one of"),
        ({"window": "bone"}, "CT window is one of"),
        ({"window": (5, 5)}, "increasing"),
        ({"percentiles": (99, 1)}, "increasing"),
    ):
        with pytest.raises(ValueError, match=message):
            NormalizeImaged("image", **options)  # type: ignore[arg-type]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("lung_ct/fixed.nii.gz", "ct"),
        ("abdomen_ct/totalseg_example_ct.nii.gz", "ct"),
        ("chest_ct/lidc0314_2mm.nii.gz", "ct"),
        ("lung_mri/0004_H1.nii.gz", "mr"),
        ("brain_oasis/A_T1.nii.gz", "mr"),
        ("epi_distortion/LS2001_LR.nii.gz", "mr"),  # its minimum is -819
        ("Task04_Hippocampus/imagesTr/hippocampus_003.nii.gz", "mr"),
    ],
)
def test_real_scans(shared_data: Path, name: str, modality: str) -> None:
    scaled, used = normalize_intensity(LoadImage(ensure_channel_first=True)(shared_data / name))
    assert used == modality
    assert float(scaled.min()) == 0.0
    assert float(scaled.max()) == 1.0
    assert 0.05 < float(scaled[scaled > 0].mean()) < 0.8  # neither black nor saturated


def test_z_score_takes_its_statistics_from_the_mask_alone() -> None:
    image = brain(background=-7.0)
    mask = (image > 0).float()
    image[0, 0, 0, 0] = 1e6  # an artefact outside the mask
    scaled = ZScoreInMaskd("image", mask_key="mask")({"image": image, "mask": mask})["image"]
    inside = scaled[mask > 0]
    assert float(inside.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(inside.std(correction=0)) == pytest.approx(1.0, rel=1e-5)


def test_z_score_refuses_what_has_none() -> None:
    image = brain()
    transform = ZScoreInMaskd("image", mask_key="mask")
    with pytest.raises(InputError, match="empty"):
        transform({"image": image, "mask": torch.zeros_like(image)})
    with pytest.raises(InputError, match="constant"):
        transform({"image": image, "mask": (image == 0).float()})
    with pytest.raises(InputError, match="shape"):
        transform({"image": image, "mask": torch.ones(1, 4, 4, 4)})
