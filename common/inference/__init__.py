"""From two scans to an aligned one: affine stage, network grid, network, instance optimisation, results."""

from common.inference.affine import align_affine
from common.inference.inferer import PaddedInferer, SequenceInferer, choose_network_grid
from common.inference.instance import optimize_instance
from common.inference.output import write_registration
from common.inference.pair import ImagePair, Registration, load_pair
from common.inference.run import RegistrationRun, RequestedPairs, prepare_pair_batch
from common.inference.steps import (
    AlignPaird,
    FinishRegistrationd,
    LoadPaird,
    OptimizeInstanced,
    SampleNetworkGridd,
    WriteRegistrationd,
)
from common.inference.uncertainty import TakeUncertaintyd, mirrored_spread
from common.inference.weights import file_sha256, load_weights

__all__ = [
    "AlignPaird",
    "FinishRegistrationd",
    "ImagePair",
    "LoadPaird",
    "OptimizeInstanced",
    "PaddedInferer",
    "Registration",
    "RegistrationRun",
    "RequestedPairs",
    "SampleNetworkGridd",
    "SequenceInferer",
    "TakeUncertaintyd",
    "WriteRegistrationd",
    "align_affine",
    "choose_network_grid",
    "file_sha256",
    "load_pair",
    "load_weights",
    "mirrored_spread",
    "optimize_instance",
    "prepare_pair_batch",
    "write_registration",
]
