"""Readers on generated files of each layout, and on the real Decathlon folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from learn2reg_layout import OASIS_TRAINING, make_nlst, make_oasis

from common.data import read_datalist, read_decathlon, read_learn2reg, read_learn2reg_pairs, read_pairs
from common.data.keypoints import read_keypoints
from common.data.readers import EvaluationRules, read_dataset, read_evaluation_rules
from common.data.splits import split_items
from common.data.training import TrainingPairs, TrainingScans
from common.errors import InputError


def test_split_by_a_fraction_sets_one_aside_at_least() -> None:
    """None would mean that weights for one's own scans are chosen by generated pairs."""
    items = [{"image": letter} for letter in "abcd"]
    assert split_items(items, 0.1) == (items[:3], items[3:])
    assert split_items(items, 0.6) == (items[:2], items[2:])
    assert split_items(items, 0.0) == split_items(items, 0) == (items, [])


@pytest.fixture
def oasis(tmp_path: Path) -> Path:
    """Unpaired, labels, validation scans listed under training as well, masks not named in the json."""
    return make_oasis(tmp_path, shape=(16, 16, 16)).json


@pytest.fixture
def nlst(tmp_path: Path) -> Path:
    """Two scans a patient, masks, key points listed as .nii.gz though they are .csv."""
    return make_nlst(tmp_path, shape=(16, 16, 16)).json


def test_oasis(oasis: Path) -> None:
    items = read_learn2reg(oasis)
    assert [Path(item["image"]).name for item in items] == [f"OASIS_{n:04d}_0000.nii.gz" for n in OASIS_TRAINING]
    assert items[0] == {
        key: str(oasis.parent / folder / "OASIS_0001_0000.nii.gz")
        for key, folder in (("image", "imagesTr"), ("label", "labelsTr"), ("mask", "masksTr"))
    }
    assert len(read_learn2reg(oasis, exclude_validation=False)) == 7
    assert [Path(item["image"]).name[6:10] for item in read_learn2reg(oasis, "val")] == ["0395", "0396", "0397"]
    pairs = read_learn2reg_pairs(oasis)
    assert [(Path(p["fixed"]).name[6:10], Path(p["moving"]).name[6:10]) for p in pairs] == [
        ("0395", "0396"),
        ("0396", "0397"),
    ]
    assert pairs[0]["moving_label"] == str(oasis.parent / "labelsTr" / "OASIS_0396_0000.nii.gz")
    assert pairs[0]["id"] == "OASIS_0396_0000_to_OASIS_0395_0000"
    assert read_datalist(oasis.parent) == read_datalist(oasis) == items
    assert read_dataset(oasis.parent) == read_dataset(oasis) == (items, pairs)
    assert read_evaluation_rules(oasis.parent) == EvaluationRules(shapes=((16, 16, 16),), masked=False)
    test_pair = read_learn2reg_pairs(oasis, "registration_test")[0]
    assert Path(test_pair["fixed"]).relative_to(oasis.parent).as_posix() == "imagesTs/OASIS_0451_0000.nii.gz"


def test_nlst(nlst: Path) -> None:
    items = read_learn2reg(nlst)
    assert [item["group"] for item in items] == [f"NLST_{n:04d}" for n in (1, 1, 2, 2, 3, 3)]
    assert items[0]["keypoints"] == str(nlst.parent / "keypointsTr" / "NLST_0001_0000.csv")
    assert "label" not in items[0]
    training = read_learn2reg_pairs(nlst, "training_paired_images")
    assert len(training) == 3
    assert len(read_learn2reg_pairs(nlst, "training_paired_images", exclude_validation=False)) == 5
    pairs = read_learn2reg_pairs(nlst, "registration_val")
    roles = {f"{role}{key}" for role in ("fixed", "moving") for key in ("", "_mask", "_keypoints")}
    assert len(pairs) == 2 and set(pairs[0]) == roles | {"id"}
    assert Path(pairs[0]["moving"]).name == "NLST_0101_0001.nii.gz"
    points = np.loadtxt(nlst.parent / "keypointsTr" / "NLST_0101_0001.csv", delimiter=",")
    np.testing.assert_array_equal(read_keypoints(pairs[0]["moving_keypoints"]), points)
    assert read_dataset(nlst) == (training, pairs)  # the official pairs, in their direction


def test_dataset_without_a_list_of_its_own_for_validation(scans: Path, nlst: Path) -> None:
    (scans / "scans.csv").write_text("image\na.nii.gz\nb.nii.gz\n")
    assert read_dataset(scans / "scans.csv") == (read_datalist(scans / "scans.csv"), [])
    assert read_evaluation_rules(scans / "scans.csv") == EvaluationRules()
    content = json.loads(nlst.read_text())
    for key in ("registration_val", "tensorImageShape"):
        del content[key]
    nlst.write_text(json.dumps(content))
    training, validation = read_dataset(nlst)
    assert len(training) == 5 and validation == []
    assert read_evaluation_rules(nlst) == EvaluationRules(shapes=(), masked=True)
    plain = {"training": [{"image": "a.nii.gz"}], "validation": [{"image": "b.nii.gz"}]}
    (scans / "dataset.json").write_text(json.dumps(plain))
    assert read_dataset(scans / "dataset.json") == (
        [{"image": str(scans / "a.nii.gz")}],
        [{"image": str(scans / "b.nii.gz")}],
    )


