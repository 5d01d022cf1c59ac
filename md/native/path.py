"""The native way to evaluate a potential: one call of C++ code for energies, forces and stress, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ffpretrain.errors import NonFiniteError
from ffpretrain.md.native.build import NativeUnavailable, load_library
from ffpretrain.md.native.weights import KINDS, flatten, unsupported
from ffpretrain.md.paths import DENSE_ATOMS, Array, Evaluation, has_volume
from ffpretrain.md.verlet import VerletList
from ffpretrain.pairs import one_direction
from ffpretrain.potential import Potential

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], Array | None]


class StructurePairs:
    """The pairs of one structure, each listed once.

    Args:
        numbers: atomic numbers ``[N]``.
        pbc: which directions repeat.
        cutoff: Å.
    """

    def __init__(self, numbers: NDArray[np.int64], pbc: tuple[bool, bool, bool], cutoff: float) -> None:
        self.z = np.ascontiguousarray(numbers, dtype=np.int64)
        self.pbc = pbc
        self.list: VerletList | None = None
        if any(pbc) or len(self.z) > DENSE_ATOMS:
            self.list, self._builds = VerletList(cutoff), 0
        self.pairs: Pairs = (*_upper_triangle(0 if self.list else len(self.z)), None)

    def update(self, positions: Array, cell: Array | None) -> Pairs:
        """Return the pairs at these positions ``[N, 3]`` Å; some may lie beyond the cutoff."""
        if self.list is not None:
            box = None if cell is None else torch.tensor(cell)
            index, shift = self.list.candidates(torch.from_numpy(positions), box, self.pbc)
            if self.list.builds != self._builds:
                self.pairs, self._builds = _each_once(index, shift), self.list.builds
        return self.pairs


class JoinedMolecules:
    """Molecules in vacuum as one structure, without pairs between them.

    Args:
        structures: with pairs that never change.

    Attributes:
        z: atomic numbers of all ``[N]``.
        pairs: of all.
        slices: each one's atoms.
    """

    def __init__(self, structures: Sequence[StructurePairs]) -> None:
        ends = np.cumsum([len(s.z) for s in structures]).tolist()
        self.slices = [slice(end - len(s.z), end) for s, end in zip(structures, ends, strict=True)]
        self.z = np.concatenate([s.z for s in structures])
        self.pairs: Pairs = (self._all(structures, 0), self._all(structures, 1), None)
        sizes = np.array([len(s.pairs[0]) for s in structures])
        self._paired = sizes.nonzero()[0]
        self._starts = (np.cumsum(sizes) - sizes)[self._paired]

    def _all(self, structures: Sequence[StructurePairs], end: int) -> NDArray[np.int64]:
        each = [s.pairs[end] + part.start for s, part in zip(structures, self.slices, strict=True)]
        return np.concatenate(each)

    def shortest(self, positions: Array) -> list[float]:
        """Return the distance in Å of the two closest atoms of each; infinite for a single atom."""
        first, second, _ = self.pairs
        result = np.full(len(self.slices), np.inf)
        if len(self._starts):
            squares = np.square(positions[second] - positions[first]).sum(1)
            result[self._paired] = np.sqrt(np.minimum.reduceat(squares, self._starts))
        return result.tolist()


class NativePath:
    """Energies, forces and stress of a potential by compiled C++ code.

    The same function as the eager evaluation, to rounding, with its derivative written out: pairs are listed
    once where the eager path has them twice, so half of the filters' matrix products fall away, and nothing
    is dispatched in between. One thread; the time grows linearly with the number of atoms.

    Args:
        potential: see :func:`~ffpretrain.md.native.weights.unsupported`; its weights are copied.
        numbers: atomic numbers ``[N]``.
        pbc: which directions repeat.

    Raises:
        NativeUnavailable: the code cannot be built here, or does not cover the potential.
    """

    name = "native"

    def __init__(
        self, potential: nn.Module, numbers: NDArray[np.int64], pbc: tuple[bool, bool, bool]
    ) -> None:
        self.network = NativeNetwork(potential)
        self.structure = StructurePairs(numbers, pbc, self.network.cutoff)

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        """See :class:`~ffpretrain.md.paths.Path`.

        Raises:
            NonFiniteError: memory ran out.
        """
        return self.network.evaluate(self.structure, positions, cell)


class NativeNetwork:
    """A potential's weights inside the native library, with the scale and reference energies outside.

    Args:
        potential: as :class:`NativePath`.

    Raises:
        NativeUnavailable: as :class:`NativePath`.
    """

    def __init__(self, potential: nn.Module) -> None:
        self._handle = None
        if not isinstance(potential, Potential):
            raise NativeUnavailable("only potentials are evaluated natively")
        self._library = load_library()
        size = potential.dtype.itemsize
        reason = unsupported(potential, self._library.ff_lanes(size))
        if reason is not None:
            raise NativeUnavailable(reason)
        weights, backbone = flatten(potential), potential.backbone
        sizes = np.array(
            [backbone.config.get(k, 1) for k in ("hidden", "layers", "heads", "rbf", "max_z")], dtype=np.int64
        )
        self.cutoff, self.scale, self.shift = backbone.cutoff, float(potential.scale), float(potential.shift)
        self.reference: Array = potential.reference.cpu().numpy()
        self._handle = self._library.ff_create(
            KINDS[type(backbone)],
            size,
            _address(sizes),
            self.cutoff,
            backbone.config.get("epsilon", 0.0),
            _address(weights),
            len(weights),
        )
        if not self._handle:
            raise NativeUnavailable("the weights do not fit the native network")

    def __del__(self) -> None:
        if self._handle:
            self._library.ff_destroy(self._handle)

    def evaluate(
        self, structure: StructurePairs, positions: Array, cell: Array | None, forces: bool = True
    ) -> Evaluation:
        """Evaluate a structure; not from two threads at a time.

        Args:
            structure: its elements and pairs.
            positions: ``[N, 3]`` Å.
            cell: ``[3, 3]`` Å.
            forces: False runs the network forward only: the same energies to the last bit, no forces and no
                stress.

        Raises:
            NonFiniteError: memory ran out.
        """
        positions = np.ascontiguousarray(positions, dtype=np.float64)
        pairs = structure.update(positions, cell)
        if not forces:
            energies, shortest = self._energies(structure.z, positions, pairs)
            return Evaluation(float(energies.sum()) + self.shift, energies, None, None, shortest)
        energies, force, virial, shortest = self._call(structure.z, positions, pairs)
        stress = None
        if cell is not None and has_volume(cell, structure.pbc):
            stress = 0.5 * (virial + virial.T) / abs(float(np.linalg.det(cell)))
        return Evaluation(float(energies.sum()) + self.shift, energies, force, stress, shortest)

    def _energies(self, z: NDArray[np.int64], positions: Array, pairs: Pairs) -> tuple[Array, float]:
        """Return atomic energies and the shortest distance."""
        energies = np.empty(len(z))
        shortest = self._library.ff_energies(
            self._handle, *self._arguments(z, positions, pairs), _address(energies)
        )
        return self._scaled(energies, z, shortest), shortest

    def evaluate_joined(
        self, joined: JoinedMolecules, positions: Sequence[Array], forces: bool = True
    ) -> list[Evaluation]:
        """Evaluate molecules in vacuum together; not from two threads at a time.

        Args:
            joined: all of them.
            positions: of each, ``[N, 3]`` Å.
            forces: as for :meth:`evaluate`.

        Raises:
            NonFiniteError: memory ran out.
        """
        every, force = np.concatenate(positions, dtype=np.float64), None
        if forces:
            energies, force, _, _ = self._call(joined.z, every, joined.pairs)
        else:
            energies, _ = self._energies(joined.z, every, joined.pairs)
        return [
            Evaluation(
                float(energies[own].sum()) + self.shift,
                energies[own],
                None if force is None else force[own],
                None,
                near,
            )
            for own, near in zip(joined.slices, joined.shortest(every), strict=True)
        ]

    def _call(
        self, z: NDArray[np.int64], positions: Array, pairs: Pairs
    ) -> tuple[Array, Array, Array, float]:
        """Return atomic energies, forces, the derivative with respect to strain, the shortest distance."""
        n = len(z)
        energies, gradient, virial = np.empty(n), np.empty((n, 3)), np.empty((3, 3))
        shortest = self._library.ff_evaluate(
            self._handle,
            *self._arguments(z, positions, pairs),
            _address(energies),
            _address(gradient),
            _address(virial),
        )
        energies = self._scaled(energies, z, shortest)
        gradient *= -self.scale
        virial *= self.scale
        return energies, gradient, virial, shortest

    @staticmethod
    def _arguments(z: NDArray[np.int64], positions: Array, pairs: Pairs) -> tuple[int | None, ...]:
        """Return sizes and addresses of a structure, which must outlive the call."""
        first, second, shift = pairs
        arrays = (z, first, second, positions, shift)
        return len(z), len(first), *(None if x is None else _address(x) for x in arrays)

    def _scaled(self, energies: Array, z: NDArray[np.int64], shortest: float) -> Array:
        """Return energies in eV, in place.

        Raises:
            NonFiniteError: memory ran out.
        """
        if shortest < 0:
            raise NonFiniteError("the native evaluation ran out of memory; use fewer atoms or compile=False")
        energies *= self.scale
        energies += self.reference[z]
        return energies


def _address(array: NDArray[np.generic]) -> int:
    return array.ctypes.data


def _upper_triangle(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = np.triu_indices(n, 1)
    return np.ascontiguousarray(first, dtype=np.int64), np.ascontiguousarray(second, dtype=np.int64)


def _each_once(index: Tensor, shift: Tensor) -> Pairs:
    """Keep one direction of every pair."""
    keep = one_direction(index, shift)
    neighbor, center = index[:, keep].contiguous().numpy()
    return center, neighbor, shift[keep].to(torch.float64).contiguous().numpy()
