"""Building the native code: once per machine and version, in seconds, with the C++ compiler that is there.

The library is kept in the cache folder under a name made of everything it depends on: sources, compiler,
flags and the processor's instruction sets, so that a cache shared by machines never serves the wrong one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ffpretrain.datasets.cache import cache_folder

_FOLDER = Path(__file__).resolve().parent
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 300


class NativeUnavailable(Exception):
    """The native code cannot be built here; the message says why, in one line."""


def find_compiler() -> str | None:
    """Return the C++ compiler: that of the environment variable ``CXX``, or the first one found."""
    wanted = os.environ.get("CXX")
    return next((path for name in ([wanted] if wanted else _COMPILERS) if (path := shutil.which(name))), None)


@functools.cache
def load_library() -> ctypes.CDLL:
    """Return the native library, built if it is not in the cache.

    Raises:
        NativeUnavailable: no compiler, it failed, or its result cannot be loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NativeUnavailable("no C++ compiler found; install g++ or clang++, or set CXX to one")
    if sys.platform == "win32":
        raise NativeUnavailable("not built on Windows")
    flags = _flags()
    name = f"native-{_key(compiler, flags)}.so"
    for folder in _folders():
        path = folder / name
        try:
            if not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                _compile(compiler, flags, path)
            return _declare(ctypes.CDLL(str(path)))
        except PermissionError:
            continue  # a cache that cannot be written: build for this process alone
        except OSError as error:
            raise NativeUnavailable(f"the native library cannot be loaded: {error}") from None
    raise NativeUnavailable("no folder to build in; set FFPRETRAIN_CACHE to one that can be written")


def is_built() -> bool:
    """Return whether :func:`load_library` finds the library and need not build it."""
    if load_library.cache_info().currsize:
        return True
    compiler = find_compiler()
    if compiler is None or sys.platform == "win32":
        return False
    name = f"native-{_key(compiler, _flags())}.so"
    return any((folder / name).is_file() for folder in _folders())


def _folders() -> list[Path]:
    return [cache_folder() / "native", Path(tempfile.gettempdir()) / f"ffpretrain-native-{os.getpid()}"]


def _flags() -> list[str]:
    cpu = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return ["-std=c++17", "-O3", cpu, "-fno-math-errno", "-fPIC", "-shared", "-w"]


def _key(compiler: str, flags: list[str]) -> str:
    value = hashlib.sha256()
    for path in sorted(_FOLDER.glob("*.[ch]pp")):
        value.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for part in (compiler, version, *flags, platform.machine(), _instruction_sets()):
        value.update(part.encode())
    return value.hexdigest()[:20]


def _instruction_sets() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return lines[0] if lines else platform.processor()


def _compile(compiler: str, flags: list[str], path: Path) -> None:
    """Build into a file of another name first, so that no other process loads half a library.

    Raises:
        NativeUnavailable: the compiler failed; its first error is named.
        PermissionError: the folder cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    command = [compiler, *flags, str(_FOLDER / "module.cpp"), "-o", temporary]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise NativeUnavailable(f"{compiler} failed: {lines[0][:200] if lines else 'no message'}")
        os.replace(temporary, path)
    except subprocess.TimeoutExpired:
        raise NativeUnavailable(f"{compiler} took more than {_TIMEOUT} s") from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    integer, number, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    library.ff_lanes.argtypes, library.ff_lanes.restype = [integer], integer
    library.ff_create.argtypes = [integer, integer, pointer, number, number, pointer, integer]
    library.ff_create.restype = pointer
    library.ff_destroy.argtypes, library.ff_destroy.restype = [pointer], None
    library.ff_evaluate.argtypes = [pointer, integer, integer, *[pointer] * 8]
    library.ff_evaluate.restype = number
    library.ff_energies.argtypes = [pointer, integer, integer, *[pointer] * 6]
    library.ff_energies.restype = number
    return library
