"""The demonstration's pair: its stated truth is the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.data.phantom import check, create, head, true_transform
from common.geometry.spaces import grid_of, itk_to_array
from common.io import read_image, write_transform


@pytest.fixture(scope="module", params=[4.0, 50.0], ids=lambda angle: f"turned by {angle:.0f}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("phantom")
    create(str(folder), rotation=request.param)
    return folder, request.param


def test_the_truth_aligns_the_pair(pair: tuple[Path, float]) -> None:
    folder, rotation = pair
    fixed, label = (read_image(folder / f"{name}.nii.gz") for name in ("fixed", "fixed_label"))
    inside = np.argwhere(itk_to_array(label) > 0)[::97]
    points = grid_of(fixed).to_physical(inside)
    intensity, structure = head(true_transform(points, rotation))
    values = itk_to_array(fixed)[tuple(inside.T)] / 1000
    assert np.corrcoef(values, intensity)[0, 1] > 0.99
    assert np.array_equal(structure, itk_to_array(label)[tuple(inside.T)])


@pytest.mark.parametrize("perfect", [False, True])
def test_check_tells_the_error(pair: tuple[Path, float], capsys: pytest.CaptureFixture[str], perfect: bool) -> None:
    folder, rotation = pair
    grid = grid_of(read_image(folder / "fixed.nii.gz"))
    points = grid.to_physical(np.argwhere(np.ones(grid.shape)))
    displacement = (true_transform(points, rotation) - points).reshape(*grid.shape, 3) * perfect
    result = folder / f"result_{perfect}"
    result.mkdir(exist_ok=True)
    write_transform(result / "transform.h5", affine=np.eye(4), displacement=displacement, grid=grid)
    check(str(folder), str(result), rotation=rotation)
    first = capsys.readouterr().out.splitlines()[0]
    before, after = (float(part.split()[1]) for part in first.split(": ")[1].replace(" (mean)", "").split(", "))
    assert before > 8
    assert after < 0.05 if perfect else after == before


def test_check_without_a_result(pair: tuple[Path, float], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: "):
        check(str(pair[0]), str(tmp_path))
