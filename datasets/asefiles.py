"""Files that ASE reads: extended xyz (plain or ``.xz``), trajectories ``.traj`` and databases ``.db``.

Frames are parsed when they are asked for. Neither ``.traj`` nor ``.db`` runs code when read: a ``.traj`` is
ASE's ulm container (binary arrays and JSON), a ``.db`` is SQLite with JSON columns. ASE's old pickled
trajectories begin differently, and files that do not begin as they should are refused before ASE sees them.
"""

from __future__ import annotations

import io
import lzma
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets import _io
from ffpretrain.datasets._units import EV_ANGSTROM, LabelUnits, given_units
from ffpretrain.datasets.aseframes import LabelKeys, frame_from_atoms
from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms
    from ase.io.trajectory import TrajectoryReader

_PICKLE = "is a pickle, which runs code when read, so it is refused; save it again with a current ASE"


class ExtxyzDataset(Dataset):
    """Frames of an extended xyz file; its frame boundaries are found when it is opened.

    Args:
        path: ``.xyz``, ``.extxyz``, or either with ``.xz`` behind it (kept decompressed in memory).
        keys: which labels to read.
        metadata: of the dataset.

    Raises:
        DataError: the file is truncated, or is no xyz file.
    """

    def __init__(self, path: Path, keys: LabelKeys, metadata: DatasetMetadata) -> None:
        self.path = path
        self.keys = keys
        self.metadata = metadata
        self._content = _decompressed(path) if path.suffix == ".xz" else None
        with self._open() as file:
            self._offsets = _frame_offsets(path, file)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _open(self) -> io.BytesIO | io.BufferedReader:
        return self.path.open("rb") if self._content is None else io.BytesIO(self._content)

    def _frame(self, index: int) -> Frame:
        where = f"{self.path} frame {index}"
        start, end = self._offsets[index : index + 2]
        with self._open() as file:
            file.seek(start)
            text = file.read(int(end - start))
        return frame_from_atoms(_parse_xyz(text, where), where, self.keys)


class TrajectoryDataset(Dataset):
    """Frames of an ASE ``.traj`` file, read one by one.

    Raises:
        DataError: the file is truncated, pickled, or is no trajectory.
    """

    def __init__(self, path: Path, keys: LabelKeys, metadata: DatasetMetadata) -> None:
        self.path = path
        self.keys = keys
        self.metadata = metadata
        self._open_in: tuple[int, TrajectoryReader] | None = None
        _check_magic(path, (b"- of Ulm", b"AFFormat"), "an ASE trajectory")
        self._length = len(self._reader())
        if self._length == 0:
            raise DataError(f"{path}: has no frames; give a file with at least one")

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_in": None}

    def _reader(self) -> TrajectoryReader:
        # workers made by fork would share one file position: each process opens the file itself
        if self._open_in is None or self._open_in[0] != os.getpid():
            from ase.io.trajectory import TrajectoryReader

            try:
                self._open_in = (os.getpid(), TrajectoryReader(self.path))
            except Exception as error:  # a damaged header fails in many ways inside ASE: all mean one thing
                raise DataError(
                    f"{self.path}: is truncated or damaged ({_brief(error)}); copy it again"
                ) from error
        return self._open_in[1]

    def _frame(self, index: int) -> Frame:
        where = f"{self.path} frame {index}"
        try:
            atoms = self._reader()[index]
        except Exception as error:  # as above
            raise DataError(
                f"{where}: is truncated or damaged ({_brief(error)}); copy the file again"
            ) from error
        return frame_from_atoms(atoms, where, self.keys)


