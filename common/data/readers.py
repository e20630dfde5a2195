"""Lists of scans and of pairs, read from the usual layouts into plain dicts with absolute paths.

Every problem of a list is an `InputError` that names the file, the row and what is wrong with it, before any image is
read. Rows are counted as an editor counts them: a CSV's header is row 1, the first entry of a JSON list is entry 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.data._rows import (
    Item,
    PathLike,
    absolute,
    check_keys,
    load_json,
    load_json_object,
    read_rows,
    read_text,
    stem,
    with_ids,
)
from common.data.dirlab import is_dirlab, is_dirlab_landmarks, read_dirlab, read_dirlab_landmarks
from common.data.ixi import IXI_STRUCTURES, is_ixi, read_ixi
from common.errors import InputError

__all__ = [
    "EvaluationRules",
    "read_datalist",
    "read_dataset",
    "read_decathlon",
    "read_evaluation_rules",
    "read_keypoints",
    "read_learn2reg",
    "read_learn2reg_pairs",
    "read_pairs",
    "select_items",
    "split_items",
]

_ITEM_FILES = ("image", "label", "keypoints", "mask")
_ROLES = ("fixed", "moving")
_LEARN2REG_KEYS = ("registration_val", "training_paired_images", "pairings", "tensorImageShape")
# Where a file that belongs to imagesTr/NAME.nii.gz lies (Learn2Reg, 2022 and later).
_LEARN2REG_FOLDERS = {"label": "labels", "keypoints": "keypoints", "mask": "masks"}


def read_decathlon(folder: PathLike, section: str = "training") -> list[Item]:
    """Scans of a Medical Segmentation Decathlon folder (http://medicaldecathlon.com).

    Args:
        folder: the folder of `dataset.json`, or that file.
        section: "training" ({"image", "label"}) or "test" ({"image"}).

    Returns:
        one dict per scan, in the order of the file.

    Raises:
        InputError: when the file is missing, broken or empty, or when a file it lists is missing.
    """
    path = Path(folder)
    path = path / "dataset.json" if path.is_dir() else path
    return _scans(path, section, _section(path, load_json_object(path), section))


def read_learn2reg(dataset_json: PathLike, split: str = "training", *, exclude_validation: bool = True) -> list[Item]:
    """Scans of a Learn2Reg data set (`<TASK>_dataset.json`, 2022 and later).

    Scans of a task with pairs of one patient get a "group", the patient, so that pairs stay within it. The key points
    that NLST lists as `.nii.gz` are the `.csv` files that it ships.

    Args:
        dataset_json: the file.
        split: "training", "val", "test", or a key of the file; a list of pairs gives the scans that occur in it.
        exclude_validation: leave out of "training" the scans of `registration_val`, which OASIS and NLST list twice.

    Returns:
        one dict per scan: "image" and, where provided, "label", "keypoints", "mask", "group".

    Raises:
        InputError: when the file is missing, broken or empty, or when a file it lists is missing.
    """
    path = Path(dataset_json)
    content = load_json_object(path)
    section = "registration_val" if split == "val" else split
    provided = _learn2reg_scans(content)
    held_out = _validation_images(content) if split == "training" and exclude_validation else set()
    items: dict[str, Item] = {}  # by image: a scan of several pairs counts once
    for number, entry in enumerate(_section(path, content, section), start=1):
        where = f"entry {number} of '{section}'"
        images = _images_of(entry)
        if not images:
            raise InputError(f"'{path}', {where}: it names no image")
        for image in images:
            if image not in held_out:
                items[image] = _learn2reg_scan(path, where, provided.get(image, {"image": image}))
    if not items:
        raise InputError(f"'{path}': every scan of '{section}' is a validation scan")
    if content.get("pairings") == "paired" or any("keypoints" in item for item in items.values()):
        for item in items.values():
            name = stem(Path(item["image"]))
            item["group"] = name.rpartition("_")[0] or name  # TASK_CASE_MODALITY -> TASK_CASE
    return list(items.values())


def read_learn2reg_pairs(
    dataset_json: PathLike, section: str = "registration_val", *, exclude_validation: bool = True
) -> list[Item]:
    """Pairs of a Learn2Reg data set.

    Args:
        dataset_json: the file.
        section: "registration_val", "training_paired_images", "registration_test" or another list of pairs.
        exclude_validation: leave out of "training_paired_images" the pairs of `registration_val`.

    Returns:
        one dict per pair: "id", "fixed", "moving" and, where provided, "fixed_label", "moving_label",
        "fixed_keypoints", "moving_keypoints", "fixed_mask", "moving_mask".

    Raises:
        InputError: when the file is missing, broken or empty, or when a file it lists is missing.
    """
    path = Path(dataset_json)
    content = load_json_object(path)
    provided = _learn2reg_scans(content)
    leave_out = section == "training_paired_images" and exclude_validation
    held_out = _validation_images(content) if leave_out else set()
    pairs: list[tuple[str, Item]] = []
    for number, entry in enumerate(_section(path, content, section), start=1):
        where = f"entry {number} of '{section}'"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(role), str) for role in _ROLES):
            raise InputError(f"'{path}', {where}: it is not a pair of 'fixed' and 'moving'")
        images = _images_of(entry)
        if held_out.intersection(images):
            continue
        pair: Item = {}
        for role, image in zip(_ROLES, images, strict=True):
            scan = _learn2reg_scan(path, where, provided.get(image, {"image": image}))
            pair[role] = scan.pop("image")
            pair.update({f"{role}_{key}": value for key, value in scan.items()})
        pairs.append((where, pair))
    if not pairs:
        raise InputError(f"'{path}': every pair of '{section}' is a validation pair")
    return with_ids(path, pairs)


def read_pairs(path: PathLike) -> list[Item]:
    """Pairs to register or to evaluate, from a CSV file with a header or a JSON list of objects.

    Columns or keys: fixed, moving and optionally fixed_label, moving_label, fixed_landmarks, moving_landmarks,
    fixed_mask, moving_mask, id. Relative paths are relative to the list's folder. An empty cell is an absent value.

    Returns:
        one dict per pair with the values that are there; "id" always, made of the file names where it is not given.

    Raises:
        InputError: naming the file, the row and the problem.
    """
    rows = read_rows(Path(path))
    return _pairs_of_rows(Path(path), rows, ("label", "landmarks", "mask"))


def read_datalist(path: PathLike) -> list[Item]:
    """Data to train on, whichever of the known layouts it is in.

    Args:
        path: a Decathlon or Learn2Reg folder or its json file; the folder of DIR-Lab's 4DCT cases (`read_dirlab`); that
            of IXI's pickles (`read_ixi`), or its Train, Val or Test; or a CSV or JSON list of scans (image, label,
            keypoints, mask, group, id) or of pairs (fixed, moving, fixed_label, fixed_keypoints, fixed_mask, ..., id).

    Returns:
        one dict per scan ("image", ...) or per pair ("fixed", "moving", ...), for `PairDataset`.

    Raises:
        InputError: naming the file, the row and the problem.
    """
    layout = _folder_layout(Path(path))
    if layout is not None:
        return read_dirlab(path) if layout == "dirlab" else read_ixi(path, _ixi_section(Path(path), "training"))
    path = _list_file(Path(path))
    if path.suffix.lower() == ".json":
        content = load_json(path)
        if isinstance(content, dict):
            return read_learn2reg(path) if _is_learn2reg(content) else read_decathlon(path)
    rows = read_rows(path)
    if any(role in row for _, row in rows for role in _ROLES):
        return _pairs_of_rows(path, rows, ("label", "keypoints", "mask"))
    check_keys(path, rows, required=("image",), optional=(*_ITEM_FILES[1:], "group", "id"))
    return [absolute(path, where, row, files=_ITEM_FILES) for where, row in rows]


def read_dataset(path: PathLike) -> tuple[list[Item], list[Item]]:
    """Data to train on, and what the data set itself sets aside for validation.

    Of a Learn2Reg data set whose "pairings" are "paired" (NLST) these are its official pairs, fixed and moving as they
    are given; of another one (OASIS) the scans, and the official validation pairs.

    Args:
        path: see `read_datalist`.

    Returns:
        scans or pairs to train on, and scans or pairs to validate on: "registration_val" of a Learn2Reg data set,
        "validation" of a Decathlon `dataset.json` that has one, IXI's Val, nothing otherwise.

    Raises:
        InputError: naming the file, the row and the problem.
    """
    if _folder_layout(Path(path)) is not None:
        official = _ixi_section(Path(path), "validation")
        return read_datalist(path), (read_ixi(path, official) if official else [])
    path = _list_file(Path(path))
    content = load_json(path) if path.suffix.lower() == ".json" else None
    if not isinstance(content, dict):
        return read_datalist(path), []
    if not _is_learn2reg(content):
        return read_decathlon(path), (read_decathlon(path, "validation") if content.get("validation") else [])
    if content.get("pairings") == "paired" and content.get("training_paired_images"):
        training = read_learn2reg_pairs(path, "training_paired_images")
    else:
        training = read_learn2reg(path)
    return training, (read_learn2reg_pairs(path) if content.get("registration_val") else [])


@dataclass(frozen=True)
class EvaluationRules:
    """What the challenge of a data set asks of an evaluation.

    Attributes:
        shapes: of every scan and field ("tensorImageShape"), one for each modality without repetition; empty where the
            data set announces none.
        masked: whether SDlogJ is taken inside the fixed scan's mask, where there is one. Learn2Reg's own configs do so
            for its tasks of one patient each (NLST, AbdomenMRCT), not for OASIS and AbdomenCTCT ("unpaired").
        structures: names and labels, left and right, of the structures that are told apart in a table; IXI's.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    masked: bool = True
    structures: tuple[tuple[str, tuple[int, ...]], ...] = ()


