"""DIR-Lab's files by their names, their table before registration, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dirlab_layout import TABLE, image_path, landmarks_path, make_case, write_landmarks, write_volume
from monai.data import MetaTensor
from monai.transforms import LoadImaged

from common.data import TrainingScans
from common.data.dirlab import DIRLAB_CASES, is_dirlab, read_dirlab, read_dirlab_image, read_dirlab_landmarks
from common.data.keypoints import read_keypoints
from common.data.readers import EvaluationRules, read_dataset, read_evaluation_rules
from common.data.splits import select_items
from common.errors import InputError
from common.geometry.spaces import Grid, swap_lps_ras
from common.metrics import tre_mm
from common.transforms import LoadKeypointsd


@pytest.fixture(scope="module")
def dirlab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All ten cases; the volumes take no place on the disk."""
    folder = tmp_path_factory.mktemp("dirlab")
    for case in DIRLAB_CASES:
        make_case(folder, case, seed=case)
    return folder


def test_all_names(dirlab: Path) -> None:
    pairs = read_dirlab(dirlab)
    assert [pair["id"] for pair in pairs] == [f"case{n}" for n in range(1, 11)]
    for case, pair in zip(DIRLAB_CASES, pairs, strict=True):
        for role, phase in (("fixed", "T00"), ("moving", "T50")):
            assert pair[role] == str(image_path(dirlab, case, phase))
            assert pair[f"{role}_keypoints"] == str(landmarks_path(dirlab, case, phase))
    assert {Path(pair["fixed"]).name for pair in pairs} >= {"case1_T00_s.img", "case2_T00-ssm.img", "case10_T00.img"}
    assert is_dirlab(dirlab) and is_dirlab(dirlab / "Case8Deploy") and not is_dirlab(dirlab / "Case1Pack" / "none")
    assert read_dataset(dirlab) == (pairs, [])
    assert read_dataset(dirlab / "Case8Deploy") == ([pairs[7]], [])
    assert read_evaluation_rules(dirlab) == EvaluationRules()
    (turned,) = read_dirlab(dirlab, cases=[6], fixed="T50", moving="T00", landmarks=75)
    assert Path(turned["fixed"]).name == "case6_T50.img"
    assert Path(turned["moving_keypoints"]).name == "case6_4D-75_T00.txt"
    assert len(read_keypoints(turned["moving_keypoints"])) == 75


@pytest.mark.parametrize("case", TABLE)
def test_the_table_before_registration(dirlab: Path, case: int) -> None:
    """Mean and standard deviation of the published table, and both unchanged by snapping what nothing has moved."""
    (pair,) = read_dirlab(dirlab, cases=[case])
    points = LoadKeypointsd()(pair)
    nothing = torch.zeros(3, 2, 2, 2)
    for snapped in (False, True):
        errors = tre_mm(
            points["fixed_keypoints"], points["moving_keypoints"], nothing, DIRLAB_CASES[case].spacing, snapped
        )
        assert len(errors) == 300
        assert (np.mean(errors), np.std(errors, ddof=1)) == pytest.approx(TABLE[case], abs=0.005)


def test_mean_of_the_table() -> None:
    assert np.mean([mean for mean, _ in TABLE.values()]) == pytest.approx(8.461, abs=1e-3)
    assert np.mean([std for _, std in TABLE.values()]) == pytest.approx(5.48, abs=5e-3)


def test_a_landmark_is_the_voxel_that_it_names(tmp_path: Path) -> None:
    """x fastest, counted from 1, HU = stored - 1024, mm of the case."""
    shape = DIRLAB_CASES[1].shape
    generator = np.random.default_rng(0)
    voxels = np.unique(generator.integers(0, shape, (400, 3)), axis=0)[:300]
    voxels[0], voxels[1] = (0, 0, 0), np.array(shape) - 1
    stored = np.zeros(shape, np.int16)
    stored[tuple(voxels.T)] = 1024 + np.arange(300)
    make_case(tmp_path, 1, volumes=(stored, None), landmarks=(voxels, voxels))
    bytes_of_it = image_path(tmp_path, 1, "T00").read_bytes()
    x, y, z = voxels[7] + 1
    at = 2 * ((x - 1) + shape[0] * ((y - 1) + shape[1] * (z - 1)))
    assert int.from_bytes(bytes_of_it[at : at + 2], "little") == 1024 + 7
    (pair,) = read_dirlab(tmp_path)
    data = LoadKeypointsd()(LoadImaged(["fixed", "moving"], ensure_channel_first=True)(pair))
    image, points = data["fixed"], data["fixed_keypoints"].long()
    assert isinstance(image, MetaTensor) and image.shape == (1, *shape) and image.dtype == torch.float32
    assert torch.equal(image[0].as_tensor()[tuple(points.T)], torch.arange(300.0))
    assert float(image.min()) == -1024 and float(data["moving"].max()) == -1024
    grid = Grid(shape, swap_lps_ras(image.affine.numpy()))
    np.testing.assert_allclose(grid.affine, np.diag([0.97, 0.97, 2.5, 1]))


def test_hounsfield_units_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIRLAB_CASES, 1, type(DIRLAB_CASES[1])((4, 3, 2), (1.0, 1.0, 1.0)))
    stored = np.full((4, 3, 2), -2000)
    stored[1, 2, 0], stored[3, 0, 1] = 32767, 1000
    write_volume(tmp_path / "CASE1_t50.IMG", stored, (4, 3, 2))
    volume, _ = read_dirlab_image(tmp_path / "CASE1_t50.IMG")
    assert (volume[1, 2, 0], volume[3, 0, 1], volume[0, 0, 0]) == (3071, -24, -1024)


