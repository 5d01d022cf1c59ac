"""Sampling geometries: distributions with closed forms, fixed atoms, states, failures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.constraints import FixAtoms, FixBondLength

from ffpretrain import units
from ffpretrain.datasets.modes import normal_modes, wavenumbers
from ffpretrain.datasets.sampling import METHODS, EngineFailure, Sampler, Sampling, create_sampler
from ffpretrain.errors import ConfigError, DataError

TEMPERATURE = 300.0
KT = units.KB * TEMPERATURE


class Springs(Calculator):
    """Harmonic bonds of length ``length`` and constant ``k`` between all pairs of atoms."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(self, k: float = 5.0, length: float = 1.5) -> None:
        super().__init__()
        self.k, self.length, self.calls, self.fail_at = k, length, 0, frozenset[int]()

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Any = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        if self.calls in self.fail_at:
            raise CalculationFailed("SCF not converged")
        x = self.atoms.positions
        energy, forces = 0.0, np.zeros_like(x)
        for i in range(len(x)):
            for j in range(i):
                bond = x[i] - x[j]
                r = np.linalg.norm(bond)
                energy += 0.5 * self.k * (r - self.length) ** 2
                force = -self.k * (r - self.length) * bond / r
                forces[i] += force
                forces[j] -= force
        self.results = {"energy": energy, "forces": forces}


class Traps(Calculator):
    """Every atom in its own isotropic harmonic trap of constant ``k`` around ``centres``."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(self, centres: np.ndarray, k: float) -> None:
        super().__init__()
        self.centres, self.k = centres, k

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Any = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        shift = self.atoms.positions - self.centres
        self.results = {"energy": 0.5 * self.k * (shift**2).sum(), "forces": -self.k * shift}


def triangle(k: float = 5.0) -> Atoms:
    """Three nitrogen atoms on an equilateral triangle of springs at rest."""
    corners = [[0, 0, 0], [1.5, 0, 0], [0.75, 1.5 * np.sqrt(3) / 2, 0]]
    return Atoms("N3", corners, calculator=Springs(k))


def sampler(atoms: Atoms, method: str, seed: int = 0, **settings: Any) -> Sampler:
    settings = {"temperature": TEMPERATURE, **settings}
    return create_sampler(atoms, Sampling(method=method, **settings), np.random.default_rng(seed))


def test_modes_of_a_triangle_of_springs() -> None:
    """Closed form: ω² = 3k/m for breathing and 3k/2m twice."""
    atoms = triangle(k=5.0)
    squared, modes = normal_modes(atoms)
    mass = atoms.get_masses()[0]
    np.testing.assert_allclose(squared, [7.5 / mass, 7.5 / mass, 15.0 / mass], rtol=1e-4)
    flat = modes.reshape(3, 9)
    np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=1e-12)
    outward = atoms.positions - atoms.positions.mean(0)
    breathing = outward / np.linalg.norm(outward)
    assert abs((modes[2] * breathing).sum()) == pytest.approx(1.0, abs=1e-6)


def test_modes_from_forces_of_many_structures_at_once() -> None:
    atoms = triangle()
    asked: list[int] = []

    def forces(structures: Sequence[Atoms]) -> list[np.ndarray]:
        asked.append(len(structures))
        return [Atoms(one, calculator=atoms.calc).get_forces() for one in structures]

    bare = Atoms(atoms)
    bare.calc, done = None, list[int]()
    squared, modes = normal_modes(bare, forces=forces, progress=done.append)
    wanted, shapes = normal_modes(atoms)
    assert sum(asked) == 18 and max(asked) > 1 and done[-1] == 18
    assert np.array_equal(squared, wanted) and np.array_equal(modes, shapes)


def test_wavenumbers_against_ase() -> None:
    from ase.vibrations import VibrationsData

    atoms = triangle()
    squared, modes = normal_modes(atoms)
    flat = modes.reshape(3, 9) * np.sqrt(np.repeat(atoms.get_masses(), 3))
    hessian = (flat.T * squared) @ flat
    ours = wavenumbers(squared)
    theirs = VibrationsData.from_2d(atoms, hessian).get_frequencies().real[-3:]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_normal_modes_have_the_variance_of_boltzmann() -> None:
    """Each normal coordinate has variance kT/ω², and nothing moves along the rigid motions."""
    atoms = triangle()
    series = sampler(atoms, "normal-modes", lowest_mode=0.0)
    n = 8000
    shifts = np.array([series.next() for _ in range(n)]) - series.atoms.positions
    weighted = (shifts * np.sqrt(atoms.get_masses())[:, None]).reshape(n, 9)
    squared, modes = normal_modes(atoms)
    coordinates = weighted @ modes.reshape(3, 9).T
    # the variance of n draws scatters by sqrt(2/n) = 1.6 %
    np.testing.assert_allclose(coordinates.var(axis=0), KT / squared, rtol=0.08)
    assert np.abs(coordinates.mean(axis=0)).max() < 5 * np.sqrt(KT / squared.min() / n)
    assert np.linalg.norm(weighted, axis=1) == pytest.approx(np.linalg.norm(coordinates, axis=1), abs=1e-9)


def test_mean_energy_of_normal_modes_is_equipartition() -> None:
    """Stiff springs hardly leave the harmonic region: <E> = 3 modes · kT/2."""
    atoms = triangle(k=500.0)
    series = sampler(atoms, "normal-modes")
    energies = []
    for _ in range(4000):
        atoms.positions = series.next()
        energies.append(atoms.get_potential_energy())
    assert np.mean(energies) == pytest.approx(1.5 * KT, rel=0.05)


def test_a_linear_molecule_loses_five_rigid_motions() -> None:
    atoms = Atoms("N2", [[0, 0, 0], [0, 0, 1.5]], calculator=Springs(5.0))
    squared, _ = normal_modes(atoms)
    assert squared == pytest.approx([10.0 / atoms.get_masses()[0]], rel=1e-4)


def test_soft_modes_are_left_out_and_said_so() -> None:
    atoms = triangle()
    squared, _ = normal_modes(atoms)
    between = wavenumbers(squared)[1:].mean()
    said: list[str] = []
    settings = Sampling(method="normal-modes", lowest_mode=float(between))
    series = create_sampler(atoms, settings, np.random.default_rng(0), said.append)
    assert len(said) == 1 and "left out modes at" in said[0]
    shift = series.next() - series.atoms.positions
    outward = series.atoms.positions - series.atoms.positions.mean(0)
    along = (shift * outward).sum() / np.linalg.norm(outward)
    assert abs(along) == pytest.approx(np.linalg.norm(shift), rel=1e-6)


def test_imaginary_modes_are_negative_and_never_sampled() -> None:
    atoms = Atoms("N2", [[0, 0, 0], [0, 0, 1.5]], calculator=Springs(-5.0))
    squared, _ = normal_modes(atoms)
    assert squared[0] < 0 and wavenumbers(squared)[0] < 0
    with pytest.raises(DataError, match="no vibrational mode lies above 50"):
        sampler(atoms, "normal-modes")


def test_gaussian_has_the_standard_deviation_asked_for() -> None:
    atoms = triangle()
    series = sampler(atoms, "gaussian", std=0.1)
    shifts = np.array([series.next() for _ in range(4000)]) - atoms.positions
    assert shifts.std(axis=0) == pytest.approx(np.full((3, 3), 0.1), rel=0.06)
    assert np.abs(np.corrcoef(shifts.reshape(-1, 9).T) - np.eye(9)).max() < 0.08


def test_dynamics_fill_a_harmonic_trap_as_boltzmann_says() -> None:
    """Closed form: each coordinate has variance kT/k."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 3)) * 5
    atoms = Atoms("C30", centres, cell=np.eye(3) * 50, pbc=True, calculator=Traps(centres, k=2.0))
    series = sampler(atoms, "dynamics", timestep=1.0, spacing=25.0, equilibration=300.0, friction=0.05)
    shifts = np.array([series.next() for _ in range(150)]) - centres
    assert shifts.var() == pytest.approx(KT / 2.0, rel=0.06)
    momenta = series.atoms.get_momenta()
    assert series.atoms.get_temperature() == pytest.approx(TEMPERATURE, rel=0.5) and momenta.any()


