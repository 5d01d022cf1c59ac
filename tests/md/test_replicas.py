"""Copies of one structure evaluated as one batch, and Langevin dynamics of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.md.verlet import VelocityVerlet
from torch import Tensor

from ffpretrain import FFCalculator, units
from ffpretrain.errors import UnsupportedInputError
from ffpretrain.graphs import build_graph
from ffpretrain.md import compiled
from ffpretrain.md import replicas as module
from ffpretrain.md.agreement import AgreementError
from ffpretrain.md.replica_langevin import ReplicaLangevin, maxwell_boltzmann
from ffpretrain.md.replicas import Replicas
from ffpretrain.md.runtime import CompileOption, Runtime
from ffpretrain.potential import Potential


def displaced(atoms: Atoms, count: int, std: float = 0.1) -> Tensor:
    rng = np.random.default_rng(3)
    return torch.tensor(atoms.positions + rng.normal(0.0, std, (count, len(atoms), 3)))


def plain(potential: Potential, atoms: Atoms, positions: Tensor) -> tuple[Tensor, Tensor]:
    cell = torch.tensor(np.array(atoms.cell.array))
    model = Runtime(potential, "cpu", "float64").model
    outs = [
        model(build_graph(torch.tensor(atoms.numbers), p, potential.cutoff, cell, atoms.pbc.tolist()))
        for p in positions
    ]
    return torch.cat([o["energy"] for o in outs]), torch.stack([o["forces"] for o in outs])


@pytest.mark.parametrize("kind", ["molecule", "crystal"])
def test_copies_have_the_energies_and_forces_of_each_alone(
    kind: str, potential: Potential, ethanol: Atoms, crystal: Atoms
) -> None:
    atoms = ethanol if kind == "molecule" else crystal
    runtime = Runtime(potential, "cpu", "float64")
    copies = Replicas(runtime, atoms.numbers, atoms.positions, 3, atoms.cell.array, atoms.pbc)
    positions = displaced(atoms, 3, 0.05)
    energy, forces = copies(positions)
    want = plain(potential, atoms, positions)
    torch.testing.assert_close(energy, want[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(forces, want[1], rtol=0, atol=1e-9)
    assert copies.backend == f"replicas {'dense' if kind == 'molecule' else 'batch'} float64 cpu"
    assert runtime.agreement[copies.name].force_error < 1e-9


def test_a_copy_that_is_not_finite_leaves_the_others(potential: Potential, ethanol: Atoms) -> None:
    copies = Replicas(Runtime(potential, "cpu", "float64"), ethanol.numbers, ethanol.positions, 3)
    positions = displaced(ethanol, 3)
    want = copies(positions)
    positions[1, 0] = positions[1, 1]
    energy, forces = copies(positions)
    assert not torch.isfinite(forces[1]).all()
    assert torch.equal(energy[[0, 2]], want[0][[0, 2]]) and torch.equal(forces[[0, 2]], want[1][[0, 2]])


@pytest.mark.parametrize(("option", "steps"), [(True, 0), ("auto", 10_000), ("auto", 9_999)])
def test_long_work_is_compiled(
    option: CompileOption, steps: int, potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracing is real, the C++ compiler is not called: what is traced must serve other positions."""
    monkeypatch.setattr(compiled.torch, "compile", lambda traced, **options: traced)
    monkeypatch.setattr(Runtime, "native_many", lambda self, expected=0: None)
    runtime = Runtime(potential, "cpu", "float64", compile=option)
    copies = Replicas(runtime, ethanol.numbers, ethanol.positions, 2, steps=steps)
    assert copies.name == ("replicas dense" if steps == 9_999 else "replicas dense compiled")
    positions = displaced(ethanol, 2)
    want = plain(potential, ethanol, positions)
    torch.testing.assert_close(copies(positions), want, rtol=0, atol=1e-9)


class Explosive(torch.nn.Module):
    """A harmonic well around the origin that has no energy for atoms farther out than 3 Å."""

    cutoff = 2.0

    def forward(self, graph: object) -> dict[str, Tensor]:
        pos, batch = graph.pos, graph.batch  # type: ignore[attr-defined]
        per_atom = torch.where(pos.norm(dim=1) < 3.0, 0.5 * pos.square().sum(1), torch.nan)
        energy = pos.new_zeros(graph.n_graphs).index_add(0, batch, per_atom)  # type: ignore[attr-defined]
        return {"energy": energy, "forces": -pos * (per_atom * 0 + 1).unsqueeze(1)}


def test_without_the_dense_layout_too_only_the_copy_that_went_wrong_is_not_finite() -> None:
    atoms = Atoms("HH", positions=[[0, 0, 0], [0, 0, 1.0]])
    copies = Replicas(Runtime(Explosive(), "cpu", "float64"), atoms.numbers, atoms.positions, 3)
    positions = displaced(atoms, 3)
    positions[1, 0, 0] = 5.0
    energy, forces = copies(positions)
    assert torch.isnan(energy[1]) and torch.isnan(forces[1]).any()
    torch.testing.assert_close(forces[[0, 2]], -positions[[0, 2]])


