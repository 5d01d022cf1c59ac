"""Minimum energy paths between two minima."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ffpretrain.errors import ConfigError
from ffpretrain.md.landscapes.fire import Fire
from ffpretrain.md.landscapes.planes import superimposed
from ffpretrain.md.landscapes.scan_state import load_arrays, save_arrays, state_key
from ffpretrain.md.landscapes.surface import Array, Axis, Geometries

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator
    from ase.mep import NEB


def minimum_energy_path(
    start: Atoms,
    end: Atoms,
    calculator: Calculator,
    images: int = 9,
    fmax: float = 0.05,
    steps: int = 300,
    progress: Callable[[int], object] | None = None,
    state: Path | None = None,
    identity: str = "",
) -> tuple[Geometries, bool]:
    """Return the path of a climbing-image nudged elastic band (ASE's NEB, improved tangent, IDPP start).

    Args:
        start: a minimum.
        end: another one, the same atoms in the same order; it is turned onto the first.
        calculator: of the forces.
        images: on the path, both ends included.
        fmax: eV/Å, largest force left across the band.
        steps: of the optimiser (FIRE).
        progress: called with the number of steps done.
        state: file that keeps the band after each step, so that a stopped one goes on as if it had not been;
            removed at the end. One of another band or calculator is not used.
        identity: changes whenever the calculator's results would.

    Returns:
        The images as a grid over the length of the path in Å RMS, and whether the band converged.

    Raises:
        ConfigError: fewer than three images, a largest force not above zero, or ends of different elements.
        DataError: the state is damaged or cannot be written.
    """
    from ase.mep import NEB

    check_band(images, fmax)
    if list(start.numbers) != list(end.numbers):
        raise ConfigError("the two ends must hold the same elements in the same order")
    band = [start.copy() for _ in range(images)]
    band[-1].positions = superimposed(end, start)
    for image in band:
        image.calc = calculator
    # rotations and translations are left in: the ends are superimposed already
    neb = NEB(band, climb=True, method="improvedtangent", allow_shared_calculator=True)
    key = state_key(start, ("band", identity, images, fmax, steps, end.positions.tolist()))
    converged = _relax(neb, fmax, steps, progress, state, key)
    positions = np.array([image.positions for image in band])
    moved = np.sqrt(np.square(np.diff(positions, axis=0)).sum((1, 2)) / len(start))
    axis = Axis("path", "Å RMS", np.concatenate([[0.0], np.cumsum(moved)]))
    note = f"nudged elastic band of {images} images, forces below {fmax:g} eV/Å"
    note += "" if converged else f"; not converged in {steps} steps"
    return Geometries(start.copy(), (axis,), positions, "band", note), converged


def check_band(images: int, fmax: float) -> None:
    """Refuse a band of fewer than three images, or a largest force that is not above zero.

    Raises:
        ConfigError: either.
    """
    if images < 3:
        raise ConfigError(f"images={images}: a band needs at least 3, its ends included")
    if not 0 < fmax < np.inf:
        raise ConfigError(f"fmax={fmax}: give a force above zero, in eV/Å")


def _relax(
    neb: NEB,
    fmax: float,
    steps: int,
    progress: Callable[[int], object] | None,
    state: Path | None,
    key: str,
) -> bool:
    """Relax a band in place, from where an earlier run of it was stopped; return whether it converged."""
    kept, done = load_arrays(state, key), 0
    if kept is None:
        neb.interpolate(method="idpp")
        fire = Fire(np.zeros_like(neb.get_positions()))
    else:
        neb.set_positions(kept["positions"])
        fire = Fire(kept["velocity"], float(kept["dt"]), float(kept["mixing"]), int(kept["downhill"]))
        done = int(kept["done"])
    forces = neb.get_forces()
    while _largest(forces) >= fmax and done < steps:
        neb.set_positions(neb.get_positions() + fire.step(forces))
        done += 1
        save_arrays(state, key, positions=neb.get_positions(), done=done, **vars(fire))
        if progress is not None:
            progress(done)
        forces = neb.get_forces()
    if state is not None:
        state.unlink(missing_ok=True)
    return _largest(forces) < fmax


def _largest(forces: Array) -> float:
    """Return the largest force on an atom, eV/Å."""
    return float(np.linalg.norm(forces, axis=1).max())
