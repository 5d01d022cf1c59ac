"""Graphs: what is in them, from where, and how they are joined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from ffpretrain.datasets.frames import Frame
from ffpretrain.errors import UnsupportedInputError
from ffpretrain.graphs import (
    Graph,
    Sample,
    atoms_per_graph,
    batch_graphs,
    build_graph,
    graph_from_atoms,
    graph_from_frame,
)


def same(a: Graph, b: Graph) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def test_molecule() -> None:
    atoms = molecule("CH3CH2OH")
    graph = graph_from_atoms(atoms, cutoff=2.0)
    assert graph.z.tolist() == atoms.numbers.tolist()
    assert graph.pos.dtype == torch.float64 and torch.equal(graph.pos, torch.tensor(atoms.positions))
    assert not graph.cell.any() and not graph.edge_shift.any() and not graph.batch.any()
    assert graph.n_graphs == 1
    expected = (atoms.get_all_distances() < 2.0) & ~np.eye(len(atoms), dtype=bool)
    neighbor, center = graph.edge_index
    found = np.zeros_like(expected)
    found[center, neighbor] = True
    assert (found == expected).all() and len(center) == expected.sum()


def test_edge_vectors_point_from_centre_to_neighbour_image() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    graph = graph_from_atoms(atoms, cutoff=3.0)
    assert torch.equal(graph.cell[0], torch.tensor(atoms.cell.array))
    neighbor, center = graph.edge_index
    vector = graph.pos[neighbor] + graph.edge_shift - graph.pos[center]
    assert len(vector) == 12
    assert torch.allclose(vector.norm(dim=1), torch.tensor(2.82).double())
    assert (graph.z[neighbor] != graph.z[center]).all()
    # every pair stands there once in each direction
    there = torch.cat([center.unsqueeze(1), neighbor.unsqueeze(1), vector.round(decimals=6) + 0.0], dim=1)
    back = torch.cat([neighbor.unsqueeze(1), center.unsqueeze(1), -vector.round(decimals=6) + 0.0], dim=1)
    assert torch.equal(there.unique(dim=0), back.unique(dim=0)) and len(there.unique(dim=0)) == 12


def test_frame_and_atoms_give_the_same_graph() -> None:
    atoms = bulk("Cu", cubic=True)
    frame = Frame(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=(True, True, True))
    assert same(graph_from_frame(frame, 4.0), graph_from_atoms(atoms, 4.0))
    atoms = molecule("H2O")
    frame = Frame(atoms.numbers, atoms.positions)
    assert same(graph_from_frame(frame, 4.0), graph_from_atoms(atoms, 4.0))


def test_cell_of_a_molecule_in_a_box_is_not_kept() -> None:
    atoms = molecule("H2O", vacuum=5.0)
    assert atoms.cell.rank == 3 and not atoms.pbc.any()
    assert not graph_from_atoms(atoms, 4.0).cell.any()


def test_batch_joins_without_crossing() -> None:
    parts = [graph_from_atoms(a, 3.0) for a in (molecule("H2O"), bulk("Cu"), Atoms("He"), molecule("CH4"))]
    batch = batch_graphs(parts)
    assert batch.n_graphs == 4
    assert atoms_per_graph(batch).tolist() == [3, 1, 1, 5]
    assert batch.batch.tolist() == [0] * 3 + [1] + [2] + [3] * 5
    neighbor, center = batch.edge_index
    assert torch.equal(batch.batch[neighbor], batch.batch[center])
    assert batch.edge_index.shape[1] == sum(g.edge_index.shape[1] for g in parts)
    assert torch.equal(batch.cell[1], parts[1].cell[0])
    start = 5
    last = batch.batch[center] == 3
    assert torch.equal(batch.edge_index[:, last] - start, parts[3].edge_index)


def test_batches_can_be_batched() -> None:
    a, b, c = (graph_from_atoms(molecule(name), 3.0) for name in ("H2O", "NH3", "CH4"))
    assert same(batch_graphs([batch_graphs([a, b]), c]), batch_graphs([a, b, c]))
    assert batch_graphs([a]) is a
    with pytest.raises(UnsupportedInputError, match="empty list"):
        batch_graphs([])


def test_to_casts_only_what_is_real() -> None:
    graph = graph_from_atoms(molecule("H2O"), 3.0).to("cpu", torch.float32)
    assert {graph.pos.dtype, graph.edge_shift.dtype, graph.cell.dtype} == {torch.float32}
    assert {graph.z.dtype, graph.edge_index.dtype, graph.batch.dtype} == {torch.int64}
    sample = Sample(graph, {"energy": torch.zeros(1)}, {"charge": torch.zeros(1)}).to("meta")
    devices = {sample.graph.pos.device, sample.targets["energy"].device, sample.extras["charge"].device}
    assert devices == {torch.device("meta")}


def test_graph_goes_through_export() -> None:
    """The reason why a graph is a NamedTuple of tensors."""

    class Degree(torch.nn.Module):
        def forward(self, graph: Graph) -> torch.Tensor:
            return torch.zeros_like(graph.pos[:, 0]).index_add(
                0, graph.edge_index[1], torch.ones_like(graph.edge_shift[:, 0])
            )

    graph = graph_from_atoms(molecule("CH4"), 1.5)
    exported = torch.export.export(Degree(), (graph,))
    assert exported.module()(graph).tolist() == [4.0, 1.0, 1.0, 1.0, 1.0]


def test_refusals() -> None:
    with pytest.raises(UnsupportedInputError, match="no atoms"):
        graph_from_atoms(Atoms(), 4.0)
    pos = torch.zeros(3, 3, dtype=torch.float64)
    pos[1] = 1.0
    pos[2, 0] = float("nan")
    with pytest.raises(UnsupportedInputError, match="position of atom 2 is not finite"):
        build_graph(torch.tensor([1, 1, 1]), pos, 4.0)
    with pytest.raises(UnsupportedInputError, match="cell vector is zero"):
        graph_from_atoms(Atoms("H", pbc=True), 4.0)
