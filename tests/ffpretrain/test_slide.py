"""Sliced denoising: its energy and noise in closed form, slices, the table of widths, the learned forces."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write
from torch import Tensor, nn

from ffpretrain import units
from ffpretrain.artifacts import read_card
from ffpretrain.backbones import Backbone, Features, create_backbone
from ffpretrain.bat_energy import DAMPING, BATEnergy, springs_of
from ffpretrain.bat_widths import GENERIC, Widths
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph, batch_graphs, graph_from_atoms
from ffpretrain.internal_coordinates import find_terms
from ffpretrain.molecules import MoleculeCache, find_bonds
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.slide import SliDe, solve_slices
from ffpretrain.pairs import Pairs
from ffpretrain.potential import Potential
from ffpretrain.testing import (
    check_batching,
    check_forces,
    check_permutation,
    check_reflection,
    check_rotation,
    check_translation,
    crystal,
    random_rotation,
    randomize,
)
from ffpretrain.training import train
from ffpretrain.training.config import validate_recipe

CUTOFF = 5.0
HEADS = ("vector", "energy-gradient")
#: rotors, a ring, a straight angle
NAMES = ("CH3CH2OH", "C6H6", "CH3CN")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def make(
    head: str = "vector", dtype: torch.dtype = torch.float64, fresh: bool = False, **options: object
) -> SliDe:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("painn", hidden=16, layers=2, rbf=8, cutoff=CUTOFF)
        objective = create_objective("slide", backbone=backbone, head=head, **options)
    if not fresh:
        randomize(objective)
    return objective.to(dtype)  # type: ignore[return-value]


def graphs(*names: str) -> list[Graph]:
    return [graph_from_atoms(molecule(name), CUTOFF) for name in names or NAMES]


def energy_of(graph: Graph, widths: object = None) -> BATEnergy:
    table = Widths(widths)  # type: ignore[arg-type]
    return BATEnergy(graph, MoleculeCache(lambda found: springs_of(table, found))(graph))


def draws(energy: BATEnergy, seed: int = 0) -> list[Tensor]:
    sizes = [springs.terms.size for springs in energy.springs]
    return list(normal(sum(sizes), seed=seed).split(sizes))


class Passing(nn.Module):
    """Stands in for a backbone and hands the graph itself to the head."""

    cutoff, dtype = CUTOFF, torch.float64

    def forward(self, graph: Graph) -> Graph:
        return graph


class Exact(nn.Module):
    """The answer itself: grad E / kT in units of 1 / sigma of a bond."""

    def __init__(self, energy: BATEnergy) -> None:
        super().__init__()
        self.energy = energy

    def __deepcopy__(self, memo: object) -> Exact:
        return self

    def forward(self, graph: Graph) -> Tensor:
        return GENERIC["bond"] * self.energy.gradient(graph.pos)


def planted(energy: BATEnergy, **options: object) -> SliDe:
    objective = make(rebuild_edges=False, **options)
    objective.network.backbone = Passing()  # type: ignore[assignment]
    objective.noise_head = Exact(energy)  # type: ignore[assignment]
    return objective


# ---------------------------------------------------------------- the energy


def test_the_energy_is_that_of_springs_by_ase() -> None:
    clean, noisy = molecule("CH3CH2OH"), molecule("CH3CH2OH")
    noisy.rattle(0.08, seed=4)
    energy = energy_of(graph_from_atoms(clean, CUTOFF))
    terms = find_terms(clean.positions, find_bonds(clean.numbers, clean.positions))
    expected = 0.0
    for a, b in terms.bonds.tolist():
        expected += ((noisy.get_distance(a, b) - clean.get_distance(a, b)) / 0.058) ** 2 / 2
    for row in terms.angles.tolist():
        change = math.radians(noisy.get_angle(*row) - clean.get_angle(*row))
        expected += (change / 0.129) ** 2 / 2
    assert len(terms.torsions) == 12
    for row in terms.torsions.tolist():
        change = (noisy.get_dihedral(*row) - clean.get_dihedral(*row) + 180) % 360 - 180
        # both bonds of ethanol's chain turn
        expected += math.radians(change) ** 2 / 2
    found = energy.energies(torch.from_numpy(noisy.positions))
    assert found.tolist() == [pytest.approx(expected, rel=1e-12)]
    assert energy.energies(energy.clean).tolist() == [0.0]


@pytest.mark.parametrize("name", [*NAMES, "CH3CONH2"])
def test_its_gradient_is_that_by_finite_differences(name: str) -> None:
    energy = energy_of(graphs(name)[0])
    pos = energy.noisy(draws(energy))
    h, gradient = 1e-5, energy.gradient(pos)
    for direction in torch.eye(pos.numel(), dtype=torch.float64).view(-1, *pos.shape):
        slope = (energy.energies(pos + h * direction) - energy.energies(pos - h * direction)) / (2 * h)
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), abs=1e-5)
    # no net force, no net torque
    assert float(gradient.sum(0).norm()) < 1e-9
    assert float(torch.linalg.cross(pos, gradient).sum(0).norm()) < 1e-9
    assert float(gradient.norm()) > 10


@pytest.mark.parametrize("degrees", [10.0, -10.0, 170.0, -170.0])
def test_torsions_count_the_short_way_round(degrees: float) -> None:
    # peroxide with its torsion next to the seam at 180 degrees
    atoms = molecule("H2O2")
    atoms.set_dihedral(2, 0, 1, 3, 178.0, indices=[3])
    turned = atoms.copy()
    turned.set_dihedral(2, 0, 1, 3, 178.0 + degrees, indices=[3])
    energy = energy_of(graph_from_atoms(atoms, CUTOFF))
    found = float(energy.energies(torch.from_numpy(turned.positions)))
    assert found == pytest.approx(math.radians(degrees) ** 2 / 2, rel=1e-9)


def test_the_energy_and_its_gradient_turn_with_the_molecule() -> None:
    graph = batch_graphs(graphs())
    rotation = random_rotation(seeded(6))
    here, there = energy_of(graph), energy_of(graph._replace(pos=graph.pos @ rotation.T + 1.0))
    pos = here.noisy(draws(here))
    turned = there.noisy(draws(there))
    torch.testing.assert_close(here.energies(pos), there.energies(pos @ rotation.T + 1.0))
    torch.testing.assert_close(
        there.gradient(pos @ rotation.T + 1.0), here.gradient(pos) @ rotation.T, rtol=0, atol=1e-8
    )
    # the noise too, but for straight angles, whose components have draws of their own
    bent = graph.batch < 2
    torch.testing.assert_close(turned[bent], (pos @ rotation.T + 1.0)[bent], rtol=0, atol=1e-9)


def test_a_straight_angle_pulls_back_and_is_at_rest_when_straight() -> None:
    atoms = Atoms("OCO", [[0, 0, -1.16], [0, 0, 0], [0, 0, 1.16]])
    energy = energy_of(graph_from_atoms(atoms, CUTOFF))
    assert float(energy.gradient(energy.clean).norm()) < 1e-12
    bent = energy.clean.clone()
    bent[1, 0] = 0.02
    angle = 2 * math.atan2(1.16, 0.02)
    assert float(energy.energies(bent)) == pytest.approx(
        ((math.pi - angle) / 0.129) ** 2 / 2 + 2 * ((math.hypot(1.16, 0.02) - 1.16) / 0.058) ** 2 / 2,
        rel=1e-3,
    )
    assert float(energy.gradient(bent)[1, 0]) > 1


# ---------------------------------------------------------------- the noise


def test_stiff_noise_has_the_covariance_of_the_damped_energy() -> None:
    n = 4000
    energy = energy_of(batch_graphs(graphs("H2O") * n))
    u = (energy.noisy(draws(energy)) - energy.clean).view(n, 9)
    one = energy_of(graphs("H2O")[0])
    hessian = torch.autograd.functional.hessian(lambda x: one.energies(x).sum(), one.clean).view(9, 9)
    inverse = torch.linalg.inv(hessian + DAMPING * torch.eye(9, dtype=torch.float64))
    expected = inverse @ hessian @ inverse
    assert float((u.T @ u / n - expected).norm() / expected.norm()) < 4 / math.sqrt(n)
    # the damping takes little from bonds and angles: nearly the thermal covariance, the pseudo-inverse
    thermal = torch.linalg.pinv(hessian, rtol=1e-9)
    assert float((expected - thermal).norm() / thermal.norm()) < 0.1


def test_rotors_turn_as_far_as_their_torsions_allow() -> None:
    n = 1500
    energy = energy_of(batch_graphs(graphs("C2H6") * n), {"bond": 1e-3, "angle": 1e-3})
    pos = energy.noisy(draws(energy))
    start = molecule("C2H6").get_dihedral(2, 0, 1, 5)
    turns = [
        (Atoms("H8", p.numpy()).get_dihedral(2, 0, 1, 5) - start + 180) % 360 - 180 for p in pos.split(8)
    ]
    # nine torsions with a deviation of 1 rad each
    assert np.std(np.radians(turns)) == pytest.approx(1 / 3, rel=5 / math.sqrt(2 * n))


def test_noise_is_of_the_size_of_the_widths_and_finite_everywhere() -> None:
    energy = energy_of(batch_graphs(graphs(*NAMES, "CH3CONH2", "C4H4O", "C2H2", "H2", "CH4") * 20))
    for angular, most in ((1.0, 2.0), (math.pi / 180, 0.5)):
        pos = energy.noisy(draws(energy), angular)
        change = energy.q.difference(energy.q.values(pos), energy.reference) / energy.widths
        sizes = [len(index) for index in energy.q.index]
        bonds, angles = (part.square().mean() for part in change.split(sizes)[:2])
        assert 0.7 < float(bonds) < 1.2
        assert float(angles) < (0.8 if angular == 1 else 0.05)
        assert float(change.abs().max()) < 6
        assert float((pos - energy.clean).norm(dim=1).max()) < most


# ---------------------------------------------------------------- slices


@pytest.mark.parametrize(("n", "d"), [(9, 9), (30, 9), (128, 63)])
def test_enough_slices_give_the_force_exactly(n: int, d: int) -> None:
    force, directions = normal(d, seed=1), normal(n, d, seed=2)
    torch.testing.assert_close(solve_slices(directions, directions @ force), force, rtol=0, atol=1e-9)


def test_too_few_slices_give_the_shortest_solution_and_noisy_ones_least_squares() -> None:
    directions, slices = normal(5, 12, seed=3), normal(5, seed=4)
    expected = np.linalg.lstsq(directions.numpy(), slices.numpy(), rcond=None)[0]
    np.testing.assert_allclose(solve_slices(directions, slices).numpy(), expected, atol=1e-12)
    directions, slices = normal(30, 12, seed=3), normal(30, seed=4)
    expected = np.linalg.lstsq(directions.numpy(), slices.numpy(), rcond=None)[0]
    np.testing.assert_allclose(solve_slices(directions, slices).numpy(), expected, atol=1e-12)


def caught(objective: SliDe, sample: Sample | Graph, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy positions, drawn directions and the target of one loss."""
    seen: list[Tensor] = []
    spied, target = BATEnergy.slices, objective.target

    def slices(self: BATEnergy, pos: Tensor, directions: Tensor, step: float | None = None) -> Tensor:
        seen.extend([pos, directions])
        return spied(self, pos, directions, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BATEnergy, "slices", slices)
        patch.setattr(objective, "target", lambda *args: seen.append(target(*args)) or seen[-1])
        objective(sample, seeded(seed))
    return seen[0], seen[1], seen[2]


