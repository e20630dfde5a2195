"""Reading and writing landmarks: always (N, 3) float64 in LPS mm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.io.atomic import atomic_path

__all__ = ["read_landmark_pair", "read_landmarks", "write_landmarks"]

_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


def read_landmarks(path: str | os.PathLike[str]) -> np.ndarray:
    """Read points.

    Args:
        path: one of
            text with three columns x y z in LPS mm, separated by spaces, commas, semicolons or tabs, with an optional
            header line and `#` comments; 3D Slicer's `.fcsv` or `.mrk.json`, whose coordinate system (RAS or LPS) the
            file states.

    Returns:
        (N, 3) float64, LPS mm.

    Raises:
        InputError: when the file is missing or holds something else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file of landmarks") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    name = path.name.lower()
    if name.endswith(".json"):
        points = _parse_markups(path, text)
    elif name.endswith(".fcsv"):
        points = _parse_fcsv(path, text)
    else:
        points = _parse_columns(path, text)
    if not len(points):
        raise InputError(f"{path} holds no landmarks")
    if not np.isfinite(points).all():
        raise InputError(f"{path} holds a landmark that is not a number in row {_first_bad_row(points)}")
    return points


def read_landmark_pair(
    fixed_path: str | os.PathLike[str], moving_path: str | os.PathLike[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Read corresponding landmarks: row n of both files is the same place of the body.

    Returns:
        the fixed and the moving points, (N, 3) float64 each, LPS mm.

    Raises:
        InputError: as `read_landmarks`, and when the numbers differ.
    """
    fixed, moving = read_landmarks(fixed_path), read_landmarks(moving_path)
    if len(fixed) != len(moving):
        raise InputError(
            f"{fixed_path} holds {len(fixed)} landmarks but {moving_path} holds {len(moving)}; "
            "corresponding landmarks come in equal numbers"
        )
    return fixed, moving


def write_landmarks(path: str | os.PathLike[str], points: np.ndarray) -> None:
    """Write points as text that `read_landmarks` and `numpy.loadtxt` read.

    Args:
        path: the file.
        points: (N, 3), LPS mm.

    Raises:
        OutputError: when it cannot be written.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"landmarks are an array (N, 3), got {points.shape}")
    with atomic_path(path) as temporary:
        # %.17g would be exact; a nanometre is enough and reads better
        np.savetxt(temporary, points, fmt="%.6f", header="x y z (LPS, mm)")


def _parse_columns(path: Path, text: str) -> np.ndarray:
    rows: list[list[float]] = []
    header_allowed = True
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.split("#", 1)[0].replace(",", " ").replace(";", " ").split()
        if not content:
            continue
        try:
            row = [float(word) for word in content]
        except ValueError:
            if header_allowed:
                header_allowed = False
                continue
            raise InputError(f"{path} holds something other than numbers in line {number}") from None
        header_allowed = False
        if len(row) != 3:
            raise InputError(f"{path} has {len(row)} columns in line {number}; 3 are needed (x y z in LPS mm)")
        rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _parse_fcsv(path: Path, text: str) -> np.ndarray:
    """Slicer's fiducial list: comments `# CoordinateSystem = ...` and `# columns = id,x,y,z,...`, then one row each."""
    system, columns = "RAS", ["id", "x", "y", "z"]
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#"):
            key, _, value = line.lstrip("# ").partition("=")
            if key.strip().lower() == "coordinatesystem":
                system = value.strip()
            elif key.strip().lower() == "columns":
                columns = [name.strip().lower() for name in value.split(",")]
        elif line.strip():
            fields = dict(zip(columns, line.split(","), strict=False))
            try:
                rows.append([float(fields[axis]) for axis in "xyz"])
            except (KeyError, ValueError):
                raise InputError(f"{path} has no coordinates x, y, z in line {number}") from None
    return np.array(rows, dtype=np.float64).reshape(-1, 3) * _sign(path, system)


def _parse_markups(path: Path, text: str) -> np.ndarray:
    """Slicer's markups, as in Slicer's markups-schema-v1.0.3.json."""
    try:
        (markup,) = json.loads(text)["markups"]
        points = [point["position"] for point in markup["controlPoints"]]
        system = str(markup.get("coordinateSystem", "LPS"))
        array = np.array([[float(x), float(y), float(z)] for x, y, z in points], dtype=np.float64).reshape(-1, 3)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path} is not a Slicer markups file with one list of placed points") from None
    return array * _sign(path, system)


def _sign(path: Path, system: str) -> np.ndarray:
    # Slicer before 4.11 wrote numbers
    if system.upper() in ("RAS", "0"):
        return _RAS_TO_LPS
    if system.upper() in ("LPS", "1"):
        return np.ones(3)
    raise InputError(f"{path} is in the coordinate system {system!r}; RAS or LPS is needed")


def _first_bad_row(points: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0]) + 1
