"""The kit catches what it is there for: each check fails on a model made wrong in just that way."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ffpretrain import testing
from ffpretrain.backbones import Backbone, Features, create_backbone
from ffpretrain.backbones.radial import cosine_cutoff
from ffpretrain.graphs import Graph
from ffpretrain.pairs import Pairs
from ffpretrain.potential import Potential
from ffpretrain.testing import SymmetryError

CUTOFF = 4.0


class PairPotential(nn.Module):
    """A right potential: a sum over pairs of a smooth function; ``wrong`` adds one fault.

    Args:
        wrong: maps (graph, edge vectors, energies of the atoms) to other energies.
        cut: the cutoff function.
    """

    cutoff = CUTOFF
    dtype = torch.float64

    def __init__(
        self,
        wrong: Callable[[Graph, Tensor, Tensor], Tensor] = lambda graph, vector, atomic: atomic,
        cut: Callable[[Tensor], Tensor] = lambda d: cosine_cutoff(d, CUTOFF),
        force_factor: float = 1.0,
        stress_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.wrong, self.cut = wrong, cut
        self.force_factor, self.stress_factor = force_factor, stress_factor
        self.strength = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        strain = torch.zeros(graph.n_graphs, 3, 3, dtype=torch.float64, requires_grad=True)
        pos = graph.pos if graph.pos.requires_grad else graph.pos.detach().requires_grad_(True)
        deform = torch.eye(3).double() + 0.5 * (strain + strain.transpose(1, 2))
        moved = graph._replace(
            pos=torch.einsum("ni,nij->nj", pos, deform[graph.batch]),
            edge_shift=torch.einsum("ei,eij->ej", graph.edge_shift, deform[graph.batch[graph.edge_index[1]]]),
        )
        neighbor, center = moved.edge_index
        vector = moved.pos[neighbor] + moved.edge_shift - moved.pos[center]
        distance = vector.square().sum(1).sqrt()
        pair = self.strength * (-distance).exp() * self.cut(distance) * graph.z[neighbor] * graph.z[center]
        atomic = torch.zeros(len(graph.z), dtype=torch.float64).index_add(0, center, pair) - graph.z
        atomic = self.wrong(moved, vector, atomic)
        energy = torch.zeros(graph.n_graphs, dtype=torch.float64).index_add(0, graph.batch, atomic)
        grads = torch.autograd.grad(
            energy.sum(), [pos, strain], create_graph=self.training, materialize_grads=True
        )
        out = {"energy": energy, "energies": atomic, "forces": -self.force_factor * grads[0]}
        volume = torch.linalg.det(graph.cell).abs()
        if bool((volume > 0).any()):
            out["stress"] = self.stress_factor * grads[1] / volume.view(-1, 1, 1)
        return out


def spread(graph: Graph, per_edge: Tensor) -> Tensor:
    """Sum a number per edge over each centre."""
    return torch.zeros(len(graph.z), dtype=torch.float64).index_add(0, graph.edge_index[1], per_edge)


def moment(graph: Graph, vector: Tensor, power: int) -> Tensor:
    """A vector for each atom: its neighbours' directions, weighted smoothly; [N, 3]."""
    distance = vector.norm(dim=1, keepdim=True)
    weighted = vector * cosine_cutoff(distance, CUTOFF) / distance**power
    return torch.zeros(len(graph.z), 3, dtype=torch.float64).index_add(0, graph.edge_index[1], weighted)


def handed(graph: Graph, vector: Tensor, atomic: Tensor) -> Tensor:
    """Add a triple product, which changes sign on reflection only."""
    a, b, c = (moment(graph, vector, power) for power in (1, 2, 3))
    return atomic + (torch.linalg.cross(a, b) * c).sum(1)


