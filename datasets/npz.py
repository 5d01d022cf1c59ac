"""Telling ``.npz`` layouts apart by the names of their arrays."""

from __future__ import annotations

from pathlib import Path

from ffpretrain.datasets import _io, rmd17

from ffpretrain.errors import DataError

LAYOUTS: dict[str, tuple[str, ...]] = {
    "rmd17": rmd17.KEYS,
    "sgdml": ("E", "F", "R", "z"),
    "qm9": ("n_atoms", "Z", "R", "U0"),
}
"""Arrays that tell a layout, by the name of its format."""


def sniff_npz(path: Path) -> str:
    """Return the name of the format whose arrays the file has.

    Raises:
        DataError: the file is absent, damaged, or has another layout.
    """
    file = _io.existing_file(path, ".npz file")
    keys = _io.npz_keys(file)
    for name, needed in LAYOUTS.items():
        if set(needed) <= set(keys):
            return name
    layouts = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in LAYOUTS.items())
    raise DataError(f"{file}: its arrays ({', '.join(keys)}) fit no known layout ({layouts})")
