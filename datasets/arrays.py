"""Datasets held as stacked arrays: one molecule, or several padded with zeros to one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.errors import DataError

MAX_ATOMIC_NUMBER = 118


class ArrayDataset(Dataset):
    """Frames in stacked float64 arrays, in eV and Å.

    Args:
        file: names the file in error messages.
        numbers: atomic numbers ``[n]`` for one molecule, or ``[F, n]`` padded with zeros.
        positions: ``[F, n, 3]`` Å.
        metadata: see :class:`DatasetMetadata`.
        energy: ``[F]`` or ``[F, 1]`` eV, or None.
        forces: ``[F, n, 3]`` eV/Å, or None.
        cell: ``[3, 3]`` Å, rows are lattice vectors, periodic in all directions and the same for every frame.
        properties: other labels, one entry a frame ``[F]`` or one row an atom ``[F, n, ...]``, in the units
            stated in ``metadata.properties``.

    Raises:
        DataError: shapes contradict each other, a value is not finite, an element is unknown, or a frame is
            empty.
    """

    def __init__(
        self,
        file: object,
        numbers: NDArray[Any],
        positions: NDArray[Any],
        metadata: DatasetMetadata,
        *,
        energy: NDArray[Any] | None = None,
        forces: NDArray[Any] | None = None,
        cell: NDArray[Any] | None = None,
        properties: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.metadata = metadata
        self.cell = None if cell is None else np.asarray(cell, dtype=np.float64)
        self.positions = _positions(file, positions)
        n_frames, n_atoms = self.positions.shape[:2]
        self.numbers = _numbers(file, numbers, n_frames, n_atoms)
        self.energy = None if energy is None else _energies(file, energy, n_frames)
        self.forces = None if forces is None else _forces(file, forces, self.positions.shape)
        self.properties = dict(properties or {})
        for name, values in self.properties.items():
            if len(values) != n_frames:
                raise DataError(
                    f"{file}: {name!r} has {len(values)} entries for {n_frames} frames; repair the file"
                )
        check_finite(
            lambda i: f"{file} frame {i}", self.atoms_mask(), self.positions, self.energy, self.forces
        )

    def atoms_mask(self) -> NDArray[np.bool_]:
        """Return ``[F, n]``: True where a row is an atom, False where it is padding."""
        return np.broadcast_to(self.numbers > 0, self.positions.shape[:2])

    def __len__(self) -> int:
        return len(self.positions)

    def _frame(self, index: int) -> Frame:
        numbers = self.numbers if self.numbers.ndim == 1 else self.numbers[index]
        atoms = numbers > 0
        # boolean indexing copies, so that changing a frame never changes the dataset
        return Frame(
            numbers=numbers[atoms],
            positions=self.positions[index][atoms],
            cell=None if self.cell is None else self.cell.copy(),
            pbc=(False, False, False) if self.cell is None else (True, True, True),
            energy=None if self.energy is None else float(self.energy[index]),
            forces=None if self.forces is None else self.forces[index][atoms],
            properties={
                name: values[index].item() if values.ndim == 1 else values[index][atoms]
                for name, values in self.properties.items()
            },
        )


#: Å, eV/Å and eV beyond which a value is an error of the file and not of this world
LARGEST = {"a position": 1e6, "a force": 1e6, "the energy": 1e12}


def check_numbers(where: object, numbers: NDArray[np.integer]) -> None:
    """Refuse an empty structure and atomic numbers outside 1..118.

    Args:
        where: file and frame, for the message.
        numbers: ``[N]``.

    Raises:
        DataError: no atoms, or an unknown element.
    """
    if len(numbers) == 0:
        raise DataError(f"{where}: has no atoms; remove the empty frame")
    bad = numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)]
    if len(bad):
        raise DataError(
            f"{where}: unknown element Z={bad[0]}; repair it (Z runs from 1 to {MAX_ATOMIC_NUMBER})"
        )


def _positions(file: object, positions: NDArray[Any]) -> NDArray[np.float64]:
    if positions.ndim != 3 or positions.shape[2] != 3 or not np.issubdtype(positions.dtype, np.number):
        raise DataError(
            f"{file}: positions have shape {positions.shape}, expected numbers [frames, atoms, 3]"
        )
    if len(positions) == 0:
        raise DataError(f"{file}: has no frames; give a file with at least one")
    return np.asarray(positions, dtype=np.float64)


def _numbers(file: object, numbers: NDArray[Any], n_frames: int, n_atoms: int) -> NDArray[np.int64]:
    if not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(f"{file}: atomic numbers are {numbers.dtype}, expected integers")
    if numbers.shape not in ((n_atoms,), (n_frames, n_atoms)):
        raise DataError(
            f"{file}: atomic numbers have shape {numbers.shape}, the positions ask for ({n_atoms},) or "
            f"({n_frames}, {n_atoms})"
        )
    values = numbers.astype(np.int64)
    if values.ndim == 1:
        check_numbers(file, values)
        return values
    bad = np.argwhere((values < 0) | (values > MAX_ATOMIC_NUMBER))
    if len(bad):
        frame, atom = bad[0]
        check_numbers(f"{file} frame {frame}", values[frame, atom : atom + 1])
    empty = np.flatnonzero((values == 0).all(axis=1))
    if len(empty):
        check_numbers(f"{file} frame {empty[0]}", values[:0, 0])
    return values


def _energies(file: object, energy: NDArray[Any], n_frames: int) -> NDArray[np.float64]:
    if energy.shape not in ((n_frames,), (n_frames, 1)):
        raise DataError(f"{file}: energies have shape {energy.shape}, expected ({n_frames},)")
    return np.asarray(energy, dtype=np.float64).reshape(n_frames)


def _forces(file: object, forces: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float64]:
    if forces.shape != shape:
        raise DataError(f"{file}: forces have shape {forces.shape}, expected {shape} as the positions have")
    return np.asarray(forces, dtype=np.float64)


def check_finite(
    where: Callable[[int], str],
    atoms: NDArray[np.bool_],
    positions: NDArray[np.float64],
    energy: NDArray[np.float64] | None,
    forces: NDArray[np.float64] | None,
) -> None:
    """Refuse NaN, infinite and absurd values, naming the first frame that has one; padding is not looked at.

    Absurd is what no molecule has and what overflows in float32 soon: see :data:`LARGEST`.

    Args:
        where: gives file and frame by the frame's index, for the message.
        atoms: ``[F, n]``, False for padding.
        positions: ``[F, n, 3]``.
        energy: ``[F]`` or None.
        forces: ``[F, n, 3]`` or None.

    Raises:
        DataError: a position, energy or force is not finite, or beyond :data:`LARGEST`.
    """
    mend = "remove or recompute that frame"
    for name, values in (("a position", positions), ("a force", forces)):
        if values is None:
            continue
        bad = np.flatnonzero((~np.isfinite(values).all(axis=2) & atoms).any(axis=1))
        if len(bad):
            raise DataError(f"{where(int(bad[0]))}: {name} is not finite (NaN or inf); {mend}")
        most = LARGEST[name]
        bad = np.flatnonzero(((np.abs(values) > most).any(axis=2) & atoms).any(axis=1))
        if len(bad):
            raise DataError(f"{where(int(bad[0]))}: {name} is beyond {most:.0e} in eV and Å; {mend}")
    if energy is not None:
        bad = np.flatnonzero(~np.isfinite(energy))
        if len(bad):
            raise DataError(f"{where(int(bad[0]))}: the energy is not finite (NaN or inf); {mend}")
        most = LARGEST["the energy"]
        bad = np.flatnonzero(np.abs(energy) > most)
        if len(bad):
            raise DataError(f"{where(int(bad[0]))}: the energy is beyond {most:.0e} eV; {mend}")
