"""Figures of a network's weights on every validation pair, beside those of doing nothing."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.data import MetaTensor
from torch import Tensor, nn

from common.data._rows import with_ids
from common.data.pairs import PairDataset
from common.data.readers import EvaluationRules
from common.errors import InputError, find_registration_error
from common.geometry.spaces import PairGrids
from common.inference.instance import LEARNING_RATE, InstanceSimilarity, optimize_instance
from common.inference.weights import load_weights
from common.io import StagedOutput, atomic_path, check_output_dir, write_learn2reg
from common.memory import keep_freed_pages
from common.options import as_flag
from common.training.comparison import compare_figures, read_figures
from common.training.learn2reg import MeasuredPair, Structures, structure_figures, submission_name
from common.training.validation import ValidationFigure

__all__ = ["EvaluationRun", "available_figures"]

TABLE = "evaluation.csv"
SUBMISSION = "submission"
GRIDS = "grids"  # key of the `PairGrids` of a pair that is measured on its scans' own arrays
_LANDMARK_FIGURES = ("tre_std_mm", "tre_snapped_mm")
_ZERO = "zero_displacement"  # suffix of the columns of the field that moves nothing


def available_figures(pair: Mapping[str, Any], structures: Structures = ()) -> list[str]:
    """The figures that what a pair carries allows for."""
    names = []
    if "ddf" in pair and "mask" in pair:
        names.append("endpoint_error")
    if "fixed_label" in pair and "moving_label" in pair:
        names += ["dice", "dice_micro", "hd95"] if GRIDS in pair else ["dice", "hd95"]
        names += structure_figures(structures) if GRIDS in pair else []
    if "fixed_keypoints" in pair and "moving_keypoints" in pair:
        names.append("tre_mm")
        points = [pair[f"{role}_keypoints"] for role in ("fixed", "moving")]
        if GRIDS in pair and all(bool((array == array.round()).all()) for array in points):
            names += _LANDMARK_FIGURES  # landmarks that somebody has set in voxels, as DIR-Lab's
    return [*names, "ncc", "folding_percent", "sdlogj"]


class EvaluationRun:
    """Evaluates weights on an evaluator's pairs; problems end the program with one sentence.

    Scans are measured on their own arrays by Learn2Reg's rules (`MeasuredPair`), but for "ncc", which is that of the
    network's input; generated pairs, and pairs without "grids", on the network's grid (`ValidationFigure`).

    Prints means and standard deviations and writes a row for each pair to evaluation.csv: MONAI's `MetricsSaver` makes
    a file of each figure, names one scan for each row, and has no place for the figures of the zero displacement.
    "seconds" is the time of the network and of the instance optimisation, without reading and measuring.

    Args:
        evaluator: a MONAI evaluator with a batch size of 1.
        dataset: its pairs, a `TrainingPairs`.
        network: receives the weights.
        weights: path of its state dict.
        output_dir: folder of the table.
        figures: names, see `ValidationFigure`; all that a pair allows for when None.
        spacing: mm of the network grid, for "tre_mm" measured there; 1 mm when None.
        scans: the `TrainingScans` that the pairs come from, for the rules of its challenge (`EvaluationRules`).
        instance_optimization: steps by which each pair's field is refined before it is measured, see
            `optimize_instance`.
        instance_similarity: "auto", "mind" or "ncc", for these.
        instance_learning_rate: of Adam, for these.
        compare: evaluation.csv of another run; the figures that both have are compared by paired Wilcoxon tests over
            the pairs that both have.
        submission: also write each pair's field to submission/ in the form and under the name of the Learn2Reg
            challenges.
    """

    def __init__(
        self,
        *,
        evaluator: Any,
        dataset: Any,
        network: nn.Module,
        weights: str,
        output_dir: str | os.PathLike[str],
        figures: Sequence[str] | None = None,
        spacing: float | Sequence[float] | None = None,
        scans: Any = None,
        instance_optimization: int = 0,
        instance_similarity: InstanceSimilarity = "auto",
        instance_learning_rate: float = LEARNING_RATE,
        compare: str | os.PathLike[str] | None = None,
        submission: bool = False,
    ) -> None:
        self.evaluator = evaluator
        self.dataset = dataset
        self.network = network
        self.weights = weights
        self.table = Path(output_dir) / TABLE
        self.figures = None if figures is None else list(figures)
        self.spacing = _three(spacing)
        self.scans = scans
        self.rules = EvaluationRules()
        self.instance_optimization = instance_optimization
        self.instance_similarity: InstanceSimilarity = instance_similarity
        self.instance_learning_rate = instance_learning_rate
        self.compare = compare
        self.submission = as_flag(submission, "submission")
        self.rows: list[dict[str, Any]] = []
        self._pairs: list[dict[str, str]] = []
        self._names: list[str] = []  # of the submission's files
        self._stage: Path | None = None
        self._started = 0.0
        evaluator.add_event_handler(Events.ITERATION_STARTED, self._start)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._measure)

    def run(self) -> None:
        """Evaluate.

        Raises:
            SystemExit: with the sentence that tells what went wrong.
        """
        keep_freed_pages()
        try:
            check_output_dir(self.table.parent)
            self._pairs = self._identify()
            if self.scans is not None:
                self.rules = self.scans.rules
            self._check_options()
            others = self._read_others()
            load_weights(self.network, self.weights)
            self.rows = []
            with self._submission():
                self.evaluator.run()
            self._write()
        except Exception as error:
            cause = find_registration_error(error)
            if cause is None:
                raise
            raise SystemExit(f"error: {cause}") from None
        print(self.summary())
        if others:
            print(self.comparison(others))

    # Before the first pair

    def _identify(self) -> list[dict[str, str]]:
        """The "id" of each pair, and both scans by file, which generated pairs have none of."""
        pairs = getattr(self.dataset, "pairs", None)
        if not isinstance(pairs, PairDataset):
            if getattr(self.scans, "path", ""):
                raise InputError(f"no pair of '{self.scans.path}' is set aside for validation: give --validation")
            return [{"id": f"generated_{index}"} for index in range(len(self.dataset))]
        rows = []
        for index in range(len(pairs)):
            pair = pairs.pair(index)
            keys = [key for key in ("id", "fixed", "moving") if isinstance(pair.get(key), str | os.PathLike)]
            row = {key: os.fspath(pair[key]) for key in keys}
            if not {"fixed", "moving"} <= row.keys():  # loaded values have no name
                row = {"id": f"pair_{index}", **row}
            rows.append((f"pair {index + 1}", row))
        return with_ids(Path("pairs to evaluate"), rows)

    def _check_options(self) -> None:
        for name in self.figures or ():
            if name in (*_LANDMARK_FIGURES, *structure_figures(self.rules.structures)):
                continue  # of the scans' own arrays alone
            try:
                ValidationFigure(name)
            except ValueError as error:
                raise InputError(str(error)) from None
        if isinstance(self.instance_optimization, bool) or not isinstance(self.instance_optimization, int):
            raise InputError(
                f"the number of instance optimisation steps must be a whole number, got {self.instance_optimization!r}"
            )
        # It refuses what it cannot use before it looks at the pair.
        nothing = torch.zeros(3, 1, 1, 1)
        optimize_instance(
            nothing[:2],
            nothing,
            iterations=min(0, self.instance_optimization),
            similarity=self.instance_similarity,
            learning_rate=self.instance_learning_rate,
        )
        if self.submission:
            if not all("fixed" in pair and "moving" in pair for pair in self._pairs):
                raise InputError("a submission needs pairs of scans, not generated ones: give --dataset_dir")
            self._names = self._submission_names()

    def _submission_names(self) -> list[str]:
        names: list[str] = []
        for pair in self._pairs:
            name = submission_name(pair["fixed"], pair["moving"], pair["id"])
            # Scans of two data sets may have the numbers of one.
            names.append(name if name not in names else submission_name("", "", pair["id"]))
        return names

    def _read_others(self) -> dict[str, dict[str, float]]:
        if not self.compare:
            return {}
        others = read_figures(self.compare)
        if not any(pair["id"] in others for pair in self._pairs):
            raise InputError(f"'{self.compare}' has no pair in common with this evaluation: no 'id' is the same")
        return others

    # Each pair

    @contextmanager
    def _submission(self) -> Iterator[None]:
        """The fields appear together at the end, or not at all."""
        if not self.submission:
            yield
            return
        with StagedOutput(self.table.parent / SUBMISSION, self._names) as stage:
            self._stage = stage
            yield

    def _start(self, engine: Any) -> None:
        self._started = time.perf_counter()

    def _measure(self, engine: Any) -> None:
        output = engine.state.output
        pair, ddf = output["label"], output["pred"]
        index = len(self.rows)
        files = self._pairs[index]
        ddf = self._refined(pair["image"], ddf.as_tensor() if isinstance(ddf, MetaTensor) else ddf)
        if not bool(torch.isfinite(ddf).all()):
            raise InputError(f"the field of the pair '{files['id']}' holds values that are not finite")
        if ddf.is_cuda:
            torch.cuda.synchronize(ddf.device)
        row: dict[str, Any] = {"pair": index, **files, "seconds": round(time.perf_counter() - self._started, 3)}
        try:
            row |= self._figures(pair, ddf, index)
        except InputError:
            raise
        except ValueError as error:  # a metric's word on what it was given
            raise InputError(f"the pair '{files['id']}' cannot be measured: {error}") from error
        self.rows.append(row)

    def _refined(self, image: Tensor, ddf: Tensor) -> Tensor:
        """Instance optimisation of a batch of one."""
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        refined = optimize_instance(
            plain[0],
            ddf[0].float(),
            iterations=self.instance_optimization,
            similarity=self.instance_similarity,
            learning_rate=self.instance_learning_rate,
        )
        return refined[None]

    def _figures(self, pair: Mapping[str, Any], ddf: Tensor, index: int) -> dict[str, float]:
        """Each figure of the field and of the one that moves nothing."""
        grids = PairGrids.from_arrays(pair[GRIDS]) if GRIDS in pair else None
        fields = {"": ddf, f"_{_ZERO}": torch.zeros_like(ddf)}
        measured = {}
        if grids is not None:
            for suffix, field in fields.items():
                measured[suffix] = MeasuredPair(
                    pair, field, grids=grids, masked=self.rules.masked, structures=self.rules.structures
                )
            self._submit(measured[""], index)
        elif self.submission:
            raise InputError("a submission needs pairs with 'grids', as evaluate.json makes them")
        values: dict[str, float] = {}
        for name in available_figures(pair, self.rules.structures) if self.figures is None else self.figures:
            for suffix, field in fields.items():
                if suffix in measured and name in measured[suffix].figures():
                    values[name + suffix] = measured[suffix].figure(name)
                else:
                    on_grid = ValidationFigure(name, spacing=self.spacing)
                    values[name + suffix] = float(on_grid({"pred": field, "label": pair}))
        return values

    def _submit(self, measured: MeasuredPair, index: int) -> None:
        if self._stage is None:
            return
        shape = measured.grids.fixed.shape
        if self.rules.shapes and shape not in self.rules.shapes:
            raise InputError(
                f"'{self._pairs[index]['fixed']}' has the shape {_times(shape)}, and so its field, but the data set's "
                f"tensorImageShape, which a submission must have, is {' or '.join(map(_times, self.rules.shapes))}"
            )
        write_learn2reg(self._stage / self._names[index], measured.displacement)

    # After the last pair

    def _write(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        self.table.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.table) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    @property
    def _measured_names(self) -> list[str]:
        """The figures that any row has."""
        keys = dict.fromkeys(key for row in self.rows for key in row)
        return [key for key in keys if f"{key}_{_ZERO}" in keys]

    def summary(self) -> str:
        """Means and standard deviations as a table."""
        names = self._measured_names
        width = max(18, *(len(name) + 1 for name in names))
        lines = [
            f"{len(self.rows)} pairs, mean +- standard deviation",
            f"{'':{width}s}{'network':>20s}{'no displacement':>20s}",
            *(f"{name:{width}s}{self._cells([name])}" for name in names),
        ]
        each = [name for name in structure_figures(self.rules.structures)[2:] if name in names]
        if each:
            # The deviation that tables of IXI print: mostly that between structures.
            lines.append(f"{f'{len(each)} structures':{width}s}{self._cells(each)}")
        lines.append(f"{'seconds':{width}s}{_mean_std(row['seconds'] for row in self.rows):>20s}")
        lines.append(f"each pair in {self.table}")
        if self.submission:
            lines.append(f"{len(self._names)} fields in {self.table.parent / SUBMISSION}")
        return "\n".join(lines)

    def _cells(self, names: Sequence[str]) -> str:
        """Mean and standard deviation over all pairs of one figure, or of several alike."""
        cells = []
        for suffix in ("", f"_{_ZERO}"):
            keys = [name + suffix for name in names]
            cells.append(_mean_std(row[key] for row in self.rows for key in keys if key in row))
        return f"{cells[0]:>20s}{cells[1]:>20s}"

    def comparison(self, others: Mapping[str, Mapping[str, float]]) -> str:
        """This run's figures against another's, see `compare_figures`."""
        here = {row["id"]: row for row in self.rows}
        count = sum(pair in others for pair in here)
        lines = compare_figures(here, others, self._measured_names)
        return "\n".join([f"against {self.compare}, {count} pairs in both, Wilcoxon signed-rank test", *lines])


def _mean_std(values: Iterable[float]) -> str:
    """Of the finite values: a label that neither image has makes no figure."""
    finite = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    if not len(finite):
        return "none"
    return f"{float(finite.mean()):.4f} +- {float(finite.std(correction=0)):.4f}"


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _three(spacing: float | Sequence[float] | None) -> tuple[float, float, float]:
    if spacing is None:
        return 1.0, 1.0, 1.0
    if isinstance(spacing, int | float):
        return float(spacing), float(spacing), float(spacing)
    a, b, c = spacing
    return float(a), float(b), float(c)
