"""Setting scans or pairs aside for validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from common.data._rows import Item, stem
from common.errors import InputError

__all__ = ["select_items", "split_items"]


def split_items(items: Sequence[Item], validation: int | float) -> tuple[list[Item], list[Item]]:
    """Set the last items aside for validation; the same items always give the same split.

    Args:
        items: scans or pairs.
        validation: how many of the last items (int), or which fraction of all (float below 1, rounded, at least one).
            A patient ("group") is never on both sides: all scans of a patient among the last items go to validation.

    Returns:
        the training items and the validation items, both in the order of `items`.

    Raises:
        InputError: when nothing would be left to train on.
    """
    count = validation if isinstance(validation, int) else round(validation * len(items)) or math.ceil(validation)
    if (isinstance(validation, float) and not 0 <= validation < 1) or not 0 <= count < len(items):
        raise InputError(f"cannot set {validation} of {len(items)} items aside for validation and train on the rest")
    first = len(items) - count
    groups = {item["group"] for item in items[first:] if "group" in item}
    chosen = [i >= first or item.get("group") in groups for i, item in enumerate(items)]
    train = [item for item, held_out in zip(items, chosen, strict=True) if not held_out]
    if not train:
        raise InputError(f"the last {count} items belong to all the patients, so nothing is left to train on")
    return train, [item for item, held_out in zip(items, chosen, strict=True) if held_out]


def select_items(items: Sequence[Item], names: str | Sequence[str]) -> tuple[list[Item], list[Item]]:
    """Set the named items aside for validation, as for leaving one out.

    Args:
        items: scans or pairs.
        names: one or several (a list, or one text with commas), each the "id", the "group" or the file name without
            extension of a scan; small and capital letters and spaces make no difference. All scans of a patient
            ("group") go along. "all" sets every item aside and trains on all of them, too: it is for evaluating weights
            that were trained on something else.

    Returns:
        the training items and the validation items, both in the order of `items`.

    Raises:
        InputError: when a name is none of an item's, or nothing would be left to train on.
    """
    listed = names.split(",") if isinstance(names, str) else [str(name) for name in names]
    wanted = {_plain(name): name.strip() for name in listed if name.strip()}
    if list(wanted) == ["all"]:
        return list(items), list(items)
    known = [_names(item) for item in items]
    for plain, name in wanted.items():
        if not any(plain in found for found in known):
            there = ", ".join(item.get("id") or stem(Path(item.get("image", ""))) for item in items[:12])
            more = ", ..." if len(items) > 12 else ""
            raise InputError(f"'{name}' is to be set aside for validation, and is none of {there}{more}")
    named = [not found.isdisjoint(wanted) for found in known]
    groups = {item["group"] for item, is_named in zip(items, named, strict=True) if is_named and "group" in item}
    chosen = [is_named or item.get("group") in groups for item, is_named in zip(items, named, strict=True)]
    train = [item for item, held_out in zip(items, chosen, strict=True) if not held_out]
    if not train or not wanted:
        raise InputError(f"cannot set {len(items) - len(train)} of {len(items)} items aside and train on the rest")
    return train, [item for item, held_out in zip(items, chosen, strict=True) if held_out]


def _names(item: Item) -> set[str]:
    names = [item[key] for key in ("id", "group") if key in item]
    return {_plain(name) for name in (*names, stem(Path(item.get("image", ""))))}


def _plain(name: str) -> str:
    return "".join(name.split()).casefold()