def test_drawn_directions_have_unit_covariance() -> None:
    graph = graphs("H2O")[0]
    _, directions, _ = caught(make(directions=4000), graph)
    v = directions.flatten(1)
    assert v.shape == (4000, 9)
    eye = torch.eye(9, dtype=torch.float64)
    assert float((v.T @ v / 4000 - eye).norm()) < 4 * 9 / math.sqrt(4000)
    assert float(v.mean(0).abs().max()) < 5 / math.sqrt(4000)


def test_the_mean_squared_slice_of_an_error_is_the_error() -> None:
    energy = energy_of(graphs("H2O")[0])
    pos = energy.noisy(draws(energy))
    slices = energy.slices(pos, normal(6000, 3, 3, seed=7)).squeeze(1)
    squared = float(energy.gradient(pos).square().sum())
    assert float(slices.square().mean()) == pytest.approx(squared, rel=5 * math.sqrt(2 / 6000))


def test_few_directions_give_their_share_of_the_force_on_average() -> None:
    graph = batch_graphs(graphs("H2O") * 600)
    pos, directions, target = caught(make(directions=3, angular_noise=0.5), graph)
    force = energy_of(graph).gradient(pos).view(600, 9)
    found = target.view(600, 9)
    # a projection: on the span of three of nine directions
    share = (found * force).sum(1) / force.square().sum(1)
    assert float(share.mean()) == pytest.approx(3 / 9, abs=5 * 0.15 / math.sqrt(600))
    for b in (0, 17):
        expected = np.linalg.lstsq(
            directions[:, 3 * b : 3 * b + 3].flatten(1).numpy(),
            (directions[:, 3 * b : 3 * b + 3].flatten(1) @ force[b]).numpy(),
            rcond=None,
        )[0]
        np.testing.assert_allclose(found[b].numpy(), expected, atol=1e-9)


