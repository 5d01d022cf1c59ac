"""Work of fixed shape recorded once as a CUDA graph and replayed with one launch."""

from __future__ import annotations

from collections.abc import Callable
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
    """
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # a stream of this device: torch's own default for captures is of the device that came first
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        result = function()

    def replay() -> _T:
        graph.replay()
        return result

    return replay