def test_dynamics_stay_at_the_centre_of_mass() -> None:
    series = sampler(triangle(), "dynamics", spacing=50.0, equilibration=500.0)
    for _ in range(3):
        work = triangle()
        work.positions = series.next()
        assert np.abs(work.get_center_of_mass()).max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_fixed_atoms_stay_where_they_are(method: str) -> None:
    atoms = triangle()
    atoms.set_constraint(FixAtoms([1]))
    series = sampler(atoms, method, equilibration=20.0, spacing=5.0)
    for _ in range(3):
        positions = series.next()
        np.testing.assert_array_equal(positions[1], atoms.positions[1])
        assert np.abs(positions - atoms.positions)[[0, 2]].max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_series_goes_on_as_if_nothing_had_been(method: str) -> None:
    settings = {"equilibration": 20.0, "spacing": 5.0}
    whole = sampler(triangle(), method, **settings)
    frames, states = [], []
    for _ in range(6):
        frames.append(whole.next())
        states.append(json.dumps(whole.state()))
    other = sampler(triangle(), method, seed=99, **settings)
    other.restore(json.loads(states[2]))
    for expected in frames[3:]:
        np.testing.assert_array_equal(other.next(), expected)
    again = sampler(triangle(), method, **settings)
    np.testing.assert_array_equal(again.next(), frames[0])
    different = sampler(triangle(), method, seed=1, **settings)
    assert np.abs(different.next() - frames[0]).max() > 1e-4


def test_dynamics_go_on_after_a_failure() -> None:
    atoms = triangle()
    series = sampler(atoms, "dynamics", equilibration=0.0, spacing=5.0)
    first = series.next()
    atoms.calc.fail_at = frozenset([atoms.calc.calls + 4])
    with pytest.raises(EngineFailure, match="SCF not converged"):
        series.next()
    positions = series.next()
    assert np.all(np.isfinite(positions)) and np.abs(positions - first).max() > 1e-4


def test_atoms_flying_apart_are_a_failure() -> None:
    atoms = triangle(k=5e6)
    atoms.rattle(0.1, seed=0)
    with pytest.raises(EngineFailure, match=r"moved .* in one step; use a smaller timestep"):
        sampler(atoms, "dynamics").next()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dynamic"}, "did you mean 'dynamics'"),
        ({"temperature": -1.0}, "temperature must be a positive number"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"std": 0.0}, "std must be a positive number"),
        ({"equilibration": -5.0}, "equilibration must be zero or a positive number"),
        ({"spacing": 0.1}, "must be at least one timestep"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


def test_structures_that_cannot_be_sampled() -> None:
    atoms = triangle()
    atoms.set_constraint(FixAtoms([0, 1, 2]))
    with pytest.raises(DataError, match="every atom is fixed"):
        sampler(atoms, "gaussian")
    atoms.set_constraint(FixBondLength(0, 1))
    with pytest.raises(DataError, match="only FixAtoms is understood"):
        sampler(atoms, "gaussian")
    atoms = triangle()
    atoms.calc.fail_at = frozenset(range(1, 10**4))
    with pytest.raises(DataError, match="minimisation before the normal modes failed: SCF not converged"):
        sampler(atoms, "normal-modes")
