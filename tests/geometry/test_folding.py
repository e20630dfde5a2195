"""Folds go, and nothing else does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.geometry.fields import jacobian_determinant
from common.geometry.folding import remove_folding

SHAPE = (30, 36, 33)


def random_field(strength: float, seed: int = 0) -> Tensor:
    """(3, D, H, W), control points 5 voxels apart."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, *(n // 5 for n in SHAPE), generator=generator)
    return strength * F.interpolate(coarse, size=SHAPE, mode="trilinear", align_corners=True)[0]


def folds(ddf: Tensor) -> Tensor:
    """(D-2, H-2, W-2)"""
    return jacobian_determinant(ddf[None])[0, 0] <= 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strength", [1.5, 2.0])
def test_no_fold_is_left(strength: float, seed: int) -> None:
    ddf = random_field(strength, seed)
    assert 0 < folds(ddf).float().mean() < 0.03
    result, voxels = remove_folding(ddf)
    assert not folds(result).any()
    assert voxels >= int(folds(ddf).sum())
    assert result.isfinite().all()


def test_only_the_neighbourhood_changes() -> None:
    """A hill that is too steep, in a field that is not: the rest stays, bit for bit, and so does the argument."""
    ddf = 0.2 * random_field(1.0)
    ddf[0, 12:15, 20:23, 15:18] += 4.0
    given = ddf.clone()
    result, voxels = remove_folding(ddf)
    assert torch.equal(ddf, given)
    assert voxels > 0
    assert not folds(result).any()
    changed = (result != ddf).any(dim=0)
    assert changed.any()
    changed[6:21, 14:29, 9:24] = False
    assert not changed.any()
    assert result[0, 12:15, 20:23, 15:18].mean() > 0.5  # the hill is smoothed, not cut off


@pytest.mark.parametrize("axis", range(3))
def test_at_the_border(axis: int) -> None:
    ddf = torch.zeros(3, *SHAPE)
    ddf[axis].select(axis, 0)[10:14, 10:14] = 2.5
    assert folds(ddf).any()
    result, _ = remove_folding(ddf)
    assert not folds(result).any()


def test_a_field_without_folds_is_returned_as_it_is() -> None:
    ddf = 0.3 * random_field(1.0)
    result, voxels = remove_folding(ddf)
    assert (voxels, result is ddf) == (0, True)
