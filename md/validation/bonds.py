"""Which atoms of a structure are bonded, and what their distances may become in dynamics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.md.stability import label_pieces
from ffpretrain.md.validation.thresholds import BROKEN_BOND, TOO_CLOSE
from ffpretrain.molecules import HEAVY_FACTOR, HYDROGEN_FACTOR
from ffpretrain.neighbors import neighbor_list

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.artifacts import ModelCard

#: atoms of a copy above which distances are taken copy by copy, to spare memory
_TOGETHER = 64

Array = NDArray[np.float64]
Bonds = NDArray[np.int64]


def bonds_of(atoms: Atoms) -> Bonds:
    """Return the bonded pairs of a structure, ``[B, 2]``, lower index first, each once.

    By the rule of :func:`ffpretrain.molecules.find_bonds`, but of any size and in a cell as well.
    """
    radii, hydrogen = covalent_radii[atoms.numbers], atoms.numbers == 1
    reach = HYDROGEN_FACTOR * 2 * float(radii.max())
    index, shift = neighbor_list(
        torch.tensor(atoms.positions), reach, torch.tensor(np.array(atoms.cell.array)), atoms.pbc.tolist()
    )
    second, first = index.numpy()
    vector = atoms.positions[second] + shift.numpy() - atoms.positions[first]
    scale = np.where(hydrogen[first] | hydrogen[second], HYDROGEN_FACTOR, HEAVY_FACTOR)
    bonded = np.linalg.norm(vector, axis=1) < scale * (radii[first] + radii[second])
    chosen = bonded & (first < second)
    return np.unique(np.stack([first[chosen], second[chosen]], axis=1), axis=0).astype(np.int64)


def pieces_of(n_atoms: int, bonds: Bonds) -> NDArray[np.int64]:
    """Return for each atom the lowest atom of its piece, ``[N]``."""
    return label_pieces(n_atoms, *np.concatenate([bonds, bonds[:, ::-1]]).T)


class Limits:
    """What bond lengths and distances a copy of a structure may have.

    Args:
        atoms: the structure.
        longest: largest length of each bond in training ``[B]`` Å, as :func:`bonds_of` lists them; None takes
            the structure's own.
        card: of the model, for the smallest distances in training; without them, the structure's smallest.
        device: of the positions to be judged.

    Attributes:
        bonds: ``[B, 2]``.
        source: where the bonds' lengths come from, for the report.
    """

    def __init__(
        self, atoms: Atoms, longest: Array | None, card: ModelCard | None, device: torch.device
    ) -> None:
        self.bonds = bonds_of(atoms)
        self.symbols = atoms.get_chemical_symbols()
        self.source = "reference geometry" if longest is None else "training data"
        cell = torch.tensor(np.array(atoms.cell.array), device=device)
        self._cell = cell if atoms.pbc.any() else None
        self._first, self._second = torch.tensor(self.bonds, device=device).reshape(-1, 2).T
        start = torch.tensor(atoms.positions, device=device)[None]
        own = self._vectors(start[:, self._first] - start[:, self._second]).norm(dim=-1)[0]
        lengths = own if longest is None else torch.as_tensor(longest, device=device)
        self.longest = BROKEN_BOND * lengths
        self.closest = TOO_CLOSE * torch.tensor(
            _smallest(atoms, card, float(self._distances(start).min())), device=device
        )

    def allow(self, positions: Tensor) -> Tensor:
        """Return which copies have no broken bond and no atoms too close.

        Args:
            positions: ``[R, N, 3]`` Å.

        Returns:
            bool ``[R]``.
        """
        length = self._vectors(positions[:, self._first] - positions[:, self._second]).norm(dim=-1)
        whole = (length <= self.longest).all(1)
        return whole & (self._distances(positions) >= self.closest).flatten(1).all(1)

    def explain(self, positions: Tensor) -> str:
        """Return in words what is wrong with one copy ``[N, 3]`` Å; empty where nothing is."""
        if not bool(torch.isfinite(positions).all()):
            return "a position is not finite"
        copy = positions[None]
        length = self._vectors(copy[:, self._first] - copy[:, self._second]).norm(dim=-1)[0]
        if len(length) and bool((length > self.longest).any()):
            place = int((length / self.longest).argmax())
            pair = "-".join(f"{self.symbols[i]}{i}" for i in self.bonds[place])
            most = float(self.longest[place])
            return f"bond {pair} is {float(length[place]):.2f} Å long, allowed {most:.2f} Å"
        distance = self._distances(copy)[0]
        if bool((distance < self.closest).any()):
            first, second = divmod(int((distance / self.closest).argmin()), len(distance))
            pair = " and ".join(f"{self.symbols[i]}{i}" for i in (first, second))
            least = float(self.closest[first, second])
            return f"{pair} are {float(distance[first, second]):.2f} Å apart, allowed {least:.2f} Å"
        return ""

    def _distances(self, positions: Tensor) -> Tensor:
        """Return distances of all pairs ``[R, N, N]`` Å, infinite for an atom with itself."""
        if positions.shape[1] > _TOGETHER and len(positions) > 1:
            return torch.cat([self._distances(copy[None]) for copy in positions])
        vector = self._vectors(positions.unsqueeze(1) - positions.unsqueeze(2))
        distance = vector.norm(dim=-1)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        return distance

    def _vectors(self, vector: Tensor) -> Tensor:
        """Return the shortest images of vectors ``[..., 3]``, right for all shorter than half the cell."""
        if self._cell is None:
            return vector
        return vector - (vector @ torch.linalg.inv(self._cell)).round() @ self._cell


def _smallest(atoms: Atoms, card: ModelCard | None, own: float) -> Array:
    """Return the smallest distance in training of every two atoms' elements ``[N, N]`` Å."""
    known = (card.pair_distances if card is not None else None) or {}
    least = card.min_distance if card is not None and card.min_distance is not None else own
    table: dict[tuple[int, int], float] = {}
    for name, (low, _) in known.items():
        one, other = (chemical_symbols.index(symbol) for symbol in name.split("-"))
        table[one, other] = table[other, one] = low
    return np.array([[table.get((int(a), int(b)), least) for b in atoms.numbers] for a in atoms.numbers])
