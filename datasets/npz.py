"""Arrays ``E, F, R, z`` in an ``.npz`` file: sGDML's layout, MD17, QM7-X; and telling layouts apart.

One molecule has ``z [n]``; several of different size have ``z [F, n]`` padded with zeros. ``E`` may be
absent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets import _io, rmd17
from ffpretrain.datasets._units import EV_ANGSTROM, LabelUnits, given_units
from ffpretrain.datasets.arrays import ArrayDataset
from ffpretrain.datasets.frames import Dataset, DatasetMetadata
from ffpretrain.errors import DataError

LAYOUTS: dict[str, tuple[str, ...]] = {
    "rmd17": rmd17.KEYS,
    "qm9": ("n_atoms", "Z", "R", "U0"),
    "sgdml": ("F", "R", "z"),
}
"""Arrays that tell a layout, by the name of its format."""

KEYS = ("E", "F", "R", "z", "lattice", "r_unit", "e_unit", "name", "theory")
# sGDML's converter stores whatever its user typed; its prompt offers these
_TYPED_LENGTHS = {"au": "bohr", "a.u.": "bohr"}
_TYPED_ENERGIES = {"au": "hartree", "a.u.": "hartree"}

LatticeLayout = Literal["rows", "columns"]


def sniff_npz(path: Path) -> str:
    """Return the name of the format whose arrays the file has.

    Raises:
        DataError: the file is absent, damaged, or has another layout.
    """
    file = _io.existing_file(path, ".npz file")
    keys = _io.npz_keys(file)
    for name, needed in LAYOUTS.items():
        if set(needed) <= set(keys):
            return name
    layouts = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in LAYOUTS.items())
    raise DataError(f"{file}: its arrays ({', '.join(keys)}) fit no known layout ({layouts})")


def open_sgdml(
    path: str | os.PathLike[str],
    *,
    units: Mapping[str, str] | None = None,
    lattice: LatticeLayout | None = None,
    name: str | None = None,
    level_of_theory: str | None = None,
    energy_zero: str | None = None,
    licence: str | None = None,
) -> Dataset:
    """Open an ``.npz`` file with the arrays E, F, R, z.

    The units are those written in the file (``r_unit``, ``e_unit``) or given; without either it is refused.

    Args:
        path: the file.
        units: such as ``{"energy": "kcal/mol", "length": "angstrom"}``.
        lattice: whether the lattice vectors of a periodic file are the rows or the columns of its ``lattice``
            (sGDML wrote both over the years); needed only where the matrix is not symmetric.
        name: of the dataset; the file's own name otherwise.
        level_of_theory: the method; the file's ``theory`` otherwise.
        energy_zero: what an energy of 0 means, where known.
        licence: of the data, where known.

    Raises:
        DataError: the file is absent or damaged, or its units are not known.
    """
    file = _io.existing_file(path, ".npz file")
    arrays = _io.read_npz(file, KEYS)
    chosen = units_of(file, arrays, units)
    metadata = _metadata(
        file,
        arrays,
        chosen,
        name=name,
        level_of_theory=level_of_theory,
        energy_zero=energy_zero,
        licence=licence,
    )
    return efrz_dataset(file, arrays, chosen, metadata, lattice)


def open_qm7x(path: str | os.PathLike[str]) -> Dataset:
    """Open QM7-X frames in the arrays E, F, R, z, in the publisher's eV and Å.

    Source: Hoja et al., Sci. Data 8, 43 (2021): total PBE0+MBD energies and forces.

    Raises:
        DataError: the file is absent or damaged, or says that it is in other units.
    """
    file = _io.existing_file(path, "QM7-X file")
    arrays = _io.read_npz(file, KEYS)
    chosen = units_of(file, arrays, EV_ANGSTROM.as_dict())
    metadata = _metadata(
        file,
        arrays,
        chosen,
        name="qm7x",
        level_of_theory="PBE0+MBD",
        energy_zero="separated electrons and nuclei",
        licence="CC-BY-4.0",
    )
    return efrz_dataset(file, arrays, chosen, metadata)


def efrz_dataset(
    file: object,
    arrays: dict[str, NDArray[Any]],
    units: LabelUnits,
    metadata: DatasetMetadata,
    lattice: LatticeLayout | None = None,
) -> ArrayDataset:
    """Build a dataset of the arrays E, F, R, z.

    Args:
        file: names the file in error messages.
        arrays: ``R [F, n, 3]``, ``F [F, n, 3]``, ``z [n]`` or ``[F, n]``, ``E [F]`` or ``[F, 1]``.
        units: what the arrays are in.
        metadata: of the dataset.
        lattice: see :func:`open_sgdml`.

    Raises:
        DataError: an array is missing or contradicts another.
    """
    for key in ("z", "R", "F"):
        if key not in arrays:
            raise DataError(f"{file}: has no array {key!r}, so it is no E, F, R, z file")
    _io.check_real(file, arrays, ("R", "F", "E", "lattice"))
    return ArrayDataset(
        file,
        arrays["z"],
        units.lengths(arrays["R"]),
        metadata,
        energy=units.energies(arrays["E"]) if "E" in arrays else None,
        forces=units.forces(arrays["F"]),
        cell=_cell(file, arrays["lattice"], units, lattice) if "lattice" in arrays else None,
    )


def text_of(value: NDArray[Any]) -> str:
    """Return a string stored as a 0-d array of ``str`` or ``bytes``."""
    item = value.item() if value.size == 1 else ""
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)


def units_of(file: Path, arrays: Mapping[str, NDArray[Any]], units: Mapping[str, str] | None) -> LabelUnits:
    """Return the units of an E, F, R, z file: those written in it (``r_unit``, ``e_unit``), else those given.

    Args:
        file: names the file in error messages.
        arrays: of the file.
        units: declared by the format or given by the user, or None.

    Raises:
        DataError: neither says the units, or the two contradict each other.
    """
    chosen = None if units is None else given_units(units)
    if "r_unit" not in arrays or "e_unit" not in arrays:
        if chosen is None:
            raise DataError(
                f"{file}: does not say its units; give units={{'energy': ..., 'length': ...}}, or name its "
                "format: open_dataset('md17', path) for files of the MD17 page, open_dataset('qm7x', path)"
            )
        return chosen
    length, energy = (text_of(arrays[key]).strip().lower() for key in ("r_unit", "e_unit"))
    try:
        written = LabelUnits(_TYPED_ENERGIES.get(energy, energy), _TYPED_LENGTHS.get(length, length))
    except DataError as error:
        if chosen is not None:
            return chosen
        raise DataError(f"{file}: {error}; give units={{'energy': ..., 'length': ...}}") from error
    if chosen is not None and not _same(chosen, written):
        raise DataError(
            f"{file}: says its units are {written.energy} and {written.length}, expected {chosen.energy} "
            f"and {chosen.length}; leave units= out or repair the file"
        )
    return written


def _same(one: LabelUnits, other: LabelUnits) -> bool:
    return all(getattr(one, unit)(1.0) == getattr(other, unit)(1.0) for unit in ("energies", "lengths"))


def _cell(file: object, matrix: NDArray[Any], units: LabelUnits, layout: str | None) -> NDArray[np.float64]:
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise DataError(f"{file}: its lattice has shape {matrix.shape} or is not finite, expected (3, 3)")
    if layout not in ("rows", "columns", None):
        raise DataError(f"lattice={layout!r}: say whether lattice vectors are 'rows' or 'columns'")
    if layout is None and not np.allclose(matrix, matrix.T):
        raise DataError(
            f"{file}: sGDML files hold lattice vectors as rows or columns; give lattice='rows' or 'columns'"
        )
    return units.lengths(matrix.T if layout == "columns" else matrix)


def _metadata(
    file: Path,
    arrays: Mapping[str, NDArray[Any]],
    units: LabelUnits,
    *,
    name: str | None,
    level_of_theory: str | None,
    energy_zero: str | None,
    licence: str | None,
) -> DatasetMetadata:
    theory = text_of(arrays["theory"]) if "theory" in arrays else ""
    return DatasetMetadata(
        name=name or (text_of(arrays["name"]) if "name" in arrays else "") or file.stem,
        source=file.name,
        sha256={file.name: _io.sha256_of(file)},
        level_of_theory=level_of_theory or (theory if theory != "unknown" else "") or None,
        energy_zero=energy_zero,
        licence=licence,
        units=units.as_dict(),
    )
