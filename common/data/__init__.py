"""Pairs of scans: readers of data set layouts, pairing, generated pairs and the demonstration phantom."""

from common.data.decathlon import read_decathlon
from common.data.dirlab import DIRLAB_CASES, read_dirlab
from common.data.ixi import IXI_STRUCTURES, read_ixi
from common.data.learn2reg import read_learn2reg, read_learn2reg_pairs
from common.data.pairs import PairDataset
from common.data.readers import read_datalist, read_pairs
from common.data.synthetic import SyntheticPairs, SyntheticRecipe, generate_pair
from common.data.training import TrainingPairs, TrainingScans

__all__ = [
    "DIRLAB_CASES",
    "IXI_STRUCTURES",
    "PairDataset",
    "SyntheticPairs",
    "SyntheticRecipe",
    "TrainingPairs",
    "TrainingScans",
    "generate_pair",
    "read_datalist",
    "read_decathlon",
    "read_dirlab",
    "read_ixi",
    "read_learn2reg",
    "read_learn2reg_pairs",
    "read_pairs",
]
