"""Initial velocities and degrees of freedom of a simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.datasets.modes import rigid_motions
from ffpretrain.datasets.sampling import fixed_atoms
from ffpretrain.errors import ConfigError

if TYPE_CHECKING:
    from ase import Atoms


def degrees_of_freedom(atoms: Atoms, rotation_is_free: bool) -> int:
    """Return how many degrees of freedom share the kinetic energy.

    A total momentum of zero stays zero: three degrees of freedom less. Where nothing repeats, an angular
    momentum of zero stays zero as well: three less, or two for a line of atoms. A thermostat that counts them
    nevertheless heats the rest: nine atoms set to 300 K would run at 386 K. Where atoms are fixed neither is
    conserved and every coordinate of a free atom counts.

    Args:
        atoms: the structure.
        rotation_is_free: the thermostat turns the molecule (Langevin does, velocity rescaling cannot).

    Raises:
        ConfigError: nothing can move.
    """
    fixed = len(fixed_atoms(atoms))
    removed = 0
    if not fixed:
        removed = 3 if rotation_is_free else rigid_motions(atoms).shape[1]
    free = 3 * (len(atoms) - fixed) - removed
    if free <= 0:
        raise ConfigError(
            f"dynamics needs something that moves: {len(atoms)} atoms with {fixed} fixed leave no degree of "
            "freedom; use a larger structure"
        )
    return free


def draw_momenta(atoms: Atoms, temperature: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return momenta ``[N, 3]`` of the Maxwell-Boltzmann distribution, in ASE's units.

    Fixed atoms stay at rest; where none is fixed, total momentum and rotation are projected out in
    mass-weighted coordinates, which leaves the distribution of the remaining motions as it was.

    Args:
        atoms: the structure.
        temperature: K.
        rng: every draw comes from it.
    """
    drawn = rng.standard_normal((len(atoms), 3)) * np.sqrt(units.KB * temperature)
    drawn[fixed_atoms(atoms)] = 0.0
    root = np.sqrt(atoms.get_masses())[:, None]
    return at_rest(atoms, drawn * root)


def at_rest(atoms: Atoms, momenta: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return momenta ``[N, 3]`` without total momentum and, where nothing repeats, without rotation.

    Momenta of a structure with fixed atoms, which cannot drift, come back as they are.
    """
    if len(fixed_atoms(atoms)):
        return momenta
    root = np.sqrt(atoms.get_masses())[:, None]
    weighted = (momenta / root).ravel()
    rigid = rigid_motions(atoms)
    weighted = weighted - rigid @ (rigid.T @ weighted)
    return np.asarray(weighted.reshape(-1, 3) * root)


def kinetic_energy(momenta: NDArray[np.float64], masses: NDArray[np.float64]) -> float:
    """Return the kinetic energy in eV of momenta ``[N, 3]`` and masses ``[N]`` amu."""
    return float(0.5 * (np.square(momenta) / masses[:, None]).sum())


def temperature(kinetic: float, dof: int) -> float:
    """Return the temperature in K of a kinetic energy in eV over some degrees of freedom."""
    return 2.0 * kinetic / (dof * units.KB)
