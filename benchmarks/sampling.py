"""Warping against plain `F.grid_sample` and MONAI's `Warp`: `python -m benchmarks.sampling`.

`F.grid_sample` gets its normalised grid ready made, and so shows the sampling alone; ours and MONAI's start from a
displacement field. All three give the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks import Warp
from torch import Tensor

from benchmarks._measure import argument_parser, describe_machine, interleave, peak_mib, print_table, ratio
from common.layers.warp import warp


def ours(image: Tensor, ddf: Tensor) -> Callable[[], Tensor]:
    """Displacement in; slabs on the batch axis."""
    return lambda: warp(image, ddf)


def plain(image: Tensor, ddf: Tensor) -> Callable[[], Tensor]:
    """The grid made beforehand, one `grid_sample` at batch 1."""
    axes = [torch.arange(n, dtype=torch.float32) for n in ddf.shape[2:]]
    size = torch.tensor(ddf.shape[2:], dtype=torch.float32).view(1, 3, 1, 1, 1)
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + ddf
    grid = (2 * position / (size - 1) - 1).flip(1).permute(0, 2, 3, 4, 1).contiguous()
    return lambda: F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def monai(image: Tensor, ddf: Tensor) -> Callable[[], Tensor]:
    """`monai.networks.blocks.Warp`, in PyTorch as the wheels have it."""
    block = Warp(mode="bilinear", padding_mode="border")
    return lambda: block(image, ddf)


WAYS = {"warp (ours)": ours, "grid_sample, grid ready": plain, "MONAI Warp": monai}


def sampling_call(way: str, shape: Sequence[int], channels: int, training: bool = False) -> Callable[[], object]:
    """Inputs made; forward, or forward and backward with respect to image and field."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, channels, *shape), generator=generator)
    coarse = torch.randn((1, 3, *(max(2, n // 16) for n in shape)), generator=generator)
    ddf = 4 * F.interpolate(coarse, size=tuple(shape), mode="trilinear", align_corners=True)
    if not training:
        sample = WAYS[way](image, ddf)

        def forward() -> Tensor:
            with torch.no_grad():
                return sample()

        return forward
    image.requires_grad_()
    ddf.requires_grad_()

    def forward_backward() -> tuple[Tensor, ...]:
        warped = WAYS[way](image, ddf)()
        return torch.autograd.grad(warped, [image, ddf], torch.ones_like(warped))

    return forward_backward


def compare(shape: Sequence[int], channels: int, *, repeats: int, training: bool) -> None:
    """Print one table."""
    ways = list(WAYS)
    if training:
        ways.remove("grid_sample, grid ready")  # with respect to a field, the grid is part of it
    small = {way: sampling_call(way, (20, 24, 28), channels)() for way in ways}
    for result in small.values():
        torch.testing.assert_close(result, small[ways[0]], atol=1e-3, rtol=1e-3)
    times = interleave({way: sampling_call(way, shape, channels, training) for way in ways}, repeats=repeats)
    rows = [
        [
            way,
            times[way].seconds,
            times[way].cpu_seconds,
            ratio(times[way].seconds, times[ways[0]].seconds),
            peak_mib(sampling_call, way, shape, channels, training),
        ]
        for way in ways
    ]
    what = "forward and backward" if training else "forward"
    title = f"{what}, {'x'.join(map(str, shape))}, {channels} channel{'s' if channels > 1 else ''}"
    print_table(title, ["", "seconds", "CPU s", "to ours", "peak MiB"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argument_parser(__doc__, shape=(160, 192, 224))
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 3, 16], help="one table for each")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(describe_machine())
    for channels in options.channels:
        compare(options.shape, channels, repeats=options.repeats, training=False)
    compare(options.shape, min(options.channels), repeats=options.repeats, training=True)


if __name__ == "__main__":
    main()
