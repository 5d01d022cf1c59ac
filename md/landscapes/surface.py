"""What a landscape is: energies, and mostly forces, on a grid of geometries with one or two coordinates."""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ffpretrain.errors import ConfigError, DataError
from ffpretrain.units import KCAL_PER_MOL

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.md.landscapes.labels import Labels

Array = NDArray[np.float64]
#: bytes of positions that a grid may have; forces are as large, and figures need several copies
LARGEST_GRID = 1 << 30
#: energy units a user may ask for, eV in one of each
UNITS = {"eV": 1.0, "kcal/mol": KCAL_PER_MOL}
#: kind of the geometries on which a free energy is known, not an energy
FREE_ENERGY = "free energy"


def refuse_large(shape: tuple[int, ...], n_atoms: int) -> None:
    """Refuse a grid that memory would not hold; smaller ones are evaluated part by part.

    Args:
        shape: points along each axis.
        n_atoms: in each structure.

    Raises:
        ConfigError: the positions alone would be larger than :data:`LARGEST_GRID`.
    """
    points = math.prod(shape)
    size = points * n_atoms * 3 * 8
    if size > LARGEST_GRID:
        most = math.floor((LARGEST_GRID / (24 * n_atoms)) ** (1 / len(shape)))
        raise ConfigError(
            f"a grid of {' x '.join(map(str, shape))} structures of {n_atoms} atoms takes {size / 2**30:.1f} "
            f"GiB for the positions alone; give at most {most} points along an axis"
        )


@dataclass(frozen=True)
class Axis:
    """One coordinate of a landscape.

    Attributes:
        name: such as ``dihedral 0-1-2-3``.
        unit: of the values: ``Å`` or ``°``.
        values: along the axis, ascending.
    """

    name: str
    unit: str
    values: Array


@dataclass(frozen=True)
class Geometries:
    """The structures of a landscape, before anything is known of their energies.

    Attributes:
        atoms: the structure they are made from; gives elements, cell and periodicity.
        axes: one or two.
        positions: Å; the axes' lengths, then ``[N, 3]``.
        kind: ``plane``, ``scan``, ``modes``, …
        note: how they were made, for the files.
        noise: learned noise of each atom, Å ``[N]``, where the directions were drawn from it.
    """

    atoms: Atoms
    axes: tuple[Axis, ...]
    positions: Array
    kind: str
    note: str = ""
    noise: Array | None = None

    def __post_init__(self) -> None:
        shape = (*(len(axis.values) for axis in self.axes), len(self.atoms), 3)
        if not 1 <= len(self.axes) <= 2 or self.positions.shape != shape:
            raise ConfigError(f"geometries of shape {self.positions.shape} do not fit axes of shape {shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(len(axis.values) for axis in self.axes)

    def structures(self, start: int = 0, stop: int | None = None) -> list[Atoms]:
        """Return structures ``start`` to ``stop``, the last axis running fastest; all by default."""
        found = []
        for positions in self.positions.reshape(-1, len(self.atoms), 3)[start:stop]:
            copy = self.atoms.copy()
            copy.positions = positions
            found.append(copy)
        return found


@dataclass(frozen=True)
class Landscape:
    """Energies on a grid.

    Attributes:
        geometries: the grid and its structures.
        label: of the model.
        energies: eV, of the grid's shape.
        forces: eV/Å, the grid's shape and ``[N, 3]``; None for a model without forces.
        references: energies of other methods on the same grid, eV, by label.
        roughness: see :mod:`ffpretrain.md.landscapes.roughness`.
        labels: labelled frames on the same axes.
        fit: errors in eV of an energy head that was fitted for this landscape, by name.
        response: what displacing each atom alone costs, eV ``[N]``, where the noise of each atom is known.
        uncertainty: one standard error of each value, eV, of the grid's shape; NaN where it is not known.
    """

    geometries: Geometries
    label: str
    energies: Array
    forces: Array | None = None
    references: dict[str, Array] = field(default_factory=dict)
    roughness: dict[str, float] = field(default_factory=dict)
    labels: Labels | None = None
    fit: dict[str, float] = field(default_factory=dict)
    response: Array | None = None
    uncertainty: Array | None = None

    @property
    def quantity(self) -> str:
        """What the numbers are: ``energy`` or ``free energy``."""
        return FREE_ENERGY if self.geometries.kind == FREE_ENERGY else "energy"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The coordinates."""
        return self.geometries.axes

    def relative(self) -> Array:
        """Return energies above the lowest one, eV."""
        return self.energies - np.nanmin(self.energies)

    def errors(self) -> dict[str, float]:
        """Return the RMS difference to each reference and to labelled frames, eV.

        Energies of a reference are counted from the model's point of lowest energy, those of frames from the
        frame whose label is lowest.
        """
        place = np.unravel_index(np.nanargmin(self.energies), self.energies.shape)
        own = self.energies - self.energies[place]
        found = {
            name: float(np.sqrt(np.nanmean(np.square(own - (values - values[place])))))
            for name, values in self.references.items()
        }
        return found if self.labels is None else {**found, self.labels.name: self.labels.rms()}

    def write_npz(self, path: Path, trail: Array | None = None) -> None:
        """Write every number, in eV and Å.

        Args:
            path: the file.
            trail: points ``[T, 2]`` in the plane that are drawn on it.

        Raises:
            DataError: the file cannot be written.
        """
        g = self.geometries
        arrays: dict[str, Array | NDArray[np.generic]] = {
            "energies_eV": self.energies,
            "positions_angstrom": g.positions,
            "numbers": g.atoms.numbers,
            "base_angstrom": g.atoms.positions,
            "cell_angstrom": g.atoms.cell.array,
            "pbc": np.asarray(g.atoms.pbc),
            "label": np.array(self.label),
            "kind": np.array(g.kind),
            "note": np.array(g.note),
        }
        for i, axis in enumerate(g.axes):
            arrays |= {f"axis{i}": axis.values, f"axis{i}_name": np.array(f"{axis.name} ({axis.unit})")}
        if g.noise is not None:
            arrays["noise_angstrom"] = g.noise
        if self.uncertainty is not None:
            arrays["standard_errors_eV"] = self.uncertainty
        if self.forces is not None:
            arrays["forces_eV_per_angstrom"] = self.forces
        arrays |= {f"reference_{name}_eV": values for name, values in self.references.items()}
        if self.labels is not None:
            arrays |= {"label_points": self.labels.points, "label_energies_eV": self.labels.reference}
            arrays["label_predicted_eV"] = self.labels.predicted
            arrays["label_name"] = np.array(self.labels.name)
        if trail is not None:
            arrays["path"] = np.asarray(trail)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one piece or not at all.

    Raises:
        DataError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another --out") from None
