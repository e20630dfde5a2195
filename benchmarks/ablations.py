"""Train a bundle and its ablations with one budget; the paper's table beside ours: `python -m benchmarks.ablations`.

Data: the Hippocampus task of the Medical Segmentation Decathlon; the last 40 scans are for validation, each fixed with
its successor moving, centres aligned, no affine stage. Each variant is trained by train.json with hippocampus.json and
its overlay, and evaluated by evaluate.json; RWCNet's start from its shipped weights, as far as they fit, AD-RegNet's
from random ones. A training that was interrupted goes on, one that is finished is kept. The last column is the p value
of the paired Wilcoxon signed-rank test of a variant's Dice against the whole method's.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import wilcoxon

from common.geometry.spaces import itk_to_array
from common.inference import align_affine, load_pair
from common.io import atomic_path, build_transform, resample_image
from common.metrics import dice_macro


@dataclass(frozen=True)
class Ablation:
    """A variant of a method.

    Attributes:
        overlay: its config beside train.json and hippocampus.json; None for the whole method.
        paper: what the paper reports, by the columns of its table.
    """

    overlay: str | None
    paper: tuple[str, str]


PAPER_COLUMNS = {"rwcnet": ("NLST mm", "OASIS %"), "adregnet": ("DIR-Lab mm", "fold %")}
ABLATIONS = {
    "rwcnet": {
        "RWCNet": Ablation(None, ("2.11", "80.7")),
        "single scale 1/4": Ablation("ablation_single_scale", ("5.52", "74.0")),
        "no correlation": Ablation("ablation_no_correlation", ("4.10", "80.0")),
        "2 RNN steps": Ablation("ablation_two_steps", ("5.17", "80.1")),
    },
    "adregnet": {
        "AD-RegNet": Ablation(None, ("1.51", "0.15")),
        "no cross-attention": Ablation("ablation_no_cross_attention", ("1.61", "0.18")),
        "no regional attention": Ablation("ablation_no_regional_attention", ("1.65", "0.16")),
        "no multi-resolution": Ablation("ablation_no_multi_resolution", ("1.63", "0.22")),
        "no attention": Ablation("ablation_no_attention", ("1.79", "0.25")),
    },
}
PAPER_OPTIMIZED = {"rwcnet": ("1.48", "76.4")}
PAPER_BEFORE = {"rwcnet": ("9.73", "52.4"), "adregnet": ("8.46", "")}


def config_files(bundle: str, overlay: str | None, *more: str) -> str:
    names = ["train", "hippocampus", *([overlay] if overlay else []), *more]
    return json.dumps([f"bundles/{bundle}/configs/{name}.json" for name in names])


def run_bundle(files: str, options: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *options], check=True)


def starting_weights(overlay: str | None, path: Path) -> None:
    """RWCNet's shipped weights in the form of a variant's network; what it does not share starts from random."""
    state = torch.load("bundles/rwcnet/models/model.pt", map_location="cpu", weights_only=True)
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


def train(bundle: str, folder: Path, overlay: str | None, data: Path, budget: list[str]) -> None:
    options = ["--dataset_dir", str(data), "--output_dir", str(folder), *budget]
    if bundle == "rwcnet":
        starting_weights(overlay, folder / "start.pt")
        options += ["--initial_weights", str(folder / "start.pt")]
    options += ["--resume", "True"] if (folder / "last.pt").is_file() else []
    run_bundle(config_files(bundle, overlay), options)


def evaluate(
    bundle: str, folder: Path, overlay: str | None, data: Path, budget: list[str], steps: int
) -> list[dict[str, str]]:
    """Rows of evaluation.csv with that many steps of instance optimisation."""
    output = folder / f"evaluation_{steps}"
    options = ["--dataset_dir", str(data), "--output_dir", str(output), "--weights", str(folder / "model.pt"), *budget]
    options += ["--instance_optimization", str(steps)]
    run_bundle(config_files(bundle, overlay, "evaluate"), options)
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


def print_row(
    name: str,
    rows: list[dict[str, str]],
    *,
    suffix: str = "",
    paper: tuple[str, str] = ("", ""),
    p: float | None = None,
) -> None:
    cells = []
    for figure in ("dice", "hd95", "sdlogj", "folding_percent"):
        values = np.array([float(row[figure + suffix]) for row in rows])
        cells.append(f"{np.nanmean(values):8.3f} +- {np.nanstd(values):5.3f}")
    seconds = "" if suffix else f"{np.mean([float(row['seconds']) for row in rows]):8.2f}"
    test = "" if p is None else f"{p:.2g}"
    print(
        f"{name:32s}"
        + "".join(f"{cell:>18s}" for cell in cells)
        + f"{seconds:>10s}{paper[0]:>12s}{paper[1]:>10s}{test:>10s}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    scans = os.environ.get("REGISTRATION_TEST_DATA", "../shared/data")
    parser.add_argument("--bundle", choices=sorted(ABLATIONS), default="rwcnet")
    parser.add_argument("--data", default=f"{scans}/Task04_Hippocampus", help="the Decathlon's folder")
    parser.add_argument("--output_dir", default="runs/ablations")
    parser.add_argument("--instance_optimization", type=int, default=50, help="steps, for the rows with it")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="passed on to every run, after --")
    arguments = parser.parse_args()
    bundle, data, folder = arguments.bundle, Path(arguments.data), Path(arguments.output_dir) / arguments.bundle
    if not data.is_dir():
        raise SystemExit(f"error: there is no folder {data}")
    budget = [option for option in arguments.options if option != "--"]
    results = {}
    for name, ablation in ABLATIONS[bundle].items():
        run = folder / (ablation.overlay or "whole")
        train(bundle, run, ablation.overlay, data, budget)
        results[name] = evaluate(bundle, run, ablation.overlay, data, budget, 0)
    whole, first = next(iter(results.items()))
    optimized = evaluate(bundle, folder / "whole", None, data, budget, arguments.instance_optimization)
    affine = affine_dice(first, data)
    heads = ("Dice", "HD95 voxels", "SDlogJ", "folding %")
    columns = PAPER_COLUMNS[bundle]
    print(f"\n{len(first)} pairs, mean +- standard deviation; {' and '.join(columns)} are the paper's")
    print(
        f"{'':32s}"
        + "".join(f"{head:>18s}" for head in heads)
        + f"{'seconds':>10s}{columns[0]:>12s}{columns[1]:>10s}{'p':>10s}"
    )
    print_row("no displacement", first, suffix="_zero_displacement", paper=PAPER_BEFORE[bundle])
    print(f"{'affine stage alone':32s}{np.mean(affine):8.3f} +- {np.std(affine):5.3f}")
    for name, rows in results.items():
        dices = [[float(row["dice"]) for row in some] for some in (rows, first)]
        p = None if rows is first else float(wilcoxon(*dices).pvalue)
        print_row(name, rows, paper=ABLATIONS[bundle][name].paper, p=p)
    steps = arguments.instance_optimization
    print_row(f"{whole} + {steps} steps on the pair", optimized, paper=PAPER_OPTIMIZED.get(bundle, ("", "")))


if __name__ == "__main__":
    main()
