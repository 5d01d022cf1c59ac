"""Building native code: once per machine and version, in seconds, with the C++ compiler that is there.

A library is kept in the cache folder under a name made of everything it depends on: sources, compiler, flags
and the processor's instruction sets, so that a cache shared by machines never serves the wrong one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ffpretrain.datasets.cache import cache_folder

#: what all native code includes
_SHARED = Path(__file__).resolve().parent
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 300
#: s for which a failure keeps runs that would not wait from trying again: a broken compiler may be mended
_REMEMBERED = 86_400


class NativeUnavailable(Exception):
    """The native code cannot be built here; the message says why, in one line."""


def find_compiler() -> str | None:
    """Return the C++ compiler: that of the environment variable ``CXX``, or the first one found."""
    wanted = os.environ.get("CXX")
    return next((path for name in ([wanted] if wanted else _COMPILERS) if (path := shutil.which(name))), None)


class NativeLibrary:
    """Native code in a folder of its own, built and loaded when first asked for.

    Args:
        folder: holds ``module.cpp``, which is compiled, and the headers it includes beside ``lanes.hpp``.
        declare: sets the argument types of its functions.
        openmp: use OpenMP where the compiler has it.
    """

    def __init__(self, folder: Path, declare: Callable[[ctypes.CDLL], None], openmp: bool = False) -> None:
        self._folder, self._declare, self._openmp = folder, declare, openmp
        self._loaded: ctypes.CDLL | None = None

    def load(self) -> ctypes.CDLL:
        """Return the library, built if it is not in the cache.

        Raises:
            NativeUnavailable: no compiler, it failed, or its result cannot be loaded.
        """
        if self._loaded is None:
            self._loaded = self._find_or_build()
            self._declare(self._loaded)
        return self._loaded

    def is_built(self) -> bool:
        """Return whether :meth:`load` finds the library and need not build it."""
        if self._loaded is not None:
            return True
        compiler = find_compiler()
        if compiler is None or sys.platform == "win32":
            return False
        name = self._name(compiler)
        return any((folder / name).is_file() for folder in _folders())

    def failure(self) -> str | None:
        """Return why an attempt within the last day failed; None where there was none or it succeeded."""
        compiler = find_compiler()
        if compiler is None or sys.platform == "win32":
            return None
        name = self._name(compiler)
        for folder in _folders():
            path = _failed(folder / name)
            try:
                if time.time() - path.stat().st_mtime < _REMEMBERED:
                    return path.read_text() or None
            except OSError:
                continue
        return None

    def _find_or_build(self) -> ctypes.CDLL:
        compiler = find_compiler()
        if compiler is None:
            raise NativeUnavailable("no C++ compiler found; install g++ or clang++, or set CXX to one")
        if sys.platform == "win32":
            raise NativeUnavailable("not built on Windows")
        name = self._name(compiler)
        for folder in _folders():
            path = folder / name
            try:
                if not path.is_file():
                    folder.mkdir(parents=True, exist_ok=True)
                    self._build(compiler, path)
                return ctypes.CDLL(str(path))
            except PermissionError:
                continue  # a cache that cannot be written: build for this process alone
            except OSError as error:
                raise NativeUnavailable(f"the native library cannot be loaded: {error}") from None
        raise NativeUnavailable("no folder to build in; set FFPRETRAIN_CACHE to one that can be written")

    def _build(self, compiler: str, path: Path) -> None:
        source = self._folder / "module.cpp"
        for flags in [["-fopenmp"], []] if self._openmp else [[]]:
            try:
                _compile(compiler, [*_flags(), *flags], source, path)
                _failed(path).unlink(missing_ok=True)
                return
            except NativeUnavailable as error:
                if not flags:
                    with contextlib.suppress(OSError):  # the compiler's reason is what matters
                        _failed(path).write_text(str(error))
                    raise  # else a compiler without OpenMP: the code then starts threads itself

    def _name(self, compiler: str) -> str:
        value = hashlib.sha256()
        for path in [*sorted(self._folder.glob("*.[ch]pp")), _SHARED / "lanes.hpp"]:
            value.update(path.read_bytes())
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
        for part in (compiler, version, *_flags(), platform.machine(), _instruction_sets()):
            value.update(part.encode())
        return f"native-{value.hexdigest()[:20]}.so"


def _failed(path: Path) -> Path:
    """Return the file that holds why a library could not be built."""
    return path.with_suffix(".failed")


def _folders() -> list[Path]:
    return [cache_folder() / "native", Path(tempfile.gettempdir()) / f"ffpretrain-native-{os.getpid()}"]


def _flags() -> list[str]:
    cpu = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return ["-std=c++17", "-O3", cpu, "-fno-math-errno", "-fPIC", "-pthread", "-shared", "-w"]


def _instruction_sets() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return lines[0] if lines else platform.processor()


def _compile(compiler: str, flags: list[str], source: Path, path: Path) -> None:
    """Build into a file of another name first, so that no other process loads half a library.

    Raises:
        NativeUnavailable: the compiler failed; its first error is named.
        PermissionError: the folder cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    command = [compiler, *flags, f"-I{_SHARED}", str(source), "-o", temporary]
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