class DatabaseDataset(Dataset):
    """Rows of an ASE SQLite database ``.db``, read one by one.

    Raises:
        DataError: the file is damaged, pickled, or is no database.
    """

    def __init__(self, path: Path, keys: LabelKeys, metadata: DatasetMetadata) -> None:
        self.path = path
        self.keys = keys
        self.metadata = metadata
        self._ids = _row_ids(path)
        if not self._ids:
            raise DataError(f"{path}: has no rows; give a database with at least one")

    def __len__(self) -> int:
        return len(self._ids)

    def _frame(self, index: int) -> Frame:
        where = f"{self.path} row {self._ids[index]}"
        try:
            row = _connect(self.path).get(id=self._ids[index])
            # a stored key "charge" is hidden behind a property of the row, which sums initial charges
            stored = {key: vars(row)[key] for key in row.key_value_pairs if key in vars(row)}
            atoms, extra = row.toatoms(), {**stored, **row.data}
        except Exception as error:  # damaged rows fail in many ways inside ASE and SQLite
            raise DataError(f"{where}: is damaged ({_brief(error)}); copy the file again") from error
        return frame_from_atoms(atoms, where, self.keys, extra)


def open_extxyz(
    path: str | os.PathLike[str],
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    units: Mapping[str, str] | None = None,
    name: str | None = None,
    level_of_theory: str | None = None,
    energy_zero: str | None = None,
    licence: str | None = None,
) -> Dataset:
    """Open an extended xyz file, plain or compressed as ``.xz``; eV and Å by ASE's convention, or ``units``.

    Args:
        path: the file.
        energy_key: name of the energy; None looks for ``energy``, ``REF_energy`` and the like, ``""``
            reads none.
        forces_key: name of the forces, likewise.
        stress_key: name of the stress (ASE's sign), likewise.
        units: of labels and positions, where they are not eV and Å.
        name: of the dataset; the file's own name otherwise.
        level_of_theory: the method behind the labels, where known.
        energy_zero: what an energy of 0 means, where known.
        licence: of the data, where known.

    Raises:
        DataError: the file is absent, truncated or damaged.
    """
    file = _io.existing_file(path, "xyz file")
    keys = LabelKeys(energy_key, forces_key, stress_key, given_units(units) if units else EV_ANGSTROM)
    return ExtxyzDataset(file, keys, _metadata(file, keys, name, level_of_theory, energy_zero, licence))


def open_traj(
    path: str | os.PathLike[str],
    *,
    energy_key: str | None = None,
    name: str | None = None,
    level_of_theory: str | None = None,
    energy_zero: str | None = None,
    licence: str | None = None,
) -> Dataset:
    """Open an ASE trajectory, always in eV and Å.

    Args:
        path: the file.
        energy_key: ``"free_energy"`` reads the force-consistent energy in place of ``energy``, ``""`` none.
        name: of the dataset; the file's own name otherwise.
        level_of_theory: the method behind the labels, where known.
        energy_zero: what an energy of 0 means, where known.
        licence: of the data, where known.

    Raises:
        DataError: the file is absent, truncated, pickled or damaged.
    """
    file = _io.existing_file(path, "trajectory")
    keys = LabelKeys(energy_key)
    return TrajectoryDataset(file, keys, _metadata(file, keys, name, level_of_theory, energy_zero, licence))


def open_db(
    path: str | os.PathLike[str],
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    units: Mapping[str, str] | None = None,
    name: str | None = None,
    level_of_theory: str | None = None,
    energy_zero: str | None = None,
    licence: str | None = None,
) -> Dataset:
    """Open an ASE database; eV and Å by ASE's convention, the units its metadata names, or ``units``.

    Args:
        path: the file.
        energy_key: name of the energy among results, key-value pairs and data; see :func:`open_extxyz`.
        forces_key: name of the forces, likewise.
        stress_key: name of the stress, likewise.
        units: of labels and positions, where neither ASE's nor the database's own.
        name: of the dataset; the file's own name otherwise.
        level_of_theory: the method behind the labels, where known.
        energy_zero: what an energy of 0 means, where known.
        licence: of the data, where known.

    Raises:
        DataError: the file is absent, pickled or damaged.
    """
    file = _io.existing_file(path, "database")
    _check_magic(file, (b"SQLite format 3\0",), "an ASE SQLite database")
    chosen = given_units(units) if units else _units_of_db(file, energy_key, forces_key)
    keys = LabelKeys(energy_key, forces_key, stress_key, chosen)
    return DatabaseDataset(file, keys, _metadata(file, keys, name, level_of_theory, energy_zero, licence))


