"""The potential: digits of large energies, forces, stress, modes, and what it refuses."""

from __future__ import annotations

import copy

import ase.units
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from torch import Tensor, nn

from ffpretrain import testing
from ffpretrain.backbones import Backbone, Features, create_backbone
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, batch_graphs, build_graph, graph_from_atoms
from ffpretrain.pairs import Pairs
from ffpretrain.potential import Potential

REFERENCE = {1: -16.457, 6: -1035.711, 8: -2042.935}


def small(**options: object) -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = create_backbone("painn", hidden=8, layers=2, rbf=6, cutoff=4.0, max_z=10)
        return Potential(backbone, **options)  # type: ignore[arg-type]


def aspirin_like(n: int = 21) -> Graph:
    return testing.random_molecule([6, 1, 8], n, 4.0, torch.Generator().manual_seed(0))


class PairSum(Backbone):
    """Lennard-Jones as a backbone of one feature: an analytic oracle for signs, units and volumes."""

    name = "pair-sum"
    has_vectors = False

    def __init__(self, cutoff: float) -> None:
        super().__init__(cutoff, 1, 100, {})
        self.epsilon = nn.Parameter(torch.tensor(0.01, dtype=torch.float64))

    def encode(self, z: Tensor, pairs: Pairs) -> Features:
        inverse = (2.3 / pairs.distance) ** 6
        shift = (2.3 / self.cutoff) ** 6
        pair = 2 * self.epsilon * ((inverse**2 - inverse) - (shift**2 - shift))
        return Features(pairs.sum(pair.unsqueeze(-1)), None)


class Identity(nn.Module):
    def forward(self, features: Features) -> Tensor:
        return features.scalars.squeeze(-1)


def lennard_jones() -> Potential:
    return Potential(PairSum(6.0), Identity()).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "atoms",
    [bulk("Cu", cubic=True), bulk("Cu"), molecule("C2H6"), bulk("Cu", cubic=True).repeat((1, 2, 1))],
)
def test_against_ase(atoms: Atoms) -> None:
    """Energies, per-atom energies, forces and stress have ASE's values, signs and units."""
    atoms = atoms.copy()
    atoms.rattle(0.1, seed=1)
    atoms.calc = LennardJones(epsilon=0.01, sigma=2.3, rc=6.0, smooth=False)
    out = lennard_jones()(graph_from_atoms(atoms, 6.0))
    assert float(out["energy"]) == pytest.approx(atoms.get_potential_energy(), rel=1e-10)
    np.testing.assert_allclose(out["energies"], atoms.get_potential_energies(), rtol=1e-10)
    np.testing.assert_allclose(out["forces"], atoms.get_forces(), atol=1e-10)
    assert ("stress" in out) == bool(atoms.pbc.any())
    if atoms.pbc.any():
        np.testing.assert_allclose(out["stress"][0], atoms.get_stress(voigt=False), atol=1e-12)


def test_differences_of_1e_5_ev_survive_on_large_totals() -> None:
    """An energy of -17,600 eV must not lose the digits that dynamics lives on."""
    potential = small(scale=1e-4, reference_energies=REFERENCE).eval()
    graph = aspirin_like()
    assert potential.dtype == torch.float32
    moved = graph._replace(pos=graph.pos + 0.02 * torch.sin(37 * graph.pos))
    first, second = potential(graph)["energy"], potential(moved)["energy"]
    assert first.dtype == torch.float64
    assert float(first) < -17_600
    difference = float(second - first)
    bare = small(scale=1e-4).eval()
    expected = float(bare(moved)["energy"] - bare(graph)["energy"])
    assert 1e-7 < abs(expected) < 1e-4, "not the case this test is for"
    assert difference == pytest.approx(expected, abs=1e-10)


def test_reference_scale_and_shift_enter_as_documented() -> None:
    bare = small().double().eval()
    full = small(scale=3.0, shift=-5.0, reference_energies=REFERENCE).double().eval()
    graph = batch_graphs([aspirin_like(7), aspirin_like(4)])
    plain, out = bare(graph), full(graph)
    reference = torch.tensor([REFERENCE[int(z)] for z in graph.z], dtype=torch.float64)
    assert torch.allclose(out["energies"], 3 * plain["energies"] + reference, rtol=1e-12)
    total = torch.zeros(2, dtype=torch.float64).index_add(0, graph.batch, out["energies"]) - 5.0
    assert torch.allclose(out["energy"], total, rtol=1e-14)
    assert torch.allclose(out["forces"], 3 * plain["forces"], rtol=1e-12)


