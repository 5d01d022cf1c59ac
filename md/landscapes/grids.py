"""From a wish in words to a grid of geometries: planes, modes, trajectories, paths, scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ffpretrain.errors import ConfigError, DataError
from ffpretrain.md.landscapes.learned import learned_plane
from ffpretrain.md.landscapes.minima import (
    Bar,
    band_between_minima,
    band_options,
    modes_at_minimum,
    no_bar,
)
from ffpretrain.md.landscapes.planes import plane_through, principal_plane, random_plane
from ffpretrain.md.landscapes.scans import Coordinate, parse_coordinate, relaxed_scan, rigid_scan
from ffpretrain.md.landscapes.surface import Array, Geometries

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_ALONG = (
    "give 'modes K [K]', 'conformations FILE' (three in it), 'trajectory FILE' or 'band FILE [images=N] "
    "[fmax=F]' (another minimum)"
)


class Grid(NamedTuple):
    """A grid, and the points of a trajectory ``[T, 2]`` to draw on it, or None."""

    geometries: Geometries
    path: Array | None = None


@dataclass(frozen=True)
class Wish:
    """What grid is wanted.

    Attributes:
        scan: coordinates, or their words.
        relaxed: relax all else at each point.
        along: words, see :func:`along`.
        directions_from: a model with a noise generator whose draws span the plane.
        points: of a plane, along each axis.
        extent: Å RMS, of a plane.
        seed: of drawn directions.
    """

    scan: Sequence[str | Coordinate] = ()
    relaxed: bool = False
    along: str | None = None
    directions_from: Any = None
    points: int = 41
    extent: float = 0.15
    seed: int = 0


def make_grid(
    wish: Wish,
    atoms: Atoms,
    calculator: Callable[[], Calculator],
    bar: Bar,
    state: Path | None,
    identity: str,
) -> Grid:
    """Return the grid that is wished for.

    Args:
        wish: one kind of grid.
        atoms: the structure.
        calculator: makes the calculator for what must be relaxed.
        bar: shows progress.
        state: file for a relaxed scan or a band to go on from.
        identity: of the calculator.

    Raises:
        ConfigError: more than one kind, or an option out of range.
        UserError: of the kind.
    """
    kinds = {"scan": bool(wish.scan), "along": wish.along is not None}
    kinds["directions_from"] = wish.directions_from is not None
    asked = [name for name, is_asked in kinds.items() if is_asked]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: give one of them")
    if wish.relaxed and not wish.scan:
        raise ConfigError("relaxed=True needs coordinates to hold; give scan")
    if wish.along is not None:
        return along(wish.along, atoms, calculator, wish.points, wish.extent, bar, state, identity)
    if wish.directions_from is not None:
        return Grid(learned_plane(atoms, wish.directions_from, wish.points, wish.extent, wish.seed))
    coordinates = [parse_coordinate(one) if isinstance(one, str) else one for one in wish.scan]
    if not coordinates:
        return Grid(random_plane(atoms, wish.points, wish.extent, wish.seed))
    if not wish.relaxed:
        return Grid(rigid_scan(atoms, coordinates))
    total = int(np.prod([len(c.values) for c in coordinates]))
    with bar("relax", total) as advance:
        grid, unfinished = relaxed_scan(
            atoms, coordinates, calculator(), progress=advance, state=state, identity=identity
        )
    note = f"{grid.note}; {unfinished} of {total} points not converged" if unfinished else grid.note
    return Grid(replace(grid, note=note))


def along(
    words: str,
    atoms: Atoms,
    calculator: Callable[[], Calculator],
    points: int = 41,
    extent: float = 0.15,
    bar: Bar = no_bar,
    state: Path | None = None,
    identity: str = "",
) -> Grid:
    """Return a grid along what words name.

    Args:
        words: ``modes 0 1``, one or two numbers from the softest mode on, at the minimum nearest to
            ``atoms``; ``conformations FILE``, the plane through the three structures in it; ``trajectory
            FILE``, the plane of its two principal components, with the trajectory drawn on it; ``band FILE
            [images=11] [fmax=0.05]``, a path from the minimum nearest to ``atoms`` to that nearest to the
            file's last structure, relaxed until no force across it is larger than ``fmax`` eV/Å.
        atoms: the structure.
        calculator: makes what relaxes.
        points: along each axis of a plane, or a line.
        extent: Å RMS, along modes.
        bar: shows progress.
        state: file that a stopped band goes on from.
        identity: of the calculator, see :func:`~ffpretrain.md.landscapes.minimum_energy_path`.

    Raises:
        ConfigError: other words.
        DataError: a file that cannot be read.
    """
    kind, _, rest = words.strip().partition(" ")
    rest = rest.strip()
    if kind == "modes" and rest and all(word.isdigit() for word in rest.split()):
        return Grid(
            modes_at_minimum(atoms, calculator(), [int(k) for k in rest.split()], points, extent, bar)
        )
    if kind == "conformations" and rest:
        return Grid(plane_through(read_structures(rest, bar), points))
    if kind == "trajectory" and rest:
        return Grid(*principal_plane(read_structures(rest, bar), points))
    if kind == "band" and rest:
        file, options = band_options(rest)
        end = read_structures(file, bar)[-1]
        return Grid(band_between_minima(atoms, end, calculator(), options, bar, state, identity))
    raise ConfigError(f"along {words!r}: {_ALONG}")


def read_structures(path: str | Path, bar: Bar = no_bar) -> list[Atoms]:
    """Return the structures of a file, such as a trajectory, labels or none.

    Args:
        path: of the file.
        bar: shows progress.

    Raises:
        DataError: no such file, or none that can be read without running code from it.
    """
    from ffpretrain.datasets import open_dataset

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file of structures; check the path")
    frames, structures = open_dataset(path), []
    with bar(f"read {Path(path).name}", len(frames)) as advance:
        for frame in frames:
            one = frame.to_atoms()
            one.calc = None
            structures.append(one)
            advance(len(structures))
    return structures
