"""The one door to data: :func:`open_dataset`, and the table of formats behind it.

A format is a function ``reader(path_or_name, **options) -> Dataset``, named in :data:`FORMATS` or offered by
a plug-in through the entry-point group ``ffpretrain.datasets`` (the entry point's name is the format's).
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ffpretrain.datasets.frames import Dataset
from ffpretrain.errors import ConfigError, DataError, nearest

ENTRY_POINT_GROUP = "ffpretrain.datasets"

Reader = Callable[..., Dataset]


@dataclass(frozen=True)
class Format:
    """A way to read data.

    Attributes:
        target: ``module:function`` of the reader, imported on first use.
        summary: one line for listings.
        suffixes: endings of file names that mean this format.
    """

    target: str
    summary: str
    suffixes: tuple[str, ...] = ()

    def reader(self) -> Reader:
        """Import and return the reader."""
        module, _, function = self.target.partition(":")
        reader: Reader = getattr(importlib.import_module(module), function)
        return reader


FORMATS: dict[str, Format] = {
    "rmd17": Format("ffpretrain.datasets.rmd17:open_rmd17", "revised MD17, by molecule or .npz"),
    "md17": Format(
        "ffpretrain.datasets.md17:open_md17", "MD17 and its coupled-cluster sets, by molecule or .npz"
    ),
    "sgdml": Format("ffpretrain.datasets.npz:open_sgdml", "arrays E, F, R, z in an .npz, padded or not"),
    "qm7x": Format("ffpretrain.datasets.npz:open_qm7x", "QM7-X frames as arrays E, F, R, z"),
    "qm9": Format("ffpretrain.datasets.qm9:open_qm9", "QM9 .npz or its original archive", (".xyz.tar.bz2",)),
    "extxyz": Format(
        "ffpretrain.datasets.asefiles:open_extxyz",
        "extended xyz, plain or .xz",
        (".extxyz", ".xyz", ".extxyz.xz", ".xyz.xz"),
    ),
    "traj": Format("ffpretrain.datasets.asefiles:open_traj", "ASE trajectory", (".traj",)),
    "ase-db": Format("ffpretrain.datasets.asefiles:open_db", "ASE SQLite database", (".db",)),
    "sdf": Format("ffpretrain.datasets.sdf:open_sdf", "SDF V2000 geometries", (".sdf", ".mol")),
    "hdf5": Format("ffpretrain.datasets.store:FrameStore", "this project's frame store", (".h5", ".hdf5")),
}
"""Formats by name."""

BUNDLED: dict[str, str] = {"ethanol-gfn2": "ethanol_gfn2.h5"}
"""Datasets inside the package, by name: their files in ``data/``."""


def open_dataset(
    source: str | os.PathLike[str], path_or_molecule: str | os.PathLike[str] | None = None, **options: Any
) -> Dataset:
    """Open a dataset as a sequence of frames in eV and Å.

    Args:
        source: a file, whose ending (for ``.npz``: its keys) tells the format; or the name of a format, such
            as ``"rmd17"``; or the name of a bundled dataset, such as ``"ethanol-gfn2"``.
        path_or_molecule: after the name of a format: the file, or a molecule that the format knows.
        **options: of the format's reader, such as ``split=1`` or
            ``units={"energy": "ev", "length": "angstrom"}``.

    Returns:
        The dataset; ``.metadata`` says what is known of it.

    Raises:
        DataError: the format or file is unknown, or the file is absent or damaged.
        ConfigError: an option is unknown to the format.
    """
    formats = known_formats()
    name = str(source)
    if isinstance(source, str) and name.lower() in formats:
        arguments = () if path_or_molecule is None else (path_or_molecule,)
        return _call(name.lower(), formats[name.lower()].reader(), arguments, options)
    if path_or_molecule is not None:
        raise DataError(f"unknown dataset format {name!r}{nearest(name, formats)}")
    if isinstance(source, str) and name in BUNDLED:
        source = bundled_file(name)
    format_name = _format_of(Path(source), formats)
    return _call(format_name, formats[format_name].reader(), (source,), options)


def known_formats() -> dict[str, Format]:
    """Return the built-in formats and those of installed plug-ins, which cannot replace a built-in one.

    Raises:
        ConfigError: a plug-in takes the name of a built-in format.
    """
    formats = dict(FORMATS)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in formats:
            raise ConfigError(
                f"plug-in {point.value} registers the dataset format {point.name!r}, which is taken; "
                "rename its entry point"
            )
        formats[point.name] = Format(point.value, f"plug-in {point.value}")
    return formats


def bundled_file(name: str) -> Path:
    """Return the path of a bundled dataset.

    Raises:
        DataError: the installation lacks it.
    """
    path = Path(__file__).parent / "data" / BUNDLED[name]
    if not path.is_file():
        raise DataError(f"bundled dataset {name!r} is missing from this installation ({path}); install again")
    return path


def _format_of(path: Path, formats: dict[str, Format]) -> str:
    """Return the format's name by the ending of the file's name."""
    lower = path.name.lower()
    if lower.endswith(".npz"):
        from ffpretrain.datasets.npz import sniff_npz

        return sniff_npz(path)
    endings = {suffix: name for name, known in formats.items() for suffix in known.suffixes}
    for suffix in sorted(endings, key=len, reverse=True):
        if lower.endswith(suffix):
            return endings[suffix]
    if path.exists():
        raise DataError(
            f"{path}: no format has this ending; name one first, as in open_dataset('extxyz', path); known: "
            + ", ".join(sorted(formats))
        )
    names = [*formats, *BUNDLED]
    raise DataError(
        f"{str(path)!r} is neither a file nor a known dataset or format{nearest(str(path), names)}"
    )


def _call(name: str, reader: Reader, arguments: tuple[Any, ...], options: dict[str, Any]) -> Dataset:
    signature = inspect.signature(reader)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    known = [
        p.name for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for option in options:
        if option not in known and not takes_any:
            raise ConfigError(f"dataset format {name!r} has no option {option!r}{nearest(option, known[1:])}")
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise DataError(
            f"dataset format {name!r} needs a file or molecule: open_dataset({name!r}, ...)"
        ) from error
    return reader(*arguments, **options)
