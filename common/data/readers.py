"""Lists of scans and of pairs, read from the usual layouts into plain dicts with absolute paths.

Every problem of a list is an `InputError` that names the file, the row and what is wrong with it, before any image is
read. Rows are counted as an editor counts them: a CSV's header is row 1, the first entry of a JSON list is entry 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.data._rows import (
    SCAN_FILES,
    Item,
    PathLike,
    absolute,
    check_keys,
    load_json,
    read_rows,
    with_ids,
)
from common.data.decathlon import read_decathlon
from common.data.dirlab import is_dirlab, read_dirlab
from common.data.ixi import IXI_STRUCTURES, is_ixi, read_ixi
from common.data.learn2reg import is_learn2reg, read_learn2reg, read_learn2reg_pairs
from common.errors import InputError

__all__ = [
    "EvaluationRules",
    "read_datalist",
    "read_dataset",
    "read_evaluation_rules",
    "read_pairs",
]

_ROLES = ("fixed", "moving")


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
            return read_learn2reg(path) if is_learn2reg(content) else read_decathlon(path)
    rows = read_rows(path)
    if any(role in row for _, row in rows for role in _ROLES):
        return _pairs_of_rows(path, rows, ("label", "keypoints", "mask"))
    check_keys(path, rows, required=("image",), optional=(*SCAN_FILES[1:], "group", "id"))
    return [absolute(path, where, row, files=SCAN_FILES) for where, row in rows]


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
    if not is_learn2reg(content):
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
    if not isinstance(content, dict) or not is_learn2reg(content):
        return EvaluationRules()
    announced = content.get("tensorImageShape")
    shapes = announced.values() if isinstance(announced, dict) else [announced]
    good = [tuple(s) for s in shapes if isinstance(s, list) and len(s) == 3 and all(isinstance(n, int) for n in s)]
    return EvaluationRules(shapes=tuple(dict.fromkeys(good)), masked=content.get("pairings") != "unpaired")


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


def _pairs_of_rows(path: Path, rows: list[tuple[str, Item]], extras: Sequence[str]) -> list[Item]:
    optional = [f"{role}_{extra}" for extra in extras for role in _ROLES]
    check_keys(path, rows, required=_ROLES, optional=(*optional, "id"))
    pairs = [(where, absolute(path, where, row, files=(*_ROLES, *optional))) for where, row in rows]
    return with_ids(path, pairs)