def test_casts_keep_scale_shift_and_references_exact() -> None:
    potential = small(scale=0.1, shift=1 / 3, reference_energies=REFERENCE).float().half().double().float()
    for name, value in (("scale", 0.1), ("shift", 1 / 3)):
        tensor = getattr(potential, name)
        assert tensor.dtype == torch.float64 and float(tensor) == value
    assert potential.reference[6] == REFERENCE[6]
    assert potential.dtype == torch.float32
    assert copy.deepcopy(potential).reference[8] == REFERENCE[8]


def test_eval_detaches_and_train_can_be_differentiated() -> None:
    potential, graph = small().eval(), aspirin_like(6)
    assert not any(value.requires_grad for value in potential(graph).values())
    potential.train()
    out = potential(graph)
    out["forces"].square().sum().backward()
    assert all(p.grad is not None for p in potential.backbone.layers[0].parameters())
    with torch.no_grad():
        assert not potential(graph)["forces"].requires_grad
    assert torch.allclose(potential.eval()(graph)["forces"], out["forces"].detach())


def test_forces_in_inference_mode() -> None:
    """Lightning and others evaluate in inference mode, where nothing can be differentiated."""
    potential, graph = small().eval(), aspirin_like(6)
    expected = potential(graph)
    with torch.inference_mode():
        out = potential(graph._replace(pos=graph.pos + 0.0, z=graph.z + 0))
    assert torch.equal(out["forces"], expected["forces"]) and torch.equal(out["energy"], expected["energy"])


def test_energy_only() -> None:
    potential, graph = small().eval(), aspirin_like(6)
    out = potential(graph, forces=False)
    assert set(out) == {"energy", "energies"}
    assert torch.equal(out["energy"], potential(graph)["energy"])
    potential.train()
    potential(graph, forces=False)["energy"].sum().backward()
    assert potential.backbone.embedding.weight.grad is not None


def test_positions_given_with_gradient_stay_in_the_graph() -> None:
    potential, graph = small().double().train(), aspirin_like(4)
    pos = graph.pos.clone().requires_grad_(True)
    out = potential(graph._replace(pos=pos))
    (grad,) = torch.autograd.grad(out["energy"].sum(), pos)
    assert torch.allclose(-grad, out["forces"])


def test_stress_only_where_there_is_a_volume() -> None:
    potential = lennard_jones()
    slab = Atoms("Cu2", [[0, 0, 0], [1.3, 1.3, 1.8]], cell=[2.6, 2.6, 0], pbc=[True, True, False])
    assert "stress" not in potential(graph_from_atoms(slab, 6.0))
    solid = graph_from_atoms(bulk("Cu"), 6.0)
    assert "stress" not in potential(solid, stress=False)
    mixed = potential(batch_graphs([solid, graph_from_atoms(molecule("H2O"), 6.0)]))
    assert torch.allclose(mixed["stress"][0], potential(solid)["stress"][0])
    assert not mixed["stress"][1].any()


def test_pressure_of_an_expanded_crystal_pulls() -> None:
    """Under tension the stress is positive, as in ASE."""
    atoms = bulk("Cu", a=3.9)
    stress = lennard_jones()(graph_from_atoms(atoms, 6.0))["stress"][0]
    assert (stress.diagonal() > 0).all()
    assert stress.diagonal().mean() / ase.units.GPa < 100


def test_unknown_elements_are_named() -> None:
    potential = small(reference_energies=REFERENCE)
    assert potential.elements == [1, 6, 8]
    graph = build_graph(torch.tensor([7, 6, 9]), torch.eye(3, dtype=torch.float64), 4.0)
    with pytest.raises(UnsupportedInputError, match="not trained on N, F; it knows H, C, O"):
        potential(graph)
    for z in (0, -1, 10, 200):
        bad = build_graph(torch.tensor([z]), torch.zeros(1, 3, dtype=torch.float64), 4.0)
        with pytest.raises(UnsupportedInputError, match="not trained on"):
            potential.features(bad)
    assert small(elements=[1, 8]).elements == [1, 8]
    assert small().elements == list(range(1, 10))


@pytest.mark.parametrize("options", [{"elements": [1, 10]}, {"reference_energies": {0: 1.0}}])
def test_elements_without_embedding_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="max_z=10 allows 1 to 9"):
        small(**options)


@pytest.mark.parametrize("name", ["torchmd-et", "painn"])
def test_state_dict_round_trip(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        options = {"hidden": 8, "layers": 1, "rbf": 4, "cutoff": 4.0, "max_z": 10}
        backbones = [create_backbone(name, **options) for _ in range(2)]
    first = Potential(backbones[0], scale=2.0, shift=1.0, reference_energies=REFERENCE).eval()
    second = Potential(backbones[1]).eval()
    second.load_state_dict(first.state_dict())
    graph = aspirin_like(6)
    assert torch.equal(first(graph)["energy"], second(graph)["energy"])
    assert second.elements == first.elements
