"""How a backbone sees its neighbours: gather to pairs, reduce to atoms.

Two layouts share one interface, so that a backbone is written once:

* :class:`EdgeList`: any graph. Pairs are a flat list; gathering is ``index_select``, reducing ``index_add``.
* :class:`DensePairs`: a batch of molecules with the same number of atoms, where every pair is kept and the
  cutoff function alone removes the far ones. Gathering is a broadcast and reducing a plain sum, so a compiler
  can fuse message and reduction, and shapes never change. Only valid for a backbone whose messages vanish
  smoothly at the cutoff.

:class:`HalfPairs` lists each pair once, for networks that have native code for their messages.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ffpretrain.graphs import Graph


class Pairs(Protocol):
    """Pairs of a centre and one neighbour; ``P`` stands for the leading pair dimensions.

    Attributes:
        vector: from centre to neighbour in Å, ``[P, 3]``; zero for a pair of an atom with itself.
        distance: ``[P]`` Å; zero for a pair of an atom with itself.
        other: 1 where centre and neighbour are different atoms, else 0, broadcastable to ``[P]``; None when
            no atom is paired with itself.
    """

    vector: Tensor
    distance: Tensor
    other: Tensor | None

    def neighbor(self, x: Tensor) -> Tensor:
        """Spread atom features ``[N, ...]`` to pairs, each taking its neighbour's."""
        ...

    def center(self, x: Tensor) -> Tensor:
        """Spread atom features ``[N, ...]`` to pairs, each taking its centre's."""
        ...

    def sum(self, message: Tensor) -> Tensor:
        """Add up pair features ``[P, ...]`` over the neighbours of each centre: ``[N, ...]``."""
        ...


class EdgeList:
    """Pairs of a :class:`~ffpretrain.graphs.Graph`, optionally with each atom paired with itself."""

    def __init__(self, graph: Graph, self_pairs: bool = False, dtype: torch.dtype | None = None) -> None:
        self.n_atoms = graph.z.shape[0]
        neighbor, center = graph.edge_index[0], graph.edge_index[1]
        vector = graph.pos.index_select(0, neighbor) + graph.edge_shift - graph.pos.index_select(0, center)
        vector = vector.to(dtype)
        distance = vector.square().sum(-1).sqrt()
        self.other: Tensor | None = None
        if self_pairs:
            every = torch.arange(self.n_atoms, device=neighbor.device)
            self.other = torch.cat([torch.ones_like(distance), distance.new_zeros(self.n_atoms)])
            vector = torch.cat([vector, vector.new_zeros(self.n_atoms, 3)])
            distance = torch.cat([distance, distance.new_zeros(self.n_atoms)])
            neighbor, center = torch.cat([neighbor, every]), torch.cat([center, every])
        self.vector, self.distance = vector, distance
        self._neighbor, self._center = neighbor, center

    def neighbor(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x.index_select(0, self._neighbor)

    def center(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x.index_select(0, self._center)

    def sum(self, message: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return message.new_zeros(self.n_atoms, *message.shape[1:]).index_add(0, self._center, message)


class DensePairs:
    """All pairs of each molecule in a batch of M molecules of n atoms: ``P = [M, n, n]`` (centre, neighbour).

    Args:
        pos: positions ``[M * n, 3]`` Å.
        n_molecules: M.
        dtype: cast the vectors, once formed, to this type.
    """

    def __init__(self, pos: Tensor, n_molecules: int, dtype: torch.dtype | None = None) -> None:
        self.n_molecules, self.n_atoms = n_molecules, pos.shape[0] // n_molecules
        xyz = pos.view(n_molecules, self.n_atoms, 3)
        self.vector = (xyz.unsqueeze(1) - xyz.unsqueeze(2)).to(dtype)
        same = torch.eye(self.n_atoms, dtype=self.vector.dtype, device=pos.device)
        # 1 under the root of a self-pair keeps its derivatives finite; the distance itself is put back to 0
        self.distance = (self.vector.square().sum(-1) + same).sqrt() - same
        self.other: Tensor | None = 1 - same

    def neighbor(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x.view(self.n_molecules, 1, self.n_atoms, *x.shape[1:])

    def center(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x.view(self.n_molecules, self.n_atoms, 1, *x.shape[1:])

    def sum(self, message: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return message.sum(2).reshape(self.n_molecules * self.n_atoms, *message.shape[3:])


class HalfPairs:
    """Pairs of a graph, each listed once; optionally one last row that stands for every atom with itself.

    Rows R are P, or P + 1 with that one.

    Attributes:
        vector: from first to second in Å ``[R, 3]``; zero in the row of selves.
        distance: ``[R]`` Å; zero in the row of selves.
        other: 1 ``[R]``, but 0 in the row of selves; None without it.
        first: one atom of each pair, int64 ``[P]``.
        second: the other.
    """

    def __init__(self, graph: Graph, self_pairs: bool = False, dtype: torch.dtype | None = None) -> None:
        self.n_atoms = graph.z.shape[0]
        neighbor, center = graph.edge_index
        once = one_direction(graph.edge_index, graph.edge_shift)
        self.first, self.second = center[once], neighbor[once]
        pos = graph.pos
        vector = pos.index_select(0, self.second) + graph.edge_shift[once] - pos.index_select(0, self.first)
        vector = vector.to(dtype)
        distance = vector.square().sum(-1).sqrt()
        self.other: Tensor | None = None
        if self_pairs:
            self.other = torch.cat([torch.ones_like(distance), distance.new_zeros(1)])
            vector = torch.cat([vector, vector.new_zeros(1, 3)])
            distance = torch.cat([distance, distance.new_zeros(1)])
        self.vector, self.distance = vector, distance

    def exchange(self, filters: Tensor, x: Tensor) -> Tensor:
        """Sum ``filters * x_j`` over the neighbours j of each atom, itself left out.

        Args:
            filters: ``[R, F]``, one for both directions of a pair.
            x: atom features ``[N, F]``.
        """
        filters = filters[: len(self.first)]
        total = x.new_zeros(self.n_atoms, x.shape[-1])
        total = total.index_add(0, self.first, filters * x.index_select(0, self.second))
        return total.index_add(0, self.second, filters * x.index_select(0, self.first))


def one_direction(edge_index: Tensor, edge_shift: Tensor) -> Tensor:
    """Return which edges stand for a pair where both directions are listed, bool ``[E]``.

    Of two atoms it is the edge whose centre comes first; of an atom and its own image, that of the positive
    translation.

    Args:
        edge_index: neighbour and centre ``[2, E]``.
        edge_shift: lattice translations ``[E, 3]`` Å.
    """
    neighbor, center = edge_index
    once, images = center < neighbor, center == neighbor
    if not bool(images.any()):
        return once
    # the sign of the first component that is not zero
    sign = edge_shift[:, 0].sign()
    for c in (1, 2):
        sign = torch.where(sign == 0, edge_shift[:, c].sign(), sign)
    return once | (images & (sign > 0))