def read_evaluation_rules(path: PathLike) -> EvaluationRules:
    """The rules that the description of a Learn2Reg data set holds, and IXI's; the defaults for any other.

    Args:
        path: see `read_datalist`.

    Raises:
        InputError: when the file is missing or broken.
    """
    layout = _folder_layout(Path(path))
    if layout is not None:
        return EvaluationRules(structures=tuple(IXI_STRUCTURES.items()) if layout == "ixi" else ())
    path = _list_file(Path(path))
    content = load_json(path) if path.suffix.lower() == ".json" else None
    if not isinstance(content, dict) or not _is_learn2reg(content):
        return EvaluationRules()
    announced = content.get("tensorImageShape")
    shapes = announced.values() if isinstance(announced, dict) else [announced]
    good = [tuple(s) for s in shapes if isinstance(s, list) and len(s) == 3 and all(isinstance(n, int) for n in s)]
    return EvaluationRules(shapes=tuple(dict.fromkeys(good)), masked=content.get("pairings") != "unpaired")


def split_items(items: Sequence[Item], validation: int | float) -> tuple[list[Item], list[Item]]:
    """Set the last items aside for validation; the same items always give the same split.

    Args:
        items: scans or pairs.
        validation: how many of the last items (int), or which fraction of all (float below 1, rounded).
            A patient ("group") is never on both sides: all scans of a patient among the last items go to validation.

    Returns:
        the training items and the validation items, both in the order of `items`.

    Raises:
        InputError: when nothing would be left to train on.
    """
    count = round(validation * len(items)) if isinstance(validation, float) else validation
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


