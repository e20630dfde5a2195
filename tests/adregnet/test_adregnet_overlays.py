"""The overlays of AD-RegNet: what they change, and that they train on data of their layouts."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_list import ROOT
from dirlab_layout import make_case
from ixi_layout import make_ixi
from monai.bundle import ConfigWorkflow

from common.data.dirlab import DIRLAB_CASES, DirLabCase

BUNDLE = ROOT / "bundles" / "adregnet"
TINY = {
    "bundle_root": str(BUNDLE),
    "device": "cpu",
    "network_def#channels": [2, 2, 4, 4, 4],
    "epoch_length": 1,
    "max_epochs": 1,
}

Load = Callable[..., ConfigWorkflow]


@pytest.fixture
def load(workflow: Load, tmp_path: Path) -> Load:
    """train.json with an overlay, and evaluate.json where asked for."""

    def run(overlay: str, *more: str, **changes: Any) -> ConfigWorkflow:
        output = {"output_dir": str(tmp_path / "out")}
        return workflow(BUNDLE, ["train", overlay, *more], "train", **{**TINY, **output, **changes})

    return run


@pytest.fixture
def dirlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two cases, much smaller than they are."""
    generator = np.random.default_rng(0)
    for case, shape in ((1, (40, 36, 17)), (8, (30, 44, 20))):
        monkeypatch.setitem(DIRLAB_CASES, case, DirLabCase(shape, (2.0, 2.5, 4.0)))
        volumes = tuple(generator.integers(0, 2000, shape).astype(np.int16) for _ in range(2))
        points = tuple(generator.integers(4, np.array(shape) - 5, (300, 3)) for _ in range(2))
        make_case(tmp_path / "dirlab", case, volumes=(volumes[0], volumes[1]), landmarks=(points[0], points[1]))
    return str(tmp_path / "dirlab")


def test_dirlab_crops_in_the_plane_and_pads_the_slices(load: Load, dirlab: str, tmp_path: Path) -> None:
    run = load("dirlab", dataset_dir=dirlab, validation="case8", crop=[32, 32, None])
    (pair,) = (run.parser.get_parsed_content("train#dataset")[0],)
    assert pair["image"].shape == (2, 32, 32, 32)  # 17 slices
    np.testing.assert_allclose(pair["spacing"], (2.0, 2.5, 4.0), rtol=1e-6)
    assert run.parser.get_parsed_content("loss").landmark_error is None
    run.run()
    assert (tmp_path / "out" / "model.pt").is_file()


def test_dirlab_is_evaluated_in_its_own_window(load: Load, dirlab: str, tmp_path: Path) -> None:
    load("dirlab", dataset_dir=dirlab, validation="case8", crop=[32, 32, None]).run()
    weights = str(tmp_path / "out" / "model.pt")
    run = load("dirlab", "evaluate", dataset_dir=dirlab, validation="all", weights=weights)
    assert run.parser["window"] == [-1000, 500]
    run.run()
    with open(tmp_path / "out" / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["case1", "case8"]
    assert all(float(row["tre_snapped_mm"]) > 0 for row in rows)


def test_ixi_takes_the_intensities_as_they_are(load: Load, tmp_path: Path) -> None:
    make_ixi(tmp_path, shape=(32, 32, 32))
    run = load("ixi", dataset_dir=str(tmp_path / "IXI_data"), shape=[32, 32, 32])
    image = run.parser.get_parsed_content("train#dataset")[0]["image"]
    assert image.shape == (2, 32, 32, 32) and image.min() >= 0 and image.max() <= 1
    run.run()
    assert (tmp_path / "out" / "model.pt").is_file()


@pytest.mark.parametrize(
    ("name", "cross", "regional", "heads"),
    [
        ("no_cross_attention", 0, 5, 5),
        ("no_regional_attention", 4, 0, 5),
        ("no_multi_resolution", 4, 5, 1),
        ("no_attention", 0, 0, 5),
    ],
)
def test_ablations_leave_out_what_their_names_say(load: Load, name: str, cross: int, regional: int, heads: int) -> None:
    network = load(f"ablation_{name}").parser.get_parsed_content("network")
    assert sum(level.cross_attention is not None for level in network.levels) == cross
    assert sum(level.regional_attention is not None for level in network.levels) == regional
    assert len(network.heads) == heads
