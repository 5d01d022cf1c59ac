"""Fractional denoising: coordinate denoising within it, what its turns change, its optimum as forces."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from torch import Tensor, nn

from ffpretrain import units
from ffpretrain.backbones import Backbone, Features, create_backbone
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph, batch_graphs, graph_from_atoms
from ffpretrain.molecules import find_bonds
from ffpretrain.noise import FrameGenerators
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.frad import Frad
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

CUTOFF = 5.0
HEADS = ("vector", "energy-gradient")
#: two bonds that turn, one, none
NAMES = ("CH3CH2OH", "CH3CONH2", "C6H6")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(
    name: str = "frad",
    head: str = "vector",
    dtype: torch.dtype = torch.float64,
    fresh: bool = False,
    **options: object,
) -> Frad:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("painn", hidden=16, layers=2, rbf=8, cutoff=CUTOFF)
        objective = create_objective(name, backbone=backbone, head=head, **options)
    if not fresh:
        randomize(objective)
    return objective.to(dtype)  # type: ignore[return-value]


def graphs(*names: str) -> list[Graph]:
    return [graph_from_atoms(molecule(name), CUTOFF) for name in names or NAMES]


def streams(graph: Graph, seed: int = 0) -> FrameGenerators:
    return FrameGenerators(seeded(seed), None, graph.n_graphs)


class Passing(nn.Module):
    """Stands in for a backbone and hands the graph itself to the head."""

    cutoff, dtype = CUTOFF, torch.float64

    def forward(self, graph: Graph) -> Graph:
        return graph


class Zero(nn.Module):
    def forward(self, graph: Graph) -> Tensor:
        return torch.zeros_like(graph.pos)


def planted(head: nn.Module, **options: object) -> Frad:
    """Return the objective with a head that reads the noisy graph."""
    objective = make(rebuild_edges=False, **options)
    objective.network.backbone = Passing()  # type: ignore[assignment]
    objective.noise_head = head  # type: ignore[assignment]
    return objective


# ---------------------------------------------------------------- the two kinds of noise


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_turns_the_loss_is_that_of_coord_bit_for_bit(head: str, dtype: torch.dtype) -> None:
    sample = Sample(batch_graphs(graphs()), {}, {"index": torch.tensor([4, 0, 9])})
    plain = make("coord", head, dtype, sigma=0.1)(sample, seeded(5))
    still = make("frad", head, dtype, sigma=0.1, dihedral_sigma_degrees=0.0)(sample, seeded(5))
    turned = make("frad", head, dtype, sigma=0.1, dihedral_sigma_degrees=20.0)(sample, seeded(5))
    for name in plain:
        assert torch.equal(plain[name], still[name]), name
    assert not torch.equal(plain["loss"], turned["loss"])


def test_the_target_does_not_depend_on_the_turns() -> None:
    graph = batch_graphs(graphs())
    # a prediction of zero leaves the mean square of the target
    losses = [planted(Zero(), dihedral_sigma_degrees=s)(graph, seeded(3))["loss"] for s in (0.0, 2.0, 90.0)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert float(losses[0]) == pytest.approx(1.0, abs=5 * math.sqrt(2 / (3 * len(graph.z))))


def test_turned_structures_keep_their_bond_lengths_and_angles() -> None:
    graph = batch_graphs(graphs())
    turned, plain = make(dihedral_sigma_degrees=60.0).turned(graph, streams(graph))
    assert plain.tolist() == [False, False, True]
    assert torch.equal(turned.pos[graph.batch == 2], graph.pos[graph.batch == 2])
    for b, name in enumerate(NAMES):
        atoms = molecule(name)
        after = Atoms(atoms.numbers, turned.pos[graph.batch == b].numpy())
        bonds = find_bonds(atoms.numbers, atoms.positions)[:, :2].tolist()
        angles = [(i, j, k) for i, j in bonds for k in range(len(atoms)) if [j, k] in bonds]
        for pair in bonds:
            assert after.get_distance(*pair) == pytest.approx(atoms.get_distance(*pair), abs=1e-10)
        for triple in angles:
            assert after.get_angle(*triple) == pytest.approx(atoms.get_angle(*triple), abs=1e-9)
    assert float((turned.pos - graph.pos).norm(dim=1).max()) > 0.3


def test_turns_are_normal_with_the_deviation_in_degrees() -> None:
    n = 400
    graph = batch_graphs(graphs("CH3CONH2") * n)
    turned, _ = make(dihedral_sigma_degrees=3.0).turned(graph, streams(graph))
    # around the amide bond and of the methyl group
    for dihedral in ((0, 1, 2, 4), (0, 1, 3, 5)):
        start = molecule("CH3CONH2").get_dihedral(*dihedral)
        found = [
            (Atoms("H9", pos.numpy()).get_dihedral(*dihedral) - start + 180) % 360 - 180
            for pos in turned.pos.split(9)
        ]
        assert np.std(found) == pytest.approx(3.0, rel=5 / math.sqrt(2 * n))
        assert np.mean(found) == pytest.approx(0.0, abs=5 * 3.0 / math.sqrt(n))


def test_turns_turn_with_the_molecule() -> None:
    graph = batch_graphs(graphs())
    rotation = random_rotation(seeded(8))
    rotated = graph._replace(pos=graph.pos @ rotation.T + 2.0)
    objective = make(dihedral_sigma_degrees=40.0)
    there = objective.turned(rotated, streams(graph))[0].pos
    here = objective.turned(graph, streams(graph))[0].pos
    torch.testing.assert_close(there, here @ rotation.T + 2.0, rtol=0, atol=1e-10)


def test_structures_without_a_bond_to_turn_are_counted() -> None:
    objective, sample = make(), batch_graphs(graphs())
    assert float(objective(sample, seeded())["plain"]) == pytest.approx(1 / 3)
    assert float(objective(graphs("C6H6")[0], seeded())["plain"]) == 1.0
    assert float(objective(graphs("CH3CH2OH")[0], seeded())["plain"]) == 0.0


def test_given_torsions_decide_which_bonds_turn() -> None:
    graph = graphs("CH3CH2OH")[0]
    extras = {"torsions": torch.tensor([[2, 1, 0, 6]]), "n_torsions": torch.tensor([1])}
    objective = make(dihedral_sigma_degrees=50.0)
    turned = objective.turned(Sample(graph, {}, extras), streams(graph))[0]
    before, after = molecule("CH3CH2OH"), Atoms(graph.z.numpy(), turned.pos.numpy())
    changes = [
        abs((after.get_dihedral(*row) - before.get_dihedral(*row) + 180) % 360 - 180)
        for row in ((2, 1, 0, 6), (3, 2, 1, 0))
    ]
    assert changes[0] > 1
    assert changes[1] < 1e-9


# ---------------------------------------------------------------- the optimum


class Linear(nn.Module):
    """``W (x - x0)`` on the coordinates of a whole molecule."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0
        self.weight = nn.Parameter(torch.zeros(x0.numel(), x0.numel(), dtype=torch.float64))

    def offset(self, graph: Graph) -> Tensor:
        return (graph.pos.view(-1, *self.x0.shape) - self.x0).flatten(1)

    def forward(self, graph: Graph) -> Tensor:
        return (self.offset(graph) @ self.weight.T).view(-1, 3)


