"""Does a network know where it errs? `python -m benchmarks.uncertainty --bundle bundles/adregnet`.

On generated pairs, whose field is known exactly: Spearman's rank correlation over the voxels of the mask between the
endpoint error of the network's field and the spread of its answers to mirrored copies of the pair
(`common.inference.mirrored_spread`), for the field of each level and the finest. Beside it what costs nothing: the
length of the field itself, and the fixed image's gradient (turned around: little texture should mean much error). The
last column is the error of the tenth of the voxels with the largest spread over that of all voxels; 1 says nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks._measure import describe_machine, print_table
from common.data.synthetic import SyntheticPairs
from common.errors import InputError
from common.inference import PaddedInferer, load_weights

FIELD, GRADIENT = "field length", "no texture"
WORST = "worst tenth"


def load_network(bundle: Path, weights: Path) -> Any:
    """The network of a bundle's inference.json with weights."""
    sys.path.insert(0, os.path.abspath(bundle))
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def")
    load_weights(network, weights)
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def correlations(network: Any, pair: dict[str, Tensor]) -> dict[str, float]:
    """Rank correlations with the endpoint error of one generated pair, the mean error, and the worst tenth's share.

    Args:
        network: with `forward_sequence` and `stride`.
        pair: of `SyntheticPairs`.

    Returns:
        "error" in voxels, "level 1" (coarsest) to "level L", `FIELD`, `GRADIENT`, `WORST`.
    """
    inferer = PaddedInferer(multiple=network.stride, uncertainty=True)
    device = next(network.parameters()).device
    answer = inferer(pair["image"][None].to(device), network)[0].cpu()
    ddf, spreads = answer[:3], answer[3:]
    inside = pair["mask"][0] > 0
    error = (ddf - pair["ddf"]).norm(dim=0)[inside].numpy()
    found = {"error": float(error.mean())}
    for level, spread in enumerate(spreads, start=1):
        found[f"level {level}"] = rank_correlation(spread[inside].numpy(), error)
    found[FIELD] = rank_correlation(ddf.norm(dim=0)[inside].numpy(), error)
    gradient = torch.stack(torch.gradient(pair["image"][1])).norm(dim=0)
    found[GRADIENT] = rank_correlation(-gradient[inside].numpy(), error)
    finest = spreads[-1][inside].numpy()
    worst = error[finest >= np.quantile(finest, 0.9)]
    found[WORST] = float(worst.mean() / error.mean())
    return found


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; NaN where one of the two is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/adregnet"))
    parser.add_argument("--weights", type=Path, help="models/model.pt of the bundle by default")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 64, 64), metavar=("D", "H", "W"))
    parser.add_argument("--seed", type=int, default=2026, help="of the pairs; that of no training by default")
    options = parser.parse_args(argv)
    weights = options.weights or options.bundle / "models/model.pt"
    try:
        network = load_network(options.bundle, weights)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    print(describe_machine())
    pairs = SyntheticPairs(length=options.pairs, shape=options.shape, seed=options.seed, fixed_epoch=True)
    rows = [correlations(network, pairs[index]) for index in range(options.pairs)]
    names = list(rows[0])
    lines: list[list[object]] = [[str(index), *(row[name] for name in names)] for index, row in enumerate(rows)]
    values = np.array([[row[name] for name in names] for row in rows])
    lines.append(["mean", *np.nanmean(values, axis=0).tolist()])
    lines.append(["std", *np.nanstd(values, axis=0).tolist()])
    size = "x".join(map(str, options.shape))
    title = f"{options.bundle.name}, {weights}, {options.pairs} generated pairs of {size}: error in voxels; Spearman"
    print_table(title, ["pair", *names], lines)


if __name__ == "__main__":
    main()
