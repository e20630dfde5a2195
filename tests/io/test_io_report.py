"""The report's picture is upright, proportioned and complete."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from grids import centred_grid, rotation
from matplotlib import colormaps
from matplotlib.image import imread

from common.errors import OutputError
from common.geometry.spaces import Grid
from common.io import report, write_report

CENTRE = np.array([20.0, -30.0, 40.0])


def marked(grid: Grid) -> np.ndarray:
    """A body at the grids' common centre with a bright spot at its left, front and top."""
    x = grid.to_physical(np.indices(grid.shape).reshape(3, -1).T) - CENTRE
    body = 50.0 * (np.abs(x / [10, 11, 12]) < 1).all(1)
    spot = 100 * np.exp(-((x - [5, -6, 7]) ** 2).sum(1) / 40)
    return (body + spot).reshape(grid.shape).astype(np.float32)


def write(path: Path, grid: Grid, **changes: object) -> np.ndarray:
    picture = changes.get("fixed", marked(grid))
    content = {
        "fixed": picture,
        "moving": picture[::-1],
        "warped": picture,
        "magnitude": np.linspace(0, 5, picture.size).reshape(grid.shape),
        "jacobian": np.ones(grid.shape),
        "grid": grid,
        "metrics": {"ncc": {"before": 0.5, "after": 0.9}, "tre_mm": float("nan"), "version": "1", "list": [1]},
        "title": "moving to fixed",
    }
    write_report(path, **(content | changes))
    return imread(path)[..., :3]


def test_planes_are_upright(grid: Grid) -> None:
    volume = marked(grid)
    views = report._Views(grid, volume, None)
    upright = views.upright(volume)
    # the spot lies at the patient's left = right of the picture, front = top or left, top = top
    sides = {"axial": ("right", "top"), "coronal": ("right", "top"), "sagittal": ("left", "top")}
    for plane in report._PLANES:
        picture = views.cut(upright, plane)
        top, bottom = np.array_split(picture, [picture.shape[0] // 2])
        left, right = np.array_split(picture, [picture.shape[1] // 2], axis=1)
        assert top.max() > bottom.max(), plane.name
        assert (right.max() > left.max()) == (sides[plane.name][0] == "right"), plane.name
        # voxels are stretched to millimetres
        size = np.array(picture.shape) * views.spacing[[plane.vertical, plane.horizontal]]
        np.testing.assert_allclose(size, views.size[[plane.vertical, plane.horizontal]])


def test_planes_go_through_the_label(grid: Grid) -> None:
    label = np.zeros(grid.shape, np.int16)
    label[3, 4, 5] = 7
    views = report._Views(grid, marked(grid), label)
    for plane in report._PLANES:
        assert 7 in views.cut(views.upright(label), plane)


def test_picture(tmp_path: Path, grid: Grid) -> None:
    picture = write(tmp_path / "report.png", grid)
    assert picture.shape[1] == 1800
    assert 400 < picture.shape[0] < 1600
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]


def green(picture: np.ndarray) -> int:
    return int((np.abs(picture - np.array(report._FOLDED[:3])).max(-1) < 0.02).sum())


def test_folding_is_marked(tmp_path: Path, grid: Grid) -> None:
    assert green(write(tmp_path / "a.png", grid)) == 0
    folded = np.ones(tuple(n - 2 for n in grid.shape))  # the determinant without its border
    folded[tuple(slice(n // 2 - 3, n // 2 + 2) for n in folded.shape)] = -0.5
    assert green(write(tmp_path / "b.png", grid, jacobian=folded)) > 100


def test_outlines(tmp_path: Path, grid: Grid) -> None:
    label = (marked(grid) > 40).astype(np.int16)
    plain = write(tmp_path / "a.png", grid)
    outlined = write(tmp_path / "b.png", grid, fixed_label=label, warped_label=np.roll(label, 1, axis=0))

    def coloured(picture: np.ndarray, color: tuple[float, ...]) -> int:
        cells = picture[: plain.shape[0] // 2, : picture.shape[1] * 3 // 7]  # the footer and the maps are elsewhere
        return int((np.abs(cells - np.array(color[:3])).max(-1) < 0.1).sum())

    for color in (report._YELLOW, report._CYAN):
        assert coloured(plain, color) == 0
        assert coloured(outlined, color) > 100


@pytest.mark.parametrize(
    ("levels", "shown", "names"),
    [
        (1, [1], ["uncertainty"]),
        (2, [1, 2], ["uncertainty, coarse", "fine"]),
        (8, [1, 5, 8], ["uncertainty, coarse", "middle", "fine"]),
    ],
)
def test_uncertainty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: int, shown: list[int], names: list[str]
) -> None:
    """Level n has the value n everywhere: at most three levels, one colour scale, beside what is always there."""
    grid = centred_grid((18, 16, 14), rotation(20, 2) @ rotation(-15, 0), [1.5, 2.0, 2.5])
    heads: list[str] = []
    head = report._Sheet.head
    monkeypatch.setattr(report._Sheet, "head", lambda sheet, axes, name: heads.append(name) or head(sheet, axes, name))
    plain = write(tmp_path / "a.png", grid)
    heads.clear()
    maps = np.stack([np.full(grid.shape, n + 1.0) for n in range(levels)])
    picture = write(tmp_path / "b.png", grid, uncertainty=maps)
    assert heads[7:] == names
    assert plain.shape[0] == picture.shape[0]
    left, step = 100 * report._LEFT, (plain.shape[1] - 100 * report._LEFT) / 7
    assert picture.shape[1] == pytest.approx(left + step * (7 + len(shown)), abs=2)
    body = slice(int(100 * report._TOP), -150)  # without the title and the footer
    np.testing.assert_array_equal(picture[body, :1790], plain[body, :1790])
    for column, value in enumerate(shown, start=7):
        strip = picture[body, int(left + step * column) + 12 : int(left + step * (column + 1)) - 12]
        is_colour = [np.abs(strip - colormaps["inferno"](n / levels)[:3]).max(-1) < 0.01 for n in shown]
        areas = [int(match.sum()) for match in is_colour]
        assert shown[int(np.argmax(areas))] == value
        assert areas[shown.index(value)] > 5000


def test_no_field_at_all(tmp_path: Path, grid: Grid) -> None:
    write(tmp_path / "a.png", grid, magnitude=np.zeros(grid.shape), metrics=None, title="")


def test_unwritable(tmp_path: Path, grid: Grid) -> None:
    with pytest.raises(OutputError, match=r"no/r\.png"):
        write(tmp_path / "no" / "r.png", grid)


@pytest.mark.slow
def test_full_size_takes_seconds(tmp_path: Path) -> None:
    grid = Grid((160, 192, 224), np.eye(4))
    volume = np.random.default_rng(0).random(grid.shape, dtype=np.float32)
    start = time.perf_counter()
    write(tmp_path / "a.png", grid, fixed=volume, moving=volume, warped=volume, magnitude=volume, jacobian=volume)
    assert time.perf_counter() - start < 20  # 2 s here; leaves room for a busy machine