def read_keypoints(path: PathLike) -> np.ndarray:
    """Key points of a Learn2Reg CSV file, or landmarks of DIR-Lab.

    Args:
        path: three comma-separated numbers a row and no header, voxel coordinates along the array axes, from 0; a file
            that is named as DIR-Lab's are is read by `read_dirlab_landmarks`.

    Returns:
        (N, 3) float64, voxels.

    Raises:
        InputError: when the file is missing or empty, or when a row is not three finite numbers.
    """
    if is_dirlab_landmarks(path):
        return read_dirlab_landmarks(path)
    points = []
    for number, line in enumerate(read_text(Path(path)).splitlines(), start=1):
        if not line.strip():
            continue
        cells = line.split(",")
        if len(cells) != 3:
            raise InputError(f"'{path}', row {number}: key points have 3 comma-separated columns, not {len(cells)}")
        try:
            point = [float(cell) for cell in cells]
        except ValueError:
            raise InputError(f"'{path}', row {number}: '{line.strip()}' is not three numbers") from None
        if not all(math.isfinite(value) for value in point):
            raise InputError(f"'{path}', row {number}: '{line.strip()}' is not three finite numbers")
        points.append(point)
    if not points:
        raise InputError(f"'{path}': there are no key points in it")
    return np.array(points, dtype=np.float64)


# Parts of the layouts


