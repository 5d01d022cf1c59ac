"""Opening files safely: existence, checksums, ``.npz`` without pickles, one-line errors."""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.errors import DataError, nearest

_CHUNK = 1 << 20


def existing_file(path: str | os.PathLike[str], what: str = "file") -> Path:
    """Return ``path`` as an absolute path of a file that can be read.

    Raises:
        DataError: there is no such file, it is a folder, is empty or cannot be read; close names are offered.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise DataError(f"{file}: is a folder, a {what} was expected; name a file inside it")
    if not file.exists():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        hint = nearest(file.name, siblings) if 0 < len(siblings) < 2000 else ""
        hint = hint if "mean" in hint else "; check the path"
        raise DataError(f"{file}: no such {what}{hint}")
    if not os.access(file, os.R_OK):
        raise DataError(f"{file}: may not be read; check its permissions")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: is empty (0 bytes); copy or download it again")
    return file.resolve()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; unchanged files are read once a process."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    return digest(Path(path), "sha256")


def digest(path: Path, algorithm: str) -> str:
    """Return a file's checksum by ``hashlib`` name, such as ``md5``, in hexadecimal."""
    value = hashlib.new(algorithm)
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            value.update(block)
    return value.hexdigest()


def read_npz(path: Path, wanted: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of an ``.npz`` file, never unpickling anything.

    Args:
        path: the file.
        wanted: keys to read where present; None reads all of them.

    Raises:
        DataError: the file is not an npz, is truncated or damaged, or holds pickled Python objects.
    """
    arrays: dict[str, NDArray[Any]] = {}
    key = None
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise DataError(
                f"{path}: is a single .npy array, an .npz archive was expected; save it with np.savez"
            )
        with loaded as archive:
            keys = archive.files if wanted is None else [k for k in wanted if k in archive.files]
            for key in keys:
                arrays[key] = archive[key]
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DataError(_npz_problem(path, key, error)) from error
    return arrays


def check_real(file: object, arrays: dict[str, NDArray[Any]], keys: Iterable[str]) -> None:
    """Refuse arrays that do not hold real numbers (text, complex numbers, dates).

    Raises:
        DataError: an array of that name is there and is of another type.
    """
    for key in keys:
        if key in arrays and arrays[key].dtype.kind not in "fiub":
            raise DataError(
                f"{file}: array {key!r} is {arrays[key].dtype}, expected numbers; repair the file"
            )


def npz_keys(path: Path) -> list[str]:
    """Return the names of the arrays of an ``.npz`` file without reading them.

    Raises:
        DataError: the file is not an npz archive or is truncated.
    """
    read_npz(path, wanted=())
    with np.load(path, allow_pickle=False) as archive:
        return list(archive.files)


def _npz_problem(path: Path, key: str | None, error: Exception) -> str:
    where = f" (array {key!r})" if key else ""
    if "allow_pickle" in str(error) or "pickled" in str(error):
        if path.read_bytes()[:2] != b"PK" and path.read_bytes()[:1] != b"\x80":
            return f"{path}: is not an .npz archive; copy or download it again"
        return (
            f"{path}{where}: holds pickled Python objects, which run code when read, so it is refused; "
            "save it again with plain numeric arrays"
        )
    return f"{path}{where}: is truncated or damaged ({_one_line(error)}); copy or download it again"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def write_atomically(target: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``target``, then move it into place.

    Args:
        target: the file to make; its folder is made where absent.
        write: is given the temporary path, which ends like the target's.

    Returns:
        The target's path.

    Raises:
        DataError: the folder cannot be made or the file not written.
    """
    path = Path(target).expanduser()
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or _one_line(error)
        raise DataError(f"{path}: cannot be written ({reason}); choose another place") from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path
