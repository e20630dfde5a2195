"""Parameters and multiply-accumulates of the bundles' networks: `python -m benchmarks.cost`.

Counted by PyTorch's own counter (convolutions, matrix products and attention; `torch.utils.flop_counter`) on tensors
without memory, so any size can be asked for: `python -m benchmarks.cost --bundle bundles/adregnet --shape 160 192 224`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# The counter knows the attention kernels of GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def cost(bundle: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters of the network of a bundle's inference.json, and multiply-accumulates for a pair of a shape."""
    sys.path.insert(0, os.path.abspath(bundle))
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    with FakeTensorMode():
        network: nn.Module = parser.get_parsed_content("network_def").eval()
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter, torch.no_grad():
            network(torch.empty(1, 2, *shape))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, int(counter.get_total_flops()) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    bundles = sorted(path.parent.parent for path in Path("bundles").glob("*/configs/metadata.json"))
    parser.add_argument("--bundle", type=Path, nargs="+", default=bundles)
    parser.add_argument("--shape", type=int, nargs=3, default=(160, 192, 224))
    arguments = parser.parse_args()
    size = "x".join(map(str, arguments.shape))
    print(f"{'':12s}{'parameters':>14s}{'GMAC at ' + size:>22s}{'model.pt MB':>14s}")
    for bundle in arguments.bundle:
        parameters, work = cost(bundle, tuple(arguments.shape))
        weights = bundle / "models" / "model.pt"
        megabytes = f"{weights.stat().st_size / 1e6:.1f}" if weights.is_file() else "none"
        print(f"{bundle.name:12s}{parameters:>14,d}{work / 1e9:>22,.2f}{megabytes:>14s}")


if __name__ == "__main__":
    main()
