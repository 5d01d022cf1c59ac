"""Relaxing with a model that has forces and no energy: ASE's optimisers ask for one, if only to print it."""

from __future__ import annotations

from ase import Atoms
from ase.optimize.optimize import OptimizableAtoms


class _WithoutEnergy(OptimizableAtoms):
    """What an optimiser moves, with NaN where it asks for the energy."""

    def get_value(self) -> float:
        return float("nan")


class ForcesOnly:
    """Atoms for an optimiser that steers by forces alone; see :func:`forces_only`.

    Attributes:
        atoms: the structure that is moved.
    """

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms

    def __ase_optimizable__(self) -> OptimizableAtoms:
        """Return what ASE's optimisers move."""
        return _WithoutEnergy(self.atoms)

    def __len__(self) -> int:
        """Return the number of atoms."""
        return len(self.atoms)


def forces_only(atoms: Atoms) -> ForcesOnly:
    """Return atoms that ASE's force-based optimisers relax without an energy.

    ``FIRE(forces_only(atoms)).run(fmax=0.05)`` moves ``atoms``; the log shows ``nan`` for the energy. For
    FIRE (without ``downhill_check``), MDMin, BFGS and LBFGS. Optimisers that search along a line compare
    energies, and fail.

    Args:
        atoms: with a calculator, such as an :class:`~ffpretrain.FFCalculator` of a field.
    """
    return ForcesOnly(atoms)
