"""A model that never saw a label is a potential: scale and sign, model files, ASE, relaxation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read
from ase.optimize import BFGS, FIRE
from torch import Tensor, nn

from ffpretrain import FFCalculator, cli, units
from ffpretrain.artifacts import load_potential, make_card, networks, read_card, save_potential
from ffpretrain.backbones import create_backbone
from ffpretrain.datasets import open_dataset
from ffpretrain.errors import ArtifactError, ConfigError, DataError
from ffpretrain.evaluation import error_table, predict
from ffpretrain.graphs import Graph, batch_graphs, build_graph, graph_from_atoms
from ffpretrain.md import forces_only, simulate
from ffpretrain.objectives import Objective, create_objective, list_objectives, objective_class
from ffpretrain.objectives.fields import DEFAULT_TEMPERATURE, DenoisingField, Learned
from ffpretrain.recipes import load_recipe
from ffpretrain.testing import random_molecule, randomize
from ffpretrain.training import train
from ffpretrain.training.finish import finish
from ffpretrain.training.run import prepare

CUTOFF = 5.0
KT = 0.05
LABEL_FREE = [name for name in list_objectives() if not objective_class(name).needs_labels]
SIZE = {"hidden": 16, "layers": 1, "heads": 2, "rbf": 8, "cutoff": CUTOFF, "max_z": 10}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def make(name: str, **options: object) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = create_objective(name, backbone=create_backbone("torchmd-et", **SIZE), **options)
    randomize(objective)
    return objective


def small() -> Graph:
    return random_molecule([6, 1, 8], 6, CUTOFF, seeded(1))


# ---------------------------------------------------------------- scale and sign: the harmonic oracle


class Passing(nn.Module):
    """Stands in for a backbone and hands the graph itself to the head."""

    cutoff, dtype = CUTOFF, torch.float64

    def forward(self, graph: Graph) -> Graph:
        return graph


class Linear(nn.Module):
    """``W (x - x0)`` on the coordinates of a whole molecule."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0
        self.weight = nn.Parameter(torch.zeros(x0.numel(), x0.numel(), dtype=torch.float64))

    def forward(self, graph: Graph) -> Tensor:
        u = (graph.pos.view(-1, *self.x0.shape) - self.x0).flatten(1)
        return (u @ self.weight.T).view(-1, 3)


