"""A packed bundle runs alone: nothing of the repository is on the path."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import pytest
from bundle_list import ROOT

from common.errors import InputError
from common.packing import VENDORED_FILE, content_hash, main, pack_bundle, packed_files

Python = Callable[..., subprocess.CompletedProcess[str]]

# Builds the network from a config as `monai.bundle run` would, and says whose `common` it got.
BUILD = """
import sys, json, logging
from monai.bundle import ConfigWorkflow
options = json.loads(sys.argv[1])
workflow = ConfigWorkflow(workflow_type="infer", logging_file=False, **options)
workflow.initialize()
workflow.network_def
workflow.preprocessing
import common
print("COMMON", common.__file__)
"""


def test_twice_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    digests = [
        hashlib.sha256(pack_bundle(bundle, tmp_path / name).read_bytes()).hexdigest() for name in ("first", "second")
    ]
    assert digests[0] == digests[1]


def test_name_and_contents(bundle: Path, unpacked: Path, tmp_path: Path) -> None:
    version = json.loads((bundle / "configs" / "metadata.json").read_text())["version"]
    assert pack_bundle(bundle, tmp_path).name == f"{bundle.name}_v{version}.zip"
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert found == {*packed_files(bundle), VENDORED_FILE}
    assert {"LICENSE", "configs/inference.json", "models/model.pt", "common/__init__.py"} <= found
    assert not [name for name in found if "__pycache__" in name or name.endswith(".pyc") or "test" in name]


def test_vendored_common_is_what_it_says(unpacked: Path) -> None:
    vendored = json.loads((unpacked / VENDORED_FILE).read_text())
    files = {path.relative_to(unpacked).as_posix(): path for path in (unpacked / "common").rglob("*.py")}
    assert vendored["sha256"] == content_hash(files)
    assert f'__version__ = "{vendored["version"]}"' in files["common/__init__.py"].read_text()


def test_leaves_out_what_a_user_has_lying_there(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / bundle.name
    for name, path in packed_files(bundle).items():
        if not name.startswith("common/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(path.read_bytes())
    expected = set(packed_files(copy))
    for name in ("runs/x/model.pt", "eval/schema.json", "configs/.hidden", "configs/__pycache__/a.pyc", "notes.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("")
    assert set(packed_files(copy)) == expected


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no LICENSE"):
        pack_bundle(tmp_path, tmp_path / "dist")
    with pytest.raises(SystemExit, match=r"error: .* cannot be packed"):
        main([str(tmp_path), "--output_dir", str(tmp_path / "dist")])
    assert not (tmp_path / "dist").exists()


def test_registers_from_the_parent_folder(
    bundle: Path, unpacked: Path, scans: dict[str, Path], tmp_path: Path, python: Python
) -> None:
    """The command of the documentation, on two scans with other shapes and orientations."""
    done = python(
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        f"{bundle.name}/configs/inference.json",
        *("--fixed", scans["fixed"], "--moving", scans["moving"], "--output_dir", tmp_path / "out"),
        *("--moving_label", scans["moving_label"], "--fixed_label", scans["fixed_label"]),
        *("--affine", "moments", "--report", "False", "--device", "cpu"),
        cwd=unpacked.parent,
    )
    assert done.returncode == 0, done.stderr
    warped, fixed = nib.load(tmp_path / "out" / "warped.nii.gz"), nib.load(scans["fixed"])
    assert warped.shape == fixed.shape and abs(warped.affine - fixed.affine).max() < 1e-4
    dice = json.loads((tmp_path / "out" / "metrics.json").read_text())["overlap"]["dice"]
    assert max(dice.values()) > 0.8


@pytest.mark.parametrize("place", ["inside", "elsewhere"])
def test_builds_from(place: str, bundle: Path, unpacked: Path, tmp_path: Path, python: Python) -> None:
    if place == "inside":
        cwd, options = unpacked, {"config_file": "configs/inference.json"}
    else:
        cwd, options = tmp_path, {"config_file": str(unpacked / "configs/inference.json"), "bundle_root": str(unpacked)}
    done = python("-c", BUILD, json.dumps(options), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split("COMMON ")[1].strip()).is_relative_to(unpacked)


def test_builds_from_inside_the_repository(bundle: Path, python: Python) -> None:
    done = python("-c", BUILD, json.dumps({"config_file": "configs/inference.json"}), cwd=bundle, pythonpath="../..")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split("COMMON ")[1].strip()).resolve() == ROOT / "common" / "__init__.py"


def test_monai_loads_the_packed_bundle(bundle: Path, unpacked: Path, python: Python) -> None:
    code = (
        "import monai.bundle, sys\n"
        f"network = monai.bundle.load({bundle.name!r}, bundle_dir='.', workflow_type='inference', device='cpu')\n"
        "print('LOADED', type(network).__module__, sum(p.numel() for p in network.parameters()))\n"
    )
    done = python("-c", code, cwd=unpacked.parent)
    assert done.returncode == 0, done.stderr
    module = done.stdout.split("LOADED ")[1].split()[0].split(".")[0]
    assert (bundle / module / "__init__.py").is_file()
