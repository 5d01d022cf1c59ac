"""Bond lengths, bond angles and torsions (BAT) of molecules, their changes and their gradients.

All of them are redundant, as in a classical force field: every bond, every angle at an atom, every torsion
around a bond. An angle of 180 degrees has no gradient, so angles that are nearly straight are replaced by the
three components of ``b``, the sum of the unit vectors from the middle atom to the two others: for a nearly
straight angle ``|b| = 2 cos(theta / 2)``, which is close to ``pi - theta``. Torsions over such an angle are
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.molecules import Integers, neighbour_lists

#: degrees: from here on an angle counts as straight; a torsion over an angle beyond the second has no meaning
STRAIGHT, TORSION_LIMIT = 175.0, 165.0


class Terms(NamedTuple):
    """Internal coordinates of one molecule by their atoms, int16.

    Attributes:
        bonds: ``[b, 2]``.
        angles: ``[a, 3]``, the middle atom in the middle.
        bends: ``[3 s, 3]``: nearly straight angles, each three times in a row, once for a component.
        torsions: ``[t, 4]``.
    """

    bonds: NDArray[np.int16]
    angles: NDArray[np.int16]
    bends: NDArray[np.int16]
    torsions: NDArray[np.int16]

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(len(part) for part in self)


def find_terms(positions: NDArray[np.float64], bonds: Integers) -> Terms:
    """Return all bonds, angles and torsions of a molecule.

    Args:
        positions: Å ``[N, 3]``; decide which angles are straight.
        bonds: ``[K, >= 2]``.
    """
    lists = neighbour_lists(len(positions), bonds)
    angles = _rows([(i, j, k) for j, near in enumerate(lists) for i, k in combinations(near, 2)], 3)
    size = np.degrees(bond_angle(torch.from_numpy(positions), torch.from_numpy(angles)).numpy())
    straight = size > STRAIGHT
    flat = {(i, j, k) for i, j, k in angles[size > TORSION_LIMIT].tolist()}
    torsions = [
        (i, j, k, l)
        for j, k in bonds[:, :2].tolist()
        for i in lists[j]
        for l in lists[k]  # noqa: E741
        if i != k and l not in (i, j)
        if (min(i, k), j, max(i, k)) not in flat and (min(j, l), k, max(j, l)) not in flat
    ]
    parts = bonds[:, :2], angles[~straight], np.repeat(angles[straight], 3, axis=0), _rows(torsions, 4)
    return Terms(*(part.astype(np.int16) for part in parts))


def _rows(rows: Sequence[tuple[int, ...]], width: int) -> Integers:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def bond_length(pos: Tensor, index: Tensor) -> Tensor:
    """Return distances in Å ``[..., n]`` of pairs ``[n, 2]`` at positions ``[..., N, 3]``."""
    return _length(pos[..., index, :])


def bond_angle(pos: Tensor, index: Tensor) -> Tensor:
    """Return angles in radians, 0 to pi, ``[..., n]`` of triples ``[n, 3]`` at positions ``[..., N, 3]``."""
    return _angle(pos[..., index, :])


def dihedral(pos: Tensor, index: Tensor) -> Tensor:
    """Return dihedrals in radians, -pi to pi, ``[..., n]`` of quadruples ``[n, 4]``; IUPAC's sign."""
    return _dihedral(pos[..., index, :])


def wrapped(angle: Tensor) -> Tensor:
    """Return angles in radians moved by whole turns into [-pi, pi)."""
    return torch.remainder(angle + torch.pi, 2 * torch.pi) - torch.pi


def _length(points: Tensor) -> Tensor:
    return (points[..., 0, :] - points[..., 1, :]).norm(dim=-1)


def _angle(points: Tensor) -> Tensor:
    a, b = points[..., 0, :] - points[..., 1, :], points[..., 2, :] - points[..., 1, :]
    return torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))


def _bend(points: Tensor) -> Tensor:
    arms = points[..., [0, 2], :] - points[..., 1:2, :]
    both = (arms / arms.norm(dim=-1, keepdim=True)).sum(-2)
    component = torch.arange(both.shape[-2], device=both.device).remainder(3).unsqueeze(-1)
    return both.gather(-1, component.expand(*both.shape[:-1], 1)).squeeze(-1)


def _dihedral(points: Tensor) -> Tensor:
    first, middle, last = (points[..., i + 1, :] - points[..., i, :] for i in range(3))
    a, b = torch.linalg.cross(first, middle), torch.linalg.cross(middle, last)
    return torch.atan2((torch.linalg.cross(a, b) * middle).sum(-1) / middle.norm(dim=-1), (a * b).sum(-1))


_FUNCTIONS = (_length, _angle, _bend, _dihedral)


