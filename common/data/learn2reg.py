"""The layout of Learn2Reg's data sets, 2022 and later."""

from __future__ import annotations

from os.path import normpath
from pathlib import Path
from typing import Any

from common.data._rows import Item, PathLike, entries_of, load_json_object, scan_of, stem, with_ids
from common.errors import InputError

__all__ = ["is_learn2reg", "read_learn2reg", "read_learn2reg_pairs"]

_ROLES = ("fixed", "moving")
_KEYS = ("registration_val", "training_paired_images", "pairings", "tensorImageShape")
# Where a file that belongs to imagesTr/NAME.nii.gz lies (Learn2Reg, 2022 and later).
_FOLDERS = {"label": "labels", "keypoints": "keypoints", "mask": "masks"}


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
    provided = _scans(content)
    held_out = _validation_images(content) if split == "training" and exclude_validation else set()
    items: dict[str, Item] = {}  # by image: a scan of several pairs counts once
    for number, entry in enumerate(entries_of(path, content, section), start=1):
        where = f"entry {number} of '{section}'"
        images = _images_of(entry)
        if not images:
            raise InputError(f"'{path}', {where}: it names no image")
        for image in images:
            if image not in held_out:
                items[image] = _scan(path, where, provided.get(image, {"image": image}))
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
    provided = _scans(content)
    leave_out = section == "training_paired_images" and exclude_validation
    held_out = _validation_images(content) if leave_out else set()
    pairs: list[tuple[str, Item]] = []
    for number, entry in enumerate(entries_of(path, content, section), start=1):
        where = f"entry {number} of '{section}'"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(role), str) for role in _ROLES):
            raise InputError(f"'{path}', {where}: it is not a pair of 'fixed' and 'moving'")
        images = _images_of(entry)
        if held_out.intersection(images):
            continue
        pair: Item = {}
        for role, image in zip(_ROLES, images, strict=True):
            scan = _scan(path, where, provided.get(image, {"image": image}))
            pair[role] = scan.pop("image")
            pair.update({f"{role}_{key}": value for key, value in scan.items()})
        pairs.append((where, pair))
    if not pairs:
        raise InputError(f"'{path}': every pair of '{section}' is a validation pair")
    return with_ids(path, pairs)


def is_learn2reg(content: dict[str, Any]) -> bool:
    """Whether a dataset.json is one of Learn2Reg rather than of the Decathlon."""
    return any(key in content for key in _KEYS)


def _scans(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file says about each image, in whichever of its lists, by the image's path as written there."""
    scans: dict[str, dict[str, Any]] = {}
    for entries in content.values():
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("image"), str):
                scans.setdefault(normpath(entry["image"]), {}).update(entry)
    return scans


def _scan(path: Path, where: str, entry: dict[str, Any]) -> Item:
    """One scan; a file that the json does not name is taken from the folder where the layout puts it."""
    entry = dict(entry)
    image = Path(entry["image"])
    for key, prefix in _FOLDERS.items():
        if key not in entry and image.parent.name.startswith("images"):
            usual = image.parent.parent / image.parent.name.replace("images", prefix, 1) / image.name
            usual = usual.with_name(stem(usual) + ".csv") if key == "keypoints" else usual
            if (path.parent / usual).is_file():
                entry[key] = str(usual)
    if isinstance(entry.get("keypoints"), str):  # NLST's json says .nii.gz
        entry["keypoints"] = entry["keypoints"].removesuffix(".nii.gz").removesuffix(".csv") + ".csv"
    return scan_of(path, where, entry)


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
