"""Grids that start from minima: along normal modes, and along the path from one minimum to another."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.md.landscapes.bands import check_band, minimum_energy_path
from ffpretrain.md.landscapes.evaluate import evaluator
from ffpretrain.md.landscapes.planes import modes_plane, superimposed
from ffpretrain.md.landscapes.scan_state import load_state, save_state, state_key
from ffpretrain.md.landscapes.surface import Geometries

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

#: from what is done and of how many, None where only the end tells, to what shows the progress
Bar = Callable[[str, int | None], AbstractContextManager[Callable[[int], object]]]
#: Å RMS below which two relaxed structures are one minimum
_SAME = 0.05
#: images of a band, its ends included, and eV/Å, the largest force left across it
_IMAGES, _BAND_FMAX = 11, 0.05
#: eV/Å, and steps, of relaxations before modes and bands
_FMAX, _STEPS = 0.005, 1000


def no_bar(title: str, total: int | None) -> AbstractContextManager[Callable[[int], object]]:
    """Show no progress."""
    return nullcontext(lambda done: None)


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


def modes_at_minimum(
    atoms: Atoms,
    calculator: Calculator,
    which: list[int],
    points: int = 41,
    extent: float = 0.15,
    bar: Bar = no_bar,
) -> Geometries:
    """Return the line or plane along normal modes at the minimum downhill of a structure.

    Args:
        atoms: the structure.
        calculator: relaxes it and gives the force constants.
        which: one or two numbers, from the softest mode on.
        points: along each axis.
        extent: Å RMS.
        bar: shows progress.

    Raises:
        UnsupportedInputError: no minimum is found.
        ConfigError: no such mode, or an option out of range.
    """
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


def band_options(words: str) -> tuple[str, dict[str, Any]]:
    """Return the file of a band, whose name may hold blanks, and the options that stand behind it.

    Args:
        words: ``FILE [images=N] [fmax=F]``.

    Raises:
        ConfigError: an option that is no number or out of range.
    """
    options: dict[str, Any] = {"images": _IMAGES, "fmax": _BAND_FMAX}
    while match := re.search(r"\s(images|fmax)=(\S*)$", words):
        name, value = match.groups()
        words = words[: match.start()].rstrip()
        try:
            options[name] = int(value) if name == "images" else float(value)
        except ValueError:
            raise ConfigError(f"along band: {name}={value} is no number") from None
    check_band(**options)
    return words, options


def band_between_minima(
    start: Atoms,
    end: Atoms,
    calculator: Calculator,
    options: dict[str, Any],
    bar: Bar = no_bar,
    state: Path | None = None,
    identity: str = "",
) -> Geometries:
    """Return the path between the minima downhill of two structures.

    Args:
        start: the first structure.
        end: the second, the same atoms in the same order.
        calculator: of the forces.
        options: of :func:`~ffpretrain.md.landscapes.bands.minimum_energy_path`.
        bar: shows progress.
        state: file that a stopped band goes on from; its relaxed ends are kept in another beside it.
        identity: changes whenever the calculator's results would.

    Raises:
        ConfigError: ends of different elements, or an option out of range.
        UnsupportedInputError: no minimum is found, or both ends are one.
        DataError: a state that is damaged or cannot be written.
    """
    ends = _ends(start, end, calculator, bar, state, identity)
    with bar("band", None) as advance:
        grid, _ = minimum_energy_path(
            *ends, calculator, **options, progress=advance, state=state, identity=identity
        )
    _ends_file(state, remove=True)
    return grid


def _ends(
    start: Atoms, end: Atoms, calculator: Calculator, bar: Bar, state: Path | None, identity: str
) -> tuple[Atoms, Atoms]:
    """Return the minima nearest to two structures; what a stopped band relaxed is taken as it is."""
    if start.numbers.tolist() != end.numbers.tolist():
        raise ConfigError("the two ends must hold the same elements in the same order")
    file = _ends_file(state)
    key = state_key(start, ("ends", identity, _FMAX, end.positions.tolist()))
    positions, done, _ = load_state(file, key, (2, len(start), 3))
    for k, (one, name) in enumerate(((start, "the start"), (end, "the end"))):
        if k >= done:
            positions[k] = relax(one, calculator, bar, f"relax {name}").positions
            save_state(file, key, positions, k + 1, 0)
    first, last = start.copy(), end.copy()
    first.positions, last.positions = positions
    apart = float(np.sqrt(np.square(superimposed(last, first) - first.positions).sum(1).mean()))
    if apart < _SAME:
        _ends_file(state, remove=True)
        raise UnsupportedInputError(
            f"both ends relax to one minimum ({apart:.4f} Å RMS apart); give one that lies in another"
        )
    return first, last


def _ends_file(state: Path | None, remove: bool = False) -> Path | None:
    """Return the file beside a band's state that keeps its relaxed ends."""
    if state is None:
        return None
    file = state.with_name(f"{state.stem}-ends{state.suffix}")
    if remove:
        file.unlink(missing_ok=True)
    return file
