"""The generated training pairs: what one costs, and what they look like: `python -m benchmarks.generator`.

Times a pair with each feature of the recipe alone and with all together, on the GPU where there is one. `--picture
PATH` draws the first pairs of a recipe instead, that of an overlay's `recipe`; `--label_maps FOLDER` paints people's
label maps too, pairs between two of them at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt

from benchmarks._measure import argument_parser, describe_machine, interleave, print_table, ratio
from common.data import SyntheticPairs
from common.io import atomic_path

_ROOT = Path(__file__).resolve().parents[1]
_FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tubes": {"tubes": 3},
    "sliding": {"sliding": 1.0},
    "soft edges": {"softness": [1.0, 1.0]},
    "CT": {"ct": 1.0},
    "artefacts, missing parts": {"artefacts": 1.0, "missing": 1.0},
}
_COLUMNS = 5


def pairs_of(recipe: Mapping[str, Any], shape: Sequence[int], count: int, seed: int) -> SyntheticPairs:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SyntheticPairs(length=count, shape=shape, seed=seed, recipe=dict(recipe), device=device)


def measure(recipe: Mapping[str, Any], shape: Sequence[int], repeats: int, seed: int) -> None:
    """Print seconds a pair, by feature."""

    def make(pairs: SyntheticPairs) -> None:
        for index in range(len(pairs)):
            pairs[index]
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    kinds = _FEATURES | {"the recipe": dict(recipe)}
    calls = {name: partial(make, pairs_of(kind, shape, 4, seed)) for name, kind in kinds.items()}
    times = interleave(calls, repeats=repeats)
    plain = times["plain"].cpu_seconds
    rows = [[name, t.seconds / 4, t.cpu_seconds / 4, ratio(t.cpu_seconds, plain)] for name, t in times.items()]
    print_table(f"a pair of {'x'.join(map(str, shape))}", ["", "seconds", "CPU s", "of the plain one"], rows)


def draw(pairs: Sequence[tuple[str, Mapping[str, torch.Tensor]]], path: Path) -> None:
    """Moving, fixed and the length of the field of each pair, through the middle of its first axis."""
    rows = -(-len(pairs) // _COLUMNS)
    figure, axes = plt.subplots(
        3 * rows, _COLUMNS, figsize=(2 * _COLUMNS, 6.3 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    largest = max(float(pair["ddf"].norm(dim=0).max()) for _, pair in pairs if "ddf" in pair)
    for index, (title, pair) in enumerate(pairs):
        row, column = divmod(index, _COLUMNS)
        middle = pair["image"].shape[1] // 2
        moving, fixed = (image[middle].cpu().numpy() for image in pair["image"])
        for place, slice_ in enumerate((moving, fixed)):
            axes[3 * row + place, column].imshow(slice_, cmap="gray", vmin=0, vmax=1)
        axes[3 * row, column].set_title(title, fontsize=8)
        if "ddf" in pair:
            length = np.linalg.norm(pair["ddf"][:, middle].cpu().numpy(), axis=0)
            shown = axes[3 * row + 2, column].imshow(length, cmap="viridis", vmin=0, vmax=largest)
    figure.colorbar(shown, ax=axes, location="bottom", shrink=0.4, aspect=40, label="length of the field, voxels")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=70, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print, or draw."""
    parser = argument_parser(__doc__, shape=(64, 64, 64), repeats=3)
    parser.add_argument("--overlay", type=Path, default=_ROOT / "bundles/recorr/configs/general.json")
    parser.add_argument("--label_maps", help="folder of people's label maps")
    parser.add_argument("--picture", type=Path, help="draw pairs there instead")
    parser.add_argument("--pairs", type=int, default=20, help="of the picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    recipe = json.loads(options.overlay.read_text())["recipe"]
    if options.label_maps:
        recipe |= {"label_maps": options.label_maps, "between_share": 1.0}
    if options.picture is None:
        print(describe_machine())
        measure(recipe, options.shape, options.repeats, options.seed)
        return
    source = pairs_of(recipe, options.shape, options.pairs, options.seed)
    between = options.pairs // 5 if options.label_maps else 0
    drawn = [("one anatomy", source[index]) for index in range(options.pairs - between)]
    source.set_epoch(1)
    drawn += [("two people", source[index]) for index in range(between)]
    draw(drawn, options.picture)
    print(f"{len(drawn)} pairs in {options.picture}")


if __name__ == "__main__":
    main()