def test_the_whole_force_enough_slices_and_finite_differences_agree() -> None:
    graph = batch_graphs(graphs("CH3CH2OH", "CH3CN"))
    pos, _, exact = caught(make(directions=40), graph)
    force = energy_of(graph).gradient(pos)
    torch.testing.assert_close(exact, force, rtol=0, atol=1e-8)
    errors = []
    for step in (1e-3, 1e-4):
        found = caught(make(directions=40, derivative="finite-difference", step=step), graph)[2]
        errors.append(float((found - force).norm() / force.norm()))
    assert errors[0] < 0.05
    # a difference of one side: the error is of first order in the step
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.3)
    whole = make(directions=None)(graph, seeded())
    torch.testing.assert_close(make(directions=40)(graph, seeded())["loss"], whole["loss"])


# ---------------------------------------------------------------- the loss and what is learned


def test_the_loss_is_zero_for_the_gradient_and_its_square_for_nothing() -> None:
    graph = batch_graphs(graphs())
    energy = energy_of(graph)
    terms = planted(energy)(graph, seeded())
    assert float(terms["loss"]) < 1e-20
    pos, _, target = caught(planted(energy), graph)
    torch.testing.assert_close(target, energy.gradient(pos), rtol=0, atol=1e-8)
    expected = (0.058 * energy.gradient(pos)).square().mean()
    torch.testing.assert_close(terms["zero"], expected)
    assert 0.5 < float(expected) < 2.5


