"""What the frozen stages say about each training pair, kept on disk."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import OutputError
from common.io import atomic_path, check_output_dir
from rwcnet_net.network import RWCNet, StageState

__all__ = ["PriorCache"]

_GIB = 2**30


class PriorCache:
    """Prior fields and hidden states, a file for each pair; computed at first use.

    An entry counts only for the image, the weights and the steps that it was made with, and only if it is whole; any
    other is made again and replaced.

    Args:
        folder: made when missing.
        network: whose frozen stages make the entries.
        dataset: the training pairs, for their number and size.
    """

    def __init__(self, folder: str | os.PathLike[str], *, network: RWCNet, dataset: Dataset[Any]) -> None:
        self.folder = Path(folder)
        self.network = network
        self.dataset = dataset
        self._stage = 0
        self._fingerprint = b""

    def attach(self, engine: Any) -> None:
        """Attach to a trainer, after the handler that chooses the stage."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self._begin_epoch())

    def _begin_epoch(self) -> None:
        if self._stage != self.network.stage_in_training:
            self.begin(self.network.stage_in_training or 0)

    def begin(self, stage: int) -> None:
        """Prepare for a stage: say how much disk it will take, and make sure that it is there.

        Raises:
            OutputError: when it is not.
        """
        self._stage = stage
        self._fingerprint = self._fingerprint_of(stage)
        if stage == 0:
            return
        pairs = len(self.dataset)  # type: ignore[arg-type]
        missing = sum(not self._path(stage, index).is_file() for index in range(pairs))
        needed = missing * self._entry_bytes(stage)
        check_output_dir(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        print(
            f"prior fields and hidden states for stage {stage + 1}: {missing} of {pairs} pairs to be written to "
            f"{self.folder}, {needed / _GIB:.2f} GiB; {free / _GIB:.2f} GiB are free",
            flush=True,
        )
        if needed > free:
            raise OutputError(
                f"{self.folder} is too small for the cache of stage {stage + 1}: {missing} pairs need "
                f"{needed / _GIB:.2f} GiB and {free / _GIB:.2f} GiB are free; train without --cache_dir"
            )

    def get(self, index: int, image: Tensor, compute: Callable[[], StageState]) -> StageState:
        """State before the present stage of the pair `index`, whose image is (1, 2, D, H, W)."""
        path = self._path(self._stage, index)
        key = hashlib.sha256(self._fingerprint + image.detach().cpu().contiguous().numpy().tobytes()).digest()
        stored = _read(path, key)
        if stored is not None:
            ddf, hidden = (torch.from_numpy(array).to(image.device) for array in stored)
            return StageState(ddf=ddf, hidden=hidden)
        state = compute()
        with atomic_path(path) as temporary:
            _write(temporary, key, state)
        return state

    def _path(self, stage: int, index: int) -> Path:
        return self.folder / f"stage_{stage + 1}_pair_{index:05d}.bin"

    def _entry_bytes(self, stage: int) -> int:
        scale = self.network.scales[stage - 1]
        voxels = int(np.prod([n // scale for n in self.dataset[0]["image"].shape[-3:]]))
        return 4 * voxels * (3 + self.network.stages[stage - 1].hidden_channels) + 4096

    def _fingerprint_of(self, stage: int) -> bytes:
        network = self.network
        options = (network.variant, network.scales, network.steps[:stage], network.patches[:stage], network.overlap)
        digest = hashlib.sha256(repr((*options, network.diffeomorphic)).encode())
        for subnetwork in network.stages[:stage]:
            for value in subnetwork.state_dict().values():
                digest.update(value.detach().cpu().numpy().tobytes())
        return digest.digest()


def _write(path: Path, key: bytes, state: StageState) -> None:
    """Key, digest of the rest, and the rest: two arrays in NumPy's format."""
    content = io.BytesIO()
    for tensor in (state.ddf, state.hidden):
        np.save(content, tensor.float().cpu().numpy(), allow_pickle=False)
    with path.open("wb") as file:
        file.write(key)
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())


def _read(path: Path, key: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """The two arrays, or None where there is no such entry or a single bit of it is wrong."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content = memoryview(stored)[2 * len(key) :]
    if stored[: 2 * len(key)] != key + hashlib.sha256(content).digest():
        return None
    file = io.BytesIO(content)
    return np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
