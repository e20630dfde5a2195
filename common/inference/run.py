"""Registering one pair or a list of pairs from a config: errors as sentences, a table at the end."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.engines import SupervisedEvaluator
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from common.data.readers import read_pairs
from common.errors import InputError, RegistrationError, find_registration_error
from common.inference.output import METRICS_FILE
from common.inference.weights import load_weights
from common.io import atomic_path, check_output_dir
from common.memory import keep_freed_pages, return_freed_pages

__all__ = ["RegistrationRun", "RequestedPairs", "prepare_pair_batch"]

_PAIR_FILES = (
    "fixed",
    "moving",
    "fixed_label",
    "moving_label",
    "fixed_landmarks",
    "moving_landmarks",
    "fixed_mask",
)
RESULTS_FILE = "results.csv"


def prepare_pair_batch(
    batch: Mapping[str, Any], device: str | torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The network's input (1, 2, D, H, W) of one prepared item; an item of its own, never collated."""
    return batch["image"][None].to(device=device, non_blocking=non_blocking, **kwargs), None


class RequestedPairs(Dataset):
    """The pairs that the command line asks for, one by `fixed` and `moving`, or many by `datalist`.

    Files are checked when an item is taken, so that one bad pair of many spoils only itself.

    Args:
        files: paths of a single pair; empty ones do not count.
        datalist: a CSV or JSON list of pairs, see `read_pairs`.
        dataset_dir: where a relative `datalist` is looked for.
        output_dir: results go there, in a folder by pair where there is a list.
        transform: preprocessing.
    """

    def __init__(
        self,
        *,
        files: Mapping[str, str | None],
        datalist: str | None = None,
        dataset_dir: str = ".",
        output_dir: str | None = None,
        transform: Any = None,
    ) -> None:
        self.files = {key: os.path.abspath(value) for key, value in files.items() if value}
        self.datalist = os.path.join(dataset_dir, datalist) if datalist else None
        self.output_dir = output_dir or ""
        self.transform = transform
        self._data: list[dict[str, Any]] | None = None

    @property
    def data(self) -> list[dict[str, Any]]:
        """One dict of paths for each pair, with `id` and `output_dir`; read at first use.

        Raises:
            InputError: when neither or both ways are used, or the list is unusable.
        """
        if self._data is None:
            self._data = self._read()
        return self._data

    def _read(self) -> list[dict[str, Any]]:
        if not self.output_dir:
            raise InputError("there is no folder for the results: give --output_dir")
        if not self.datalist:
            for key in ("fixed", "moving"):
                if key not in self.files:
                    raise InputError(f"there is no {key} image: give --fixed and --moving, or --datalist")
            return [{**self.files, "id": "", "output_dir": self.output_dir}]
        if self.files:
            raise InputError("give either --fixed and --moving or --datalist, not both")
        return [{**pair, "output_dir": os.path.join(self.output_dir, pair["id"])} for pair in read_pairs(self.datalist)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        item = dict(self.data[index])
        return self.transform(item) if self.transform else item


class RegistrationRun:
    """Runs an evaluator over pairs, one at a time.

    A single pair's problem ends the program with one sentence and exit code 1. Of a list, a failed pair is reported
    and the rest done, finished pairs are skipped, and results.csv holds a row for each; the exit code is 1 if any
    failed.

    Args:
        evaluator: a MONAI evaluator whose postprocessing writes the results.
        dataset: the pairs.
        network: receives the weights.
        weights: path of its state dict.
        output_dir: folder of the results.
    """

    def __init__(
        self,
        *,
        evaluator: SupervisedEvaluator,
        dataset: RequestedPairs,
        network: nn.Module,
        weights: str,
        output_dir: str | None,
    ) -> None:
        self.evaluator = evaluator
        self.dataset = dataset
        self.network = network
        self.weights = weights
        self.output_dir = output_dir or ""

    def run(self) -> None:
        """Register everything; see the class.

        Raises:
            SystemExit: with the sentence that tells what went wrong.
        """
        keep_freed_pages()
        try:
            pairs = self.dataset.data
            check_output_dir(self.output_dir)
            load_weights(self.network, self.weights)
            if self.dataset.datalist:
                failed = self._run_list(pairs)
            else:
                metrics = self._run_pair(0)
                print(_summary(metrics), f"results in {self.output_dir}", sep="\n")
                failed = 0
        except RegistrationError as error:
            raise SystemExit(f"error: {error}") from None
        if failed:
            raise SystemExit(f"error: {failed} of {len(pairs)} pairs failed; see {self._table}")

    @property
    def _table(self) -> Path:
        return Path(self.output_dir) / RESULTS_FILE

    def _run_list(self, pairs: Sequence[Mapping[str, Any]]) -> int:
        rows: list[dict[str, Any]] = []
        with tqdm(pairs, unit="pair", desc="registering") as progress:
            for index, pair in enumerate(progress):
                progress.set_postfix_str(pair["id"])
                rows.append(self._row(index, pair, progress))
                return_freed_pages()
                self._write_table(rows)  # after every pair: an interrupted run leaves a true table
        return sum(row["status"] == "failed" for row in rows)

    def _row(self, index: int, pair: Mapping[str, Any], progress: tqdm) -> dict[str, Any]:
        finished = Path(pair["output_dir"]) / METRICS_FILE
        try:
            if finished.is_file():
                return {"id": pair["id"], "status": "skipped", **_flat(json.loads(finished.read_text()))}
            metrics = self._run_pair(index)
        except RegistrationError as error:
            progress.write(f"{pair['id']}: {error}")
            return {"id": pair["id"], "status": "failed", "problem": str(error)}
        return {"id": pair["id"], "status": "done", **_flat(metrics)}

    def _run_pair(self, index: int) -> dict[str, Any]:
        check_output_dir(self.dataset.data[index]["output_dir"])
        loader = DataLoader(Subset(self.dataset, [index]), batch_size=None, collate_fn=_as_is)
        self.evaluator.data_loader = loader
        try:
            self.evaluator.run()
        except Exception as error:
            # ignite keeps the loop that ended here and takes the next run for its end: it would do nothing, and the
            # figures of an earlier pair would pass for its own.
            self.evaluator._internal_run_generator = None
            self.evaluator.state.output = None
            cause = find_registration_error(error)
            if cause is None:
                raise
            raise cause from error
        output: Any = self.evaluator.state.output
        metrics: dict[str, Any] = output["metrics"]
        return metrics

    def _write_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        self._table.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._table) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def _as_is(item: Any) -> Any:
    return item


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as columns; what is not a number stays in metrics.json."""
    row: dict[str, Any] = {}
    for key, value in metrics.items():
        if key in ("settings", "versions"):
            continue
        if isinstance(value, Mapping):
            row |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            row[prefix + key] = value
    return row


def _summary(metrics: Mapping[str, Any]) -> str:
    """Two or three lines for the terminal."""
    lines = []
    rows = {"NCC": metrics["similarity"]["ncc"]}
    if "overlap" in metrics:
        rows["Dice"] = metrics["overlap"]["dice"]
    if "tre_mm" in metrics:
        rows["TRE mm"] = {stage: values["mean"] for stage, values in metrics["tre_mm"].items()}
    for name, stages in rows.items():
        lines.append(f"{name:7s}" + "   ".join(f"{stage} {value:.4f}" for stage, value in stages.items()))
    deformation, seconds = metrics["deformation"], metrics["seconds"]
    lines.append(
        f"folding {deformation['folding_percent']:.4f} %   largest displacement {deformation['max_mm']:.1f} mm   "
        f"{seconds['total']:.1f} s"
    )
    return "\n".join(lines)
