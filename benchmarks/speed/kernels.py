"""Timing and profiling on a CUDA device, for benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ffpretrain.cuda_graph import record

DEVICE = torch.device("cuda")


def alternate(steps: dict[str, Callable[[], object]], block: int, blocks: int) -> dict[str, float]:
    """Return the median ms of a call of each, in blocks that take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(blocks):
        for name, step in steps.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(block):
                step()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) / block * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def best(function: Callable[[], object], times: int = 10) -> float:
    """Return the shortest time of a call in s."""
    function()
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def replay_cost(kernels: int) -> float:
    """Return the time in s of replaying so many kernels that do next to nothing, one after another."""
    x = torch.zeros(1, device=DEVICE)

    def function() -> torch.Tensor:
        for _ in range(kernels):
            x.add_(1.0)
        return x

    return best(record(function, DEVICE), 50)


def device_rates() -> tuple[float, float]:
    """Return the rate of float32 matrix products in 1/s and of copies in bytes/s."""
    a, big = torch.randn(8192, 8192, device=DEVICE), torch.empty(2**28, device=DEVICE)
    return 2 * 8192**3 / best(lambda: a @ a), 2 * big.numel() * 4 / best(lambda: big.clone())


def kernels_of(function: Callable[[], object]) -> list[tuple[str, float]]:
    """Return name and µs of every kernel and copy of one call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return [
        (e.name, e.time_range.elapsed_us()) for e in profiler.events() if e.device_type == DeviceType.CUDA
    ]
