"""TorchMD-Net's neighbour search in plain torch, for machines that have TorchMD-Net but not warp.

Warp's library is large. The search is a small part of the peer's step, and this one, without a list and for
a single molecule, costs a few small kernels; a result obtained with it says so in its name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def pairs(
    positions: Tensor, cutoff_upper: float, max_num_pairs: int, loop: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return every pair of one molecule within the cutoff, both ways, padded with -1 to a fixed number."""
    n = len(positions)
    every = torch.arange(n, device=positions.device)
    first, second = every.repeat_interleave(n), every.repeat(n)
    same = first == second
    vector = positions.index_select(0, first) - positions.index_select(0, second)
    squared = vector.square().sum(1)
    distance = torch.where(same, 0.0, torch.where(same, 1.0, squared).sqrt())
    keep = (distance < cutoff_upper) & (~same if not loop else torch.ones_like(same))
    index = torch.where(keep, torch.stack([first, second]), -1)
    more = max_num_pairs - n * n
    if more < 0:
        raise ValueError(f"{n} atoms need {n * n} pairs, there is room for {max_num_pairs}")
    index = torch.nn.functional.pad(index, (0, more), value=-1)
    vector = torch.nn.functional.pad(torch.where(keep[:, None], vector, 0.0), (0, 0, 0, more))
    distance = torch.nn.functional.pad(torch.where(keep, distance, 0.0), (0, more))
    return index.to(torch.int32), vector, distance, keep.sum().to(torch.int32).reshape(1)


def install() -> bool:
    """Put the search in warp's place where warp is absent; return whether that was needed."""
    try:
        import warp  # noqa: F401
    except ImportError:
        package, module = ModuleType("torchmdnet.extensions.warp_ops"), ModuleType("neighbors")

        def by_keyword(**options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return pairs(**options)

        module.warp_neighbor_pairs = by_keyword  # type: ignore[attr-defined]
        sys.modules["torchmdnet.extensions.warp_ops"] = package
        sys.modules["torchmdnet.extensions.warp_ops.neighbors"] = module
        return True
    return False
