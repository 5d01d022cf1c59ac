"""The spectrum of velocities: places, sizes and units on motion that is known."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase import units as ase_units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.errors import ConfigError, NonFiniteError
from ffpretrain.md import velocity_spectrum

MASSES = np.array([1.008, 15.999])


def vibration(wavenumber: float, amplitude: float, n: int, timestep: float) -> NDArray[np.float64]:
    """Return velocities in Å/fs of two atoms that swing along x, the second one in the opposite direction."""
    omega = 2 * np.pi * wavenumber * units.SPEED_OF_LIGHT
    velocity = np.zeros((n, 2, 3))
    swing = amplitude * omega * np.cos(omega * timestep * np.arange(n))
    velocity[:, 0, 0], velocity[:, 1, 0] = swing, -swing * MASSES[0] / MASSES[1]
    return velocity


@pytest.mark.parametrize("n", [4000, 4001])
@pytest.mark.parametrize("wavenumber", [300.0, 1700.0, 3600.0])
def test_a_vibration_stands_at_its_wavenumber_with_its_energy(wavenumber: float, n: int) -> None:
    velocity = vibration(wavenumber, 0.1, n, 0.5)
    found = velocity_spectrum(velocity, MASSES, 0.5)
    resolution = found.wavenumber[1]
    assert resolution == pytest.approx(1 / (n * 0.5 * 2.99792458e-5), rel=1e-12)
    assert abs(found.wavenumber[found.density.argmax()] - wavenumber) <= 0.5 * resolution
    # m v^2 of both atoms: a cosine has half its peak on average
    omega = 2 * np.pi * wavenumber * 2.99792458e-5
    peak = MASSES[0] * (0.1 * omega) ** 2 * (1 + MASSES[0] / MASSES[1])
    wanted = 0.5 * peak * 103.642696  # amu (Å/fs)^2 in eV
    assert found.energy() == pytest.approx(wanted, rel=1e-3)
    # a Hann window has its energy within two lines
    assert found.energy(wavenumber - 3 * resolution, wavenumber + 3 * resolution) > 0.999 * found.energy()


def test_bands_have_the_ratio_of_their_energies_and_do_not_leak() -> None:
    strong, weak = vibration(1000.0, 0.1, 8000, 0.5), vibration(3000.0, 0.001, 8000, 0.5)
    found = velocity_spectrum(strong + weak, MASSES, 0.5)
    assert found.energy(2900, 3100) / found.energy(900, 1100) == pytest.approx(9e-4, rel=1e-2)


def test_the_integral_is_twice_the_kinetic_energy_of_any_motion() -> None:
    velocity = np.random.default_rng(0).normal(size=(20000, 2, 3)) * 0.01
    mean = (MASSES[:, None] * velocity**2).sum((1, 2)).mean() / ase_units.fs**2
    assert velocity_spectrum(velocity, MASSES, 1.0).energy() == pytest.approx(mean, rel=0.02)


class Spring(Calculator):
    """A harmonic bond."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(
        self, atoms: Atoms | None = None, properties: object = None, system_changes: object = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        vector = self.atoms.positions[1] - self.atoms.positions[0]
        length = np.linalg.norm(vector)
        pull = 30.0 * (length - 1.0) * vector / length
        self.results = {"energy": 15.0 * (length - 1.0) ** 2, "forces": np.array([pull, -pull])}


def test_dynamics_of_a_spring_have_the_wavenumber_of_its_stiffness() -> None:
    atoms = Atoms("HO", positions=[[0, 0, 0], [1.05, 0, 0]], calculator=Spring())
    velocities: list[NDArray[np.float64]] = []
    motion = VelocityVerlet(atoms, 0.25 * ase_units.fs)
    motion.attach(lambda: velocities.append(atoms.get_velocities() * ase_units.fs))
    motion.run(8000)
    found = velocity_spectrum(np.array(velocities), atoms.get_masses(), 0.25)
    reduced = 1 / (1 / atoms.get_masses()).sum()
    wanted = np.sqrt(30.0 / reduced) * ase_units.fs / (2 * np.pi * 2.99792458e-5)
    assert 2900 < wanted < 3000
    assert found.wavenumber[found.density.argmax()] == pytest.approx(wanted, abs=found.wavenumber[1])


@pytest.mark.parametrize(
    ("shape", "masses", "timestep", "message"),
    [
        ((20, 2), 2, 1.0, r"must be \[T, N, 3\]"),
        ((20, 2, 3), 3, 1.0, r"masses \[N\], not \(20, 2, 3\) and \(3,\)"),
        ((15, 2, 3), 2, 1.0, "15 entries"),
        ((20, 2, 3), 2, 0.0, "timestep=0.0"),
    ],
)
def test_bad_input_is_refused(shape: tuple[int, ...], masses: int, timestep: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        velocity_spectrum(np.zeros(shape), np.ones(masses), timestep)


def test_velocities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="velocity"):
        velocity_spectrum(np.full((20, 2, 3), np.nan), MASSES, 1.0)
