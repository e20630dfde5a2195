"""Pairs of scans from a flat list of scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import InputError

__all__ = ["PairDataset"]

Pairing = Literal["random", "neighbours", "all", "given"]

_COMPANIONS = ("label", "keypoints", "mask")


class PairDataset(Dataset[dict[str, Any]]):
    """Fixed and moving scans, paired here from a flat list of single scans.

    The pairing lives in the dataset because MONAI Label replaces `train#dataset#data` by its own list of
    {"image", "label"} (spec/monai_bundle.md, 4.3).

    Scans with a "group" are paired within their group only; it is needed where scans carry key points, which correspond
    within one patient.

    Args:
        data: the items, {"image"} and optionally "label", "keypoints", "mask", "group"; paths or loaded values. With
            `pairing="given"` the items are pairs, {"fixed", "moving", ...}, and pass as they are.
        transform: called with each pair, for instance a MONAI `Compose`.
        pairing: "random": each epoch another order of the fixed scans, each with a random other scan as moving;
            "neighbours": scan i fixed and scan i + 1 moving, the last with the first; "all": every ordered pair;
            "given": see `data`.
        seed: of the random pairing; a pair depends on (seed, epoch, index) only, whatever the worker.
        length: number of pairs an epoch. By default each pair once, or for "random" each scan once as fixed. The
            deterministic pairings are cut short, the next epoch going on from there, or repeated.

    Raises:
        InputError: when the items cannot be paired.
        ValueError: when `pairing` or `length` is none of the above.

    Each item is a dict with "fixed", "moving" and, where the scans have them, "fixed_label", "moving_label",
    "fixed_keypoints", "moving_keypoints", "fixed_mask", "moving_mask".
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        transform: Callable[[dict[str, Any]], Any] | None = None,
        *,
        pairing: Pairing = "random",
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        if pairing not in get_args(Pairing):
            raise ValueError(f"pairing is one of {', '.join(get_args(Pairing))}, not '{pairing}'")
        if length is not None and length < 1:
            raise ValueError(f"an epoch has at least one pair, not {length}")
        self.data = list(data)
        self.transform = transform
        self.pairing = pairing
        self.seed = seed
        # In shared memory, so that a data loader's persistent workers see the epoch change, too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._companions: tuple[str, ...] = ()
        self._partners: list[list[int]] = []  # for each item the other items of its group, in order
        if pairing == "given":
            _check_pairs(self.data)
        else:
            self._companions = _check_scans(self.data)
            self._partners = _partners(self.data)
        self._pairs = self._fixed_list_of_pairs()
        count = len(self._pairs) if pairing in ("neighbours", "all") else len(self.data)
        self._length = count if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        pair = self.pair(index % len(self))
        return pair if self.transform is None else self.transform(pair)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose pairs are handed out; without a call it is epoch 0 for ever."""
        self._epoch.fill_(epoch)

    def pair(self, index: int) -> dict[str, Any]:
        """The pair `index` of this epoch before the transform."""
        if self.pairing == "given":
            return dict(self.data[self._position(index) % len(self.data)])
        fixed, moving = self.indices(index)
        pair = {"fixed": self.data[fixed]["image"], "moving": self.data[moving]["image"]}
        for key in self._companions:
            pair[f"fixed_{key}"] = self.data[fixed][key]
            pair[f"moving_{key}"] = self.data[moving][key]
        return pair

    def indices(self, index: int) -> tuple[int, int]:
        """Positions in `data` of the fixed and of the moving scan of the pair `index` of this epoch."""
        if self.pairing == "given":
            raise ValueError("given pairs are not made of the positions of two scans")
        if self.pairing != "random":
            return self._pairs[self._position(index) % len(self._pairs)]
        # A permutation for each pass through the scans, so that even a short epoch draws from all of them.
        epoch = int(self._epoch)
        sweep, position = divmod(index, len(self.data))
        order = np.random.default_rng([self.seed, epoch, sweep, 0]).permutation(len(self.data))
        fixed = int(order[position])
        partners = self._partners[fixed]
        return fixed, partners[int(np.random.default_rng([self.seed, epoch, index, 1]).integers(len(partners)))]

    def _position(self, index: int) -> int:
        return int(self._epoch) * self._length + index

    def _fixed_list_of_pairs(self) -> list[tuple[int, int]]:
        if self.pairing == "all":
            return [(fixed, moving) for fixed, others in enumerate(self._partners) for moving in others]
        if self.pairing == "neighbours":  # the next of the group, or its first
            return [(i, next((j for j in others if j > i), others[0])) for i, others in enumerate(self._partners)]
        return []


def _check_pairs(data: Sequence[dict[str, Any]]) -> None:
    if not data:
        raise InputError("the list of pairs is empty")
    for number, item in enumerate(data, start=1):
        for role in ("fixed", "moving"):
            if role not in item:
                hint = "; to pair single scans use another pairing than 'given'" if "image" in item else ""
                raise InputError(f"item {number} of the given pairs has no '{role}'{hint}")


def _check_scans(data: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What the scans carry besides their image; it must be the same for all."""
    if len(data) < 2:
        raise InputError(f"pairs are made of at least 2 scans, and the list has {len(data)}")
    for number, item in enumerate(data, start=1):
        if "image" not in item:
            hint = "; pairs need pairing='given'" if "fixed" in item else ""
            raise InputError(f"item {number} of the scans has no 'image'{hint}")
    companions = tuple(key for key in _COMPANIONS if any(key in item for item in data))
    for key in (*companions, "group"):
        having = sum(key in item for item in data)
        # Dropping it silently would train without labels, or across patients, although the user gave them.
        if 0 < having < len(data):
            raise InputError(f"'{key}' is given for {having} of {len(data)} scans; give it for all or for none")
    if "keypoints" in companions and "group" not in data[0]:
        raise InputError(
            "key points correspond within one patient: give each scan the patient as its 'group', "
            "or give pairs with pairing='given'"
        )
    return companions


def _partners(data: Sequence[dict[str, Any]]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, item in enumerate(data):
        groups.setdefault(item.get("group"), []).append(i)
    for name, members in groups.items():
        if len(members) < 2:
            raise InputError(f"the group '{name}' has a single scan, which nothing can be paired with")
    return [[j for j in groups[item.get("group")] if j != i] for i, item in enumerate(data)]
