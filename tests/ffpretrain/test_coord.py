"""Coordinate denoising: floors and optima in closed form, symmetry, seeds, the learned field as forces."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from torch import Tensor, nn

from ffpretrain import FFCalculator, units
from ffpretrain.artifacts import load_potential, make_card, save_potential
from ffpretrain.backbones import Backbone, Features, create_backbone
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph, batch_graphs, build_graph
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.coord import Coord
from ffpretrain.objectives.fields import DenoisingField
from ffpretrain.objectives.floors import batch_floor, rigid_body_floor
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
    random_molecule,
    random_rotation,
    randomize,
    symmetric_molecules,
)

CUTOFF = 5.0
HEADS = ("vector", "energy-gradient")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(head: str = "vector", dtype: torch.dtype = torch.float64, **options: object) -> Coord:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=2, heads=2, rbf=8, cutoff=CUTOFF)
        objective = create_objective("coord", backbone=backbone, head=head, **options)
    randomize(objective)
    assert isinstance(objective, Coord)
    return objective.to(dtype)


def molecules() -> list[Graph]:
    generator = seeded(1)
    return [random_molecule([6, 1, 8, 7], n, CUTOFF, generator) for n in (5, 9, 12)]


class Passing(nn.Module):
    """Stands in for a backbone and hands the graph itself to the head."""

    cutoff, dtype = CUTOFF, torch.float64

    def forward(self, graph: Graph) -> Graph:
        return graph


def planted(head: nn.Module, sigma: float) -> Coord:
    """Return the objective with a head that reads the noisy graph."""
    objective = make(sigma=sigma, rebuild_edges=False)
    objective.network.backbone = Passing()  # type: ignore[assignment]
    objective.noise_head = head  # type: ignore[assignment]
    return objective


def copies(graph: Graph, n: int) -> Graph:
    return batch_graphs([graph] * n)


# ---------------------------------------------------------------- closed forms


def test_floor_values() -> None:
    assert rigid_body_floor(9) == pytest.approx(0.2222, abs=5e-5)
    assert rigid_body_floor(12) == pytest.approx(0.1667, abs=5e-5)
    assert rigid_body_floor(21) == pytest.approx(0.0952, abs=5e-5)
    assert rigid_body_floor(3, linear=True) == pytest.approx(5 / 9)
    assert rigid_body_floor(2) == rigid_body_floor(2, linear=True) == pytest.approx(5 / 6)
    assert rigid_body_floor(1) == 1.0
    with pytest.raises(ConfigError, match="n_atoms=0"):
        rigid_body_floor(0)


def test_floor_of_a_batch_counts_the_modes_of_each_structure() -> None:
    shapes = symmetric_molecules([6, 1], CUTOFF)
    modes = {"atom": 3, "diatomic": 5, "linear": 5, "planar": 6, "tetrahedral": 6}
    for name, graph in shapes.items():
        assert float(batch_floor(graph)) == pytest.approx(modes[name] / (3 * len(graph.z))), name
        turned = graph._replace(pos=graph.pos @ random_rotation(seeded()).T + 3.0)
        assert float(batch_floor(turned)) == pytest.approx(modes[name] / (3 * len(graph.z))), name
    together = batch_graphs(list(shapes.values()))
    assert float(batch_floor(together)) == pytest.approx(sum(modes.values()) / (3 * len(together.z)))


def test_floor_of_periodic_structures() -> None:
    solid = crystal([6, 1, 8], CUTOFF)
    assert float(batch_floor(solid)) == pytest.approx(1 / 3)
    wire = solid._replace(cell=solid.cell * torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1))
    assert float(batch_floor(wire)) == pytest.approx(4 / 9)
    slab = solid._replace(cell=solid.cell * torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1))
    assert float(batch_floor(slab)) == pytest.approx(1 / 3)


class Aligner(nn.Module):
    """The best equivariant denoiser of one rigid molecule: what is left after superposition on it."""

    def __init__(self, reference: Tensor) -> None:
        super().__init__()
        self.reference = reference - reference.mean(0)

    def forward(self, graph: Graph) -> Tensor:
        n = len(self.reference)
        noisy = graph.pos.view(-1, n, 3)
        centre = noisy.mean(1, keepdim=True)
        u, _, vh = torch.linalg.svd(self.reference.T @ (noisy - centre))
        vh = torch.cat([vh[:, :2], vh[:, 2:] * torch.linalg.det(u @ vh).view(-1, 1, 1)], dim=1)
        return ((noisy - centre) - self.reference @ (u @ vh)).reshape(-1, 3) / self.sigma


@pytest.mark.parametrize("name", ["random", "planar", "linear"])
def test_the_ideal_equivariant_denoiser_reaches_the_floor(name: str) -> None:
    shapes = {"random": molecules()[1], **symmetric_molecules([6, 1], CUTOFF)}
    graph, sigma, n = shapes[name], 0.005, 2000
    aligner = Aligner(graph.pos)
    aligner.sigma = sigma
    terms = planted(aligner, sigma)(copies(graph, n), seeded())
    modes = 5 if name == "linear" else 6
    per_molecule = float(terms["loss"]) * 3 * len(graph.z)
    # the residual is chi-square with that many degrees of freedom: four standard errors, 1 % for curvature
    assert per_molecule == pytest.approx(modes, abs=4 * math.sqrt(2 * modes / n) + 0.06)
    assert float(terms["floor"]) == pytest.approx(modes / (3 * len(graph.z)))


class Zero(nn.Module):
    def forward(self, graph: Graph) -> Tensor:
        return torch.zeros_like(graph.pos)


@pytest.mark.parametrize("sigma", [0.005, 0.04, 1.0])
def test_predicting_nothing_costs_one_per_component(sigma: float) -> None:
    graph = copies(molecules()[1], 500)
    loss = float(planted(Zero(), sigma)(graph, seeded())["loss"])
    assert loss == pytest.approx(1.0, abs=5 * math.sqrt(2 / (3 * len(graph.z))))


class Linear(nn.Module):
    """``W (x - x0)`` on the coordinates of a whole molecule."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0
        self.weight = nn.Parameter(torch.zeros(x0.numel(), x0.numel(), dtype=torch.float64))

    def forward(self, graph: Graph) -> Tensor:
        u = (graph.pos.view(-1, *self.x0.shape) - self.x0).flatten(1)
        return (u @ self.weight.T).view(-1, 3)


