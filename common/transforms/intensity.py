"""Intensities to the networks' input range: [0, 1], or z-scores in a mask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from common.errors import InputError

__all__ = ["CT_WINDOWS", "Modality", "NormalizeImaged", "ZScoreInMaskd", "normalize_intensity"]

Modality = Literal["auto", "ct", "mr"]

Curve = tuple[tuple[float, float], ...]

CT_WINDOWS: dict[str, Curve] = {
    # Ours: fat, organs and contrast agent get more than half of the range, where "wide" gives them a seventh, and lung
    # and bone are still seen. A network that compares intensities is blind to what hardly differs in them.
    "balanced": ((-1000.0, 0.0), (-200.0, 0.2), (-100.0, 0.3), (200.0, 0.85), (1000.0, 1.0)),
    "wide": ((-1000.0, 0.0), (1000.0, 1.0)),
    "lung": ((-1024.0, 0.0), (0.0, 1.0)),  # SITReg for NLST (github.com/honkamj/SITReg)
    "abdomen": ((-200.0, 0.0), (500.0, 1.0)),  # ICON for Learn2Reg's AbdomenCTCT
    "rwcnet_nlst": ((-4000.0, 0.0), (16000.0, 1.0)),  # RWCNet's paper: -1000..0 HU become 0.15..0.20
}
"""Hounsfield units and what they become, straight lines in between."""

# Air is -1000 HU. The minimum alone does not tell: a resampled EPI (MR, HCP LS2001) undershoots to -819 in 0.003 % of
# its voxels, while a third and more of a chest or abdomen CT lies below -500.
_AIR = -500.0
_AIR_FRACTION = 0.005
# Above this share of one exact value, that value is the background. It changes the percentiles little near the
# threshold, so that two scans on either side of it still look alike.
_BACKGROUND_FRACTION = 0.05


def normalize_intensity(
    image: Tensor | np.ndarray,
    modality: Modality = "auto",
    *,
    window: str | tuple[float, float] = "balanced",
    percentiles: tuple[float, float] = (0.5, 99.5),
) -> tuple[Tensor, str]:
    """Scale a scan to [0, 1].

    Voxels that are not finite first get the lowest finite value.

    Args:
        image: any shape, Hounsfield units for CT, arbitrary units for MR.
        modality: "ct": the window's ends become 0 and 1, along its curve; "mr": two percentiles of the foreground do;
            "auto": "ct" where at least 0.5 % of the finite voxels are at or below -500, else "mr".
        window: for "ct", a name of `CT_WINDOWS` or its two ends in HU.
        percentiles: for "mr", in percent. The foreground is all but the background value, if a value fills at least
            5 % of the scan and is its minimum or what most of its corners hold; else it is the whole scan.

    Returns:
        the float32 image on the same device (a `MetaTensor` stays one), and the modality that was used, "ct" or "mr".
        A constant image becomes 0.

    Raises:
        InputError: when no voxel is finite.
        ValueError: when an option is none of the above.
    """
    if modality not in get_args(Modality):
        raise ValueError(f"modality is one of {', '.join(get_args(Modality))}, not '{modality}'")
    curve = _curve(window)
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise ValueError(f"percentiles are two increasing numbers from 0 to 100, not {percentiles}")
    values = torch.as_tensor(image.as_tensor() if isinstance(image, MetaTensor) else image).float()
    finite = torch.isfinite(values)
    known = int(finite.sum())
    if known == 0:
        raise InputError("the image has no finite voxel")
    if modality == "auto":
        air = int(((values <= _AIR) & finite).sum())
        modality = "ct" if air >= _AIR_FRACTION * known else "mr"
    if known < values.numel():
        values = torch.where(finite, values, values[finite].min())
    if modality == "mr":
        low, high = _foreground_percentiles(values.cpu().numpy(), percentiles)
        curve = ((low, 0.0), (high, 1.0)) if high > low else ()
    scaled = torch.zeros_like(values)
    for (low, start), (high, end) in pairwise(curve):
        scaled += (end - start) * ((values - low) / (high - low)).clamp_(0, 1)
    if isinstance(image, MetaTensor):
        scaled = MetaTensor(scaled, meta=dict(image.meta), applied_operations=image.applied_operations)
    return scaled, modality


def _curve(window: str | tuple[float, float]) -> Curve:
    if isinstance(window, str):
        if window not in CT_WINDOWS:
            raise ValueError(f"a CT window is one of {', '.join(CT_WINDOWS)} or its two ends, not '{window}'")
        return CT_WINDOWS[window]
    low, high = (float(end) for end in window)
    if not low < high:
        raise ValueError(f"a CT window's ends are two increasing numbers, not {tuple(window)}")
    return (low, 0.0), (high, 1.0)


def _foreground_percentiles(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    background = _background(values)
    foreground = values if background is None else values[values != background]
    if foreground.size:
        low, high = np.percentile(foreground, percentiles)
        if high > low:
            return float(low), float(high)
    return float(values.min()), float(values.max())  # two values only, or nearly


def _background(values: np.ndarray) -> float | None:
    corners = values[np.ix_(*[[0, n - 1] for n in values.shape])]
    found, counts = np.unique(corners, return_counts=True)
    candidates = [float(values.min()), float(found[counts.argmax()])]
    fractions = [float((values == candidate).mean()) for candidate in candidates]
    best = int(np.argmax(fractions))
    return candidates[best] if fractions[best] >= _BACKGROUND_FRACTION else None


class ZScoreInMaskd(MapTransform):
    """Subtract the mean and divide by the standard deviation of the voxels inside a mask.

    MONAI's `NormalizeIntensityd` takes its statistics from all or from the non-zero voxels, not from a mask.

    Args:
        keys: images (C, D, H, W); all channels share the statistics.
        mask_key: the mask, (1, D, H, W), inside where above 0.
        allow_missing_keys: pass over keys that are not in the dict.

    Raises:
        InputError: when the mask has another shape or is empty, or the image is constant inside it.
    """

    def __init__(self, keys: KeysCollection, *, mask_key: str, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale the images."""
        result = dict(data)
        inside = torch.as_tensor(result[self.mask_key])[0] > 0
        for key in self.key_iterator(result):
            image = result[key]
            if tuple(image.shape[1:]) != tuple(inside.shape):
                raise InputError(
                    f"the mask '{self.mask_key}' has the shape {tuple(inside.shape)}, '{key}' {tuple(image.shape[1:])}"
                )
            values = image[:, inside].float()
            if values.numel() == 0:
                raise InputError(f"the mask '{self.mask_key}' is empty")
            deviation = values.std(correction=0)
            if float(deviation) == 0.0:
                raise InputError(f"'{key}' is constant inside the mask '{self.mask_key}'")
            result[key] = (image - values.mean()) / deviation
        return result


class NormalizeImaged(MapTransform):
    """Dictionary form of `normalize_intensity`; the modality it used is stored under `KEY_modality`.

    Each image is judged by itself, so "auto" serves a CT and an MR of one pair.

    Args:
        keys: images (C, D, H, W); the channels of one image share their scaling.
        modality: see `normalize_intensity`.
        window: see `normalize_intensity`.
        percentiles: see `normalize_intensity`.
        allow_missing_keys: pass over keys that are not in the dict.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        modality: Modality = "auto",
        window: str | tuple[float, float] = "balanced",
        percentiles: tuple[float, float] = (0.5, 99.5),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        # Wrong options are the configuration's fault: said when it is read, not at the first image.
        normalize_intensity(torch.zeros(1), modality, window=window, percentiles=percentiles)
        self.modality: Modality = modality
        self.window = window
        self.percentiles = percentiles

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale the images."""
        result = dict(data)
        for key in self.key_iterator(result):
            try:
                result[key], used = normalize_intensity(
                    result[key], self.modality, window=self.window, percentiles=self.percentiles
                )
            except InputError as error:
                raise InputError(f"'{key}': {error}") from None
            result[f"{key}_modality"] = used
        return result
