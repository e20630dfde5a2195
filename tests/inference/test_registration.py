"""What a registration writes, from the command to the files: other programs must see the same."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from bundle_list import ROOT
from known_pair import BUNDLE, CONFIG, Known, apply

from common.geometry.spaces import Grid, itk_to_array
from common.inference import ImagePair, Registration, file_sha256, load_pair
from common.io import transform_points

Register = Callable[..., None]
FILES = {
    "warped.nii.gz", "transform.h5", "displacement.nii.gz", "metrics.json", "report.png",
    "warped_label.nii.gz", "warped_landmarks.txt",
}  # fmt: skip


def array_of(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image).astype(np.float64)


def assert_same_image(first: np.ndarray, second: np.ndarray, tolerance: float = 2e-3) -> None:
    """To a part of the range; but for a few voxels at the edge of the moving scan, where rounding decides."""
    assert first.shape == second.shape
    assert np.ptp(first) > 50
    differs = np.abs(first - second) > tolerance * np.ptp(first)
    assert differs.mean() < 1e-4


class TestRegistration:
    @pytest.fixture(scope="class")
    def pair(self, known: Known, tmp_path_factory: pytest.TempPathFactory) -> ImagePair:
        return load_pair(known.write(tmp_path_factory.mktemp("pair")), modality="mr")

    @pytest.fixture(scope="class")
    def registration(self, pair: ImagePair, known: Known) -> Registration:
        grid = pair.fixed_grid.with_spacing(4.0)
        coarse = 4 * torch.rand(1, 3, 5, 5, 5, generator=torch.Generator().manual_seed(0)) - 2
        ddf = torch.nn.functional.interpolate(coarse, size=grid.shape, mode="trilinear", align_corners=True)[0]
        return Registration(pair, fixed_to_moving=known.fixed_to_moving, ddf=ddf, network_grid=grid)

    @staticmethod
    def by_hand(registration: Registration, points: np.ndarray, network_grid: Grid) -> np.ndarray:
        """total(x) = A(x + u(x)), u trilinear between the network's voxels, continued beyond them."""
        from scipy.ndimage import map_coordinates

        margin = 2
        ddf = np.stack([registration.displacement[margin:-margin, margin:-margin, margin:-margin, c] for c in range(3)])
        voxels = network_grid.to_voxels(points).T
        u = np.stack([map_coordinates(c.astype(np.float64), voxels, order=1, mode="nearest") for c in ddf], -1)
        return apply(registration.fixed_to_moving, points + u)

    def test_total_map_everywhere_on_the_fixed_grid(self, registration: Registration, pair: ImagePair) -> None:
        """Also at the outermost voxels, which may lie beyond the network's last centres."""
        network_grid = pair.fixed_grid.with_spacing(4.0)
        points = np.concatenate(
            [pair.fixed_grid.corners, pair.fixed_grid.to_physical(np.random.default_rng(0).uniform(0, 27, (40, 3)))]
        )
        outside = network_grid.to_voxels(pair.fixed_grid.corners)
        assert (outside.min() < 0.5) and np.abs(registration.displacement).max() > 4
        mapped = transform_points(registration.transform, points)
        np.testing.assert_allclose(mapped, self.by_hand(registration, points, network_grid), atol=1e-3)
        assert np.linalg.norm(mapped - apply(registration.fixed_to_moving, points), axis=1).min() > 0.01

    def test_displacement_is_the_ddf_in_mm(self, registration: Registration) -> None:
        """At the network's centres the vector leads to where the voxel displacement leads."""
        grid = registration.field_grid
        ddf = np.linalg.inv(grid.affine[:3, :3]) @ registration.displacement[7, 8, 9]
        (start,) = grid.to_physical(np.array([[7, 8, 9]]))
        (end,) = grid.to_physical(np.array([[7, 8, 9]]) + ddf)
        np.testing.assert_allclose(start + registration.displacement[7, 8, 9], end, atol=1e-5)
        assert np.abs(ddf).max() < 2.01  # voxels of 4 mm

    def test_warped_against_simpleitk(self, registration: Registration, tmp_path: Path, known: Known) -> None:
        files = known.write(tmp_path)
        fixed, moving = sitk.ReadImage(files["fixed"]), sitk.ReadImage(files["moving"])
        field = sitk.GetImageFromArray(
            np.ascontiguousarray(registration.displacement.astype(np.float64).swapaxes(0, 2)), isVector=True
        )
        grid = registration.field_grid
        field.SetOrigin(grid.origin.tolist())
        field.SetSpacing(grid.spacing.tolist())
        field.SetDirection(grid.direction.ravel().tolist())
        matrix = registration.fixed_to_moving
        total = sitk.CompositeTransform(
            [
                sitk.AffineTransform(matrix[:3, :3].ravel().tolist(), matrix[:3, 3].tolist()),
                sitk.DisplacementFieldTransform(field),
            ]
        )
        expected = sitk.Resample(moving, fixed, total, sitk.sitkLinear, 0.0)
        assert_same_image(itk_to_array(registration.warped).swapaxes(0, 2), array_of(expected), 1e-4)
        affine_only = sitk.Resample(moving, fixed, total.GetNthTransform(0), sitk.sitkLinear, 0.0)
        assert_same_image(itk_to_array(registration.aligned).swapaxes(0, 2), array_of(affine_only), 1e-4)

    def test_landmarks_and_labels_go_through_the_same_map(self, registration: Registration, pair: ImagePair) -> None:
        assert registration.mapped_landmarks is not None and pair.fixed_landmarks is not None
        expected = self.by_hand(registration, pair.fixed_landmarks, pair.fixed_grid.with_spacing(4.0))
        np.testing.assert_allclose(registration.mapped_landmarks, expected, atol=1e-3)
        label = itk_to_array(registration.warped_label)
        assert label.shape == pair.fixed_grid.shape
        assert set(np.unique(label)) == {0, 1, 2, 3, 4, 5}

    def test_deformation_leaves_the_affine_stage_out(self, registration: Registration, pair: ImagePair) -> None:
        still = Registration(
            pair,
            fixed_to_moving=registration.fixed_to_moving,
            ddf=torch.zeros(3, *pair.fixed_grid.with_spacing(4.0).shape),
            network_grid=pair.fixed_grid.with_spacing(4.0),
        )
        assert np.abs(still.deformation).max() < 1e-5 < 4 < np.abs(still.total_displacement).max()
        np.testing.assert_allclose(itk_to_array(still.warped), itk_to_array(still.aligned), atol=1e-2)

    def test_outside_a_ct_is_air(self, known: Known, tmp_path: Path) -> None:
        files = known.write(tmp_path)
        for key in ("fixed", "moving"):
            image = nib.load(files[key])
            nib.save(nib.Nifti1Image(np.float32(image.get_fdata() * 4 - 1000), image.affine), files[key])
        for modality, outside in (("ct", pytest.approx(-1000, abs=1)), ("mr", 0.0)):
            pair = load_pair({key: files[key] for key in ("fixed", "moving")}, modality=modality)
            away = np.eye(4)
            away[:3, 3] = [500, 0, 0]
            grid = pair.fixed_grid.with_spacing(8.0)
            registration = Registration(pair, fixed_to_moving=away, ddf=torch.zeros(3, *grid.shape), network_grid=grid)
            assert registration.outside_value == outside
            assert itk_to_array(registration.warped).max() == outside

    def test_a_field_of_another_grid_is_refused(self, pair: ImagePair) -> None:
        grid = pair.fixed_grid.with_spacing(8.0)
        with pytest.raises(ValueError, match="does not fit a network grid"):
            Registration(pair, fixed_to_moving=np.eye(4), ddf=torch.zeros(3, 4, 4, 4), network_grid=grid)


