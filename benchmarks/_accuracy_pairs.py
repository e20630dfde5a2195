"""The pairs of the accuracy table, as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks._judge import TRUTH
from benchmarks.real_pairs import known_field_pair, named_pairs
from common.data import SyntheticPairs
from common.geometry.spaces import Grid, array_to_itk, ddf_to_displacement
from common.io import atomic_path, write_image

Pair = dict[str, str]

_KNOWN_FIELDS = {  # scan and seed of the field
    "chest_ct": ("chest_ct/lidc0314_2mm.nii.gz", 1),
    "abdomen_ct": ("abdomen_ct/totalseg_example_ct.nii.gz", 2),
}
GENERATED_SEED = 2026


def hippocampus_pairs(data: Path, count: int) -> list[Pair]:
    return [pair for pair in _named(data, count) if pair["id"].startswith("hippocampus_")]


def real_pairs(data: Path, folder: Path) -> list[Pair]:
    """The named pairs but for the Hippocampus, and two scans paired with a copy under a known field."""
    pairs = [pair for pair in _named(data, 0) if _complete(pair)]
    for name, (image, seed) in _KNOWN_FIELDS.items():
        path = data / image
        kept = folder / f"{name}.json"
        if kept.is_file():
            pairs.append(json.loads(kept.read_text()))
        elif path.is_file():
            pairs.append(known_field_pair(name, path, folder, seed=seed))
            kept.write_text(json.dumps(pairs[-1]))
        else:
            print(f"{name} is left out: there is no {path}")
    return pairs


def generated_pairs(folder: Path, count: int, shape: Sequence[int]) -> list[Pair]:
    """Pairs of the training's recipe at 1 mm, under a seed that no training uses, with the exact field."""
    size = "x".join(map(str, shape))
    grid = Grid((shape[0], shape[1], shape[2]), np.eye(4))
    source = SyntheticPairs(length=count, shape=shape, seed=GENERATED_SEED, fixed_epoch=True)
    pairs = []
    for index in range(count):
        name = f"generated_{size}_{index:02d}"
        files = {key: f"{name}_{key}.nii.gz" for key in ("fixed", "moving", "fixed_label", "moving_label")}
        truth = folder / f"{name}_{TRUTH}.npz"
        pairs.append({"id": name} | {key: str(folder / file) for key, file in files.items()} | {TRUTH: str(truth)})
        if truth.is_file():  # written last
            continue
        folder.mkdir(parents=True, exist_ok=True)
        item = source[index]
        arrays = {
            "moving": 1000 * item["image"][0].numpy(),
            "fixed": 1000 * item["image"][1].numpy(),
            "moving_label": item["moving_label"][0].numpy().astype(np.int16),
            "fixed_label": item["fixed_label"][0].numpy().astype(np.int16),
        }
        for key, array in arrays.items():
            write_image(array_to_itk(array, grid), folder / files[key])
        with atomic_path(truth) as temporary, open(temporary, "wb") as file:
            displacement = ddf_to_displacement(item["ddf"], grid)
            np.savez_compressed(file, displacement=displacement, mask=item["mask"][0].numpy() > 0)
    return pairs


def _named(data: Path, count: int) -> list[Pair]:
    try:
        return [dict(pair) for pair in named_pairs(data, count)]
    except OSError as error:
        raise SystemExit(f"error: the test scans in {data} are incomplete: {error}") from None


def _complete(pair: Pair) -> bool:
    missing = [path for key, path in pair.items() if key != "id" and not Path(path).exists()]
    if missing:
        print(f"{pair['id']} is left out: there is no {missing[0]}")
    return not missing
