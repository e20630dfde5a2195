"""The plots of the accuracy table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from benchmarks._accuracy_tables import FIGURE_NAMES, values_of
from common.io import atomic_path

Row = dict[str, Any]
Blocks = Mapping[str, Mapping[str, Sequence[Row]]]

_BETTER = dict.fromkeys(("dice", "ncc", "nmi"), "more is better")
_ACCURACY = ("dice", "epe_mm", "tre_mm", "nmi", "ncc")  # the first that a block has is its accuracy
_LOGARITHMIC = ("seconds", "peak_mib")
_COLOURS = plt.get_cmap("tab20")


def draw(blocks: Blocks, titles: Mapping[str, str], folder: Path) -> list[Path]:
    """A PNG for each block with several pairs, one for all single pairs, and one of accuracy against cost."""
    colours = {name: _COLOURS(index % 20) for index, name in enumerate(titles)}
    done = {
        block: {name: [row for row in rows if not row.get("problem")] for name, rows in methods.items()}
        for block, methods in blocks.items()
    }
    single = {block: methods for block, methods in done.items() if max(map(len, methods.values())) == 1}
    several = {block: methods for block, methods in done.items() if block not in single}
    paths = [_draw_block(block, methods, titles, colours, folder) for block, methods in several.items()]
    if single:
        paths.append(_draw_single(single, titles, colours, folder))
    if several:
        paths.append(_draw_trade_off(several, titles, colours, folder))
    return paths


def accuracy_of(methods: Mapping[str, Sequence[Row]]) -> str:
    """The figure that says most of a block."""
    rows = [row for rows in methods.values() for row in rows]
    return next((name for name in _ACCURACY if len(values_of(rows, name))), "ncc")


def _finite(rows: Sequence[Row], figure: str) -> np.ndarray:
    values = values_of(rows, figure)
    return values[np.isfinite(values)]


def _draw_block(
    block: str,
    methods: Mapping[str, Sequence[Row]],
    titles: Mapping[str, str],
    colours: Mapping[str, Any],
    folder: Path,
) -> Path:
    """Box and points of each figure by method."""
    every = [row for rows in methods.values() for row in rows]
    figures = [name for name in FIGURE_NAMES if len(values_of(every, name))]
    columns = 3
    lines = -(-len(figures) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, (0.9 + 0.3 * len(methods)) * lines), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes.flat, figures, strict=False):
        for place, (method, rows) in enumerate(methods.items()):
            values = _finite(rows, name)
            if name == "peak_mib":
                values = values.max(keepdims=True) if len(values) else values  # one for the whole process
            if not len(values):
                continue
            if len(values) > 1:
                axis.boxplot(values, positions=[place], vert=False, widths=0.6, showfliers=False)
            jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(values)) if len(values) > 1 else [0.0]
            axis.scatter(values, place + np.asarray(jitter), s=9, color=colours[method], zorder=3)
        axis.set_yticks(range(len(methods)), [titles.get(method, method) for method in methods])
        axis.invert_yaxis()
        axis.set_title(f"{FIGURE_NAMES[name]} ({_BETTER.get(name, 'less is better')})", fontsize=10)
        if name in _LOGARITHMIC and (values_of(every, name) > 0).any():
            axis.set_xscale("log")
        axis.grid(axis="x", alpha=0.3)
    for axis in axes.flat[len(figures) :]:
        axis.axis("off")
    count = max(map(len, methods.values()))
    figure.suptitle(f"{block}, {count} pairs")
    return _save(figure, folder / f"accuracy_{block}.png")


def _draw_single(single: Blocks, titles: Mapping[str, str], colours: Mapping[str, Any], folder: Path) -> Path:
    """Bars of the accuracy of each pair that is its own block."""
    columns = min(3, len(single))
    lines = -(-len(single) // columns)
    height = 0.9 + 0.25 * max(map(len, single.values()))
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, height * lines), squeeze=False, layout="constrained"
    )
    for axis, (block, methods) in zip(axes.flat, single.items(), strict=False):
        name = accuracy_of(methods)
        for place, (method, rows) in enumerate(methods.items()):
            values = _finite(rows, name)
            if len(values):
                axis.barh(place, values[0], color=colours[method])
                axis.text(values[0], place, f" {values[0]:.3g}", va="center", fontsize=8)
        axis.set_yticks(range(len(methods)), [titles.get(method, method) for method in methods], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(f"{block}: {FIGURE_NAMES[name]} ({_BETTER.get(name, 'less is better')})", fontsize=10)
    for axis in axes.flat[len(single) :]:
        axis.axis("off")
    return _save(figure, folder / "accuracy_single_pairs.png")


def _draw_trade_off(several: Blocks, titles: Mapping[str, str], colours: Mapping[str, Any], folder: Path) -> Path:
    """Mean accuracy against SDlogJ and against seconds."""
    figure, axes = plt.subplots(len(several), 2, figsize=(12, 4 * len(several)), squeeze=False, layout="constrained")
    for line, (block, methods) in zip(axes, several.items(), strict=True):
        accuracy = accuracy_of(methods)
        for axis, cost in zip(line, ("sdlogj", "seconds"), strict=True):
            for method, rows in methods.items():
                place, value = _finite(rows, cost), _finite(rows, accuracy)
                if not (len(place) and len(value)) or (cost == "seconds" and place.mean() <= 0):
                    continue
                axis.scatter(place.mean(), value.mean(), color=colours[method], s=40)
                axis.annotate(
                    titles.get(method, method),
                    (place.mean(), value.mean()),
                    xytext=(5, 3),
                    textcoords="offset points",
                    fontsize=8,
                )
            if cost == "seconds":
                axis.set_xscale("log")
            axis.set(xlabel=FIGURE_NAMES[cost], ylabel=FIGURE_NAMES[accuracy], title=block)
            axis.margins(0.15)
            axis.grid(alpha=0.3)
    return _save(figure, folder / "accuracy_against_cost.png")


def _save(figure: Any, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return path