def test_leaving_one_out(dirlab: Path) -> None:
    pairs = read_dirlab(dirlab)
    for name in ("case8", "Case 8", ["case8"]):
        scans = TrainingScans(dataset_dir=str(dirlab), validation=name)
        assert scans.validation == [pairs[7]] and scans.training == pairs[:7] + pairs[8:]
    two = TrainingScans(dataset_dir=str(dirlab), validation="case10,case1")
    assert two.validation == [pairs[0], pairs[9]] and len(two.training) == 8
    assert TrainingScans(dataset_dir=str(dirlab)).validation == pairs[8:]  # a fifth
    everything = TrainingScans(dataset_dir=str(dirlab), validation="all")
    assert everything.validation == everything.training == pairs
    with pytest.raises(InputError, match="'case11' is to be set aside for validation, and is none of case1, case2"):
        _ = TrainingScans(dataset_dir=str(dirlab), validation="case11").training
    names = [pair["id"] for pair in pairs]
    with pytest.raises(InputError, match="cannot set 10 of 10 items aside and train on the rest"):
        _ = TrainingScans(dataset_dir=str(dirlab), validation=names).training


def test_patients_stay_together() -> None:
    items = [{"image": f"/scans/{p}_{t}.nii.gz", "group": p} for t in "01" for p in "abc"]
    for names in ("b", "B_1", ["b_0", "b_1"]):
        train, validation = select_items(items, names)
        assert [item["group"] for item in train] == ["a", "c"] * 2 and len(validation) == 2
    with pytest.raises(InputError, match=r"'d' is to be set aside for validation, and is none of a_0, b_0, c_0"):
        select_items(items, "d")
    with pytest.raises(InputError, match="cannot set 0 of 6 items aside"):
        select_items(items, " ")


class TestRefusals:
    @pytest.fixture
    def one(self, tmp_path: Path) -> Path:
        make_case(tmp_path, 1)
        return tmp_path

    def sentence(self, folder: Path) -> str:
        with pytest.raises(InputError) as caught:
            read_dataset(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_cases(self, one: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        with pytest.raises(InputError, match=r"case 3 is missing; there are the cases 1$"):
            read_dirlab(one, cases=[1, 3])
        with pytest.raises(InputError, match="there is no case of DIR-Lab in it"):
            read_dirlab(tmp_path_factory.mktemp("empty"))
        with pytest.raises(ValueError, match="has 300 or 75 landmarks, not 100"):
            read_dirlab(one, landmarks=100)
        (one / "Case2Pack").mkdir()
        assert self.sentence(one) == f"'{one}': case 2 has no scan of T00"

    def test_files(self, one: Path) -> None:
        points = landmarks_path(one, 1, "T50")
        kept = points.read_text()
        points.unlink()
        assert self.sentence(one) == f"'{one}': case 1 has no file of 300 landmarks of T50"
        points.write_text(kept)
        image = image_path(one, 1, "T50")
        twin = image.with_name("case1_T50.img")
        write_volume(twin, None, DIRLAB_CASES[1].shape)
        assert self.sentence(one) == f"'{twin}' and '{image}' are both the scan of case 1, T50; keep one"
        twin.rename(image.with_name("._case1_T50.img"))  # what a Mac leaves behind
        assert len(read_dataset(one)[0]) == 1

    def test_size(self, one: Path) -> None:
        image = image_path(one, 1, "T00")
        write_volume(image, None, (256, 256, 99))
        assert self.sentence(one) == (
            f"'{image}' has 12976128 bytes, but case 1 has 256 x 256 x 94 voxels of 2 bytes, 12320768 bytes"
        )
        with pytest.raises(InputError, match="12976128 bytes"):
            read_dirlab_image(image)
        with pytest.raises(InputError, match="no such file"):
            read_dirlab_image(one / "case3_T00.img")
        with pytest.raises(InputError, match="no name of a DIR-Lab scan"):
            read_dirlab_image(one / "case11_T00.img")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("256 256 95", "row 4: '256 256 95' is outside the scan, which has 256 x 256 x 94 voxels"),
            ("0 10 10", "row 4: '0 10 10' is outside the scan, which has 256 x 256 x 94 voxels"),
            ("10.5 10 10", "row 4: '10.5 10 10' is not three whole numbers x y z"),
            ("10 nan 10", "row 4: '10 nan 10' is not three whole numbers x y z"),
            ("10 10", "row 4: '10 10' is not three whole numbers x y z"),
            ("x y z", "row 4: 'x y z' is not three whole numbers x y z"),
        ],
    )
    def test_landmarks(self, one: Path, row: str, message: str) -> None:
        path = landmarks_path(one, 1, "T00")
        lines = path.read_text().splitlines()
        lines[3] = row
        path.write_text("\n".join(lines))
        assert self.sentence(one) == f"'{path}', {message}"

    def test_rows(self, one: Path) -> None:
        path = landmarks_path(one, 1, "T00")
        write_landmarks(path, np.zeros((299, 3), int))
        assert self.sentence(one) == f"'{path}': it has 299 landmarks where DIR-Lab's has 300"
        with pytest.raises(InputError, match="no name of DIR-Lab landmarks"):
            read_dirlab_landmarks(one / "points.txt")


def test_other_readers_keep_their_files(tmp_path: Path) -> None:
    (tmp_path / "scan.img").touch()
    (tmp_path / "case1").mkdir()
    assert not is_dirlab(tmp_path)
    with pytest.raises(InputError, match="it has none"):
        read_dataset(tmp_path)
