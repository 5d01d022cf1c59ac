"""What a stopped relaxed scan goes on from: the points done, in one file."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ffpretrain.errors import DataError
from ffpretrain.md.landscapes.surface import Array, write_bytes

if TYPE_CHECKING:
    from ase import Atoms


def state_key(atoms: Atoms, options: object) -> str:
    """Return what tells scans apart: the structure it starts from and all that decides its points.

    Args:
        atoms: the structure.
        options: anything whose ``repr`` says it all.
    """
    value = hashlib.sha256(repr(options).encode())
    for array in (atoms.numbers, atoms.positions):
        value.update(np.ascontiguousarray(array).tobytes())
    return value.hexdigest()


def load_state(state: Path | None, key: str, shape: tuple[int, ...]) -> tuple[Array, int, int]:
    """Return positions, how many points are done and how many of them did not converge.

    Args:
        state: the file, or None.
        key: of the scan; a file of another one is not used.
        shape: of the positions.

    Raises:
        DataError: the file is damaged.
    """
    fresh = np.full(shape, np.nan), 0, 0
    if state is None or not state.is_file():
        return fresh
    try:
        with np.load(state, allow_pickle=False) as content:
            if str(content["key"]) != key:
                return fresh
            return content["positions"], int(content["done"]), int(content["unfinished"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{state}: cannot be read ({error}); remove it to start anew") from None


def save_state(state: Path, key: str, positions: Array, done: int, unfinished: int) -> None:
    """Write the points done so far.

    Raises:
        DataError: the file cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), positions=positions, done=done, unfinished=unfinished)
    write_bytes(state, buffer.getvalue())
