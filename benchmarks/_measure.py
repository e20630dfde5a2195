"""What the benchmarks share: interleaved timing, peak memory of a child process, tables."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = [
    "Timing",
    "argument_parser",
    "describe_machine",
    "in_child",
    "interleave",
    "peak_mib",
    "print_table",
    "ratio",
]

_MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """Medians of one candidate: what the clock says, and the time of all threads of this process."""

    seconds: float
    cpu_seconds: float


def interleave(calls: Mapping[str, Callable[[], object]], *, repeats: int = 3, warmup: int = 1) -> dict[str, Timing]:
    """Time candidates in turn, A B A B, so that whatever else the machine does meets all of them alike.

    Args:
        calls: the candidates; their results are thrown away.
        repeats: timed rounds, of which the median is taken.
        warmup: rounds before, not timed.

    Returns:
        one `Timing` for each candidate.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            gc.collect()
            started, cpu_started = time.perf_counter(), time.process_time()
            call()
            ended, cpu_ended = time.perf_counter(), time.process_time()
            if turn >= warmup:
                wall[name].append(ended - started)
                cpu[name].append(cpu_ended - cpu_started)
    return {name: Timing(statistics.median(wall[name]), statistics.median(cpu[name])) for name in calls}


def peak_mib(prepare: Callable[..., Callable[[], object]], *args: Any, threads: int | None = None) -> float:
    """Memory that one call adds at its peak, its result included, measured in a process of its own.

    The child prepares the inputs, notes its resident set, makes the call and reads the highest resident set since:
    what the operating system had to provide, whatever allocator provided it.

    Args:
        prepare: importable by the child; makes the inputs and returns the call to measure.
        args: for `prepare`, sent to the child.
        threads: of PyTorch, in the child.

    Returns:
        MiB.

    Raises:
        RuntimeError: when the child ends without an answer, for instance for lack of memory.
    """
    return in_child(_peak_mib, prepare, args, threads or torch.get_num_threads())


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process of its own.

    Args:
        function: importable by the child.
        args: sent to the child.

    Returns:
        the result, sent back.

    Raises:
        RuntimeError: when the child ends without an answer, for instance for lack of memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks._measure"])  # the server imports once, children are quick
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(sender, function, args))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the measuring process died, perhaps for lack of memory") from None
    finally:
        child.join()


def _send_result(sender: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    sender.send(function(*args))


def _peak_mib(prepare: Callable[..., Callable[[], object]], args: Sequence[Any], threads: int) -> float:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    call = prepare(*args)
    gc.collect()
    _forget_peak()
    before = psutil.Process().memory_info().rss
    result = call()
    peak = _peak_bytes()
    del result
    return (peak - before) / _MIB


def _forget_peak() -> None:
    """Begin counting the highest resident set anew, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    # Not `ru_maxrss` where this is to be had: Linux hands that one on from the parent through fork and exec.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ratio(reference: float, value: float) -> str:
    """How many times `value` goes into `reference`, as a table shows it."""
    return f"{reference / value:.1f}x" if value > 0 else "-"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned text: first column to the left, the others to the right; floats with three significant digits."""
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    lines = [[*columns], ["-" * width for width in widths], *cells]
    print(f"\n{title}")
    for line in lines:
        first, *others = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=False))
        )
        print("  ".join([first, *others]).rstrip(), flush=True)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def describe_machine() -> str:
    """One line to print above figures: cores, threads, versions, and how busy the machine is already."""
    load = os.getloadavg()[0]
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"load {load:.1f} before the run"
    )


def argument_parser(description: str | None, *, shape: Sequence[int], repeats: int = 3) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have: `--shape`, `--repeats`, `--threads`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=list(shape), metavar=("D", "H", "W"), help="voxels")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds, of which the median is shown")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    return parser
