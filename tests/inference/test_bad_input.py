"""Bad input ends the command with exit code 1 and one sentence that names what is wrong, and leaves nothing behind.

`SystemExit` with a text is exit code 1 and that text on stderr; some of the cases go through a real process.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_list import ROOT
from known_pair import CONFIG, Known
from torch import nn

Arguments = dict[str, Any]
Case = Callable[[Path, Arguments], str]
"""Makes one thing wrong in a folder with a good pair; returns what the sentence has to say."""


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), path)
    return str(path)


def missing_file(folder: Path, arguments: Arguments) -> str:
    arguments["moving"] = str(folder / "absent.nii.gz")
    return "absent.nii.gz"


def truncated_gzip(folder: Path, arguments: Arguments) -> str:
    path = Path(arguments["moving"])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "moving.nii.gz"


def truncated_uncompressed(folder: Path, arguments: Arguments) -> str:
    path = folder / "short.nii"
    path.write_bytes(gzip.decompress(Path(arguments["moving"]).read_bytes())[:-5000])
    arguments["moving"] = str(path)
    return "short.nii"


def text_named_nifti(folder: Path, arguments: Arguments) -> str:
    (folder / "text.nii.gz").write_text("not an image\n")
    arguments["fixed"] = str(folder / "text.nii.gz")
    return "text.nii.gz"


def empty_file(folder: Path, arguments: Arguments) -> str:
    (folder / "empty.nii.gz").touch()
    arguments["fixed"] = str(folder / "empty.nii.gz")
    return "empty.nii.gz is empty"


def folder_without_scans(folder: Path, arguments: Arguments) -> str:
    (folder / "series").mkdir()
    arguments["moving"] = str(folder / "series")
    return "series"


def flat_image(folder: Path, arguments: Arguments) -> str:
    arguments["moving"] = save(folder / "flat.nii.gz", np.random.default_rng(0).random((20, 20), np.float32))
    return "flat.nii.gz"


def image_4d(folder: Path, arguments: Arguments) -> str:
    arguments["moving"] = save(folder / "time.nii.gz", np.random.default_rng(0).random((20, 20, 20, 3), np.float32))
    return "time.nii.gz"


def nan_everywhere(folder: Path, arguments: Arguments) -> str:
    arguments["moving"] = save(folder / "nan.nii.gz", np.full((20, 20, 20), np.nan, np.float32))
    return "nan.nii.gz has no finite voxel"


def constant_image(folder: Path, arguments: Arguments) -> str:
    arguments["fixed"] = save(folder / "constant.nii.gz", np.full((20, 20, 20), 7, np.float32))
    return "constant.nii.gz is constant"


def singular_affine(folder: Path, arguments: Arguments) -> str:
    path = folder / "singular.nii.gz"
    raw = bytearray(nib.Nifti1Image(np.random.default_rng(0).random((20, 20, 20), np.float32), np.eye(4)).to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]))
    header["qform_code"], header["sform_code"] = 0, 1
    header["srow_x"], header["srow_y"], header["srow_z"] = [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)))
    arguments["moving"] = str(path)
    return "singular.nii.gz"


def no_overlap(folder: Path, arguments: Arguments) -> str:
    image = nib.load(arguments["moving"])
    affine = image.affine.copy()
    affine[:3, 3] += [0, 0, 1000]
    arguments["moving"] = save(folder / "far.nii.gz", np.float32(image.get_fdata()), affine)
    arguments["affine"] = "none"
    return "do not overlap in space"


def label_of_another_shape(folder: Path, arguments: Arguments) -> str:
    image = nib.load(arguments["fixed"])
    arguments["fixed_label"] = save(folder / "cut.nii.gz", np.ones((20, 20, 20), np.uint8), image.affine)
    arguments["moving_label"] = str(folder / "moving_label.nii.gz")
    return "cut.nii.gz"


def label_with_fractions(folder: Path, arguments: Arguments) -> str:
    image = nib.load(arguments["moving"])
    arguments["moving_label"] = save(folder / "half.nii.gz", np.full(image.shape, 0.5, np.float32), image.affine)
    return "half.nii.gz is no label map"


def empty_mask(folder: Path, arguments: Arguments) -> str:
    image = nib.load(arguments["fixed"])
    arguments["fixed_mask"] = save(folder / "mask.nii.gz", np.zeros(image.shape, np.uint8), image.affine)
    return "mask.nii.gz is an empty mask"


def landmarks_of_two_columns(folder: Path, arguments: Arguments) -> str:
    (folder / "two.csv").write_text("1,2\n3,4\n")
    arguments["fixed_landmarks"] = str(folder / "two.csv")
    arguments["moving_landmarks"] = str(folder / "moving_landmarks.csv")
    return "two.csv has 2 columns in line 1"


def landmarks_of_other_number(folder: Path, arguments: Arguments) -> str:
    (folder / "few.csv").write_text("1,2,3\n")
    arguments["fixed_landmarks"] = str(folder / "fixed_landmarks.csv")
    arguments["moving_landmarks"] = str(folder / "few.csv")
    return "few.csv holds 1"


def moving_landmarks_alone(folder: Path, arguments: Arguments) -> str:
    arguments["moving_landmarks"] = str(folder / "moving_landmarks.csv")
    return "moving_landmarks.csv need fixed ones"


def weights_of_another_network(folder: Path, arguments: Arguments) -> str:
    arguments["weights"] = str(folder / "other.pt")
    torch.save(nn.Conv3d(2, 3, 3).state_dict(), arguments["weights"])
    return "other.pt belong to another network"


def missing_weights(folder: Path, arguments: Arguments) -> str:
    arguments["weights"] = str(folder / "none.pt")
    return "none.pt do not exist"


def text_weights(folder: Path, arguments: Arguments) -> str:
    arguments["weights"] = str(folder / "text.pt")
    (folder / "text.pt").write_text("epoch 3\n")
    return "text.pt cannot be read"


def weights_with_code(folder: Path, arguments: Arguments) -> str:
    arguments["weights"] = str(folder / "code.pt")
    torch.save(nn.Conv3d(2, 3, 3), arguments["weights"])  # a pickled object, not a state dict
    return "code.pt cannot be read"


def output_under_a_file(folder: Path, arguments: Arguments) -> str:
    (folder / "out").write_text("in the way")
    arguments["output_dir"] = str(folder / "out" / "pair")
    return "out is a file"


def output_not_writable(folder: Path, arguments: Arguments) -> str:
    arguments["output_dir"] = "/proc/registration"  # refused to root as well
    return "/proc/registration cannot be used for results"


def no_output(folder: Path, arguments: Arguments) -> str:
    del arguments["output_dir"]
    return "--output_dir"


def no_moving_image(folder: Path, arguments: Arguments) -> str:
    del arguments["moving"]
    return "no moving image"


def unknown_affine(folder: Path, arguments: Arguments) -> str:
    arguments["affine"] = "similarity"
    return "'similarity'"


def unknown_modality(folder: Path, arguments: Arguments) -> str:
    arguments["modality"] = "us"
    return "'us'"


def negative_spacing(folder: Path, arguments: Arguments) -> str:
    arguments["spacing"] = -2
    return "-2"


def tiny_spacing(folder: Path, arguments: Arguments) -> str:
    arguments["spacing"] = 0.01
    return "choose a larger spacing"


def negative_margin(folder: Path, arguments: Arguments) -> str:
    arguments["margin"] = -1
    return "the margin must be a number of mm, 0 or more, got -1"


def negative_iterations(folder: Path, arguments: Arguments) -> str:
    arguments["instance_optimization"] = -1
    return "negative, got -1"


def many_iterations(folder: Path, arguments: Arguments) -> str:
    arguments["instance_optimization"] = "many"
    return "a number of steps, got 'many'"


def unknown_similarity(folder: Path, arguments: Arguments) -> str:
    arguments["instance_optimization"] = 1
    arguments["instance_similarity"] = "ssd"
    return "'ssd'"


def missing_list(folder: Path, arguments: Arguments) -> str:
    del arguments["fixed"], arguments["moving"]
    arguments["datalist"] = str(folder / "pairs.csv")
    return "pairs.csv"


def list_with_a_wrong_column(folder: Path, arguments: Arguments) -> str:
    del arguments["fixed"], arguments["moving"]
    arguments["datalist"] = str(folder / "pairs.json")
    (folder / "pairs.json").write_text(json.dumps([{"fixed": "a.nii.gz", "floating": "b.nii.gz"}]))
    return "pairs.json"


def list_and_pair(folder: Path, arguments: Arguments) -> str:
    (folder / "pairs.csv").write_text("fixed,moving\nfixed.nii.gz,moving.nii.gz\n")
    arguments["datalist"] = str(folder / "pairs.csv")
    return "not both"


CASES: list[Case] = [
    missing_file, truncated_gzip, truncated_uncompressed, text_named_nifti, empty_file, folder_without_scans,
    flat_image, image_4d, nan_everywhere, constant_image, singular_affine, no_overlap,
    label_of_another_shape, label_with_fractions, empty_mask,
    landmarks_of_two_columns, landmarks_of_other_number, moving_landmarks_alone,
    weights_of_another_network, missing_weights, text_weights, weights_with_code,
    output_under_a_file, output_not_writable, no_output, no_moving_image,
    unknown_affine, unknown_modality, negative_spacing, tiny_spacing, negative_margin,
    negative_iterations, many_iterations,
    unknown_similarity,
    missing_list, list_with_a_wrong_column, list_and_pair,
]  # fmt: skip


@pytest.fixture
def arguments(known: Known, tmp_path: Path) -> Arguments:
    """Of a good run; the folder also holds labels and landmarks."""
    files = known.write(tmp_path)
    return {"fixed": files["fixed"], "moving": files["moving"], "output_dir": str(tmp_path / "results" / "pair")}


def assert_one_sentence(message: str, expected: str) -> None:
    assert message.startswith("error: ")
    assert expected in message
    assert "\n" not in message.strip()
    assert "Traceback" not in message and "Error" not in message
    assert len(message) < 400


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_in_this_process(
    case: Case,
    arguments: Arguments,
    tmp_path: Path,
    register: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = case(tmp_path, arguments)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as caught:
        register(**arguments)
    assert isinstance(caught.value.code, str)  # which Python prints, and exits with 1
    assert_one_sentence(caught.value.code, expected)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before  # nothing made or touched


def test_disk_full_while_writing(
    arguments: Arguments,
    tmp_path: Path,
    register: Callable[..., None],
    small_disk: Callable[[], AbstractContextManager[None]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught, small_disk():
        register(**arguments)
    assert isinstance(caught.value.code, str)
    assert_one_sentence(caught.value.code, "cannot be written")
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert set(tmp_path.rglob("*")) == before


def test_a_failed_run_keeps_older_results(arguments: Arguments, tmp_path: Path, register: Callable[..., None]) -> None:
    out = Path(arguments["output_dir"])
    out.mkdir(parents=True)
    (out / "warped.nii.gz").write_bytes(b"older")
    truncated_gzip(tmp_path, arguments)
    with pytest.raises(SystemExit):
        register(**arguments)
    assert [path.name for path in out.iterdir()] == ["warped.nii.gz"]
    assert (out / "warped.nii.gz").read_bytes() == b"older"


def test_a_good_run_is_good(arguments: Arguments, register: Callable[..., None]) -> None:
    """The pair of all these cases is not what is wrong."""
    register(**arguments)
    assert (Path(arguments["output_dir"]) / "metrics.json").is_file()


@pytest.mark.parametrize(
    "case",
    [
        text_named_nifti,
        *(pytest.param(case, marks=pytest.mark.slow) for case in (weights_of_another_network, no_output)),
    ],
    ids=lambda case: case.__name__,
)
def test_in_a_process_of_its_own(case: Case, arguments: Arguments, tmp_path: Path) -> None:
    expected = case(tmp_path, arguments)
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", CONFIG, "--device", "cpu"]
    for key, value in arguments.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert_one_sentence(errors[0], expected)
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()
