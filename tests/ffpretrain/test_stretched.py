"""Stretched bonds: which are drawn, how far and where; the one-sided loss; that it changes a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.data import covalent_radii
from torch import Tensor

from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import Graph, Sample, batch_graphs, build_graph, graph_from_atoms
from ffpretrain.molecules import find_bonds
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.base import displaced
from ffpretrain.objectives.stretched import (
    LONGEST,
    SHORTEST,
    Stretched,
    stretch_bonds,
    stretch_loss,
)
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.potential import Potential
from ffpretrain.testing import crystal

CUTOFF = 5.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def graphs(*names: str) -> Graph:
    return batch_graphs([graph_from_atoms(molecule(name), CUTOFF) for name in names])


def make(name: str = "supervised", **options: object) -> Supervised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone = create_backbone("torchmd-et", hidden=16, layers=2, heads=2, rbf=8, cutoff=CUTOFF)
        objective = create_objective(name, potential=Potential(backbone, scale=1.3), **options)
    assert isinstance(objective, Supervised)
    return objective.double()


def labelled(graph: Graph) -> Sample:
    generator = seeded(5)
    targets = {
        "energy": torch.randn(graph.n_graphs, generator=generator, dtype=torch.float64),
        "forces": torch.randn(len(graph.z), 3, generator=generator, dtype=torch.float64),
    }
    return Sample(graph, targets, {"index": torch.arange(graph.n_graphs) + 7})


@pytest.mark.parametrize("seed", range(12))
def test_one_bond_of_ethanol_is_longer_and_the_others_are_not(seed: int) -> None:
    graph = graphs("CH3CH2OH")
    stretched = stretch_bonds(graph, seeded(seed))
    assert bool(stretched.valid.all())
    z, before, after = graph.z.numpy(), graph.pos.numpy(), stretched.pos.numpy()
    pairs = find_bonds(z, before)[:, :2]
    old, new = (np.linalg.norm(p[pairs[:, 0]] - p[pairs[:, 1]], axis=1) for p in (before, after))
    longer = np.flatnonzero(np.abs(new - old) > 1e-12)
    assert len(longer) == 1
    ratio = new[longer[0]] / covalent_radii[z[pairs[longer[0]]]].sum()
    assert SHORTEST <= ratio <= LONGEST
    moved = np.abs(after - before).max(1) > 0
    assert moved.sum() <= len(z) // 2
    # the direction is the derivative of the positions by the bond's length
    np.testing.assert_allclose(
        after - before, stretched.direction.numpy() * (new - old)[longer[0]], atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.norm(stretched.direction.numpy()[moved], axis=1), 1)


def test_every_kind_of_bond_is_drawn() -> None:
    graph = graphs("CH3CH2OH")
    sizes = {int(stretch_bonds(graph, seeded(s)).direction.any(1).sum()) for s in range(60)}
    assert sizes == {1, 2, 4}  # a hydrogen, the hydroxyl, the methyl group


def test_only_the_hydrogens_of_a_ring_are_pulled() -> None:
    graph = graphs("C6H6")
    for seed in range(20):
        stretched = stretch_bonds(graph, seeded(seed))
        assert graph.z[stretched.direction.any(1)].tolist() == [1]


def test_a_molecule_without_a_parting_bond_stays_as_it_is() -> None:
    ring = np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]]) * 0.87
    graph = build_graph(torch.tensor([6, 6, 6]), torch.tensor(ring), cutoff=CUTOFF)
    stretched = stretch_bonds(graph, seeded())
    assert not bool(stretched.valid.any())
    assert torch.equal(stretched.pos, graph.pos)
    assert not bool(stretched.direction.any())
    assert float(stretch_loss(torch.ones(3, 3), stretched, graph.batch, 1.0).sum()) == 0


def test_a_proton_is_not_pushed_onto_its_acceptor() -> None:
    # O-H ... O in a line: stretching O-H would hand the proton over, which may well be downhill
    pos = torch.tensor([[0.0, 0, 0], [0.98, 0, 0], [2.6, 0, 0]], dtype=torch.float64)
    graph = build_graph(torch.tensor([8, 1, 8]), pos, cutoff=CUTOFF)
    # already at the shortest stretch, 1.16 Å, the acceptor is nearer than the 1.455 Å of CONTACT
    for seed in range(10):
        assert not bool(stretch_bonds(graph, seeded(seed)).valid.any())
    pos[2, 0] = 7.6
    away = build_graph(torch.tensor([8, 1, 8]), pos, cutoff=CUTOFF)
    assert all(bool(stretch_bonds(away, seeded(seed)).valid.all()) for seed in range(10))


def test_draws_of_a_structure_do_not_depend_on_its_batch() -> None:
    both = stretch_bonds(graphs("CH3CH2OH", "C6H6"), seeded(4), torch.tensor([3, 9]))
    # one draw advances the step's generator, so the second half starts from the same state
    alone = stretch_bonds(graphs("C6H6"), seeded(4), torch.tensor([9]))
    assert torch.equal(both.pos[9:], alone.pos)


def test_a_crystal_is_refused() -> None:
    with pytest.raises(DataError, match="stretch_weight"):
        stretch_bonds(crystal([14, 8], CUTOFF), seeded())


def test_the_loss_is_the_shortfall_of_the_slope() -> None:
    objective = make()
    graph = graphs("CH3CH2OH", "CH3OH")
    stretched = stretch_bonds(graph, seeded(1))

    def energy(by: float) -> Tensor:
        at = stretched.pos + by * stretched.direction
        return objective.network(displaced(graph, at - graph.pos, CUTOFF), stress=False)["energy"].detach()

    step = 1e-4
    slope = (energy(step) - energy(-step)) / (2 * step)
    forces = objective.network(displaced(graph, stretched.pos - graph.pos, CUTOFF), stress=False)["forces"]
    for least in (0.01, 1.0, 30.0):
        found = stretch_loss(forces, stretched, graph.batch, least)
        torch.testing.assert_close(found, (least - slope).clamp_min(0), atol=1e-7, rtol=1e-6)


def test_a_bond_that_pulls_enough_costs_nothing_and_pushes_nothing() -> None:
    direction = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    stretched = Stretched(torch.zeros(2, 3), direction, torch.tensor([True]))
    forces = torch.tensor([[-1.5, 0.2, 0.0], [1.0, 0, 0]], requires_grad=True)
    loss = stretch_loss(forces, stretched, torch.zeros(2, dtype=torch.long), 1.0).sum()
    loss.backward()
    assert float(loss.detach()) == 0
    assert forces.grad is not None and not bool(forces.grad.any())
    assert float(stretch_loss(forces, stretched, torch.zeros(2, dtype=torch.long), 2.0).sum()) == 0.5


@pytest.mark.parametrize("name", ["supervised", "ndem"])
def test_a_weight_of_zero_changes_no_draw(name: str) -> None:
    sample = labelled(graphs("CH3CH2OH", "CH3OH"))
    plain, off = make(name), make(name, stretch_weight=0.0, stretch_probability=1.0)
    one, other = seeded(2), seeded(2)
    assert torch.equal(plain(sample, one)["loss"], off(sample, other)["loss"])
    assert torch.equal(one.get_state(), other.get_state())
    assert plain.recordable and not make(name, stretch_weight=0.1).recordable


def test_the_term_is_added_with_its_weight() -> None:
    sample = labelled(graphs("CH3CH2OH", "CH3OH"))
    plain = make()(sample, seeded())["loss"]
    terms = make(stretch_weight=0.3, stretch_force=2.0, stretch_probability=1.0)(sample, seeded())
    assert float(terms["stretch"]) > 0
    torch.testing.assert_close(terms["loss"], plain + 0.3 * terms["stretch"])
    seen = [
        "stretch" in make(stretch_weight=0.3, stretch_probability=0.25)(sample, seeded(s)) for s in range(200)
    ]
    assert 25 <= sum(seen) <= 75


def test_training_teaches_bonds_to_pull_back() -> None:
    sample = labelled(graphs("CH3CH2OH", "CH3OH"))
    objective = make(stretch_weight=1.0, stretch_probability=1.0, forces_weight=0.01, energy_weight=0.0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-3)
    generator = seeded()
    short = []
    for _ in range(60):
        optimizer.zero_grad()
        terms = objective(sample, generator)
        terms["loss"].backward()
        optimizer.step()
        short.append(float(terms["stretch"].detach()))
    assert sum(short[-10:]) < 0.5 * sum(short[:10])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stretch_weight": -1.0}, "stretch_weight"),
        ({"stretch_weight": 0.1, "stretch_force": 0.0}, "stretch_force"),
        ({"stretch_weight": 0.1, "stretch_probability": 0.0}, "stretch_probability"),
        ({"stretch_weight": 0.1, "main_head": "direct"}, "main_head"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**options)
