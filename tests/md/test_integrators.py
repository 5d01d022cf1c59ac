"""The four ensembles: conservation, temperature, degrees of freedom."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms

from ffpretrain.errors import ConfigError
from ffpretrain.md import simulate
from ffpretrain.md.integrators import ENSEMBLES
from ffpretrain.md.statistics import RunningMoments
from ffpretrain.md.velocities import degrees_of_freedom, draw_momenta
from ffpretrain.potential import Potential

Springs = Callable[[Atoms], Calculator]
THERMOSTATS = [name for name in ENSEMBLES if name != "nve"]


def test_energy_is_conserved_to_second_order(potential: Potential, ethanol: Atoms) -> None:
    spread = {}
    for timestep in (0.4, 0.8):
        result = simulate(
            ethanol,
            potential,
            ensemble="nve",
            temperature=30.0,
            timestep=timestep,
            time_ps=0.06,
            dtype="float64",
            device="cpu",
        )
        spread[timestep] = result.summary["conserved"]["spread"]
        assert result.summary["backend"] == "native float64 cpu"
        assert result.summary["steps"] == round(60 / timestep)
    assert spread[0.4] < 0.5
    # velocity Verlet's error goes with the square of the timestep, a force that is no derivative's does not
    assert 2.5 < spread[0.8] / spread[0.4] < 6.0


def test_nve_does_not_drift(methane: tuple[Atoms, Calculator]) -> None:
    atoms, calculator = methane
    result = simulate(atoms, calculator, ensemble="nve", temperature=300.0, timestep=0.25, steps=2000)
    assert abs(result.summary["conserved"]["drift"]) < 0.05
    assert result.summary["conserved"]["spread"] < 1.0
    # half of the kinetic energy has gone into the springs
    assert 100 < result.summary["temperature"]["mean"] < 200


@pytest.mark.parametrize("ensemble", THERMOSTATS)
def test_thermostats_hold_the_temperature(methane: tuple[Atoms, Calculator], ensemble: str) -> None:
    atoms, calculator = methane
    thermostat: dict[str, Any] = {"ensemble": ensemble, "temperature": 300.0, "friction": 0.05, "seed": 3}
    result = simulate(atoms, calculator, timestep=1.5, steps=4000, **thermostat)
    # 15 coordinates, of which 9 or 12 move: a thermostat that counts 15 is 25 % to 67 % too hot
    assert result.summary["degrees_of_freedom"] == (12 if ensemble == "nvt-langevin" else 9)
    assert result.summary["temperature"]["mean"] == pytest.approx(300.0, rel=0.1)
    dof = result.summary["degrees_of_freedom"]
    assert result.summary["temperature"]["std"] == pytest.approx(300.0 * (2 / dof) ** 0.5, rel=0.25)
    conserved = result.summary["conserved"]
    if ensemble == "nvt-langevin":
        assert conserved is None
    else:
        assert abs(conserved["drift"]) < 0.5
    momentum = result.atoms.get_momenta().sum(0)
    assert np.abs(momentum).max() < 1e-8
    assert np.abs(result.atoms.get_center_of_mass() - atoms.get_center_of_mass()).max() < 1e-6
    assert result.atoms.constraints == [] and atoms.calc is None


@pytest.mark.parametrize(
    ("name", "pbc", "fixed", "expected"),
    [
        ("CH4", False, [], 9),
        ("CO2", False, [], 4),
        ("N2", False, [], 1),
        ("CH4", True, [], 12),
        ("CH4", False, [0], 12),
        ("CH4", False, [0, 1, 2], 6),
    ],
)
def test_degrees_of_freedom(name: str, pbc: bool, fixed: list[int], expected: int) -> None:
    atoms = molecule(name, vacuum=3.0, pbc=pbc)
    atoms.set_constraint([FixAtoms(indices=fixed)] if fixed else [])
    assert degrees_of_freedom(atoms, rotation_is_free=False) == expected
    langevin = {9: 12, 4: 6, 1: 3}.get(expected, expected) if not pbc and not fixed else expected
    assert degrees_of_freedom(atoms, rotation_is_free=True) == langevin
    rng = np.random.default_rng(0)
    masses = atoms.get_masses()
    energies = [(draw_momenta(atoms, 300.0, rng) ** 2 / masses[:, None]).sum() for _ in range(2000)]
    assert np.mean(energies) / (300.0 * 8.617333e-5) == pytest.approx(expected, rel=0.08)
    momenta = draw_momenta(atoms, 300.0, rng)
    if fixed:
        assert np.abs(momenta[fixed]).max() == 0.0
    else:
        assert np.abs(momenta.sum(0)).max() < 1e-10
        if not pbc:
            atoms.set_momenta(momenta)
            assert np.abs(atoms.get_angular_momentum()).max() < 1e-10


def test_one_atom_has_nowhere_to_go(springs: Springs) -> None:
    atoms = Atoms("C")
    with pytest.raises(ConfigError, match="no degree of freedom"):
        simulate(atoms, springs(atoms), steps=1)


def test_minimising_comes_first(methane: tuple[Atoms, Calculator]) -> None:
    atoms, calculator = methane
    atoms.rattle(0.2, seed=1)
    cold = simulate(atoms, calculator, ensemble="nve", temperature=0.0, steps=1, minimize=True)
    assert cold.summary["potential_energy"] < 1e-3
    assert cold.summary["temperature"]["mean"] < 1.0


def test_velocities_can_be_kept(methane: tuple[Atoms, Calculator]) -> None:
    warm = simulate(*methane, ensemble="nvt-langevin", steps=200).atoms
    speed = np.linalg.norm(warm.get_velocities())
    on = simulate(warm, methane[1], ensemble="nve", temperature=None, steps=0).atoms
    assert np.abs(on.get_angular_momentum()).max() < 1e-10
    assert 0.5 * speed < np.linalg.norm(on.get_velocities()) <= speed


def test_running_moments_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    x = np.arange(500) * 0.01
    y = -17600.0 + 1e-6 * x + 1e-7 * rng.standard_normal(500)
    moments = RunningMoments()
    for point in zip(x, y, strict=True):
        moments.add(*map(float, point))
        moments = RunningMoments(**json.loads(json.dumps(moments.state())))
    assert moments.slope == pytest.approx(np.polyfit(x, y + 17600.0, 1)[0], rel=1e-3)
    assert moments.std_y == pytest.approx(np.std(y + 17600.0), rel=1e-3)
    assert RunningMoments().slope is None
