"""One picture of a registration: three planes by seven or more views, with the key figures below."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from common.geometry.spaces import Grid
from common.io.atomic import atomic_path

__all__ = ["write_report"]

_DPI = 100
_WIDTH, _COLUMNS = 18.0, 7  # inches, and the columns that share them; further ones add to the width
_MAX_ROWS_HEIGHT = 11.0  # inches for the three planes together
_LEFT, _GAP, _TOP, _BAR = 0.45, 0.06, 0.75, 0.55  # inches: row names, between cells, titles, colour bars
_LINE = 0.24  # inches per line of the footer
_UNCERTAINTY_NAMES: tuple[list[str], ...] = (  # by their number
    [],
    ["uncertainty"],
    ["uncertainty, coarse", "fine"],
    ["uncertainty, coarse", "middle", "fine"],
)
_TILES = 8  # squares of the checkerboard along the longest side
_YELLOW, _CYAN, _FOLDED = (1.0, 0.85, 0.1, 1.0), (0.1, 0.9, 1.0, 1.0), (0.0, 0.9, 0.0, 1.0)


@dataclass(frozen=True)
class _Plane:
    """How one plane is cut from a volume of axes (left, posterior, superior)."""

    name: str
    normal: int
    horizontal: int
    vertical: int
    edges: tuple[str, str, str, str]  # letters at the left, right, top and bottom


# Radiological: the patient faces the viewer, so the patient's right is on the viewer's left.
_PLANES = (
    _Plane("axial", 2, 0, 1, ("R", "L", "A", "P")),
    _Plane("coronal", 1, 0, 2, ("R", "L", "S", "I")),
    _Plane("sagittal", 0, 1, 2, ("A", "P", "S", "I")),
)


def write_report(
    path: str | os.PathLike[str],
    *,
    fixed: Any,
    moving: Any,
    warped: Any,
    magnitude: Any,
    jacobian: Any,
    grid: Grid,
    uncertainty: Any = None,
    fixed_label: Any = None,
    warped_label: Any = None,
    metrics: Mapping[str, Any] | None = None,
    title: str = "",
) -> None:
    """Write a PNG of fixed, moving and warped image, checkerboards, displacement and Jacobian determinant.

    The planes go through the middle of the fixed label, or of the fixed image's foreground without one. They are
    turned upright whatever the order of the voxel axes, and keep the physical proportions.

    Args:
        path: a `.png`.
        fixed: (D, H, W) on `grid`.
        moving: (D, H, W), the moving image on `grid` before the deformable stage.
        warped: (D, H, W), the moving image on `grid` after it.
        magnitude: (D, H, W), length of the displacement in mm.
        jacobian: (D, H, W), or (D-2, H-2, W-2) without the border, determinants.
        grid: the fixed grid.
        uncertainty: (L, D, H, W) in mm, coarse to fine; the first, a middle and the last one are shown. Or None.
        fixed_label: (D, H, W) or None, outlined in yellow on the fixed and the warped image.
        warped_label: (D, H, W) or None, outlined in cyan on the warped image.
        metrics: key figures for the footer; nested mappings are flattened, other than scalars are left out.
        title: the headline.

    Raises:
        OutputError: when the file cannot be written.
    """
    views = _Views(grid, fixed, fixed_label)
    volumes = {"fixed": fixed, "moving": moving, "warped": warped, "magnitude": magnitude}
    volumes = {name: views.upright(np.asarray(volume, dtype=np.float32)) for name, volume in volumes.items()}
    determinant = views.upright(_with_border(np.asarray(jacobian, dtype=np.float32), grid.shape))
    labels = [None if x is None else views.upright(np.asarray(x)) for x in (fixed_label, warped_label)]

    windows = {"fixed": views.window(volumes["fixed"])}
    # One window for the moving image before and after, so that a change of brightness is not an artefact of display.
    windows["moving"] = windows["warped"] = views.window(volumes["warped"], volumes["moving"])
    inner = determinant[views.box]
    inner = inner[np.isfinite(inner)]
    spread = float(np.clip(np.percentile(np.abs(inner - 1), 99.5), 0.1, 1.0)) if inner.size else 1.0
    top = max(float(np.percentile(volumes["magnitude"][views.box], 99.8)), 1e-3)
    maps = {
        "magnitude": ScalarMappable(Normalize(0, top), "viridis"),
        "jacobian": ScalarMappable(Normalize(1 - spread, 1 + spread), colormaps["RdBu_r"].with_extremes(bad="0.5")),
    }

    heat = [] if uncertainty is None else [views.upright(x) for x in _coarse_to_fine(np.asarray(uncertainty))]
    if heat:
        top = max(float(np.percentile([x[views.box] for x in heat], 99.8)), 1e-3)
        maps["uncertainty"] = ScalarMappable(Normalize(0, top), "inferno")

    lines = _footer_lines(metrics or {}, labels)
    sheet = _Sheet(views, columns=7 + len(heat), footer_lines=len(lines))
    names = ["fixed", "moving, before", "warped", "before | fixed", "warped | fixed", "displacement", "Jacobian"]
    names += _UNCERTAINTY_NAMES[len(heat)]
    for row, plane in enumerate(_PLANES):
        gray = {name: _scale(views.cut(volumes[name], plane), *windows[name]) for name in ("fixed", "moving", "warped")}
        pictures = [gray["fixed"], gray["moving"], gray["warped"]]
        pictures += [views.checkerboard(gray[name], gray["fixed"], plane) for name in ("moving", "warped")]
        pictures = [np.repeat(picture[..., None], 3, axis=-1) for picture in pictures]
        pictures.append(maps["magnitude"].to_rgba(views.cut(volumes["magnitude"], plane)))
        slice_of_jacobian = views.cut(determinant, plane)
        picture = maps["jacobian"].to_rgba(np.ma.masked_invalid(slice_of_jacobian))
        picture[slice_of_jacobian <= 0] = _FOLDED
        pictures.append(picture)
        pictures += [maps["uncertainty"].to_rgba(views.cut(volume, plane)) for volume in heat]
        cells = [sheet.show(row, column, picture) for column, picture in enumerate(pictures)]
        _name_edges(cells[0], plane)
        for label, color, shown_on in ((labels[0], _YELLOW, (0, 2)), (labels[1], _CYAN, (2,))):
            if label is not None:
                for column in shown_on:
                    outline = _outline(views.cut(label, plane), sheet.width_in_pixels(row), color)
                    extent = cells[column].images[0].get_extent()
                    cells[column].imshow(outline, aspect="auto", extent=extent, interpolation="nearest")
        if row == 0:
            for cell, name in zip(cells, names, strict=True):
                sheet.head(cell, name)
    sheet.color_bar(5, maps["magnitude"], "mm")
    folded = 100 * float((inner <= 0).mean()) if inner.size else 0.0
    sheet.color_bar(6, maps["jacobian"], f"green: folded, {folded:.2g} %")
    for column in range(7, 7 + len(heat)):
        sheet.color_bar(column, maps["uncertainty"], "mm")
    sheet.write_texts(title, lines)
    with atomic_path(path) as temporary:
        sheet.figure.savefig(temporary, dpi=_DPI, format="png")


class _Views:
    """Turning volumes upright and cutting them through the middle of the foreground."""

    def __init__(self, grid: Grid, fixed: Any, fixed_label: Any) -> None:
        # nibabel names the output axes R, A, S; given LPS affines they are L, P, S
        self._orientation = nib.orientations.io_orientation(grid.affine)
        source = np.argsort(self._orientation[:, 0]).astype(int)  # source[a]: the voxel axis along world axis a
        self.spacing = grid.spacing[source]
        shape = np.array(grid.shape)[source]
        upright = self.upright(np.asarray(fixed, dtype=np.float32))
        foreground = upright > _otsu(upright)
        labelled = foreground if fixed_label is None else self.upright(np.asarray(fixed_label)) != 0
        focus = labelled if labelled.any() else foreground  # what was outlined is what one wants to see
        box, self._centre = [], []
        for axis in range(3):
            low, high = _quantiles(foreground, axis, 0.002, 0.998)
            margin = math.ceil(0.06 * (high - low)) + 2
            middle = _quantiles(focus, axis, 0.5)[0]
            box.append(slice(max(0, min(low - margin, middle)), min(int(shape[axis]), max(high + margin, middle) + 1)))
            self._centre.append(middle)
        self.box = tuple(box)
        self.size = np.array([(part.stop - part.start) for part in box]) * self.spacing  # mm

    def upright(self, volume: np.ndarray) -> np.ndarray:
        """(D, H, W) on the grid to axes that run to the left, to the back and up (or nearest to that)."""
        return nib.orientations.apply_orientation(volume, self._orientation)

    def cut(self, volume: np.ndarray, plane: _Plane) -> np.ndarray:
        """(rows, columns) of the plane through the centre, first row at the top."""
        index: list[Any] = list(self.box)
        index[plane.normal] = self._centre[plane.normal]
        part = volume[tuple(index)]
        if plane.horizontal < plane.vertical:
            part = part.T
        return part[::-1] if plane.vertical == 2 else part

    def window(self, *volumes: np.ndarray) -> tuple[float, float]:
        """Darkest and brightest value to show."""
        values = np.concatenate([volume[self.box][::2, ::2, ::2].ravel() for volume in volumes])
        low, high = np.percentile(values[np.isfinite(values)], [0.5, 99.7])
        return float(low), float(max(high, low + 1e-6))

    def checkerboard(self, first: np.ndarray, second: np.ndarray, plane: _Plane) -> np.ndarray:
        """Squares of two pictures in turn."""
        side = self.size.max() / _TILES
        rows, columns = (np.arange(n) for n in first.shape)
        tile = (rows * self.spacing[plane.vertical] // side)[:, None] + columns * self.spacing[plane.horizontal] // side
        return np.where(tile % 2 == 0, first, second)


class _Sheet:
    """The figure: rows of planes at one common scale, columns of equal width."""

    def __init__(self, views: _Views, *, columns: int, footer_lines: int) -> None:
        self._cell = (_WIDTH - _LEFT - _GAP * _COLUMNS) / _COLUMNS
        self._width = _LEFT + (self._cell + _GAP) * columns
        widths = [views.size[plane.horizontal] for plane in _PLANES]
        heights = [views.size[plane.vertical] for plane in _PLANES]
        scale = min(self._cell / max(widths), (_MAX_ROWS_HEIGHT - 3 * _GAP) / sum(heights))  # inches per mm
        self._sizes = [(w * scale, h * scale) for w, h in zip(widths, heights, strict=True)]
        self._footer = _LINE * footer_lines + 0.15
        self._height = _TOP + sum(h + _GAP for _, h in self._sizes) + _BAR + self._footer
        # No pyplot: its global list of figures is neither thread-safe nor emptied by itself.
        self.figure = Figure(figsize=(self._width, self._height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def show(self, row: int, column: int, picture: np.ndarray) -> Axes:
        width, height = self._sizes[row]
        left = _LEFT + column * (self._cell + _GAP)
        bottom = self._height - _TOP - sum(h + _GAP for _, h in self._sizes[:row]) - height
        if column == 0:
            self._text(0.17, bottom + height / 2, _PLANES[row].name, rotation=90, va="center", ha="center")
        # A black cell of full width behind the picture, so that columns read as columns.
        self.figure.add_axes(self._box(left, bottom, self._cell, height), facecolor="black", xticks=[], yticks=[])
        axes = self.figure.add_axes(self._box(left + (self._cell - width) / 2, bottom, width, height))
        axes.imshow(np.clip(picture, 0, 1), aspect="auto", interpolation="antialiased")
        axes.set_axis_off()
        return axes

    def width_in_pixels(self, row: int) -> float:
        return self._sizes[row][0] * _DPI

    def head(self, axes: Axes, name: str) -> None:
        box = axes.get_position()
        self.figure.text((box.x0 + box.x1) / 2, box.y1 + 0.06 / self._height, name, ha="center", va="bottom", size=12)

    def color_bar(self, column: int, mappable: ScalarMappable, name: str) -> None:
        left = _LEFT + column * (self._cell + _GAP)
        axes = self.figure.add_axes(self._box(left + 0.1, self._footer + _BAR - 0.14, self._cell - 0.2, 0.12))
        bar = self.figure.colorbar(mappable, cax=axes, orientation="horizontal")
        bar.ax.tick_params(labelsize=9, pad=1)
        bar.ax.locator_params(nbins=5)
        bar.set_label(name, size=8, labelpad=1)

    def write_texts(self, title: str, lines: list[str]) -> None:
        self._text(
            _LEFT,
            self._height - 0.13,
            textwrap.shorten(title, 110, placeholder=" ..."),
            size=14,
            weight="bold",
            va="top",
        )
        note = "radiological view: the patient's right is on the left"
        self._text(self._width - _GAP, self._height - 0.15, note, size=9, color="0.4", ha="right", va="top")
        for number, line in enumerate(lines):
            self._text(_LEFT, self._footer - _LINE * (number + 0.5), line, size=11, family="monospace", va="center")

    def _text(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / self._width, y / self._height, text, **style)

    def _box(self, left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
        return left / self._width, bottom / self._height, width / self._width, height / self._height


def _coarse_to_fine(maps: np.ndarray) -> list[np.ndarray]:
    """The first, a middle and the last of (L, D, H, W); fewer where there are fewer."""
    chosen = sorted({0, len(maps) // 2, len(maps) - 1})
    return [maps[i] for i in chosen]


def _with_border(jacobian: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A determinant known at interior voxels only, with NaN at the border."""
    if jacobian.shape == shape:
        return jacobian
    full = np.full(shape, np.nan, dtype=np.float32)
    full[1:-1, 1:-1, 1:-1] = jacobian
    return full


