"""The native library of dynamics."""

from __future__ import annotations

import ctypes
from pathlib import Path

from ffpretrain.native.build import NativeLibrary, NativeUnavailable, find_compiler

__all__ = ["NativeUnavailable", "failure", "find_compiler", "is_built", "load_library"]


def load_library() -> ctypes.CDLL:
    """Return the native library, built if it is not in the cache.

    Raises:
        NativeUnavailable: no compiler, it failed, or its result cannot be loaded.
    """
    return _LIBRARY.load()


def is_built() -> bool:
    """Return whether :func:`load_library` finds the library and need not build it."""
    return _LIBRARY.is_built()


def failure() -> str | None:
    """Return why a recent attempt to build the library failed; None where there was none or it succeeded."""
    return _LIBRARY.failure()


def _declare(library: ctypes.CDLL) -> None:
    integer, number, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    library.ff_lanes.argtypes, library.ff_lanes.restype = [integer], integer
    library.ff_create.argtypes = [integer, integer, pointer, number, number, pointer, integer]
    library.ff_create.restype = pointer
    library.ff_destroy.argtypes, library.ff_destroy.restype = [pointer], None
    library.ff_evaluate.argtypes = [pointer, integer, integer, *[pointer] * 8]
    library.ff_evaluate.restype = number
    library.ff_energies.argtypes = [pointer, integer, integer, *[pointer] * 6]
    library.ff_energies.restype = number


_LIBRARY = NativeLibrary(Path(__file__).resolve().parent, _declare)
