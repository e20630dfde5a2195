"""A forward pass of ReCorr by level: `python -m benchmarks.recorr_forward`.

Hooks tell the encoder, the four levels with their parts, and the last convolution apart; the operations are counted by
`FlopCounterMode`, which sees convolutions only. Then the whole pass in both memory formats, what new memory pages cost
it, and the memory it takes.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._measure import argument_parser, describe_machine, in_child, interleave, peak_mib, print_table, ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bundles" / "recorr"))

from recorr_net import ReCorr

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
# Options of glibc's mallopt, from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_PARTS = ("update block", "correlation", "warp and rest")


class LevelClock:
    """Sums up where a network's time goes, by level and part: seconds by the clock and of the CPU.

    The hooks are removed at the end of the block.

    Args:
        network: hooks are put on its encoder, correlation, update blocks and last convolution.
    """

    def __init__(self, network: ReCorr) -> None:
        self.network = network
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.cpu_seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._last = self._last_cpu = 0.0
        self._hooks: list[Any] = []
        self._full = 1

    def __enter__(self) -> LevelClock:
        network = self.network
        self._hooks = [
            network.register_forward_pre_hook(self._start),
            network.encoder.register_forward_hook(lambda *_: self._stop("encoder", "convolutions")),
            network.correlation.register_forward_pre_hook(lambda _, args: self._stop(self._level(args), _PARTS[2])),
            network.correlation.register_forward_hook(lambda _, args, out: self._stop(self._level(args), _PARTS[1])),
            network.final_flow.register_forward_pre_hook(lambda *_: self._stop("final", _PARTS[2])),
            network.final_flow.register_forward_hook(lambda *_: self._stop("final", "convolutions")),
        ]
        for block in network.update_blocks:
            self._hooks.append(
                block.register_forward_hook(lambda _, args, out: self._stop(self._level(args), _PARTS[0]))
            )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._full = args[0].shape[2]
        self._last, self._last_cpu = time.perf_counter(), time.process_time()

    def _level(self, args: tuple[Tensor, ...]) -> str:
        return f"{self._full // args[0].shape[2]}x"

    def _stop(self, level: str, part: str) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds[level, part] += now - self._last
        self.cpu_seconds[level, part] += cpu - self._last_cpu
        self._last, self._last_cpu = now, cpu


def forward_call(shape: Sequence[int], memory_format: str) -> Callable[[], Tensor]:
    """Network made, weights in the memory format, which activations then follow; the pair itself counts as memory."""
    network = _network(memory_format)

    def call() -> Tensor:
        with torch.inference_mode():
            return network(torch.rand((1, 2, *shape)))

    return call


def multiply_adds(shape: Sequence[int]) -> dict[str, float]:
    """GMAC of convolutions by level; counted on a small pair, since they are proportional to the voxels."""
    network = _network("contiguous")
    small = 32, 32, 32
    counter = FlopCounterMode(display=False, depth=3)
    with counter, torch.inference_mode():
        network(torch.rand((1, 2, *small)))
    scale = math.prod(shape) / math.prod(small) / 2e9
    gmac = {name: scale * sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    levels = {f"{network.stride >> i}x": f"ReCorr.update_blocks.{i}" for i in range(len(network.update_blocks))}
    modules = {"encoder": "ReCorr.encoder", **levels, "final": "ReCorr.final_flow"}
    return {level: gmac.get(module, 0.0) for level, module in modules.items()}


def print_levels(shape: Sequence[int], repeats: int) -> None:
    """A table for each memory format, timed in turn, and one of the whole passes."""
    gmac = multiply_adds(shape)
    pair = torch.rand((1, 2, *shape))
    networks = {name: _network(name) for name in _FORMATS}
    clocks = {name: LevelClock(network) for name, network in networks.items()}
    with torch.inference_mode(), ExitStack() as hooks:
        for network in networks.values():
            network(torch.rand((1, 2, 32, 32, 32)))  # warm-up
        for clock in clocks.values():
            hooks.enter_context(clock)
        calls = {name: partial(network, pair) for name, network in networks.items()}
        times = interleave(calls, repeats=repeats, warmup=0)
    columns = ["level", "seconds", "convolutions, CPU s", "correlation", "warp and rest", "GMAC", "GFLOP/s of CPU"]
    for name, clock in clocks.items():
        rows: list[list[Any]] = []
        for level in gmac:
            wall = sum(s / repeats for (key, _), s in clock.seconds.items() if key == level)
            parts = {part: s / repeats for (key, part), s in clock.cpu_seconds.items() if key == level}
            convolutions = parts.get("update block", 0.0) + parts.get("convolutions", 0.0)
            rest = parts.get("correlation", 0.0), parts.get("warp and rest", 0.0)
            rows.append([level, wall, convolutions, *rest, gmac[level], 2 * gmac[level] / max(convolutions, 1e-9)])
        total = [sum(row[i] for row in rows) for i in range(1, 6)]
        rows.append(["all", *total, 2 * total[4] / total[1]])
        print_table(f"by level, {'x'.join(map(str, shape))}, {name}", columns, rows)
    whole = [
        [name, t.seconds, t.cpu_seconds, ratio(times["contiguous"].cpu_seconds, t.cpu_seconds)]
        for name, t in times.items()
    ]
    print_table("whole forward pass, in turn", ["memory format", "seconds", "CPU s", "speed by CPU s"], whole)


def print_memory(shape: Sequence[int], threads: int) -> None:
    """Peak of the whole pass at two sizes: what grows with the voxels, and what does not."""
    sizes = [[max(32, n // 32 * 16) for n in shape], list(shape)]
    rows: list[list[object]] = []
    for name in _FORMATS:
        small, large = (peak_mib(forward_call, size, name, threads=threads) * 2**20 for size in sizes)
        voxels = [math.prod(size) for size in sizes]
        slope = (large - small) / (voxels[1] - voxels[0]) if voxels[1] > voxels[0] else math.nan
        constant = (large - slope * voxels[1]) / 2**20
        rows.append([name, small / 2**20, large / 2**20, slope, constant, large / voxels[1]])
    columns = ["memory format", *(f"MiB at {'x'.join(map(str, size))}" for size in sizes)]
    columns += ["bytes per voxel", "and a constant MiB", "all bytes per voxel"]
    print_table("peak memory of a forward pass, its input pair included (child process)", columns, rows)


def pass_cost(shape: Sequence[int], memory_format: str, keep_pages: bool, threads: int) -> tuple[float, float, float]:
    """Seconds of one pass by the clock, and of the CPU in the program and in the system.

    glibc returns every large block to the system at once, and each new one is made of pages that the system has to
    clear first. `keep_pages` has it reuse them, by `mallopt`; for this process, from now on.
    """
    torch.set_num_threads(threads)
    if keep_pages:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    call = forward_call(shape, memory_format)
    forward_call((32, 32, 32), memory_format)()  # warm-up
    before, started = os.times(), time.perf_counter()
    call()
    ended, after = time.perf_counter(), os.times()
    return ended - started, after.user - before.user, after.system - before.system


def print_page_cost(shape: Sequence[int], threads: int) -> None:
    """One pass in a process of its own, with pages returned to the system and kept."""
    rows: list[list[object]] = []
    kinds = [False, True] if hasattr(ctypes.CDLL(None), "mallopt") else [False]  # glibc only
    for name in _FORMATS:
        for keep_pages in kinds:
            wall, user, system = in_child(pass_cost, shape, name, keep_pages, threads)
            rows.append([f"{name}, pages {'kept' if keep_pages else 'returned'}", wall, user + system, user, system])
    columns = ["one pass in a child process", "seconds", "CPU s", "in the program", "in the system"]
    print_table("new pages against reused ones", columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argument_parser(__doc__, shape=(160, 192, 224), repeats=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(describe_machine())
    print_levels(options.shape, options.repeats)
    print_page_cost(options.shape, options.threads)
    print_memory(options.shape, options.threads)


def _network(memory_format: str) -> ReCorr:
    torch.manual_seed(0)
    return ReCorr().eval().to(memory_format=_FORMATS[memory_format])


if __name__ == "__main__":
    main()
