"""When a simulation has left the world: values that are not finite, atoms that fly apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ffpretrain.errors import NonFiniteError, UserError
from ffpretrain.neighbors import neighbor_list

if TYPE_CHECKING:
    from ase import Atoms

#: Å an atom may move within one step; the fastest hydrogens at 1000 K move 0.1 Å in 1 fs
LONGEST_STEP = 1.0
#: Å; an atom is lost when its nearest neighbour is farther than this and twice as far as it was at the start
LOST_DISTANCE = 3.0
#: steps between two searches for lost atoms and fragments
SEARCH_INTERVAL = 10


class SimulationError(UserError):
    """The dynamics went wrong: atoms flew apart."""


class StabilityCheck:
    """Stops a simulation whose atoms fly apart.

    Three signs, from the quickest to notice to the slowest: an atom moves more than :data:`LONGEST_STEP` in
    one step; an atom's nearest neighbour is farther than ``lost_distance`` and than twice its distance at the
    start; the structure falls into more pieces than it had at the start, with nothing of one within the
    model's cutoff of another, so that no force can act between them.

    Args:
        atoms: the structure at the start.
        cutoff: Å, of the model; None leaves out the search for fragments.
        lost_distance: Å; None leaves out the second and third sign.
    """

    def __init__(
        self, atoms: Atoms, cutoff: float | None, lost_distance: float | None = LOST_DISTANCE
    ) -> None:
        self.cutoff, self.lost_distance = cutoff, lost_distance
        self._before: NDArray[np.float64] = atoms.positions.copy()
        if lost_distance is None or len(atoms) < 2:
            self.lost_distance = None
            return
        self.reach = max(cutoff or 0.0, 2.0 * lost_distance)
        nearest, self._pieces = self._look(atoms)
        # an atom that starts alone, such as one far over a surface, may stay alone
        limit = np.maximum(lost_distance, 2.0 * nearest)
        self._limit = np.where(limit > self.reach, np.inf, limit)

    def check_step(self, atoms: Atoms, step: int) -> None:
        """Look at the positions after one step.

        Raises:
            NonFiniteError: a position is not finite.
            SimulationError: an atom moved too far in this step.
        """
        positions = atoms.positions
        moved = np.abs(positions - self._before).max(axis=1)
        if not np.isfinite(moved).all():
            atom = int(np.flatnonzero(~np.isfinite(moved))[0])
            raise NonFiniteError(
                f"the position of atom {atom} is not finite at step {step}; shorten the timestep"
            )
        if moved.max() > LONGEST_STEP:
            atom = int(np.argmax(moved))
            raise SimulationError(
                f"atoms fly apart at step {step}: atom {atom} moved {moved[atom]:.4g} Å in one step; shorten "
                "the timestep, lower the temperature or start from a minimised structure"
            )
        self._before = positions.copy()

    def search(self, atoms: Atoms, step: int) -> None:
        """Look for lost atoms and fragments.

        Raises:
            SimulationError: there are some.
        """
        if self.lost_distance is None:
            return
        nearest, pieces = self._look(atoms)
        lost = np.flatnonzero(nearest > self._limit)
        if len(lost):
            raise SimulationError(
                f"atoms fly apart at step {step}: atom {lost[0]} is more than {self._limit[lost[0]]:.2f} Å "
                "from every other; lower the temperature, or allow it with a larger lost_distance"
            )
        if pieces > self._pieces:
            raise SimulationError(
                f"atoms fly apart at step {step}: the structure fell into {pieces} pieces farther apart than "
                f"the model's cutoff of {self.cutoff:g} Å; lower the temperature or use a cell"
            )

    def _look(self, atoms: Atoms) -> tuple[NDArray[np.float64], int]:
        """Return each atom's distance to its nearest neighbour in Å (else infinite), and the pieces."""
        pos = torch.from_numpy(atoms.positions.copy())
        cell = torch.from_numpy(np.array(atoms.cell.array))
        index, shift = neighbor_list(pos, self.reach, cell, [bool(p) for p in atoms.pbc])
        distance = (pos[index[0]] + shift - pos[index[1]]).norm(dim=1).numpy()
        neighbor, center = index.numpy()
        nearest = np.full(len(pos), np.inf)
        np.minimum.at(nearest, center, distance)
        if self.cutoff is None:
            return nearest, 1
        near = distance < self.cutoff
        return nearest, count_pieces(len(pos), center[near], neighbor[near])


def count_pieces(n_atoms: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Return the number of connected pieces; arguments as :func:`label_pieces`."""
    return len(np.unique(label_pieces(n_atoms, first, second)))


def label_pieces(n_atoms: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each atom the lowest atom of its connected piece, ``[N]``.

    Args:
        n_atoms: N.
        first: one end of each link; both directions of every link must be there.
        second: its other end.
    """
    label = np.arange(n_atoms)
    while True:
        lowest = label.copy()
        np.minimum.at(lowest, first, label[second])
        if np.array_equal(lowest, label):
            return label
        label = lowest
