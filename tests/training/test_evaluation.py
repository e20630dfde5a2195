"""Evaluation through the bundle's own configs on Learn2Reg's layouts; an independent evaluator is the reference."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learn2reg_evaluator
import nibabel as nib
import numpy as np
import pytest
import torch
from learn2reg_layout import Layout, make_nlst, make_oasis
from monai.bundle import ConfigWorkflow

from common.errors import OutputError, find_registration_error
from common.geometry.spaces import Grid, PairGrids
from common.io import write_learn2reg
from common.metrics import hd95
from common.metrics.overlap import _surfel_areas
from common.training.learn2reg import MeasuredPair, submission_name

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "recorr"
TINY = {"bundle_root": str(BUNDLE), "device": "cpu", "network_def#iterations": [1, 1, 0, 0]}
SHORT = {"shape": [32, 32, 32], "epoch_length": 2, "max_epochs": 1, "learning_rate": 1e-3}

Evaluate = Callable[..., list[dict[str, str]]]


@pytest.fixture(scope="module")
def oasis(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Not a multiple of the network's stride: with odd sizes the network's voxels lie between the scans'."""
    return make_oasis(tmp_path_factory.mktemp("oasis"), shape=(30, 45, 32))


@pytest.fixture(scope="module")
def nlst(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return make_nlst(tmp_path_factory.mktemp("nlst"), shape=(32, 32, 48))


@pytest.fixture
def evaluate(workflow: Callable[..., ConfigWorkflow], tmp_path: Path) -> Evaluate:
    """Runs evaluate.json; returns the rows of evaluation.csv."""

    def run(output: str = "out", **changes: Any) -> list[dict[str, str]]:
        if isinstance(changes.get("dataset_dir"), Layout):
            changes["dataset_dir"] = str(changes["dataset_dir"].folder)
        output_dir = str(tmp_path / output)
        workflow(BUNDLE, ["train", "evaluate"], "train", **{**TINY, "output_dir": output_dir, **changes}).run()
        with open(tmp_path / output / "evaluation.csv", newline="") as file:
            return list(csv.DictReader(file))

    return run


@pytest.fixture
def sentence(evaluate: Evaluate, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command ends with, whether while it reads the config or later."""

    def run(**changes: Any) -> str:
        try:
            evaluate(**changes)
        except SystemExit as error:
            return str(error.code)
        except Exception as error:
            assert find_registration_error(error) is not None, error
            sys.excepthook(type(error), error, error.__traceback__)
            return capsys.readouterr().err.strip()
        raise AssertionError("nothing was refused")

    return run


def number(row: dict[str, str], key: str) -> float:
    return float(row[key])


class TestAgainstAnIndependentEvaluator:
    @pytest.mark.parametrize("task", ["oasis", "nlst"])
    def test_every_figure(
        self, task: str, request: pytest.FixtureRequest, evaluate: Evaluate, tmp_path: Path, capsys: Any
    ) -> None:
        layout: Layout = request.getfixturevalue(task)
        rows = evaluate(dataset_dir=layout, submission=True)
        submission = tmp_path / "out" / "submission"
        expected = learn2reg_evaluator.evaluate(layout.json, submission)
        before = learn2reg_evaluator.evaluate(layout.json, None)
        assert len(rows) == len(expected) == len(list(submission.iterdir())) == 2
        for row in rows:
            pair = Path(row["fixed"]).name, Path(row["moving"]).name
            measured = {key for key in row if f"{key}_zero_displacement" in row}
            assert measured == {*expected[pair], "ncc"}
            for name, value in expected[pair].items():
                assert number(row, name) == pytest.approx(value, abs=1e-4), name
                assert number(row, f"{name}_zero_displacement") == pytest.approx(before[pair][name], abs=1e-4), name
                assert name == "folding_percent" or abs(value - before[pair][name]) > 1e-3  # the network did something
            assert number(row, "seconds") > 0
        field = nib.load(next(submission.iterdir()))
        assert field.shape == (*layout.shape, 3) and field.get_data_dtype() == np.float32
        np.testing.assert_array_equal(field.affine, np.eye(4))
        printed = capsys.readouterr().out
        assert "2 fields in" in printed and "seconds" in printed

    @pytest.mark.parametrize("task", ["oasis", "nlst"])
    def test_the_layout_holds_its_known_displacement(
        self, task: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        """Written as a submission it is all but perfect, so image, labels, points and field mean the same map."""
        layout: Layout = request.getfixturevalue(task)
        before = learn2reg_evaluator.evaluate(layout.json, None)
        for fixed, moving in before:
            name = submission_name(fixed, moving, "unused")
            write_learn2reg(tmp_path / name, layout.displacement(fixed[:-7], moving[:-7]))
        after = learn2reg_evaluator.evaluate(layout.json, tmp_path)
        for pair, figures in after.items():
            if task == "oasis":
                assert before[pair]["dice"] < 0.75 and figures["dice"] > 0.86
            else:
                assert before[pair]["tre_mm"] > 2 and figures["tre_mm"] < 1e-3
            assert figures["folding_percent"] == 0

    @pytest.mark.parametrize("task", ["oasis", "nlst"])
    def test_a_field_that_folds(self, task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        """Large enough to fold, to leave the volume and to make labels vanish, which the network's own does not."""
        layout: Layout = request.getfixturevalue(task)
        fixed, moving = next(iter(learn2reg_evaluator.evaluate(layout.json, None)))
        coarse = torch.randn((1, 3, 8, 8, 8), generator=torch.Generator().manual_seed(1))
        ddf = 4 * torch.nn.functional.interpolate(coarse, size=layout.shape, mode="trilinear")
        pair = {}
        for role, name in (("fixed", fixed), ("moving", moving)):
            for kind in ("label", "mask"):
                path = layout.path(f"{kind}s", name[:-7])
                if path.is_file():
                    pair[f"{role}_{kind}"] = torch.from_numpy(np.asarray(nib.load(path).dataobj)[None, None])
            points = layout.path("keypoints", name[:-7])
            if points.is_file():
                pair[f"{role}_keypoints"] = torch.from_numpy(np.loadtxt(points, delimiter=","))[None]
        grid = Grid(layout.shape, nib.load(layout.path("images", fixed[:-7])).affine)
        grids = PairGrids(fixed=grid, moving=grid, network=grid, fixed_to_moving=np.eye(4))
        measured = MeasuredPair(pair, ddf, grids=grids, masked=task == "nlst")
        for one, other in learn2reg_evaluator.evaluate(layout.json, None):
            write_learn2reg(tmp_path / submission_name(one, other, "unused"), ddf[0])
        expected = learn2reg_evaluator.evaluate(layout.json, tmp_path)[fixed, moving]
        assert expected["folding_percent"] > 1
        for name, value in expected.items():
            assert measured.figure(name) == pytest.approx(value, abs=1e-4), name

    def test_nothing_lies_beyond_the_moving_scan(self) -> None:
        grid = Grid((10, 8, 8), np.eye(4))
        grids = PairGrids(fixed=grid, moving=grid, network=grid, fixed_to_moving=np.eye(4))
        label, ddf = torch.ones(1, 1, 10, 8, 8), torch.zeros(1, 3, 10, 8, 8)
        ddf[:, 0] = 2.0
        measured = MeasuredPair({"fixed_label": label, "moving_label": label}, ddf, grids=grids)
        assert measured.figure("dice") == pytest.approx(2 * 8 / (10 + 8))

    def test_the_evaluator_itself(self) -> None:
        """Two implementations of the surface's area agree on all patterns, and of HD95 on random blobs."""
        np.testing.assert_allclose(learn2reg_evaluator.surface_areas(), _surfel_areas(), atol=1e-12)
        generator = np.random.default_rng(0)
        for _ in range(5):
            a, b = (generator.random((9, 8, 7)) > 0.6 for _ in range(2))
            assert learn2reg_evaluator.hd95(a, b) == pytest.approx(hd95(a.astype(int), b.astype(int)), abs=1e-9)


class TestSubmission:
    @pytest.mark.parametrize(
        ("fixed", "moving", "name"),
        [
            ("OASIS_0395_0000.nii.gz", "OASIS_0396_0000.nii.gz", "disp_0395_0000_0396_0000"),
            ("NLST_0101_0000.nii.gz", "NLST_0101_0001.nii.gz", "disp_0101_0101"),
            ("NLST_0101_0001.nii.gz", "NLST_0101_0000.nii.gz", "disp_0101_0001_0101_0000"),
            ("/data/imagesTr/AbdomenMRCT_0001_0001.nii.gz", "AbdomenMRCT_0002_0001.nii.gz", "disp_0001_0001_0002_0001"),
            ("hippocampus_001.nii.gz", "hippocampus_003.nii.gz", "disp_my_pair"),
            ("OASIS_0395_0000.nii", "OASIS_0396_0000.nii", "disp_my_pair"),
        ],
    )
    def test_names(self, fixed: str, moving: str, name: str) -> None:
        assert submission_name(fixed, moving, "my_pair") == f"{name}.nii.gz"
        if "my_pair" not in name:  # the challenge's own evaluation finds it
            assert f"{name}.nii.gz" in learn2reg_evaluator.field_names(Path(fixed).name, Path(moving).name)

    def test_another_shape_than_announced(self, nlst: Layout, sentence: Callable[..., str], tmp_path: Path) -> None:
        content = json.loads(nlst.json.read_text())
        content["tensorImageShape"] = {"0": [224, 192, 224]}
        path = nlst.folder / "other.json"
        path.write_text(json.dumps(content))
        said = sentence(dataset_dir=nlst, datalist="other.json", submission=True)
        path.unlink()
        assert said.startswith("error: '") and "NLST_0101_0000.nii.gz' has the shape 32x32x48" in said
        assert said.endswith("tensorImageShape, which a submission must have, is 224x192x224")
        assert not (tmp_path / "out").exists()  # nothing half-written

    def test_a_field_that_is_not_finite(self, tmp_path: Path) -> None:
        field = np.zeros((3, 4, 4, 4))
        field[1, 2, 3, 0] = np.nan
        with pytest.raises(OutputError, match="not finite"):
            write_learn2reg(tmp_path / "field.nii.gz", field)
        assert not list(tmp_path.iterdir())


class TestScans:
    def test_pairs_with_an_id_and_a_mirrored_array(self, oasis: Layout, evaluate: Evaluate, tmp_path: Path) -> None:
        """The moving scan is the fixed one, stored mirrored and in another order of axes: nothing has to move."""
        for kind in ("images", "labels"):
            scan = nib.load(oasis.path(kind, "OASIS_0001_0000"))
            orientation = nib.orientations.axcodes2ornt(("P", "L", "S"))
            nib.save(scan, tmp_path / f"{kind}_fixed.nii.gz")
            nib.save(scan.as_reoriented(orientation), tmp_path / f"{kind}_moving.nii.gz")
        (tmp_path / "pairs.csv").write_text(
            "id,fixed,moving,fixed_label,moving_label\n"
            + "".join(
                f"{name},images_fixed.nii.gz,images_moving.nii.gz,labels_fixed.nii.gz,labels_moving.nii.gz\n"
                for name in ("first", "second")
            )
        )
        (row,) = evaluate(dataset_dir=str(tmp_path), datalist="pairs.csv", validation=1, submission=True)
        assert row["id"] == "second"
        assert number(row, "dice_zero_displacement") == number(row, "dice_micro_zero_displacement") == 1
        assert number(row, "hd95_zero_displacement") == number(row, "folding_percent_zero_displacement") == 0
        assert number(row, "sdlogj_zero_displacement") == pytest.approx(0, abs=1e-6)
        assert number(row, "ncc_zero_displacement") == pytest.approx(1, abs=1e-5)
        assert number(row, "folding_percent") < 1  # a mirrored array is no folding
        field = nib.load(tmp_path / "out" / "submission" / "disp_second.nii.gz").get_fdata()
        assert field.shape == (*oasis.shape, 3)
        moving = np.asarray(nib.load(tmp_path / "labels_moving.nii.gz").dataobj)
        fixed = np.asarray(nib.load(tmp_path / "labels_fixed.nii.gz").dataobj)
        at = np.rint(np.indices(oasis.shape) + np.moveaxis(field, -1, 0)).astype(int)
        at = np.clip(at, 0, np.array(moving.shape).reshape(3, 1, 1, 1) - 1)
        assert (moving[tuple(at)] == fixed).mean() > 0.8  # arrays that differ in shape, and the field knows it

    def test_scans_are_paired_with_their_neighbours(self, oasis: Layout, evaluate: Evaluate) -> None:
        rows = evaluate(dataset_dir=oasis, validation=3, figures=["dice"])
        assert [row["id"] for row in rows] == [
            "OASIS_0003_0000_to_OASIS_0002_0000",
            "OASIS_0004_0000_to_OASIS_0003_0000",
            "OASIS_0002_0000_to_OASIS_0004_0000",
        ]

    def test_instance_optimization(self, nlst: Layout, evaluate: Evaluate) -> None:
        plain = evaluate(dataset_dir=nlst)
        for similarity in ("mind", "ncc"):
            refined = evaluate(dataset_dir=nlst, instance_optimization=6, instance_similarity=similarity)
            for before, after in zip(plain, refined, strict=True):
                assert number(after, "ncc") > number(before, "ncc") + 0.05
                assert number(after, "tre_mm") < number(before, "tre_mm")
                for key in before:
                    if key.endswith("zero_displacement"):
                        assert after[key] == before[key]

    def test_generated_pairs_are_measured_on_their_grid(self, evaluate: Evaluate) -> None:
        rows = evaluate(shape=[32, 32, 32], validation_length=2, instance_optimization=1)
        assert [row["id"] for row in rows] == ["generated_0", "generated_1"]
        figures = {key for key in rows[0] if f"{key}_zero_displacement" in rows[0]}
        assert figures == {"endpoint_error", "dice", "hd95", "ncc", "folding_percent", "sdlogj"}
        assert number(rows[0], "endpoint_error") != number(rows[0], "endpoint_error_zero_displacement")


class TestCompare:
    def test_with_another_run(self, nlst: Layout, evaluate: Evaluate, tmp_path: Path, capsys: Any) -> None:
        evaluate("there", dataset_dir=nlst)
        path = tmp_path / "there" / "evaluation.csv"
        capsys.readouterr()
        evaluate(dataset_dir=nlst, compare=str(path))
        printed = capsys.readouterr().out
        assert f"against {path}, 2 pairs in both" in printed
        (line,) = [line for line in printed.splitlines() if line.startswith("tre_mm") and "+-" not in line]
        assert line.split()[1] == "2" and line.endswith("all equal")
        path.write_text(path.read_text().replace("NLST_0101_0001_to", "another_to"))
        evaluate(dataset_dir=nlst, compare=str(path), instance_optimization=2)
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if line.startswith("tre_mm") and "+-" not in line]
        assert line.split()[1] == "1" and line.endswith("too few")

    @pytest.mark.parametrize(
        ("table", "expected"),
        [
            (None, r"'.*other\.csv': no such file"),
            ("id,dice\nsomebody,0.5\n", r"'.*other\.csv' has no pair in common with this evaluation.*"),
            (
                "pair,dice\n0,0.5\n",
                r"'.*other\.csv' is not the evaluation\.csv of an evaluation: it has no column 'id'",
            ),
            ("", r"'.*other\.csv' is not the evaluation\.csv of an evaluation: it has no column 'id'"),
            (b"\xff\xfe\x00", r"'.*other\.csv': not a text file"),
        ],
    )
    def test_unusable_tables_are_refused_before_anything_else(
        self, nlst: Layout, sentence: Callable[..., str], tmp_path: Path, table: str | bytes | None, expected: str
    ) -> None:
        path = tmp_path / "other.csv"
        if table is not None:
            path.write_bytes(table if isinstance(table, bytes) else table.encode())
        # The weights, which do not exist either, are not even looked for.
        said = sentence(dataset_dir=nlst, compare=str(path), weights="none.pt")
        assert "\n" not in said
        assert re.fullmatch(f"error: {expected}", said), said
        assert not (tmp_path / "out").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"submission": True}, "a submission needs pairs of scans"),
            ({"instance_optimization": -1}, "the number of instance optimisation steps must not be negative, got -1"),
            ({"instance_optimization": "many"}, "must be a whole number, got 'many'"),
            ({"instance_similarity": "mse"}, "instance optimisation by 'mse' is unknown"),
            ({"figures": ["dice", "beauty"]}, "a validation figure is one of .*, got 'beauty'"),
        ],
    )
    def test_options(self, sentence: Callable[..., str], tmp_path: Path, changes: dict, expected: str) -> None:
        said = sentence(shape=[32, 32, 32], validation_length=1, **changes)
        assert said.startswith("error: ") and "\n" not in said
        assert re.search(expected, said), said
        assert not (tmp_path / "out").exists()

    def test_data(self, nlst: Layout, oasis: Layout, sentence: Callable[..., str], tmp_path: Path) -> None:
        missing = tmp_path / "missing"
        assert sentence(dataset_dir=str(missing)) == f"error: the data folder '{missing}' does not exist"
        assert "is set aside for validation: give --validation" in sentence(dataset_dir=oasis, validation=0)
        assert "needs pairs that have it; 'fixed_label' is missing" in sentence(dataset_dir=nlst, figures=["dice"])
        for damage, expected in (
            ("cropped", "has the shape (29, 45, 32), but its image has the shape (30, 45, 32)"),
            ("moved", "is not on the grid of its image: their corners are up to 5.00 mm apart"),
        ):
            scan = nib.load(oasis.path("labels", "OASIS_0001_0000"))
            affine = scan.affine.copy()
            affine[0, 3] += 5 * (damage == "moved")
            array = np.asarray(scan.dataobj)[1 if damage == "cropped" else 0 :]
            nib.save(nib.Nifti1Image(array, affine), tmp_path / "label.nii.gz")
            image = oasis.path("images", "OASIS_0001_0000")
            line = f"{image},{image},{tmp_path / 'label.nii.gz'},{oasis.path('labels', 'OASIS_0001_0000')}\n"
            (tmp_path / "pairs.csv").write_text("fixed,moving,fixed_label,moving_label\n" + 2 * line)
            said = sentence(dataset_dir=str(tmp_path), datalist="pairs.csv", validation=1)
            assert said == f"error: '{tmp_path / 'label.nii.gz'}' {expected}"


