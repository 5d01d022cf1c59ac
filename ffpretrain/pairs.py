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

import math
from typing import Any, NamedTuple, Protocol

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

    @property
    def radial(self) -> Tensor:
        """Distances in Å that functions of them alone are to be made of, ``[R]``; mostly :attr:`distance`."""
        ...

    def spread(self, x: Tensor) -> Tensor:
        """Bring what was made of :attr:`radial`, ``[R, ...]``, to pairs ``[P, ...]``."""
        ...

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

    @property
    def radial(self) -> Tensor:
        """See :class:`Pairs`."""
        return self.distance

    def spread(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x

    def neighbor(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x.index_select(0, self._neighbor)

    def center(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x.index_select(0, self._center)

    def sum(self, message: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return message.new_zeros(self.n_atoms, *message.shape[1:]).index_add(0, self._center, message)


class PairRows(NamedTuple):
    """The pairs of n atoms listed once, themselves included, among all n * n.

    Attributes:
        row: of each of all pairs ``[n * n]``.
        upper, lower: where a row's two directions stand among all ``[n (n + 1) / 2]``.
        twice: 1 where they are two, 0 for an atom with itself ``[n (n + 1) / 2]``.
    """

    row: Tensor
    upper: Tensor
    lower: Tensor
    twice: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> PairRows:
        """Return those of n atoms; to be made before a function is traced, so that they are its constants."""
        i, j = torch.triu_indices(n, n, device=device)
        rows = torch.arange(len(i), device=device)
        place = torch.zeros(n, n, dtype=torch.int64, device=device)
        place[i, j] = rows
        place[j, i] = rows
        return cls(place.flatten(), i * n + j, j * n + i, (i != j).to(torch.int64))


class DensePairs:
    """All pairs of each molecule in a batch of M molecules of n atoms: ``P = [M, n, n]`` (centre, neighbour).

    Args:
        pos: positions ``[M * n, 3]`` Å.
        n_molecules: M.
        dtype: cast the vectors, once formed, to this type.
        rows: with them functions of the distance are made once for both directions of a pair, and spread:
            half the work and memory where a compiler joins the spreading with what reads it, another pass
            where none does.
    """

    def __init__(
        self, pos: Tensor, n_molecules: int, dtype: torch.dtype | None = None, rows: PairRows | None = None
    ) -> None:
        self.n_molecules, self.n_atoms = n_molecules, pos.shape[0] // n_molecules
        xyz = pos.view(n_molecules, self.n_atoms, 3)
        self.vector = (xyz.unsqueeze(1) - xyz.unsqueeze(2)).to(dtype)
        same = torch.eye(self.n_atoms, dtype=self.vector.dtype, device=pos.device)
        # 1 under the root of a self-pair keeps its derivatives finite; the distance itself is put back to 0
        self.distance = (self.vector.square().sum(-1) + same).sqrt() - same
        self.other: Tensor | None = 1 - same
        self._rows = rows

    @property
    def radial(self) -> Tensor:
        """See :class:`Pairs`: ``[M, n, n]``, or ``[M, n (n + 1) / 2]`` with rows."""
        return self.distance if self._rows is None else _Collected.apply(self.distance, self._rows, True)

    def spread(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x if self._rows is None else _Spread.apply(x, self._rows)

    def neighbor(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x.view(self.n_molecules, 1, self.n_atoms, *x.shape[1:])

    def center(self, x: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return x.view(self.n_molecules, self.n_atoms, 1, *x.shape[1:])

    def sum(self, message: Tensor) -> Tensor:
        """See :class:`Pairs`."""
        return message.sum(2).reshape(self.n_molecules * self.n_atoms, *message.shape[3:])


class _Spread(torch.autograd.Function):
    """``[M, R, ...]`` to ``[M, n, n, ...]``; its derivative adds the two directions, without a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PairRows) -> Tensor:
        ctx.rows = rows
        n = math.isqrt(len(rows.row))
        return x[:, rows.row].unflatten(1, (n, n))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Collected.apply(gradient, ctx.rows, False), None


class _Collected(torch.autograd.Function):
    """The adjoint of :class:`_Spread`; with ``one``, one of the two directions in place of their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: PairRows, one: bool) -> Tensor:
        ctx.rows, ctx.one = rows, one
        x = x.flatten(1, 2)
        if one:
            return x[:, rows.upper]
        twice = rows.twice.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)
        return x[:, rows.upper] + x[:, rows.lower] * twice

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # a symmetric input: half of each to either direction is as good as all to one
        spread = _Spread.apply(gradient, ctx.rows)
        if ctx.one:
            n = spread.shape[1]
            half = 0.5 + 0.5 * torch.eye(n, dtype=spread.dtype, device=spread.device)
            spread = spread * half.view(n, n, *[1] * (spread.dim() - 3))
        return spread, None, None


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

    @property
    def radial(self) -> Tensor:
        """As :class:`Pairs` has it: each is listed once anyway."""
        return self.distance

    def spread(self, x: Tensor) -> Tensor:
        """As :class:`Pairs` has it."""
        return x

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