class TestCommand:
    """The command of the README in a process of its own, once; what it left is looked at from all sides."""

    @pytest.fixture(scope="class")
    def files(self, known: Known, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        return known.write(tmp_path_factory.mktemp("scans"))

    @pytest.fixture(scope="class")
    def out(self, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("results") / "new" / "pair"
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", CONFIG]
        command += ["--output_dir", str(folder), "--device", "cpu", "--spacing", "2.5"]
        for key, path in files.items():
            command += [f"--{key}", path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert str(folder) in done.stdout and "Dice" in done.stdout and "TRE mm" in done.stdout
        assert "Traceback" not in done.stdout + done.stderr
        return folder

    def test_all_files_and_no_others(self, out: Path) -> None:
        assert {path.name for path in out.iterdir()} == FILES
        assert list(out.parent.iterdir()) == [out]
        assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    def test_warped_is_on_the_fixed_grid(self, out: Path, files: dict[str, str]) -> None:
        fixed = nib.load(files["fixed"])
        for name in ("warped.nii.gz", "warped_label.nii.gz"):
            image = nib.load(out / name)
            assert image.shape == fixed.shape
            np.testing.assert_allclose(image.affine, fixed.affine, atol=1e-4)

    def test_simpleitk_reads_the_transform(self, out: Path, files: dict[str, str]) -> None:
        fixed, moving = sitk.ReadImage(files["fixed"]), sitk.ReadImage(files["moving"])
        transform = sitk.ReadTransform(str(out / "transform.h5"))
        resampled = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0)
        assert_same_image(array_of(sitk.ReadImage(str(out / "warped.nii.gz"))), array_of(resampled))
        unaligned = sitk.Resample(moving, fixed, sitk.Transform(), sitk.sitkLinear, 0.0)
        assert np.abs(array_of(unaligned) - array_of(resampled)).mean() > 5  # the transform did something
        label = sitk.ReadImage(files["moving_label"])
        resampled = sitk.Resample(label, fixed, transform, sitk.sitkNearestNeighbor, 0)
        same = array_of(sitk.ReadImage(str(out / "warped_label.nii.gz"))) == array_of(resampled)
        assert same.mean() > 0.9995

    def test_simpleitk_maps_the_landmarks(self, out: Path, files: dict[str, str]) -> None:
        transform = sitk.ReadTransform(str(out / "transform.h5"))
        fixed = np.loadtxt(files["fixed_landmarks"], delimiter=",")
        expected = [transform.TransformPoint(point) for point in fixed.tolist()]
        np.testing.assert_allclose(np.loadtxt(out / "warped_landmarks.txt"), expected, atol=2e-3)

    def test_ants_applies_the_displacement_field(
        self, out: Path, files: dict[str, str], ants_resample: Callable[..., list[np.ndarray]], tmp_path: Path
    ) -> None:
        field = tmp_path / "displacement.nii.gz"
        field.write_bytes((out / "displacement.nii.gz").read_bytes())
        (theirs,) = ants_resample(files["fixed"], files["moving"], field)
        assert_same_image(nib.load(out / "warped.nii.gz").get_fdata(), theirs)

    def test_displacement_file_is_itks(self, out: Path) -> None:
        image = nib.load(out / "displacement.nii.gz")
        assert image.shape[3:] == (1, 3) and int(image.header["intent_code"]) == 1007

    def test_metrics(self, out: Path, files: dict[str, str], known: Known) -> None:
        metrics = json.loads((out / "metrics.json").read_text())
        figures = {
            "ncc": metrics["similarity"]["ncc"],
            "nmi": metrics["similarity"]["nmi"],
            "dice": metrics["overlap"]["dice"],
            "tre": {stage: -values["mean"] for stage, values in metrics["tre_mm"].items()},
        }
        for name, stages in figures.items():
            assert stages["before"] < stages["affine"] < stages["after"], name
        # as measured here, from the files
        truth = np.loadtxt(files["moving_landmarks"], delimiter=",")
        error = np.linalg.norm(np.loadtxt(out / "warped_landmarks.txt") - truth, axis=1)
        assert metrics["tre_mm"]["after"]["mean"] == pytest.approx(error.mean(), abs=2e-3)
        assert metrics["tre_mm"]["after"]["max"] == pytest.approx(error.max(), abs=2e-3)
        moved = np.linalg.norm(known.landmarks() - truth, axis=1)
        assert metrics["tre_mm"]["before"]["mean"] == pytest.approx(moved.mean(), abs=1e-3)
        fixed_label, warped_label = (
            np.asarray(nib.load(path).dataobj) for path in (files["fixed_label"], out / "warped_label.nii.gz")
        )
        dices = [
            2
            * ((fixed_label == n) & (warped_label == n)).sum()
            / ((fixed_label == n).sum() + (warped_label == n).sum())
            for n in range(1, 6)
        ]
        assert metrics["overlap"]["dice"]["after"] == pytest.approx(np.mean(dices), abs=1e-4)
        assert [metrics["overlap"]["dice_per_label"][str(n)] for n in range(1, 6)] == pytest.approx(dices, abs=1e-4)
        assert metrics["deformation"]["folding_percent"] < 0.5
        assert metrics["deformation"]["sdlogj"] > 0 and metrics["deformation"]["max_mm"] > 1
        assert metrics["overlap"]["hd95_voxels"]["after"] <= metrics["overlap"]["hd95_voxels"]["before"]
        assert {"reading", "affine", "network", "writing"} <= set(metrics["seconds"])
        total = metrics["seconds"].pop("total")
        assert abs(total - sum(metrics["seconds"].values())) < 0.01
        assert metrics["peak_memory_mib"]["process"] > 100
        settings = metrics["settings"]
        assert settings["weights_sha256"] == file_sha256(BUNDLE / "models" / "model.pt")
        assert settings["fixed"] == files["fixed"] and settings["affine"] == "affine"
        assert settings["network_grid_spacing_mm"] == [2.5, 2.5, 2.5]
        assert settings["network_grid_shape"] == [36, 35, 36]  # 88 x 86.4 x 89.6 mm
        assert {"torch", "monai", "itk", "python"} <= set(metrics["versions"])


class TestList:
    @pytest.fixture
    def listed(self, known: Known, tmp_path: Path) -> tuple[Path, dict[str, str]]:
        """Three pairs, the second of which has a moving image that is text."""
        files = known.write(tmp_path)
        (tmp_path / "broken.nii.gz").write_text("this is no image")
        rows = [
            {"id": "first", "fixed": "fixed.nii.gz", "moving": "moving.nii.gz"},
            {"id": "second", "fixed": "fixed.nii.gz", "moving": "broken.nii.gz"},
            {"id": "third", "fixed": "moving.nii.gz", "moving": "fixed.nii.gz"},
        ]
        with open(tmp_path / "pairs.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "fixed", "moving"])
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path, files

    @staticmethod
    def table(out: Path) -> dict[str, dict[str, str]]:
        with open(out / "results.csv", newline="") as file:
            return {row["id"]: row for row in csv.DictReader(file)}

    def test_a_bad_pair_spoils_only_itself(
        self, listed: tuple[Path, dict[str, str]], register: Register, capfd: pytest.CaptureFixture[str]
    ) -> None:
        folder, files = listed
        out = folder / "out"
        with pytest.raises(SystemExit) as caught:
            register(datalist="pairs.csv", dataset_dir=str(folder), output_dir=str(out))
        assert caught.value.code == f"error: 1 of 3 pairs failed; see {out / 'results.csv'}"
        shown = capfd.readouterr()
        assert "Traceback" not in shown.out + shown.err
        assert "broken.nii.gz" in shown.out + shown.err
        rows = self.table(out)
        assert [row["status"] for row in rows.values()] == ["done", "failed", "done"]
        assert "broken.nii.gz" in rows["second"]["problem"] and "\n" not in rows["second"]["problem"]
        for name in ("first", "third"):
            metrics = json.loads((out / name / "metrics.json").read_text())
            assert float(rows[name]["similarity.ncc.after"]) == metrics["similarity"]["ncc"]["after"]
            assert (out / name / "warped.nii.gz").is_file()
        assert not (out / "second").exists()

        # the rerun: what is finished stays, what is mended is done
        (folder / "broken.nii.gz").write_bytes(Path(files["moving"]).read_bytes())
        before = {name: (out / name / "warped.nii.gz").stat().st_mtime_ns for name in ("first", "third")}
        register(datalist="pairs.csv", dataset_dir=str(folder), output_dir=str(out))
        again = self.table(out)
        assert [row["status"] for row in again.values()] == ["skipped", "done", "skipped"]
        assert {name: (out / name / "warped.nii.gz").stat().st_mtime_ns for name in before} == before
        assert again["first"]["similarity.ncc.after"] == rows["first"]["similarity.ncc.after"]
        assert again["second"]["similarity.ncc.after"] == again["first"]["similarity.ncc.after"]  # now the same pair
        assert rows["third"]["similarity.ncc.after"] != rows["first"]["similarity.ncc.after"]


class TestOptions:
    def test_instance_optimization_acts_on_the_result(self, known: Known, tmp_path: Path, register: Register) -> None:
        files = known.write(tmp_path)
        figures = []
        for steps in (0, 40):
            out = tmp_path / f"steps_{steps}"
            register(**files, output_dir=str(out), affine="affine", instance_optimization=steps, spacing=3.0)
            figures.append(json.loads((out / "metrics.json").read_text()))
        for figure in figures:
            assert figure["similarity"]["ncc"]["after"] > figure["similarity"]["ncc"]["affine"]
            assert figure["tre_mm"]["after"]["mean"] < figure["tre_mm"]["affine"]["mean"]
            assert figure["deformation"]["folding_percent"] < 0.5
        assert figures[0]["deformation"]["mean_mm"] != figures[1]["deformation"]["mean_mm"]
        assert figures[1]["settings"]["instance_optimization"] == 40

    def test_folds_are_smoothed_away_unless_they_may_stay(
        self, known: Known, tmp_path: Path, register: Register
    ) -> None:
        files = known.write(tmp_path)
        figures = {}
        for unfold in (False, True):
            out = tmp_path / f"unfold_{unfold}"
            steps = {"instance_optimization": 20, "instance_learning_rate": 40.0}  # far too large a rate: it folds
            register(**files, output_dir=str(out), affine="none", spacing=3.0, unfold=unfold, **steps)
            figures[unfold] = json.loads((out / "metrics.json").read_text())
        assert figures[False]["deformation"]["folding_percent"] > 0
        assert figures[True]["deformation"]["folding_percent"] == 0
        assert figures[True]["settings"]["unfolded_voxels"] > 0
        assert "unfolded_voxels" not in figures[False]["settings"]

    def test_a_margin_shows_the_network_more_of_the_moving_image(
        self, known: Known, tmp_path: Path, register: Register
    ) -> None:
        files = known.write(tmp_path)
        figures = []
        for margin in (0, 8):
            out = tmp_path / f"margin_{margin}"
            register(**files, output_dir=str(out), affine="affine", margin=margin)
            figures.append(json.loads((out / "metrics.json").read_text()))
        shapes = [figure["settings"]["network_grid_shape"] for figure in figures]
        assert shapes[1] == [n + 4 for n in shapes[0]]  # of 4 mm
        assert nib.load(tmp_path / "margin_8" / "warped.nii.gz").shape == known.fixed_grid.shape
        for figure in figures:
            assert figure["tre_mm"]["after"]["mean"] < figure["tre_mm"]["before"]["mean"]

    def test_learn2reg_and_no_report(self, known: Known, tmp_path: Path, register: Register) -> None:
        files = known.write(tmp_path)
        out = tmp_path / "out"
        register(**files, output_dir=str(out), affine="none", spacing=6.0)
        assert (out / "warped_label.nii.gz").is_file()  # of an earlier registration, which had labels
        register(fixed=files["fixed"], moving=files["moving"], output_dir=str(out), learn2reg=True)
        assert {path.name for path in out.iterdir()} == {
            "warped.nii.gz", "transform.h5", "displacement.nii.gz", "metrics.json", "learn2reg.nii.gz"
        }  # fmt: skip
        field = np.asarray(nib.load(out / "learn2reg.nii.gz").dataobj)
        assert field.shape == (*known.fixed_grid.shape, 3)
        moving = sitk.ReadImage(files["moving"])  # voxel p of the fixed array lies at p + field[p] of the moving one
        transform = sitk.ReadTransform(str(out / "transform.h5"))
        for index in ((3, 5, 4), (20, 17, 11)):
            point = known.fixed_grid.to_physical(np.array([index], dtype=float))[0]
            there = moving.TransformPhysicalPointToContinuousIndex(transform.TransformPoint(point.tolist()))
            np.testing.assert_allclose(np.add(index, field[index]), there, atol=1e-3)
        metrics = json.loads((out / "metrics.json").read_text())
        assert "overlap" not in metrics and "tre_mm" not in metrics
        assert metrics["settings"]["network_grid_spacing_mm"] == [4.0, 4.0, 4.0]
