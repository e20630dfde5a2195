"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from grids import rotation
from monai.bundle import ConfigWorkflow


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans; they are not part of the repository."""
    folder = Path(
        os.environ.get("REGISTRATION_TEST_DATA") or Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    )
    if not folder.is_dir():
        pytest.skip("no real scans: neither ../shared/data nor REGISTRATION_TEST_DATA is a folder")
    return folder.resolve()


@pytest.fixture
def oblique_affine() -> np.ndarray:
    """(4, 4) voxel -> LPS mm: turned about two axes, 1.2 x 0.8 x 2.5 mm, far from the origin, right-handed."""
    affine = np.eye(4)
    affine[:3, :3] = (rotation(25, 2) @ rotation(-15, 0)) * [1.2, 0.8, 2.5]
    affine[:3, 3] = [-140.0, 63.5, 412.25]
    return affine


@pytest.fixture
def restored_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A workflow changes the process: search path, hook for exceptions, determinism."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.deterministic = False
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def workflow(restored_process: None) -> Callable[..., ConfigWorkflow]:
    """Builds configs of a bundle in this process, as `monai.bundle run` does, up to `run`."""

    def build(bundle: Path, names: Sequence[str], kind: str, **changes: object) -> ConfigWorkflow:
        """With nothing but the configs' own `initialize` to find the bundle's code."""
        sys.path[:] = [path for path in sys.path if Path(path).resolve() != bundle]
        files = [str(bundle / "configs" / f"{name}.json") for name in names]
        result = ConfigWorkflow(config_file=files, workflow_type=kind, logging_file=False, **changes)
        result.initialize()
        return result

    return build


@pytest.fixture
def small_disk() -> Callable[[], AbstractContextManager[None]]:
    """Context in which no file may grow beyond 3000 bytes: to a writer, a disk that fills up.

    Not for the whole test: pytest's own output may go to a file.
    """
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit() -> Iterator[None]:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limit


_ANTS = """
import sys, ants
fixed, moving, *transforms = sys.argv[1:]
for transform in transforms:
    arguments = ants.image_read(fixed), ants.image_read(moving), [transform]
    ants.image_write(ants.apply_transforms(*arguments, interpolator="linear"), transform + ".ants.nii.gz")
"""


@pytest.fixture(scope="session")
def ants_resample() -> Callable[..., list[np.ndarray]]:
    """Resample by ANTs, (i, j, k), once for each transform file.

    In a process of its own: ANTs' and ITK's HDF5 libraries in one process crash it when it ends.
    """

    def resample(fixed: Path, moving: Path, *transforms: Path) -> list[np.ndarray]:
        subprocess.run([sys.executable, "-c", _ANTS, fixed, moving, *transforms], check=True, capture_output=True)
        return [np.asarray(nib.load(f"{transform}.ants.nii.gz").dataobj) for transform in transforms]

    return resample
