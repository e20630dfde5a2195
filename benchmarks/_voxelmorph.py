"""MONAI's VoxelMorph as one more network for the bundles' configs: `python -m benchmarks._voxelmorph` trains it.

It takes train.json and general.json of ReCorr with nothing but the network exchanged, so that data, loss and schedule
are the same; every option goes to that command. ReCorr's general weights have seen 4,600 pairs, 46 epochs of 100:

    python -m benchmarks._voxelmorph --output_dir runs/voxelmorph --max_epochs 46
    python -m benchmarks.accuracy --voxelmorph runs/voxelmorph/model.pt
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.networks.blocks.warp import DVF2DDF
from monai.networks.nets import VoxelMorphUNet
from torch import Tensor, nn

CONFIGS = "bundles/recorr/configs"
NETWORK: dict[str, Any] = {"network_def": {"_target_": "benchmarks._voxelmorph.VoxelMorphNetwork"}}
INFERENCE: dict[str, Any] = {
    **NETWORK,
    "postprocessing#transforms#3#settings#bundle": "voxelmorph",
    "postprocessing#transforms#3#settings#iterations": None,
}
"""What replaces ReCorr's entries in its inference.json."""

# Settings of the VoxelMorph paper, MONAI's own default.
_CHANNELS = (16, 32, 32, 32, 32, 32)


class VoxelMorphNetwork(nn.Module):
    """`VoxelMorphUNet` and the integration of its velocity field, with the interface of this collection's networks.

    Args:
        integration_steps: scaling-and-squaring steps.
    """

    stride = 2 ** (len(_CHANNELS) // 2 + 1)

    def __init__(self, *, integration_steps: int = 7) -> None:
        super().__init__()
        self.unet = VoxelMorphUNet(
            spatial_dims=3, in_channels=2, unet_out_channels=32, channels=_CHANNELS, final_conv_channels=(16, 16)
        )
        self.integrate = DVF2DDF(num_steps=integration_steps, mode="bilinear", padding_mode="border")

    def forward(self, image: Tensor) -> Tensor:
        """(B, 2, D, H, W), moving and fixed, -> ddf (B, 3, D, H, W), voxels."""
        return self.integrate(self.unet(image))

    def forward_sequence(self, image: Tensor) -> list[Tensor]:
        return [self(image)]


def write_overlay(path: Path, overlay: Mapping[str, Any]) -> Path:
    """A config that comes after another and replaces its entries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(overlay, indent=1) + "\n")
    return path


def train_voxelmorph(options: Sequence[str]) -> None:
    """Run ReCorr's train.json and general.json on this network."""
    folder = Path(options[options.index("--output_dir") + 1]) if "--output_dir" in options else Path("runs/voxelmorph")
    overlay = write_overlay(folder / "network.json", NETWORK)
    files = json.dumps([f"{CONFIGS}/train.json", f"{CONFIGS}/general.json", str(overlay)])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *options]
    subprocess.run([*command, *([] if "--output_dir" in options else ["--output_dir", str(folder)])], check=True)


if __name__ == "__main__":
    train_voxelmorph(sys.argv[1:])
