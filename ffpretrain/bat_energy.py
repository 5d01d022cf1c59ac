"""A classical force field of bonds, angles and torsions around a molecule's own geometry, and its noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.bat_widths import Widths
from ffpretrain.graphs import Graph, atoms_per_graph
from ffpretrain.internal_coordinates import InternalCoordinates, Terms, find_terms
from ffpretrain.molecules import Molecule, Rotors, turn_bonds

#: 1/Å²: modes softer than this, in units of kT, move less than their width, at most 0.25 Å
DAMPING = 4.0


class Springs(NamedTuple):
    """One molecule's energy: its internal coordinates and their widths.

    Attributes:
        terms: the coordinates.
        widths: Å and radians ``[K]``.
        rotors: bonds that can be turned.
        rotor: which of them a torsion turns with, -1 for every other coordinate, ``[K]``.
    """

    terms: Terms
    widths: NDArray[np.float64]
    rotors: Rotors
    rotor: NDArray[np.int16]


def springs_of(widths: Widths, molecule: Molecule) -> Springs:
    """Return the energy of a molecule around its geometry."""
    terms = find_terms(molecule.positions, molecule.bonds)
    number = {frozenset(axis): r for r, axis in enumerate(molecule.rotors.axes.tolist())}
    rotor = np.full(terms.size, -1, dtype=np.int16)
    rotor[terms.size - len(terms.torsions) :] = [
        number.get(frozenset(t[1:3]), -1) for t in terms.torsions.tolist()
    ]
    return Springs(terms, widths.of(molecule, terms), molecule.rotors, rotor)


class BATEnergy:
    """``E / kT = sum_k (q_k - q0_k)^2 / (2 sigma_k^2)`` of a batch of molecules, in float64.

    Args:
        graph: molecules at the positions where the energy is zero.
        springs: of each molecule.

    Attributes:
        q: the internal coordinates.
        widths: Å and radians ``[K]``.
        reference: values at the clean positions ``[K]``.
    """

    def __init__(self, graph: Graph, springs: Sequence[Springs]) -> None:
        self.springs, self.device = springs, graph.pos.device
        counts = atoms_per_graph(graph).tolist()
        self.batch, self.clean = graph.batch, graph.pos.detach().to(torch.float64)
        self.q = InternalCoordinates([s.terms for s in springs], counts, self.device)
        self.widths = self._gather([s.widths for s in springs])
        self.reference = self.q.straightened(self.q.values(self.clean))

    def _gather(self, parts: Sequence[NDArray[Any]]) -> Tensor:
        """Return values that are listed structure by structure in the order of the coordinates."""
        return torch.as_tensor(np.concatenate(parts), device=self.device)[self.q.place]

    def energies(self, pos: Tensor) -> Tensor:
        """Return ``E / kT`` of each structure ``[B]`` at positions ``[N, 3]``."""
        terms = 0.5 * (self.q.difference(self.q.values(pos), self.reference) / self.widths).square()
        return terms.new_zeros(len(self.q.counts)).index_add(0, self.q.structure, terms)

    def gradient(self, pos: Tensor) -> Tensor:
        """Return ``grad E / kT`` in 1/Å ``[N, 3]``."""
        pull = self.q.difference(self.q.values(pos), self.reference) / self.widths.square()
        return self.q.gradient_of_sum(pull, pos)

    def slices(self, pos: Tensor, directions: Tensor, step: float | None = None) -> Tensor:
        """Return ``<grad E / kT, v>`` for directions ``[M, N, 3]``, ``[M, B]``.

        Args:
            pos: ``[N, 3]`` Å.
            directions: each moves all structures.
            step: of the finite difference of the coordinates, Å; None takes their exact derivatives.
        """
        found = pos.new_zeros(len(directions), len(self.q.counts))
        if step is None:
            return found.index_add(1, self.batch, (directions * self.gradient(pos)).sum(-1))
        values = self.q.values(pos)
        pull = self.q.difference(values, self.reference) / self.widths.square()
        for m, v in enumerate(directions):
            change = self.q.difference(self.q.values(pos + step * v), values) / step
            found[m].index_add_(0, self.q.structure, pull * change)
        return found

    def noisy(self, unit: Sequence[Tensor], angular: float = 1.0) -> Tensor:
        """Return noisy positions ``[N, 3]`` Å.

        Args:
            unit: a standard normal number for each coordinate of a structure, for each structure.
            angular: factor on the noise of angles and torsions.
        """
        draw = torch.cat(list(unit)).to(self.device)[self.q.place]
        draw = torch.where(self.q.is_bond, draw, angular * draw)
        rotor = self._gather([s.rotor for s in self.springs])
        pos = self.clean + self._fitted(torch.where(rotor < 0, draw, 0.0), rotor < 0)
        return turn_bonds(pos, [s.rotors for s in self.springs], self.q.counts, self._turns(draw, rotor))

    def _fitted(self, draw: Tensor, fitted: Tensor) -> Tensor:
        """Return the displacement u ``[N, 3]`` of least ``|B u / sigma - draw|^2 + DAMPING |u|^2``."""
        weight = torch.where(fitted, 1 / self.widths, 0.0)
        n, most = len(self.q.counts), max(self.q.counts)
        matrix = self.q.matrices(self.clean, weight).flatten(2)
        wanted = self.q.listed(draw)
        normal = matrix.mT @ matrix
        normal.diagonal(dim1=1, dim2=2).add_(DAMPING)
        solved = torch.linalg.solve(normal, matrix.mT @ wanted.unsqueeze(2)).view(n, most, 3)
        sizes = torch.tensor(self.q.counts, device=self.device).unsqueeze(1)
        return solved[torch.arange(most, device=self.device) < sizes]

    def _turns(self, draw: Tensor, rotor: Tensor) -> Tensor:
        """Return the angle of each rotor: the mean of its torsions' draws, weighted by their stiffness."""
        number = [len(s.rotors.axes) for s in self.springs]
        first = torch.as_tensor(np.cumsum([0, *number])[:-1], device=self.device)
        turning = rotor >= 0
        which = (first[self.q.structure] + rotor)[turning]
        stiffness = self.widths[turning].square().reciprocal()
        total, pull = (
            draw.new_zeros(sum(number)).index_add(0, which, w)
            for w in (stiffness, stiffness * self.widths[turning] * draw[turning])
        )
        # a rotor without torsions, beside a straight angle, stays
        return torch.where(total > 0, pull / total, 0.0)
