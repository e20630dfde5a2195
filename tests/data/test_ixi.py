"""IXI's pickles: what is read, and that a pickle with anything but arrays in it is refused unrun."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ixi_layout import LEFT_RIGHT, OTHERS, SINGLE, make_ixi
from monai.transforms import Compose, LoadImaged

from common.data import TrainingScans
from common.data.ixi import IXI_EVALUATED, IXI_LABELS, IXI_STRUCTURES, is_ixi, read_ixi, read_ixi_scan, remap_ixi_labels
from common.data.readers import read_datalist, read_dataset, read_evaluation_rules
from common.errors import InputError, find_registration_error


@pytest.fixture(scope="module")
def ixi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ixi(tmp_path_factory.mktemp("ixi"))


def test_atlas_to_each_person(ixi: Path) -> None:
    training, validation = read_dataset(ixi)
    assert [pair["id"] for pair in training] == ["subject_0", "subject_2", "subject_10"]
    assert [pair["id"] for pair in validation] == ["subject_3", "subject_4"]
    atlas, person = str(ixi / "atlas.pkl"), str(ixi / "Train" / "subject_10.pkl")
    assert training[2] == {
        "id": "subject_10",
        "fixed": person,
        "moving": atlas,
        "fixed_label": f"{person}#label",
        "moving_label": f"{atlas}#label",
    }
    assert read_datalist(ixi) == training == read_ixi(ixi, "training")
    assert is_ixi(ixi) and is_ixi(ixi / "Test") and not is_ixi(ixi.parent)
    assert read_dataset(ixi / "Test") == (read_ixi(ixi, "test"), [])
    test = TrainingScans(dataset_dir=str(ixi), datalist="Test", validation="all")
    assert [pair["id"] for pair in test.validation] == ["subject_5"]
    assert test.rules == read_evaluation_rules(ixi) and dict(test.rules.structures) == IXI_STRUCTURES


def test_images_and_labels(ixi: Path) -> None:
    pair = LoadImaged(["fixed", "moving", "fixed_label", "moving_label"], ensure_channel_first=True)(
        read_ixi(ixi, "test")[0]
    )
    image, numbers = pickle.loads((ixi / "Test" / "subject_5.pkl").read_bytes())
    assert torch.equal(pair["fixed"][0].as_tensor(), torch.from_numpy(image))
    label = pair["fixed_label"][0].as_tensor().numpy().astype(int)
    known = np.isin(numbers, IXI_LABELS)
    assert (~known).sum() > 0 and not label[~known].any()
    np.testing.assert_array_equal(np.array(IXI_LABELS)[label[known]], numbers[known])
    np.testing.assert_array_equal(pair["moving"].affine, np.eye(4))
    assert pair["moving_label"].shape == pair["fixed"].shape == (1, *image.shape)


def test_the_tables() -> None:
    """46 labels; the 30 that are evaluated are those of the 17 structures, whose names FreeSurfer gives."""
    assert len(IXI_LABELS) == 46 and list(IXI_LABELS) == sorted(set(IXI_LABELS))
    assert (
        *(1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 21, 22, 23, 25, 26, 27, 28, 29, 30, 31, 32),
        *(34, 36),
    ) == IXI_EVALUATED
    names = {name: tuple(IXI_LABELS[label] for label in labels) for name, labels in IXI_STRUCTURES.items()}
    assert names == LEFT_RIGHT | SINGLE and len(names) == 17
    everything = np.arange(-5, 3000)
    remapped = remap_ixi_labels(everything)
    assert [int(remapped[n + 5]) for n in IXI_LABELS] == list(range(46))
    assert np.count_nonzero(remapped) == 45 and remap_ixi_labels(np.array([29.0, 255.0])).tolist() == [0, 45]
    assert set(OTHERS) - set(IXI_LABELS) == {29}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_protocol(tmp_path: Path, protocol: int, order: Any) -> None:
    image = np.asarray(np.random.default_rng(0).random((3, 4, 5)), dtype=np.float64, order=order)
    label = np.asarray(np.arange(60).reshape(3, 4, 5), order=order)
    for content in ((image, label), [image, label.astype(np.float32)], (image.T[::-1].T, label)):
        (tmp_path / "s.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        read, labels = read_ixi_scan(tmp_path / "s.pkl")
        np.testing.assert_array_equal(read, content[0].astype(np.float32))
        np.testing.assert_array_equal(labels, remap_ixi_labels(label))
        assert read.dtype == np.float32 and labels.dtype == np.int16


def test_names_of_an_older_numpy(tmp_path: Path) -> None:
    """The published pickles are from before numpy 2, whose modules have an underscore more."""
    for protocol in (2, 4):
        pair = np.zeros((2, 2, 2), np.float32), np.ones((2, 2, 2), np.int32)
        content = pickle.dumps(pair, protocol=protocol)
        new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
        assert new in content
        if protocol == 4:  # lengths precede names and frames
            new, old = bytes([len(new)]) + new, bytes([len(old)]) + old
            (length,) = struct.unpack("<Q", content[3:11])
            content = content[:3] + struct.pack("<Q", length - 1) + content[11:]
        (tmp_path / "s.pkl").write_bytes(content.replace(new, old))
        assert read_ixi_scan(tmp_path / "s.pkl")[0].shape == (2, 2, 2)


class _Runs:
    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.what = function, arguments, *([state] if state else [])

    def __reduce__(self) -> Any:
        return self.what


ARRAY = np.zeros((2, 2, 2), np.float32)


class TestRefusals:
    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_nothing_runs(self, tmp_path: Path, protocol: int) -> None:
        witness = tmp_path / "ran"
        attacks = [
            _Runs(os.mkdir, str(witness)),
            (ARRAY, _Runs(os.mkdir, str(witness))),
            (ARRAY, np.array([_Runs(os.mkdir, str(witness))], dtype=object)),
            (ARRAY, _Runs(eval, f"__import__('os').mkdir({str(witness)!r})")),
            (ARRAY, _Runs(__import__, "os")),
            (ARRAY, Path("x")),
        ]
        for attack in attacks:
            path = tmp_path / "s.pkl"
            path.write_bytes(pickle.dumps(attack, protocol=protocol))
            with pytest.raises(InputError) as caught:
                read_ixi_scan(path)
            said = str(caught.value)
            assert said.startswith(f"'{path}' is refused, for it is no pickle of plain numpy arrays: it asks for '")
            assert "\n" not in said and not witness.exists()

    def test_what_may_be_called_cannot_be_changed(self, tmp_path: Path) -> None:
        """A pickle can set attributes of what it has got hold of."""
        for name in ("numpy._core.multiarray\n_reconstruct", "_codecs\nencode", "numpy\ndtype", "numpy\nndarray"):
            path = tmp_path / "s.pkl"
            path.write_bytes(b"c" + name.encode() + b"\n}X\x08\x00\x00\x00__call__K\x01sb.")
            with pytest.raises(InputError):
                read_ixi_scan(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (ARRAY, "holds no tuple of arrays"),
            ({"image": ARRAY}, "holds no tuple of arrays"),
            ((ARRAY, "label"), "holds something other than arrays of numbers"),
            ((ARRAY, np.array(["a"])), "holds something other than arrays of numbers"),
            ((ARRAY,), r"arrays of the shapes \(2, 2, 2\)$"),
            ((ARRAY, ARRAY, ARRAY), "holds no image and labels of one 3D shape"),
            ((ARRAY, ARRAY[1:]), r"of the shapes \(2, 2, 2\), \(1, 2, 2\)$"),
            ((ARRAY[0], ARRAY[0]), "holds no image and labels of one 3D shape"),
            ((), "of the shapes none"),
            ((ARRAY + np.nan, ARRAY), "the image holds values that are not finite"),
            ((ARRAY, ARRAY + 0.5), "the labels are not whole numbers"),
        ],
    )
    def test_other_contents(self, tmp_path: Path, content: Any, message: str) -> None:
        path = tmp_path / "s.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=message) as caught:
            read_ixi_scan(path)
        assert str(path) in str(caught.value)

    def test_broken_files(self, tmp_path: Path) -> None:
        path = tmp_path / "s.pkl"
        whole = pickle.dumps((ARRAY, ARRAY))
        for content in (b"", b"\x80", b"no pickle", whole[:-20], whole[: len(whole) // 2], b"\x80\x04.", b"(I1\n"):
            path.write_bytes(content)
            with pytest.raises(InputError, match=r"is a broken pickle|is refused"):
                read_ixi_scan(path)
        with pytest.raises(InputError, match="no such file"):
            read_ixi_scan(tmp_path / "none.pkl")

    def test_through_monai(self, tmp_path: Path) -> None:
        """The sentence comes through the transforms' RuntimeErrors."""
        path = tmp_path / "s.pkl"
        path.write_bytes(pickle.dumps(Path("x")))
        with pytest.raises(RuntimeError) as caught:
            Compose([LoadImaged(["image"])])({"image": str(path)})
        assert "is refused" in str(find_registration_error(caught.value))

    def test_layout(self, ixi: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="IXI has the sections training, validation, test, not 'val'"):
            read_ixi(ixi, "val")
        root = make_ixi(tmp_path)
        for file in (root / "Val").iterdir():
            file.unlink()
        with pytest.raises(InputError, match=r"Val': there is no pickle in it, such as subject_1\.pkl"):
            read_dataset(root)
        (root / "Val").rmdir()
        with pytest.raises(InputError, match=r"Val': no such folder"):
            read_dataset(root)
        (root / "atlas.pkl").unlink()
        with pytest.raises(InputError, match=r"atlas\.pkl': no such file; it is the moving scan of each pair"):
            read_ixi(root, "test")
