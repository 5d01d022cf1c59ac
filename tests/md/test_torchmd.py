"""TorchMD's external force: many replicas as one batch, by TorchMD's own contract."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.data import atomic_masses, chemical_symbols

from ffpretrain import FFCalculator, list_models, load_potential
from ffpretrain.artifacts import save_potential
from ffpretrain.errors import ConfigError, NonFiniteError, UnsupportedInputError, UserError
from ffpretrain.md import Runtime
from ffpretrain.md.agreement import AgreementError
from ffpretrain.md.batches import BatchPath
from ffpretrain.md.torchmd import External
from ffpretrain.md.unfamiliar import UnfamiliarInputWarning
from ffpretrain.potential import Potential
from ffpretrain.units import KCAL_PER_MOL

Build = Callable[..., Potential]
EXAMPLES = Path(__file__).parents[2] / "examples"


def replicas_of(atoms: Atoms, replicas: int, spread: float = 0.05) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.tensor(atoms.positions + rng.normal(0, spread, (replicas, len(atoms), 3)))


def by_ase(model: Any, atoms: Atoms, positions: torch.Tensor) -> tuple[float, np.ndarray]:
    """Energy and forces by the ASE calculator, in eV and eV/Å."""
    copy = atoms.copy()
    copy.positions = positions.numpy()
    copy.calc = FFCalculator(model, device="cpu", dtype="float64", on_unfamiliar="ignore")
    return copy.get_potential_energy(), copy.get_forces()


@pytest.mark.parametrize("name", ["ndem-aspirin", "ndem-ethanol"])
def test_named_models_agree_with_ase(name: str) -> None:
    if name not in list_models():
        pytest.skip(f"{name} is not in this package")
    atoms = load_potential(name).card.reference_geometry.to_atoms()
    pos = replicas_of(atoms, 3)
    external = External(name, np.tile(atoms.numbers, (3, 1)), "cpu", dtype="float64")
    energy, forces = external.calculate(pos, torch.zeros(3, 3, 3))
    assert energy.shape == (3, 1) and energy.dtype == torch.float64
    assert forces.shape == pos.shape and forces.dtype == torch.float64
    for i in range(3):
        wanted, wanted_forces = by_ase(name, atoms, pos[i])
        assert float(energy[i]) * KCAL_PER_MOL == pytest.approx(wanted, abs=1e-5, rel=0)
        np.testing.assert_allclose(forces[i].numpy() * KCAL_PER_MOL, wanted_forces, rtol=0, atol=1e-4)


def test_replicas_may_differ_in_elements_and_in_whether_they_repeat(
    potential: Potential, ethanol: Atoms, crystal: Atoms
) -> None:
    """A replica in vacuum, one in a box, one of other elements; float32 positions of TorchMD."""
    box = torch.zeros(3, 3, 3)
    box[1] = torch.diag(torch.tensor([6.0, 7.0, 6.5]))
    numbers = np.tile(ethanol.numbers, (3, 1))
    numbers[2, 1] = 8
    pos = replicas_of(ethanol, 3).float()
    energy, forces = External(potential, numbers, "cpu", dtype="float64").calculate(pos, box)
    assert energy.dtype == torch.float64 and forces.dtype == torch.float32
    for i in range(3):
        atoms = Atoms(numbers[i], cell=box[i].numpy(), pbc=bool(box[i].any()), positions=pos[i].numpy())
        wanted, wanted_forces = by_ase(potential, atoms, pos[i].double())
        assert float(energy[i]) * KCAL_PER_MOL == pytest.approx(wanted, abs=1e-5, rel=0)
        np.testing.assert_allclose(forces[i].numpy() * KCAL_PER_MOL, wanted_forces, rtol=0, atol=1e-5)
    assert abs(float(energy[0] - energy[1])) > 1e-3  # the box is felt


def test_large_molecules_have_lists_of_their_own(potential: Potential) -> None:
    chain = Atoms("C" * 70, positions=[[1.4 * i, 0.3 * (i % 2), 0.1 * (i % 3)] for i in range(70)])
    pos = replicas_of(chain, 2, 0.02)
    external = External(potential, np.tile(chain.numbers, (2, 1)), "cpu", dtype="float64")
    for _ in range(2):
        energy, forces = external.calculate(pos, torch.zeros(2, 3, 3))
        for i in range(2):
            wanted, wanted_forces = by_ase(potential, chain, pos[i])
            assert float(energy[i]) * KCAL_PER_MOL == pytest.approx(wanted, abs=1e-7, rel=0)
            np.testing.assert_allclose(forces[i].numpy() * KCAL_PER_MOL, wanted_forces, rtol=0, atol=1e-9)
        pos = pos + 0.3 * torch.randn(pos.shape, generator=torch.Generator().manual_seed(1)).double()


def test_a_model_that_jumps_at_its_cutoff_gets_exact_pairs(build_potential: Build, ethanol: Atoms) -> None:
    rough = build_potential(vector_cutoff=False, cutoff=2.5)
    external = External(rough, ethanol.numbers, "cpu", dtype="float64")
    pos = replicas_of(ethanol, 1)
    wanted = by_ase(rough, ethanol, pos[0])[1]
    found = external.calculate(pos, torch.zeros(1, 3, 3))[1][0].numpy() * KCAL_PER_MOL
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)


def test_the_energy_can_be_differentiated(potential: Potential, ethanol: Atoms) -> None:
    """What TorchMD needs for explicit_forces=False, which would else leave this force out in silence."""
    external = External(potential, np.tile(ethanol.numbers, (2, 1)), "cpu", dtype="float64")
    pos = replicas_of(ethanol, 2).requires_grad_(True)
    box = torch.zeros(2, 3, 3)
    energy, forces = external.calculate(pos, box)
    assert torch.equal(energy.detach(), external.calculate(pos.detach(), box)[0])
    (gradient,) = torch.autograd.grad(energy.sum(), pos)
    assert not forces.requires_grad
    torch.testing.assert_close(-gradient, forces)


def test_torchmd_moves_replicas_as_ase_does(potential: Potential, ethanol: Atoms) -> None:
    """TorchMD's Verlet, ten steps, against one written out here."""
    pytest.importorskip("torchmd", reason="needs torchmd: pip install 'ffpretrain[torchmd]'")
    from torchmd.forces import Forces
    from torchmd.integrator import TIMEFACTOR, Integrator
    from torchmd.systems import System

    masses = torch.tensor(ethanol.get_masses())
    system = System(9, 2, torch.float64, "cpu")
    system.set_positions(replicas_of(ethanol, 2, 0.01).permute(1, 2, 0))
    system.set_masses(masses)
    external = External(potential, np.tile(ethanol.numbers, (2, 1)), "cpu", dtype="float64")
    forces = Forces(SimpleNamespace(masses=masses, nonbonded_params=None), terms=[], external=external)
    pos, vel, dt = system.pos.clone(), torch.zeros(2, 9, 3).double(), 0.5 / TIMEFACTOR
    first = forces.compute(system.pos, system.box, system.forces)
    assert first == pytest.approx(external.calculate(pos, system.box)[0][:, 0].tolist(), abs=1e-9, rel=0)
    Integrator(system, forces, 0.5, "cpu").step(niter=10)

    mass = masses[None, :, None]
    force = torch.stack([torch.tensor(by_ase(potential, ethanol, p)[1]) for p in pos]) / KCAL_PER_MOL
    for _ in range(10):
        vel = vel + 0.5 * dt * force / mass
        pos = pos + dt * vel
        force = torch.stack([torch.tensor(by_ase(potential, ethanol, p)[1]) for p in pos]) / KCAL_PER_MOL
        vel = vel + 0.5 * dt * force / mass
    torch.testing.assert_close(system.pos, pos, rtol=0, atol=1e-9)
    torch.testing.assert_close(system.vel, vel, rtol=0, atol=1e-9)


