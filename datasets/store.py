"""Reading the project's frame store; :mod:`ffpretrain.datasets.store_writer` describes the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets._io import existing_file, sha256_of
from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.datasets.store_writer import (
    ATOM_FIELDS,
    FORMAT,
    FORMAT_VERSION,
    FRAME_FIELDS,
    PRESENT_BITS,
    UNITS,
    StoreWriter,
    reason,
    write_store,
)
from ffpretrain.errors import DataError

__all__ = ["FrameStore", "StoreWriter", "write_store"]

IN_MEMORY_BYTES = 64 * 2**20


class FrameStore(Dataset):
    """Frames of one HDF5 file, read when they are asked for.

    Opening reads the metadata and the offsets only. A store whose decoded fields fit in ``in_memory_bytes``
    keeps each field in memory once it was read; a larger one reads the chunks that a frame touches. The file
    is opened again in every process that reads, so a store can be handed to data-loading workers.

    Args:
        path: the ``.h5`` file.
        in_memory_bytes: decoded size up to which fields are kept in memory; 0 always reads from the file.

    Raises:
        DataError: the file is missing, truncated, no frame store or of a newer format version.
    """

    def __init__(self, path: str | os.PathLike[str], in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self.path = existing_file(path, "frame store")
        self._file: h5py.File | None = None
        self._owner = 0
        self._open: dict[str, h5py.Dataset] = {}
        self._memory: dict[str, NDArray[Any]] = {}
        try:
            file = self._handle()
            self._check_format(file)
            self._offsets: NDArray[np.int64] = file["offsets"][...]
            self._fields = {name for name in (*ATOM_FIELDS, *FRAME_FIELDS, "present") if name in file}
            self._properties = {name: "ends" in group for name, group in file.get("properties", {}).items()}
            self.notes: dict[str, Any] = {
                name: json.loads(text[()]) for name, text in file.get("notes", {}).items()
            }
            self._check_lengths(file)
            decoded = sum(file[name].size * file[name].dtype.itemsize for name in self._fields)
            self.metadata = self._read_metadata(file)
        except DataError:
            raise
        except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
            raise DataError(
                f"{self.path}: cannot be read as a frame store ({reason(error)}); it is damaged, cut short "
                "or of another kind: copy or make it again"
            ) from error
        finally:
            self.close()
        self._keep = decoded <= in_memory_bytes

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        """Number of atoms of each frame, ``[F]``, without reading the frames."""
        return np.diff(self._offsets)

    def close(self) -> None:
        """Close the file; it opens again by itself at the next read."""
        if self._file is not None and self._owner == os.getpid():
            self._file.close()
        self._file, self._open = None, {}

    def __enter__(self) -> FrameStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_open": {}}

    def _handle(self) -> h5py.File:
        # an HDF5 handle must not cross a fork: each process opens the file for itself
        if self._file is None or self._owner != os.getpid():
            self._file, self._owner, self._open = h5py.File(self.path, "r"), os.getpid(), {}
        return self._file

    def _check_format(self, file: h5py.File) -> None:
        if file.attrs.get("format") != FORMAT:
            raise DataError(f"{self.path}: an HDF5 file, but not a frame store of this project")
        version = int(file.attrs["format_version"])
        if version > FORMAT_VERSION:
            raise DataError(
                f"{self.path}: frame store of format version {version}, this package reads up to "
                f"{FORMAT_VERSION}; upgrade ffpretrain"
            )

    def _check_lengths(self, file: h5py.File) -> None:
        offsets, frames = self._offsets, int(file.attrs["frames"])
        sound = len(offsets) == frames + 1 and offsets[0] == 0 and bool(np.all(np.diff(offsets) > 0))
        for name in self._fields:
            sound = sound and len(file[name]) == (offsets[-1] if name in ATOM_FIELDS else frames)
        if not sound or not {"numbers", "positions", "present"} <= self._fields:
            raise DataError(
                f"{self.path}: the fields do not fit together; the file is damaged: make it again"
            )

    def _read_metadata(self, file: h5py.File) -> DatasetMetadata:
        stored = json.loads(file["metadata"][()])
        if stored["units"] != UNITS:
            raise DataError(
                f"{self.path}: units {stored['units']} instead of {UNITS}; use this package's writer"
            )
        splits = {name: indices[...].astype(np.int64) for name, indices in file.get("splits", {}).items()}
        checksums = _Checksums(self.path, stored.pop("sha256"))
        return DatasetMetadata(**stored, sha256=checksums, splits=splits)

    def _slice(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if not self._keep:
            file = self._handle()
            if name not in self._open:  # looking a dataset up costs as much as reading from it
                self._open[name] = file[name]
            return np.asarray(self._open[name][start:stop])
        if name not in self._memory:
            self._memory[name] = self._handle()[name][...]
        return self._memory[name][start:stop]

    def _frame(self, index: int) -> Frame:
        try:
            return self._decode(index)
        except (OSError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{self.path}: frame {index} cannot be read ({reason(error)}); the file is damaged: "
                "copy or make it again"
            ) from error

    def _decode(self, index: int) -> Frame:
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        present = int(self._slice("present", index, index + 1)[0])

        def atoms(name: str, dtype: type) -> Any:
            if present & PRESENT_BITS.get(name, 0) or name not in PRESENT_BITS:
                return self._slice(name, start, stop).astype(dtype)
            return None

        def frame(name: str) -> Any:
            if present & PRESENT_BITS.get(name, 0) or name not in PRESENT_BITS:
                return self._slice(name, index, index + 1)[0].copy()
            return None

        energy = frame("energy")
        pbc = frame("pbc")
        return Frame(
            numbers=atoms("numbers", np.int64),
            positions=atoms("positions", np.float64),
            cell=frame("cell"),
            pbc=(bool(pbc[0]), bool(pbc[1]), bool(pbc[2])),
            energy=None if energy is None else float(energy),
            forces=atoms("forces", np.float64),
            stress=frame("stress"),
            charge=int(frame("charge")),
            spin=int(frame("spin")),
            fixed=atoms("fixed", np.bool_),
            properties=dict(self._decode_properties(index)),
        )

    def _decode_properties(self, index: int) -> Iterator[tuple[str, Any]]:
        for name, ragged in self._properties.items():
            at = f"properties/{name}"
            if not self._slice(f"{at}/present", index, index + 1)[0]:
                continue
            if not ragged:
                yield name, self._slice(f"{at}/values", index, index + 1)[0].item()
                continue
            ends = self._slice(f"{at}/ends", max(index - 1, 0), index + 1)
            start = int(ends[0]) if index else 0
            shape = tuple(int(n) for n in self._slice(f"{at}/shape", index, index + 1)[0])
            yield name, self._slice(f"{at}/values", start, int(ends[-1])).reshape(shape).copy()


class _Checksums(Mapping[str, str]):
    """SHA-256 of the store, worked out when first asked for, and of the files it was made from."""

    def __init__(self, path: Path, sources: Mapping[str, str]) -> None:
        self._path = path
        self._sources = {name: digest for name, digest in sources.items() if name != path.name}

    def __getitem__(self, name: str) -> str:
        return sha256_of(self._path) if name == self._path.name else self._sources[name]

    def __iter__(self) -> Iterator[str]:
        return iter((self._path.name, *self._sources))

    def __len__(self) -> int:
        return 1 + len(self._sources)

    def __repr__(self) -> str:
        return repr(dict(self))