GENERATOR = torch.Generator().manual_seed(0)
MOLECULE = testing.random_molecule([6, 1, 8], 6, CUTOFF, GENERATOR)
OTHER = testing.random_molecule([6, 1, 8], 4, CUTOFF, GENERATOR)
SOLID = testing.crystal([6, 1, 8], CUTOFF)
SYMMETRY = {
    "rotation": lambda model: testing.check_rotation(model, MOLECULE),
    "reflection": lambda model: testing.check_reflection(model, MOLECULE),
    "translation": lambda model: testing.check_translation(model, MOLECULE),
    "permutation": lambda model: testing.check_permutation(model, MOLECULE),
    "batch independence": lambda model: testing.check_batching(model, [MOLECULE, OTHER]),
    "forces": lambda model: testing.check_forces(model, MOLECULE),
    "smoothness": lambda model: testing.check_smoothness(model, [6, 1, 8]),
    "isolated atoms": lambda model: testing.check_isolated_atoms(model, [6, 1, 8]),
    "size consistency": lambda model: testing.check_size_consistency(model, MOLECULE, OTHER),
    "second derivatives": lambda model: testing.check_second_derivatives(model, MOLECULE),
    "supercell": lambda model: testing.check_supercell(model, SOLID),
    "wrapping": lambda model: testing.check_wrapping(model, SOLID),
    "stress": lambda model: testing.check_stress(model, SOLID),
    "periodic rotation": lambda model: testing.check_rotation(model, SOLID),
}
# fault: (model, what fails; everything else must still pass)
FAULTS: dict[str, tuple[PairPotential, set[str]]] = {
    "none": (PairPotential(), set()),
    "an axis is singled out": (
        PairPotential(lambda g, v, e: e + spread(g, cosine_cutoff(v.norm(dim=1), CUTOFF) * v[:, 0] ** 2)),
        {"rotation", "reflection", "periodic rotation"},
    ),
    "handedness": (PairPotential(handed), {"reflection"}),
    "depends on the place": (
        PairPotential(lambda g, v, e: e + 1e-4 * g.pos.square().sum(1)),
        {"translation", "size consistency", "isolated atoms", "supercell", "wrapping"},
    ),
    "depends on the order": (
        PairPotential(lambda g, v, e: e * torch.arange(1, len(e) + 1) ** 0.01),
        {"permutation", "batch independence", "size consistency", "isolated atoms", "supercell", "forces"}
        | {"stress"},
    ),
    "leaks over the batch": (
        PairPotential(lambda g, v, e: e + 1e-4 * e.mean() ** 2),
        {"batch independence", "size consistency", "isolated atoms", "forces", "stress"},
    ),
    "forces scaled": (PairPotential(force_factor=1.0001), {"forces"}),
    "stress scaled": (PairPotential(stress_factor=1.0001), {"stress"}),
    "energy jumps": (PairPotential(cut=lambda d: (d < CUTOFF).double()), {"smoothness"}),
    "forces jump": (PairPotential(cut=lambda d: (1 - d / CUTOFF).clamp(min=0)), {"smoothness"}),
    "energy per structure": (
        PairPotential(lambda g, v, e: e + 1.0 / torch.bincount(g.batch)[g.batch]),
        {"size consistency", "isolated atoms", "supercell"},
    ),
    "no energy for one element": (
        PairPotential(lambda g, v, e: torch.where(g.z == 1, e * math.nan if len(e) == 1 else e, e)),
        {"isolated atoms"},
    ),
    "not twice differentiable": (
        PairPotential(lambda g, v, e: e + (moment(g, v, 1) * 0.0).norm(dim=1)),
        {"second derivatives"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("check", SYMMETRY)
def test_checks_catch_their_faults_and_only_those(check: str, fault: str) -> None:
    model, failing = FAULTS[fault]
    if check in failing:
        with pytest.raises(SymmetryError, match=check.removeprefix("periodic ")):
            SYMMETRY[check](model)
    else:
        SYMMETRY[check](model)


class Forgetful(Backbone):
    """A backbone with faults that only the checks of layouts and precision can see."""

    name = "forgetful"
    has_vectors = False

    def __init__(self, counts_itself: bool = False, sees_beyond: bool = False, loses: float = 0.0) -> None:
        super().__init__(CUTOFF, 4, 10, {})
        self.counts_itself, self.sees_beyond, self.loses = counts_itself, sees_beyond, loses
        self.embedding = nn.Embedding(10, 4)

    def encode(self, z: Tensor, pairs: Pairs) -> Features:
        reach = 2 * CUTOFF if self.sees_beyond else CUTOFF
        weight = cosine_cutoff(pairs.distance, reach)
        if pairs.other is not None and not self.counts_itself:
            weight = weight * pairs.other
        x = self.embedding(z)
        lost = (x + self.loses) - self.loses
        return Features(lost + pairs.sum(weight.unsqueeze(-1) * pairs.neighbor(x)), None)


LARGE = testing.random_molecule([6, 1, 8], 6, CUTOFF, GENERATOR)
LARGE = LARGE._replace(pos=LARGE.pos * 2)


@pytest.mark.parametrize(
    ("backbone", "failing"),
    [
        (Forgetful(), set()),
        (Forgetful(counts_itself=True), {"layouts"}),
        (Forgetful(sees_beyond=True), {"layouts", "smoothness"}),
        (Forgetful(loses=1e5), {"precision"}),
    ],
)
def test_suite_catches_faults_of_backbones(backbone: Backbone, failing: set[str]) -> None:
    caught = set()
    for name, check in testing.checks(testing.potential_of(backbone)).items():
        try:
            check()
        except SymmetryError:
            caught.add(name)
    assert caught == failing
    if failing:
        with pytest.raises(SymmetryError) as error:
            testing.check_all(backbone)
        assert {line.split(":")[0] for line in str(error.value).splitlines()} == failing


def test_names_are_those_of_the_checks() -> None:
    potential = testing.potential_of(Forgetful())
    assert tuple(testing.checks(potential)) == testing.CHECK_NAMES
    with pytest.raises(KeyError):
        testing.run_check("rotations", Forgetful())


def test_the_kit_changes_no_global_state_and_not_the_backbone() -> None:
    backbone = create_backbone("painn", hidden=8, layers=1, rbf=4, max_z=10)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    testing.run_check("rotation", backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert backbone.dtype == torch.float32


def test_finite_differences_refuse_single_precision() -> None:
    potential = Potential(Forgetful())
    for check in (testing.check_forces, testing.check_stress):
        with pytest.raises(ValueError, match="float64"):
            check(potential, MOLECULE)


def test_a_dead_model_is_caught() -> None:
    with pytest.raises(SymmetryError, match="all forces are zero"):
        testing.check_forces(PairPotential(lambda graph, vector, atomic: 0 * atomic), MOLECULE)


def test_unknown_outputs_need_a_kind() -> None:
    def model(graph: Graph) -> dict[str, Tensor]:
        return {"noise": moment(graph, graph.pos[graph.edge_index[0]] - graph.pos[graph.edge_index[1]], 1)}

    with pytest.raises(KeyError, match="noise"):
        testing.check_rotation(model, MOLECULE)
    testing.check_rotation(model, MOLECULE, kinds={"noise": testing.Kind("atom", "vector")})
    with pytest.raises(SymmetryError, match="noise differs"):
        testing.check_rotation(model, MOLECULE, kinds={"noise": testing.Kind("atom", "scalar")})
