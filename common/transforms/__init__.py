"""MONAI dictionary transforms for pairs of scans: only what MONAI itself lacks."""

from common.transforms.brain import CorrectBiasd, brain_transforms
from common.transforms.crop import CropOrPadPaird
from common.transforms.intensity import CT_WINDOWS, NormalizeImaged, ZScoreInMaskd, normalize_intensity
from common.transforms.pairs import LoadKeypointsd, ResolvePaird, SwapPaird
from common.transforms.spatial import ResampleToNetworkGridd, network_grid

__all__ = [
    "CT_WINDOWS",
    "CorrectBiasd",
    "CropOrPadPaird",
    "LoadKeypointsd",
    "NormalizeImaged",
    "ResampleToNetworkGridd",
    "ResolvePaird",
    "SwapPaird",
    "ZScoreInMaskd",
    "brain_transforms",
    "network_grid",
    "normalize_intensity",
]
