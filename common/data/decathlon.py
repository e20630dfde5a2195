"""The layout of the Medical Segmentation Decathlon."""

from __future__ import annotations

from pathlib import Path

from common.data._rows import Item, PathLike, entries_of, load_json_object, scan_of

__all__ = ["read_decathlon"]


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
    entries = entries_of(path, load_json_object(path), section)
    return [scan_of(path, f"entry {number} of '{section}'", entry) for number, entry in enumerate(entries, start=1)]
