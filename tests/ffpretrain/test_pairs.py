"""The two layouts of pairs: the same vectors, gathers and sums, and derivatives that are finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffpretrain.graphs import Graph, batch_graphs
from ffpretrain.pairs import DensePairs, EdgeList, PairRows, Pairs
from ffpretrain.testing import crystal, random_molecule, symmetric_molecules

GENERATOR = torch.Generator().manual_seed(0)
CUTOFF = 20.0
BATCH = batch_graphs([random_molecule([6, 1, 8], 5, CUTOFF, GENERATOR) for _ in range(3)])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def message(pairs: Pairs, x: Tensor, y: Tensor) -> Tensor:
    """Something that uses every part of the interface; only parts of it are zero for self-pairs."""
    other = torch.ones_like(pairs.distance) if pairs.other is None else pairs.other
    scalar = pairs.neighbor(x) * pairs.center(y) * (-pairs.distance).exp().unsqueeze(-1)
    vector = scalar.unsqueeze(-2) * pairs.vector.unsqueeze(-1)
    return pairs.sum(scalar) + pairs.sum(vector).sum(1) + pairs.sum(other.unsqueeze(-1) * scalar)


def test_layouts_agree_when_all_atoms_are_neighbours() -> None:
    x, y = draw(15, 4), draw(15, 4)
    dense = message(DensePairs(BATCH.pos, 3), x, y)
    edges = message(EdgeList(BATCH, self_pairs=True), x, y)
    assert torch.allclose(dense, edges, rtol=1e-12)
    without = message(EdgeList(BATCH), x, y)
    assert torch.allclose(without + x * y, edges, rtol=1e-12)


def test_vectors_point_to_the_neighbour_and_reach_images() -> None:
    graph = crystal([6, 1], 4.0)
    pairs = EdgeList(graph)
    neighbor, center = graph.edge_index
    assert torch.equal(pairs.vector, graph.pos[neighbor] + graph.edge_shift - graph.pos[center])
    assert torch.equal(pairs.neighbor(graph.pos), graph.pos[neighbor])
    assert torch.equal(pairs.center(graph.pos), graph.pos[center])
    count = pairs.sum(torch.ones_like(pairs.distance))
    assert torch.equal(count, torch.bincount(center, minlength=3).double())
    dense = DensePairs(BATCH.pos, 3)
    xyz = BATCH.pos.view(3, 5, 3)
    assert torch.equal(dense.vector[1, 2, 4], xyz[1, 4] - xyz[1, 2])


@pytest.mark.parametrize("layout", ["edges", "dense"])
def test_self_pairs(layout: str) -> None:
    graph = BATCH
    pairs: Pairs = DensePairs(graph.pos, 3) if layout == "dense" else EdgeList(graph, self_pairs=True)
    assert pairs.other is not None
    itself = (1 - pairs.other).expand(pairs.distance.shape).bool()
    assert itself.sum() == 15
    assert not pairs.distance[itself].any() and not pairs.vector[itself].any()
    assert (pairs.distance[~itself] > 0).all()


@pytest.mark.parametrize("layout", ["edges", "edges and self", "dense"])
@pytest.mark.parametrize("name", ["atom", "diatomic", "linear", "planar", "tetrahedral"])
def test_third_derivatives_by_position_are_finite(layout: str, name: str) -> None:
    graph: Graph = symmetric_molecules([6, 1], CUTOFF)[name]
    pos = graph.pos.clone().requires_grad_(True)
    graph = graph._replace(pos=pos)
    pairs: Pairs = DensePairs(pos, 1) if layout == "dense" else EdgeList(graph, layout != "edges")
    value = (-pairs.distance.square()).exp().sum() + (0.3 * pairs.distance).sin().sum() + 0 * pos.sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(value, pos, create_graph=True)
        assert torch.isfinite(grad).all()
        value = grad.square().sum() + grad.sum()


def test_differences_are_formed_before_the_cast() -> None:
    """A molecule far from the origin keeps its distances in float32."""
    near = BATCH.pos
    shifted = BATCH._replace(pos=near + 2.0**20)
    exact = EdgeList(BATCH, dtype=torch.float32).distance
    assert torch.allclose(EdgeList(shifted, dtype=torch.float32).distance, exact, rtol=1e-6)
    dense = DensePairs(shifted.pos, 3, torch.float32)
    assert dense.vector.dtype == torch.float32
    assert torch.allclose(dense.distance, DensePairs(near, 3, torch.float32).distance, rtol=1e-6)
    cast_first = shifted._replace(pos=shifted.pos.float(), edge_shift=shifted.edge_shift.float())
    assert not torch.allclose(EdgeList(cast_first).distance, exact, rtol=1e-3)


def test_atoms_without_neighbours_get_zeros() -> None:
    alone = symmetric_molecules([6], CUTOFF)["atom"]
    pairs = EdgeList(alone)
    assert pairs.sum(pairs.neighbor(draw(1, 4))).tolist() == [[0.0] * 4]


def test_functions_of_the_distance_made_once_are_those_made_twice() -> None:
    x, y, weight = draw(15, 4), draw(15, 4), draw(4).requires_grad_(True)

    def energy(pos: Tensor, rows: PairRows | None) -> Tensor:
        pairs = DensePairs(pos, 3, rows=rows)
        assert pairs.radial.shape == ((3, 5, 5) if rows is None else (3, 15))
        filters = pairs.spread((weight * pairs.radial.unsqueeze(-1)).sin())
        assert filters.shape == (3, 5, 5, 4)
        sent = pairs.neighbor(x) * filters * pairs.center(y)
        vector = (sent.unsqueeze(-2) * pairs.vector.unsqueeze(-1)).sum(3)
        return (pairs.sum(sent) + vector.square().sum(-1).sum(2).view(15, 1)).square().sum()

    rows = PairRows.of(5, torch.device("cpu"))
    found, wanted = [], []
    for results, given in ((found, rows), (wanted, None)):
        pos = BATCH.pos.clone().requires_grad_(True)
        value = energy(pos, given)
        (gradient,) = torch.autograd.grad(value, pos, create_graph=True)
        square = gradient.square().sum()
        results += [value, gradient, *torch.autograd.grad(square, (pos, weight))]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("atoms", [1, 2, 5])
def test_spreading_and_collecting_are_adjoint(atoms: int) -> None:
    rows = PairRows.of(atoms, torch.device("cpu"))
    pairs = DensePairs(draw(2 * atoms, 3), 2, rows=rows)
    few = draw(2, atoms * (atoms + 1) // 2, 3).requires_grad_(True)
    assert torch.autograd.gradcheck(pairs.spread, few)
    assert torch.autograd.gradgradcheck(pairs.spread, few)
    assert torch.equal(pairs.spread(pairs.radial), pairs.distance)