@pytest.fixture
def moleculekit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two names of moleculekit that TorchMD's program imports, where moleculekit is absent."""
    pytest.importorskip("torchmd", reason="needs torchmd: pip install 'ffpretrain[torchmd]'")
    table = {
        n: SimpleNamespace(mass=mass, symbol=chemical_symbols[n]) for n, mass in enumerate(atomic_masses)
    }
    for name, content in {
        "moleculekit": {},
        "moleculekit.molecule": {"Molecule": None},
        "moleculekit.periodictable": {"periodictable_by_number": table},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("torchmd.run", "torchmd.npzmol"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_torchmds_own_program_takes_the_configuration(
    moleculekit: None, with_card: Build, ethanol: Atoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bonds come closer at 300 K than any in training, which must not end the example."""
    from torchmd.run import dynamics, get_args, setup

    model = with_card(min_distance=1.0)  # O-H at rest: 0.97
    model_file = save_potential(model, tmp_path / "tiny.safetensors", model.card)
    config = yaml.safe_load((EXAMPLES / "torchmd" / "aspirin.yaml").read_text())
    np.savez(tmp_path / config["npz_file"], z=ethanol.numbers, coord=ethanol.positions)
    (tmp_path / "masses.yaml").write_bytes((EXAMPLES / "torchmd" / "masses.yaml").read_bytes())
    config["external"]["file"] = str(model_file)
    config.update(steps=4, output_period=2, save_period=2, replicas=2, temperature=30)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")  # TorchMD's
        arguments = get_args(["--conf", "short.yaml"])
        parts = setup(arguments)
        with pytest.warns(UnfamiliarInputWarning, match="closer than any two in training"):
            dynamics(arguments, *parts)
    frames = np.load(tmp_path / "aspirin-torchmd" / "trajectory_1.npy")
    assert frames.shape == (9, 3, 2)
    log = np.genfromtxt(tmp_path / "aspirin-torchmd" / "monitor_1.csv", delimiter=",", names=True)
    wanted = by_ase(load_potential(model_file), ethanol, torch.tensor(frames[..., -1]))[0]
    assert log["epot"][-1] * KCAL_PER_MOL == pytest.approx(wanted, abs=1e-5, rel=0)


def test_the_force_field_holds_the_masses_of_its_types() -> None:
    held = yaml.safe_load((EXAMPLES / "torchmd" / "masses.yaml").read_text())
    assert held["atomtypes"] == list(held["masses"])
    for symbol, mass in held["masses"].items():
        assert mass == pytest.approx(atomic_masses[chemical_symbols.index(symbol)], abs=1e-4)


def test_replicas_the_model_is_not_for_are_refused(with_card: Build, ethanol: Atoms) -> None:
    numbers = np.tile(ethanol.numbers, (2, 1))
    for change in (lambda z: z[:, :8], lambda z: np.vstack([z[:1], np.where(z[1:] == 8, 6, z[1:])])):
        with pytest.raises(UnsupportedInputError, match="was trained on C2H6O") as caught:
            External(with_card(), change(numbers), "cpu")
        assert one_line(caught)


def test_atoms_closer_than_any_in_training_follow_the_policy(with_card: Build, ethanol: Atoms) -> None:
    model, numbers = with_card(min_distance=0.9), np.tile(ethanol.numbers, (2, 1))
    pos, box = replicas_of(ethanol, 2, 0.0), torch.zeros(2, 3, 3)
    pos[1, 8] = pos[1, 7] + torch.tensor([0.8, 0.0, 0.0])
    external = External(model, numbers, "cpu")
    with pytest.warns(
        UnfamiliarInputWarning, match=r"0\.800 Å apart, closer than any two in training"
    ) as caught:
        external.calculate(pos, box)
        external.calculate(pos, box)
    assert len(caught) == 1
    with pytest.raises(UnsupportedInputError, match="closer than any two in training"):
        External(model, numbers, "cpu", on_unfamiliar="raise").calculate(pos, box)


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return isinstance(error.value, UserError) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("numbers", "options", "error", "message"),
    [
        ([[80, 1]], {}, UnsupportedInputError, "not trained on Hg"),
        ([[6.0, 1.0]], {}, UnsupportedInputError, "of type float64; give whole numbers"),
        ([[[6]]], {}, UnsupportedInputError, r"shape \(1, 1, 1\)"),
        ([], {}, UnsupportedInputError, "one row of them for each replica"),
        ([[6, 1]], {"dtyp": "float32"}, ConfigError, "unknown option 'dtyp' .*did you mean 'dtype'"),
        ([[6, 1]], {"dtype": "half"}, ConfigError, "unknown dtype 'half'"),
        ([[6, 1]], {"device": "tpu"}, ConfigError, "tpu"),
        ([[6, 1]], {"device": "cuda:77"}, ConfigError, "'cuda:77' is absent: torch finds"),
        ([[6, 1]], {"on_unfamiliar": "shout"}, ConfigError, "on_unfamiliar='shout'"),
    ],
)
def test_what_cannot_be_built_is_refused(
    potential: Potential, numbers: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        External(potential, numbers, **{"device": "cpu", **options})
    assert one_line(caught)


def shrink(box: torch.Tensor) -> torch.Tensor:
    box[1] = torch.diag(torch.tensor([5.0, 5.0, 0.0]))
    return box


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, b: (p[:1], b), r"shape \(1, 9, 3\), the atomic numbers call for \(2, 9, 3\)"),
        (lambda p, b: (p[:, :8], b), r"shape \(2, 8, 3\)"),
        (lambda p, b: (p[..., :2], b), r"shape \(2, 9, 2\)"),
        (lambda p, b: (p, b[0]), r"the box has shape \(3, 3\); give \(2, 3, 3\)"),
        (lambda p, b: (p, shrink(b)), "box of replica 1 has no volume"),
        (lambda p, b: (p, b + torch.inf), "the box is not finite"),
        (
            lambda p, b: (p.index_fill(1, torch.tensor(3), torch.nan), b),
            "structure 0: the position of atom 3",
        ),
        (lambda p, b: (torch.cat([p[:1], p[1:] * torch.inf]), b), "structure 1: the position of atom 0"),
        # named where it is evaluated natively, which for a network this narrow depends on the processor
        (
            lambda p, b: (p[:, [0, 0, *range(2, 9)]], b),
            "structure 0: (atoms 0 and 1|two atoms) are at the same place",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    potential: Potential, ethanol: Atoms, change: Callable[..., Any], message: str
) -> None:
    external = External(potential, np.tile(ethanol.numbers, (2, 1)), "cpu")
    pos, box = replicas_of(ethanol, 2, 0.01), torch.zeros(2, 3, 3)
    external.calculate(pos, box)
    with pytest.raises(UnsupportedInputError, match=message) as caught:
        external.calculate(*change(pos, box))
    assert one_line(caught)


def test_results_that_are_not_finite_name_their_replica(build_potential: Build, ethanol: Atoms) -> None:
    potential = build_potential()
    external = External(potential, np.tile(ethanol.numbers, (2, 1)), "cpu", compile=False)
    pos, box = replicas_of(ethanol, 2, 0.01), torch.zeros(2, 3, 3)
    external.calculate(pos, box)
    right = external.model.runtime.model.forward

    def broken(graph: Any) -> dict[str, torch.Tensor]:
        out = right(graph)
        out["forces"][12] = torch.nan
        return out

    external.model.runtime.model.forward = broken  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="structure 1: the force on atom 3 is not finite"):
        external.calculate(pos, box)


def test_the_gate_watches_the_batch(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    pos, box = replicas_of(ethanol, 3), torch.zeros(3, 3, 3)
    numbers = np.tile(ethanol.numbers, (3, 1))
    external = External(potential, numbers, "cpu", compile=False)
    external.calculate(pos, box)
    measured = external.model.runtime.agreement["batch"]
    assert measured.frames == 3 and 0 < measured.force_error < 1e-5
    assert external.model.runtime.backend == "batch float32 cpu"
    right = BatchPath._pairs

    def slipped(self: BatchPath, *arguments: Any) -> Any:
        index, shift, shortest = right(self, *arguments)
        kept = index.max(dim=0).values < 26  # as an offset would that leaves out the last atom
        return index[:, kept], shift[kept], shortest

    monkeypatch.setattr(BatchPath, "_pairs", slipped)
    with pytest.raises(AgreementError, match="the path 'batch'"):
        External(potential, numbers, "cpu", compile=False).calculate(pos, box)


def test_other_structures_make_a_new_plan(potential: Potential, ethanol: Atoms, crystal: Atoms) -> None:
    runtime = Runtime(potential, "cpu", "float64")
    for atoms in (ethanol, crystal, ethanol):
        n, cell = len(atoms), torch.tensor(atoms.cell.array)[None]
        found = runtime.evaluate_tensors(
            torch.tensor(atoms.numbers),
            torch.tensor(atoms.positions),
            torch.zeros(n, dtype=torch.int64),
            cell,
            torch.tensor([bool(atoms.pbc.all())]),
        )
        alone = runtime.evaluate(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
        assert float(found.energy) == pytest.approx(alone.energy, abs=1e-11)
        np.testing.assert_allclose(found.forces.numpy(), alone.forces, rtol=0, atol=1e-12)
        assert (found.stress is None) == (alone.stress is None)
        if found.stress is not None:
            np.testing.assert_allclose(found.stress[0].numpy(), alone.stress, rtol=0, atol=1e-12)


@pytest.mark.skipif("ndem-aspirin" not in list_models(), reason="ndem-aspirin is not in this package")
def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("torchmd", reason="needs torchmd: pip install 'ffpretrain[torchmd]'")
    command = [sys.executable, str(EXAMPLES / "torchmd_replicas.py"), "10", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 11
    assert all(100 < float(kelvin) < 600 for line in lines[:-1] for kelvin in line.replace("K", "").split())
