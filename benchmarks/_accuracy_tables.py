"""The accuracy table: a CSV for each method and data set, and a printed block for each kind of pairs."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import print_table
from common.io import atomic_path

Row = dict[str, Any]

FIGURE_NAMES = {
    "dice": "Dice",
    "hd95": "HD95 vox",
    "tre_mm": "TRE mm",
    "epe_mm": "EPE mm",
    "ncc": "NCC",
    "nmi": "NMI",
    "sdlogj": "SDlogJ",
    "folding_percent": "folding %",
    "seconds": "seconds",
    "peak_mib": "peak MiB",
}
_COLUMNS = ["id", *FIGURE_NAMES, "threads", "note", "problem"]
_DIGITS = {"hd95": 2, "tre_mm": 2, "epe_mm": 2, "folding_percent": 4, "seconds": 1, "peak_mib": 0}


def read_table(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def block_of(pair: str) -> str:
    """The block of the table that a pair belongs to, by its id."""
    found = re.match(r"hippocampus|generated|lung_mri", pair)
    return found[0] if found else pair


def values_of(rows: Iterable[Row], figure: str) -> np.ndarray:
    """A figure of the rows that have it; an infinite one stays (HD95 of a label that vanished)."""
    return np.array([float(row[figure]) for row in rows if row.get(figure) not in (None, "")], dtype=np.float64)


def read_blocks(folder: Path, data_sets: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, list[Row]]]:
    """Block -> method -> rows, of the methods that are named, in their order."""
    blocks: dict[str, dict[str, list[Row]]] = {}
    for data_set in data_sets:
        for name in names:
            for row in read_table(folder / "tables" / f"{data_set}__{name}.csv"):
                blocks.setdefault(block_of(row["id"]), {}).setdefault(name, []).append(row)
    return blocks


def print_blocks(blocks: Mapping[str, Mapping[str, Sequence[Row]]], titles: Mapping[str, str]) -> None:
    """A table for each block: means over the pairs, and standard deviations where there are several."""
    for block, methods in blocks.items():
        every = [row for rows in methods.values() for row in rows]
        columns = [key for key in FIGURE_NAMES if len(values_of(every, key))]
        lines = []
        for name, rows in methods.items():
            done = [row for row in rows if not row.get("problem")]
            cells = [_cell(values_of(done, key), key) for key in columns]
            lines.append([titles.get(name, name), f"{len(done)}/{len(rows)}", *cells])
        print_table(block, ["method", "pairs", *(FIGURE_NAMES[key] for key in columns)], lines)
    print("\nmeans +- standard deviations; * without infinite values (a label vanished)")
    print("folding and SDlogJ: of the deformable stage; seconds: affine stage and registration, without files;")
    print("peak MiB: highest of the method's process over the data set")
    for note in _notes(blocks, titles):
        print(note)


def _cell(values: np.ndarray, figure: str) -> str | None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    digits = _DIGITS.get(figure, 3)
    if figure == "peak_mib":
        return f"{finite.max():.{digits}f}"
    text = f"{finite.mean():.{digits}f}"
    if len(finite) > 1:
        text += f" +- {finite.std():.{digits}f}"
    return text + ("*" if len(finite) < len(values) else "")


def _notes(blocks: Mapping[str, Mapping[str, Sequence[Row]]], titles: Mapping[str, str]) -> list[str]:
    """What methods said of their settings, each once."""
    found: dict[str, list[str]] = {}
    for block, methods in blocks.items():
        for name, rows in methods.items():
            for note in dict.fromkeys(row.get("note") or "" for row in rows):
                if note and not note.startswith("network grid"):
                    found.setdefault(f"{titles.get(name, name)}: {note}", []).append(block)
    return [f"{note} ({', '.join(dict.fromkeys(where))})" for note, where in found.items()]