def peroxide(n: int, kT: float) -> tuple[Sample, Tensor, Tensor, Tensor]:
    """Return n thermal copies of H2O2, its minimum, its covariance and the derivative by its torsion."""
    x0 = torch.from_numpy(molecule("H2O2").positions)
    generator = seeded(2)
    a = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    covariance = kT * torch.linalg.inv(a @ a.T + 20 * torch.eye(12, dtype=torch.float64))
    u = torch.randn(n, 12, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    graph = batch_graphs([graph_from_atoms(molecule("H2O2"), CUTOFF)] * n)
    # atoms: O, O, H on the first, H on the second; the bond between the oxygens turns, one hydrogen moves
    bond = torch.nn.functional.normalize(x0[1] - x0[0], dim=0)
    j = torch.zeros(4, 3, dtype=torch.float64)
    j[3] = torch.linalg.cross(bond, x0[3] - x0[1])
    extras = {"bonds": torch.tensor([[0, 1, 1], [0, 2, 1], [1, 3, 1]] * n), "n_bonds": torch.full((n,), 3)}
    moved = graph._replace(pos=graph.pos + u.view(-1, 3))
    return Sample(moved, {}, extras), x0, covariance, j.flatten()


def test_a_linear_head_learns_a_field_that_is_soft_along_the_torsion() -> None:
    n, kT, tau, degrees = 2000, 0.01, 0.05, 5.0
    sample, x0, covariance, j = peroxide(n, kT)
    head = Linear(x0)
    objective = planted(head, sigma=tau, dihedral_sigma_degrees=degrees)
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, args: seen.append(head.offset(args[0])))
    objective(sample, seeded(3))["loss"].backward()
    # the loss is quadratic in the weights: one step of Newton's method is a whole training
    curvature = 2 * seen[0].T @ seen[0] / (12 * n)
    with torch.no_grad():
        head.weight.copy_(-head.weight.grad @ torch.linalg.inv(curvature))
    s = math.radians(degrees)
    eye = torch.eye(12, dtype=torch.float64)
    smoothed = torch.linalg.inv(tau**2 * eye + s**2 * torch.outer(j, j) + covariance)
    optimum = tau * smoothed
    assert float((head.weight.detach() - optimum).norm() / optimum.norm()) < 4 / math.sqrt(n)
    # without the turns' part the closed form is far off: the test can tell
    isotropic = tau * torch.linalg.inv(tau**2 * eye + covariance)
    assert float((head.weight.detach() - isotropic).norm() / isotropic.norm()) > 7 / math.sqrt(n)
    # read as forces: -kT grad of -log of the density after both noises
    forces = objective.potential(kT=kT)(sample.graph)["forces"].view(n, 12)
    wanted = -kT * head.offset(sample.graph) @ smoothed
    assert float((forces - wanted).norm() / wanted.norm()) < 4 / math.sqrt(n)


