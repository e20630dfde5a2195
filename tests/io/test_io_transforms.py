"""What is written must mean the same to SimpleITK and to ANTs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates

from common.errors import InputError, OutputError
from common.geometry.spaces import Grid, array_to_itk, ddf_to_displacement, grid_of, itk_to_array, swap_lps_ras
from common.io import (
    build_transform,
    read_transform,
    resample_image,
    transform_points,
    transform_to_displacement,
    write_displacement,
    write_image,
    write_learn2reg,
    write_scalar_maps,
    write_transform,
)
from common.layers.warp import warp

AFFINE = np.array([[1.05, 0.04, -0.02, 1.0], [-0.05, 0.97, 0.03, -2.0], [0.01, -0.02, 1.02, 1.5], [0, 0, 0, 1]])


def smooth_field(grid: Grid) -> np.ndarray:
    """(D, H, W, 3) LPS mm, up to 3 mm, a different wave along each world axis."""
    x = grid.to_physical(np.indices(grid.shape).reshape(3, -1).T)
    waves = [3 * np.sin(x[:, 1] / 9), 2 * np.cos(x[:, 2] / 8), 2.5 * np.sin(x[:, 0] / 10 + 1)]
    return np.stack(waves, axis=-1).reshape(*grid.shape, 3).astype(np.float32)


def blobs(grid: Grid) -> np.ndarray:
    """An asymmetric picture that is near 0 at its grid's border, where rounding decides what is outside."""
    x = grid.to_physical(np.indices(grid.shape).reshape(3, -1).T)
    centres = [(20, -30, 40, 6, 100), (25, -34, 43, 3, 80), (16, -27, 36, 4, -60)]
    values = sum(h * np.exp(-((x - c) ** 2).sum(1) / (2 * s * s)) for *c, s, h in centres)
    v = np.indices(grid.shape)
    edge = np.min([np.minimum(v[a], grid.shape[a] - 1 - v[a]) for a in range(3)], axis=0)
    return (values.reshape(grid.shape) * np.clip(edge - 1, 0, 3) / 3).astype(np.float32)


@pytest.fixture
def moving(moving_grid: Grid) -> itk.Image:
    return array_to_itk(blobs(moving_grid), moving_grid)


def assert_same(first: np.ndarray, second: np.ndarray, tolerance: float) -> None:
    assert first.shape == second.shape
    assert np.ptp(first) > 50  # the images are not empty
    assert np.abs(first - second).max() < tolerance * np.ptp(first)


def sitk_reference(path: Path, grid: Grid) -> sitk.Image:
    write_image(array_to_itk(np.zeros(grid.shape, np.float32), grid), path)
    return sitk.ReadImage(str(path))


def test_total_is_affine_after_displacement(grid: Grid) -> None:
    field = smooth_field(grid)
    voxels = np.array([[3, 4, 5], [8, 6, 7], [2, 9, 8]])
    x = grid.to_physical(voxels)
    expected = (x + field[tuple(voxels.T)]) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    mapped = transform_points(build_transform(AFFINE, field, grid), x)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)
    # the other order would be another map
    assert np.abs(x @ AFFINE[:3, :3].T + AFFINE[:3, 3] + field[tuple(voxels.T)] - expected).max() > 0.05


def test_no_points_give_no_points() -> None:
    assert transform_points(build_transform(AFFINE), np.zeros((0, 3))).shape == (0, 3)


def test_outside_its_grid_the_field_is_zero(grid: Grid) -> None:
    far = grid.to_physical(np.array([[-5.0, 3, 3]]))
    np.testing.assert_allclose(transform_points(build_transform(None, smooth_field(grid), grid), far), far)


