"""Local correlation against its textbook forms: `python -m benchmarks.correlation`.

The naive loop multiplies by one shifted view after the other and stacks the results; the strided view
(`Tensor.unfold` along three axes, then `einsum`) is what `F.unfold` is in 3D. All three give the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import argument_parser, describe_machine, interleave, peak_mib, print_table, ratio
from common.layers.correlation import correlation_offsets, local_correlation

Correlate = Callable[[Tensor, Tensor, int], Tensor]


def slab_loop(fixed: Tensor, moving: Tensor, radius: int) -> Tensor:
    """Ours."""
    return local_correlation(fixed, moving, radius=radius)


def naive_loop(fixed: Tensor, moving: Tensor, radius: int) -> Tensor:
    """One shifted view after the other."""
    padded = F.pad(moving, (radius,) * 6, mode="replicate")
    depth, height, width = fixed.shape[2:]
    views = (
        padded[:, :, radius + d : radius + d + depth, radius + h : radius + h + height, radius + w : radius + w + width]
        for d, h, w in correlation_offsets(radius)
    )
    return torch.stack([(fixed * view).mean(dim=1) for view in views], dim=1)


def strided_view(fixed: Tensor, moving: Tensor, radius: int) -> Tensor:
    """All neighbourhoods at once; C K^3 V values are laid out in memory."""
    size = 2 * radius + 1
    padded = F.pad(moving, (radius,) * 6, mode="replicate")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).unfold(4, size, 1)  # (B, C, D, H, W, K, K, K)
    volume = torch.einsum("bcdhw,bcdhwxyz->bxyzdhw", fixed, windows)
    return volume.flatten(1, 3) / fixed.shape[1]


WAYS: dict[str, Correlate] = {"slab loop (ours)": slab_loop, "naive loop": naive_loop, "strided view": strided_view}


def forward_call(way: str, shape: Sequence[int], channels: int, radius: int) -> Callable[[], Tensor]:
    """Inputs made, correlation without gradient."""
    correlate = WAYS[way]
    fixed, moving = _maps(shape, channels)

    def call() -> Tensor:
        with torch.no_grad():
            return correlate(fixed, moving, radius)

    return call


def training_call(way: str, shape: Sequence[int], channels: int, radius: int) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs made, correlation forward and backward with a gradient of ones."""
    correlate = WAYS[way]
    fixed, moving = (features.requires_grad_() for features in _maps(shape, channels))

    def call() -> tuple[Tensor, ...]:
        volume = correlate(fixed, moving, radius)
        return torch.autograd.grad(volume, [fixed, moving], torch.ones_like(volume))

    return call


def compare(shape: Sequence[int], channels: int, radius: int, *, ways: Sequence[str], repeats: int) -> dict[str, float]:
    """Print one table, the ratios of CPU time; returns the CPU seconds of the forward passes."""
    arguments = shape, channels, radius
    reference = WAYS["naive loop"](*_maps((8, 9, 10), channels), radius)
    for way in ways:
        torch.testing.assert_close(WAYS[way](*_maps((8, 9, 10), channels), radius), reference)
    forward = interleave({way: forward_call(way, *arguments) for way in ways}, repeats=repeats)
    training = interleave({way: training_call(way, *arguments) for way in ways}, repeats=repeats)
    output_mib = (2 * radius + 1) ** 3 * math.prod(shape) * 4 / 2**20
    ours = ways[0]
    rows = [
        [
            way,
            forward[way].seconds,
            forward[way].cpu_seconds,
            ratio(forward[way].cpu_seconds, forward[ours].cpu_seconds),
            training[way].seconds,
            training[way].cpu_seconds,
            ratio(training[way].cpu_seconds, training[ours].cpu_seconds),
            peak_mib(forward_call, way, *arguments),
            peak_mib(training_call, way, *arguments),
        ]
        for way in ways
    ]
    columns = ["", "forward s", "CPU s", "to ours", "fwd + bwd s", "CPU s", "to ours", "forward MiB", "fwd + bwd MiB"]
    size = "x".join(map(str, shape))
    print_table(f"{size}, {channels} channels, radius {radius} (the output alone: {output_mib:.0f} MiB)", columns, rows)
    return {way: forward[way].cpu_seconds for way in ways}


def print_limits(shape: Sequence[int], channels: int, radius: int, seconds: float) -> None:
    """What one core allows at best, measured now, and how near our forward pass of so many CPU seconds comes."""
    voxels, offsets = math.prod(shape), (2 * radius + 1) ** 3
    copied = (2 * channels + offsets) * voxels * 4
    products = channels * offsets * voxels
    source = torch.ones(2**26)  # 256 MiB
    target = torch.ones_like(source)  # written to beforehand: new pages would cost their own time
    copy_rate = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    a, b, product = (torch.rand((32, 2**13)) for _ in range(3))  # 1 MiB each: operands of one slab
    total = torch.empty(2**13)
    product_rate = a.numel() / _fastest(lambda: torch.mul(a, b, out=product))
    sum_rate = a.numel() / _fastest(lambda: torch.sum(product, dim=0, out=total))
    copying = copied / copy_rate
    computing = products / product_rate + products / sum_rate
    print(
        f"limits: {copied / 1e6:.0f} MB in and out at {copy_rate / 1e9:.1f} GB/s, the copy rate: {copying:.3g} s;\n"
        f"        {products / 1e9:.2f} G products at {product_rate / 1e9:.1f} G/s, summed at {sum_rate / 1e9:.1f} G/s, "
        f"as PyTorch does on contiguous data in cache: {computing:.3g} s\n"
        f"ours:   {seconds:.3g} s of CPU, {100 * copying / seconds:.0f} % of the copy limit, "
        f"{100 * computing / seconds:.0f} % of the limit of operations"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argument_parser(__doc__, shape=(80, 96, 112))
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 16], help="one table for each")
    parser.add_argument("--radius", type=int, nargs="+", default=[1, 2], help="as many as --channels")
    parser.add_argument("--unfold_mib", type=float, default=512, help="largest C K^3 V for which the view is tried")
    options = parser.parse_args(argv)
    if len(options.channels) != len(options.radius):
        parser.error("--channels and --radius need as many values as each other")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(describe_machine())
    ours, naive, strided = WAYS
    for channels, radius in zip(options.channels, options.radius, strict=True):
        values = channels * (2 * radius + 1) ** 3
        if values * math.prod(options.shape) * 4 / 2**20 <= options.unfold_mib:
            seconds = compare(options.shape, channels, radius, ways=[ours, naive, strided], repeats=options.repeats)
        else:
            seconds = compare(options.shape, channels, radius, ways=[ours, naive], repeats=options.repeats)
            # The view where it fits: the same proportions, smaller.
            factor = (options.unfold_mib * 2**20 / (values * math.prod(options.shape) * 4)) ** (1 / 3)
            small = [max(2 * radius + 1, int(factor * n) // 4 * 4) for n in options.shape]
            compare(small, channels, radius, ways=[ours, naive, strided], repeats=options.repeats)
        print_limits(options.shape, channels, radius, seconds[ours])


def _maps(shape: Sequence[int], channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    fixed, moving = (torch.randn((1, channels, *shape), generator=generator) for _ in range(2))
    return fixed, moving


def _fastest(call: Callable[[], object], repeats: int = 10) -> float:
    """CPU seconds of the quickest of several calls: a limit is what happens undisturbed."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