def test_split_of_a_dataset(oasis: Path, nlst: Path, tmp_path: Path) -> None:
    """The data set's own list unless a number asks for the last ones of the training list."""
    official = TrainingScans(dataset_dir=str(tmp_path), datalist=oasis.name)
    assert (official.training, official.validation) == read_dataset(oasis)
    assert len(TrainingScans(dataset_dir=str(nlst), validation=None).validation) == 2
    for validation, count in ((1, 1), (0.5, 2)):
        scans = TrainingScans(dataset_dir=str(oasis), validation=validation)
        assert scans.training + scans.validation == read_learn2reg(oasis) and len(scans.validation) == count
    pairs = TrainingScans(dataset_dir=str(nlst), validation=1)
    assert [Path(pair["fixed"]).name for pair in pairs.validation] == ["NLST_0003_0000.nii.gz"]
    assert len(pairs.training) == 2
    nothing = TrainingScans(dataset_dir=None)
    assert (nothing.training, nothing.validation, nothing.rules) == ([], [], EvaluationRules())


def test_missing_data_folder(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    sentence = f"the data folder '{missing}' does not exist"
    for datalist in (None, "scans.csv"):
        with pytest.raises(InputError) as caught:
            _ = TrainingScans(dataset_dir=str(missing), datalist=datalist).training
        assert str(caught.value) == sentence
    with pytest.raises(InputError) as caught:
        read_datalist(missing)
    assert str(caught.value) == sentence


def test_too_few_scans_to_split(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "one.csv").write_text("image\na.nii.gz\n")
    for held_out, told in ((1, 1), (None, 0.2)):
        with pytest.raises(InputError, match=f"cannot set {told} of 1 items aside"):
            _ = TrainingScans(dataset_dir=str(tmp_path), datalist="one.csv", validation=held_out).training
    scans = TrainingScans(dataset_dir=str(tmp_path), datalist="one.csv", validation=0)
    with pytest.raises(InputError, match="pairs are made of at least 2 scans, and the list has 1"):
        TrainingPairs(data=scans.training)


def test_learn2reg_errors(nlst: Path) -> None:
    with pytest.raises(InputError, match=r"NLST_dataset.json': it has no list 'test_paired_images'.*training"):
        read_learn2reg_pairs(nlst, "test_paired_images")
    with pytest.raises(InputError, match="entry 1 of 'training': it is not a pair"):
        read_learn2reg_pairs(nlst, "training")
    (nlst.parent / "masksTr" / "NLST_0002_0001.nii.gz").unlink()
    with pytest.raises(InputError, match=r"entry 4 of 'training': 'mask' is no file.*NLST_0002_0001"):
        read_learn2reg(nlst)


@pytest.mark.data
def test_real_decathlon_folder(shared_data: Path) -> None:
    folder = shared_data / "Task04_Hippocampus"
    items = read_decathlon(folder)
    assert len(items) == 200
    assert items == read_datalist(folder) == read_datalist(folder / "dataset.json")
    assert all(set(item) == {"image", "label"} and Path(item["label"]).is_absolute() for item in items)
    train, validation = split_items(items, 40)
    assert (len(train), len(validation)) == (160, 40)
    assert train + validation == items
    assert split_items(items, 0.2) == (train, validation)


def test_split_keeps_patients_on_one_side() -> None:
    # listed by time, not by patient: a plain cut would put each patient on both sides
    items = [{"image": f"{p}_{t}", "group": p} for t in "01" for p in "abcd"]
    train, validation = split_items(items, 2)
    assert {item["group"] for item in validation} == {"c", "d"}
    assert {item["group"] for item in train} == {"a", "b"}
    assert len(validation) == 4
    with pytest.raises(InputError, match="nothing is left"):
        split_items(items, 4)
    for bad in (8, -1, 1.0, 9):
        with pytest.raises(InputError, match="aside"):
            split_items(items, bad)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for name in ("s1/T1.nii.gz", "s2/T1.nii.gz", "s3/T1.nii.gz", "a.nii.gz", "b.nii.gz", "a_seg.nii.gz", "p.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_pairs_csv_and_json_agree(scans: Path) -> None:
    (scans / "pairs.csv").write_bytes(
        "fixed, moving,fixed_label,id\r\n"
        "a.nii.gz,b.nii.gz,a_seg.nii.gz,first\r\n\r\n"
        "s1/T1.nii.gz,s2/T1.nii.gz,,\r\n"
        "s1/T1.nii.gz,s3/T1.nii.gz,,\r\n".encode("utf-8-sig")
    )
    (scans / "pairs.json").write_text(
        json.dumps(
            [
                {"fixed": "a.nii.gz", "moving": str(scans / "b.nii.gz"), "fixed_label": "a_seg.nii.gz", "id": "first"},
                {"fixed": "s1/T1.nii.gz", "moving": "s2/T1.nii.gz", "moving_mask": None},
                {"fixed": "s1/../s1/T1.nii.gz", "moving": "s3/T1.nii.gz"},
            ]
        )
    )
    pairs = read_pairs(scans / "pairs.csv")
    assert pairs == read_pairs(scans / "pairs.json")
    assert pairs[0] == {
        "fixed": str(scans / "a.nii.gz"),
        "moving": str(scans / "b.nii.gz"),
        "fixed_label": str(scans / "a_seg.nii.gz"),
        "id": "first",
    }
    assert [pair["id"] for pair in pairs] == ["first", "T1_to_T1", "T1_to_T1_2"]


def test_derived_id_avoids_a_given_one_of_a_later_row(scans: Path) -> None:
    (scans / "pairs.csv").write_text("fixed,moving,id\na.nii.gz,b.nii.gz,\nb.nii.gz,a.nii.gz,b_to_a\n")
    assert [pair["id"] for pair in read_pairs(scans / "pairs.csv")] == ["b_to_a_2", "b_to_a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixed,id\na.nii.gz,x\n", "'moving' is missing"),
        ("fixed,moving,fixed_lable\na.nii.gz,b.nii.gz,a_seg.nii.gz\n", "row 2: unknown column or key 'fixed_lable'"),
        ("fixed,moving\na.nii.gz,b.nii.gz\na.nii.gz,c.nii.gz\n", r"row 3: 'moving' is no file: .*c\.nii\.gz"),
        ("fixed,moving\na.nii.gz,b.nii.gz\n,b.nii.gz\n", "row 3: no value for 'fixed'"),
        ("fixed,moving\na.nii.gz\n", "row 2: 1 cells for 2 columns"),
        ("fixed,fixed\na.nii.gz,b.nii.gz\n", "row 1: a column has no name"),
        ("fixed,moving\n", "the list is empty"),
        ("", "the list is empty"),
        ("fixed,moving,id\na.nii.gz,b.nii.gz,x\nb.nii.gz,a.nii.gz,x\n", "row 3: the id 'x' is also that of row 2"),
        ("fixed,moving,id\na.nii.gz,b.nii.gz,../x\n", "row 2: the id '../x' is not usable"),
        ('fixed,moving\n"a.nii.gz,b.nii.gz\n', "broken CSV"),
    ],
)
def test_csv_errors(scans: Path, text: str, message: str) -> None:
    (scans / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_pairs(scans / "list.csv")
    assert "list.csv" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "line 1: broken JSON"),
        ("[]", "the list is empty"),
        ('{"fixed": "a.nii.gz"}', "JSON list of objects"),
        ('["a.nii.gz"]', "entry 1: it is not an object"),
        ('[{"fixed": "a.nii.gz", "moving": ["b.nii.gz"]}]', "entry 1: 'moving' is not a text"),
    ],
)
def test_json_errors(scans: Path, text: str, message: str) -> None:
    (scans / "list.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_pairs(scans / "list.json")


def test_list_file_errors(scans: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv': no such file"):
        read_pairs(scans / "none.csv")
    with pytest.raises(InputError, match=r"is a \.csv or a \.json file"):
        read_pairs(scans / "a.nii.gz")
    (scans / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        read_pairs(scans / "bytes.csv")
    with pytest.raises(InputError, match="it has none"):
        read_datalist(scans)


def test_datalist_of_scans_and_of_pairs(scans: Path) -> None:
    (scans / "scans.csv").write_text("image,label,group\na.nii.gz,a_seg.nii.gz,7\nb.nii.gz,a_seg.nii.gz,7\n")
    items = read_datalist(scans / "scans.csv")
    assert items[1] == {"image": str(scans / "b.nii.gz"), "label": str(scans / "a_seg.nii.gz"), "group": "7"}
    (scans / "pairs.json").write_text('[{"fixed": "a.nii.gz", "moving": "b.nii.gz", "fixed_keypoints": "p.csv"}]')
    assert read_datalist(scans / "pairs.json")[0]["fixed_keypoints"] == str(scans / "p.csv")
    (scans / "bad.csv").write_text("picture\na.nii.gz\n")
    with pytest.raises(InputError, match="unknown column or key 'picture'"):
        read_datalist(scans / "bad.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3\n1,2\n", "row 2: key points have 3 comma-separated columns, not 2"),
        ("x,y,z\n1,2,3\n", "row 1: 'x,y,z' is not three numbers"),
        ("1,2,nan\n", "row 1: .* finite"),
        ("\n", "no key points"),
    ],
)
def test_keypoint_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_keypoints(tmp_path / "points.csv")