def test_simpleitk_resamples_alike(tmp_path: Path, grid: Grid, moving: itk.Image) -> None:
    field = smooth_field(grid)
    write_transform(tmp_path / "transform.h5", affine=AFFINE, displacement=field, grid=grid)
    write_image(moving, tmp_path / "moving.nii.gz")
    warped = itk_to_array(resample_image(moving, grid, build_transform(AFFINE, field, grid)))
    reference = sitk_reference(tmp_path / "fixed.nii.gz", grid)
    theirs = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "moving.nii.gz")),
        reference,
        sitk.ReadTransform(str(tmp_path / "transform.h5")),
        sitk.sitkLinear,
        0.0,
    )
    assert_same(warped, sitk.GetArrayFromImage(theirs).transpose(2, 1, 0), 1e-4)
    assert np.abs(warped - itk_to_array(resample_image(moving, grid, build_transform()))).max() > 10


def test_ants_resamples_alike(
    tmp_path: Path, grid: Grid, moving: itk.Image, ants_resample: Callable[..., list[np.ndarray]]
) -> None:
    transform = build_transform(AFFINE, smooth_field(grid), grid)
    write_transform(tmp_path / "transform.h5", affine=AFFINE, displacement=smooth_field(grid), grid=grid)
    write_displacement(tmp_path / "displacement.nii.gz", transform_to_displacement(transform, grid), grid)
    write_image(moving, tmp_path / "moving.nii.gz")
    sitk_reference(tmp_path / "fixed.nii.gz", grid)
    warped = itk_to_array(resample_image(moving, grid, transform))
    files = [tmp_path / name for name in ("fixed.nii.gz", "moving.nii.gz", "transform.h5", "displacement.nii.gz")]
    for theirs in ants_resample(*files):
        assert_same(warped, theirs, 1e-3)


def test_field_on_a_coarser_grid_that_covers_the_image(tmp_path: Path, grid: Grid, moving: itk.Image) -> None:
    coarse = grid.with_spacing(2 * grid.spacing)
    transform = build_transform(AFFINE, smooth_field(coarse), coarse)
    write_transform(tmp_path / "t.h5", affine=AFFINE, displacement=smooth_field(coarse), grid=coarse)
    ours = itk_to_array(resample_image(moving, grid, transform))
    theirs = sitk.Resample(
        _to_sitk(moving, tmp_path),
        sitk_reference(tmp_path / "fixed.nii.gz", grid),
        sitk.ReadTransform(str(tmp_path / "t.h5")),
    )
    assert_same(ours, sitk.GetArrayFromImage(theirs).transpose(2, 1, 0), 1e-4)
    fine = transform_to_displacement(transform, grid)
    exact = transform_to_displacement(build_transform(AFFINE, smooth_field(grid), grid), grid)
    inner = (slice(2, -2),) * 3
    assert np.abs(fine - exact)[inner].max() < 0.5  # the same waves, sampled half as densely


def _to_sitk(image: itk.Image, folder: Path) -> sitk.Image:
    write_image(image, folder / "image.nii.gz")
    return sitk.ReadImage(str(folder / "image.nii.gz"))