def _scale(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((np.nan_to_num(picture, nan=low) - low) / (high - low), 0, 1)


def _quantiles(mask: np.ndarray, axis: int, *fractions: float) -> list[int]:
    """Positions along an axis below which the given parts of a mask lie."""
    counts = np.cumsum(mask.sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.int64))
    return [int(n) for n in np.searchsorted(counts, np.array(fractions) * counts[-1])]


def _otsu(volume: np.ndarray) -> float:
    """Threshold between background and foreground (Otsu, 1979, doi:10.1109/TSMC.1979.4310076)."""
    values = volume[::2, ::2, ::2].ravel()
    low, high = np.percentile(values, [0.5, 99.5])
    counts, edges = np.histogram(np.clip(values, low, max(high, low + 1e-6)), bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)
    total = np.cumsum(counts * centres)
    rest = weight[-1] - weight
    with np.errstate(divide="ignore", invalid="ignore"):
        between = weight * rest * (total / weight - (total[-1] - total) / rest) ** 2
    return float(centres[int(np.nanargmax(between[:-1]))])


def _outline(label: np.ndarray, pixels: float, color: tuple[float, float, float, float]) -> np.ndarray:
    """(rows, columns, 4) picture of the borders between labels, about one screen pixel wide."""
    # Never finer than the screen, where lines would fade or vanish.
    step = math.ceil(label.shape[1] / pixels)
    label = label[::step, ::step]
    factor = max(1, int(pixels // label.shape[1]))
    fine = label.repeat(factor, axis=0).repeat(factor, axis=1)
    border = np.zeros(fine.shape, dtype=bool)
    border[1:] |= fine[1:] != fine[:-1]
    border[:, 1:] |= fine[:, 1:] != fine[:, :-1]
    picture = np.zeros((*fine.shape, 4), dtype=np.float32)
    picture[border] = color
    return picture


def _name_edges(axes: Axes, plane: _Plane) -> None:
    for letter, x, y in zip(plane.edges, (0.03, 0.97, 0.5, 0.5), (0.5, 0.5, 0.97, 0.03), strict=True):
        ha = {0.03: "left", 0.97: "right"}.get(x, "center")
        va = {0.97: "top", 0.03: "bottom"}.get(y, "center")
        text = axes.text(x, y, letter, transform=axes.transAxes, color="white", size=10, weight="bold", ha=ha, va=va)
        text.set_path_effects([withStroke(linewidth=2, foreground="black")])  # legible on bright tissue too


def _footer_lines(metrics: Mapping[str, Any], labels: list[Any]) -> list[str]:
    entries = [f"{name} {value}" for name, value in _flatten(metrics)][:30]
    lines = []
    if entries:
        width = max(30, max(map(len, entries)) + 2)
        per_line = max(1, 195 // width)
        lines = ["".join(entry.ljust(width) for entry in entries[i : i + per_line]).rstrip()
                 for i in range(0, len(entries), per_line)]  # fmt: skip
    if any(label is not None for label in labels):
        lines.append("outlines: yellow fixed label, cyan warped label")
    return lines


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            entries += _flatten(value, f"{prefix}{name} ")
        elif isinstance(value, bool | int | np.integer | str):
            entries.append((f"{prefix}{name}", str(value)))
        elif isinstance(value, float | np.floating):
            entries.append((f"{prefix}{name}", f"{value:.4g}" if math.isfinite(value) else "not available"))
    return entries