def _folder_layout(path: Path) -> Literal["dirlab", "ixi"] | None:
    """The layout of a folder that has no list of its own."""
    if not path.is_dir() or (path / "dataset.json").is_file() or any(path.glob("*_dataset.json")):
        return None
    if is_ixi(path):
        return "ixi"
    return "dirlab" if is_dirlab(path) else None


def _ixi_section(path: Path, section: str) -> str | None:
    """The section to ask IXI_data for; None where the folder is a section itself."""
    return section if (path / "atlas.pkl").is_file() else None


def _list_file(path: Path) -> Path:
    """The file to read where a folder is given."""
    if path.is_dir():
        plain = path / "dataset.json"
        found = [plain] if plain.is_file() else sorted(path.glob("*_dataset.json"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found)
            what = f"it has several: {names}; name one of them" if found else "it has none"
            raise InputError(f"'{path}': a data folder holds one dataset.json or <TASK>_dataset.json, but {what}")
        return found[0]
    if not path.exists() and path.suffix.lower() not in (".csv", ".json"):
        raise InputError(f"the data folder '{path}' does not exist")
    return path


def _is_learn2reg(content: dict[str, Any]) -> bool:
    return any(key in content for key in _LEARN2REG_KEYS)


def _section(path: Path, content: dict[str, Any], section: str) -> list[Any]:
    entries = content.get(section)
    if not isinstance(entries, list) or not entries:
        lists = ", ".join(key for key, value in content.items() if isinstance(value, list) and value) or "none"
        raise InputError(f"'{path}': it has no list '{section}' or an empty one; its lists: {lists}")
    return entries


def _scan(path: Path, where: str, entry: Any) -> Item:
    """The files of one entry, a path or {"image": path, ...}, as absolute paths."""
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise InputError(f"'{path}', {where}: it is neither a path nor an object with an 'image'")
    files = {key: entry[key] for key in _ITEM_FILES if isinstance(entry.get(key), str)}
    return absolute(path, where, files, files=_ITEM_FILES)


def _scans(path: Path, section: str, entries: list[Any]) -> list[Item]:
    return [_scan(path, f"entry {number} of '{section}'", entry) for number, entry in enumerate(entries, start=1)]


def _pairs_of_rows(path: Path, rows: list[tuple[str, Item]], extras: Sequence[str]) -> list[Item]:
    optional = [f"{role}_{extra}" for extra in extras for role in _ROLES]
    check_keys(path, rows, required=_ROLES, optional=(*optional, "id"))
    pairs = [(where, absolute(path, where, row, files=(*_ROLES, *optional))) for where, row in rows]
    return with_ids(path, pairs)


def _learn2reg_scans(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file says about each image, in whichever of its lists, by the image's path as written there."""
    scans: dict[str, dict[str, Any]] = {}
    for entries in content.values():
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("image"), str):
                scans.setdefault(normpath(entry["image"]), {}).update(entry)
    return scans


def _learn2reg_scan(path: Path, where: str, entry: dict[str, Any]) -> Item:
    """One scan; a file that the json does not name is taken from the folder where the layout puts it."""
    entry = dict(entry)
    image = Path(entry["image"])
    for key, prefix in _LEARN2REG_FOLDERS.items():
        if key not in entry and image.parent.name.startswith("images"):
            usual = image.parent.parent / image.parent.name.replace("images", prefix, 1) / image.name
            usual = usual.with_name(stem(usual) + ".csv") if key == "keypoints" else usual
            if (path.parent / usual).is_file():
                entry[key] = str(usual)
    if isinstance(entry.get("keypoints"), str):  # NLST's json says .nii.gz
        entry["keypoints"] = entry["keypoints"].removesuffix(".nii.gz").removesuffix(".csv") + ".csv"
    return _scan(path, where, entry)


def _images_of(entry: Any) -> list[str]:
    """The images of an entry of a list, which is a path, {"image"} or {"fixed", "moving"}; "./" is dropped."""
    if isinstance(entry, str):
        return [normpath(entry)]
    if not isinstance(entry, dict):
        return []
    keys = ("image",) if "image" in entry else _ROLES
    return [normpath(entry[key]) for key in keys if isinstance(entry.get(key), str)]


def _validation_images(content: dict[str, Any]) -> set[str]:
    return {image for entry in content.get("registration_val") or [] for image in _images_of(entry)}