def test_nearest_keeps_label_values(tmp_path: Path, grid: Grid, moving_grid: Grid) -> None:
    labels = array_to_itk((blobs(moving_grid) // 10).astype(np.int16), moving_grid)
    transform = build_transform(AFFINE, smooth_field(grid), grid)
    warped = resample_image(labels, grid, transform, interpolation="nearest")
    assert type(warped) is itk.Image[itk.SS, 3]
    values = itk_to_array(warped)
    assert set(np.unique(values)) <= set(np.unique(itk_to_array(labels)))
    assert len(np.unique(values)) > 4
    write_transform(tmp_path / "t.h5", affine=AFFINE, displacement=smooth_field(grid), grid=grid)
    theirs = sitk.Resample(
        _to_sitk(labels, tmp_path),
        sitk_reference(tmp_path / "fixed.nii.gz", grid),
        sitk.ReadTransform(str(tmp_path / "t.h5")),
        sitk.sitkNearestNeighbor,
    )
    assert (sitk.GetArrayFromImage(theirs).transpose(2, 1, 0) != values).mean() < 1e-3  # ties may round either way


def test_default_value_outside(grid: Grid, moving: itk.Image) -> None:
    away = np.eye(4)
    away[0, 3] = 1000
    warped = resample_image(moving, grid, build_transform(away), default=-1000)
    assert (itk_to_array(warped) == -1000).all()
    ours, theirs = grid_of(warped), grid
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-9)


def test_unknown_interpolation(grid: Grid, moving: itk.Image) -> None:
    with pytest.raises(ValueError, match="cubic"):
        resample_image(moving, grid, build_transform(), interpolation="cubic")


def test_displacement_on_any_grid(grid: Grid, moving_grid: Grid) -> None:
    transform = build_transform(AFFINE, smooth_field(grid), grid)
    field = transform_to_displacement(transform, moving_grid)
    assert field.dtype == np.float32
    voxels = np.array([[5, 6, 7], [10, 11, 12]])
    x = moving_grid.to_physical(voxels)
    np.testing.assert_allclose(field[tuple(voxels.T)], transform_points(transform, x) - x, atol=1e-5)


def test_displacement_file(tmp_path: Path, grid: Grid) -> None:
    field = smooth_field(grid)
    write_displacement(tmp_path / "d.nii.gz", field, grid)
    header = nib.load(tmp_path / "d.nii.gz").header
    assert header["dim"].tolist()[:6] == [5, *grid.shape, 1, 3]
    assert header["intent_code"] == 1007
    assert header.get_data_dtype() == np.float32
    for affine, code in (header.get_sform(coded=True), header.get_qform(coded=True)):
        assert code > 0
        np.testing.assert_allclose(affine, swap_lps_ras(grid.affine), atol=1e-4)
    theirs = sitk.ReadImage(str(tmp_path / "d.nii.gz"))
    assert theirs.GetNumberOfComponentsPerPixel() == 3
    np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0, 3), field)


def test_learn2reg_file(tmp_path: Path, grid: Grid) -> None:
    rng = np.random.default_rng(0)
    ddf = rng.normal(size=(3, *grid.shape)).astype(np.float32)
    write_learn2reg(tmp_path / "l2r.nii.gz", torch.from_numpy(ddf))
    image = nib.load(tmp_path / "l2r.nii.gz")
    assert image.shape == (*grid.shape, 3)
    np.testing.assert_array_equal(image.affine, np.eye(4))
    # the challenge's own evaluation: map_coordinates at identity + field
    picture = rng.random(grid.shape).astype(np.float32)
    theirs = map_coordinates(
        picture, np.indices(grid.shape) + np.moveaxis(image.get_fdata(), -1, 0), order=1, mode="nearest"
    )
    ours = warp(torch.from_numpy(picture)[None, None], torch.from_numpy(ddf)[None])[0, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    write_learn2reg(tmp_path / "own.nii.gz", ddf, grid=grid)
    np.testing.assert_allclose(nib.load(tmp_path / "own.nii.gz").affine, swap_lps_ras(grid.affine), atol=1e-4)


def test_scalar_map_file(tmp_path: Path, grid: Grid) -> None:
    """One map is an image like any other."""
    values = blobs(grid)[None]
    write_scalar_maps(tmp_path / "map.nii.gz", values.astype(np.float64), grid)
    theirs = sitk.ReadImage(str(tmp_path / "map.nii.gz"))
    assert theirs.GetPixelID() == sitk.sitkFloat32
    np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0), values[0])
    np.testing.assert_allclose(theirs.GetOrigin(), grid.origin, atol=1e-3)
    np.testing.assert_allclose(theirs.GetSpacing(), grid.spacing, atol=1e-5)
    np.testing.assert_allclose(theirs.GetDirection(), grid.direction.ravel(), atol=1e-5)


def test_scalar_maps_file(tmp_path: Path, grid: Grid) -> None:
    """Several are volumes along the fourth axis, to nibabel and to SimpleITK, in the place of the grid."""
    values = np.stack([blobs(grid), 2 * blobs(grid), smooth_field(grid)[..., 0]])
    write_scalar_maps(tmp_path / "maps.nii.gz", values, grid)
    image = nib.load(tmp_path / "maps.nii.gz")
    assert image.shape == (*grid.shape, 3)
    assert image.header.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, swap_lps_ras(grid.affine), atol=1e-4)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), np.moveaxis(values, 0, -1))
    theirs = sitk.ReadImage(str(tmp_path / "maps.nii.gz"))
    assert theirs.GetSize() == (*grid.shape, 3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs).transpose(0, 3, 2, 1), values)
    one = theirs[:, :, :, 1]
    np.testing.assert_allclose(one.GetOrigin(), grid.origin, atol=1e-3)
    np.testing.assert_allclose(one.GetSpacing(), grid.spacing, atol=1e-5)
    np.testing.assert_allclose(one.GetDirection(), grid.direction.ravel(), atol=1e-5)


