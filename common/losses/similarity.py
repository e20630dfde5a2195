"""Image dissimilarities for training: local NCC, MSE, SSIM and MIND-SSC.

Images are (B, C, D, H, W) with intensities in [0, 1]; an optional mask (B, 1, D, H, W) restricts the mean. All losses
compute in float32, also under autocast, and get smaller as the images agree better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses._checks import box_mean, centre_crop, check_images, masked_mean
from common.precision import float32_region

__all__ = [
    "LocalNCC",
    "MINDSSCLoss",
    "MSELoss",
    "SSIMLoss",
    "WeightedSimilarity",
    "local_moments",
    "mind_ssc",
    "ssim_map",
]

# MIND-SSC: the six neighbours and the order of the channels are those of the published implementations
# (ConvexAdam, RWCNet), so that descriptors can be compared with theirs channel by channel.
_NEIGHBOURS = ((-1, 0, 0), (0, 0, -1), (0, -1, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0))
_PAIRS = [
    (i, j)
    for i in range(6)
    for j in range(i)
    if sum((a - b) ** 2 for a, b in zip(_NEIGHBOURS[i], _NEIGHBOURS[j], strict=True)) == 2
]
_CHANNEL_ORDER = (6, 8, 1, 11, 2, 10, 0, 7, 9, 4, 5, 3)


def _check_window(window: int) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"a window needs an odd number of voxels, got {window}")


def local_moments(a: Tensor, b: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Windowed means, variances and covariance of two images, over windows wholly inside the volume.

    E[x^2] - E[x]^2 cancels when the mean is large against the contrast, so each channel is first shifted by its mean,
    which changes no variance.

    Args:
        a, b: (B, C, D, H, W) float32.
        window: odd edge length in voxels.

    Returns:
        mean of a, mean of b, variance of a, variance of b, covariance, each (B, C, D-w+1, H-w+1, W-w+1).
    """
    shift_a = a.detach().mean(dim=(2, 3, 4), keepdim=True)
    shift_b = b.detach().mean(dim=(2, 3, 4), keepdim=True)
    x, y = a - shift_a, b - shift_b
    means = box_mean(torch.cat([x, y, x * x, y * y, x * y], dim=1), window)
    mx, my, mxx, myy, mxy = means.chunk(5, dim=1)
    # rounding can leave a flat window with a tiny negative variance
    var_a = (mxx - mx * mx).clamp_min(0.0)
    var_b = (myy - my * my).clamp_min(0.0)
    return mx + shift_a, my + shift_b, var_a, var_b, mxy - mx * my


