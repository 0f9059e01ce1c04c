"""How all benchmarks time and count: interleaved rounds in one process, and FLOPs of what is not computed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.report import Kept

# Nothing is computed there, and attention's products are counted, which a CPU's fused attention hides from the counter.
COUNTED_ON = torch.device("meta")


def interleaved(
    steps: Mapping[str, Callable[[], Any]], rounds: int, threads: int, kept: Kept | None = None
) -> dict[str, list[float]]:
    """Seconds of each step in each round, every round running every step; one round before is not counted."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    for step in tqdm(steps.values(), desc="warming up"):
        step()
    found = []
    for i in tqdm(range(rounds), desc="rounds"):
        found.append(kept.get(f"round {i}", lambda: timed(steps)) if kept else timed(steps))
    return {name: [seconds[name] for seconds in found] for name in steps}


def timed(steps: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    seconds = {}
    for name, step in steps.items():
        start = timer()  # waits for the GPU, where there is one; benchmark.Timer runs each step twice more to warm up
        step()
        seconds[name] = timer() - start
    return seconds


def keep_freed_memory() -> None:
    """Have the C library reuse what is freed, as CUDA's allocator does.

    By default it gives large blocks back to the system, and a step that holds more at once than those beside it takes
    new pages for them, each time: what is timed then is the system.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def flops_of(step: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