def harmonic_batch(n: int, kT: float) -> tuple[Graph, Tensor, Tensor]:
    """Return n thermal copies of a two-atom harmonic solid, its minimum and its Hessian."""
    generator = seeded(2)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian = a @ a.T + 2 * torch.eye(6, dtype=torch.float64)
    x0 = torch.tensor([[0.0, 0.0, 0.0], [1.1, 0.2, -0.3]], dtype=torch.float64)
    root = torch.linalg.cholesky(kT * torch.linalg.inv(hessian))
    u = torch.randn(n, 6, generator=generator, dtype=torch.float64) @ root.T
    one = build_graph(torch.tensor([6, 8]), x0, CUTOFF)
    graph = copies(one, n)
    return graph._replace(pos=graph.pos + u.view(-1, 3)), x0, hessian


def test_a_linear_head_learns_the_closed_form_on_a_harmonic_potential() -> None:
    n, kT, sigma = 4000, 0.05, 0.1
    graph, x0, hessian = harmonic_batch(n, kT)
    head = Linear(x0)
    objective = planted(head, sigma)
    # the loss is quadratic in the weights: one step of Newton's method is a whole training
    inputs: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, args: inputs.append((args[0].pos.view(n, 2, 3) - x0).flatten(1)))
    objective(graph, seeded(3))["loss"].backward()
    curvature = 2 * inputs[0].T @ inputs[0] / (6 * n)
    with torch.no_grad():
        head.weight.copy_(-head.weight.grad @ torch.linalg.inv(curvature))
    head.weight.grad = None
    loss = objective(graph, seeded(3))["loss"]
    loss.backward()
    assert float(head.weight.grad.abs().max()) < 1e-12
    covariance = kT * torch.linalg.inv(hessian)
    smoothed = torch.linalg.inv(covariance + sigma**2 * torch.eye(6, dtype=torch.float64))
    optimum = sigma * smoothed
    assert float((head.weight.detach() - optimum).norm() / optimum.norm()) < 5 / math.sqrt(n)
    # the loss that remains: tr[sigma^-2 I - (C + sigma^2 I)^-1] in units of sigma^-2, per component
    remains = 1 - sigma**2 * float(smoothed.trace()) / 6
    assert float(loss.detach()) == pytest.approx(remains, rel=5 * math.sqrt(2 / (6 * n)))
    # read as forces: the harmonic force of the smoothed potential, -kT (C + sigma^2)^-1 u
    forces = objective.potential(kT=kT)(graph)["forces"].view(n, 6)
    u = (graph.pos.view(n, 2, 3) - x0).flatten(1)
    wanted = -kT * u @ smoothed
    assert float((forces - wanted).norm() / wanted.norm()) < 5 / math.sqrt(n)


