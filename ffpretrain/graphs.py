"""The two types that travel: :class:`Graph`, which a model reads, and :class:`Sample`, that with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ffpretrain.errors import UnsupportedInputError
from ffpretrain.neighbors import neighbor_list

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.datasets.frames import Frame


class Graph(NamedTuple):
    """One or more structures as tensors, atoms concatenated.

    ``edge_index[0]`` is the neighbour (source), ``edge_index[1]`` the centre (target); every pair closer than
    the cutoff stands there once in each direction, without self-pairs. The vector of an edge, from centre to
    neighbour, is ``pos[edge_index[0]] + edge_shift - pos[edge_index[1]]``.

    Attributes:
        z: atomic numbers, int64 ``[N]``.
        pos: positions in Å, ``[N, 3]``; float64 when read, models cast.
        edge_index: int64 ``[2, E]``.
        edge_shift: lattice translation of the source in Å, ``[E, 3]``.
        batch: structure of each atom, int64 ``[N]``, ascending.
        cell: lattice vectors in rows in Å, ``[B, 3, 3]``; zeros where not periodic.
        n_graphs: number of structures B.
    """

    z: Tensor
    pos: Tensor
    edge_index: Tensor
    edge_shift: Tensor
    batch: Tensor
    cell: Tensor
    n_graphs: int

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Graph:
        """Return the graph on a device; ``dtype`` applies to the floating-point tensors only."""
        return Graph(
            self.z.to(device),
            self.pos.to(device, dtype),
            self.edge_index.to(device),
            self.edge_shift.to(device, dtype),
            self.batch.to(device),
            self.cell.to(device, dtype),
            self.n_graphs,
        )


class Sample(NamedTuple):
    """A graph with what is known of it.

    Attributes:
        graph: the structures.
        targets: labels: ``energy [B]`` eV, ``forces [N, 3]`` eV/Å, ``stress [B, 3, 3]`` eV/Å³, …
        extras: what only some methods need: ``fixed [N]`` bool, ``charge [B]``, ``spin [B]``, ``index [B]`` …
    """

    graph: Graph
    targets: dict[str, Tensor]
    extras: dict[str, Tensor]

    def to(self, device: torch.device | str | None = None) -> Sample:
        """Return the sample on a device."""
        return Sample(
            self.graph.to(device),
            {k: v.to(device) for k, v in self.targets.items()},
            {k: v.to(device) for k, v in self.extras.items()},
        )


def graph_from_atoms(atoms: Atoms, cutoff: float) -> Graph:
    """Return the graph of an ``ase.Atoms``.

    Args:
        atoms: a molecule or a periodic structure.
        cutoff: largest distance of an edge in Å.

    Raises:
        UnsupportedInputError: no atoms, non-finite positions, or a periodic direction without cell vector.
    """
    return build_graph(
        torch.as_tensor(atoms.numbers, dtype=torch.int64),
        torch.as_tensor(atoms.positions, dtype=torch.float64),
        cutoff,
        cell=torch.as_tensor(atoms.cell.array, dtype=torch.float64),
        pbc=tuple(bool(p) for p in atoms.pbc),
    )


def graph_from_frame(frame: Frame, cutoff: float) -> Graph:
    """Return the graph of a dataset's frame; as :func:`graph_from_atoms`."""
    return build_graph(
        torch.as_tensor(frame.numbers, dtype=torch.int64),
        torch.as_tensor(frame.positions, dtype=torch.float64),
        cutoff,
        cell=None if frame.cell is None else torch.as_tensor(frame.cell, dtype=torch.float64),
        pbc=frame.pbc,
    )


def build_graph(
    z: Tensor,
    pos: Tensor,
    cutoff: float,
    cell: Tensor | None = None,
    pbc: Sequence[bool] = (False, False, False),
) -> Graph:
    """Return the graph of one structure.

    Args:
        z: atomic numbers ``[N]``.
        pos: positions ``[N, 3]`` Å.
        cutoff: largest distance of an edge in Å.
        cell: lattice vectors in rows ``[3, 3]`` Å; only read where ``pbc`` is set.
        pbc: which directions repeat.

    Raises:
        UnsupportedInputError: as :func:`graph_from_atoms`.
    """
    if len(z) == 0:
        raise UnsupportedInputError("the structure has no atoms; give at least one")
    if not bool(torch.isfinite(pos).all()):
        bad = int((~torch.isfinite(pos).all(dim=1)).nonzero()[0])
        raise UnsupportedInputError(f"the position of atom {bad} is not finite; check the structure")
    edge_index, edge_shift = neighbor_list(pos, cutoff, cell, pbc)
    box = cell.to(pos) if cell is not None and any(pbc) else torch.zeros(3, 3, dtype=pos.dtype)
    return Graph(z, pos, edge_index, edge_shift, torch.zeros_like(z), box.unsqueeze(0), 1)


def batch_graphs(graphs: Sequence[Graph]) -> Graph:
    """Concatenate graphs into one; edges never cross structures.

    Args:
        graphs: at least one; each may itself hold several structures.

    Raises:
        UnsupportedInputError: the sequence is empty.
    """
    if not graphs:
        raise UnsupportedInputError("cannot batch an empty list of graphs; give at least one")
    if len(graphs) == 1:
        return graphs[0]
    edges, batches = [], []
    n_atoms = n_graphs = 0
    for g in graphs:
        edges.append(g.edge_index + n_atoms)
        batches.append(g.batch + n_graphs)
        n_atoms += len(g.z)
        n_graphs += g.n_graphs
    return Graph(
        torch.cat([g.z for g in graphs]),
        torch.cat([g.pos for g in graphs]),
        torch.cat(edges, dim=1),
        torch.cat([g.edge_shift for g in graphs]),
        torch.cat(batches),
        torch.cat([g.cell for g in graphs]),
        n_graphs,
    )


def atoms_per_graph(graph: Graph) -> Tensor:
    """Return the number of atoms of each structure, int64 ``[B]``."""
    return torch.zeros(graph.n_graphs, dtype=torch.int64, device=graph.z.device).index_add(
        0, graph.batch, torch.ones_like(graph.batch)
    )