@pytest.mark.parametrize("head", HEADS)
def test_forces_have_the_scale_and_sign_of_the_predicted_displacement(head: str) -> None:
    objective, graph = make(head=head, sigma=0.1), batch_graphs(graphs())
    displacement = 0.1 * objective.predict(graph).detach()
    for kT, sigma in ((None, None), (0.1, None), (0.1, 0.2)):
        scale = (units.KB * 300 if kT is None else kT) / (0.1 if sigma is None else sigma) ** 2
        forces = objective.potential(kT=kT, sigma=sigma)(graph)["forces"].detach()
        torch.testing.assert_close(forces, -scale * displacement, rtol=1e-10, atol=1e-12)


def test_a_gradient_head_learns_a_conservative_potential() -> None:
    learned = make(head="energy-gradient").potential(kT=0.1)
    assert isinstance(learned, Potential)
    check_forces(learned, graphs("H2O2")[0])


# ---------------------------------------------------------------- symmetry, batches, seeds


@pytest.mark.parametrize("head", HEADS)
def test_predictions_have_the_symmetries_of_vectors(head: str) -> None:
    objective = make(head=head).eval()

    def model(graph: Graph) -> dict[str, Tensor]:
        return {"forces": objective.predict(graph)}

    graph = batch_graphs(graphs())
    check_rotation(model, graph, tolerance=1e-10)
    check_reflection(model, graph, tolerance=1e-10)
    check_translation(model, graph, tolerance=1e-9)
    check_permutation(model, graph, tolerance=1e-10)
    check_batching(model, graphs(), tolerance=1e-10)


def test_the_loss_of_a_batch_is_the_mean_over_its_atoms_alone() -> None:
    objective, parts = make(dihedral_sigma_degrees=30.0), graphs()
    samples = [Sample(g, {}, {"index": torch.tensor([i + 7])}) for i, g in enumerate(parts)]
    whole = Sample(batch_graphs(parts), {}, {"index": torch.tensor([7, 8, 9])})
    counts = atoms_per_graph(whole.graph).double()
    alone = torch.stack([objective(s, seeded())["loss"].detach() for s in samples])
    together = objective(whole, seeded())
    torch.testing.assert_close(together["loss"].detach(), (alone * counts).sum() / counts.sum())
    # with the global counts of several processes, each contributes its share of the sums
    shares = {"n_atoms": torch.tensor(60.0), "n_graphs": torch.tensor(6.0)}
    spread = objective(whole._replace(extras={**whole.extras, **shares}), seeded())
    torch.testing.assert_close(spread["loss"], together["loss"] * len(whole.graph.z) / 60)
    torch.testing.assert_close(spread["plain"], together["plain"] / 2)


def test_a_bare_graph_is_enough_and_seeds_decide() -> None:
    objective, graph = make(dihedral_sigma_degrees=30.0), batch_graphs(graphs())
    losses = [float(objective(graph, seeded(s))["loss"].detach()) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert not Frad.needs_labels


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_falls_on_a_fixed_batch(head: str) -> None:
    objective, graph = make(head=head, fresh=True), graphs("CH3CH2OH")[0]
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(graph, seeded())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_edges_are_those_of_the_noisy_positions_unless_kept() -> None:
    graph = batch_graphs([graph_from_atoms(molecule("CH3CH2OH"), 2.2)] * 5)
    for rebuild in (True, False):
        seen: list[Graph] = []
        objective = make(rebuild_edges=rebuild, dihedral_sigma_degrees=60.0)
        objective.network.backbone.cutoff = 2.2
        objective.network.backbone.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        objective(graph, seeded())
        assert torch.equal(seen[0].edge_index, graph.edge_index) != rebuild


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
    with pytest.raises(ConfigError, match=r"frad: head='vector' needs .* which backbone 'counting'"):
        create_objective("frad", backbone=Counting())
    objective = create_objective("frad", backbone=Counting(), head="energy-gradient")
    assert bool(torch.isfinite(objective(batch_graphs(graphs()), seeded())["loss"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "frad: sigma=0.0 must be above zero"),
        ({"dihedral_sigma_degrees": -1.0}, "dihedral_sigma_degrees=-1.0 must be finite and not negative"),
        ({"dihedral_sigma_degrees": math.nan}, "dihedral_sigma_degrees=nan"),
        ({"head": "scalar"}, "frad: unknown head 'scalar'"),
        ({"dihedral_sigma": 2.0}, "did you mean 'dihedral_sigma_degrees'"),
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
    objective, graph = make(dihedral_sigma_degrees=30.0), batch_graphs(graphs())
    here = objective(graph, seeded())["loss"].detach()
    there = objective.cuda()(graph.to("cuda"), seeded())["loss"].detach()
    torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=0)
