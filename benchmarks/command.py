"""The whole command, start to end, on a generated pair: `python -m benchmarks.command`.

Runs `python -m monai.bundle run --config_file bundles/recorr/configs/inference.json` as a user does, and splits its
time by what metrics.json says of the steps; what is left is start-up: imports, the config, the weights. Then the
imports by package, and ITK's classes, which load their libraries when first asked for.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import argument_parser, describe_machine, print_table
from common.data.phantom import head, true_transform
from common.geometry.spaces import Grid, array_to_itk
from common.io import write_image

_ROOT = Path(__file__).resolve().parents[1]
_CONFIG = "bundles/recorr/configs/inference.json"
_SHAPE = (160, 192, 224)  # voxels, and the field of view in mm whatever the voxels
_STEPS = (
    "start-up",
    "reading",
    "affine",
    "resampling",
    "network",
    "instance_optimization",
    "warping",
    "writing",
    "metrics",
    "report",
)
_CLASSES = (
    "import itk",
    "itk.Image",
    "itk.ImageIOFactory",
    "itk.ImageFileReader",
    "itk.AffineTransform",
    "itk.ResampleImageFilter",
    "itk.DisplacementFieldTransform",
    "itk.TransformToDisplacementFieldFilter",
    "itk.TransformFileWriterTemplate",
    "import SimpleITK",
)
_IMPORTS = "import monai.bundle, monai.engines, common.inference"


def create_pair(folder: Path, shape: Sequence[int]) -> tuple[Path, Path]:
    """Head phantoms on two grids of `shape` over the same field of view, one deformed."""
    affine = np.diag([*(size / n for size, n in zip(_SHAPE, shape, strict=True)), 1.0])
    affine[:3, 3] = affine[:3, :3] @ (np.array(shape) - 1) / -2
    grid = Grid((shape[0], shape[1], shape[2]), affine)
    noise = np.random.default_rng(0)
    paths = []
    for name in ("fixed", "moving"):
        planes = []
        for i in range(shape[0]):  # one plane at a time: the phantom works in double precision
            rest = np.meshgrid([i], np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
            points = grid.to_physical(np.stack(rest, -1).reshape(-1, 3))
            intensity, _ = head(true_transform(points) if name == "fixed" else points)
            planes.append(1000 * (intensity + noise.normal(0, 0.01, len(intensity))).reshape(shape[1:]))
        paths.append(folder / f"{name}.nii.gz")
        write_image(array_to_itk(np.stack(planes).astype(np.float32), grid), paths[-1])
    return paths[0], paths[1]


def run_command(fixed: Path, moving: Path, output: Path, threads: int, arguments: Sequence[str]) -> dict[str, Any]:
    """One run; seconds by step, and the metrics themselves."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", _CONFIG]
    command += ["--fixed", str(fixed), "--moving", str(moving), "--output_dir", str(output), *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=_ROOT, env=_environment(threads), capture_output=True, text=True)
    total = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"error: the command failed: {(done.stderr or done.stdout).strip()[-500:]}")
    metrics = json.loads((output / "metrics.json").read_text())
    seconds = {step: metrics["seconds"].get(step, math.nan) for step in _STEPS[1:]}
    seconds["start-up"] = total - sum(s for s in seconds.values() if not math.isnan(s))
    return {"seconds": {step: seconds[step] for step in _STEPS} | {"total": total}, "metrics": metrics}


def print_split(runs: Sequence[dict[str, Any]]) -> None:
    """Medians of several runs by step."""
    median = {step: statistics.median(run["seconds"][step] for run in runs) for step in (*_STEPS, "total")}
    rows = [[step, median[step], f"{100 * median[step] / median['total']:.0f} %"] for step in median]
    settings = runs[0]["metrics"]["settings"]
    grid = "x".join(map(str, settings["network_grid_shape"]))
    print_table(f"whole command, network grid {grid}, median of {len(runs)} runs", ["step", "seconds", "part"], rows)
    peak = statistics.median(run["metrics"]["peak_memory_mib"]["process"] for run in runs)
    voxels = math.prod(settings["network_grid_shape"])
    print(f"peak memory {peak:.0f} MiB, that is {peak * 2**20 / voxels:.0f} bytes per voxel of the network grid")
    share = median["affine"] / median["network"]
    verdict = "as it should be" if share <= 1 else "more than it should"
    print(f"the affine stage takes {share:.2f} times as long as the network: {verdict}")


def print_imports(runs: int) -> None:
    """Where importing goes, by package: own time of its modules, without what they import in turn."""
    own: dict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        sums: dict[str, float] = defaultdict(float)
        for line in _child("-X", "importtime", "-c", _IMPORTS).stderr.splitlines():
            found = re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", line)
            if found:
                sums[found[2].split(".")[0]] += int(found[1]) / 1e6
        for package, seconds in sums.items():
            own[package].append(seconds)
    medians = sorted(((statistics.median(seconds), name) for name, seconds in own.items()), reverse=True)
    rows: list[list[object]] = [[name, seconds] for seconds, name in medians[:12]]
    rows += [["others", sum(s for s, _ in medians[12:])], ["all", sum(s for s, _ in medians)]]
    print_table(f"imports by package (`{_IMPORTS}`, -X importtime)", ["package", "own seconds"], rows)


def print_class_loading(runs: int) -> None:
    """What the first use of each class of ITK costs, in this order, in one process; SimpleITK beside it."""
    program = ["import json, time", "import psutil", "laps = {}", "memory = psutil.Process().memory_info"]
    for name in _CLASSES:
        program += ["start = time.perf_counter(), time.process_time(), memory().rss", name]
        program += ["end = time.perf_counter(), time.process_time(), memory().rss"]
        program += [f"laps[{name!r}] = [b - a for a, b in zip(start, end)]"]
    program += ["print(json.dumps(laps))"]
    laps = [json.loads(_child("-c", "\n".join(program)).stdout) for _ in range(runs)]
    rows = []
    for name in _CLASSES:
        seconds, cpu_seconds, size = (statistics.median(lap[name][i] for lap in laps) for i in range(3))
        rows.append([name, seconds, cpu_seconds, size / 2**20])
    print_table("first use of a class, in this order, in one process", ["", "seconds", "CPU s", "MiB"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argument_parser(__doc__, shape=_SHAPE)
    parser.add_argument("--fixed", type=Path, help="a scan of your own in place of the generated pair")
    parser.add_argument("--moving", type=Path, help="the other one")
    parser.add_argument("--only", choices=["command", "imports", "classes"], help="one of the three tables")
    options, arguments = parser.parse_known_args(argv)  # what is left goes to the command
    if (options.fixed is None) != (options.moving is None):
        parser.error("--fixed and --moving go together")
    print(describe_machine())
    if options.only in (None, "command"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fixed, moving = (options.fixed, options.moving) if options.fixed else create_pair(folder, options.shape)
            runs = [
                run_command(fixed.resolve(), moving.resolve(), folder / f"run{i}", options.threads, arguments)
                for i in range(options.repeats)
            ]
            print_split(runs)
    if options.only in (None, "imports"):
        print_imports(options.repeats)
    if options.only in (None, "classes"):
        print_class_loading(options.repeats)


def _child(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


if __name__ == "__main__":
    main()