class TestTraining:
    """The same folders through train.json."""

    def test_oasis(self, oasis: Layout, workflow: Callable[..., ConfigWorkflow], tmp_path: Path) -> None:
        changes = {"dataset_dir": str(oasis.folder), "label_weight": 1.0, "labels": [1, 2, 3]}
        run = workflow(BUNDLE, ["train"], "train", **TINY, **SHORT, **changes, output_dir=str(tmp_path / "out"))
        pairs = run.parser.get_parsed_content("validate#dataset").pairs
        names = [tuple(Path(pairs.pair(i)[role]).name[6:10] for role in ("fixed", "moving")) for i in range(len(pairs))]
        assert names == [("0395", "0396"), ("0396", "0397")]
        training = run.parser.get_parsed_content("train#dataset").data
        assert [Path(item["image"]).name[6:10] for item in training] == ["0001", "0002", "0003", "0004"]
        run.run()
        assert (tmp_path / "out" / "model.pt").is_file()
        assert "dice" in run.parser.get_parsed_content("validate#evaluator").state.metrics

    def test_nlst(self, nlst: Layout, workflow: Callable[..., ConfigWorkflow], tmp_path: Path) -> None:
        changes = {"dataset_dir": str(nlst.folder), "landmark_weight": 0.1, "val_metric": "tre_mm", "spacing": 1.5}
        run = workflow(BUNDLE, ["train"], "train", **TINY, **SHORT, **changes, output_dir=str(tmp_path / "out"))
        training = run.parser.get_parsed_content("train#dataset").data
        assert [Path(pair["fixed"]).name for pair in training] == [f"NLST_000{n}_0000.nii.gz" for n in (1, 2, 3)]
        assert all(Path(pair["moving"]).name.endswith("_0001.nii.gz") for pair in training)
        run.run()
        assert (tmp_path / "out" / "model.pt").is_file()
        assert np.isfinite(run.parser.get_parsed_content("validate#evaluator").state.metrics["tre_mm"])