def test_structures_without_bonds_are_counted_and_teach_rest() -> None:
    apart = Atoms("HeAr", [[0, 0, 0], [0, 0, 4.0]])
    graph = batch_graphs([graph_from_atoms(apart, CUTOFF), *graphs("H2O")])
    terms = make()(graph, seeded())
    assert float(terms["unbonded"]) == 0.5
    alone = make()(graph_from_atoms(apart, CUTOFF), seeded())
    assert float(alone["unbonded"]) == 1.0
    assert float(alone["zero"]) == 0.0


def test_learned_forces_are_minus_kt_times_the_gradient() -> None:
    graph = batch_graphs(graphs())
    energy = energy_of(graph)
    pos = energy.noisy(draws(energy))
    for kT in (None, 0.05):
        forces = planted(energy).potential(kT=kT)(graph._replace(pos=pos))["forces"]
        h, wanted = 1e-5, torch.zeros(9, 3, dtype=torch.float64)
        # by finite differences of kT E, on the first molecule
        for i in range(27):
            step = torch.zeros_like(pos)
            step.view(-1)[i] = h
            slope = (energy.energies(pos + step) - energy.energies(pos - step)).sum() / (2 * h)
            wanted.view(-1)[i] = -(units.KB * 300 if kT is None else kT) * slope
        torch.testing.assert_close(forces[:9], wanted, rtol=0, atol=1e-7)
    # the sizes of the noise are part of the energy: sigma changes nothing
    again = planted(energy).potential(kT=0.05, sigma=0.3)(graph._replace(pos=pos))["forces"]
    assert torch.equal(again, forces)
    with pytest.raises(ConfigError, match="kT=0 must be above zero"):
        planted(energy).potential(kT=0)


def test_a_stretched_bond_pulls_with_the_force_constant_of_a_force_field() -> None:
    graph = graph_from_atoms(Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), CUTOFF)
    kcal = units.energy_unit("kcal/mol")
    field = planted(energy_of(graph)).potential(kT=kcal)
    stretched = graph._replace(pos=graph.pos * (0.75 / 0.74))
    forces = field(stretched)["forces"]
    # 1 kcal/mol / (0.058 Å)^2, close to 300 kcal/mol/Å^2; 0.01 Å too long
    assert float(forces[1, 2]) == pytest.approx(-kcal / 0.058**2 * 0.01, rel=1e-9)
    assert float(forces[0, 2]) == pytest.approx(-float(forces[1, 2]), rel=1e-9)