def test_a_wrong_path_is_refused(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module.dense_function

    def wrong(model: Potential, z: Tensor, molecules: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        function = right(model, z, molecules)

        def shifted(pos: Tensor) -> tuple[Tensor, Tensor]:
            energies, forces = function(pos)
            return energies, forces.roll(1, 0)

        return shifted

    monkeypatch.setattr(module, "dense_function", wrong)
    with pytest.raises(AgreementError, match="replicas dense"):
        Replicas(Runtime(potential, "cpu", "float64"), ethanol.numbers, ethanol.positions, 2)


def test_a_slab_is_refused(potential: Potential, crystal: Atoms) -> None:
    with pytest.raises(UnsupportedInputError, match="all three directions"):
        Replicas(Runtime(potential, "cpu"), crystal.numbers, crystal.positions, 2, pbc=(True, True, False))


def well(stiffness: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def forces(x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * stiffness * x.square().sum((1, 2)), -stiffness * x

    return forces


def test_baoab_samples_a_harmonic_well_exactly() -> None:
    """The variance of positions is kT/k at any timestep; that of velocities is smaller by 1 - (ω dt)²/4."""
    temperatures = torch.tensor([300.0, 500.0], dtype=torch.float64).repeat_interleave(400)
    masses, stiffness = torch.tensor([2.0, 16.0], dtype=torch.float64), 20.0
    generator = torch.Generator().manual_seed(0)
    zero = torch.zeros(800, 2, 3, dtype=torch.float64)
    motion = ReplicaLangevin(well(stiffness), masses, zero, zero, temperatures, 2.5, 0.05, generator)
    squares, speeds = torch.zeros(2, 2), torch.zeros(2, 2)
    for step in range(900):
        motion.step()
        if step >= 200 and step % 10 == 0:
            squares += motion.positions.square().mean(2).view(2, 400, 2).mean(1) / 70
            speeds += motion.velocities.square().mean(2).view(2, 400, 2).mean(1) / 70
    kt = units.KB * torch.tensor([300.0, 500.0]).view(2, 1)
    omega_dt = (stiffness / masses).sqrt() * 2.5 * units.FS
    assert float(omega_dt[0]) > 0.5  # so large that other integrators are visibly wrong
    torch.testing.assert_close(squares, (kt / stiffness).expand(2, 2), rtol=0.02, atol=0)
    torch.testing.assert_close(speeds, (kt / masses * (1 - omega_dt**2 / 4)).float(), rtol=0.02, atol=0)


def test_without_friction_it_is_velocity_verlet(potential: Potential, ethanol: Atoms) -> None:
    runtime = Runtime(potential, "cpu", "float64")
    masses = torch.tensor(ethanol.get_masses())
    temperatures = torch.tensor([50.0, 50.0], dtype=torch.float64)
    start = displaced(ethanol, 2, 0.01)
    velocities = maxwell_boltzmann(masses, temperatures, torch.Generator().manual_seed(1))
    motion = ReplicaLangevin(
        Replicas(runtime, ethanol.numbers, ethanol.positions, 2),
        masses, start, velocities, temperatures, 0.5, 0.0, torch.Generator(),
    )  # fmt: skip
    for _ in range(5):
        motion.step()
    atoms = ethanol.copy()
    atoms.positions = start[1].numpy()
    atoms.set_velocities(velocities[1].numpy())
    atoms.calc = FFCalculator(potential, "cpu", "float64")
    VelocityVerlet(atoms, 0.5 * units.FS).run(5)
    np.testing.assert_allclose(motion.positions[1].numpy(), atoms.positions, rtol=0, atol=1e-10)
    np.testing.assert_allclose(motion.velocities[1].numpy(), atoms.get_velocities(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(motion.energy[1], atoms.get_potential_energy(), rtol=0, atol=1e-8)


def test_velocities_have_the_temperature_asked_for() -> None:
    temperatures = torch.tensor([100.0, 400.0], dtype=torch.float64)
    masses = torch.linspace(1.0, 20.0, 3000, dtype=torch.float64)
    drawn = maxwell_boltzmann(masses, temperatures, torch.Generator().manual_seed(0))
    motion = ReplicaLangevin(
        well(1.0), masses, torch.zeros_like(drawn), drawn, temperatures, 1.0, 0.01, torch.Generator()
    )
    torch.testing.assert_close(motion.temperature(), temperatures, rtol=0.05, atol=0)


@pytest.mark.parametrize("by", ["guard", "forces"])
def test_a_copy_that_stops_stays_and_the_others_go_on(by: str) -> None:
    def burst(x: Tensor) -> tuple[Tensor, Tensor]:
        energy, forces = well(1.0)(x)
        return energy.where((x.abs() < 1.5).all(2).all(1), torch.nan), forces

    def run(failing: bool) -> ReplicaLangevin:
        start = torch.full((2, 1, 3), 1.4, dtype=torch.float64)
        start[0] = 0.1
        push = torch.zeros_like(start)
        push[1] = 1.0 if failing else 0.0
        guard = (lambda x: (x.abs() < 1.5).all(2).all(1)) if by == "guard" else None
        motion = ReplicaLangevin(
            burst if by == "forces" else well(1.0),
            torch.ones(1, dtype=torch.float64),
            start, push, torch.full((2,), 300.0, dtype=torch.float64), 1.0, 0.01,
            torch.Generator().manual_seed(0), guard,
        )  # fmt: skip
        stopped = torch.stack([motion.step() for _ in range(20)])
        assert stopped.sum(0).tolist() == [0, int(failing)]
        return motion

    broken, whole = run(True), run(False)
    assert broken.alive.tolist() == [True, False]
    assert torch.equal(broken.positions[0], whole.positions[0])
    assert float(broken.positions[1].max()) < 1.5 and float(broken.velocities[1].abs().max()) == 0
