"""Vibrational modes of a structure: force constants by central differences, rigid motions projected out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ffpretrain import units

if TYPE_CHECKING:
    from ase import Atoms

Forces = Callable[[Sequence["Atoms"]], Sequence[NDArray[np.float64]]]

_SPEED_OF_LIGHT_CM_PER_FS = 2.99792458e-5
#: displaced structures between two reports of progress
_TOGETHER = 32


def normal_modes(
    atoms: Atoms,
    step: float = 0.005,
    free: NDArray[np.bool_] | None = None,
    forces: Forces | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the vibrational modes of a structure at a stationary point.

    Args:
        atoms: structure with a calculator, or without one where ``forces`` is given.
        step: Å, displacement of the central differences.
        free: bool ``[N]``, the atoms that move; all where None.
        forces: from structures to their forces ``[N, 3]`` eV/Å, where many at once are quicker than one by
            one; None asks the calculator.
        progress: called with the number of displaced structures done, of ``6 M`` for ``M`` atoms that move.

    Returns:
        Squared angular frequencies ``[K]`` in eV/Å²/amu, ascending, negative where imaginary, and orthonormal
        mass-weighted modes ``[K, N, 3]``, with the rigid motions of the free atoms projected out. Errors of
        the calculator, or of ``forces``, come through as they are.
    """
    n = len(atoms)
    moving = np.flatnonzero(np.ones(n, bool) if free is None else free)
    hessian = _hessian(atoms, step, moving, forces or _one_by_one(atoms), progress)
    return modes_of_hessian(atoms, hessian, moving)


def modes_of_hessian(
    atoms: Atoms, hessian: NDArray[np.float64], moving: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the vibrational modes that a matrix of force constants means.

    Args:
        atoms: the structure; its masses and positions are read.
        hessian: symmetric, ``[3M, 3M]`` eV/Å².
        moving: indices ``[M]`` of the atoms it is of; all where None.

    Returns:
        As :func:`normal_modes`.
    """
    n = len(atoms)
    moving = np.arange(n) if moving is None else moving
    weight = np.repeat(np.sqrt(atoms.get_masses()[moving]), 3)
    weighted = hessian / np.outer(weight, weight)
    rigid = rigid_motions(atoms) if len(moving) == n else np.zeros((3 * n, 0))
    basis = np.eye(len(weight))
    if rigid.shape[1]:  # the trailing columns of a complete QR span everything that is no rigid motion
        basis = np.linalg.qr(rigid, mode="complete")[0][:, rigid.shape[1] :]
    squared, vectors = np.linalg.eigh(basis.T @ weighted @ basis)
    modes = np.zeros((len(squared), n, 3))
    modes[:, moving] = (basis @ vectors).T.reshape(len(squared), len(moving), 3)
    return squared, modes


def wavenumbers(squared: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return wavenumbers in 1/cm of squared angular frequencies in eV/Å²/amu; imaginary ones are negative."""
    per_fs = np.sqrt(np.abs(squared)) * units.FS  # ASE's unit of time is Å √(amu/eV)
    return np.sign(squared) * per_fs / (2 * np.pi * _SPEED_OF_LIGHT_CM_PER_FS)


def _hessian(
    atoms: Atoms,
    step: float,
    moving: NDArray[np.int64],
    forces: Forces,
    progress: Callable[[int], object] | None,
) -> NDArray[np.float64]:
    displaced = []
    for atom in moving:
        for axis in range(3):
            for sign in (1.0, -1.0):
                one = atoms.copy()
                one.set_constraint()
                one.positions[atom, axis] += sign * step
                displaced.append(one)
    found: list[NDArray[np.float64]] = []
    for first in range(0, len(displaced), _TOGETHER):
        found += [one[moving].ravel() for one in forces(displaced[first : first + _TOGETHER])]
        if progress is not None:
            progress(len(found))
    plus, minus = np.array(found[0::2]), np.array(found[1::2])
    hessian = (minus - plus) / (2 * step)
    return np.asarray((hessian + hessian.T) / 2)


def _one_by_one(atoms: Atoms) -> Forces:
    """Return forces by the calculator of ``atoms``."""

    def forces(structures: Sequence[Atoms]) -> list[NDArray[np.float64]]:
        found = []
        for one in structures:
            one.calc = atoms.calc
            found.append(np.asarray(one.get_forces(), dtype=np.float64))
        return found

    return forces


def rigid_motions(atoms: Atoms) -> NDArray[np.float64]:
    """Return orthonormal mass-weighted translations, and rotations where nothing repeats, ``[3N, R]``."""
    root = np.sqrt(atoms.get_masses())
    centred = atoms.positions - atoms.get_center_of_mass()
    columns = [(root[:, None] * axis).ravel() for axis in np.eye(3)]
    if not atoms.pbc.any():
        columns += [(root[:, None] * np.cross(axis, centred)).ravel() for axis in np.eye(3)]
    left, sizes, _ = np.linalg.svd(np.array(columns).T, full_matrices=False)
    return np.asarray(left[:, sizes > 1e-6 * sizes[0]])  # a linear molecule has one rotation less
