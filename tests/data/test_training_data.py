"""What a training draws its pairs from: generated ones, a data set's scans, a list of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from common.data import SyntheticPairs, TrainingPairs, TrainingScans
from common.errors import InputError


class TestSyntheticPairs:
    def test_one_seed_one_pair(self) -> None:
        first, again = (SyntheticPairs(length=3, shape=(16, 16, 16), seed=5)[1] for _ in range(2))
        for key in first:
            assert torch.equal(first[key], again[key]), key

    def test_index_epoch_and_seed_decide(self) -> None:
        data = SyntheticPairs(length=3, shape=(16, 16, 16), seed=5)
        items = [data[0], data[1], SyntheticPairs(length=3, shape=(16, 16, 16), seed=6)[0]]
        data.set_epoch(1)
        items.append(data[0])
        for i in range(len(items)):
            for j in range(i):
                assert not torch.equal(items[i]["image"], items[j]["image"])
        data.set_epoch(0)
        assert torch.equal(data[0]["image"], items[0]["image"])

    def test_a_validation_set_never_changes(self) -> None:
        data = SyntheticPairs(length=2, shape=(16, 16, 16), fixed_epoch=True)
        before = data[1]
        data.set_epoch(7)
        assert torch.equal(data[1]["image"], before["image"])

    def test_the_global_generator_is_left_alone(self) -> None:
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        SyntheticPairs(length=1, shape=(16, 16, 16))[0]
        assert torch.equal(torch.rand(3), expected)

    def test_recipe_and_transform(self) -> None:
        data = SyntheticPairs(
            length=1, shape=(16, 16, 16), recipe={"labels": 3, "noise": [0.0, 0.0]}, transform=lambda item: item["mask"]
        )
        assert data.recipe.labels == 3 and data.recipe.noise == (0.0, 0.0)
        assert data[0].shape == (1, 16, 16, 16)
        with pytest.raises(TypeError, match="colour"):
            SyntheticPairs(length=1, shape=(16, 16, 16), recipe={"colour": 1})

    def test_length_is_kept(self) -> None:
        data = SyntheticPairs(length=2, shape=(16, 16, 16))
        assert len(list(iter(data))) == len(data) == 2  # iterating ends
        with pytest.raises(IndexError):
            data[-1]


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Ten scans of a constant, number and index, in the layout of the Medical Segmentation Decathlon."""
    entries = []
    for n in range(10):
        entry = {"image": f"./imagesTr/scan_{n}.nii.gz", "label": f"./labelsTr/scan_{n}.nii.gz"}
        for path in entry.values():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(np.full((4, 4, 4), n, np.uint8), np.eye(4)), tmp_path / path)
        entries.append(entry)
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "x", "training": entries, "test": []}))
    return tmp_path


def number(path: Any) -> int:
    return int(Path(path).name.removeprefix("scan_").removesuffix(".nii.gz"))


class TestTrainingData:
    def test_the_last_scans_validate(self, decathlon: Path) -> None:
        scans = TrainingScans(dataset_dir=str(decathlon), validation=0.2)
        assert [number(scan["image"]) for scan in scans.training] == list(range(8))
        assert [number(scan["label"]) for scan in scans.validation] == [8, 9]
        assert len(TrainingScans(dataset_dir=str(decathlon), validation=3).training) == 7

    def test_without_a_data_set_both_are_empty(self) -> None:
        scans = TrainingScans(dataset_dir=None)
        assert scans.training == scans.validation == []

    def test_a_list_inside_the_folder(self, decathlon: Path) -> None:
        (decathlon / "some.csv").write_text("image\nimagesTr/scan_4.nii.gz\nimagesTr/scan_2.nii.gz\n")
        scans = TrainingScans(dataset_dir=str(decathlon), datalist="some.csv", validation=1)
        assert [number(scan["image"]) for scan in scans.training] == [4]

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nowhere"):
            _ = TrainingScans(dataset_dir=str(tmp_path / "nowhere")).training

    def test_scans_become_pairs(self, decathlon: Path) -> None:
        scans = TrainingScans(dataset_dir=str(decathlon)).training
        data = TrainingPairs(data=scans, length=20, seed=1, transform=lambda item: item)
        epochs = []
        for epoch in (1, 2, 1):
            data.set_epoch(epoch)
            pairs = [(number(p["fixed"]), number(p["moving"])) for p in (data[i] for i in range(len(data)))]
            assert all(number(data[i]["fixed_label"]) == fixed for i, (fixed, _) in enumerate(pairs))
            epochs.append(pairs)
        assert len(data) == 20
        assert all(fixed != moving for fixed, moving in epochs[0])
        assert epochs[0] == epochs[2] != epochs[1]

    def test_validation_pairs_are_the_same_each_epoch(self, decathlon: Path) -> None:
        scans = TrainingScans(dataset_dir=str(decathlon), validation=4).validation
        data = TrainingPairs(data=scans, pairing="neighbours", fixed_epoch=True)
        data.set_epoch(3)
        assert [(number(p["fixed"]), number(p["moving"])) for p in (data[i] for i in range(len(data)))] == [
            (6, 7), (7, 8), (8, 9), (9, 6)
        ]  # fmt: skip

    def test_given_pairs_stay_pairs(self) -> None:
        data = TrainingPairs(data=[{"fixed": "a", "moving": "b"}, {"fixed": "c", "moving": "d"}])
        assert [data[i]["moving"] for i in range(2)] == ["b", "d"]

    def test_without_scans_pairs_are_generated(self) -> None:
        data = TrainingPairs(data=[], length=2, shape=(16, 16, 16), seed=3, recipe={"labels": 4})
        expected = SyntheticPairs(length=2, shape=(16, 16, 16), seed=3, recipe={"labels": 4})
        data.set_epoch(2)
        expected.set_epoch(2)
        assert torch.equal(data[1]["image"], expected[1]["image"])
        fixed = TrainingPairs(data=[], length=1, shape=(16, 16, 16), fixed_epoch=True)
        before = fixed[0]["image"]
        fixed.set_epoch(4)
        assert torch.equal(fixed[0]["image"], before)
