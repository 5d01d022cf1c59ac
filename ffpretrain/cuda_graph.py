"""Work of fixed shape recorded once as a CUDA graph and replayed with one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

_T = TypeVar("_T")
#: runs before the recording, in which libraries allocate and kernels are compiled and tuned
WARM_UPS = 3


def record(function: Callable[[], _T], device: torch.device) -> Callable[[], _T]:
    """Return a function that repeats ``function`` on the same tensors.

    On a CUDA device its kernels are recorded and each call replays them with one launch, asynchronously on
    the current stream; on any other device the function itself comes back.

    Args:
        function: takes its inputs from tensors that stay in place and returns tensors, the same ones at every
            replay; must not wait for the device, and must not change shapes from call to call. It runs
            :data:`WARM_UPS` times before it is recorded, with all its effects.
        device: where it runs.

    Raises:
        RuntimeError: it waits for the device, or memory is short.
    """
    if device.type != "cuda":
        return function
    # a stream of this device: torch's own default for captures is of the device that came first
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    # memory that waits for the collector would be freed in the middle of the recording
    gc.collect()
    # derivatives on this very thread: another one would have matrix workspaces of its own, kept for good
    with torch.autograd.set_multithreading_enabled(False):
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS - 1):
                function()
            with _no_waiting():
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # what other threads do with the device is none of the recording's business
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = function()

    def replay() -> _T:
        graph.replay()
        return result

    return replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Refuse to wait for the device, with an error that says where; a recording would fail without saying."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
