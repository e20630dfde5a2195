"""Figures of a network's weights on every validation pair, beside those of doing nothing."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch import nn

from common.data.pairs import PairDataset
from common.errors import InputError, find_registration_error
from common.inference.weights import load_weights
from common.io import atomic_path, check_output_dir
from common.training.validation import ValidationFigure

__all__ = ["EvaluationRun", "available_figures"]

TABLE = "evaluation.csv"
_ZERO = "zero_displacement"  # suffix of the columns of the field that moves nothing


def available_figures(pair: Mapping[str, Any]) -> list[str]:
    """The figures that what a pair carries allows for."""
    names = []
    if "ddf" in pair and "mask" in pair:
        names.append("endpoint_error")
    if "fixed_label" in pair and "moving_label" in pair:
        names += ["dice", "hd95"]
    if "fixed_keypoints" in pair and "moving_keypoints" in pair:
        names.append("tre_mm")
    return [*names, "ncc", "folding_percent", "sdlogj"]


class EvaluationRun:
    """Evaluates weights on an evaluator's pairs; problems end the program with one sentence.

    Prints means and standard deviations and writes a row for each pair to evaluation.csv: MONAI's `MetricsSaver` makes
    a file of each figure, names one scan for each row, and has no place for the figures of the zero displacement.

    Args:
        evaluator: a MONAI evaluator with a batch size of 1.
        dataset: its pairs, a `TrainingPairs`.
        network: receives the weights.
        weights: path of its state dict.
        output_dir: folder of the table.
        figures: names, see `ValidationFigure`; all that the first pair allows for when None.
        spacing: mm of the network grid, for "tre_mm"; 1 mm when None.
    """

    def __init__(
        self,
        *,
        evaluator: Any,
        dataset: Any,
        network: nn.Module,
        weights: str,
        output_dir: str | os.PathLike[str],
        figures: Sequence[str] | None = None,
        spacing: float | Sequence[float] | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.dataset = dataset
        self.network = network
        self.weights = weights
        self.table = Path(output_dir) / TABLE
        self.figures = None if figures is None else list(figures)
        self.spacing = _three(spacing)
        self.rows: list[dict[str, Any]] = []
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._measure)

    def run(self) -> None:
        """Evaluate.

        Raises:
            SystemExit: with the sentence that tells what went wrong.
        """
        try:
            check_output_dir(self.table.parent)
            load_weights(self.network, self.weights)
            self.rows = []
            self.evaluator.run()
            self._write()
        except Exception as error:
            cause = find_registration_error(error)
            if cause is None:
                raise
            raise SystemExit(f"error: {cause}") from None
        print(self.summary())

    def _measure(self, engine: Any) -> None:
        output = engine.state.output
        pair, ddf = output["label"], output["pred"]
        index = len(self.rows)
        row: dict[str, Any] = {"pair": index, **self._files(index)}
        for name in available_figures(pair) if self.figures is None else self.figures:
            try:
                figure = ValidationFigure(name, spacing=self.spacing)
            except ValueError as error:
                raise InputError(str(error)) from error
            row[name] = float(figure({"pred": ddf, "label": pair}))
            row[f"{name}_{_ZERO}"] = float(figure({"pred": torch.zeros_like(ddf), "label": pair}))
        self.rows.append(row)

    def _files(self, index: int) -> dict[str, str]:
        """Both scans of a pair, by file; generated pairs have none."""
        pairs = getattr(self.dataset, "pairs", None)
        if not isinstance(pairs, PairDataset):
            return {}
        pair = pairs.pair(index)
        return {key: os.fspath(pair[key]) for key in ("fixed", "moving") if isinstance(pair[key], str | os.PathLike)}

    def _write(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        self.table.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.table) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def summary(self) -> str:
        """Means and standard deviations as a table."""
        names = dict.fromkeys(key.removesuffix(f"_{_ZERO}") for row in self.rows for key in row)
        lines = [
            f"{len(self.rows)} pairs, mean +- standard deviation",
            f"{'':18s}{'network':>20s}{'no displacement':>20s}",
        ]
        for name in names:
            if any(f"{name}_{_ZERO}" in row for row in self.rows):
                cells = [_mean_std(row[key] for row in self.rows) for key in (name, f"{name}_{_ZERO}")]
                lines.append(f"{name:18s}{cells[0]:>20s}{cells[1]:>20s}")
        return "\n".join([*lines, f"each pair in {self.table}"])


def _mean_std(values: Iterable[float]) -> str:
    """Of the finite values: a label that neither image has makes no figure."""
    finite = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    if not len(finite):
        return "none"
    return f"{float(finite.mean()):.4f} +- {float(finite.std(correction=0)):.4f}"


def _three(spacing: float | Sequence[float] | None) -> tuple[float, float, float]:
    if spacing is None:
        return 1.0, 1.0, 1.0
    if isinstance(spacing, int | float):
        return float(spacing), float(spacing), float(spacing)
    a, b, c = spacing
    return float(a), float(b), float(c)
