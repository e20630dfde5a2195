"""Rows of a CSV or JSON list: reading, checking, absolute paths, ids. The readers' ground floor."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import InputError

__all__ = [
    "SCAN_FILES",
    "Item",
    "PathLike",
    "absolute",
    "check_keys",
    "entries_of",
    "load_json",
    "load_json_object",
    "read_rows",
    "read_text",
    "scan_of",
    "stem",
    "with_ids",
]

Item = dict[str, str]
PathLike = str | os.PathLike[str]

SCAN_FILES = ("image", "label", "keypoints", "mask")
"""What a scan to train on may consist of."""


def read_text(path: Path) -> str:
    """Content of a text file."""
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except FileNotFoundError:
        raise InputError(f"'{path}': no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"'{path}': not a text file") from None
    except OSError as error:
        raise InputError(f"'{path}': cannot be read ({error.strerror})") from None


def load_json(path: Path) -> Any:
    """Content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"'{path}', line {error.lineno}: broken JSON ({error.msg})") from None


def load_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds one object."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise InputError(f"'{path}': a data set's description is a JSON object with lists such as 'training'")
    return content


def read_rows(path: Path) -> list[tuple[str, Item]]:
    """Rows of a list, each with the words that name it in an error; absent and empty values are left out."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise InputError(f"'{path}': a list is a .csv or a .json file")
    rows = _csv_rows(path) if suffix == ".csv" else _json_rows(path)
    if not rows:
        raise InputError(f"'{path}': the list is empty")
    return rows


def _csv_rows(path: Path) -> list[tuple[str, Item]]:
    reader = csv.reader(io.StringIO(read_text(path)), skipinitialspace=True, strict=True)
    rows: list[tuple[str, Item]] = []
    header: list[str] | None = None
    try:
        for line in reader:
            cells = [cell.strip() for cell in line]
            where = f"row {reader.line_num}"
            if not any(cells):
                continue
            if header is None:
                header = cells
                if len(set(header)) != len(header) or "" in header:
                    raise InputError(f"'{path}', {where}: a column has no name or the name of another column")
            elif len(cells) != len(header):
                raise InputError(f"'{path}', {where}: {len(cells)} cells for {len(header)} columns")
            else:
                rows.append((where, {key: cell for key, cell in zip(header, cells, strict=True) if cell}))
    except csv.Error as error:
        raise InputError(f"'{path}', row {reader.line_num}: broken CSV ({error})") from None
    return rows


def _json_rows(path: Path) -> list[tuple[str, Item]]:
    content = load_json(path)
    if not isinstance(content, list):
        raise InputError(f"'{path}': a list of scans or pairs is a JSON list of objects")
    rows: list[tuple[str, Item]] = []
    for number, entry in enumerate(content, start=1):
        if not isinstance(entry, dict):
            raise InputError(f"'{path}', entry {number}: it is not an object with keys such as 'fixed' and 'moving'")
        row: Item = {}
        for key, value in entry.items():
            if value is None or value == "":
                continue
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise InputError(f"'{path}', entry {number}: '{key}' is not a text")
            row[key] = str(value)
        rows.append((f"entry {number}", row))
    return rows


def check_keys(
    path: Path, rows: Sequence[tuple[str, Item]], *, required: Sequence[str], optional: Sequence[str]
) -> None:
    """Refuse a list with a missing or an unknown column or key."""
    known = (*required, *optional)
    for where, row in rows:
        unknown = [key for key in row if key not in known]
        if unknown:
            raise InputError(f"'{path}', {where}: unknown column or key '{unknown[0]}'; known: {', '.join(known)}")
    for key in required:
        without = [where for where, row in rows if key not in row]
        if len(without) == len(rows):
            raise InputError(f"'{path}': the column or key '{key}' is missing")
        if without:
            raise InputError(f"'{path}', {without[0]}: no value for '{key}'")


def absolute(path: Path, where: str, row: Item, *, files: Sequence[str]) -> Item:
    """The row with absolute paths (relative ones start at the list's folder), after a look whether they exist."""
    resolved = dict(row)
    for key in files:
        if key in row:
            # abspath, not resolve: a link keeps its name, which the ids and the usual folders are made of
            resolved[key] = os.path.abspath(path.parent / row[key])
            if not os.path.isfile(resolved[key]):
                raise InputError(f"'{path}', {where}: '{key}' is no file: '{resolved[key]}'")
    return resolved


def with_ids(path: Path, pairs: Sequence[tuple[str, Item]]) -> list[Item]:
    """The pairs with an "id" each: the given one, else MOVING_to_FIXED, numbered where that is taken."""
    taken: dict[str, str] = {}
    for where, pair in pairs:
        if "id" in pair:
            name = pair["id"]
            if name in taken:
                raise InputError(f"'{path}', {where}: the id '{name}' is also that of {taken[name]}")
            if name in (".", "..") or any(character in name for character in "/\\\0"):
                raise InputError(f"'{path}', {where}: the id '{name}' is not usable as a folder's name")
            taken[name] = where
    named: list[Item] = []
    for where, pair in pairs:
        name = pair.get("id", "")
        if not name:
            base = name = f"{stem(Path(pair['moving']))}_to_{stem(Path(pair['fixed']))}"
            count = 1
            while name in taken:
                count += 1
                name = f"{base}_{count}"
            taken[name] = where
        named.append({**pair, "id": name})
    return named


def stem(path: Path) -> str:
    """File name without its extension, both parts of `.nii.gz`."""
    name = path.name
    for suffix in (".nii.gz", ".gipl.gz", ".mgz"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem


def entries_of(path: Path, content: dict[str, Any], section: str) -> list[Any]:
    """The entries of one list of a json file, which must not be empty."""
    entries = content.get(section)
    if not isinstance(entries, list) or not entries:
        lists = ", ".join(key for key, value in content.items() if isinstance(value, list) and value) or "none"
        raise InputError(f"'{path}': it has no list '{section}' or an empty one; its lists: {lists}")
    return entries


def scan_of(path: Path, where: str, entry: Any) -> Item:
    """The files of one entry, a path or {"image": path, ...}, as absolute paths."""
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise InputError(f"'{path}', {where}: it is neither a path nor an object with an 'image'")
    files = {key: entry[key] for key in SCAN_FILES if isinstance(entry.get(key), str)}
    return absolute(path, where, files, files=SCAN_FILES)
