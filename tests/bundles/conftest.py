"""What the gates of all bundles share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_list import BUNDLES

from common.packing import pack_bundle


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that takes `bundle` runs for every bundle."""
    if "bundle" in metafunc.fixturenames:
        metafunc.parametrize("bundle", BUNDLES, ids=lambda path: path.name, scope="session")


@pytest.fixture(autouse=True)
def _strict_process(restored_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI refuses a key that a config names twice."""
    monkeypatch.setenv("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small pair with other shapes, spacings and orientations, and labels: a ball and a shifted, larger ball."""
    folder = tmp_path_factory.mktemp("scans")
    fixed_affine = np.array([[0, -2.0, 0, 30], [1.5, 0, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1.0]])
    moving_affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    moving_affine[:3, 3] = fixed_affine[:3] @ [17, 15, 13, 1] + [42, -44, -38]
    paths = {}
    for name, shape, affine, shift, radius in (
        ("fixed", (36, 32, 28), fixed_affine, 0.0, 16.0),
        ("moving", (44, 46, 40), moving_affine, 4.0, 18.0),
    ):
        voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        centre = fixed_affine[:3] @ [17.5, 15.5, 13.5, 1] + shift
        offset = voxels @ affine[:3, :3].T + affine[:3, 3] - centre
        distance = np.linalg.norm(offset, axis=-1)
        texture = 0.3 * np.cos(offset[..., 0] / 5) * np.cos(offset[..., 1] / 6) * (distance < radius)
        image = 1 / (1 + np.exp(distance - radius)) + texture
        paths[name] = folder / f"{name}.nii.gz"
        paths[f"{name}_label"] = folder / f"{name}_label.nii.gz"
        nib.save(nib.Nifti1Image(np.float32(100 * image), affine), paths[name])
        nib.save(nib.Nifti1Image(np.uint8(distance < radius), affine), paths[f"{name}_label"])
    return paths


@pytest.fixture(scope="session")
def unpacked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as a user has it who downloaded the zip, in a folder with nothing else."""
    folder = tmp_path_factory.mktemp(f"unpacked_{bundle.name}")
    archive = pack_bundle(bundle, folder)
    subprocess.run([sys.executable, "-m", "zipfile", "-e", archive, folder], check=True)
    archive.unlink()
    return folder / bundle.name


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in another process, that sees of the repository only what it is told."""

    def run(*arguments: str | Path, cwd: Path, pythonpath: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if pythonpath is not None:
            environment["PYTHONPATH"] = pythonpath
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
