"""Training losses: image similarity, smoothness, label overlap, landmarks and sequences of fields."""

from common.losses.landmarks import LandmarkLoss
from common.losses.matching import MatchingLoss
from common.losses.overlap import SoftDiceLoss
from common.losses.sequence import EndpointErrorLoss, SequenceLoss
from common.losses.similarity import LocalNCC, MINDSSCLoss, MSELoss, SSIMLoss, WeightedSimilarity, mind_ssc
from common.losses.smoothness import BendingEnergyLoss, GradientLoss, NegativeJacobianLoss

__all__ = [
    "BendingEnergyLoss",
    "EndpointErrorLoss",
    "GradientLoss",
    "LandmarkLoss",
    "LocalNCC",
    "MINDSSCLoss",
    "MSELoss",
    "MatchingLoss",
    "NegativeJacobianLoss",
    "SSIMLoss",
    "SequenceLoss",
    "SoftDiceLoss",
    "WeightedSimilarity",
    "mind_ssc",
]
