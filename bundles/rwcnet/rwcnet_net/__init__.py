"""RWCNet: the network, and the training of its stages."""

from rwcnet_net.network import RWCNet

__all__ = ["RWCNet"]
