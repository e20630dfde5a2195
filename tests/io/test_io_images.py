"""Good files arrive whole; every bad one is refused in one sentence that names it."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from common.errors import InputError, OutputError
from common.geometry.spaces import Grid, array_to_itk, grid_of, itk_to_array, swap_lps_ras
from common.io import read_image, read_label, read_mask, write_image

SHAPE = (10, 12, 14)


def noise(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def save_with_header(path: Path, **fields: object) -> None:
    """A NIfTI whose header holds what nibabel would not write."""
    raw = bytearray(nib.Nifti1Image(noise(), np.eye(4)).to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]))
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)))


def save_sheared(path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.3
    image = nib.Nifti1Image(noise(), affine)
    image.set_qform(None, 0)
    nib.save(image, path)


def save_short(path: Path) -> None:
    whole = path.with_name("whole" + "".join(path.suffixes))
    sitk.WriteImage(sitk.GetImageFromArray(noise()), str(whole))
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


def save_colours(path: Path) -> None:
    save(path, np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))


def save_meta(path: Path, geometry: str) -> None:
    text = f"ObjectType = Image\nNDims = 3\n{geometry}\nDimSize = 5 5 5\nElementType = MET_UCHAR\n"
    path.write_text(text + f"ElementDataFile = {path.stem}.raw\n")
    path.with_suffix(".raw").write_bytes(bytes(range(125)))


def save_slices(folder: Path, slices: int, uid: str = "1.2.3.4", *, skip: int | None = None) -> np.ndarray:
    """A DICOM series of 1.5 x 2 x 3 mm; returns its voxels (k, j, i)."""
    folder.mkdir(exist_ok=True)
    volume = (noise((slices, 12, 10)) * 1000).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(slices):
        if k == skip:
            continue
        image = sitk.GetImageFromArray(volume[k])
        image.SetSpacing([1.5, 2.0])
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{k + 1}",
            "0008|103e": f"series {uid[-1]}",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0020|0013": str(k + 1),
            "0020|0032": f"5\\6\\{7 + 3 * k}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}_{k}.dcm"))
        writer.Execute(image)
    return volume


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.nii.gz": (lambda p: None, "does not exist"),
    "empty.nii.gz": (lambda p: p.touch(), "is empty"),
    "text.nii.gz": (lambda p: p.write_text("hello\n" * 200), "not a NIfTI"),
    "text.mha": (lambda p: p.write_text("hello\n" * 200), "known format"),
    "short.nii.gz": (save_short, "cut short"),
    "short.nii": (save_short, "cut short"),
    "short.mha": (save_short, "cut short"),
    "short.nrrd": (save_short, "cut short"),
    "header.nii.gz": (lambda p: p.write_bytes(gzip.compress(bytes(100))), "not a NIfTI"),
    "plane.nii.gz": (lambda p: save(p, noise((10, 12))), "has 2 dimensions; a 3D image is needed"),
    "plane.mha": (lambda p: sitk.WriteImage(sitk.GetImageFromArray(noise((9, 9))), str(p)), "has 2 dimensions"),
    "slice.nii.gz": (lambda p: save(p, noise((10, 12, 1))), "at least 5"),
    "thin.nii.gz": (lambda p: save(p, noise((10, 3, 12))), "10 x 3 x 12 voxels; at least 5"),
    "time.nii.gz": (lambda p: save(p, noise((10, 12, 14, 3))), "has 4 dimensions"),
    "time.nrrd": (
        lambda p: sitk.WriteImage(sitk.GetImageFromArray(noise((4, 5, 6, 7)), isVector=False), str(p)),
        "has 4 dimensions",
    ),
    "colour.nii.gz": (save_colours, "3 values per voxel"),
    "complex.nii.gz": (lambda p: save(p, noise().astype(np.complex64)), "2 values per voxel"),
    "vector.mha": (
        lambda p: sitk.WriteImage(sitk.GetImageFromArray(noise((5, 6, 7, 3)), isVector=True), str(p)),
        "3 values per voxel",
    ),
    "nan.nii.gz": (lambda p: save(p, np.full(SHAPE, np.nan, np.float32)), "no finite voxel"),
    "constant.nii.gz": (lambda p: save(p, np.full(SHAPE, 7, np.float32)), "constant: every voxel is 7"),
    "flat.nii.gz": (lambda p: save_with_header(p, srow_x=0, sform_code=2, qform_code=0), "singular affine"),
    "flat_beside_qform.nii.gz": (lambda p: save_with_header(p, srow_x=0, sform_code=2, qform_code=1), "singular"),
    "nan_affine.nii.gz": (lambda p: save_with_header(p, srow_y=np.nan, sform_code=1), "singular affine"),
    "quaternion.nii.gz": (lambda p: save_with_header(p, quatern_b=3, sform_code=0, qform_code=1), "singular affine"),
    "zero.nii.gz": (lambda p: save_with_header(p, pixdim=[1, 0, 1, 1, 0, 0, 0, 0]), "voxel size of 0 x 1 x 1 mm"),
    "shear.nii.gz": (save_sheared, "shear"),
    "zero.mhd": (lambda p: save_meta(p, "ElementSpacing = 0 1 1"), "voxel size of 0 x 1 x 1 mm"),
    "flat.mhd": (lambda p: save_meta(p, "TransformMatrix = 1 0 0 0 0 0 0 0 1"), "singular affine"),
    "shear.mhd": (lambda p: save_meta(p, "TransformMatrix = 1 0 0 0.5 1 0 0 0 1"), "shear"),
    "no_dicom": (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), "without DICOM"),
    "two_series": (lambda p: (save_slices(p, 5), save_slices(p, 4, "1.2.3.5")), "2 DICOM series .*series 4: 5 files"),
    "gap": (lambda p: save_slices(p, 6, skip=3), "unevenly spaced"),
    "few": (lambda p: save_slices(p, 3), "3 DICOM slices"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    make, words = BAD[name]
    make(tmp_path / name)
    capfd.readouterr()
    with pytest.raises(InputError, match=words) as caught:
        read_image(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message
    assert capfd.readouterr().err == ""  # niftilib, MetaIO, VNL and GDCM kept silent


@pytest.mark.parametrize(("unit", "millimetres"), [(1, 1000.0), (2, 1.0), (3, 0.001)], ids=["m", "mm", "um"])
def test_units_of_a_nifti(tmp_path: Path, unit: int, millimetres: float) -> None:
    """2 x 1 x 1 of the header's unit."""
    rows = {
        "srow_x": [-2, 0, 0, 0],
        "srow_y": [0, -1, 0, 0],
        "srow_z": [0, 0, 1, 0],
        "pixdim": [1, 2, 1, 1, 0, 0, 0, 0],
    }
    save_with_header(tmp_path / "a.nii.gz", xyzt_units=unit, sform_code=1, qform_code=0, **rows)
    spacing = read_image(tmp_path / "a.nii.gz").GetSpacing()
    np.testing.assert_allclose(np.array(spacing) / millimetres, [2, 1, 1], rtol=1e-5)