class LocalNCC(nn.Module):
    """Local normalised cross-correlation, as VoxelMorph and ReCorr publish it.

    Per window of w^3 voxels, with sums over the window: `ncc^2 = cross^2 / (var_a * var_b + eps)`; the loss is
    `-mean(ncc^2)`, in [-1, 0], -1 for images that are linear functions of each other. Squared, so contrast-inverted
    structures match as well; `squared=False` gives `-mean(ncc)` in [-1, 1].

    Unlike the published code only windows wholly inside the volume count: zero padding adds an edge that both images
    share and biases the borders (a quarter and more of the windows in a training patch). Flat windows count 0.
    """

    def __init__(self, window: int = 9, *, squared: bool = True, eps: float = 1e-5) -> None:
        """
        Args:
            window: odd edge length of the window in voxels.
            squared: the published square, or the signed correlation.
            eps: added to the product of the two sums of squares (intensity^4); decides what counts as flat.
        """
        super().__init__()
        _check_window(window)
        if eps <= 0:
            raise ValueError(f"eps must be positive, flat windows divide by it; got {eps}")
        self.window = window
        self.squared = squared
        self.eps = eps

    def forward(self, fixed: Tensor, warped: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            fixed: (B, C, D, H, W).
            warped: (B, C, D, H, W).
            mask: (B, 1, D, H, W); the mean is taken over windows centred in it.

        Returns:
            scalar in [-1, 0], or [-1, 1] when not squared.

        Raises:
            ValueError: when the shapes do not fit, or the window does not fit into the volume.
        """
        check_images(fixed, warped, mask, window=self.window)
        with float32_region(fixed):
            voxels = self.window**3
            _, _, var_a, var_b, cov = local_moments(fixed.float(), warped.float(), self.window)
            # eps is meant for sums, and the published value is kept
            product = (var_a * voxels) * (var_b * voxels) + self.eps
            cross = cov * voxels
            ncc = cross * cross / product if self.squared else cross / product.sqrt()
            return -masked_mean(ncc, None if mask is None else centre_crop(mask, self.window))


class MSELoss(nn.Module):
    """Mean squared intensity difference, in [0, inf); [0, 1] for images in [0, 1]."""

    def forward(self, fixed: Tensor, warped: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            fixed: (B, C, D, H, W).
            warped: (B, C, D, H, W).
            mask: (B, 1, D, H, W), the mean is taken inside.

        Returns:
            scalar, intensity squared.

        Raises:
            ValueError: when the shapes do not fit.
        """
        check_images(fixed, warped, mask)
        with float32_region(fixed):
            return masked_mean((fixed.float() - warped.float()) ** 2, mask)


def ssim_map(a: Tensor, b: Tensor, *, window: int = 7, data_range: float = 1.0) -> Tensor:
    """Structural similarity per window (Wang et al. 2004), uniform 3-D windows, k1 = 0.01, k2 = 0.03.

    Equal to MONAI's `SSIMMetric(spatial_dims=3, kernel_type="uniform")`, which computes a dense window^3 convolution
    in the caller's precision; this one is separable and stays accurate for a large mean.

    Args:
        a, b: (B, C, D, H, W) float32.
        window: odd edge length in voxels.
        data_range: intensity range of the images.

    Returns:
        (B, C, D-w+1, H-w+1, W-w+1), in [-1, 1].
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b, var_a, var_b, cov = local_moments(a, b, window)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * (2 * cov + c2) / (var_a + var_b + c2)


class SSIMLoss(nn.Module):
    """`1 - mean(SSIM)`, in [0, 2], 0 for identical images; see `ssim_map`."""

    def __init__(self, window: int = 7, *, data_range: float = 1.0) -> None:
        """
        Args:
            window: odd edge length of the window in voxels.
            data_range: intensity range of the images.
        """
        super().__init__()
        _check_window(window)
        self.window = window
        self.data_range = data_range

    def forward(self, fixed: Tensor, warped: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            fixed: (B, C, D, H, W).
            warped: (B, C, D, H, W).
            mask: (B, 1, D, H, W); the mean is taken over windows centred in it.

        Returns:
            scalar in [0, 2].

        Raises:
            ValueError: when the shapes do not fit, or the window does not fit into the volume.
        """
        check_images(fixed, warped, mask, window=self.window)
        with float32_region(fixed):
            ssim = ssim_map(fixed.float(), warped.float(), window=self.window, data_range=self.data_range)
            return 1.0 - masked_mean(ssim, mask if mask is None else centre_crop(mask, self.window))


def mind_ssc(image: Tensor, radius: int = 1, dilation: int = 2) -> Tensor:
    """MIND-SSC descriptor (Heinrich et al., MICCAI 2013): self-similarity between neighbouring patches.

    For each pair of the six neighbours at `dilation` voxels that are not opposite (12 pairs), the patch distance d of
    the two; the descriptor is `exp(-(d - min d) / v)`, v the mean of `d - min d` over the channels, clamped to
    [0.001, 1000] times its mean over the sample. Invariant to `a * image + b`, a != 0, while contrasts are well above
    1e-4 (1e-8 keeps a constant image finite: all ones).

    The clamp uses each sample's own mean (published code: the batch's), so a result does not depend on its neighbours
    in the batch.

    Args:
        image: (B, 1, D, H, W).
        radius: patches are (2 * radius + 1)^3 voxels; 1 in ConvexAdam and RWCNet.
        dilation: distance of the neighbours in voxels.

    Returns:
        (B, 12, D, H, W) float32 in (0, 1], at least one channel 1 at each voxel; borders replicated.

    Raises:
        ValueError: when the image is not (B, 1, D, H, W), or radius < 0 or dilation < 1.
    """
    if image.ndim != 5 or image.shape[1] != 1:
        raise ValueError(f"MIND-SSC needs an image (B, 1, D, H, W), got {tuple(image.shape)}")
    if radius < 0 or dilation < 1:
        raise ValueError(f"MIND-SSC needs radius >= 0 and dilation >= 1, got {radius} and {dilation}")
    with float32_region(image):
        padded = F.pad(image.float(), (dilation,) * 6, mode="replicate")
        shape = image.shape[2:]
        shifted = [
            padded[
                (
                    slice(None),
                    slice(None),
                    *(slice(dilation * (1 + o), dilation * (1 + o) + n) for o, n in zip(offset, shape, strict=True)),
                )
            ]
            for offset in _NEIGHBOURS
        ]
        squared = torch.cat([(shifted[i] - shifted[j]) ** 2 for i, j in (_PAIRS[k] for k in _CHANNEL_ORDER)], dim=1)
        distance = box_mean(F.pad(squared, (radius,) * 6, mode="replicate"), 2 * radius + 1)
        excess = distance - distance.amin(dim=1, keepdim=True)
        variance = excess.mean(dim=1, keepdim=True)
        typical = variance.detach().mean(dim=(2, 3, 4), keepdim=True)
        variance = torch.minimum(torch.maximum(variance, 0.001 * typical), 1000.0 * typical)
        return torch.exp(-excess / (variance + 1e-8))


class MINDSSCLoss(nn.Module):
    """Mean squared difference of MIND-SSC descriptors over 12 channels and voxels, in [0, 1), 0 for identical images.

    For images of different modalities. ConvexAdam's instance optimisation uses 12 times this value. Keeps about 115
    image-sized float32 volumes for the gradient (`LocalNCC`: 23).
    """

    def __init__(self, radius: int = 1, dilation: int = 2) -> None:
        """
        Args:
            radius: patches are (2 * radius + 1)^3 voxels.
            dilation: distance of the neighbours in voxels.
        """
        super().__init__()
        self.radius = radius
        self.dilation = dilation

    def forward(self, fixed: Tensor, warped: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            fixed: (B, 1, D, H, W).
            warped: (B, 1, D, H, W).
            mask: (B, 1, D, H, W), the mean is taken inside.

        Returns:
            scalar in [0, 1).

        Raises:
            ValueError: when the shapes do not fit.
        """
        check_images(fixed, warped, mask)
        with float32_region(fixed):
            difference = mind_ssc(fixed, self.radius, self.dilation) - mind_ssc(warped, self.radius, self.dilation)
            return masked_mean(difference**2, mask)


class WeightedSimilarity(nn.Module):
    """Weighted sum of similarity losses.

    Args:
        losses: each called as loss(fixed, warped).
        weights: one for each.

    Raises:
        ValueError: when there are not as many weights as losses.
    """

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if not losses or len(losses) != len(weights):
            raise ValueError(f"each loss has a weight, got {len(losses)} losses and {len(weights)} weights")
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights)

    def forward(self, fixed: Tensor, warped: Tensor) -> Tensor:
        """(B, C, D, H, W) twice -> scalar."""
        terms = [weight * loss(fixed, warped) for loss, weight in zip(self.losses, self.weights, strict=True)]
        return torch.stack(terms).sum()
