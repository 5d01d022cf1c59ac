"""SDF files (MDL V2000): geometries with their total charge and their bonds, no labels.

Source: BIOVIA's CTfile formats document: fixed columns, one molecule a record, records end with ``$$$$``.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets import _io
from ffpretrain.datasets.arrays import check_finite, check_numbers
from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame, InMemoryDataset
from ffpretrain.errors import DataError

# the atom block's column 37-39 holds a code, not a charge: 4 is a doublet radical
_CHARGE_CODES = {0: 0, 1: 3, 2: 2, 3: 1, 4: 0, 5: -1, 6: -2, 7: -3}
_ISOTOPES = {"D": "H", "T": "H"}


def open_sdf(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    licence: str | None = None,
    allow_2d: bool = False,
) -> Dataset:
    """Open the geometries of an SDF file, in the format's Å.

    Where a record has bonds, they stand in the frame's properties: ``bonds [K, 3]``, atom, atom (counted
    from 0) and the format's type: 1 single, 2 double, 3 triple, 4 aromatic.

    Args:
        path: the file.
        name: of the dataset; the file's own name otherwise.
        licence: of the data, where known.
        allow_2d: take records that say they are drawings (dimension code ``2D``) for geometries.

    Raises:
        DataError: the file is absent, truncated, of version V3000, or holds drawings instead of geometries.
    """
    file = _io.existing_file(path, "SDF file")
    text = file.read_text(encoding="utf-8", errors="replace")
    frames = []
    for number, record in enumerate(_records(text)):
        frames.append(_parse(record, f"{file} record {number}", allow_2d))
    if not frames:
        raise DataError(f"{file}: has no records; give a file with at least one molecule")
    metadata = DatasetMetadata(
        name=name or file.stem,
        source=file.name,
        sha256={file.name: _io.sha256_of(file)},
        licence=licence,
        units={"length": "angstrom"},
        properties={"bonds": "atom, atom, order"} if any(frame.properties for frame in frames) else {},
    )
    return InMemoryDataset(frames, metadata)


def _records(text: str) -> list[list[str]]:
    records: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("$$$$"):
            records.append([])
        else:
            records[-1].append(line)
    # a single molecule may lack the separator; blank lines after the last one are no record
    return [record for record in records if any(line.strip() for line in record)]


def _parse(lines: list[str], where: str, allow_2d: bool) -> Frame:
    from ase.data import atomic_numbers

    counts = lines[3] if len(lines) > 3 else ""
    if "V3000" in counts:
        raise DataError(f"{where}: is of version V3000, only V2000 can be read; convert it")
    try:
        n_atoms, n_bonds = int(counts[:3]), int(counts[3:6])
    except ValueError as error:
        raise DataError(
            f"{where}: its fourth line is no V2000 counts line ({counts[:20]!r}); repair it"
        ) from error
    block = lines[4 : 4 + n_atoms]
    if len(block) < n_atoms or len(lines) < 4 + n_atoms + n_bonds:
        raise DataError(
            f"{where}: is truncated, {n_atoms} atoms and {n_bonds} bonds were announced; copy it again"
        )
    if lines[1][20:22] == "2D" and not allow_2d:
        raise DataError(
            f"{where}: is a drawing (2D), not a geometry; make 3D coordinates, or give allow_2d=True"
        )
    try:
        positions = np.array([[float(row[c : c + 10]) for c in (0, 10, 20)] for row in block]).reshape(-1, 3)
    except ValueError as error:
        raise DataError(f"{where}: a coordinate is no number ({error}); repair the file") from error
    symbols = [row[31:34].strip() for row in block]
    unknown = [s for s in symbols if _ISOTOPES.get(s, s) not in atomic_numbers or s == "X"]
    if unknown:
        raise DataError(f"{where}: unknown element {unknown[0]!r}; repair or remove the record")
    numbers = np.array([atomic_numbers[_ISOTOPES.get(s, s)] for s in symbols], dtype=np.int64)
    check_numbers(where, numbers)
    check_finite(lambda _: where, np.ones((1, n_atoms), dtype=bool), positions[None], None, None)
    charge, spin = _charge_and_spin(lines, block, n_atoms + n_bonds, where)
    bonds = _bonds(lines[4 + n_atoms : 4 + n_atoms + n_bonds], n_atoms, where)
    properties = {"bonds": bonds} if n_bonds else {}
    return Frame(numbers=numbers, positions=positions, charge=charge, spin=spin, properties=properties)


def _bonds(block: list[str], n_atoms: int, where: str) -> NDArray[np.int64]:
    """Return atom, atom and type of each bond ``[K, 3]``, atoms counted from 0."""
    try:
        rows = [[int(row[c : c + 3]) for c in (0, 3, 6)] for row in block]
    except ValueError as error:
        raise DataError(f"{where}: a bond is no row of numbers ({error}); repair the file") from error
    bonds = np.array(rows, dtype=np.int64).reshape(-1, 3)
    ends = bonds[:, :2]
    if ((ends < 1) | (ends > n_atoms)).any() or (ends[:, 0] == ends[:, 1]).any():
        raise DataError(f"{where}: a bond does not join two of its {n_atoms} atoms; repair the file")
    return bonds - np.array([1, 1, 0])


def _charge_and_spin(lines: list[str], block: list[str], n_rows: int, where: str) -> tuple[int, int]:
    """Return total charge and multiplicity; ``M  CHG`` and ``M  RAD`` lines replace the atoms' codes."""
    charges: list[int] = []
    unpaired = 0
    replaced = False
    try:
        for line in lines[4 + n_rows :]:
            if line.startswith(("M  CHG", "M  RAD")):
                replaced = True
                values = [int(value) for value in line[9:].split()[1::2]]
                if line.startswith("M  CHG"):
                    charges += values
                else:
                    # 1: singlet, 2: doublet, 3: triplet at that atom
                    unpaired += sum(value - 1 if value > 1 else 0 for value in values)
        if not replaced:
            codes = [int(row[36:39] or 0) for row in block]
            charges = [_CHARGE_CODES[code] for code in codes]
            unpaired = sum(code == 4 for code in codes)
    except (ValueError, KeyError) as error:
        raise DataError(f"{where}: a charge or radical entry is wrong ({error}); repair the file") from error
    return sum(charges), unpaired + 1
