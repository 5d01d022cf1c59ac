"""A neighbour list that is rebuilt only when atoms have moved, and is exact at every call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ffpretrain.neighbors import neighbor_list

#: Å added to the cutoff when a list is built; it then serves until an atom has moved half of it
SKIN = 1.0


class VerletList:
    """Pairs within a cutoff, found among the pairs of a longer list that is kept while it is valid.

    The pairs handed out are those closer than the cutoff, whatever the age of the longer list, and always in
    the same order (centre, neighbour, lattice translation). So a run that is continued from a file, and
    builds its list anew, adds up the same numbers in the same order as one that was never interrupted.

    Displacements are compared as given, never wrapped into the cell: an atom that is put back into the box
    counts as moved by a lattice vector and its translations are found anew.

    Args:
        cutoff: Å; pairs at exactly this distance are left out.
        skin: Å.
    """

    def __init__(self, cutoff: float, skin: float = SKIN) -> None:
        self.cutoff, self.skin = float(cutoff), float(skin)
        self.builds = 0
        self._pos: Tensor | None = None
        self._cell: Tensor | None = None
        self._pbc: tuple[bool, ...] = ()
        self._index = torch.empty(2, 0, dtype=torch.int64)
        self._shift = torch.empty(0, 3)

    def pairs(self, pos: Tensor, cell: Tensor | None, pbc: Sequence[bool]) -> tuple[Tensor, Tensor, float]:
        """Return the pairs of one structure.

        Args:
            pos: ``[N, 3]`` Å, float64.
            cell: lattice vectors in rows ``[3, 3]`` Å, or None.
            pbc: which directions repeat.

        Returns:
            ``edge_index [2, E]`` (neighbour, centre), ``edge_shift [E, 3]`` Å and the shortest distance in Å,
            infinite where there is no pair.

        Raises:
            UnsupportedInputError: a periodic direction without cell vector, or a cell without volume.
        """
        index, shift = self.candidates(pos, cell, pbc)
        vector = pos.index_select(0, index[0]) + shift - pos.index_select(0, index[1])
        squared = vector.square().sum(-1)
        keep = squared < self.cutoff**2
        shortest = float(squared.min().sqrt()) if len(squared) else float("inf")
        return index[:, keep], shift[keep], shortest

    def candidates(self, pos: Tensor, cell: Tensor | None, pbc: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Return the longer list as it is, for a caller who leaves out the pairs beyond the cutoff.

        It stays the same object of the same content until ``builds`` counts up.

        Args:
            pos: ``[N, 3]`` Å, float64.
            cell: lattice vectors in rows ``[3, 3]`` Å, or None.
            pbc: which directions repeat.

        Returns:
            ``edge_index [2, E]`` (neighbour, centre) and ``edge_shift [E, 3]`` Å.

        Raises:
            UnsupportedInputError: as :meth:`pairs`.
        """
        if not self._valid(pos, cell, pbc):
            self._build(pos, cell, pbc)
        return self._index, self._shift

    def _valid(self, pos: Tensor, cell: Tensor | None, pbc: Sequence[bool]) -> bool:
        if self._pos is None or self._pos.shape != pos.shape or self._pbc != tuple(pbc):
            return False
        if any(pbc) and (cell is None or self._cell is None or not torch.equal(cell, self._cell)):
            return False
        moved = (pos - self._pos).square().sum(-1).max()
        return bool(moved <= (0.5 * self.skin) ** 2)

    def _build(self, pos: Tensor, cell: Tensor | None, pbc: Sequence[bool]) -> None:
        index, shift = neighbor_list(pos, self.cutoff + self.skin, cell, pbc)
        if any(pbc) and len(shift):
            keys = torch.cat([shift, index.to(shift.dtype).T], dim=1).cpu().numpy()
            order = torch.from_numpy(np.lexsort(keys.T)).to(index.device)
            index, shift = index[:, order], shift[order]
        elif not any(pbc):
            order = torch.argsort(index[1] * len(pos) + index[0])
            index, shift = index[:, order], shift[order]
        self._index, self._shift = index, shift
        self._pos, self._cell, self._pbc = pos.clone(), None if cell is None else cell.clone(), tuple(pbc)
        self.builds += 1
