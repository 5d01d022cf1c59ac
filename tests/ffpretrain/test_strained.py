"""Strained bonds and angles: which are drawn, how far and where; the one-sided loss; that it teaches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.io import write
from torch import Tensor

from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import Graph, Sample, batch_graphs, build_graph, graph_from_atoms
from ffpretrain.molecules import find_bonds
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.base import displaced
from ffpretrain.objectives.strained import (
    CLOSED,
    COMPRESSED,
    STRAINS,
    STRETCHED,
    Strained,
    strain,
    strain_loss,
)
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.potential import Potential
from ffpretrain.recipes import load_recipe
from ffpretrain.testing import crystal
from ffpretrain.training.run import train

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


def only(kind: str, graph: Graph, seed: int = 0) -> Strained:
    return strain(graph, seeded(seed), kinds=[kind])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["stretched-bonds", "compressed-bonds"])
def test_one_bond_of_ethanol_has_another_length_and_the_others_have_not(kind: str, seed: int) -> None:
    graph = graphs("CH3CH2OH")
    strained = only(kind, graph, seed)
    assert bool(strained.valid.all())
    z, before, after = graph.z.numpy(), graph.pos.numpy(), strained.pos.numpy()
    pairs = find_bonds(z, before)[:, :2]
    old, new = (np.linalg.norm(p[pairs[:, 0]] - p[pairs[:, 1]], axis=1) for p in (before, after))
    changed = np.flatnonzero(np.abs(new - old) > 1e-12)
    assert len(changed) == 1
    (bond,) = changed
    if kind == "stretched-bonds":
        assert STRETCHED[0] <= new[bond] / covalent_radii[z[pairs[bond]]].sum() <= STRETCHED[1]
    else:
        assert COMPRESSED[0] >= new[bond] / old[bond] >= COMPRESSED[1]
    moved = np.abs(after - before).max(1) > 0
    assert moved.sum() <= len(z) // 2
    # the way back is the derivative of the positions by the bond's length, towards what it was
    way = strained.back.numpy() * abs(new - old)[bond]
    np.testing.assert_allclose(before - after, way, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(strained.back.numpy()[moved], axis=1), 1)


@pytest.mark.parametrize("seed", range(12))
def test_closing_an_angle_of_ethanol_leaves_every_bond(seed: int) -> None:
    graph = graphs("CH3CH2OH")
    strained = only("closed-angles", graph, seed)
    if not bool(strained.valid.all()):
        assert torch.equal(strained.pos, graph.pos)
        return
    z, before, after = graph.z.numpy(), graph.pos.numpy(), strained.pos.numpy()
    bonds = find_bonds(z, before)[:, :2]
    old, new = (np.linalg.norm(p[bonds[:, 0]] - p[bonds[:, 1]], axis=1) for p in (before, after))
    np.testing.assert_allclose(new, old, atol=1e-12)
    angles = [
        (a, c, b)
        for c in range(len(z))
        for a in range(len(z))
        for b in range(a + 1, len(z))
        if {(min(a, c), max(a, c)), (min(b, c), max(b, c))} <= {tuple(bond) for bond in bonds.tolist()}
    ]
    assert len(angles) == 13

    def degrees(pos: np.ndarray) -> np.ndarray:
        arms = np.array([(pos[a] - pos[c], pos[b] - pos[c]) for a, c, b in angles])
        arms /= np.linalg.norm(arms, axis=-1, keepdims=True)
        return np.degrees(np.arccos((arms[:, 0] * arms[:, 1]).sum(-1)))

    ratio = degrees(after) / degrees(before)
    closed = int(ratio.argmin())
    assert CLOSED[0] >= ratio[closed] >= CLOSED[1]
    a, _, b = angles[closed]
    # the way back parts the pair by 1 Å for each unit, and the rest follows as it turns
    step = 1e-6

    def distance(pos: np.ndarray) -> float:
        return float(np.linalg.norm(pos[a] - pos[b]))

    back = strained.back.numpy()
    slope = (distance(after + step * back) - distance(after - step * back)) / (2 * step)
    assert slope == pytest.approx(1, abs=1e-8)
    lengths = [np.linalg.norm(p[bonds[:, 0]] - p[bonds[:, 1]], axis=1) for p in (after + step * back, after)]
    np.testing.assert_allclose(lengths[0], lengths[1], atol=1e-10)


def test_every_kind_of_bond_is_drawn() -> None:
    graph = graphs("CH3CH2OH")
    sizes = {int(only("stretched-bonds", graph, s).back.any(1).sum()) for s in range(60)}
    assert sizes == {1, 2, 4}  # a hydrogen, the hydroxyl, the methyl group


def test_every_kind_of_angle_is_drawn() -> None:
    graph = graphs("CH3CH2OH")
    found = [only("closed-angles", graph, s) for s in range(80)]
    sizes = {int(each.back.any(1).sum()) for each in found if bool(each.valid.all())}
    # H-C-H: 2, H-C-O: 1 + 2, H-C-C: 1 + 4 or 1 + 5, H-O-C: 1 + 7
    assert {2, 3, 5, 6, 8} <= sizes


def test_every_kind_of_strain_is_drawn() -> None:
    graph = graphs("CH3CH2OH")
    z, before = graph.z.numpy(), graph.pos.numpy()
    bonds = find_bonds(z, before)[:, :2]
    old = np.linalg.norm(before[bonds[:, 0]] - before[bonds[:, 1]], axis=1)
    seen = set()
    for seed in range(40):
        strained = strain(graph, seeded(seed))
        after = strained.pos.numpy()
        change = np.linalg.norm(after[bonds[:, 0]] - after[bonds[:, 1]], axis=1) - old
        if bool(strained.valid.all()):
            seen.add(int(np.sign(np.where(np.abs(change) > 1e-9, change, 0).sum())))
    assert seen == {1, -1, 0}


def test_only_the_hydrogens_of_a_ring_are_moved() -> None:
    graph = graphs("C6H6")
    for kind in STRAINS:
        for seed in range(20):
            strained = only(kind, graph, seed)
            assert graph.z[strained.back.any(1)].tolist() == [1]


def test_a_molecule_without_a_parting_bond_stays_as_it_is() -> None:
    ring = np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]]) * 0.87
    graph = build_graph(torch.tensor([6, 6, 6]), torch.tensor(ring), cutoff=CUTOFF)
    for kind in STRAINS:
        strained = only(kind, graph)
        assert not bool(strained.valid.any())
        assert torch.equal(strained.pos, graph.pos)
        assert not bool(strained.back.any())
        assert float(strain_loss(torch.ones(3, 3), strained, graph.batch, 1.0).sum()) == 0


def test_a_proton_is_not_pushed_onto_its_acceptor() -> None:
    # O-H ... O in a line: stretching O-H would hand the proton over, which may well be downhill
    pos = torch.tensor([[0.0, 0, 0], [0.98, 0, 0], [2.6, 0, 0]], dtype=torch.float64)
    graph = build_graph(torch.tensor([8, 1, 8]), pos, cutoff=CUTOFF)
    # already at the shortest stretch, 1.16 Å, the acceptor is nearer than the 1.455 Å of CONTACT
    for seed in range(10):
        assert not bool(only("stretched-bonds", graph, seed).valid.any())
    pos[2, 0] = 7.6
    away = build_graph(torch.tensor([8, 1, 8]), pos, cutoff=CUTOFF)
    assert all(bool(only("stretched-bonds", away, seed).valid.all()) for seed in range(10))


def test_draws_of_a_structure_do_not_depend_on_its_batch() -> None:
    both = strain(graphs("CH3CH2OH", "C6H6"), seeded(4), torch.tensor([3, 9]))
    # one draw advances the step's generator, so the second half starts from the same state
    alone = strain(graphs("C6H6"), seeded(4), torch.tensor([9]))
    assert torch.equal(both.pos[9:], alone.pos)


def test_a_crystal_is_refused() -> None:
    with pytest.raises(DataError, match="strain_weight"):
        strain(crystal([14, 8], CUTOFF), seeded())


@pytest.mark.parametrize("kind", STRAINS)
def test_the_loss_is_the_shortfall_of_the_slope(kind: str) -> None:
    objective = make()
    graph = graphs("CH3CH2OH", "CH3OH")
    strained = only(kind, graph, 1)
    assert bool(strained.valid.all())

    def energy(by: float) -> Tensor:
        at = strained.pos + by * strained.back
        return objective.network(displaced(graph, at - graph.pos, CUTOFF), stress=False)["energy"].detach()

    step = 1e-4
    slope = (energy(step) - energy(-step)) / (2 * step)
    forces = objective.network(displaced(graph, strained.pos - graph.pos, CUTOFF), stress=False)["forces"]
    for least in (0.01, 1.0, 30.0):
        found = strain_loss(forces, strained, graph.batch, least)
        torch.testing.assert_close(found, (least + slope).clamp_min(0), atol=1e-7, rtol=1e-6)


def test_what_comes_back_strongly_enough_costs_nothing_and_pushes_nothing() -> None:
    back = torch.tensor([[-1.0, 0, 0], [0, 0, 0]])
    strained = Strained(torch.zeros(2, 3), back, torch.tensor([True]))
    forces = torch.tensor([[-1.5, 0.2, 0.0], [1.0, 0, 0]], requires_grad=True)
    loss = strain_loss(forces, strained, torch.zeros(2, dtype=torch.long), 1.0).sum()
    loss.backward()
    assert float(loss.detach()) == 0
    assert forces.grad is not None and not bool(forces.grad.any())
    assert float(strain_loss(forces, strained, torch.zeros(2, dtype=torch.long), 2.0).sum().detach()) == 0.5


@pytest.mark.parametrize("name", ["supervised", "ndem"])
def test_a_weight_of_zero_changes_no_draw(name: str) -> None:
    sample = labelled(graphs("CH3CH2OH", "CH3OH"))
    plain, off = make(name), make(name, strain_weight=0.0, strain_probability=1.0)
    one, other = seeded(2), seeded(2)
    assert torch.equal(plain(sample, one)["loss"], off(sample, other)["loss"])
    assert torch.equal(one.get_state(), other.get_state())


def test_the_term_is_added_with_its_weight() -> None:
    sample = labelled(graphs("CH3CH2OH", "CH3OH"))
    plain = make()(sample, seeded())["loss"]
    terms = make(strain_weight=0.3, strain_force=2.0, strain_probability=1.0)(sample, seeded())
    assert float(terms["strain"]) > 0
    torch.testing.assert_close(terms["loss"], plain + 0.3 * terms["strain"])
    seen = [
        "strain" in make(strain_weight=0.3, strain_probability=0.25)(sample, seeded(s)) for s in range(200)
    ]
    assert 25 <= sum(seen) <= 75


def test_training_teaches_bonds_and_angles_to_come_back() -> None:
    sample = labelled(graphs("CH3CH2OH", "CH3OH"))
    objective = make(strain_weight=1.0, strain_probability=1.0, forces_weight=0.01, energy_weight=0.0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-3)
    generator = seeded()
    short = []
    for _ in range(60):
        optimizer.zero_grad()
        terms = objective(sample, generator)
        terms["loss"].backward()
        optimizer.step()
        short.append(float(terms["strain"].detach()))
    assert sum(short[-10:]) < 0.5 * sum(short[:10])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strain_weight": -1.0}, "strain_weight"),
        ({"strain_weight": 0.1, "strain_force": 0.0}, "strain_force"),
        ({"strain_weight": 0.1, "strain_probability": 0.0}, "strain_probability"),
        ({"strain_weight": 0.1, "strains": []}, "strains"),
        ({"strain_weight": 0.1, "strains": ["bent-bonds"]}, "bent-bonds"),
        ({"strain_weight": 0.1, "strains": "closed-angles"}, "strains"),
        ({"strain_weight": 0.1, "main_head": "direct"}, "main_head"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**options)


def test_periodic_frames_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    frames = []
    for k in range(8):
        atoms = molecule("CH3OH")
        atoms.rattle(0.05, seed=k)
        atoms.set_cell(9 * np.eye(3))
        atoms.pbc = k == 3
        atoms.calc = SinglePointCalculator(atoms, energy=float(k), forces=atoms.positions)
        frames.append(atoms)
    write(tmp_path / "frames.extxyz", frames)
    options = {"strain_weight": 0.1, "strain_probability": 0.01}
    changes = {"data.source": str(tmp_path / "frames.extxyz"), "data.train": 7, "data.val": 1, "data.test": 0}
    recipe = load_recipe("demo-finetune", {**changes, "objective.options": options})
    with pytest.raises(DataError, match=r"is periodic, .*objective\.options\.strain_weight=0"):
        train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
