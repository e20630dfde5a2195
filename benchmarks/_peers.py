"""The other methods of the accuracy table, each in a process of its own: `python -m benchmarks._peers METHOD ...`.

A process goes through a list of pairs and writes for each a folder with figures.json, which comes last, or failed.txt:

- affine: our affine stage; fixed_to_moving.txt, and both scans on the fixed grid for the methods below, which all
  start from there: fixed.nii.gz, aligned.nii.gz.
- syn, convexadam: displacement.nii.gz, the deformable stage u of total(x) = fixed_to_moving(x + u(x)), as LPS mm on
  the fixed grid, ANTs' own form.

Packages are imported by the method that needs them, so that the memory of one is not counted for another.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FIGURES, FAILED = "figures.json", "failed.txt"
FIXED, ALIGNED, DISPLACEMENT, MATRIX = "fixed.nii.gz", "aligned.nii.gz", "displacement.nii.gz", "fixed_to_moving.txt"

PACKAGES = {"syn": ("ants", "antspyx"), "convexadam": ("convexAdam", "convexAdam")}
"""Method -> module and distribution that it needs."""

# antsRegistrationSyN[so] of antspyx, the authors' script: SyN[0.2, 3, 0], neighbourhood CC of radius 2 for one
# contrast. For two contrasts the Mattes MI of antsRegistrationSyNQuick[so], with the same levels.
_SYN = {"type_of_transform": "SyNOnly", "grad_step": 0.2, "flow_sigma": 3, "total_sigma": 0}
_SYN_METRIC = {
    "one contrast": {"syn_metric": "CC", "syn_sampling": 2},
    "two contrasts": {"syn_metric": "mattes", "syn_sampling": 32},
}
SYN_ITERATIONS = (100, 70, 50, 20)
# Package defaults, and what its authors use for the lung CT of Learn2Reg.
_CONVEXADAM: dict[str, Any] = {
    "mind_r": 1,
    "mind_d": 2,
    "lambda_weight": 1.25,
    "grid_sp": 6,
    "disp_hw": 4,
    "selected_niter": 80,
    "selected_smooth": 0,
    "grid_sp_adam": 2,
    "ic": True,
}
_CONVEXADAM_LUNG = {"grid_sp": 4, "disp_hw": 6, "lambda_weight": 0.65}
_TWO_CONTRASTS = ("t1_to_t2", "generated_")
_LUNG_CT = ("lung_ct", "chest_ct")


def missing_package(method: str) -> str | None:
    """The distribution that a method lacks, or None."""
    module, distribution = PACKAGES.get(method, ("sys", ""))
    return None if find_spec(module) else distribution


def has_two_contrasts(pair: str) -> bool:
    """By a pair's id."""
    return pair.startswith(_TWO_CONTRASTS)


def syn_settings(pair: str, iterations: Sequence[int] = SYN_ITERATIONS) -> dict[str, Any]:
    """Options of `ants.registration` for a pair, by its id."""
    contrast = "two contrasts" if has_two_contrasts(pair) else "one contrast"
    return {**_SYN, **_SYN_METRIC[contrast], "reg_iterations": tuple(iterations), "random_seed": 1}


