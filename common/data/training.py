"""What a training config trains on: real scans where it names some, else generated pairs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import Dataset

from common.data.pairs import PairDataset, Pairing
from common.data.readers import Item, read_datalist, split_items
from common.data.synthetic import SyntheticPairs

__all__ = ["TrainingPairs", "TrainingScans"]


class TrainingScans:
    """The scans of a data set, split into training and validation; both empty without a data set.

    Args:
        dataset_dir: folder of a data set, see `read_datalist`; None for generated pairs.
        datalist: a list inside that folder, when the folder does not say it all itself.
        validation: number or fraction of the scans to validate on, the last ones of the list.
    """

    def __init__(self, *, dataset_dir: str | None, datalist: str | None = None, validation: int | float = 0.2) -> None:
        self.path = os.path.join(dataset_dir or "", datalist or "")
        self.fraction = validation

    @cached_property
    def _split(self) -> tuple[list[Item], list[Item]]:
        return split_items(read_datalist(self.path), self.fraction) if self.path else ([], [])

    @property
    def training(self) -> list[Item]:
        return self._split[0]

    @property
    def validation(self) -> list[Item]:
        return self._split[1]


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

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]
