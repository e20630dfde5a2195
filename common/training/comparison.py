"""One evaluation against another, pair by pair."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from common.data._rows import read_text
from common.errors import InputError

__all__ = ["compare_figures", "read_figures"]

# With five differences or fewer the smallest p of a two-sided signed-rank test is 2 / 2^5 = 0.06.
_FEWEST = 6


def read_figures(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """The figures of an evaluation's table, by the pair's id.

    Args:
        path: an evaluation.csv.

    Returns:
        id -> column -> value, those that are numbers.

    Raises:
        InputError: when the file is missing or not such a table.
    """
    reader = csv.DictReader(io.StringIO(read_text(Path(path))))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"'{path}': broken CSV ({error})") from None
    if "id" not in (reader.fieldnames or ()):
        raise InputError(f"'{path}' is not the evaluation.csv of an evaluation: it has no column 'id'")
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        values = {key: _number(value) for key, value in row.items() if key != "id"}
        table[str(row["id"])] = {key: value for key, value in values.items() if value is not None}
    return table


def compare_figures(
    here: Mapping[str, Mapping[str, Any]], there: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> list[str]:
    """Paired Wilcoxon signed-rank tests, two-sided, as the lines of a table.

    Pairs with the same value on both sides do not count for the test; where fewer than six are left, no test can come
    to a p below 0.05, and none is made.

    Args:
        here, there: id -> figure -> value.
        names: the figures of `here` to compare; those that `there` has, too, are.

    Returns:
        a head line and one line for each figure that both have: its name, number of pairs with a finite value on both
        sides, means, median of the differences here minus there, and p.
    """
    common = [pair for pair in here if pair in there]
    lines = [f"{'':18s}{'n':>5s}{'mean here':>14s}{'mean there':>14s}{'median difference':>20s}{'p':>12s}"]
    for name in names:
        if not any(name in values for values in there.values()):
            continue
        both = [(here[p].get(name, math.nan), there[p].get(name, math.nan)) for p in common]
        values = np.array([pair for pair in both if all(map(math.isfinite, pair))], dtype=np.float64).reshape(-1, 2)
        if not len(values):
            lines.append(f"{name:18s}{0:5d}{'none':>14s}{'none':>14s}{'none':>20s}{'too few':>12s}")
            continue
        mean_here, mean_there = values.mean(axis=0)
        differences = values[:, 0] - values[:, 1]
        median = float(np.median(differences))
        lines.append(
            f"{name:18s}{len(values):5d}{mean_here:14.4f}{mean_there:14.4f}{median:20.4f}{_p(differences):>12s}"
        )
    return lines if len(lines) > 1 else ["no figure is in both tables"]


def _p(differences: np.ndarray) -> str:
    changed = differences[differences != 0]
    if not len(changed):
        return "all equal"
    return f"{float(wilcoxon(changed).pvalue):.2g}" if len(changed) >= _FEWEST else "too few"


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