def convexadam_settings(pair: str, shape: Sequence[int]) -> tuple[dict[str, Any], str]:
    """Options of `convex_adam_pt` for a pair, by its id, and a word on what was changed for a small image.

    The search reaches grid_sp * disp_hw voxels to each side; no farther than half of the shortest axis, or most of the
    candidates lie outside the image.
    """
    settings = {**_CONVEXADAM, **(_CONVEXADAM_LUNG if pair.startswith(_LUNG_CT) else {})}
    fitting = max(2, min(shape) // (2 * settings["disp_hw"]))
    if fitting >= settings["grid_sp"]:
        return settings, ""
    note = f"grid_sp {fitting} in place of {settings['grid_sp']}: the image is small"
    return {**settings, "grid_sp": fitting}, note


def run_affine(pair: dict[str, str], folder: Path, inputs: Path, options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from common.geometry.spaces import itk_to_array
    from common.inference import align_affine, load_pair
    from common.io import build_transform, resample_image, write_image

    files = {key: value for key, value in pair.items() if key in ("fixed", "moving")}
    scans = load_pair(files)
    started = time.perf_counter()
    matrix = align_affine(scans.fixed_intensity, scans.fixed_grid, scans.moving_intensity, scans.moving_grid)
    seconds = time.perf_counter() - started
    outside = float(itk_to_array(scans.moving).min()) if scans.moving_modality == "ct" else 0.0
    aligned = resample_image(scans.moving, scans.fixed_grid, build_transform(matrix), default=outside)
    np.savetxt(folder / MATRIX, matrix, fmt="%.17g")
    write_image(scans.fixed, folder / FIXED)
    write_image(aligned, folder / ALIGNED)
    return {"seconds": seconds}


def run_syn(pair: dict[str, str], folder: Path, inputs: Path, options: argparse.Namespace) -> dict[str, Any]:
    import ants
    import numpy as np

    fixed, moving = ants.image_read(str(inputs / FIXED)), ants.image_read(str(inputs / ALIGNED))
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        settings = syn_settings(pair["id"], options.syn_iterations)
        made = ants.registration(fixed=fixed, moving=moving, outprefix=f"{name}/", **settings)
        seconds = time.perf_counter() - started
        (warp,) = (path for path in made["fwdtransforms"] if path.endswith("Warp.nii.gz"))
        for path in made["fwdtransforms"]:
            if path != warp and not np.allclose(ants.read_transform(path).parameters, [*np.eye(3).ravel(), 0, 0, 0]):
                raise RuntimeError("SyN alone returned an affine stage that is not the identity")
        shutil.move(warp, folder / DISPLACEMENT)
    return {"seconds": seconds, "note": f"{settings['syn_metric']}, {'x'.join(map(str, options.syn_iterations))}"}


def run_convexadam(pair: dict[str, str], folder: Path, inputs: Path, options: argparse.Namespace) -> dict[str, Any]:
    import nibabel as nib
    import numpy as np
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    scan = nib.load(inputs / FIXED)
    fixed, moving = (nib.load(inputs / name).get_fdata(dtype=np.float32) for name in (FIXED, ALIGNED))
    settings, note = convexadam_settings(pair["id"], fixed.shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    started = time.perf_counter()
    # (D, H, W, 3) voxels, pull-back, along the array's axes
    field = convex_adam_pt(torch.from_numpy(fixed), torch.from_numpy(moving), dtype=dtype, device=device, **settings)
    seconds = time.perf_counter() - started
    to_lps = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ scan.affine)[:3, :3]
    vectors = np.einsum("xc,ijkc->ijkx", to_lps, field).astype(np.float32)
    image = nib.Nifti1Image(vectors[:, :, :, None], scan.affine)
    image.header.set_intent("vector")
    nib.save(image, folder / DISPLACEMENT)
    return {"seconds": seconds, "note": note}


_METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "affine": run_affine,
    "syn": run_syn,
    "convexadam": run_convexadam,
}


def is_finished(folder: Path) -> bool:
    return (folder / FIGURES).is_file() or (folder / FAILED).is_file()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=list(_METHODS))
    parser.add_argument("--datalist", type=Path, required=True, help="JSON list of pairs")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--affine_dir", type=Path, help="what the method affine wrote for the same pairs")
    parser.add_argument("--syn_iterations", type=int, nargs="+", default=SYN_ITERATIONS)
    options = parser.parse_args(argv)
    if options.method in PACKAGES:
        distribution = PACKAGES[options.method][1]
        print(f"{distribution} {version(distribution)}", flush=True)
    for pair in json.loads(options.datalist.read_text()):
        folder = options.output_dir / pair["id"]
        if is_finished(folder):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        print(pair["id"], flush=True)
        inputs = (options.affine_dir or options.output_dir) / pair["id"]
        try:
            figures = _METHODS[options.method](pair, folder, inputs, options)
        except Exception as error:
            traceback.print_exc()
            _write(folder / FAILED, f"{type(error).__name__}: {error}")
            continue
        _write(folder / FIGURES, json.dumps(figures))


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