def _metadata(
    file: Path,
    keys: LabelKeys,
    name: str | None,
    level_of_theory: str | None,
    energy_zero: str | None,
    licence: str | None,
) -> DatasetMetadata:
    return DatasetMetadata(
        name=name or file.name.split(".")[0],
        source=file.name,
        sha256={file.name: _io.sha256_of(file)},
        level_of_theory=level_of_theory,
        energy_zero=energy_zero,
        licence=licence,
        units=keys.units.as_dict(),
    )


def _decompressed(path: Path) -> bytes:
    try:
        return lzma.decompress(path.read_bytes())
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(
            f"{path}: is truncated or damaged ({_brief(error)}); copy or download it again"
        ) from error


def _frame_offsets(path: Path, file: io.BytesIO | io.BufferedReader) -> NDArray[np.int64]:
    """Return where each frame begins, and the end of the last one."""
    offsets: list[int] = []
    while True:
        start = file.tell()
        header = file.readline()
        if not header.strip():
            if not header:
                break
            continue
        frame = f"{path} frame {len(offsets)}"
        n_atoms = _atom_count(header, frame)
        lines = [file.readline() for _ in range(n_atoms + 1)]
        if not lines[-1].strip():
            raise DataError(f"{frame}: is truncated, {n_atoms} atoms were announced; copy the file again")
        if not offsets and lines[0].startswith(b"gdb "):
            raise DataError(f"{path}: is in QM9's own xyz format; open it with open_dataset('qm9', path)")
        offsets.append(start)
        end = file.tell()
    if not offsets:
        raise DataError(f"{path}: has no frames; give a file with at least one")
    return np.array([*offsets, end], dtype=np.int64)


def _atom_count(header: bytes, frame: str) -> int:
    try:
        count = int(header)
    except ValueError as error:
        shown = header[:40].decode("utf-8", "replace").strip()
        raise DataError(
            f"{frame}: begins with {shown!r}, expected the number of atoms; repair the file"
        ) from error
    if count < 1:
        raise DataError(f"{frame}: has {count} atoms; remove the empty frame")
    return count


def _parse_xyz(text: bytes, where: str) -> Atoms:
    import ase.io

    try:
        return cast("Atoms", ase.io.read(io.StringIO(text.decode("utf-8")), index=0, format="extxyz"))
    except KeyError as error:
        raise DataError(f"{where}: unknown element or column {error}; repair the file") from error
    except (OSError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise DataError(
            f"{where}: cannot be read as extended xyz ({_brief(error)}); repair the file"
        ) from error


def _check_magic(path: Path, beginnings: Sequence[bytes], what: str) -> None:
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(tuple(beginnings)):
        return
    if start[:1] == b"\x80" or start.startswith(b"PickleTrajectory"):
        raise DataError(f"{path}: {_PICKLE}")
    raise DataError(f"{path}: is not {what} (its first bytes are {start[:8]!r}); check the file")


def _connect(path: Path) -> Any:
    from ase.db import connect

    return connect(path, type="db")


def _row_ids(path: Path) -> list[int]:
    try:
        return [row.id for row in _connect(path).select(columns=["id"], include_data=False)]
    except Exception as error:  # damaged files fail in many ways inside ASE and SQLite
        raise DataError(f"{path}: is truncated or damaged ({_brief(error)}); copy it again") from error


def _units_of_db(path: Path, energy_key: str | None, forces_key: str | None) -> LabelUnits:
    """Return the units that SchNetPack writes into a database's metadata, else ASE's own eV and Å."""
    try:
        with _connect(path) as database:  # ASE 3.27 and 3.28 read it over an open connection only
            metadata = database.metadata
    except Exception as error:  # as above
        raise DataError(f"{path}: is truncated or damaged ({_brief(error)}); copy it again") from error
    table = metadata.get("_property_unit_dict")
    if not table:
        return EV_ANGSTROM
    energy, force = table.get(energy_key or "energy"), table.get(forces_key or "forces")
    length = metadata.get("_distance_unit")
    if not energy or not length:
        raise DataError(
            f"{path}: names units for {', '.join(table)} but not for the energy; give energy_key= or units="
        )
    return LabelUnits(energy, length, force or "")


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
