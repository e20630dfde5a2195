"""The matching loss knows where the counterpart is."""

from __future__ import annotations

import math

import pytest
import torch

from common.layers.warp import warp
from common.losses import MatchingLoss


def shifted_features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct features, their copy under a known smooth field, that field, and where both are known."""
    generator = torch.Generator().manual_seed(3)
    moving = 4 * torch.randn(2, 32, 12, 10, 11, generator=generator)
    ddf = torch.zeros(2, 3, 12, 10, 11)
    ddf[:, 0], ddf[:, 2] = 1.0, -2.0
    mask = torch.zeros(2, 1, 12, 10, 11)
    mask[:, :, :-1, :, 2:] = 1
    return warp(moving, ddf), moving, ddf, mask


def test_true_field_beats_every_other() -> None:
    fixed, moving, ddf, mask = shifted_features()
    loss = MatchingLoss(radius=2)
    true = float(loss(fixed, moving, ddf, mask))
    assert true < 1.0  # ln 125 is 4.8
    for axis in range(3):
        wrong = ddf.clone()
        wrong[:, axis] += 1
        assert float(loss(fixed, moving, wrong, mask)) > true + 1


def test_features_that_know_nothing() -> None:
    fixed, moving, ddf, mask = shifted_features()
    blind = MatchingLoss(radius=2)(torch.ones_like(fixed), torch.zeros_like(moving), ddf, mask)
    assert float(blind) == pytest.approx(math.log(125), abs=1e-5)


def test_gradient_makes_features_match() -> None:
    fixed, moving, ddf, mask = shifted_features()
    fixed = (0.1 * fixed).requires_grad_()
    loss = MatchingLoss(radius=1, points=10_000)
    before = loss(fixed, moving, ddf, mask)
    (gradient,) = torch.autograd.grad(before, fixed)
    assert torch.isfinite(gradient).all()
    assert float(loss((fixed - gradient).detach(), moving, ddf, mask)) < float(before.detach())


def test_only_the_mask_counts() -> None:
    fixed, moving, ddf, mask = shifted_features()
    loss = MatchingLoss(radius=1, points=10_000)
    spoiled = torch.where(mask > 0.5, fixed, torch.full_like(fixed, 100.0))
    assert torch.equal(loss(spoiled, moving, ddf, mask), loss(fixed, moving, ddf, mask))
    nowhere = fixed.clone().requires_grad_()
    nothing = loss(nowhere, moving, ddf, torch.zeros_like(mask))
    nothing.backward()
    assert float(nothing) == 0.0 and nowhere.grad is not None and not nowhere.grad.any()


def test_errors() -> None:
    fixed, moving, ddf, mask = shifted_features()
    with pytest.raises(ValueError, match="must be positive, got 0 and 512"):
        MatchingLoss(radius=0)
    with pytest.raises(ValueError, match="do not fit a field"):
        MatchingLoss(radius=1)(fixed[:, :, 1:], moving, ddf, mask)
