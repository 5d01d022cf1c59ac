"""Bonds of one molecule, given once: classes of its pairs by the number of bonds between them.

They come from a fixed list and never from the distances at hand: a class that changed while an atom moves
would make the energy jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, atoms_per_graph
from ffpretrain.pairs import Pairs

if TYPE_CHECKING:
    from ase import Atoms

#: one, two and three bonds apart, and all other pairs
HOP_CLASSES = 4


def find_bonds(atoms: Atoms) -> list[list[int]]:
    """Return the bonds of a reference geometry, by the rule of :func:`ffpretrain.molecules.find_bonds`.

    Args:
        atoms: one molecule, best at a minimum.
    """
    from ffpretrain import molecules

    return [[int(i), int(j)] for i, j, _ in molecules.find_bonds(atoms.numbers, atoms.positions)]


def hop_classes(n_atoms: int, bonds: Sequence[Sequence[int]]) -> Tensor:
    """Return the class of each pair, int64 ``[n, n]``.

    0 for bonded atoms, 1 and 2 for those two and three bonds apart, 3 for all others, self-pairs too.

    Args:
        n_atoms: number of atoms n.
        bonds: pairs of different atoms, counted from 0, each in either order.

    Raises:
        ConfigError: a bond that does not join two atoms of the molecule.
    """
    bonded = torch.zeros(n_atoms, n_atoms, dtype=torch.bool)
    for bond in bonds:
        if len(bond) != 2 or bond[0] == bond[1] or not all(0 <= i < n_atoms for i in bond):
            raise ConfigError(
                f"bonds: {list(bond)} does not join two of the {n_atoms} atoms, which count from 0"
            )
        bonded[bond[0], bond[1]] = bonded[bond[1], bond[0]] = True
    classes = torch.full((n_atoms, n_atoms), HOP_CLASSES - 1)
    reached = torch.eye(n_atoms, dtype=torch.bool)
    for hops in range(HOP_CLASSES - 1):
        further = (reached.double() @ bonded.double() > 0) & ~reached
        classes[further] = hops
        reached |= further
    return classes


class Topology(nn.Module):
    """Classes of all pairs in structures that are one molecule, or several of it, atoms in a fixed order.

    Args:
        numbers: atomic numbers of the molecule.
        bonds: as :func:`hop_classes`.

    Raises:
        ConfigError: no atoms, or as :func:`hop_classes`.
    """

    numbers: Tensor
    table: Tensor

    def __init__(self, numbers: Sequence[int], bonds: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if not numbers:
            raise ConfigError("bonds need the molecule they belong to: give its atomic numbers")
        self.register_buffer("numbers", torch.tensor(list(numbers)), persistent=False)
        self.register_buffer("table", hop_classes(len(numbers), bonds), persistent=False)

    def check(self, graph: Graph) -> None:
        """Refuse what the bonds do not describe.

        Raises:
            UnsupportedInputError: another molecule, another order of atoms, or a periodic structure, where
                a bond to an image cannot be told from one within the cell.
        """
        n = len(self.numbers)
        if bool((graph.cell != 0).any()):
            raise UnsupportedInputError("edge types by bonds need molecules in vacuum; leave out bonds")
        whole = not bool((atoms_per_graph(graph) % n).any())
        if not whole or not bool((graph.z.view(-1, n) == self.numbers).all()):
            from ase.formula import Formula

            own = Formula.from_list([_symbol(z) for z in self.numbers.tolist()]).format("hill")
            raise UnsupportedInputError(
                f"the backbone's bonds are those of {own} with its {n} atoms in one order; another structure "
                "needs a backbone with its own numbers and bonds, or without"
            )

    def classes(self, z: Tensor, pairs: Pairs) -> Tensor:
        """Return the class of each pair, int64 ``[P]``; atoms of different molecules have the last one.

        Args:
            z: atomic numbers ``[N]``, of whole molecules.
            pairs: in either layout.

        Raises:
            UnsupportedInputError: the number of atoms is that of no whole molecules.
        """
        n = len(self.numbers)
        if len(z) % n:
            raise UnsupportedInputError(f"the backbone's bonds are for {n} atoms, the structure has {len(z)}")
        every = torch.arange(len(z), device=z.device)
        place, molecule = every % n, every // n
        same = pairs.center(molecule) == pairs.neighbor(molecule)
        return torch.where(same, self.table[pairs.center(place), pairs.neighbor(place)], HOP_CLASSES - 1)

    def nan_unless_fit(self, z: Tensor) -> Tensor:
        """Return 0 where ``z [N]`` are atoms of the molecule in its order, else NaN.

        Compiled functions cannot raise: added to their numbers, this keeps another molecule from getting any.
        """
        fits = (z.view(-1, len(self.numbers)) == self.numbers).all()
        return torch.where(fits, 0.0, float("nan"))


def _symbol(number: int) -> str:
    from ase.data import chemical_symbols

    return chemical_symbols[number] if 0 < number < len(chemical_symbols) else "X"
