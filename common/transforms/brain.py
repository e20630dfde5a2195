"""Raw brain scans to what a network takes: bias field, brain mask, z-scores."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged, MapTransform, MaskIntensityd

from common.errors import InputError
from common.transforms.intensity import ZScoreInMaskd

__all__ = ["CorrectBiasd", "brain_transforms"]


class CorrectBiasd(MapTransform):
    """N4 bias field correction (Tustison et al., IEEE TMI 2010), which MONAI lacks; SimpleITK's.

    The field is estimated on a shrunken copy and applied to the whole image.

    Args:
        keys: images (1, D, H, W), MetaTensors.
        mask_keys: for each image the key of the mask, (1, D, H, W), that the field is estimated in: all that is above
            0; None for all positive voxels.
        shrink: by which factor each axis is shrunken for the estimate.
        iterations: at most, on each level.
        allow_missing_keys: pass over keys that are not in the dict.

    Raises:
        InputError: when the mask has another shape or is empty.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        mask_keys: Sequence[str] | None = None,
        shrink: int = 4,
        iterations: Sequence[int] = (50, 50, 50, 50),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if mask_keys is not None and len(mask_keys) != len(self.keys):
            raise ValueError(f"{len(self.keys)} images need as many masks, not {len(mask_keys)}")
        self.mask_keys: Sequence[str | None] = [None] * len(self.keys) if mask_keys is None else list(mask_keys)
        self.shrink = shrink
        self.iterations = list(iterations)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Correct the images."""
        result = dict(data)
        for key, mask_key in self.key_iterator(result, self.mask_keys):
            image = result[key]
            values = torch.as_tensor(image).cpu().double().numpy()[0]
            inside = values > 0 if mask_key is None else torch.as_tensor(result[mask_key]).cpu().numpy()[0] > 0
            if inside.shape != values.shape:
                raise InputError(f"the mask '{mask_key}' has the shape {inside.shape}, '{key}' {values.shape}")
            if not inside.any():
                raise InputError(f"the mask '{mask_key}' is empty" if mask_key else f"'{key}' has no positive voxel")
            spacing = [1.0] * 3
            if isinstance(image, MetaTensor):
                spacing = np.linalg.norm(image.affine.cpu().numpy()[:3, :3], axis=0).tolist()
            field = self._bias(values, inside, spacing)
            result[key] = image / torch.from_numpy(field).to(image)[None]
        return result

    def _bias(self, values: np.ndarray, inside: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """(D, H, W) multiplicative field, positive."""
        volumes = []
        for array in (values.astype(np.float32), inside.astype(np.uint8)):
            volume = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
            volume.SetSpacing(list(spacing))
            volumes.append(volume)
        factors = [max(1, min(self.shrink, n // 8)) for n in values.shape]
        small = [sitk.Shrink(volume, factors) for volume in volumes]
        n4 = sitk.N4BiasFieldCorrectionImageFilter()
        n4.SetMaximumNumberOfIterations([int(n) for n in self.iterations])
        n4.Execute(small[0], small[1])
        log_field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(volumes[0]))
        return np.exp(log_field).transpose(2, 1, 0)


def brain_transforms(roles: Sequence[str] = ("fixed", "moving"), *, bias_correction: bool = True) -> Compose:
    """Load raw T1 scans and their brain masks, correct the bias field, take the brain out, and make z-scores of it.

    The mask is a file that another program made: HD-BET's `_mask` or SynthStrip's `--mask`, on the grid of the scan.
    Outside the brain the result is 0, which is the brain's mean. For IXI's raw NIfTI scans with a list of pairs
    (`read_pairs`) that has "fixed_mask" and "moving_mask"; put it in the place of `LoadImaged` and `NormalizeImaged`.

    Args:
        roles: keys of the scans; the mask of each is ROLE_mask.
        bias_correction: run N4, a minute a scan.
    """
    masks = [f"{role}_mask" for role in roles]
    steps: list[Any] = [LoadImaged([*roles, *masks], ensure_channel_first=True)]
    if bias_correction:
        steps.append(CorrectBiasd(roles, mask_keys=masks))
    for role, mask in zip(roles, masks, strict=True):
        steps += [ZScoreInMaskd([role], mask_key=mask), MaskIntensityd([role], mask_key=mask)]
    return Compose(steps)
