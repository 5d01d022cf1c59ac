"""Grids along bonds, angles and dihedrals: the rest rigid, or relaxed at each point."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.md.landscapes.scan_state import load_state, save_state, state_key
from ffpretrain.md.landscapes.surface import Array, Axis, Geometries, refuse_large
from ffpretrain.molecules import find_bonds

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_ATOMS = {"bond": 2, "angle": 3, "dihedral": 4}
#: degrees from 0 and 180 within which an angle counts as straight
_STRAIGHT = 1.0


class Coordinate(NamedTuple):
    """A bond, angle or dihedral and the values it is to take.

    Attributes:
        kind: ``bond``, ``angle`` or ``dihedral``.
        atoms: two, three or four numbers, from 0.
        values: Å or degrees, ascending.
    """

    kind: str
    atoms: tuple[int, ...]
    values: Array

    @property
    def name(self) -> str:
        """Such as ``dihedral 0-1-2-3``."""
        return f"{self.kind} {'-'.join(map(str, self.atoms))}"

    @property
    def unit(self) -> str:
        """Å or °."""
        return "Å" if self.kind == "bond" else "°"


def parse_coordinate(text: str) -> Coordinate:
    """Return a coordinate from words such as ``dihedral 0 1 2 3 -180 180 37``: atoms, first, last, points.

    Raises:
        ConfigError: anything that does not fit; the message gives the form.
    """
    words = text.replace(",", " ").split()
    form = "give 'bond I J FROM TO POINTS', 'angle I J K …' or 'dihedral I J K L …', atoms counted from 0"
    if not words or words[0] not in _ATOMS:
        raise ConfigError(f"scan {text!r}: {form}")
    n = _ATOMS[words[0]]
    if len(words) != n + 4 or not all(re.fullmatch(r"\d+", w) for w in (*words[1 : n + 1], words[-1])):
        raise ConfigError(f"scan {text!r}: {form}")
    try:
        first, last, points = float(words[n + 1]), float(words[n + 2]), int(words[-1])
    except ValueError:
        raise ConfigError(f"scan {text!r}: {form}") from None
    if points < 2 or not first < last:
        raise ConfigError(f"scan {text!r}: needs at least 2 points from a smaller to a larger value")
    return Coordinate(words[0], tuple(int(w) for w in words[1 : n + 1]), np.linspace(first, last, points))


def rigid_scan(atoms: Atoms, coordinates: Sequence[Coordinate]) -> Geometries:
    """Return the grid on which one or two coordinates take their values and all else stays as it is.

    The side of the molecule behind the last atom moves as a whole: along the bond, about the angle's axis or
    about the bond in the middle of the dihedral.

    Args:
        atoms: a molecule; bonds are found from distances.
        coordinates: one or two.

    Raises:
        ConfigError: not one or two, atoms out of range or named twice.
        UnsupportedInputError: atoms that are not bonded in a row, a bond in a ring, or a straight angle.
    """
    sides = [_moving_side(atoms, coordinate) for coordinate in _checked(atoms, coordinates)]
    shape = tuple(len(c.values) for c in coordinates)
    refuse_large(shape, len(atoms))
    positions = np.empty((*shape, len(atoms), 3))
    for place in np.ndindex(*shape):
        copy = atoms.copy()
        for coordinate, side, i in zip(coordinates, sides, place, strict=True):
            _set(copy, coordinate, float(coordinate.values[i]), side)
        positions[place] = copy.positions
    return Geometries(atoms, _axes(coordinates), positions, "scan", "rigid scan")


def relaxed_scan(
    atoms: Atoms,
    coordinates: Sequence[Coordinate],
    calculator: Calculator,
    fmax: float = 0.02,
    steps: int = 300,
    progress: Callable[[int], object] | None = None,
    state: Path | None = None,
    identity: str = "",
) -> tuple[Geometries, int]:
    """Return the grid with everything but the coordinates relaxed at each point (ASE's FixInternals, BFGS).

    Each point starts from its neighbour's relaxed structure.

    Args:
        atoms: a molecule.
        coordinates: one or two.
        calculator: relaxes with it.
        fmax: eV/Å, largest force left.
        steps: largest number of steps for each point.
        progress: called with the number of points done.
        state: file that keeps the points done, so that a stopped scan goes on; removed at the end. One of
            another scan or calculator is not used.
        identity: changes whenever the calculator's results would.

    Returns:
        The grid, and how many of its points still had larger forces after ``steps``.

    Raises:
        ConfigError, UnsupportedInputError: as :func:`rigid_scan`.
    """
    sides = [_moving_side(atoms, coordinate) for coordinate in _checked(atoms, coordinates)]
    shape = tuple(len(c.values) for c in coordinates)
    refuse_large(shape, len(atoms))
    key = state_key(atoms, (identity, fmax, steps, *((c.name, c.values.tolist()) for c in coordinates)))
    positions, start, unfinished = load_state(state, key, (*shape, len(atoms), 3))
    for done, place in enumerate(np.ndindex(*shape)):
        if done < start:
            continue
        before = _neighbour(place, done)
        copy = atoms.copy()
        if before is not None:
            copy.positions = positions[before]
        for coordinate, side, i in zip(coordinates, sides, place, strict=True):
            _set(copy, coordinate, float(coordinate.values[i]), side)
        unfinished += not _relax(copy, coordinates, calculator, fmax, steps)
        positions[place] = copy.positions
        save_state(state, key, positions, done + 1, unfinished)
        if progress is not None:
            progress(done + 1)
    if state is not None:
        state.unlink(missing_ok=True)
    note = f"relaxed scan, forces below {fmax} eV/Å"
    return Geometries(atoms, _axes(coordinates), positions, "scan", note), unfinished


def _relax(
    atoms: Atoms, coordinates: Sequence[Coordinate], calculator: Calculator, fmax: float, steps: int
) -> bool:
    from ase.constraints import FixInternals
    from ase.optimize import BFGS

    kinds: dict[str, list[list[object]]] = {"bonds": [], "angles_deg": [], "dihedrals_deg": []}
    keys = {"bond": "bonds", "angle": "angles_deg", "dihedral": "dihedrals_deg"}
    for c in coordinates:
        value = getattr(atoms, "get_distance" if c.kind == "bond" else f"get_{c.kind}")(*c.atoms)
        kinds[keys[c.kind]].append([value, list(c.atoms)])
    atoms.calc = calculator
    atoms.set_constraint(FixInternals(**{k: v for k, v in kinds.items() if v}, epsilon=1e-7))
    try:
        converged = bool(BFGS(atoms, logfile=None).run(fmax=fmax, steps=steps))
    finally:
        atoms.set_constraint()
        atoms.calc = None
    return converged


def _neighbour(place: tuple[int, ...], done: int) -> tuple[int, ...] | None:
    """Return the place beside this one that came before it in the order of ``np.ndindex``."""
    if done == 0:
        return None
    k = len(place) - 1 if place[-1] > 0 else 0
    return (*place[:k], place[k] - 1, *place[k + 1 :])


def _checked(atoms: Atoms, coordinates: Sequence[Coordinate]) -> Sequence[Coordinate]:
    if not 1 <= len(coordinates) <= 2:
        raise ConfigError(f"{len(coordinates)} coordinates; scan one or two")
    if atoms.pbc.any():
        raise UnsupportedInputError("bonds, angles and dihedrals are scanned of molecules; set pbc to False")
    for c in coordinates:
        if max(c.atoms) >= len(atoms):
            raise ConfigError(f"{c.name}: the structure has atoms 0 to {len(atoms) - 1}")
        if len(set(c.atoms)) != len(c.atoms):
            raise ConfigError(f"{c.name}: names an atom twice")
        _refuse_straight(atoms, c)
    return coordinates


def _refuse_straight(atoms: Atoms, c: Coordinate) -> None:
    for start in range(len(c.atoms) - 2):
        three = c.atoms[start : start + 3]
        angle = float(atoms.get_angle(*three))
        if not _STRAIGHT < angle < 180 - _STRAIGHT:
            raise UnsupportedInputError(
                f"{c.name}: atoms {'-'.join(map(str, three))} lie on a line, which has no plane to turn in"
            )
    if c.kind == "angle" and not (c.values[0] > 0 and c.values[-1] < 180):
        raise ConfigError(f"{c.name}: angles lie between 0 and 180 degrees")
    if c.kind == "bond" and c.values[0] <= 0:
        raise ConfigError(f"{c.name}: lengths are above zero")


def _moving_side(atoms: Atoms, c: Coordinate) -> NDArray[np.bool_]:
    """Return which atoms move: those on the last atom's side of the bond that is cut in thought."""
    bonds = {tuple(sorted((int(i), int(j)))) for i, j, *_ in find_bonds(atoms.numbers, atoms.positions)}
    for i, j in zip(c.atoms, c.atoms[1:], strict=False):
        if (min(i, j), max(i, j)) not in bonds:
            raise UnsupportedInputError(f"{c.name}: atoms {i} and {j} are not bonded")
    fixed, moving = (c.atoms[1], c.atoms[2]) if c.kind == "dihedral" else c.atoms[-2:]
    reached, todo = {moving}, [moving]
    while todo:
        here = todo.pop()
        for i, j in bonds:
            if here not in (i, j) or {here, i, j} == {fixed, moving}:
                continue
            other = j if here == i else i
            if other not in reached:
                reached.add(other)
                todo.append(other)
    if fixed in reached:
        raise UnsupportedInputError(
            f"{c.name}: the bond {fixed}-{moving} is in a ring, so no side of it can move alone; scan "
            "another coordinate"
        )
    mask = np.zeros(len(atoms), dtype=bool)
    mask[sorted(reached)] = True
    return mask


def _set(atoms: Atoms, c: Coordinate, value: float, side: NDArray[np.bool_]) -> None:
    if c.kind == "bond":
        first, last = c.atoms
        vector = atoms.positions[last] - atoms.positions[first]
        length = float(np.linalg.norm(vector))
        atoms.positions[side] += vector / length * (value - length)
    elif c.kind == "angle":
        i, j, k = c.atoms
        atoms.set_angle(i, j, k, value, mask=side)
    else:
        i, j, k, m = c.atoms
        atoms.set_dihedral(i, j, k, m, value, mask=side)


def _axes(coordinates: Sequence[Coordinate]) -> tuple[Axis, ...]:
    return tuple(Axis(c.name, c.unit, c.values) for c in coordinates)
