"""QM9: 133,885 small molecules at B3LYP/6-31G(2df,p) (Ramakrishnan et al., Sci. Data 1, 140022, 2014).

Read from the array file ``qm9.npz`` or from the original archive ``dsgdb9nsd.xyz.tar.bz2`` (or single files
of it), whose numbers may be written as ``2.1997*^-6``.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets import _io
from ffpretrain.datasets.arrays import MAX_ATOMIC_NUMBER
from ffpretrain.datasets.cache import cache_folder
from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.errors import DataError
from ffpretrain.units import energy_unit

PROPERTY_UNITS: dict[str, str] = {
    "A": "GHz",
    "B": "GHz",
    "C": "GHz",
    "mu": "D",
    "alpha": "bohr^3",
    "homo": "hartree",
    "lumo": "hartree",
    "gap": "hartree",
    "r2": "bohr^2",
    "zpve": "hartree",
    "U0": "hartree",
    "U": "hartree",
    "H": "hartree",
    "G": "hartree",
    "Cv": "cal/mol/K",
}
"""The 15 properties in the order of the original files, with their units (the paper's Table 3)."""

N_MOLECULES = 133_885
N_UNCHARACTERIZED = 3_054
ARCHIVE = "dsgdb9nsd.xyz.tar.bz2"
UNCHARACTERIZED_LIST = "uncharacterized.txt"
_MEMBER = re.compile(r"dsgdb9nsd_(\d{6})\.xyz$")
_HARTREE = energy_unit("hartree")


class Qm9Dataset(Dataset):
    """QM9 molecules in flat arrays; ``energy`` is U0 in eV, all 15 properties are kept in QM9's own units.

    Args:
        file: names the file in error messages.
        index: QM9's number of each molecule, from 1 ``[M]``.
        n_atoms: atoms of each molecule ``[M]``.
        numbers: atomic numbers of all molecules, one after the other ``[sum(n_atoms)]``.
        positions: ``[sum(n_atoms), 3]`` Å.
        properties: ``[M]`` by name, in the units of :data:`PROPERTY_UNITS`.
        metadata: of the dataset.
        keep: which molecules to offer, by their place in ``index``.

    Raises:
        DataError: the arrays contradict each other, a value is not finite, an element is unknown, or a
            molecule is empty.
    """

    def __init__(
        self,
        file: object,
        index: NDArray[Any],
        n_atoms: NDArray[Any],
        numbers: NDArray[Any],
        positions: NDArray[Any],
        properties: dict[str, NDArray[Any]],
        metadata: DatasetMetadata,
        keep: NDArray[np.integer],
    ) -> None:
        self.metadata = metadata
        self.molecule_index = index
        self.properties = properties
        self._numbers = numbers
        self._positions = positions
        self._ends = np.concatenate([[0], np.cumsum(n_atoms, dtype=np.int64)])
        self._keep = keep
        self._check(file, n_atoms)

    def _check(self, file: object, n_atoms: NDArray[Any]) -> None:
        atoms = int(self._ends[-1])
        if self._numbers.shape != (atoms,) or self._positions.shape != (atoms, 3):
            raise DataError(
                f"{file}: Z is {self._numbers.shape}, R {self._positions.shape}, but n_atoms asks for {atoms}"
            )
        columns: dict[str, NDArray[Any]] = {"index": self.molecule_index, **self.properties}
        for name, values in columns.items():
            if values.shape != n_atoms.shape:
                raise DataError(f"{file}: {name!r} has shape {values.shape}, expected {n_atoms.shape}")
            if not np.isfinite(values).all():
                bad = self.molecule_index[np.flatnonzero(~np.isfinite(values))[0]]
                raise DataError(
                    f"{file} molecule {bad}: {name!r} is not finite (NaN or inf); remove that molecule"
                )
        for what, bad_atoms in (
            ("a position is not finite (NaN or inf)", ~np.isfinite(self._positions).all(axis=1)),
            ("unknown element", (self._numbers < 1) | (self._numbers > MAX_ATOMIC_NUMBER)),
        ):
            if bad_atoms.any():
                molecule = np.searchsorted(self._ends, np.flatnonzero(bad_atoms)[0], side="right") - 1
                raise DataError(f"{file} molecule {self.molecule_index[molecule]}: {what}; remove it")
        if (n_atoms < 1).any():
            empty = self.molecule_index[np.flatnonzero(n_atoms < 1)[0]]
            raise DataError(f"{file} molecule {empty}: has no atoms; remove the empty molecule")

    def __len__(self) -> int:
        return len(self._keep)

    def _frame(self, index: int) -> Frame:
        molecule = int(self._keep[index])
        atoms = slice(int(self._ends[molecule]), int(self._ends[molecule + 1]))
        values = {name: float(column[molecule]) for name, column in self.properties.items()}
        return Frame(
            numbers=self._numbers[atoms].astype(np.int64),
            positions=self._positions[atoms].astype(np.float64),
            energy=values["U0"] * _HARTREE,
            properties={"index": int(self.molecule_index[molecule]), **values},
        )


def open_qm9(
    path: str | os.PathLike[str] | None = None,
    *,
    include_uncharacterized: bool = False,
    uncharacterized: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Open QM9 from ``qm9.npz``, the original archive, a folder of its files or one of them.

    Left out are the 3,054 molecules whose geometry changed its connectivity when it was relaxed, as the
    publisher lists them: marked in the ``.npz``, or in ``uncharacterized.txt`` beside the archive.

    Args:
        path: the file or folder; without one, the archive in the cache folder.
        include_uncharacterized: keep those molecules.
        uncharacterized: the publisher's list, where it does not lie beside the archive.

    Raises:
        DataError: the file is absent or damaged, or the list of molecules to leave out is not found.
    """
    source = Path(path).expanduser() if path is not None else cache_folder() / "qm9" / ARCHIVE
    if path is None and not source.is_file():
        raise DataError(f"{source}: no such file; run 'ffpretrain data download qm9' or give the path of QM9")
    if source.suffix == ".npz":
        return _open_npz(_io.existing_file(source, "QM9 file"), include_uncharacterized)
    members = (
        _folder_members(source) if source.is_dir() else _file_members(_io.existing_file(source, "QM9 file"))
    )
    excluded: NDArray[np.int64] = np.array([], dtype=np.int64)
    if not include_uncharacterized:
        folder = source if source.is_dir() else source.parent
        excluded = read_uncharacterized(_find_list(source, folder, uncharacterized))
    return _from_texts(source, members, excluded)


def read_uncharacterized(file: Path) -> NDArray[np.int64]:
    """Read the publisher's list of the 3,054 molecules to leave out.

    Raises:
        DataError: the file does not hold that many molecule numbers.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    # nine lines of heading, then a molecule a line beginning with its number, then a line that counts them
    first_words = [line.split(maxsplit=1)[0] for line in lines[9:-1] if line.strip()]
    numbers = [int(word) for word in first_words if word.isdigit()]
    if len(numbers) != N_UNCHARACTERIZED:
        raise DataError(
            f"{file}: lists {len(numbers)} molecules, expected {N_UNCHARACTERIZED}; download it again"
        )
    return np.array(numbers, dtype=np.int64)


def parse_qm9_xyz(text: str, where: str) -> tuple[int, NDArray[np.int64], NDArray[np.float64], list[float]]:
    """Read one molecule in the original format.

    Args:
        text: of the file.
        where: its name, for messages.

    Returns:
        QM9's number, atomic numbers ``[N]``, positions ``[N, 3]`` Å and the 15 properties.

    Raises:
        DataError: the text is truncated or not of this format.
    """
    from ase.data import atomic_numbers

    # Mathematica wrote the files: 2.1997*^-6 means 2.1997e-6
    lines = text.replace("*^", "e").splitlines()
    try:
        n_atoms = int(lines[0])
        head = lines[1].split()
        if head[0] != "gdb":
            raise ValueError(f"second line begins with {head[0]!r}, not 'gdb'")
        values = [float(value) for value in head[2 : 2 + len(PROPERTY_UNITS)]]
        rows = [line.split() for line in lines[2 : 2 + n_atoms]]
        numbers = np.array([atomic_numbers[row[0]] for row in rows], dtype=np.int64)
        positions = np.array([[float(value) for value in row[1:4]] for row in rows], dtype=np.float64)
        if len(values) != len(PROPERTY_UNITS) or positions.shape != (n_atoms, 3) or n_atoms < 1:
            raise ValueError(
                f"{len(rows)} of {n_atoms} atoms, {len(values)} of {len(PROPERTY_UNITS)} properties"
            )
        return int(head[1]), numbers, positions, values
    except KeyError as error:
        raise DataError(f"{where}: unknown element {error}; repair the file") from error
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{where}: is truncated or not in QM9's format ({error}); download it again"
        ) from error


def _open_npz(file: Path, include_uncharacterized: bool) -> Qm9Dataset:
    keys = ("index", "n_atoms", "Z", "R", *PROPERTY_UNITS)
    arrays = _io.read_npz(file, (*keys, "uncharacterized"))
    missing = [key for key in keys if key not in arrays]
    if not include_uncharacterized and "uncharacterized" not in arrays:
        missing.append("uncharacterized")
    if missing:
        raise DataError(f"{file}: has no array {missing[0]!r}, so it is no QM9 file of the known layout")
    _io.check_real(file, arrays, keys)
    keep = np.arange(len(arrays["index"]))
    if not include_uncharacterized:
        keep = np.flatnonzero(~arrays["uncharacterized"].astype(bool))
    properties = {name: arrays[name] for name in PROPERTY_UNITS}
    metadata = _metadata(file.name, {file.name: _io.sha256_of(file)})
    return Qm9Dataset(
        file, arrays["index"], arrays["n_atoms"], arrays["Z"], arrays["R"], properties, metadata, keep
    )


def _from_texts(source: Path, members: Iterable[tuple[str, str]], excluded: NDArray[np.int64]) -> Qm9Dataset:
    parsed = [parse_qm9_xyz(text, f"{source} {name}") for name, text in members]
    if not parsed:
        raise DataError(
            f"{source}: holds no dsgdb9nsd_*.xyz file; give QM9's archive or a folder of its files"
        )
    parsed.sort(key=lambda molecule: molecule[0])
    index = np.array([molecule[0] for molecule in parsed], dtype=np.int64)
    table = np.array([molecule[3] for molecule in parsed])
    checksums = {} if source.is_dir() else {source.name: _io.sha256_of(source)}
    return Qm9Dataset(
        source,
        index,
        np.array([len(molecule[1]) for molecule in parsed], dtype=np.int64),
        np.concatenate([molecule[1] for molecule in parsed]),
        np.concatenate([molecule[2] for molecule in parsed]),
        {name: table[:, column] for column, name in enumerate(PROPERTY_UNITS)},
        _metadata(source.name, checksums),
        np.flatnonzero(~np.isin(index, excluded)),
    )


def _file_members(file: Path) -> Iterator[tuple[str, str]]:
    if file.suffix == ".xyz":
        yield file.name, file.read_text(encoding="utf-8", errors="replace")
        return
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member) if _MEMBER.search(member.name) else None
                if content is not None:
                    yield member.name, content.read().decode("utf-8", "replace")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file}: is truncated or no tar archive ({error}); download it again") from error


def _folder_members(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.glob("dsgdb9nsd_*.xyz")):
        yield from _file_members(file)


def _find_list(source: Path, folder: Path, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return _io.existing_file(given, "list of uncharacterized molecules")
    beside = folder / UNCHARACTERIZED_LIST
    if not beside.is_file():
        raise DataError(
            f"{source}: {UNCHARACTERIZED_LIST}, the publisher's list of molecules to leave out, does not lie "
            "beside it; put it there ('ffpretrain data download qm9' fetches it) or give "
            "include_uncharacterized=True"
        )
    return beside


def _metadata(source: str, checksums: dict[str, str]) -> DatasetMetadata:
    return DatasetMetadata(
        name="qm9",
        source=source,
        sha256=checksums,
        level_of_theory="B3LYP/6-31G(2df,p)",
        energy_zero="separated electrons and nuclei",
        licence="CC0-1.0",
        units={"length": "angstrom", "energy": "hartree"},
        properties={"index": "number of the molecule in QM9", **PROPERTY_UNITS},
    )