def test_the_optimum_tends_to_the_force_as_the_noise_vanishes() -> None:
    kT = 0.05
    graph, x0, hessian = harmonic_batch(1, kT)
    covariance = kT * torch.linalg.inv(hessian)
    u = (graph.pos - x0).flatten()
    force = -hessian @ u
    errors = []
    for sigma in (1e-1, 1e-2, 1e-3):
        head = Linear(x0)
        with torch.no_grad():
            head.weight.copy_(sigma * torch.linalg.inv(covariance + sigma**2 * torch.eye(6)))
        objective = planted(head, sigma)
        field = objective.potential(kT=kT)
        errors.append(float((field(graph)["forces"].flatten() - force).norm() / force.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


# ---------------------------------------------------------------- symmetry, batches, seeds


@pytest.mark.parametrize("head", HEADS)
def test_predictions_have_the_symmetries_of_vectors(head: str) -> None:
    objective = make(head).eval()

    def model(graph: Graph) -> dict[str, Tensor]:
        return {"forces": objective.predict(graph)}

    graph = batch_graphs(molecules())
    check_rotation(model, graph, tolerance=1e-10)
    check_reflection(model, graph, tolerance=1e-10)
    check_translation(model, graph, tolerance=1e-9)
    check_permutation(model, graph, tolerance=1e-10)
    check_batching(model, molecules(), tolerance=1e-10)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_a_batch_is_the_mean_over_its_atoms_alone(head: str) -> None:
    objective = make(head)
    graphs = molecules()
    samples = [Sample(g, {}, {"index": torch.tensor([i + 7])}) for i, g in enumerate(graphs)]
    whole = Sample(batch_graphs(graphs), {}, {"index": torch.tensor([7, 8, 9])})
    counts = atoms_per_graph(whole.graph).double()
    alone = torch.stack([objective(s, seeded())["loss"].detach() for s in samples])
    together = objective(whole, seeded())
    torch.testing.assert_close(together["loss"].detach(), (alone * counts).sum() / counts.sum())
    # with the global count of several processes, each contributes its share of the sum
    spread = whole._replace(extras={**whole.extras, "n_atoms": torch.tensor(52.0)})
    torch.testing.assert_close(objective(spread, seeded())["loss"], together["loss"] * 26 / 52)


def test_a_bare_graph_is_enough_and_seeds_decide() -> None:
    objective, graph = make(), batch_graphs(molecules())
    losses = [float(objective(graph, seeded(s))["loss"].detach()) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert float(objective(Sample(graph, {}, {}), seeded(0))["loss"].detach()) == losses[0]
    assert not Coord.needs_labels


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_falls_on_a_fixed_batch(head: str) -> None:
    objective, graph = make(head), batch_graphs(molecules())
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        terms = objective(graph, seeded())
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["loss"].detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("rebuild", [True, False])
def test_edges_are_those_of_the_noisy_positions_unless_kept(rebuild: bool) -> None:
    pos = torch.tensor([[0.0, 0.0, 0.0], [CUTOFF - 1e-3, 0.0, 0.0]], dtype=torch.float64)
    graph = copies(build_graph(torch.tensor([6, 8]), pos, CUTOFF), 20)
    seen: list[Graph] = []
    objective = make(rebuild_edges=rebuild, sigma=0.1)
    objective.network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective(graph, seeded())
    vectors = seen[0].pos[seen[0].edge_index[0]] - seen[0].pos[seen[0].edge_index[1]]
    longest = float(vectors.norm(dim=1).max())
    if rebuild:
        assert seen[0].edge_index.shape[1] < graph.edge_index.shape[1]
        assert longest <= CUTOFF
    else:
        assert torch.equal(seen[0].edge_index, graph.edge_index)
        assert longest > CUTOFF


# ---------------------------------------------------------------- backbones and options


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
    with pytest.raises(ConfigError, match="'counting' lacks; set head='energy-gradient'"):
        create_objective("coord", backbone=Counting())
    objective = create_objective("coord", backbone=Counting(), head="energy-gradient")
    terms = objective(batch_graphs(molecules()), seeded())
    terms["loss"].backward()
    gradient = objective.network.backbone.embedding.weight.grad
    assert gradient is not None
    assert bool(torch.isfinite(gradient).all())
    assert bool(gradient.any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"sigma": math.inf}, "sigma=inf"),
        ({"head": "scalar"}, "unknown head 'scalar'"),
        ({"sigm": 0.1}, "did you mean 'sigma'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)  # type: ignore[arg-type]


def test_an_unknown_element_is_refused() -> None:
    objective = create_objective(
        "coord", potential=Potential(Counting(), elements=[1, 6]), head="energy-gradient"
    )
    with pytest.raises(UnsupportedInputError, match="was not trained on N, O"):
        objective(batch_graphs(molecules()), seeded())


def test_the_units_of_a_labelled_potential_drop_out() -> None:
    plain, scaled = make("energy-gradient"), make("energy-gradient")
    with torch.no_grad():
        scaled.network.scale.fill_(27.0)
        scaled.network.reference.fill_(-5000.0)
    graph = batch_graphs(molecules())
    torch.testing.assert_close(plain(graph, seeded())["loss"], scaled(graph, seeded())["loss"])
    one, other = plain.potential(), scaled.potential()
    for key, value in one(graph).items():
        torch.testing.assert_close(value, other(graph)[key])


# ---------------------------------------------------------------- as a potential


@pytest.mark.parametrize("head", HEADS)
def test_the_field_points_against_the_predicted_noise(head: str) -> None:
    objective, graph = make(head, sigma=0.05), batch_graphs(molecules())
    noise = objective.eval().predict(graph).detach()
    field = objective.potential(kT=0.02)
    torch.testing.assert_close(field(graph)["forces"], -(0.02 / 0.05) * noise)
    # another sigma: kT / sigma^2 times the predicted displacement, 0.05 Å times the noise
    wider = objective.potential(kT=0.02, sigma=0.1)
    torch.testing.assert_close(wider(graph)["forces"], -(0.02 / 0.1**2) * 0.05 * noise)
    default = objective.potential()
    torch.testing.assert_close(default(graph)["forces"], -(units.KB * 300 / 0.05) * noise)


def test_a_gradient_head_gives_a_conservative_potential() -> None:
    potential = make("energy-gradient").potential()
    assert isinstance(potential, Potential)
    assert not potential.training
    graph = molecules()[1]
    check_forces(potential, graph)
    check_rotation(potential, graph)


def test_a_vector_head_gives_a_field_without_energy() -> None:
    field = make().potential()
    assert isinstance(field, DenoisingField)
    assert field.conservative is False
    assert field.card is None
    graph = molecules()[1]
    assert list(field(graph)) == ["forces"]
    assert field(graph, forces=False) == {}
    assert not field(graph)["forces"].requires_grad
    assert field.features(graph).scalars.shape == (9, 16)
    with pytest.raises(ConfigError, match="no stress"):
        field(graph, stress=True)
    check_rotation(field, graph)
    check_batching(field, molecules())


@pytest.mark.parametrize("head", HEADS)
def test_the_potential_is_a_copy(head: str) -> None:
    objective, graph = make(head), molecules()[0]
    field = objective.potential()
    before = field(graph)["forces"]
    assert objective.training
    randomize(objective, seed=5)
    assert torch.equal(field(graph)["forces"], before)
    assert not torch.allclose(objective.potential()(graph)["forces"], before)


@pytest.mark.parametrize("arguments", [{"kT": 0.0}, {"kT": -1.0}, {"sigma": 0.0}, {"sigma": math.nan}])
def test_temperature_and_noise_must_be_positive(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be above zero"):
        make().potential(**arguments)


def test_a_potential_can_be_saved(tmp_path: Path) -> None:
    objective, graph = make("energy-gradient"), molecules()[1]
    potential = objective.potential()
    path = save_potential(potential, tmp_path / "denoiser.safetensors", make_card(potential, "denoiser"))
    for key, value in load_potential(path)(graph).items():
        assert torch.equal(value, potential(graph)[key])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_calculator_moves_atoms_on_either_field(dtype: str) -> None:
    graph = molecules()[1]
    atoms = Atoms(numbers=graph.z.numpy(), positions=graph.pos.numpy())
    tolerance = 1e-5 if dtype == "float32" else 1e-12

    field = make().potential()
    atoms.calc = FFCalculator(field, device="cpu", dtype=dtype, on_unfamiliar="ignore")
    wanted = field(graph)["forces"].numpy()
    np.testing.assert_allclose(atoms.get_forces(), wanted, atol=tolerance * np.abs(wanted).max())
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_potential_energy()
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_potential_energy(force_consistent=True)

    potential = make("energy-gradient").potential()
    atoms.calc = FFCalculator(potential, device="cpu", dtype=dtype, on_unfamiliar="ignore")
    assert atoms.get_potential_energy() == pytest.approx(float(potential(graph)["energy"]), rel=1e-4)
    # a committee of a field and a potential has forces, but no energy
    atoms.calc = FFCalculator([field, potential], device="cpu", dtype=dtype, on_unfamiliar="ignore")
    assert atoms.get_forces().shape == (9, 3)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_potential_energy()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("head", HEADS)
def test_a_gpu_gives_the_loss_of_the_cpu(head: str) -> None:
    objective, graph = make(head), batch_graphs(molecules())
    here = objective(graph, seeded())["loss"].detach()
    there = objective.cuda()(graph.to("cuda"), seeded())
    there["loss"].backward()
    torch.testing.assert_close(there["loss"].detach().cpu(), here, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        objective.potential()(graph.to("cuda"))["forces"].cpu(), objective.cpu().potential()(graph)["forces"]
    )
