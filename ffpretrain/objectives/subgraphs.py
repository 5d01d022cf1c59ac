"""Parts of molecules: which atoms are bonded, a connected part of a structure, the graph of some atoms."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ffpretrain.graphs import Graph
from ffpretrain.molecules import HEAVY_FACTOR, HYDROGEN_FACTOR


def bonded_pairs(graph: Graph) -> Tensor:
    """Return the edges between bonded atoms, each in both directions, int64 ``[2, P]``.

    Atoms are bonded by the rule of :func:`ffpretrain.molecules.find_bonds`. The graph's cutoff must be longer
    than a bond.

    Args:
        graph: one or more structures.
    """
    from ase.data import covalent_radii

    radius = torch.as_tensor(covalent_radii, dtype=graph.pos.dtype, device=graph.pos.device)[graph.z]
    source, target = graph.edge_index
    length = (graph.pos[source] + graph.edge_shift - graph.pos[target]).norm(dim=1)
    hydrogen = (graph.z[source] == 1) | (graph.z[target] == 1)
    factor = torch.where(hydrogen, HYDROGEN_FACTOR, HEAVY_FACTOR)
    return graph.edge_index[:, length < factor * (radius[source] + radius[target])]


def connected_part(graph: Graph, fraction: float, draws: Sequence[Tensor]) -> Tensor:
    """Choose a connected part of each structure by breadth-first search over bonds, bool ``[N]``.

    The search starts at a random atom and takes neighbours in random order. Where a fragment is exhausted,
    it goes on at the atom that lies closest to those chosen.

    Args:
        graph: one or more structures.
        fraction: of the atoms to choose; the number is rounded, and at least 2 where there are as many.
        draws: uniform numbers, one for each atom of a structure; they decide start and order.
    """
    chosen = torch.zeros(len(graph.z), dtype=torch.bool)
    neighbours: list[list[int]] = [[] for _ in range(len(graph.z))]
    for source, target in bonded_pairs(graph).T.tolist():
        neighbours[source].append(target)
    start = 0
    for draw in draws:
        n = len(draw)
        wanted = min(n, max(2, round(fraction * n)))
        pos = graph.pos[start : start + n].cpu()
        local = [[j - start for j in neighbours[start + i]] for i in range(n)]
        chosen[[start + i for i in _search(local, pos, draw.tolist(), wanted)]] = True
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
