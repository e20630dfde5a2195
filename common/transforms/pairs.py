"""Pairs of scans as dicts: finding the second scan, its key points, and exchanging the two.

Stacking the pair is MONAI's `ConcatItemsd(keys=["moving", "fixed"], name="image")`; flipping or cropping both alike is
any of MONAI's transforms with both keys (which leave key points where they are).
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform, Transform

from common.data.keypoints import read_keypoints
from common.errors import InputError

__all__ = ["LoadKeypointsd", "ResolvePaird", "SwapPaird"]


class ResolvePaird(Transform):
    """Find the two scans of a MONAI Label request (spec/monai_bundle.md, 4.3).

    The request has one "image". The second scan is named by the parameter "moving", or it was uploaded and stands under
    "label". A dict that has "fixed" already keeps it. Relative paths start at the fixed scan's folder. "moving_label"
    is resolved likewise; an empty one, a client's way to say none, is dropped.

    Raises:
        InputError: when there is no fixed or no moving scan, or when a file is missing.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add "fixed" and "moving"."""
        result = dict(data)
        if _absent(result.get("fixed")):
            if _absent(result.get("image")):
                raise InputError("there is no fixed scan: neither 'fixed' nor 'image' is given")
            result["fixed"] = result["image"]
        moving = result.get("label") if _absent(result.get("moving")) else result["moving"]
        if _absent(moving):
            raise InputError(
                "there is no moving scan: give its path as the parameter 'moving', or upload it as 'label'"
            )
        result["moving"] = _beside("moving", moving, result["fixed"])
        if _absent(result.get("moving_label")):
            result.pop("moving_label", None)
        else:
            result["moving_label"] = _beside("moving_label", result["moving_label"], result["fixed"])
        return result


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _beside(key: str, value: Any, fixed: Any) -> Any:
    """The path, a relative one from the fixed scan's folder; what is loaded already passes."""
    if not isinstance(value, str | os.PathLike):
        return value
    path = os.fspath(value)
    if not os.path.isabs(path):
        if not isinstance(fixed, str | os.PathLike):
            raise InputError(f"'{key}' is the relative path '{path}', but the fixed scan is not a file beside it")
        path = os.path.join(os.path.dirname(os.path.abspath(fixed)), path)
    if not os.path.exists(path):
        raise InputError(f"'{key}': there is no file '{path}'")
    return path


class LoadKeypointsd(MapTransform):
    """Read key points (`read_keypoints`: Learn2Reg's CSV files, DIR-Lab's landmarks) as float32 tensors (N, 3), voxels.

    Args:
        keys: paths of the files.
        allow_missing_keys: pass over keys that are not in the dict.

    Raises:
        InputError: when a file is missing or broken, or when the key points of a pair differ in number.
    """

    def __init__(
        self,
        keys: KeysCollection = ("fixed_keypoints", "moving_keypoints"),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the files."""
        result = dict(data)
        counts = {}
        for key in self.key_iterator(result):
            points = read_keypoints(result[key])
            counts[str(result[key])] = len(points)
            result[key] = torch.from_numpy(points).float()
        if len(set(counts.values())) > 1:
            numbers = ", ".join(f"{count} in '{path}'" for path, count in counts.items())
            raise InputError(f"corresponding key points are as many in each scan, but there are {numbers}")
        return result


class SwapPaird(RandomizableTransform):
    """Exchange fixed and moving at random, with all that belongs to them (RWCNet, stage 1).

    Every key that starts with "fixed" or "moving" takes part, whether its partner exists or not.

    Args:
        prob: probability of an exchange.
    """

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__(prob)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Exchange, or not."""
        self.randomize(None)
        if not self._do_transform:
            return dict(data)
        return {_other(key): value for key, value in data.items()}


def _other(key: Hashable) -> Hashable:
    if isinstance(key, str):
        for old, new in (("fixed", "moving"), ("moving", "fixed")):
            if key == old or key.startswith(f"{old}_"):
                return new + key[len(old) :]
    return key
