"""Weights in and their fingerprint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from common.errors import InputError

__all__ = ["file_sha256", "load_weights"]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(network: nn.Module, path: str | os.PathLike[str]) -> str:
    """Load a plain state dict, or one under the key `model`, into a network.

    Args:
        network: receives the weights, all of them.
        path: a file written by `torch.save`; only tensors are read from it, never code.

    Returns:
        the file's sha256.

    Raises:
        InputError: when the file is missing, unreadable or holds the weights of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"the weights {path} do not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything, IndexError for instance
        raise InputError(f"the weights {path} cannot be read: not a PyTorch state dict") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict):
        raise InputError(f"the weights {path} cannot be read: not a PyTorch state dict")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights {path} belong to another network than {type(network).__name__}") from error
    return file_sha256(path)