def test_a_gradient_head_learns_a_conservative_potential() -> None:
    objective = make(head="energy-gradient")
    learned = objective.potential(kT=0.1)
    assert isinstance(learned, Potential)
    graph = graphs("H2O2")[0]
    check_forces(learned, graph)
    wanted = -0.1 / 0.058 * objective.predict(graph).detach()
    torch.testing.assert_close(learned(graph)["forces"].detach(), wanted)


# ---------------------------------------------------------------- symmetry, batches, seeds


@pytest.mark.parametrize("head", HEADS)
def test_predictions_have_the_symmetries_of_vectors(head: str) -> None:
    objective = make(head=head).eval()

    def model(graph: Graph) -> dict[str, Tensor]:
        return {"forces": objective.predict(graph)}

    parts = graphs("CH3CH2OH", "H2O2")
    graph = batch_graphs(parts)
    check_rotation(model, graph, tolerance=1e-10)
    check_reflection(model, graph, tolerance=1e-10)
    check_translation(model, graph, tolerance=1e-9)
    check_permutation(model, graph, tolerance=1e-10)
    check_batching(model, parts, tolerance=1e-10)


@pytest.mark.parametrize("directions", [20, 128, None])
def test_the_loss_of_a_batch_is_the_mean_over_its_atoms_alone(directions: int | None) -> None:
    objective, parts = make(directions=directions), graphs()
    samples = [Sample(g, {}, {"index": torch.tensor([i + 7])}) for i, g in enumerate(parts)]
    whole = Sample(batch_graphs(parts), {}, {"index": torch.tensor([7, 8, 9])})
    counts = atoms_per_graph(whole.graph).double()
    alone = [objective(s, seeded()) for s in samples]
    together = objective(whole, seeded())
    shares = {"n_atoms": torch.tensor(54.0), "n_graphs": torch.tensor(6.0)}
    spread = objective(whole._replace(extras={**whole.extras, **shares}), seeded())
    for name in ("loss", "zero"):
        values = torch.stack([terms[name].detach() for terms in alone])
        torch.testing.assert_close(together[name].detach(), (values * counts).sum() / counts.sum())
        torch.testing.assert_close(spread[name], together[name] * len(whole.graph.z) / 54)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds_decide(dtype: torch.dtype) -> None:
    objective, graph = make(dtype=dtype), batch_graphs(graphs())
    losses = [float(objective(graph, seeded(s))["loss"].detach()) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert not SliDe.needs_labels


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_falls_on_a_fixed_batch(head: str) -> None:
    objective, graph = make(head=head, fresh=True), graphs("H2O")[0]
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(graph, seeded())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


# ---------------------------------------------------------------- the table of widths


def test_widths_by_elements_in_either_direction() -> None:
    table = {
        "bond": {"default": 0.05, "C-H": 0.04},
        "angle": {"H-C-C": 0.2},
        "rotatable_torsion": {"H-O-C-C": 0.7},
        "torsion": 0.3,
    }
    energy = energy_of(graphs("CH3CH2OH")[0], table)
    numbers = molecule("CH3CH2OH").numbers
    sizes = [len(index) for index in energy.q.index]
    bonds, angles, _, torsions = energy.widths.split(sizes)
    for index, width in zip(energy.q.index[0].tolist(), bonds.tolist(), strict=True):
        assert width == (0.04 if sorted(numbers[index]) == [1, 6] else 0.05)
    for index, width in zip(energy.q.index[1].tolist(), angles.tolist(), strict=True):
        assert width == (0.2 if numbers[index].tolist() in ([1, 6, 6], [6, 6, 1]) else 0.129)
    for index, width in zip(energy.q.index[3].tolist(), torsions.tolist(), strict=True):
        assert width == (0.7 if numbers[index].tolist() in ([1, 8, 6, 6], [6, 6, 8, 1]) else 1.0)
    assert sorted(bonds.tolist()).count(0.04) == 5
    # benzene has no bond that turns
    ring = energy_of(graphs("C6H6")[0], table)
    assert set(ring.widths[-24:].tolist()) == {0.3}


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_widths_from_a_file(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"widths.{ending}"
    file.write_text(json.dumps({"bond": {"C-H": 0.04}, "angle": 0.2}))
    objective = make(widths=str(file))
    assert objective.widths.generic == {**GENERIC, "angle": 0.2}
    given = make(widths={"bond": {"C-H": 0.04}, "angle": 0.2})
    graph = graphs("CH3CH2OH")[0]
    assert float(objective(graph, seeded())["zero"]) == float(given(graph, seeded())["zero"])
    assert float(make()(graph, seeded())["zero"]) != float(given(graph, seeded())["zero"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bonds: 0.05", "unknown kind 'bonds'; did you mean 'bond'"),
        ("bond: -1", "bond default = -1 must be a number above zero"),
        ("bond: yes", "bond default = True must be a number"),
        ("bond: {C-H-H: 0.1}", "bond 'C-H-H' does not name 2 elements; write it as H-C"),
        ("torsion: {H-C-Xx-H: 0.1}", "does not name 4 elements; write it as H-C-C-H"),
        ("[1, 2]", "holds no table of widths"),
        ("bond: {", "is no YAML or JSON table"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "widths.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make(widths=str(file))
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        make(widths=str(tmp_path / "absent.yaml"))


def test_training_from_a_file_keeps_the_folder_of_the_table_to_itself(tmp_path: Path) -> None:
    (tmp_path / "widths.yaml").write_text("angle: 0.2")
    frames = [molecule(name) for name in ("H2O", "CH3CH2OH", "C2H2", "CH3CN", "NH3")]
    write(tmp_path / "molecules.xyz", frames, format="extxyz")
    raw = {
        "name": "tiny",
        "objective": {"name": "slide", "options": {"widths": str(tmp_path / "widths.yaml")}},
        "model": {"backbone": {"name": "painn", "options": {"hidden": 8, "layers": 1, "rbf": 4}}},
        "data": {"source": str(tmp_path / "molecules.xyz"), "train": 3, "val": 2},
        "trainer": {"max_steps": 2, "batch_size": 2, "threads": 1, "accelerator": "cpu"},
    }
    card = read_card(train(validate_recipe(raw, "test"), tmp_path / "run"))
    assert card.kind == "field"
    assert card.objective is not None
    assert card.objective.options["widths"] == "widths.yaml"
    assert card.objective.options["directions"] == 128
    assert str(tmp_path) not in card.to_json()


# ---------------------------------------------------------------- what is refused


class Counting(Backbone):
    """A backbone without vectors: a smooth density of neighbours."""

    name: ClassVar[str] = "counting"
    has_vectors: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(CUTOFF, 8, 20, {})
        self.embedding = nn.Embedding(20, 8)

    def encode(self, z: Tensor, pairs: Pairs) -> Features:
        weight = (1 - (pairs.distance / CUTOFF).square()).clamp_min(0).pow(3).unsqueeze(-1)
        return Features(pairs.sum(weight * pairs.neighbor(self.embedding(z))), None)


def test_a_backbone_without_vectors_takes_the_gradient_head_only() -> None:
    with pytest.raises(ConfigError, match=r"slide: head='vector' needs .* which backbone 'counting'"):
        create_objective("slide", backbone=Counting())
    objective = create_objective("slide", backbone=Counting(), head="energy-gradient")
    assert bool(torch.isfinite(objective(batch_graphs(graphs()), seeded())["loss"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 0}, "directions=0; give at least 1"),
        ({"derivative": "numeric"}, "unknown derivative 'numeric'; known: exact, finite-difference"),
        ({"step": 0.0}, "step=0.0 must be above zero"),
        ({"angular_noise": -1.0}, "angular_noise=-1.0 must be above zero"),
        ({"width": 0.1}, "did you mean 'widths'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)  # type: ignore[arg-type]


def test_periodic_structures_are_refused() -> None:
    with pytest.raises(UnsupportedInputError, match="periodic"):
        make()(crystal([6, 1, 8], CUTOFF), seeded())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_loss_of_the_cpu() -> None:
    objective, graph = make(), batch_graphs(graphs())
    here = objective(graph, seeded())["loss"].detach()
    there = objective.cuda()(graph.to("cuda"), seeded())["loss"].detach()
    torch.testing.assert_close(there.cpu(), here, rtol=1e-8, atol=0)