class Constant(nn.Module):
    """A noise generator that gives every atom the same sigma."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, graph: Graph) -> Tensor:
        return torch.full_like(graph.pos[:, 0], self.sigma)


def thermal_solid(n: int) -> tuple[Graph, Tensor, Tensor]:
    """Return n thermal copies of a two-atom harmonic solid, its minimum and its Hessian."""
    a = normal(6, 6, seed=2)
    hessian = a @ a.T + 2 * torch.eye(6, dtype=torch.float64)
    x0 = torch.tensor([[0.0, 0.0, 0.0], [1.1, 0.2, -0.3]], dtype=torch.float64)
    u = normal(n, 6, seed=3) @ torch.linalg.cholesky(KT * torch.linalg.inv(hessian)).T
    graph = batch_graphs([build_graph(torch.tensor([6, 8]), x0, CUTOFF)] * n)
    return graph._replace(pos=graph.pos + u.view(-1, 3)), x0, hessian


def learn_exactly(parameter: nn.Parameter, loss: Callable[[], Tensor]) -> None:
    """Set a parameter to the minimum of a loss that is quadratic in it: one step of Newton's method."""

    def gradient(value: Tensor) -> Tensor:
        with torch.no_grad():
            parameter.copy_(value.view_as(parameter))
        return torch.autograd.grad(loss(), parameter)[0].flatten()

    unit = torch.eye(parameter.numel(), dtype=torch.float64)
    start = gradient(torch.zeros(parameter.numel(), dtype=torch.float64))
    curvature = torch.stack([gradient(row) - start for row in unit])
    minimum = -torch.linalg.solve(curvature, start)
    assert float(gradient(minimum).abs().max()) < 1e-9
    # what stays in the parameter is the minimum, where the gradient was taken last


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coord", {"sigma": 0.1}),
        ("georecon", {"sigma": 0.1, "clean_weight": 0.0, "rec_weight": 0.0}),
        ("georecon", {"sigma": 0.1, "clean_weight": 0.0, "rec_weight": 0.0, "normalize": False}),
        ("denoisevae", {"prior_sigma": 0.1}),
    ],
)
def test_the_trained_field_is_the_smoothed_force_of_the_potential(
    name: str, options: dict[str, object]
) -> None:
    n, sigma = 2000, 0.1
    graph, x0, hessian = thermal_solid(n)
    objective = make(name, **options, rebuild_edges=False).double()
    objective.network.backbone = Passing()  # type: ignore[assignment]
    objective.noise_head = head = Linear(x0)
    objective.noise_generator = Constant(sigma)
    objective.reconstruct = lambda *_: torch.zeros(1, 3, dtype=torch.float64)
    learn_exactly(head.weight, lambda: objective(graph, seeded(4))["loss"])
    # METHODS 1.2: -grad of the energy of exp(-E/kT) smoothed by sigma is -kT (C + sigma^2)^-1 u
    u = (graph.pos.view(n, 2, 3) - x0).flatten(1)
    covariance = KT * torch.linalg.inv(hessian)
    wanted = -KT * u @ torch.linalg.inv(covariance + sigma**2 * torch.eye(6, dtype=torch.float64))
    forces = objective.potential(kT=KT)(graph)["forces"].view(n, 6)
    assert float((forces - wanted).norm() / wanted.norm()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("name", ["coord", "georecon", "denoisevae"])
def test_the_smoothed_force_tends_to_the_force_as_the_noise_vanishes(name: str) -> None:
    graph, x0, hessian = thermal_solid(20)
    u = (graph.pos.view(-1, 2, 3) - x0).flatten(1)
    covariance, force = KT * torch.linalg.inv(hessian), -u @ hessian
    errors = []
    for sigma in (0.1, 0.01, 0.001):
        smoothed = torch.linalg.inv(covariance + sigma**2 * torch.eye(6, dtype=torch.float64))
        options = {"prior_sigma": sigma} if name == "denoisevae" else {"sigma": sigma}
        objective = make(name, **options).double()
        objective.network.backbone = Passing()  # type: ignore[assignment]
        objective.noise_head = head = Linear(x0)
        # the noise over sigma for those who predict noise, sigma times the score for the one who does not
        sign = -1.0 if name == "denoisevae" else 1.0
        with torch.no_grad():
            head.weight.copy_(sign * sigma * smoothed)
        found = objective.potential(kT=KT)(graph)["forces"].view(-1, 6)
        errors.append(float((found - force).norm() / force.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def thermal_pair(n: int, rest: float, spread: float) -> Graph:
    """Return n diatomic molecules whose distances are normally distributed."""
    gaps = rest + spread * normal(n, seed=5)
    pos = torch.zeros(2 * n, 3, dtype=torch.float64)
    pos[1::2, 0] = gaps
    one = build_graph(torch.tensor([6, 8]), torch.tensor([[0.0, 0, 0], [rest, 0, 0]]).double(), CUTOFF)
    return batch_graphs([one] * n)._replace(pos=pos)


class DistanceSlope(nn.Module):
    """Scores a distance by ``a (d - rest)``."""

    def __init__(self, rest: float) -> None:
        super().__init__()
        self.rest, self.slope = rest, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, distance: Tensor, scalars: Tensor, pairs: Tensor) -> Tensor:
        return self.slope * (distance - self.rest)


def test_the_trained_distance_scores_are_the_smoothed_force_of_a_bond() -> None:
    n, rest, stiffness, level = 2000, 1.5, 5.0, 0.1
    graph = thermal_pair(n, rest, math.sqrt(KT / stiffness))
    objective = make("se3-ddm", sigma_max=level, sigma_min=level, levels=1, rebuild_edges=False).double()
    # the head does not look at the other view's features
    objective.network.features = objective.network.backbone.forward = lambda g: Scalars(g)
    objective.score_clean = head = DistanceSlope(rest)
    objective.score_noisy = DistanceSlope(rest)
    learn_exactly(head.slope, lambda: objective(graph, seeded(6))["clean"])
    field = objective.potential(kT=KT, sigma=level)
    field.features = lambda g: Scalars(g)  # type: ignore[method-assign, assignment]
    forces = field(graph)["forces"].view(n, 2, 3)
    gaps = graph.pos[1::2, 0]
    wanted = -KT / (KT / stiffness + level**2) * (gaps - rest)
    torch.testing.assert_close(forces[:, 0], -forces[:, 1])
    assert not bool(forces[:, :, 1:].any())
    assert float((forces[:, 1, 0] - wanted).norm() / wanted.norm()) < 5 / math.sqrt(n)


class Scalars:
    def __init__(self, graph: Graph) -> None:
        self.scalars, self.vectors = graph.pos, None


class PairEnergy(nn.Module):
    """``a (d - rest)^2 / 2`` of diatomic molecules, in place of a pooled energy."""

    def __init__(self, rest: float) -> None:
        super().__init__()
        self.rest, self.slope = rest, nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.shape = 2.1  # of two atoms it is 1 whatever is said

    def pool(self, features: object, graph: Graph) -> Tensor:
        return torch.zeros(graph.n_graphs, SIZE["hidden"], dtype=torch.float64)

    def forward(self, network: object, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        vector = graph.pos[1::2] - graph.pos[::2]
        gap = vector.norm(dim=1, keepdim=True)
        pull = self.slope * (gap - self.rest) * vector / gap
        energy = 0.5 * self.slope * (gap - self.rest).square().squeeze(1)
        return self.pool(None, graph), energy, torch.stack([pull, -pull], 1).reshape(-1, 3)


def test_the_trained_riemannian_force_of_a_bond_is_its_smoothed_force() -> None:
    # the target is sigma S / alpha, for two atoms exactly -(d~ - d) / sigma along the bond, twice the score;
    # noise along it has a variance of 2 sigma^2
    n, rest, stiffness, level = 400, 1.5, 5.0, 0.05
    graph = thermal_pair(n, rest, math.sqrt(KT / stiffness))
    objective = make("3d-emgp", sigma_max=level, sigma_min=level, levels=1, inp_weight=0.0).double()
    objective.energy_head = head = PairEnergy(rest)  # type: ignore[assignment]
    learn_exactly(head.slope, lambda: objective(graph, seeded(7))["efp"])
    forces = objective.potential(kT=KT, sigma=level)(graph)["forces"].view(n, 2, 3)
    wanted = -KT / (KT / stiffness + 2 * level**2) * (graph.pos[1::2, 0] - rest)
    assert float((forces[:, 1, 0] - wanted).norm() / wanted.norm()) < 5 / math.sqrt(n)


class LinearForce(nn.Module):
    """Forces ``W (x - x0)`` of a whole molecule in place of a pooled energy; W is symmetric in the end."""

    def __init__(self, x0: Tensor, shape: float | None) -> None:
        super().__init__()
        self.linear, self.shape = Linear(x0), shape

    def pool(self, features: object, graph: Graph) -> Tensor:
        return torch.zeros(graph.n_graphs, SIZE["hidden"], dtype=torch.float64)

    def forward(self, network: object, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        return self.pool(None, graph), graph.pos.new_zeros(graph.n_graphs), self.linear(graph)


@pytest.mark.parametrize("target", ["riemann", "gaussian"])
def test_trained_forces_of_3d_emgp_are_the_smoothed_forces_of_a_molecule(target: str) -> None:
    # five atoms that swing alike in all directions, by little, so that the target is linear
    n, sigma, spread = 1500, 0.01, 0.01
    x0 = normal(5, 3, seed=8)
    x0 = x0 - x0.mean(0)
    moments = x0.T @ x0
    shape = float(moments.trace() ** 2 / moments.square().sum())
    one = build_graph(torch.tensor([6, 1, 1, 8, 7]), x0, CUTOFF)
    graph = batch_graphs([one] * n)
    graph = graph._replace(pos=graph.pos + spread * normal(5 * n, 3, seed=9))
    objective = make(
        "3d-emgp", sigma_max=sigma, sigma_min=sigma, levels=1, inp_weight=0.0, target=target, shape=shape
    ).double()
    objective.energy_head = head = LinearForce(x0, objective.energy_head.shape)  # type: ignore[assignment]
    # the loss is quadratic: from zero, half a Newton step with the second moments of the noisy structures
    weight = head.linear.weight
    noisy, _ = objective.draw(graph, seeded(10))
    seen = (noisy.pos.view(n, 5, 3) - x0).flatten(1)
    slope = torch.autograd.grad(objective(graph, seeded(10))["efp"], weight)[0]
    with torch.no_grad():
        weight.copy_(-0.5 * slope @ torch.linalg.inv(seen.T @ seen / n))
    left = torch.autograd.grad(objective(graph, seeded(10))["efp"], weight)[0]
    assert float(left.norm()) < 1e-9 * float(slope.norm())
    forces = objective.potential(kT=KT, sigma=sigma)(graph)["forces"].flatten()
    u = (graph.pos.view(n, 5, 3) - x0).flatten()
    # METHODS 1.2 with C = spread^2; a change of direction alone is seen by the plain score only
    wanted = -KT / (spread**2 + sigma**2) * u
    if target == "gaussian":
        assert float((forces - wanted).norm() / wanted.norm()) < 15 / math.sqrt(n)
    # the least-squares multiple: 1 in both cases, though the Riemannian field has other directions
    assert float(forces @ wanted / (forces @ forces)) == pytest.approx(1.0, abs=0.03)
    cosine = float(forces @ wanted / (forces.norm() * wanted.norm()))
    assert 0.6 < cosine < 0.95 if target == "riemann" else cosine > 0.99


def test_every_label_free_objective_scales_with_the_temperature() -> None:
    for name in LABEL_FREE:
        objective, graph = make(name).double(), small()
        cold, hot = (objective.potential(kT=kT)(graph)["forces"] for kT in (0.01, 0.03))
        torch.testing.assert_close(hot, 3 * cold)
        room = objective.potential()(graph)["forces"]
        torch.testing.assert_close(room, cold * (units.KB * DEFAULT_TEMPERATURE / 0.01))


# ---------------------------------------------------------------- model files


@pytest.mark.parametrize("name", LABEL_FREE)
def test_what_is_learned_without_labels_survives_a_file(name: str, tmp_path: Path) -> None:
    model, graph = make(name).potential(kT=0.02), small()
    path = save_potential(model, tmp_path / "m.safetensors", make_card(model, "m", temperature=232.0))
    card, loaded = read_card(path), load_potential(path)
    assert type(loaded) is type(model)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert (card.kind == "field") is (not loaded.conservative)
    assert (card.force_scale is None) is loaded.conservative
    for key, value in model(graph).items():
        assert torch.equal(loaded(graph)[key], value), key
    assert loaded.card == card
    again = save_potential(load_potential(path, dtype="float32"), tmp_path / "again.safetensors", card)
    assert again.read_bytes() == path.read_bytes()
    torch.testing.assert_close(
        load_potential(path, dtype="float64")(graph)["forces"], model.double()(graph)["forces"]
    )


def test_fields_name_what_they_are_made_of(tmp_path: Path) -> None:
    heads = {"coord": "vector", "3d-emgp": "pooled-energy", "se3-ddm": "distance-score"}
    for name, head in heads.items():
        model = make(name).potential()
        assert isinstance(model, Learned)
        card = make_card(model, "m")
        assert card.head.name == head
        factor = card.energy_scale if model.conservative else card.force_scale
        assert factor == float(model.factor)
    field = make("coord").potential()
    with pytest.raises(ArtifactError, match="kind is taken from the potential"):
        make_card(field, "m", kind="potential")
    field.head = nn.Identity()
    with pytest.raises(ArtifactError, match="a Identity cannot be saved; known heads: vector"):
        make_card(field, "m")
    mine = type("Mine", (DenoisingField,), {})(make("coord").network, make("coord").noise_head, 1.0)
    with pytest.raises(ArtifactError, match="not Mine"):
        make_card(mine, "m")


def test_the_factor_stays_exact_in_float32() -> None:
    field = make("coord").potential(kT=1 / 3)
    assert field.factor.dtype == torch.float64
    assert float(field.float().factor) == 1 / 3 / 0.04


# ---------------------------------------------------------------- from a recipe to ASE, no label seen


@pytest.fixture(scope="module")
def field_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model file of a second of pretraining on the bundled geometries."""
    recipe = load_recipe(
        "demo-pretrain",
        {
            "model.backbone": {"name": "torchmd-et", "options": SIZE},
            "data.train": 200,
            "data.val": 20,
            "trainer.max_steps": 120,
            "trainer.val_every_steps": 60,
            "trainer.ema_decay": 0.9,
            "schedule.warmup_steps": 10,
            "optimizer.lr": 5e-3,
        },
    )
    return train(recipe, tmp_path_factory.mktemp("field") / "run", progress=False)


def test_a_pretrained_file_gives_forces_and_says_why_there_is_no_energy(field_file: Path) -> None:
    card = read_card(field_file)
    assert (card.kind, card.temperature) == ("field", 500.0)
    assert card.reference_geometry is not None
    atoms = card.reference_geometry.to_atoms()
    atoms.calc = FFCalculator(field_file, device="cpu", dtype="float64")
    graph = graph_from_atoms(atoms, CUTOFF)
    np.testing.assert_allclose(
        atoms.get_forces(), load_potential(field_file, dtype="float64")(graph)["forces"].numpy(), atol=1e-12
    )
    for get in (atoms.get_potential_energy, atoms.get_potential_energies, atoms.get_stress):
        with pytest.raises(PropertyNotImplementedError, match=r"no gradient of an energy.*forces_only"):
            get()
    with pytest.raises(PropertyNotImplementedError, match="no gradient of an energy"):
        atoms.get_potential_energy(force_consistent=True)
    assert atoms.calc.implemented_properties == ["forces"]


@pytest.mark.parametrize("name", LABEL_FREE)
def test_every_label_free_run_ends_in_a_model_for_ase(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(
        "demo-pretrain",
        {
            "objective": {"name": name, "options": {}},
            "model.backbone": {"name": "torchmd-et", "options": {**SIZE, "hidden": 8}},
            "data.train": 6,
            "data.val": 2,
            "trainer.max_steps": 2,
            "trainer.val_every_steps": 1,
            "trainer.batch_size": 2,
            "schedule.warmup_steps": 1,
        },
    )
    path = train(recipe, tmp_path / "run", progress=False)
    card = read_card(path)
    assert card.kind in ("field", "potential")
    assert (card.temperature, card.level_of_theory) == (500.0, None)
    assert card.reference_geometry is not None
    atoms = card.reference_geometry.to_atoms()
    atoms.calc = FFCalculator(path, device="cpu")
    assert bool(np.isfinite(atoms.get_forces()).all())
    assert bool(atoms.get_forces().any())


def test_the_pooled_potential_has_an_energy(tmp_path: Path) -> None:
    model, graph = make("3d-emgp").potential(), small()
    path = save_potential(model, tmp_path / "m.safetensors", make_card(model, "m"))
    atoms = Atoms(numbers=graph.z.numpy(), positions=graph.pos.numpy())
    atoms.calc = FFCalculator(path, device="cpu", dtype="float64")
    assert atoms.get_potential_energy() == pytest.approx(float(model.double()(graph)["energy"]), rel=1e-9)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_potential_energies()


def test_forces_of_a_field_are_compared_and_its_energy_is_not(field_file: Path) -> None:
    frames = open_dataset("ethanol-gfn2")[:20]
    field = load_potential(field_file)
    predictions = predict(field, frames)
    assert predictions.energy is None and predictions.energy_label is None
    errors = error_table(predictions)
    assert "energy_mae" not in errors
    wanted = np.abs(predictions.forces - predictions.forces_label).mean()
    assert errors["forces_mae"].value == pytest.approx(wanted)
    # a second of training already points along the forces: well above what chance gives 540 numbers
    assert np.corrcoef(predictions.forces.ravel(), predictions.forces_label.ravel())[0, 1] > 0.3

    class Energies:
        metadata = frames.metadata

        def __len__(self) -> int:
            return len(frames)

        def __getitem__(self, i: int) -> object:
            return frames[i].__class__(**{**vars(frames[i]), "forces": None})

    with pytest.raises(DataError, match=r"has no energy and .* has no forces"):
        predict(field, Energies())  # type: ignore[arg-type]


def test_dynamics_are_refused_in_one_line(
    field_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ensemble in ("nve", "nvt-langevin"):
        with pytest.raises(ConfigError, match="no gradient conserve nothing"):
            simulate(None, str(field_file), ensemble=ensemble, steps=2, out=tmp_path / "run", device="cpu")
    with pytest.raises(SystemExit) as caught:
        cli.main(["md", str(field_file), "--steps", "2", "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "has no energy, so there are no dynamics" in said
    assert not (tmp_path / "run").exists()


def test_a_model_of_a_class_that_no_file_holds_gives_its_network(
    field_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "_LEARNED", {})
    run = field_file.parent
    recipe = load_recipe(str(run / "recipe.yaml"), {})
    target = tmp_path / "run"
    (target / "checkpoints").mkdir(parents=True)
    for file in (run / "checkpoints").iterdir():
        (target / "checkpoints" / file.name).write_bytes(file.read_bytes())
    card = read_card(finish(prepare(recipe), target))
    assert (card.kind, card.head.name, card.temperature) == ("pretrained", "energy", None)
    with pytest.raises(ArtifactError, match="fine-tune it first"):
        load_potential(target / "model.safetensors")


# ---------------------------------------------------------------- relaxing a molecule


def rms_distance_error(atoms: Atoms, minimum: Atoms) -> float:
    """Return how far the interatomic distances are from those of the minimum, Å."""
    return float(np.sqrt(np.mean((atoms.get_all_distances() - minimum.get_all_distances()) ** 2)))


@pytest.fixture(scope="module")
def water_field() -> tuple[DenoisingField, Atoms]:
    """A field pretrained for a second on thermal copies of a harmonic water molecule, and its minimum."""
    minimum = molecule("H2O")
    clean = graph_from_atoms(minimum, CUTOFF)
    batch = batch_graphs([clean] * 64)
    objective = make("coord", sigma=0.1, rebuild_edges=False)
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    for step in range(150):
        thermal = batch._replace(pos=batch.pos + 0.02 * normal(len(batch.z), 3, seed=step))
        optimizer.zero_grad()
        objective(thermal, seeded(step))["loss"].backward()
        optimizer.step()
    return objective.potential(kT=0.1), minimum


@pytest.mark.parametrize("optimizer", [FIRE, BFGS])
def test_a_distorted_molecule_relaxes_to_the_minimum(
    optimizer: type, water_field: tuple[DenoisingField, Atoms], tmp_path: Path
) -> None:
    field, minimum = water_field
    path = save_potential(field, tmp_path / "water.safetensors", make_card(field, "water"))
    for seed in range(3):
        atoms = minimum.copy()
        atoms.rattle(0.08, seed=seed)
        before = rms_distance_error(atoms, minimum)
        atoms.calc = FFCalculator(path, device="cpu", dtype="float64")
        log = tmp_path / "log"
        dynamics = optimizer(forces_only(atoms), logfile=str(log), trajectory=str(tmp_path / "t.traj"))
        assert dynamics.run(fmax=0.02, steps=150)
        assert rms_distance_error(atoms, minimum) < 0.4 * before
        assert "nan" in log.read_text().splitlines()[-1]
        last = read(tmp_path / "t.traj@-1")
        np.testing.assert_allclose(last.get_forces(), atoms.get_forces())


def test_optimisers_are_told_to_go_without_the_energy(water_field: tuple[DenoisingField, Atoms]) -> None:
    field, minimum = water_field
    atoms = minimum.copy()
    atoms.calc = FFCalculator(field, device="cpu")
    with pytest.raises(PropertyNotImplementedError, match=r"FIRE\(ffpretrain.md.forces_only\(atoms\)\)"):
        FIRE(atoms, logfile=None).run(steps=2)
    assert len(forces_only(atoms)) == 3
