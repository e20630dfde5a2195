"""Train RWCNet and its ablations with one budget; the paper's Table 3 beside ours: `python -m benchmarks.ablations`.

Data: the Hippocampus task of the Medical Segmentation Decathlon; the last 40 scans are for validation, each fixed with
its successor moving, centres aligned, no affine stage. Each variant starts from the shipped weights, as far as they fit
it, is trained by train.json with hippocampus.json and its overlay, and evaluated by evaluate.json. A training that was
interrupted goes on, one that is finished is kept.
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

from common.geometry.spaces import itk_to_array
from common.inference import align_affine, load_pair
from common.io import atomic_path, build_transform, resample_image
from common.metrics import dice_macro

CONFIGS = "bundles/rwcnet/configs"
WEIGHTS = "bundles/rwcnet/models/model.pt"
# Overlay of each variant, and what the paper reports: NLST TRE in mm, OASIS Dice in per cent.
VARIANTS = {
    "RWCNet": (None, "2.11", "80.7"),
    "single scale 1/4": ("ablation_single_scale", "5.52", "74.0"),
    "no correlation": ("ablation_no_correlation", "4.10", "80.0"),
    "2 RNN steps": ("ablation_two_steps", "5.17", "80.1"),
}


def config_files(overlay: str | None, *more: str) -> str:
    names = ["train", "hippocampus", *([overlay] if overlay else []), *more]
    return json.dumps([f"{CONFIGS}/{name}.json" for name in names])


def run_bundle(files: str, options: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *options], check=True)


def starting_weights(overlay: str | None, path: Path) -> None:
    """The shipped weights in the form of a variant's network; what it does not share with it starts from random."""
    state = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    if overlay == "ablation_single_scale":
        state = {name: value for name, value in state.items() if not name.startswith(("stages.1.", "stages.2."))}
        state["trained_stages"].clamp_(max=1)
    if overlay == "ablation_no_correlation":
        generator = torch.Generator().manual_seed(0)
        for name in [name for name in state if name.endswith("motion_encoder.correlation.0.weight")]:
            bound = 32**-0.5  # PyTorch's own for the features of both images, 2 x 16 channels
            state[name] = (2 * torch.rand(8, 32, 1, 1, 1, generator=generator) - 1) * bound
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def train(folder: Path, overlay: str | None, data: Path, budget: list[str]) -> None:
    start = folder / "start.pt"
    starting_weights(overlay, start)
    resume = ["--resume", "True"] if (folder / "last.pt").is_file() else []
    options = ["--dataset_dir", str(data), "--output_dir", str(folder), "--initial_weights", str(start)]
    run_bundle(config_files(overlay), [*options, *budget, *resume])


def evaluate(folder: Path, overlay: str | None, data: Path, budget: list[str], steps: int) -> list[dict[str, str]]:
    """Rows of evaluation.csv with that many steps of instance optimisation."""
    output = folder / f"evaluation_{steps}"
    options = ["--dataset_dir", str(data), "--output_dir", str(output), "--weights", str(folder / "model.pt"), *budget]
    run_bundle(config_files(overlay, "evaluate"), [*options, "--instance_optimization", str(steps)])
    with open(output / "evaluation.csv", newline="") as file:
        return list(csv.DictReader(file))


def affine_dice(rows: list[dict[str, str]], data: Path) -> list[float]:
    """Dice of each pair after the affine stage alone."""
    figures = []
    for row in rows:
        files = {role: row[role] for role in ("fixed", "moving")}
        files |= {f"{role}_label": str(data / "labelsTr" / Path(path).name) for role, path in files.items()}
        pair = load_pair(files, modality="mr")
        matrix = align_affine(
            pair.fixed_intensity, pair.fixed_grid, pair.moving_intensity, pair.moving_grid, mode="affine"
        )
        transform = build_transform(matrix)
        warped = resample_image(pair.moving_label, pair.fixed_grid, transform, interpolation="nearest")
        figures.append(dice_macro(itk_to_array(pair.fixed_label), itk_to_array(warped)))
    return figures


def print_row(name: str, rows: list[dict[str, str]], suffix: str = "", paper: tuple[str, str] = ("", "")) -> None:
    cells = []
    for figure in ("dice", "hd95", "sdlogj", "folding_percent"):
        values = np.array([float(row[figure + suffix]) for row in rows])
        cells.append(f"{np.nanmean(values):8.3f} +- {np.nanstd(values):5.3f}")
    seconds = "" if suffix else f"{np.mean([float(row['seconds']) for row in rows]):8.2f}"
    print(f"{name:40s}" + "".join(f"{cell:>18s}" for cell in cells) + f"{seconds:>10s}{paper[0]:>10s}{paper[1]:>10s}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    scans = os.environ.get("REGISTRATION_TEST_DATA", "../shared/data")
    parser.add_argument("--data", default=f"{scans}/Task04_Hippocampus", help="the Decathlon's folder")
    parser.add_argument("--output_dir", default="runs/ablations")
    parser.add_argument("--instance_optimization", type=int, default=50, help="steps, for the rows with it")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="passed on to every run, after --")
    arguments = parser.parse_args()
    data, folder = Path(arguments.data), Path(arguments.output_dir)
    if not data.is_dir():
        raise SystemExit(f"error: there is no folder {data}")
    budget = [option for option in arguments.options if option != "--"]
    results = {}
    for name, (overlay, *_) in VARIANTS.items():
        run = folder / (overlay or "rwcnet")
        train(run, overlay, data, budget)
        results[name] = evaluate(run, overlay, data, budget, 0)
        if overlay is None:
            optimized = evaluate(run, overlay, data, budget, arguments.instance_optimization)
    first = results["RWCNet"]
    affine = affine_dice(first, data)
    heads = ("Dice", "HD95 voxels", "SDlogJ", "folding %")
    print(f"\n{len(first)} pairs, mean +- standard deviation; the last two columns are the paper's")
    print(f"{'':40s}" + "".join(f"{head:>18s}" for head in heads) + f"{'seconds':>10s}{'NLST mm':>10s}{'OASIS %':>10s}")
    print_row("no displacement", first, "_zero_displacement", ("9.73", "52.4"))
    print(f"{'affine stage alone':40s}{np.mean(affine):8.3f} +- {np.std(affine):5.3f}")
    for name, rows in results.items():
        print_row(name, rows, paper=VARIANTS[name][1:])
    print_row(f"RWCNet + {arguments.instance_optimization} steps on the pair", optimized, paper=("1.48", "76.4"))


if __name__ == "__main__":
    main()
