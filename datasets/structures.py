"""Reading the one structure that labelling or a simulation starts from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ffpretrain.datasets._io import existing_file
from ffpretrain.datasets.arrays import LARGEST
from ffpretrain.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms


def read_structure(structure: str | os.PathLike[str] | Atoms) -> tuple[Atoms, str]:
    """Return a copy of a structure and the name of its file.

    Args:
        structure: a file, ``file@index`` for one of several structures, or ``ase.Atoms``.

    Raises:
        DataError: the file is missing, not understood, empty, holds several structures or pickled code.
    """
    from ase import Atoms

    if isinstance(structure, Atoms):
        atoms, label = structure.copy(), "STRUCTURE"
    else:
        path, at, index = str(structure).rpartition("@")
        file = existing_file(path if at and index.lstrip("-").isdigit() else structure, "structure file")
        atoms, label = _read_one(file, int(index) if at and index.lstrip("-").isdigit() else None)
    if len(atoms) == 0:
        raise DataError(f"{label}: holds no atoms; give a structure with at least one")
    if not np.all(np.isfinite(atoms.positions)):
        raise DataError(f"{label}: a position is not finite; correct the file")
    if np.abs(atoms.positions).max() > LARGEST["a position"]:
        raise DataError(f"{label}: a position is beyond {LARGEST['a position']:.0e} Å; correct the file")
    return atoms, label


def _read_one(file: Path, index: int | None) -> tuple[Atoms, str]:
    from ase.io import read
    from ase.io.formats import UnknownFileTypeError, filetype

    try:
        if filetype(str(file)) in ("trj", "bundletrajectory"):
            raise DataError(f"{file}: this format is read by running pickled code; convert it to xyz")
        images: list[Atoms] = read(file, index=":")  # type: ignore[assignment]
    except DataError:
        raise
    except UnknownFileTypeError as error:
        raise DataError(
            f"{file}: unknown format; ASE takes it from the extension, such as .xyz, .extxyz, .traj or .cif"
        ) from error
    except Exception as error:  # ASE's readers raise anything at all on a damaged file
        if isinstance(error, KeyError):  # of ASE's table of elements
            raise DataError(f"{file}: unknown element {error}; use symbols such as C or Cl") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{file}: cannot be read as a structure ({lines[0]}); check its format, which ASE takes from the "
            "extension"
        ) from error
    if not images:
        raise DataError(f"{file}: holds no structure")
    if index is None and len(images) > 1:
        raise DataError(f"{file}: holds {len(images)} structures; choose one, such as {file.name}@0")
    if index is not None and not -len(images) <= index < len(images):
        raise DataError(f"{file}: holds {len(images)} structures, there is no number {index}")
    return images[index or 0], file.name if index is None else f"{file.name}@{index}"


def charge_and_spin(atoms: Atoms, charge: int | None, spin: int | None) -> tuple[int, int]:
    """Return total charge and multiplicity: those given, else those in ``atoms.info``, else 0 and 1.

    Raises:
        DataError: one of them is not a whole number, or the multiplicity is below 1.
    """
    found = [
        atoms.info.get(key, default) if given is None else given
        for key, given, default in (("charge", charge, 0), ("spin", spin, 1))
    ]
    if any(int(value) != value for value in found) or found[1] < 1:
        raise DataError(f"charge {found[0]} and spin {found[1]} must be whole numbers and spin at least 1")
    return int(found[0]), int(found[1])
