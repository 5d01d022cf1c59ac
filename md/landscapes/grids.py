"""From a wish in words to a grid of geometries: planes, modes, trajectories, paths, scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ffpretrain.errors import ConfigError, DataError, UnsupportedInputError
from ffpretrain.md.landscapes.bands import minimum_energy_path
from ffpretrain.md.landscapes.evaluate import evaluator
from ffpretrain.md.landscapes.learned import learned_plane
from ffpretrain.md.landscapes.planes import (
    modes_plane,
    plane_through,
    principal_plane,
    random_plane,
    superimposed,
)
from ffpretrain.md.landscapes.scans import Coordinate, parse_coordinate, relaxed_scan, rigid_scan
from ffpretrain.md.landscapes.surface import Array, Geometries

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

#: from what is done and of how many, None where only the end tells, to what shows the progress
Bar = Callable[[str, int | None], AbstractContextManager[Callable[[int], object]]]

_ALONG = (
    "give 'modes K [K]', 'conformations FILE' (three in it), 'trajectory FILE' or 'band FILE' (another "
    "minimum)"
)
#: Å RMS below which two relaxed structures are one minimum
_SAME = 0.05
#: images of a band, its ends included
_IMAGES = 11
#: eV/Å, and steps, of relaxations before modes and bands
_FMAX, _STEPS = 0.005, 1000


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
        state: file for a relaxed scan to go on from.
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
        return along(wish.along, atoms, calculator, wish.points, wish.extent, bar)
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


def no_bar(title: str, total: int | None) -> AbstractContextManager[Callable[[int], object]]:
    """Show no progress."""
    return nullcontext(lambda done: None)


def along(
    words: str,
    atoms: Atoms,
    calculator: Callable[[], Calculator],
    points: int = 41,
    extent: float = 0.15,
    bar: Bar = no_bar,
) -> Grid:
    """Return a grid along what words name.

    Args:
        words: ``modes 0 1``, one or two numbers from the softest mode on, at the minimum nearest to
            ``atoms``; ``conformations FILE``, the plane through the three structures in it; ``trajectory
            FILE``, the plane of its two principal components, with the trajectory drawn on it; ``band FILE``,
            a path of 11 images from the minimum nearest to ``atoms`` to that nearest to the file's last
            structure.
        atoms: the structure.
        calculator: makes what relaxes.
        points: along each axis of a plane, or a line.
        extent: Å RMS, along modes.
        bar: shows progress.

    Raises:
        ConfigError: other words.
        DataError: a file that cannot be read.
    """
    kind, _, rest = words.strip().partition(" ")
    rest = rest.strip()
    if kind == "modes" and rest and all(word.isdigit() for word in rest.split()):
        return Grid(_modes(atoms, calculator(), [int(word) for word in rest.split()], points, extent, bar))
    if kind == "conformations" and rest:
        return Grid(plane_through(read_structures(rest, bar), points))
    if kind == "trajectory" and rest:
        return Grid(*principal_plane(read_structures(rest, bar), points))
    if kind == "band" and rest:
        return Grid(_band(atoms, read_structures(rest, bar)[-1], calculator(), bar))
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


def relax(atoms: Atoms, calculator: Calculator, bar: Bar = no_bar, what: str = "relax") -> Atoms:
    """Return the minimum downhill of a structure.

    Args:
        atoms: the structure.
        calculator: of the forces.
        bar: shows progress, the steps done.
        what: its title.

    Raises:
        UnsupportedInputError: none is found.
    """
    from ase.optimize import BFGS

    found = atoms.copy()
    found.set_constraint()
    found.calc = calculator
    with bar(what, None) as advance:
        optimiser = BFGS(found, logfile=None)
        optimiser.attach(lambda: advance(optimiser.nsteps))
        converged = bool(optimiser.run(fmax=_FMAX, steps=_STEPS))
    found.calc = None
    if not converged:
        raise UnsupportedInputError(
            f"no minimum found in {_STEPS} steps from the structure given; give one nearer to a minimum"
        )
    return found


def _modes(
    atoms: Atoms, calculator: Calculator, which: list[int], points: int, extent: float, bar: Bar
) -> Geometries:
    from ffpretrain.datasets.modes import normal_modes, wavenumbers

    rest = relax(atoms, calculator, bar)
    # many at once, which eager evaluation in float64 does several times faster than one by one
    model = evaluator(calculator)
    with bar("force constants", 6 * len(rest)) as advance:
        squared, modes = normal_modes(rest, forces=model.forces, progress=advance)
    # mass-weighted modes as displacements; a line and a plane are spanned by them as they are
    moves = modes / np.sqrt(rest.get_masses())[:, None]
    grid = modes_plane(rest, moves, which, points, extent)
    numbers = wavenumbers(squared)
    said = ", ".join(f"mode {k} {numbers[k]:.0f} 1/cm" for k in which)
    return replace(grid, note=f"normal modes at the first model's minimum: {said}")


def _band(start: Atoms, end: Atoms, calculator: Calculator, bar: Bar) -> Geometries:
    if start.numbers.tolist() != end.numbers.tolist():
        raise ConfigError("the two ends must hold the same elements in the same order")
    ends = [
        relax(one, calculator, bar, f"relax {name}") for one, name in ((start, "the start"), (end, "the end"))
    ]
    apart = float(np.sqrt(np.square(superimposed(ends[1], ends[0]) - ends[0].positions).sum(1).mean()))
    if apart < _SAME:
        raise UnsupportedInputError(
            f"both ends relax to one minimum ({apart:.4f} Å RMS apart); give one that lies in another"
        )
    with bar("band", None) as advance:
        grid, _ = minimum_energy_path(ends[0], ends[1], calculator, images=_IMAGES, progress=advance)
    return grid
