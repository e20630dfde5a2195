"""DIR-Lab and IXI through the bundle's own train.json and evaluate.json, on generated files of their layouts."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dirlab_layout import make_case
from ixi_layout import LEFT_RIGHT, SINGLE, make_ixi
from monai.bundle import ConfigWorkflow

from common.data.dirlab import DIRLAB_CASES, DirLabCase
from common.data.ixi import IXI_STRUCTURES
from common.geometry.spaces import Grid, PairGrids
from common.layers.warp import warp
from common.metrics import tre_mm
from common.training.learn2reg import MeasuredPair

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "recorr"
TINY = {"bundle_root": str(BUNDLE), "device": "cpu", "network_def#iterations": [1, 1, 0, 0]}

Evaluate = Callable[..., list[dict[str, str]]]


@pytest.fixture
def evaluate(workflow: Callable[..., ConfigWorkflow], tmp_path: Path) -> Evaluate:
    """Runs evaluate.json; returns the rows of evaluation.csv."""

    def run(**changes: Any) -> list[dict[str, str]]:
        output_dir = tmp_path / "out"
        workflow(BUNDLE, ["train", "evaluate"], "train", **{**TINY, "output_dir": str(output_dir), **changes}).run()
        with open(output_dir / "evaluation.csv", newline="") as file:
            return list(csv.DictReader(file))

    return run


@pytest.fixture
def dirlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Three cases, much smaller than they are; and their landmarks."""
    generator = np.random.default_rng(0)
    landmarks = {}
    for case, shape in ((1, (32, 36, 17)), (6, (30, 32, 20)), (8, (32, 32, 16))):
        monkeypatch.setitem(DIRLAB_CASES, case, DirLabCase(shape, (2.0, 2.5, 4.0)))
        fixed = generator.integers(4, np.array(shape) - 5, (300, 3))
        moving = fixed + generator.integers(-3, 4, (300, 3))
        p = np.indices(shape)
        scans = []
        for shift in (0.0, 1.5):
            unit = (p - shift - np.array(shape).reshape(3, 1, 1, 1) / 2) / np.array(shape).reshape(3, 1, 1, 1)
            lung = (unit**2).sum(0) < 0.12
            hounsfield = np.where(lung, -800 + 150 * np.sin(p.sum(0) / 2 - shift), 40)
            scans.append((hounsfield + 1024).astype(np.int16))
        landmarks[f"case{case}"] = make_case(
            tmp_path / "dirlab", case, volumes=(scans[0], scans[1]), landmarks=(fixed, moving)
        )
    return tmp_path / "dirlab", landmarks


