"""Register every pair of a folder of test scans and print what it brought: `python -m benchmarks.real_pairs`.

The folder (REGISTRATION_TEST_DATA, or ../shared/data) holds pairs of several organs and modalities, some with labels.
Two single CT scans are paired with a copy warped by a known field, whose exact landmarks give a TRE. All pairs go
through one run of the bundle's inference.json with `--datalist`, as a user would.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from common.data.synthetic import SyntheticRecipe, random_field
from common.geometry.spaces import ddf_to_displacement, grid_of, itk_to_array
from common.io import build_transform, read_image, resample_image, transform_points, write_image, write_landmarks

Pair = dict[str, str]
_KNOWN_FIELD = SyntheticRecipe(field_scales=(8.0, 16.0), field_strength=(0.08, 0.16), rotation=2, translation=0.01)


def named_pairs(data: Path, hippocampus: int) -> list[Pair]:
    """All pairs that the folder's README names, as rows of a list for `--datalist`."""
    pairs: list[Pair] = []

    def add(name: str, fixed: str, moving: str, fixed_label: str = "", moving_label: str = "") -> None:
        files = {"fixed": fixed, "moving": moving, "fixed_label": fixed_label, "moving_label": moving_label}
        pairs.append({"id": name} | {key: str(data / f"{value}.nii.gz") for key, value in files.items() if value})

    add("lung_ct", "lung_ct/fixed", "lung_ct/moving", "lung_ct/fixed_mask", "lung_ct/moving_mask")
    for fixed in ("0004", "0006", "0007"):
        for moving in ("0004", "0006", "0007"):
            if fixed != moving:
                names = [f"lung_mri/{case}_{kind}" for kind in ("H1", "lobes") for case in (fixed, moving)]
                add(f"lung_mri_{fixed}_{moving}", *names)
    add("brain_oasis", *(f"brain_oasis/{case}_{kind}" for kind in ("T1", "tissue") for case in "AB"))
    add("head_2mm", "head_2mm/1000_T1", "head_2mm/1001_T1")
    add("epi_distortion", "epi_distortion/LS2001_LR", "epi_distortion/LS2001_RL")
    add("epi_undistorted", "epi_distortion/LS2001_undistort", "epi_distortion/LS2001_LR")
    add("t1_to_mni", "rniftyreg/flash_t1", "rniftyreg/mni_brain")
    add("t1_to_t2", "rniftyreg/flash_t1", "rniftyreg/epi_t2")
    listed = json.loads((data / "Task04_Hippocampus/dataset.json").read_text())["training"]
    cases = [Path(item["image"]).name.removesuffix(".nii.gz") for item in listed][160:]
    for index in range(min(hippocampus, len(cases))):
        couple = cases[index], cases[(index + 1) % len(cases)]
        names = [f"Task04_Hippocampus/{kind}/{case}" for kind in ("imagesTr", "labelsTr") for case in couple]
        add(f"hippocampus_{index:02d}", *names)
    return pairs


def known_field_pair(name: str, image: Path, folder: Path, *, seed: int) -> Pair:
    """A scan and its copy under a known field, with exact landmarks."""
    fixed = read_image(image)
    grid = grid_of(fixed)
    coarse = grid.with_spacing(4.0)
    generator = torch.Generator().manual_seed(seed)
    ddf = random_field(coarse.shape, recipe=_KNOWN_FIELD, generator=generator)
    transform = build_transform(None, ddf_to_displacement(ddf, coarse), coarse)
    # The copy is the fixed image of its pair: its voxel x shows the scan's x + u(x).
    folder.mkdir(parents=True, exist_ok=True)
    intensities = itk_to_array(fixed)
    warped = resample_image(fixed, grid, transform, default=float(intensities.min()))
    write_image(warped, folder / f"{name}_fixed.nii.gz")
    body = np.argwhere(itk_to_array(warped) > -300)
    points = grid.to_physical(body[np.random.default_rng(seed).choice(len(body), 500, replace=False)])
    truth = transform_points(transform, points)
    inside = ((grid.to_voxels(truth) >= 0) & (grid.to_voxels(truth) <= np.array(grid.shape) - 1)).all(axis=1)
    write_landmarks(folder / f"{name}_fixed.txt", points[inside])
    write_landmarks(folder / f"{name}_moving.txt", truth[inside])
    return {
        "id": f"{name}_known_field",
        "fixed": str(folder / f"{name}_fixed.nii.gz"),
        "moving": str(image),
        "fixed_landmarks": str(folder / f"{name}_fixed.txt"),
        "moving_landmarks": str(folder / f"{name}_moving.txt"),
    }


def print_table(results: Path) -> None:
    """The figures before, after the affine stage and after both."""
    print(f"{'pair':24s}{'NCC':^26s}{'Dice or TRE mm':^26s}{'folding %':>10s}{'seconds':>9s}")
    with open(results, newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "failed":
                print(f"{row['id']:24s}failed: {row['problem']}")
                continue
            second = "overlap.dice.{}" if row.get("overlap.dice.after") else "tre_mm.{}.mean"
            cells = []
            for pattern in ("similarity.ncc.{}", second):
                values = [row.get(pattern.format(stage)) for stage in ("before", "affine", "after")]
                cells.append("".join(f"{float(v):8.3f}" if v else " " * 8 for v in values))
            folding = float(row["deformation.folding_percent"])
            seconds = sum(float(v) for k, v in row.items() if k.startswith("seconds.") and v and "total" not in k)
            print(f"{row['id']:24s}{cells[0]:26s}{cells[1]:26s}{folding:10.4f}{seconds:9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=os.environ.get("REGISTRATION_TEST_DATA", "../shared/data"))
    parser.add_argument("--bundle", default="bundles/recorr")
    parser.add_argument("--output_dir", default="runs/real_pairs")
    parser.add_argument("--hippocampus", type=int, default=5, help="number of validation pairs of that set")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="passed on to inference.json, after --")
    arguments = parser.parse_args()
    data, folder = Path(arguments.data).absolute(), Path(arguments.output_dir).absolute()
    if not data.is_dir():
        raise SystemExit(f"error: there is no folder of test scans {data}")
    pairs = named_pairs(data, arguments.hippocampus)
    pairs.append(known_field_pair("chest_ct", data / "chest_ct/lidc0314_2mm.nii.gz", folder / "made", seed=1))
    pairs.append(
        known_field_pair("abdomen_ct", data / "abdomen_ct/totalseg_example_ct.nii.gz", folder / "made", seed=2)
    )
    (folder / "pairs.json").write_text(json.dumps(pairs, indent=1))
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", f"{arguments.bundle}/configs/inference.json"]
    command += ["--datalist", str(folder / "pairs.json"), "--output_dir", str(folder / "results")]
    done = subprocess.run(command + [option for option in arguments.options if option != "--"], check=False)
    print_table(folder / "results/results.csv")
    if done.returncode:
        raise SystemExit(f"error: the registration ended with exit code {done.returncode}; not every pair has its row")


if __name__ == "__main__":
    main()
