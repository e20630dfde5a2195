"""The table of paired tests against p-values counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.training.comparison import compare_figures, read_figures

HEAD = "id,fixed,dice,dice_zero_displacement,hd95,seconds\n"


def table(path: Path, dices: list[str], hd95s: list[str]) -> dict[str, dict[str, float]]:
    path.write_text(
        HEAD + "".join(f"p{n},f.nii,{d},0.1,{h},1\n" for n, (d, h) in enumerate(zip(dices, hd95s, strict=True)))
    )
    return read_figures(path)


def cells(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(name)]
    return line.split(maxsplit=5)


def test_reads_numbers_only(tmp_path: Path) -> None:
    figures = table(tmp_path / "t.csv", ["0.5", ""], ["inf", "nan"])
    assert figures["p0"] == {"dice": 0.5, "dice_zero_displacement": 0.1, "hd95": float("inf"), "seconds": 1.0}
    assert "dice" not in figures["p1"]


@pytest.mark.parametrize(
    ("differences", "p", "median"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 2 / 256, 4.5),  # one of the 256 ways to choose the signs
        ([1, 2, 3, 4, 5, 6, 7, -8], 2 * 25 / 256, 3.5),  # 25 sets of ranks sum up to 8 at most
        ([-1, -2, -3, -4, -5, -6], 2 / 64, -3.5),
        ([0, 0, 1, 2, 3, 4, 5, 6], None, 2.5),  # zeros do not count: six differences, approximately
    ],
)
def test_p_values(tmp_path: Path, differences: list[int], p: float | None, median: float) -> None:
    count = len(differences)
    there = table(tmp_path / "there.csv", [str(n) for n in range(count)], ["1"] * count)
    here = table(tmp_path / "here.csv", [str(n + d) for n, d in enumerate(differences)], ["1"] * count)
    lines = compare_figures(here, there, ["dice", "hd95", "tre_mm"])
    assert lines[0].split() == ["n", "mean", "here", "mean", "there", "median", "difference", "p"]
    _, n, mean_here, mean_there, middle, found = cells(lines, "dice")
    assert int(n) == count and float(middle) == median
    assert float(mean_here) - float(mean_there) == pytest.approx(sum(differences) / count, abs=2e-4)
    assert float(found) == pytest.approx(p, rel=0.05) if p is not None else 0.01 < float(found) < 0.05
    assert cells(lines, "hd95")[1:] == [str(count), "1.0000", "1.0000", "0.0000", "all equal"]
    assert len(lines) == 3  # no tre_mm, which neither has


def test_few_pairs_and_values_that_are_not_finite(tmp_path: Path) -> None:
    here = table(tmp_path / "here.csv", ["1", "2", "3", "4", "5", "nan", "7"], ["inf"] * 7)
    there = table(tmp_path / "there.csv", ["0", "0", "0", "0", "0", "0", ""], ["1"] * 7)
    lines = compare_figures(here, there, ["dice", "hd95"])
    assert cells(lines, "dice")[1:] == ["5", "3.0000", "0.0000", "3.0000", "too few"]
    assert cells(lines, "hd95") == ["hd95", "0", "none", "none", "none", "too few"]
    assert compare_figures(here, there, ["tre_mm"]) == ["no figure is in both tables"]


def test_pairs_are_matched_by_id_not_by_row(tmp_path: Path) -> None:
    here = table(tmp_path / "here.csv", [str(n) for n in range(8)], ["1"] * 8)
    backwards = dict(reversed(here.items()))
    backwards["stranger"] = {"dice": 99.0}
    assert cells(compare_figures(here, backwards, ["dice"]), "dice")[1:] == [
        "8",
        "3.5000",
        "3.5000",
        "0.0000",
        "all equal",
    ]