class TestDirLab:
    def test_a_row_for_each_case(self, dirlab: Any, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
        folder, landmarks = dirlab
        rows = evaluate(dataset_dir=str(folder), validation="all", window=[-1000, 500])
        assert [row["id"] for row in rows] == ["case1", "case6", "case8"]
        spacing = np.array([2.0, 2.5, 4.0])
        for row in rows:
            fixed, moving = landmarks[row["id"]]
            before = np.linalg.norm((fixed - moving) * spacing, axis=1)
            assert float(row["tre_mm_zero_displacement"]) == pytest.approx(before.mean(), abs=1e-4)
            assert float(row["tre_std_mm_zero_displacement"]) == pytest.approx(before.std(ddof=1), abs=1e-4)
            assert float(row["tre_snapped_mm_zero_displacement"]) == pytest.approx(before.mean(), abs=1e-4)
            after, snapped = float(row["tre_mm"]), float(row["tre_snapped_mm"])
            assert after != pytest.approx(before.mean(), abs=1e-3)  # the network did something
            assert 0 < abs(after - snapped) < 2.5
        printed = capsys.readouterr().out.splitlines()
        assert {"tre_mm", "tre_std_mm", "tre_snapped_mm"} <= {line.split()[0] for line in printed if line}

    def test_leaving_one_out(self, dirlab: Any, evaluate: Evaluate) -> None:
        rows = evaluate(dataset_dir=str(dirlab[0]), validation="case6", figures=["tre_mm", "tre_snapped_mm"])
        assert [row["id"] for row in rows] == ["case6"]
        assert {key for key in rows[0] if "mm" in key} == {
            f"{name}{suffix}" for name in ("tre_mm", "tre_snapped_mm") for suffix in ("", "_zero_displacement")
        }

    def test_training(self, dirlab: Any, workflow: Callable[..., ConfigWorkflow], tmp_path: Path) -> None:
        run = workflow(
            BUNDLE,
            ["train"],
            "train",
            **TINY,
            dataset_dir=str(dirlab[0]),
            validation="case1",
            modality="ct",
            window=[-1000, 500],
            shape=[32, 32, 32],
            epoch_length=2,
            max_epochs=1,
            landmark_weight=0.1,
            val_metric="tre_mm",
            output_dir=str(tmp_path / "out"),
        )
        ids = [pair["id"] for pair in run.parser.get_parsed_content("train#dataset").data]
        assert ids == ["case6", "case8"]
        run.run()
        assert (tmp_path / "out" / "model.pt").is_file()
        assert np.isfinite(run.parser.get_parsed_content("validate#evaluator").state.metrics["tre_mm"])

    def test_snapping_happens_on_the_moving_scans_voxels(self) -> None:
        grid = Grid((20, 20, 20), np.diag([2.0, 2.5, 4.0, 1.0]))
        grids = PairGrids(fixed=grid, moving=grid, network=grid, fixed_to_moving=np.eye(4))
        points = torch.from_numpy(np.random.default_rng(0).integers(4, 15, (30, 3)))[None].float()
        ddf = torch.full((1, 3, 20, 20, 20), 0.4)
        pair = {"fixed_keypoints": points, "moving_keypoints": points}
        measured = MeasuredPair(pair, ddf, grids=grids)
        assert measured.figure("tre_snapped_mm") == 0 < measured.figure("tre_mm")
        assert measured.figure("tre_std_mm") == pytest.approx(0, abs=1e-6)
        errors = tre_mm(points[0], points[0] + 1, ddf, (2.0, 2.5, 4.0))
        one = MeasuredPair({**pair, "moving_keypoints": points + 1}, ddf, grids=grids)
        assert one.figure("tre_mm") == pytest.approx(np.mean(errors), abs=1e-4)
        assert one.figure("tre_snapped_mm") == pytest.approx(np.linalg.norm([2.0, 2.5, 4.0]), abs=1e-4)


class TestIxi:
    @pytest.fixture
    def ixi(self, tmp_path: Path) -> Path:
        return make_ixi(tmp_path)

    def test_structures(self, ixi: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
        """Before registration every figure follows from FreeSurfer's numbers alone."""
        rows = evaluate(dataset_dir=str(ixi), modality="mr", figures=None)
        assert [row["id"] for row in rows] == ["subject_3", "subject_4"]
        atlas = pickle.loads((ixi / "atlas.pkl").read_bytes())[1]
        means = []
        for row in rows:
            person = pickle.loads((ixi / "Val" / f"{row['id']}.pkl").read_bytes())[1]
            parts, wholes = [], []
            for name, numbers in (LEFT_RIGHT | SINGLE).items():
                dice = []
                for number in numbers:
                    one, other = person == number, atlas == number
                    if one.any() and other.any():
                        dice.append(2 * (one & other).sum() / (one.sum() + other.sum()))
                parts += dice
                wholes.append(np.mean(dice) if dice else np.nan)
                assert float(row[f"dice_{name}_zero_displacement"]) == pytest.approx(wholes[-1], nan_ok=True)
            assert float(row["dice_17_zero_displacement"]) == pytest.approx(np.nanmean(wholes))
            assert float(row["dice_30_zero_displacement"]) == pytest.approx(np.mean(parts))
            assert float(row["dice_17"]) != pytest.approx(float(row["dice_17_zero_displacement"]), abs=1e-4)
            means += wholes
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if line.startswith("17 structures")]
        assert line.split()[5:] == [f"{np.nanmean(means):.4f}", "+-", f"{np.nanstd(means):.4f}"]

    def test_the_test_set(self, ixi: Path, evaluate: Evaluate) -> None:
        rows = evaluate(dataset_dir=str(ixi), datalist="Test", validation="all", figures=["dice_17"])
        assert [row["id"] for row in rows] == ["subject_5"]
        assert [key for key in rows[0] if key.startswith("dice")] == ["dice_17", "dice_17_zero_displacement"]

    def test_labels_are_warped_one_by_one(self) -> None:
        """Against one-hot channels, trilinear, argmax."""
        shape = (18, 16, 20)
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn((2, 37, 5, 5, 5), generator=generator)
        fixed, moving = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear").argmax(1)
        ddf = torch.nn.functional.interpolate(
            3 * torch.randn((1, 3, 4, 4, 4), generator=generator), size=shape, mode="trilinear"
        )
        one_hot = torch.nn.functional.one_hot(moving).permute(3, 0, 1, 2)[None].double()
        warped = warp(one_hot, ddf.double(), padding_mode="zeros")[0].argmax(0)
        dice = {}
        for name, labels in IXI_STRUCTURES.items():
            masks = [(fixed == n, warped == n) for n in labels]
            found = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in masks]
            dice[name] = float(np.mean(found))
        grid = Grid(shape, np.eye(4))
        grids = PairGrids(fixed=grid, moving=grid, network=grid, fixed_to_moving=np.eye(4))
        pair = {"fixed_label": fixed[None, None], "moving_label": moving[None, None]}
        structures = tuple(IXI_STRUCTURES.items())
        measured = MeasuredPair(pair, ddf, grids=grids, structures=structures)
        for name, value in dice.items():
            assert measured.figure(f"dice_{name}") == pytest.approx(value, abs=2e-3), name
        assert measured.figure("dice_17") == pytest.approx(np.mean(list(dice.values())), abs=1e-3)
        assert measured.figure("dice_17") != pytest.approx(measured.figure("dice"), abs=1e-3)  # nearest, every label