def test_lone_dicom_slice_hints_at_the_folder(tmp_path: Path) -> None:
    save_slices(tmp_path / "s", 4)
    with pytest.raises(InputError, match="give the folder of its series"):
        read_image(tmp_path / "s" / "1.2.3.4_1.dcm")


def test_dicom_folder(tmp_path: Path) -> None:
    volume = save_slices(tmp_path / "s", 5)
    save_slices(tmp_path / "s", 2, "1.2.3.9")  # a localizer is passed over
    (tmp_path / "s" / "README").write_text("not DICOM")
    image = read_image(tmp_path / "s")
    np.testing.assert_array_equal(itk_to_array(image), volume.transpose(2, 1, 0))
    expected = np.diag([1.5, 2.0, 3.0, 1.0])
    expected[:3, 3] = 5, 6, 7
    np.testing.assert_allclose(grid_of(image).affine, expected)


@pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_round_trip(tmp_path: Path, grid: Grid, extension: str) -> None:
    array = noise(grid.shape)
    path = tmp_path / f"image{extension}"
    write_image(array_to_itk(array, grid), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    image = read_image(path)
    assert type(image) is itk.Image[itk.F, 3]
    np.testing.assert_array_equal(itk_to_array(image), array)
    np.testing.assert_allclose(grid_of(image).affine, grid.affine, atol=1e-4)
    theirs = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs), array.transpose(2, 1, 0))
    np.testing.assert_allclose(
        theirs.TransformIndexToPhysicalPoint((3, 4, 5)), grid.to_physical([[3, 4, 5]])[0], atol=1e-3
    )


