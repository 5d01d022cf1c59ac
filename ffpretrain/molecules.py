"""Molecules as bonds: which atoms are bonded and how, which bonds can be turned, and the turning itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.errors import DataError, UnsupportedInputError
from ffpretrain.graphs import Graph, Sample

#: bonded below this many times the sum of the covalent radii; with a hydrogen, whose next neighbour but one
#: is far, more is allowed for vibration. 1.15 keeps atoms across a strained small ring apart.
HEAVY_FACTOR, HYDROGEN_FACTOR = 1.15, 1.3
#: bonds between unsaturated atoms below this many times the sum of the radii are double, then triple: lies
#: between C=C, 0.88, C=N, 0.87, and the single bonds of conjugated systems, 0.94 to 0.97; C#C is 0.79
_DOUBLE, _TRIPLE = 0.92, 0.82
#: neighbours of an atom that has single bonds only
_VALENCE = {1: 1, 5: 3, 6: 4, 7: 3, 8: 2, 9: 1, 14: 4, 15: 3, 16: 2, 17: 1, 34: 2, 35: 1, 53: 1}
SINGLE, TRIPLE = 1, 3

Integers = NDArray[np.int64]
T = TypeVar("T")


class Rotors(NamedTuple):
    """Bonds of one molecule that can be turned; each parts it into two sides, of which the smaller one moves.

    Attributes:
        axes: the atom of the bond that stays and the one whose side moves ``[R, 2]``.
        moved: atoms of the side that moves, bool ``[R, N]``; the bond's own atoms stay where they are.
    """

    axes: NDArray[np.int16]
    moved: NDArray[np.bool_]


class Molecule(NamedTuple):
    """One molecule of a batch.

    Attributes:
        numbers: atomic numbers ``[N]``.
        positions: Å ``[N, 3]``, float64.
        bonds: atom, atom, order ``[K, 3]``; 1 single, 2 double, 3 triple, 4 aromatic, as in MDL files.
        rotors: bonds that can be turned.
    """

    numbers: Integers
    positions: NDArray[np.float64]
    bonds: Integers
    rotors: Rotors


def find_bonds(numbers: Integers, positions: NDArray[np.float64]) -> Integers:
    """Return bonds and their orders from the geometry, ``[K, 3]``: atom, atom, order 1, 2 or 3.

    Two atoms are bonded where they are closer than 1.15 times the sum of their covalent radii (Cordero et al.
    2008, from ASE), 1.3 times where one is hydrogen. A bond is double where both atoms have fewer neighbours
    than single bonds would give them and it is shorter than 0.92 times that sum, triple below 0.82. Aromatic
    bonds come out as double or single; they lie in rings, where that does not matter here.

    Args:
        numbers: ``[N]``.
        positions: Å ``[N, 3]``; best at a minimum.
    """
    from ase.data import covalent_radii

    radii = covalent_radii[numbers]
    scale = np.where((numbers[:, None] == 1) | (numbers == 1), HYDROGEN_FACTOR, HEAVY_FACTOR)
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    ratio = distance / (radii[:, None] + radii)
    pairs = np.argwhere(np.triu(ratio < scale, 1))
    neighbours = np.bincount(pairs.ravel(), minlength=len(numbers))
    full = np.array([_VALENCE.get(int(z), 0) for z in numbers])
    unsaturated = (neighbours < full)[pairs].all(1)
    ratio = ratio[pairs[:, 0], pairs[:, 1]]
    orders = 1 + (unsaturated & (ratio < _DOUBLE)) + (unsaturated & (ratio < _TRIPLE))
    return np.column_stack([pairs, orders])


def neighbour_lists(n_atoms: int, bonds: Integers) -> list[list[int]]:
    """Return the atoms each atom is bonded to, in ascending order."""
    lists: list[list[int]] = [[] for _ in range(n_atoms)]
    for a, b in bonds[:, :2].tolist():
        lists[a].append(b)
        lists[b].append(a)
    return [sorted(found) for found in lists]


def find_rotors(n_atoms: int, bonds: Integers) -> Rotors:
    """Return the bonds that can be turned, by Frad's pattern.

    They are single, lie in no ring, both ends have further neighbours and neither has a triple bond.
    Hydrogens count as neighbours: a methyl group turns.

    Args:
        n_atoms: N.
        bonds: ``[K, 3]``.
    """
    at_triple = set(bonds[bonds[:, 2] == TRIPLE, :2].ravel().tolist())
    candidates = [tuple(row[:2]) for row in bonds.tolist() if row[2] == SINGLE and not at_triple & {*row[:2]}]
    return _rotors(n_atoms, neighbour_lists(n_atoms, bonds), candidates)


def rotors_of_torsions(n_atoms: int, bonds: Integers, torsions: Integers, where: str) -> Rotors:
    """Return the bonds in the middle of torsions ``[T, 4]`` that were given, each once.

    Raises:
        DataError: one of them is no bond, lies in a ring or ends at an atom without further bonds.
    """
    lists = neighbour_lists(n_atoms, bonds)
    candidates = sorted({(min(t[1:3]), max(t[1:3])) for t in torsions.tolist()})
    rotors = _rotors(n_atoms, lists, candidates)
    turned = {tuple(sorted(axis)) for axis in rotors.axes.tolist()}
    for a, b in candidates:
        if (a, b) not in turned:
            raise DataError(
                f"{where}: the torsion around atoms {a} and {b} cannot be turned: there is no bond, or it "
                "lies in a ring or at the end of a chain; remove it"
            )
    return rotors


def _rotors(n_atoms: int, lists: list[list[int]], candidates: Iterable[tuple[int, int]]) -> Rotors:
    axes, moved = [], []
    for a, b in candidates:
        if b not in lists[a] or len(lists[a]) < 2 or len(lists[b]) < 2:
            continue
        side = side_of(lists, a, b)
        if a in side:
            continue
        other = side_of(lists, b, a)
        axis, chosen = ((a, b), side) if len(side) <= len(other) else ((b, a), other)
        mask = np.zeros(n_atoms, dtype=np.bool_)
        mask[list(chosen - {axis[1]})] = True
        axes.append(axis)
        moved.append(mask)
    return Rotors(
        np.array(axes, dtype=np.int16).reshape(-1, 2), np.array(moved, dtype=np.bool_).reshape(-1, n_atoms)
    )


def side_of(lists: list[list[int]], start: int, first: int) -> set[int]:
    """Return the atoms reached from ``first`` without the bond to ``start``; with it where a ring closes.

    Args:
        lists: of :func:`neighbour_lists`.
        start: one atom of the bond.
        first: the other one.
    """
    found, stack = {first}, [n for n in lists[first] if n != start]
    while stack:
        atom = stack.pop()
        if atom not in found:
            found.add(atom)
            stack += lists[atom]
    return found


def turn_bonds(pos: Tensor, rotors: Sequence[Rotors], counts: Sequence[int], angles: Tensor) -> Tensor:
    """Return positions ``[N, 3]`` after turning bonds one after the other, all molecules at once.

    Every dihedral around a bond grows by its angle; bond lengths, bond angles and all other dihedrals stay. A
    zero angle leaves every bit of the positions.

    Args:
        pos: Å ``[N, 3]``.
        rotors: of each molecule.
        counts: atoms of each molecule.
        angles: radians, of all rotors one molecule after the other ``[sum(R)]``.
    """
    first_angle = np.cumsum([0, *(len(r.axes) for r in rotors)])
    first_atom = np.cumsum([0, *counts])
    for turn in range(max((len(r.axes) for r in rotors), default=0)):
        atoms, axes, which = [], [], []
        for b, found in enumerate(rotors):
            if turn < len(found.axes):
                here = np.flatnonzero(found.moved[turn]) + first_atom[b]
                atoms.append(here)
                axes.append(np.tile(found.axes[turn] + first_atom[b], (len(here), 1)))
                which.append(np.full(len(here), first_angle[b] + turn))
        moving, around = (torch.as_tensor(np.concatenate(part), device=pos.device) for part in (atoms, axes))
        angle = angles[torch.as_tensor(np.concatenate(which), device=pos.device)].to(pos).unsqueeze(1)
        axis = torch.nn.functional.normalize(pos[around[:, 1]] - pos[around[:, 0]], dim=1)
        arm = pos[moving] - pos[around[:, 1]]
        across = torch.linalg.cross(axis, arm)
        # Rodrigues' rotation less the identity
        change = angle.sin() * across + (1 - angle.cos()) * torch.linalg.cross(axis, across)
        pos = pos.index_add(0, moving, change)
    return pos


class MoleculeCache(Generic[T]):
    """What is known of each molecule of a batch, worked out once.

    Entries are found by the content of a structure, not by its number, so that one cache serves several
    datasets; the oldest are dropped when there are too many.

    Args:
        build: makes an entry.
        limit: number of entries kept.
    """

    def __init__(self, build: Callable[[Molecule], T], limit: int = 200_000) -> None:
        self._build, self._limit = build, limit
        self._known: dict[bytes, T] = {}

    def __call__(self, sample: Sample | Graph) -> list[T]:
        """Return an entry for each structure.

        Bonds come from the sample's extras ``bonds [K, 3]`` (atom, atom, order; atoms counted from 0 in each
        structure) with ``n_bonds [B]``, else from the geometry. Rotatable torsions ``torsions [T, 4]`` with
        ``n_torsions [B]`` decide which bonds can be turned, else the orders of the bonds. A negative number
        stands for a structure of which nothing was given.

        Raises:
            UnsupportedInputError: a periodic structure.
            DataError: given bonds or torsions that do not fit.
        """
        graph, extras = (sample.graph, sample.extras) if isinstance(sample, Sample) else (sample, {})
        if bool((graph.cell != 0).any()):
            raise UnsupportedInputError(
                "bonds are known of molecules only, and a structure is periodic; choose another objective"
            )
        numbers = graph.z.cpu().numpy()
        positions = graph.pos.detach().cpu().numpy().astype(np.float64)
        counts = torch.bincount(graph.batch, minlength=graph.n_graphs).tolist()
        bonds, torsions = _given(extras, "bonds", 3, counts), _given(extras, "torsions", 4, counts)
        index = extras["index"].tolist() if "index" in extras else range(len(counts))
        found = []
        for b, (start, end) in enumerate(pairwise(np.cumsum([0, *counts]).tolist())):
            parts = numbers[start:end], positions[start:end], bonds[b], torsions[b]
            key = hashlib.blake2b(
                b"|".join(b"" if part is None else part.tobytes() for part in parts), digest_size=16
            ).digest()
            if key not in self._known:
                if len(self._known) >= self._limit:
                    del self._known[next(iter(self._known))]
                self._known[key] = self._build(_molecule(*parts, where=f"structure {index[b]}"))
            found.append(self._known[key])
        return found


def _molecule(
    numbers: Integers,
    positions: NDArray[np.float64],
    bonds: Integers | None,
    torsions: Integers | None,
    where: str,
) -> Molecule:
    n = len(numbers)
    for name, given in (("bonds", None if bonds is None else bonds[:, :2]), ("torsions", torsions)):
        if given is None:
            continue
        if ((given < 0) | (given >= n)).any():
            raise DataError(f"{where}: {name} name an atom that its {n} atoms do not have; count from 0")
        if any(len({*row}) < len(row) for row in given.tolist()):
            raise DataError(f"{where}: one of the {name} names an atom twice; remove it")
    bonds = find_bonds(numbers, positions) if bonds is None else _sorted(bonds, where)
    if torsions is None:
        rotors = find_rotors(n, bonds)
    else:
        rotors = rotors_of_torsions(n, bonds, torsions, where)
    return Molecule(numbers, positions, bonds, rotors)


def _sorted(bonds: Integers, where: str) -> Integers:
    """Return bonds as :func:`find_bonds` lists them: noise does not depend on how they were written."""
    ends = np.sort(bonds[:, :2], axis=1)
    order = np.lexsort((ends[:, 1], ends[:, 0]))
    ends = ends[order]
    twice = np.flatnonzero((ends[1:] == ends[:-1]).all(1))
    if len(twice):
        a, b = ends[twice[0]].tolist()
        raise DataError(f"{where}: the bond of atoms {a} and {b} is given twice; remove one")
    return np.column_stack([ends, bonds[order, 2]])


def _given(extras: dict[str, Tensor], name: str, width: int, counts: list[int]) -> list[Integers | None]:
    """Return an extra's rows for each structure, None where there is none."""
    if name not in extras:
        return [None] * len(counts)
    rows, lengths = extras[name].cpu().numpy(), extras.get(f"n_{name}")
    if lengths is None or rows.ndim != 2 or rows.shape[1] != width or len(lengths) != len(counts):
        raise DataError(
            f"extras {name!r} must be [n, {width}] with their number for each structure in 'n_{name}' [B]"
        )
    ends = np.cumsum([max(0, n) for n in lengths.tolist()]).tolist()
    if ends[-1] != len(rows):
        raise DataError(f"extras 'n_{name}' sum to {ends[-1]}, but there are {len(rows)} {name}")
    starts = [0, *ends]
    return [
        rows[starts[b] : ends[b]].astype(np.int64) if n >= 0 else None for b, n in enumerate(lengths.tolist())
    ]
