"""MONAI dictionary transforms for pairs of scans: only what MONAI itself lacks."""

from common.transforms.intensity import CT_WINDOWS, NormalizeImaged, ZScoreInMaskd, normalize_intensity
from common.transforms.pairs import LoadKeypointsd, ResolvePaird, SwapPaird
from common.transforms.spatial import ResampleToNetworkGridd, network_grid

__all__ = [
    "CT_WINDOWS",
    "LoadKeypointsd",
    "NormalizeImaged",
    "ResampleToNetworkGridd",
    "ResolvePaird",
    "SwapPaird",
    "ZScoreInMaskd",
    "network_grid",
    "normalize_intensity",
]
