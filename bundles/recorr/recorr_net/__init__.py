"""The network of the ReCorr bundle."""

from recorr_net.network import ReCorr

__all__ = ["ReCorr"]
