"""What a dataset is made of: one frame, and what is known about all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class Frame:
    """One labelled geometry, in eV and Å.

    Attributes:
        numbers: atomic numbers, int64 ``[N]``.
        positions: float64 ``[N, 3]`` Å.
        cell: float64 ``[3, 3]`` Å, rows are lattice vectors; None for a molecule in vacuum.
        pbc: which of the three directions repeat.
        energy: total energy in eV, or None where there is no label.
        forces: float64 ``[N, 3]`` eV/Å, or None.
        stress: float64 ``[3, 3]`` eV/Å³ (ASE's sign), or None.
        charge: total charge in e.
        spin: spin multiplicity 2S + 1; 1 is closed-shell.
        fixed: bool ``[N]``, atoms held in place when the frame was made; None if nothing was.
        properties: other labels by name, in the units that the dataset's metadata states.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64] | None = None
    pbc: tuple[bool, bool, bool] = (False, False, False)
    energy: float | None = None
    forces: NDArray[np.float64] | None = None
    stress: NDArray[np.float64] | None = None
    charge: int = 0
    spin: int = 1
    fixed: NDArray[np.bool_] | None = None
    properties: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of atoms."""
        return len(self.numbers)

    def to_atoms(self) -> Atoms:
        """Return the frame as ``ase.Atoms``, its labels attached by a ``SinglePointCalculator``."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.constraints import FixAtoms

        atoms = Atoms(numbers=self.numbers, positions=self.positions, cell=self.cell, pbc=self.pbc)
        atoms.info.update(charge=self.charge, spin=self.spin)
        if self.fixed is not None:
            atoms.set_constraint(FixAtoms(mask=self.fixed))
        labels: dict[str, Any] = {}
        if self.energy is not None:
            labels["energy"] = self.energy
        if self.forces is not None:
            labels["forces"] = self.forces
        if self.stress is not None:
            labels["stress"] = self.stress
        if labels:
            atoms.calc = SinglePointCalculator(atoms, **labels)
        return atoms


@dataclass(frozen=True)
class DatasetMetadata:
    """What a dataset says of itself.

    Attributes:
        name: short name, such as ``rmd17-aspirin``.
        source: where the frames come from (file names without folders, or a publication).
        sha256: checksum of the file or files read, by file name.
        level_of_theory: the method behind the labels, such as ``PBE/def2-SVP``; None when unknown.
        energy_zero: what an energy of 0 eV means, such as ``separated electrons and nuclei``.
        licence: of the data.
        units: the units found in the file, by quantity; the frames themselves are in eV and Å.
        splits: published splits by name: indices of frames, used as they are.
        properties: unit of each entry of ``Frame.properties``.
    """

    name: str
    source: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    level_of_theory: str | None = None
    energy_zero: str | None = None
    licence: str | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)


class Dataset(Sequence[Frame]):
    """A sequence of frames with metadata; a slice or an index array gives a dataset again."""

    metadata: DatasetMetadata

    def __len__(self) -> int:
        raise NotImplementedError

    def _frame(self, index: int) -> Frame:
        """Return frame ``index``, ``0 <= index < len(self)``."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | NDArray[np.integer]) -> Dataset: ...
    def __getitem__(self, index: Any) -> Any:
        """Return one frame for an integer; a view of several for a slice or a sequence of integers."""
        if isinstance(index, int | np.integer):
            position = int(index) + len(self) if index < 0 else int(index)
            if not 0 <= position < len(self):
                raise IndexError(f"frame {index} of a dataset of {len(self)} frames")
            return self._frame(position)
        chosen = np.arange(len(self))[index] if isinstance(index, slice) else np.asarray(index)
        if chosen.dtype == bool:
            # a mask selects, as it does in NumPy; read as integers it would give frames 0 and 1 over and over
            if chosen.shape != (len(self),):
                raise IndexError(f"a mask of shape {chosen.shape} for a dataset of {len(self)} frames")
            chosen = np.flatnonzero(chosen)
        return Subset(self, chosen)


class Subset(Dataset):
    """Some frames of another dataset, in the order given."""

    def __init__(self, parent: Dataset, indices: NDArray[np.integer]) -> None:
        out_of_range = indices[(indices < 0) | (indices >= len(parent))] if len(indices) else indices
        if len(out_of_range):
            raise IndexError(f"frame {out_of_range[0]} of a dataset of {len(parent)} frames")
        self.parent = parent
        self.indices = np.asarray(indices, dtype=np.int64)
        # a published split names frames of the parent: it means nothing for a part of it
        self.metadata = replace(parent.metadata, splits={})

    def __len__(self) -> int:
        return len(self.indices)

    def _frame(self, index: int) -> Frame:
        return self.parent[int(self.indices[index])]


class InMemoryDataset(Dataset):
    """Frames held in a list."""

    def __init__(self, frames: Sequence[Frame], metadata: DatasetMetadata) -> None:
        self._frames = list(frames)
        self.metadata = metadata

    def __len__(self) -> int:
        return len(self._frames)

    def _frame(self, index: int) -> Frame:
        return self._frames[index]
