"""Writing the project's frame store: many molecules of different sizes in one HDF5 file.

Layout, format version 1 (``F`` frames, ``A`` atoms in all, gzip-compressed with the shuffle filter):

========================  ==================  ==========================================================
dataset                   shape               meaning
========================  ==================  ==========================================================
``offsets``               ``[F + 1]``         frame ``i`` owns the atoms ``offsets[i]:offsets[i + 1]``
``numbers``               ``[A]``             atomic numbers
``positions``             ``[A, 3]``          Å, float32 or float64 as chosen at creation
``forces``                ``[A, 3]``          eV/Å, float32 or float64 as chosen at creation
``fixed``                 ``[A]``             1 where an atom was held in place
``energy``                ``[F]``             eV, float64
``cell``, ``stress``      ``[F, 3, 3]``       Å and eV/Å³, float64
``pbc``                   ``[F, 3]``          1 where a direction repeats
``charge``, ``spin``      ``[F]``             total charge in e, multiplicity 2S + 1
``present``               ``[F]``             which optional fields a frame has: bits of ``PRESENT_BITS``
``properties/<name>/``                        ``values`` (flat), ``present [F]`` and, unless scalar, ``ends``
                                              ``[F]`` and ``shape [F, ndim]``
``splits/<name>``                             indices of frames
``metadata``              JSON text           name, source, level of theory, energy zero, licence, units
``notes/<name>``          JSON text           whatever the writer wants to keep beside the frames
========================  ==================  ==========================================================

A field that no frame has is absent. Attributes of the root: ``format``, ``format_version`` and ``frames``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.errors import DataError

FORMAT = "ffpretrain-frames"
FORMAT_VERSION = 1
UNITS = {"energy": "eV", "length": "angstrom", "forces": "eV/angstrom", "stress": "eV/angstrom^3"}
PRESENT_BITS = {"energy": 1, "forces": 2, "cell": 4, "stress": 8, "fixed": 16}
ATOM_FIELDS = ("numbers", "positions", "forces", "fixed")
FRAME_FIELDS = ("energy", "cell", "pbc", "stress", "charge", "spin")
_TAILS: dict[str, tuple[int, ...]] = {
    "positions": (3,),
    "forces": (3,),
    "cell": (3, 3),
    "stress": (3, 3),
    "pbc": (3,),
}


class StoreWriter:
    """Writes a frame store beside its target and moves it there when it is complete.

    Use it as a context manager: leaving the block normally puts the file in place, leaving it by an exception
    removes what was written and keeps an older file at ``path`` as it was.

    Args:
        path: the ``.h5`` file to make; an existing one is replaced at the end.
        metadata: what the frames are; ``units`` is ignored, for a store is always in eV and Å.
        positions: ``float64``, or ``float32`` where the labels were computed on positions so rounded.
        forces: ``float64`` or ``float32``.
        notes: JSON-able values kept beside the frames, read back as ``FrameStore.notes``.

    Raises:
        DataError: the folder cannot be written to.
    """

    BATCH = 512

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: DatasetMetadata,
        *,
        positions: str = "float64",
        forces: str = "float64",
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        for name, dtype in (("positions", positions), ("forces", forces)):
            if dtype not in ("float32", "float64"):
                raise DataError(f"{path}: {name} can be stored as 'float32' or 'float64', not {dtype!r}")
        self._types = {"positions": positions, "forces": forces, "numbers": "u1", "fixed": "u1", "pbc": "u1"}
        self._types |= {"energy": "f8", "cell": "f8", "stress": "f8", "charge": "i4", "spin": "i4"}
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._buffer: list[Frame] = []
        self._frames = self._atoms = 0
        self._ends: dict[str, int] = {}
        try:
            self._file = h5py.File(self._temporary, "w")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({reason(error)}); check the folder") from error
        self._file.attrs["format"] = FORMAT
        self._file.attrs["format_version"] = FORMAT_VERSION
        self._dataset("offsets", (), "i8", 1)
        _write_metadata(self._file, metadata, dict(notes or {}))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def append(self, frame: Frame) -> None:
        """Add one frame.

        Raises:
            DataError: a shape does not fit the number of atoms, or a value is not finite.
        """
        check_frame(frame, f"{self.path}: frame {self._frames + len(self._buffer)}")
        self._buffer.append(frame)
        if len(self._buffer) >= self.BATCH:
            self._flush()

    def extend(self, frames: Iterable[Frame]) -> None:
        """Add many frames."""
        for frame in frames:
            self.append(frame)

    def close(self) -> None:
        """Finish the file and move it to its place."""
        try:
            self._flush()
            self._file.attrs["frames"] = self._frames
            self._file.close()
            with open(self._temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(self._temporary, self.path)
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise DataError(f"{self.path}: cannot be written ({reason(error)})") from error
            raise

    def discard(self) -> None:
        """Give up: remove the unfinished file."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _dataset(self, name: str, tail: tuple[int, ...], dtype: Any, rows: int) -> h5py.Dataset:
        if name not in self._file:
            row_bytes = np.dtype(dtype).itemsize * int(np.prod(tail, dtype=np.int64))
            chunk = max(16, min(4096, 2**16 // row_bytes))
            self._file.create_dataset(
                name,
                shape=(rows, *tail),
                maxshape=(None, *tail),
                chunks=(chunk, *tail),
                dtype=dtype,
                shuffle=True,
                compression="gzip",
                compression_opts=6,
            )
        return self._file[name]

    def _extend(self, name: str, values: NDArray[Any], before: int, dtype: Any = None) -> None:
        """Append rows; a dataset that begins late is filled with zeros for the ``before`` earlier rows."""
        dtype = self._types.get(name, dtype or values.dtype)
        data = self._dataset(name, values.shape[1:], dtype, before)
        data.resize(before + len(values), axis=0)
        data[before:] = values

    def _flush(self) -> None:
        frames, self._buffer = self._buffer, []
        if not frames:
            return
        counts = [len(frame) for frame in frames]
        for name in (*ATOM_FIELDS, *FRAME_FIELDS):
            values = [getattr(frame, name) for frame in frames]
            if all(value is None for value in values) and name not in self._file:
                continue
            per_atom = name in ATOM_FIELDS
            tail = _TAILS.get(name, ())
            if per_atom:
                rows = [
                    np.zeros((n, *tail)) if v is None else np.asarray(v)
                    for n, v in zip(counts, values, strict=True)
                ]
                self._extend(name, np.concatenate(rows), self._atoms)
            else:
                rows = [np.zeros(tail) if v is None else np.asarray(v) for v in values]
                self._extend(name, np.stack(rows), self._frames)
        masks = [sum(b for k, b in PRESENT_BITS.items() if getattr(f, k) is not None) for f in frames]
        self._extend("present", np.array(masks, np.uint8), self._frames)
        for name in sorted({name for frame in frames for name in frame.properties} | set(self._ends)):
            self._flush_property(name, [frame.properties.get(name) for frame in frames])
        self._extend("offsets", self._atoms + np.cumsum(counts, dtype=np.int64), self._frames + 1)
        self._frames += len(frames)
        self._atoms += sum(counts)

    def _flush_property(self, name: str, values: list[Any]) -> None:
        at = f"properties/{name}"
        arrays = [None if value is None else np.asarray(value) for value in values]
        given = [array for array in arrays if array is not None]
        if given and at not in self._file:
            self._file.create_group(at).attrs["ndim"] = given[0].ndim
        ndim = int(self._file[at].attrs["ndim"])
        if any(array.ndim != ndim or array.dtype.kind not in "iufb" for array in given):
            raise DataError(f"{self.path}: property {name!r} is not numeric or changes its dimensions")
        kind: np.dtype[Any] | None = np.result_type(*given) if given else None
        stored = self._file[at]["values"].dtype if "values" in self._file[at] else kind
        if kind is not None and stored is not None and not np.can_cast(kind, stored, "same_kind"):
            raise DataError(f"{self.path}: property {name!r} changes from {stored} to {kind}; give one type")
        self._extend(f"{at}/present", np.array([a is not None for a in arrays], np.uint8), self._frames)
        end = self._ends.get(name, 0)
        if ndim == 0:
            column = np.array([0 if a is None else a for a in arrays], kind)
            self._extend(f"{at}/values", column, self._frames)
            self._ends[name] = self._frames + len(arrays)
            return
        sizes = np.array([0 if a is None else a.size for a in arrays], np.int64)
        shapes = np.array([(0,) * ndim if a is None else a.shape for a in arrays], np.int64)
        if given:
            self._extend(f"{at}/values", np.concatenate([a.ravel() for a in given]), end)
        self._extend(f"{at}/ends", end + np.cumsum(sizes), self._frames)
        self._extend(f"{at}/shape", shapes, self._frames)
        self._ends[name] = end + int(sizes.sum())


def write_store(
    path: str | os.PathLike[str],
    dataset: Dataset,
    *,
    positions: str = "float64",
    forces: str = "float64",
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write any dataset as a frame store; see :class:`StoreWriter` for the arguments and errors."""
    with StoreWriter(path, dataset.metadata, positions=positions, forces=forces, notes=notes) as writer:
        for index in range(len(dataset)):
            writer.append(dataset[index])


def check_frame(frame: Frame, where: str) -> None:
    """Refuse a frame whose shapes or values could not be read back as they are.

    Args:
        frame: the frame.
        where: file and frame, the beginning of the message.

    Raises:
        DataError: a shape does not fit the number of atoms, a value is not finite or out of range.
    """
    n = len(frame.numbers)
    if n == 0:
        raise DataError(f"{where}: has no atoms")
    if np.any(frame.numbers < 0) or np.any(frame.numbers > 255):
        raise DataError(f"{where}: atomic numbers must lie between 0 and 255")
    for name in (*ATOM_FIELDS, *FRAME_FIELDS):
        value = getattr(frame, name)
        if value is None:
            continue
        expected = ((n,) if name in ATOM_FIELDS else ()) + _TAILS.get(name, ())
        if np.shape(value) != expected:
            raise DataError(f"{where}: {name} has shape {np.shape(value)} instead of {expected}")
        if not np.all(np.isfinite(value)):
            raise DataError(f"{where}: {name} holds a value that is not finite; leave that frame out")
    for name in frame.properties:
        if not name or "/" in name or name.startswith("."):
            raise DataError(f"{where}: property name {name!r} must not be empty, hold '/' or begin with '.'")


def _write_metadata(file: h5py.File, metadata: DatasetMetadata, notes: dict[str, Any]) -> None:
    text = h5py.string_dtype()
    stored = {
        "name": metadata.name,
        "source": metadata.source,
        "sha256": dict(metadata.sha256),
        "level_of_theory": metadata.level_of_theory,
        "energy_zero": metadata.energy_zero,
        "licence": metadata.licence,
        "units": UNITS,
        "properties": dict(metadata.properties),
    }
    file.create_dataset("metadata", data=json.dumps(stored), dtype=text)
    for name, indices in metadata.splits.items():
        file.create_dataset(f"splits/{name}", data=np.asarray(indices, np.int64), compression="gzip")
    for name, value in notes.items():
        file.create_dataset(f"notes/{name}", data=json.dumps(value), dtype=text)


def reason(error: BaseException) -> str:
    """Return an error's text in one line, for the end of a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
