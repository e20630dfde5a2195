"""Time and peak memory of AD-RegNet's forward pass and training step: `python -m benchmarks.adregnet_step`.

With and without checkpointing, in float32 and bfloat16; on the GPU where there is one, else on the CPU. A training step
of 160x192x224 does not fit every machine: `--shape 96 96 112` and the bytes per voxel tell what it would take.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks._measure import argument_parser, describe_machine, interleave, peak_mib, print_table, ratio
from common.inference import SequenceInferer
from common.training import RegistrationObjective

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundles/adregnet"))
from adregnet_net import ADRegNet

_KINDS = {
    "forward": (False, False, False),
    "forward, bfloat16": (False, False, True),
    "training step": (True, False, False),
    "training step, checkpointing": (True, True, False),
    "training step, bfloat16": (True, False, True),
    "training step, both": (True, True, True),
}
"""Whether it trains, keeps only some activations, and computes in bfloat16."""


def prepare(shape: Sequence[int], kind: str) -> Callable[[], object]:
    """The call to measure, its inputs ready."""
    training, checkpointing, bfloat16 = _KINDS[kind]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = ADRegNet(checkpointing=checkpointing).to(device)
    image = torch.rand((1, 2, *shape), device=device)
    inferer = SequenceInferer(sequence=False, bfloat16=bfloat16)
    return partial(_train if training else _register, network, inferer, image)


def _register(network: ADRegNet, inferer: SequenceInferer, image: torch.Tensor) -> object:
    with torch.no_grad():
        result = inferer(image, network)
    _wait()
    return result


def _train(network: ADRegNet, inferer: SequenceInferer, image: torch.Tensor) -> object:
    objective = RegistrationObjective(similarity=torch.nn.MSELoss(), folding_weight=10.0)
    objective(inferer(image, network), {"image": image}).backward()
    network.zero_grad(set_to_none=True)
    _wait()
    return None


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak(shape: Sequence[int], kind: str, threads: int) -> float:
    if not torch.cuda.is_available():
        return peak_mib(prepare, shape, kind, threads=threads)
    torch.cuda.reset_peak_memory_stats()
    prepare(shape, kind)()
    return torch.cuda.max_memory_allocated() / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argument_parser(__doc__, shape=(160, 192, 224), repeats=2)
    parser.add_argument("--kinds", nargs="+", choices=list(_KINDS), default=list(_KINDS))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(describe_machine())
    times = interleave({kind: prepare(options.shape, kind) for kind in options.kinds}, repeats=options.repeats)
    first = next(iter(times.values()))
    rows = []
    for kind, timing in times.items():
        peak = _peak(options.shape, kind, options.threads)
        per_voxel = peak * 2**20 / math.prod(options.shape)
        rows.append(
            [kind, timing.seconds, timing.cpu_seconds, ratio(timing.cpu_seconds, first.cpu_seconds), peak, per_voxel]
        )
    size = "x".join(map(str, options.shape))
    columns = [f"AD-RegNet, {size}", "seconds", "CPU s", "of the first", "peak MiB", "bytes per voxel"]
    print_table("one pair", columns, rows)


if __name__ == "__main__":
    main()