def test_nibabel_agrees_on_space(tmp_path: Path, grid: Grid) -> None:
    save(tmp_path / "a.nii.gz", noise(grid.shape), swap_lps_ras(grid.affine))
    image = read_image(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(grid_of(image).affine, grid.affine, atol=1e-4)
    np.testing.assert_array_equal(itk_to_array(image), noise(grid.shape))


def test_accepted_oddities(tmp_path: Path) -> None:
    save(tmp_path / "trailing.nii.gz", noise((10, 12, 14, 1)))
    assert grid_of(read_image(tmp_path / "trailing.nii.gz")).shape == SHAPE
    # several gzip members, as bgzip writes; the last trailer is not the whole size
    raw = nib.Nifti1Image(noise(), np.eye(4)).to_bytes()
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(raw[:4000]) + gzip.compress(raw[4000:]))
    np.testing.assert_array_equal(itk_to_array(read_image(tmp_path / "members.nii.gz")), noise())
    # an sform with shear beside a rigid qform, as affine registration tools write: ITK takes the qform
    affine = np.eye(4)
    affine[0, 1] = 0.3
    image = nib.Nifti1Image(noise(), affine)
    image.set_qform(np.eye(4), 1)
    nib.save(image, tmp_path / "both.nii.gz")
    np.testing.assert_allclose(grid_of(read_image(tmp_path / "both.nii.gz")).affine, swap_lps_ras(np.eye(4)))
    # scaled integers
    scaled = nib.Nifti1Image(np.arange(1680, dtype=np.int16).reshape(SHAPE), np.eye(4))
    scaled.header.set_slope_inter(0.5, -100)
    nib.save(scaled, tmp_path / "scaled.nii.gz")
    assert itk_to_array(read_image(tmp_path / "scaled.nii.gz")).max() == pytest.approx(1679 * 0.5 - 100)


def test_the_named_file_is_read(tmp_path: Path) -> None:
    """ITK alone takes the voxels of `a.nii` for `a.nii.gz`."""
    save(tmp_path / "a.nii", noise() + 1)
    save(tmp_path / "a.nii.gz", noise())
    np.testing.assert_array_equal(itk_to_array(read_image(tmp_path / "a.nii.gz")), noise())
    np.testing.assert_array_equal(itk_to_array(read_image(tmp_path / "a.nii")), noise() + 1)


def test_some_bad_voxels_become_the_minimum(tmp_path: Path) -> None:
    array = noise() + 5
    array[0, 1, 2:5] = np.nan, np.inf, -np.inf
    write_image(array_to_itk(array, Grid(SHAPE, np.eye(4))), tmp_path / "a.mha")
    save(tmp_path / "a.nii.gz", array)  # where ITK alone reads 0
    save(tmp_path / "a.nii", array.astype(">f8"))
    for name in ("a.mha", "a.nii.gz", "a.nii"):
        values = itk_to_array(read_image(tmp_path / name))
        assert (values[0, 1, 2:5] == array[np.isfinite(array)].min()).all(), name
        np.testing.assert_array_equal(values[1:], array[1:])


def test_labels(tmp_path: Path, grid: Grid) -> None:
    image = array_to_itk(noise(grid.shape), grid)
    ras = swap_lps_ras(grid.affine)
    for top, dtype, pixel in ((2**15 - 1, np.int32, itk.SS), (40000, np.int32, itk.US), (11, np.float32, itk.SS)):
        values = (np.arange(np.prod(grid.shape)).reshape(grid.shape) % (top + 1)).astype(dtype)
        values[-1, -1, -1] = top
        save(tmp_path / "l.nii.gz", values, ras)
        label = read_label(tmp_path / "l.nii.gz", image, "image.nii.gz")
        assert type(label) is itk.Image[pixel, 3]
        np.testing.assert_array_equal(itk_to_array(label), values)
        np.testing.assert_allclose(grid_of(label).affine, grid.affine, atol=1e-9)


