"""What a stopped relaxed scan, band or evaluation goes on from: what is done, in one file."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.errors import DataError
from ffpretrain.md.landscapes.surface import Array, write_bytes

if TYPE_CHECKING:
    from ase import Atoms


def state_key(atoms: Atoms, options: object) -> str:
    """Return what tells scans apart: the structure it starts from and all that decides its points.

    Args:
        atoms: the structure.
        options: anything whose ``repr`` says it all; no arrays, whose ``repr`` leaves numbers out.
    """
    value = hashlib.sha256(repr(options).encode())
    for array in (atoms.numbers, atoms.positions):
        value.update(np.ascontiguousarray(array).tobytes())
    return value.hexdigest()


def load_arrays(state: Path | None, key: str) -> dict[str, NDArray[Any]] | None:
    """Return what :func:`save_arrays` wrote, or None where nothing of this key is kept.

    Args:
        state: the file, or None.
        key: of the work; a file of other work is not used.

    Raises:
        DataError: the file is damaged.
    """
    if state is None or not state.is_file():
        return None
    try:
        with np.load(state, allow_pickle=False) as content:
            if str(content["key"]) != key:
                return None
            return {name: content[name] for name in content.files if name != "key"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{state}: cannot be read ({error}); remove it to start anew") from None


def save_arrays(state: Path | None, key: str, **arrays: NDArray[Any] | float) -> None:
    """Write arrays and numbers to go on from, in one piece.

    Raises:
        DataError: the file cannot be written.
    """
    if state is None:
        return
    buffer, content = io.BytesIO(), {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(buffer, key=np.array(key), **content)  # type: ignore[arg-type]
    write_bytes(state, buffer.getvalue())


def load_state(state: Path | None, key: str, shape: tuple[int, ...]) -> tuple[Array, int, int]:
    """Return positions, how many points are done and how many of them did not converge.

    Args:
        state: the file, or None.
        key: of the scan; a file of another one is not used.
        shape: of the positions.

    Raises:
        DataError: the file is damaged.
    """
    found = load_arrays(state, key)
    if found is None:
        return np.full(shape, np.nan), 0, 0
    return found["positions"], int(found["done"]), int(found["unfinished"])


def save_state(state: Path | None, key: str, positions: Array, done: int, unfinished: int) -> None:
    """Write the points done so far.

    Raises:
        DataError: the file cannot be written.
    """
    save_arrays(state, key, positions=positions, done=done, unfinished=unfinished)
