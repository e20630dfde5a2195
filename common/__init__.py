"""Parts shared by all bundles: geometry, layers, losses, metrics, transforms, data, inference, training and I/O.

Nothing here knows of any bundle.
"""

__version__ = "0.1.0"