def test_masks(tmp_path: Path, grid: Grid) -> None:
    image = array_to_itk(noise(grid.shape), grid)
    save(tmp_path / "m.nii.gz", (noise(grid.shape) > 0.5).astype(np.uint8) * 255, swap_lps_ras(grid.affine))
    mask = read_mask(tmp_path / "m.nii.gz", image, "image.nii.gz")
    assert type(mask) is itk.Image[itk.UC, 3]
    np.testing.assert_array_equal(itk_to_array(mask), noise(grid.shape) > 0.5)
    save(tmp_path / "m.nii.gz", np.zeros(grid.shape, np.uint8), swap_lps_ras(grid.affine))
    with pytest.raises(InputError, match="empty mask"):
        read_mask(tmp_path / "m.nii.gz", image, "image.nii.gz")


@pytest.mark.parametrize("read", [read_label, read_mask])
def test_labels_must_lie_on_their_image(tmp_path: Path, read: Callable[..., object]) -> None:
    grid = Grid(SHAPE, swap_lps_ras(np.eye(4)))
    image = array_to_itk(noise(), grid)
    shifted, hardly = np.eye(4), np.eye(4)
    shifted[0, 3], hardly[0, 3] = 0.5, 0.005
    ones = np.ones(SHAPE, np.uint8)
    save(tmp_path / "shape.nii.gz", np.ones((10, 12, 13), np.uint8))
    save(tmp_path / "shifted.nii.gz", ones, shifted)
    save(tmp_path / "hardly.nii.gz", ones, hardly)
    with pytest.raises(InputError, match=r"shape.nii.gz has shape 10 x 12 x 13 .*scan.nii has shape 10 x 12 x 14"):
        read(tmp_path / "shape.nii.gz", image, "scan.nii")
    with pytest.raises(InputError, match=r"shifted.nii.gz .*10 x 12 x 14.*scan.nii .*10 x 12 x 14.*0.50 mm"):
        read(tmp_path / "shifted.nii.gz", image, "scan.nii")
    read(tmp_path / "hardly.nii.gz", image, "scan.nii")
    with pytest.raises(InputError, match=r"none.nii.gz does not exist"):
        read(tmp_path / "none.nii.gz", image, "scan.nii")


def test_bad_label_values(tmp_path: Path) -> None:
    image = array_to_itk(noise(), Grid(SHAPE, swap_lps_ras(np.eye(4))))
    path = tmp_path / "l.nii.gz"
    for values, words in (
        (noise(), "not whole numbers"),
        (np.full(SHAPE, np.nan, np.float32), "not whole numbers"),
        (np.zeros(SHAPE, np.uint8), "no label"),
        (np.full(SHAPE, 70000, np.int32), "65535"),
    ):
        save(path, values)
        with pytest.raises(InputError, match=rf"l\.nii\.gz.*{words}"):
            read_label(path, image, "scan.nii")
    save(path, np.zeros(SHAPE, np.uint8))
    assert itk_to_array(read_label(path, image, "scan.nii", background_only=True)).max() == 0


@pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_full_disk_leaves_nothing(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    small_disk: Callable[[], AbstractContextManager[None]],
    extension: str,
) -> None:
    """ITK itself reports success for NIfTI here."""
    image = array_to_itk(noise(), Grid(SHAPE, np.eye(4)))
    with small_disk(), pytest.raises(OutputError, match=f"a{extension} cannot be written"):
        write_image(image, tmp_path / f"a{extension}")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_unwritable_paths(tmp_path: Path) -> None:
    image = array_to_itk(noise(), Grid(SHAPE, np.eye(4)))
    for name, words in (("no/a.nii.gz", "folder does not exist"), ("a.mhd", "extension"), ("a.xyz", "extension")):
        with pytest.raises(OutputError, match=rf"{name}.*{words}"):
            write_image(image, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
