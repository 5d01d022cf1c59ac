"""Parts of molecules: a connected part of a structure, and the graph of some of its atoms."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ffpretrain.graphs import Graph


def connected_part(
    graph: Graph, fraction: float, draws: Sequence[Tensor], neighbours: Sequence[list[list[int]]]
) -> Tensor:
    """Choose a connected part of each structure by breadth-first search over bonds, bool ``[N]``.

    The search starts at a random atom and takes neighbours in random order. Where a fragment is exhausted,
    it goes on at the atom that lies closest to those chosen.

    Args:
        graph: one or more structures.
        fraction: of the atoms to choose; the number is rounded, and at least 2 where there are as many.
        draws: uniform numbers, one for each atom of a structure; they decide start and order.
        neighbours: what each atom of a structure is bonded to, counted from 0 in each, as
            :func:`~ffpretrain.molecules.neighbour_lists`.
    """
    chosen = torch.zeros(len(graph.z), dtype=torch.bool)
    start = 0
    for draw, bonded in zip(draws, neighbours, strict=True):
        n = len(draw)
        wanted = min(n, max(2, round(fraction * n)))
        pos = graph.pos[start : start + n].cpu()
        chosen[[start + i for i in _search(bonded, pos, draw.tolist(), wanted)]] = True
        start += n
    return chosen.to(graph.z.device)


def _search(neighbours: list[list[int]], pos: Tensor, rank: list[float], wanted: int) -> list[int]:
    found = [min(range(len(rank)), key=rank.__getitem__)]
    queue = deque(found)
    while len(found) < wanted:
        if queue:
            reached = sorted(set(neighbours[queue.popleft()]) - set(found), key=rank.__getitem__)
        else:
            rest = sorted(set(range(len(rank))) - set(found))
            gap = torch.cdist(pos[rest], pos[found]).amin(1)
            reached = [rest[int(gap.argmin())]]
        reached = reached[: wanted - len(found)]
        found += reached
        queue += reached
    return found


def part_of(graph: Graph, chosen: Tensor) -> Graph:
    """Return the graph of some atoms, with the edges between them.

    Args:
        graph: one or more structures.
        chosen: bool ``[N]``; at least one atom of every structure.
    """
    number = chosen.cumsum(0) - 1
    kept = chosen[graph.edge_index[0]] & chosen[graph.edge_index[1]]
    return graph._replace(
        z=graph.z[chosen],
        pos=graph.pos[chosen],
        edge_index=number[graph.edge_index[:, kept]],
        edge_shift=graph.edge_shift[kept],
        batch=graph.batch[chosen],
    )