class InternalCoordinates:
    """The internal coordinates of a batch of molecules, those of one kind together.

    Args:
        terms: of each molecule.
        counts: atoms of each molecule.
        device: of the positions.

    Attributes:
        counts: atoms of each molecule.
        index: atoms of each coordinate, one tensor a kind, in the order of :class:`Terms`.
        structure: structure of each coordinate, int64 ``[K]``.
        place: place of each coordinate when those of one structure stand together, int64 ``[K]``.
        is_bond: whether a coordinate is a bond length, bool ``[K]``.
    """

    def __init__(
        self, terms: Sequence[Terms], counts: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        atoms = np.cumsum([0, *counts])
        places = np.cumsum([0, *(t.size for t in terms)])[:-1]
        index, structure, place = [], [], []
        for kind in range(len(_FUNCTIONS)):
            parts = [t[kind] for t in terms]
            index.append(
                np.concatenate([p.astype(np.int64) + a for p, a in zip(parts, atoms[:-1], strict=True)])
            )
            structure += [np.full(len(p), b) for b, p in enumerate(parts)]
            place += [np.arange(len(p)) + s for p, s in zip(parts, places, strict=True)]
            places = places + [len(p) for p in parts]
        self.index = [torch.as_tensor(part, device=device) for part in index]
        self.structure = torch.as_tensor(np.concatenate(structure), device=device)
        self.place = torch.as_tensor(np.concatenate(place), device=device)
        self._sizes = [len(part) for part in index]
        self.counts, self._most = list(counts), max(t.size for t in terms)
        self._first = torch.as_tensor(atoms[:-1], device=device)
        rows = torch.bincount(self.structure, minlength=len(terms))
        self._row = self.place - (rows.cumsum(0) - rows)[self.structure]
        self.is_bond = torch.arange(len(self.place), device=device) < self._sizes[0]

    def values(self, pos: Tensor) -> Tensor:
        """Return all coordinates in Å and radians ``[..., K]`` at positions ``[..., N, 3]``."""
        return torch.cat([f(pos[..., i, :]) for f, i in zip(_FUNCTIONS, self.index, strict=True)], dim=-1)

    def difference(self, values: Tensor, reference: Tensor) -> Tensor:
        """Return ``values - reference`` ``[..., K]``, torsions by the shorter way round the circle."""
        plain = values - reference
        torsions = self._sizes[-1]
        start = plain.shape[-1] - torsions
        return torch.cat([plain[..., :start], wrapped(plain[..., start:])], dim=-1)

    def straightened(self, values: Tensor) -> Tensor:
        """Return the values with straight angles at exactly 180 degrees: what they are counted from."""
        bonds, angles, bends, _ = self._sizes
        mask = torch.zeros_like(values, dtype=torch.bool)
        mask[..., bonds + angles : bonds + angles + bends] = True
        return values.masked_fill(mask, 0.0)

    def gradients(self, pos: Tensor) -> list[Tensor]:
        """Return the gradient of each coordinate by its own atoms, one ``[n, atoms, 3]`` a kind.

        Args:
            pos: ``[N, 3]``.
        """
        found = []
        for function, index in zip(_FUNCTIONS, self.index, strict=True):
            points = pos.detach()[index].requires_grad_()
            with torch.enable_grad():
                # each coordinate reads its own copy of its atoms, so the gradient of the sum is that of each
                (gradient,) = torch.autograd.grad(function(points).sum(), points)
            found.append(gradient)
        return found

    def gradient_of_sum(self, weights: Tensor, pos: Tensor) -> Tensor:
        """Return ``sum_k weights_k grad q_k`` ``[N, 3]``.

        Args:
            weights: ``[K]``.
            pos: ``[N, 3]``.
        """
        total = torch.zeros_like(pos)
        parts = weights.split(self._sizes)
        for gradient, index, weight in zip(self.gradients(pos), self.index, parts, strict=True):
            total.index_add_(0, index.flatten(), (weight.view(-1, 1, 1) * gradient).flatten(0, 1))
        return total

    def listed(self, values: Tensor) -> Tensor:
        """Return values ``[K]`` structure by structure, zeros behind the last of each, ``[B, most K]``."""
        found = values.new_zeros(len(self.counts), self._most)
        found[self.structure, self._row] = values
        return found

    def matrices(self, pos: Tensor, weights: Tensor) -> Tensor:
        """Return the derivatives ``w_k dq_k/dx`` of each structure, ``[B, most K, most N, 3]``.

        Wilson's B, weighted. Rows are listed as by :meth:`listed`; beyond a structure's own size it is zero.

        Args:
            pos: ``[N, 3]``.
            weights: ``[K]``.
        """
        matrices = pos.new_zeros(len(self.counts), self._most, max(self.counts), 3)
        split = (part.split(self._sizes) for part in (self._row, self.structure, weights))
        for gradient, index, row, s, weight in zip(self.gradients(pos), self.index, *split, strict=True):
            atom = index - self._first[s].unsqueeze(1)
            matrices[s.unsqueeze(1), row.unsqueeze(1), atom] = weight.view(-1, 1, 1) * gradient
        return matrices
