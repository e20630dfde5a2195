"""Landmarks: every form gives the same LPS points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError, OutputError
from common.io import read_landmark_pair, read_landmarks, write_landmarks

POINTS = np.array([[1.5, -2.0, 3.0], [10.0, 20.25, -30.0]])

FCSV = """# Markups fiducial file version = 4.11
# CoordinateSystem = {system}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
n_0,{0},{1},{2},0,0,0,1,1,1,0,F-1,,
n_1,{3},{4},{5},0,0,0,1,1,1,0,"F, 2",,
"""


def markups(points: np.ndarray, system: str) -> str:
    controls = [{"id": str(i), "position": p, "positionStatus": "defined"} for i, p in enumerate(points.tolist())]
    return json.dumps({"markups": [{"type": "Fiducial", "coordinateSystem": system, "controlPoints": controls}]})


@pytest.mark.parametrize(
    "text",
    [
        "1.5 -2 3\n10 20.25 -30\n",
        "x,y,z\n1.5,-2,3\n10,20.25,-30",
        "# a comment\n\n1.5\t-2\t3  # the first\n 10 20.25 -30\n",
        "X Y Z\n1.5; -2; 3\n10; 20.25; -3e1\n",
        "\ufeff1.5 -2 3\r\n10 20.25 -30\r\n",
    ],
)
def test_text_forms(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    points = read_landmarks(tmp_path / "p.txt")
    assert points.dtype == np.float64
    np.testing.assert_array_equal(points, POINTS)


@pytest.mark.parametrize(("system", "sign"), [("LPS", 1), ("RAS", -1), ("0", -1), ("1", 1)])
def test_slicer_forms(tmp_path: Path, system: str, sign: int) -> None:
    stored = POINTS * [sign, sign, 1]
    (tmp_path / "p.fcsv").write_text(FCSV.format(*stored.ravel(), system=system))
    np.testing.assert_array_equal(read_landmarks(tmp_path / "p.fcsv"), POINTS)
    if system.isalpha():
        (tmp_path / "p.mrk.json").write_text(markups(stored, system))
        np.testing.assert_array_equal(read_landmarks(tmp_path / "p.mrk.json"), POINTS)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("two.txt", "1 2\n3 4\n", "2 columns"),
        ("four.csv", "x,y,z,t\n1,2,3,0\n", "4 columns"),
        ("ragged.txt", "1 2 3\n1 2\n", "line 2"),
        ("words.txt", "1 2 3\na b c\n", "line 2"),
        ("headers.txt", "a b c\nd e f\n1 2 3\n", "line 2"),
        ("nan.txt", "1 2 3\n1 nan 3\n", "row 2"),
        ("empty.txt", "# nothing\n", "no landmarks"),
        ("bad.mrk.json", "{}", "markups"),
        ("broken.mrk.json", "{", "markups"),
        ("flat.mrk.json", markups(np.ones((3, 2)), "LPS"), "markups"),
        ("ijk.fcsv", FCSV.format(*POINTS.ravel(), system="IJK"), "IJK"),
        ("short.fcsv", "n_0,1\n", "line 1"),
    ],
)
def test_defects_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}.*{words}"):
        read_landmarks(tmp_path / name)


def test_missing_binary_and_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\x9c")
    (tmp_path / "d.txt").mkdir()
    for name in ("missing.txt", "b.txt", "d.txt"):
        with pytest.raises(InputError, match=name):
            read_landmarks(tmp_path / name)


def test_written_points_read_back(tmp_path: Path) -> None:
    write_landmarks(tmp_path / "p.txt", POINTS)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "p.txt"), POINTS, atol=1e-6)
    np.testing.assert_allclose(read_landmarks(tmp_path / "p.txt"), POINTS, atol=1e-6)
    with pytest.raises(OutputError, match=r"no/p\.txt"):
        write_landmarks(tmp_path / "no" / "p.txt", POINTS)
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        write_landmarks(tmp_path / "q.txt", POINTS[:, :2])


def test_pairs_have_equal_numbers(tmp_path: Path) -> None:
    write_landmarks(tmp_path / "f.txt", POINTS)
    write_landmarks(tmp_path / "m.txt", POINTS + 1)
    fixed, moving = read_landmark_pair(tmp_path / "f.txt", tmp_path / "m.txt")
    np.testing.assert_allclose(moving - fixed, 1)
    write_landmarks(tmp_path / "m.txt", POINTS[:1])
    with pytest.raises(InputError, match=r"f\.txt holds 2 .*m\.txt holds 1"):
        read_landmark_pair(tmp_path / "f.txt", tmp_path / "m.txt")
