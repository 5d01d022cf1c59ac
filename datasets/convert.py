"""Writing any dataset as this project's frame store or as extended xyz."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ffpretrain.datasets import _io
from ffpretrain.datasets.frames import Dataset, Frame
from ffpretrain.errors import DataError

Progress = Callable[[int], None]
STORES = (".h5", ".hdf5")
XYZ = (".extxyz", ".xyz")


def write_dataset(
    dataset: Dataset,
    target: str | os.PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a dataset; the ending of ``target`` tells the format, ``.h5`` or ``.extxyz``.

    The store keeps everything. Extended xyz keeps geometry, labels, fixed atoms, charge, spin and single
    numbers among the properties; positions and forces are rounded to 1e-8, metadata are lost.

    Args:
        dataset: to write.
        target: the file to make; never left half-written.
        overwrite: replace a file that is there.
        progress: told of the number of frames written.

    Raises:
        DataError: the ending is unknown, the file exists, cannot be written, or a frame is damaged.
    """
    path = Path(target).expanduser()
    if path.suffix.lower() not in (*STORES, *XYZ):
        raise DataError(f"{path}: datasets are written as {', '.join((*STORES, *XYZ))}; change the ending")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists; choose another name or overwrite it")
    if path.suffix.lower() in STORES:
        from ffpretrain.datasets.store import write_store

        # write_store is atomic itself, and lays its own temporary file beside the target
        write_store(path, _Counted(dataset, progress))
        return path
    return _io.write_atomically(path, lambda file: _write_extxyz(dataset, file, progress))


class _Counted(Dataset):
    """A dataset that tells how far it was read."""

    def __init__(self, parent: Dataset, progress: Progress | None) -> None:
        self.metadata = parent.metadata
        self._parent = parent
        self._progress = progress

    def __len__(self) -> int:
        return len(self._parent)

    def _frame(self, index: int) -> Frame:
        frame = self._parent[index]
        if self._progress is not None:
            self._progress(index + 1)
        return frame


def _write_extxyz(dataset: Dataset, file: Path, progress: Progress | None) -> None:
    import ase.io

    with file.open("w", encoding="utf-8") as stream:
        for index in range(len(dataset)):
            frame = dataset[index]
            atoms = frame.to_atoms()
            for name, value in frame.properties.items():
                if name not in atoms.info and np.ndim(value) == 0:
                    atoms.info[name] = value
            ase.io.write(stream, atoms, format="extxyz")
            if progress is not None:
                progress(index + 1)
