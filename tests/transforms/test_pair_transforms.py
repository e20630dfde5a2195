"""Finding, loading and exchanging the scans of a pair; and the whole chain on real scans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, ConcatItemsd, EnsureChannelFirstd, LoadImaged

from common.data import read_decathlon
from common.data.pairs import PairDataset
from common.errors import InputError
from common.transforms import LoadKeypointsd, NormalizeImaged, ResampleToNetworkGridd, ResolvePaird, SwapPaird


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("f.nii.gz", "m.nii.gz", "seg/m.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_moving_is_found_beside_fixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = str(folder / "f.nii.gz")
    resolve = ResolvePaird()
    result = resolve({"image": image, "moving": "m.nii.gz", "moving_label": "seg/m.nii.gz"})
    assert result["fixed"] == result["image"] == image
    assert result["moving"] == str(folder / "m.nii.gz")
    assert result["moving_label"] == str(folder / "seg" / "m.nii.gz")
    monkeypatch.chdir(folder.parent)
    relative = resolve({"image": f"{folder.name}/f.nii.gz", "moving": "m.nii.gz"})
    assert relative["moving"] == str(folder / "m.nii.gz")


def test_moving_may_be_uploaded_as_label(folder: Path) -> None:
    image, upload = str(folder / "f.nii.gz"), str(folder / "seg" / "m.nii.gz")
    result = ResolvePaird()({"image": image, "moving": "", "moving_label": "", "label": upload})
    assert result["moving"] == upload
    assert "moving_label" not in result
    assert ResolvePaird()({"image": image, "moving": "m.nii.gz", "label": upload})["moving"] == str(folder / "m.nii.gz")


def test_fixed_that_is_there_is_kept(folder: Path) -> None:
    fixed, moving = str(folder / "f.nii.gz"), str(folder / "m.nii.gz")
    assert ResolvePaird()({"image": moving, "fixed": fixed, "moving": "m.nii.gz"})["fixed"] == fixed
    loaded = torch.zeros(1, 2, 2, 2)
    assert ResolvePaird()({"fixed": loaded, "moving": loaded})["moving"] is loaded


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"image": "f.nii.gz"}, "no moving scan: give its path as the parameter 'moving'"),
        ({"image": "f.nii.gz", "moving": " "}, "no moving scan"),
        ({"moving": "m.nii.gz"}, "no fixed scan"),
        ({"image": "f.nii.gz", "moving": "n.nii.gz"}, r"'moving': there is no file '.*n\.nii\.gz'"),
        ({"image": torch.zeros(1), "moving": "m.nii.gz"}, "relative path 'm.nii.gz'"),
    ],
)
def test_requests_that_cannot_be_served(folder: Path, data: dict[str, Any], message: str) -> None:
    if isinstance(data.get("image"), str):
        data = {**data, "image": str(folder / data["image"])}
    with pytest.raises(InputError, match=message):
        ResolvePaird()(data)


def test_key_points_are_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("1,2,3\n4,5,6.5\n")
    (tmp_path / "m.csv").write_text("1,2,3\n")
    fixed, moving = str(tmp_path / "f.csv"), str(tmp_path / "m.csv")
    result = LoadKeypointsd()({"fixed_keypoints": fixed, "moving_keypoints": fixed})
    assert torch.equal(result["moving_keypoints"], torch.tensor([[1, 2, 3], [4, 5, 6.5]]))
    with pytest.raises(InputError, match=r"2 in .*f\.csv', 1 in .*m\.csv"):
        LoadKeypointsd()({"fixed_keypoints": fixed, "moving_keypoints": moving})


def test_swap_exchanges_all_that_belongs_to_the_scans() -> None:
    data = {"fixed": 1, "moving": 2, "fixed_label": 3, "moving_label": 4, "moving_mask": 5, "fixedness": 6, "id": 7}
    swapped = {"fixed": 2, "moving": 1, "fixed_label": 4, "moving_label": 3, "fixed_mask": 5, "fixedness": 6, "id": 7}
    assert SwapPaird(1.0)(data) == swapped
    assert SwapPaird(0.0)(data) == data
    swap = SwapPaird(0.3)
    swap.set_random_state(seed=0)
    share = np.mean([swap(data)["fixed"] == 2 for _ in range(400)])
    assert 0.22 < share < 0.38


@pytest.mark.data
def test_training_chain_on_real_scans(shared_data: Path) -> None:
    """Crops of differing shapes to batches; aligning the crops' centres raises the overlap."""
    items = read_decathlon(shared_data / "Task04_Hippocampus")[-8:]
    keys = ["fixed", "moving", "fixed_label", "moving_label"]
    dice = {}
    for centre_align in (True, False):
        transform = Compose(
            [
                LoadImaged(keys),
                EnsureChannelFirstd(keys),
                NormalizeImaged(["fixed", "moving"]),
                ResampleToNetworkGridd(shape=(48, 64, 48), spacing=1.0, centre_align=centre_align),
                ConcatItemsd(keys=["moving", "fixed"], name="image"),
            ]
        )
        values = []
        for batch in DataLoader(PairDataset(items, transform, pairing="neighbours"), batch_size=4):
            assert batch["image"].shape == (4, 2, 48, 64, 48)
            assert 0 <= float(batch["image"].min()) < float(batch["image"].max()) <= 1
            assert set(batch["fixed_label"].unique().tolist()) == {0, 1, 2}
            for structure in (1, 2):
                fixed, moving = batch["fixed_label"] == structure, batch["moving_label"] == structure
                both = (fixed & moving).sum((1, 2, 3, 4))
                values += (2 * both / (fixed.sum((1, 2, 3, 4)) + moving.sum((1, 2, 3, 4)))).tolist()
        dice[centre_align] = float(np.mean(values))
    assert dice[True] == pytest.approx(0.58, abs=0.1)
    assert dice[True] > dice[False]
