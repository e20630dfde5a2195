"""Raw brain scans: a known bias field goes, the mask decides what counts."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import InputError
from common.transforms import CorrectBiasd, brain_transforms

SHAPE = (40, 48, 36)


def head() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two tissues in a brain, a bright skull around it, and a bias field: all (D, H, W)."""
    p = np.indices(SHAPE)
    unit = (p.reshape(3, -1) / np.array(SHAPE).reshape(3, 1) - 0.5).reshape(3, *SHAPE)
    radius = np.sqrt((unit**2).sum(0))
    tissue = np.where(np.sin(p.sum(0) / 2.5) > 0, 100.0, 60.0)
    clean = np.where(radius < 0.38, tissue, np.where(radius < 0.45, 300.0, 0.0))
    bias = np.exp(0.6 * unit[0] - 0.5 * unit[1])
    return clean, (radius < 0.38).astype(np.float32), bias


def spread(values: np.ndarray, clean: np.ndarray) -> float:
    """Largest relative deviation within a tissue."""
    return max(float(np.std(values[clean == c]) / np.mean(values[clean == c])) for c in (60.0, 100.0))


def test_a_bias_field_is_removed() -> None:
    clean, mask, bias = head()
    affine = torch.diag(torch.tensor([1.2, 0.9, 1.5, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.from_numpy(clean * bias).float()[None], affine=affine)
    data = {"image": image, "mask": torch.from_numpy(mask)[None]}
    result = CorrectBiasd(["image"], mask_keys=["mask"], shrink=2)(data)["image"]
    assert isinstance(result, MetaTensor) and torch.equal(result.affine, affine) and result.dtype == torch.float32
    inside = np.where(mask > 0, clean, 0)
    before, after = spread(clean * bias, inside), spread(result[0].numpy(), inside)
    assert before > 0.1 and after < 0.4 * before


def test_the_whole_chain(tmp_path: Path) -> None:
    clean, mask, bias = head()
    pair = {}
    for role in ("fixed", "moving"):
        pair[role], pair[f"{role}_mask"] = str(tmp_path / f"{role}.nii.gz"), str(tmp_path / f"{role}_bet_mask.nii.gz")
        nib.save(nib.Nifti1Image((clean * bias).astype(np.int16), np.eye(4)), pair[role])
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), np.eye(4)), pair[f"{role}_mask"])
    for bias_correction in (False, True):
        result = brain_transforms(bias_correction=bias_correction)(pair)
        for role in ("fixed", "moving"):
            values = result[role].as_tensor().numpy()[0]
            assert not values[mask == 0].any()
            assert values[mask > 0].mean() == pytest.approx(0, abs=1e-4)
            assert values[mask > 0].std() == pytest.approx(1, abs=1e-4)


def test_refusals() -> None:
    image = torch.rand(1, 16, 16, 16)
    with pytest.raises(InputError, match="the mask 'mask' is empty"):
        CorrectBiasd(["image"], mask_keys=["mask"])({"image": image, "mask": 0 * image})
    with pytest.raises(InputError, match=r"the mask 'mask' has the shape \(8, 16, 16\), 'image' \(16, 16, 16\)"):
        CorrectBiasd(["image"], mask_keys=["mask"])({"image": image, "mask": image[:, :8]})
    with pytest.raises(InputError, match="'image' has no positive voxel"):
        CorrectBiasd(["image"])({"image": -image})
    with pytest.raises(ValueError, match="2 images need as many masks, not 1"):
        CorrectBiasd(["a", "b"], mask_keys=["mask"])
