"""What a training config trains on: real scans where it names some, else generated pairs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import Dataset

from common.data._rows import Item
from common.data.pairs import PairDataset, Pairing
from common.data.readers import EvaluationRules, read_dataset, read_evaluation_rules
from common.data.splits import select_items, split_items
from common.data.synthetic import SyntheticPairs
from common.errors import InputError

__all__ = ["TrainingPairs", "TrainingScans"]


class TrainingScans:
    """The scans or pairs of a data set, split into training and validation; both empty without a data set.

    Args:
        dataset_dir: folder of a data set, see `read_dataset`; None for generated pairs.
        datalist: a list inside that folder, when the folder does not say it all itself.
        validation: number or fraction of the scans to validate on, the last ones of the training list; or the names of
            those to validate on, see `select_items` ("case8", "case1,case2", "all"). None for those that the data set
            itself names (Learn2Reg's official pairs), and a fifth where it names none. 0: none, so that validation
            is on generated pairs.
    """

    def __init__(
        self,
        *,
        dataset_dir: str | None,
        datalist: str | None = None,
        validation: int | float | str | Sequence[str] | None = None,
    ) -> None:
        self.dataset_dir = dataset_dir or ""
        self.path = os.path.join(self.dataset_dir, datalist or "")
        self.held_out = validation

    @cached_property
    def _split(self) -> tuple[list[Item], list[Item]]:
        if not self.path:
            return [], []
        if self.dataset_dir and not os.path.exists(self.dataset_dir):  # before a list inside it is looked for
            raise InputError(f"the data folder '{self.dataset_dir}' does not exist")
        training, official = read_dataset(self.path)
        if self.held_out is None:
            return (training, official) if official else split_items(training, 0.2)
        if isinstance(self.held_out, int | float):
            return split_items(training, self.held_out)
        return select_items(training, self.held_out)

    @property
    def training(self) -> list[Item]:
        return self._split[0]

    @property
    def validation(self) -> list[Item]:
        return self._split[1]

    @cached_property
    def rules(self) -> EvaluationRules:
        """See `read_evaluation_rules`."""
        return read_evaluation_rules(self.path) if self.path else EvaluationRules()


class TrainingPairs(Dataset):
    """Pairs of real scans, or generated ones where `data` is empty; see `PairDataset` and `SyntheticPairs`.

    Args:
        data: flat list of scans (MONAI Label puts its own here), or of pairs with `pairing="given"`.
        transform: preprocessing of real pairs; generated ones need none.
        pairing: of real scans.
        length: pairs in an epoch.
        shape: of generated pairs.
        seed: of the pairing or the generator.
        recipe: of generated pairs.
        fixed_epoch: every epoch repeats the first one, for validation.
        partners: other scans, of which the first one is the moving scan where `data` is a single scan: MONAI Label sets
            one scan of three to seven aside for validation.
    """

    def __init__(
        self,
        *,
        data: Sequence[dict[str, Any]],
        transform: Callable[[dict[str, Any]], Any] | None = None,
        pairing: Pairing = "random",
        length: int | None = None,
        shape: Sequence[int] = (64, 64, 64),
        seed: int = 0,
        recipe: dict[str, Any] | None = None,
        fixed_epoch: bool = False,
        partners: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.data = list(data)
        self.fixed_epoch = fixed_epoch
        self.pairs: PairDataset | SyntheticPairs
        if self.data:
            if "fixed" in self.data[0]:
                pairing = "given"
            elif len(self.data) == 1 and partners:
                data, pairing, length = [self.data[0], partners[0]], "neighbours", length or 1
            self.pairs = PairDataset(data, transform, pairing=pairing, seed=seed, length=length)
        else:
            self.pairs = SyntheticPairs(length=length or 1, shape=shape, seed=seed, recipe=recipe)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose pairs are handed out next."""
        self.pairs.set_epoch(0 if self.fixed_epoch else epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.pairs[index], "pair_index": index}
