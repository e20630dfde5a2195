"""AD-RegNet's network."""

from adregnet_net.network import ADRegNet

__all__ = ["ADRegNet"]
