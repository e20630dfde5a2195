"""AD-RegNet's two attentions: between the images (section III-B2) and between regions (section III-B3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers.attention import positional_attention

__all__ = ["BidirectionalCrossAttention", "Correspondence", "RegionalAdaptiveAttention"]


@dataclass(frozen=True, kw_only=True)
class Correspondence:
    """What the two images found in each other.

    Attributes:
        features: (B, C, D, H, W), A of equation 12.
        displacement: (B, 3 * heads, D, H, W), the mean of both directions' displacements, pull-back, in voxels.
        moving_to_fixed, fixed_to_moving: (B, C, D, H, W), equations 10 and 11.
    """

    features: Tensor
    displacement: Tensor
    moving_to_fixed: Tensor
    fixed_to_moving: Tensor


class BidirectionalCrossAttention(nn.Module):
    """BCAM: the moving image asks the fixed one and the fixed one the moving one, equations 8 to 12.

    Ours, as attention returns appearance and a registration needs a place: the place that each voxel looked at comes
    back too, near places are preferred by a learned degree, and each key projection starts as the query projection
    that it answers to, so that an untrained network already compares like with like.

    Args:
        channels: of the features.
        window: see `positional_attention`; None where all voxels may see each other.
        head_channels: of each head.
    """

    def __init__(self, *, channels: int, window: int | None, head_channels: int = 16) -> None:
        super().__init__()
        self.heads = max(channels // head_channels, 1)
        self.window = window
        names = [f"{role}_{image}" for image in ("moving", "fixed") for role in ("query", "key", "value")]
        self.projections = nn.ModuleDict({name: nn.Conv3d(channels, channels, 1, bias=False) for name in names})
        # One head looks a voxel around, the next two, up to 8; the softplus of this is the locality.
        reach = torch.logspace(0, 3, self.heads, base=2)
        self.locality = nn.Parameter(torch.log(torch.expm1(0.5 / reach.square())))
        self.balance = nn.Parameter(torch.zeros(()))
        with torch.no_grad():
            for asking, answering in (("moving", "fixed"), ("fixed", "moving")):
                self.projections[f"key_{answering}"].weight.copy_(self.projections[f"query_{asking}"].weight)

    def forward(self, moving: Tensor, fixed: Tensor) -> Correspondence:
        """Two maps (B, C, D, H, W) -> what they found in each other."""
        moving_to_fixed, forward = self._ask("moving", moving, "fixed", fixed)
        fixed_to_moving, backward = self._ask("fixed", fixed, "moving", moving)
        share = torch.sigmoid(self.balance)  # alpha of equation 12, of the primary direction
        return Correspondence(
            features=share * moving_to_fixed + (1 - share) * fixed_to_moving,
            # The moving image's voxel sees where the fixed one's is: the other way round, hence the sign.
            displacement=(1 - share) * backward - share * forward,
            moving_to_fixed=moving_to_fixed,
            fixed_to_moving=fixed_to_moving,
        )

    def _ask(self, asking: str, features: Tensor, answering: str, others: Tensor) -> tuple[Tensor, Tensor]:
        return positional_attention(
            self.projections[f"query_{asking}"](features),
            self.projections[f"key_{answering}"](others),
            self.projections[f"value_{answering}"](others),
            heads=self.heads,
            locality=F.softplus(self.locality),
            window=self.window,
        )


class RegionalAdaptiveAttention(nn.Module):
    """RAA: regions of the feature map weigh and inform each other, section III-B3.

    The paper has the pooled descriptors, the self-attention and the softmax over regions. How the map is put together
    again is ours: F' = F * N softmax(score) + context, with N regions, so that the mean gain is 1.

    Args:
        channels: of the features.
        region: side of a region, in voxels; regions at the far end may be cut.
    """

    def __init__(self, *, channels: int, region: int) -> None:
        super().__init__()
        self.region = region
        self.query, self.key, self.value = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.score = nn.Linear(channels, 1)
        nn.init.zeros_(self.value.weight)  # starts as the identity
        nn.init.zeros_(self.score.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, D, H, W) -> the same, regions weighed."""
        gain, context = self.weigh(features)
        size = features.shape[2:]
        return features * self._spread(gain, size) + self._spread(context, size)

    def weigh(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, D, H, W) -> gain (B, 1, d, h, w) with mean 1, and context (B, C, d, h, w), of each region."""
        sides = [min(self.region, size) for size in features.shape[2:]]  # a map may be smaller than a region
        pooled = F.avg_pool3d(features, sides, ceil_mode=True, count_include_pad=False)  # (B, C, d, h, w)
        tokens = pooled.flatten(2).transpose(1, 2)  # (B, N, C)
        context = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        score = self.score(tokens + context).float()
        gain = torch.exp(torch.log_softmax(score, dim=1) + math.log(score.shape[1]))  # (B, N, 1)
        size = pooled.shape[2:]
        return (
            gain.to(features.dtype).transpose(1, 2).unflatten(2, size),
            context.transpose(1, 2).unflatten(2, size),
        )

    def _spread(self, regions: Tensor, size: torch.Size) -> Tensor:
        spread = F.interpolate(regions, scale_factor=self.region, mode="nearest") if self.region > 1 else regions
        return spread[:, :, : size[0], : size[1], : size[2]]
