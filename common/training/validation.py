"""Validation figures of one pair, as output transforms of ignite metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ignite.metrics import Average
from torch import Tensor

from common.layers.warp import warp
from common.metrics import dice_macro, dice_micro, folding_percent, hd95, ncc, sdlogj, tre_mm
from common.training.objective import _needed

__all__ = ["ERROR_FIGURES", "ValidationFigure", "better", "validation_metrics"]

ERROR_FIGURES = ("endpoint_error", "tre_mm", "hd95", "folding_percent", "sdlogj")
"""Figures of which less is better."""


class ValidationFigure:
    """One figure of a validated pair, for `ignite.metrics.Average(output_transform=...)`.

    Args:
        name: "endpoint_error" (voxels, needs the exact field), "dice", "dice_micro" and "hd95" (labels), "tre_mm" (key
            points), "ncc", "folding_percent" or "sdlogj".
        spacing: mm of the network grid, for "tre_mm", where the pair does not say it itself.

    Raises:
        ValueError: for another name.
    """

    def __init__(self, name: str, *, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> None:
        if name not in _FIGURES:
            raise ValueError(f"a validation figure is one of {', '.join(_FIGURES)}, got {name!r}")
        self.name = name
        self.spacing = spacing

    def __call__(self, output: Mapping[str, Any]) -> Tensor:
        """Mean over a batch of the engine's output: `pred`, the ddf, and `label`, the pair."""
        ddf, pair = output["pred"], output["label"]
        values = []
        for i in range(ddf.shape[0]):
            item = {key: value[i : i + 1] for key, value in pair.items() if isinstance(value, Tensor)}
            spacing = tuple(item["spacing"].view(3).tolist()) if "spacing" in item else self.spacing
            values.append(_FIGURES[self.name](ddf[i : i + 1], item, spacing))
        return torch.tensor(values, dtype=torch.float64).mean()


def validation_metrics(
    names: Sequence[str], *, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> dict[str, Average]:
    """Means over the validated pairs by name, as MONAI's evaluator takes them."""
    return {name: Average(output_transform=ValidationFigure(name, spacing=spacing)) for name in names}


def better(name: str) -> Callable[[float, float], bool]:
    """Comparison of a new figure with the best so far, for an evaluator's `metric_cmp_fn`."""
    if name in ERROR_FIGURES:
        return lambda current, best: current < best
    return lambda current, best: current > best


def _endpoint_error(ddf: Tensor, pair: Mapping[str, Tensor], spacing: tuple[float, ...]) -> float:
    distance = (ddf - _needed(pair, "ddf", "an exact field").to(ddf)).norm(dim=1, keepdim=True)
    mask = _needed(pair, "mask", "an exact field").to(ddf)
    return float((distance * mask).sum() / mask.sum().clamp_min(1))


def _warped_labels(ddf: Tensor, pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    moving = _needed(pair, "moving_label", "labels").float()
    warped = warp(moving, ddf.to(moving.device), mode="nearest", padding_mode="zeros")
    return _needed(pair, "fixed_label", "labels").cpu(), warped.round().cpu()


def _dice(ddf: Tensor, pair: Mapping[str, Tensor], spacing: tuple[float, ...]) -> float:
    return dice_macro(*_warped_labels(ddf, pair))


def _dice_micro(ddf: Tensor, pair: Mapping[str, Tensor], spacing: tuple[float, ...]) -> float:
    return dice_micro(*_warped_labels(ddf, pair))


def _hd95(ddf: Tensor, pair: Mapping[str, Tensor], spacing: tuple[float, ...]) -> float:
    return hd95(*_warped_labels(ddf, pair))


def _tre(ddf: Tensor, pair: Mapping[str, Tensor], spacing: tuple[float, ...]) -> float:
    fixed, moving = (_needed(pair, key, "key points")[0].cpu() for key in ("fixed_keypoints", "moving_keypoints"))
    errors = tre_mm(fixed, moving, ddf[0].cpu(), spacing)
    return sum(errors) / len(errors)


def _ncc(ddf: Tensor, pair: Mapping[str, Tensor], spacing: tuple[float, ...]) -> float:
    moving, fixed = torch.split(pair["image"].to(ddf), 1, dim=1)
    return ncc(fixed.cpu(), warp(moving, ddf, padding_mode="zeros").cpu())


_FIGURES: dict[str, Callable[[Tensor, Mapping[str, Tensor], tuple[float, ...]], float]] = {
    "endpoint_error": _endpoint_error,
    "dice": _dice,
    "dice_micro": _dice_micro,
    "hd95": _hd95,
    "tre_mm": _tre,
    "ncc": _ncc,
    "folding_percent": lambda ddf, pair, spacing: folding_percent(ddf.cpu()),
    "sdlogj": lambda ddf, pair, spacing: sdlogj(ddf.cpu()),
}