def test_network_field_and_itk_agree(grid: Grid) -> None:
    """Warping by the network's layer and resampling by ITK through the same field give one image."""
    picture = blobs(grid)
    ddf = torch.randn(1, 3, *grid.shape, generator=torch.Generator().manual_seed(0)) * 0.4
    transform = build_transform(None, ddf_to_displacement(ddf[0], grid), grid)
    ours = warp(torch.from_numpy(picture)[None, None], ddf)[0, 0].numpy()
    theirs = itk_to_array(resample_image(array_to_itk(picture, grid), grid, transform))
    assert_same(ours, theirs, 1e-4)


def test_double_vectors_survive() -> None:
    grid = Grid((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0]))
    field = np.random.default_rng(0).normal(size=(4, 5, 6, 3))
    np.testing.assert_array_equal(itk_to_array(array_to_itk(field, grid)), field)


def test_read_transform_round_trip(tmp_path: Path, grid: Grid) -> None:
    write_transform(tmp_path / "t.h5", affine=AFFINE, displacement=smooth_field(grid), grid=grid)
    write_transform(tmp_path / "a.tfm", affine=AFFINE)
    x = grid.corners * 0.6 + grid.corners.mean(0) * 0.4
    for name, built in (
        ("t.h5", build_transform(AFFINE, smooth_field(grid), grid)),
        ("a.tfm", build_transform(AFFINE)),
    ):
        np.testing.assert_allclose(
            transform_points(read_transform(tmp_path / name), x), transform_points(built, x), atol=1e-4
        )


def test_bad_transforms_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.h5").write_text("no transform")
    (tmp_path / "text.tfm").write_text("no transform")
    sitk.WriteTransform(sitk.AffineTransform(2), str(tmp_path / "plane.tfm"))
    for name in ("missing.h5", "text.h5", "text.tfm", "plane.tfm"):
        with pytest.raises(InputError, match=name):
            read_transform(tmp_path / name)
    assert capfd.readouterr().err == ""


def test_full_disk_leaves_nothing(
    tmp_path: Path, grid: Grid, small_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    field = np.random.default_rng(0).normal(size=(*grid.shape, 3)).astype(np.float32)  # does not pack
    for name, write in {
        "t.h5": lambda path: write_transform(path, affine=AFFINE, displacement=field, grid=grid),
        "d.nii.gz": lambda path: write_displacement(path, field, grid),
        "l.nii.gz": lambda path: write_learn2reg(path, np.moveaxis(field, -1, 0)),
        "m.nii.gz": lambda path: write_scalar_maps(path, np.moveaxis(field, -1, 0), grid),
        "s.nii.gz": lambda path: write_scalar_maps(path, field[None, ..., 0], grid),
    }.items():
        with small_disk(), pytest.raises(OutputError, match=name):
            write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_wrong_extensions(tmp_path: Path, grid: Grid) -> None:
    for write in (
        lambda: write_transform(tmp_path / "t.nii.gz", affine=AFFINE),
        lambda: write_transform(tmp_path / "t.tfm", displacement=smooth_field(grid), grid=grid),
        lambda: write_displacement(tmp_path / "d.h5", smooth_field(grid), grid),
        lambda: write_learn2reg(tmp_path / "d.npz", np.zeros((3, 4, 4, 4))),
        lambda: write_scalar_maps(tmp_path / "m.mha", smooth_field(grid)[None, ..., 0], grid),
    ):
        with pytest.raises(OutputError):
            write()
    with pytest.raises(ValueError, match="grid"):
        build_transform(None, smooth_field(grid))
