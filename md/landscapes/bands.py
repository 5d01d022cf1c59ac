"""Minimum energy paths between two minima, and free energies from long runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ffpretrain import units
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.md.landscapes.planes import superimposed
from ffpretrain.md.landscapes.surface import Array, Axis, Geometries, Landscape

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_KINDS = {"bond": 2, "angle": 3, "dihedral": 4}


def minimum_energy_path(
    start: Atoms,
    end: Atoms,
    calculator: Calculator,
    images: int = 9,
    fmax: float = 0.05,
    steps: int = 300,
    progress: Callable[[int], object] | None = None,
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

    Returns:
        The images as a grid over the length of the path in Å RMS, and whether the band converged.

    Raises:
        ConfigError: fewer than three images, or ends of different elements.
    """
    from ase.mep import NEB
    from ase.optimize import FIRE

    if images < 3:
        raise ConfigError(f"images={images}: a band needs at least 3, its ends included")
    if list(start.numbers) != list(end.numbers):
        raise ConfigError("the two ends must hold the same elements in the same order")
    band = [start.copy() for _ in range(images)]
    band[-1].positions = superimposed(end, start)
    for image in band:
        image.calc = calculator
    # rotations and translations are left in: the ends are superimposed already
    neb = NEB(band, climb=True, method="improvedtangent", allow_shared_calculator=True)
    neb.interpolate(method="idpp")
    optimiser = FIRE(neb, logfile=None)
    if progress is not None:
        optimiser.attach(lambda: progress(optimiser.nsteps))
    converged = bool(optimiser.run(fmax=fmax, steps=steps))
    positions = np.array([image.positions for image in band])
    moved = np.sqrt(np.square(np.diff(positions, axis=0)).sum((1, 2)) / len(start))
    axis = Axis("path", "Å RMS", np.concatenate([[0.0], np.cumsum(moved)]))
    note = "nudged elastic band" + ("" if converged else f", not converged in {steps} steps")
    return Geometries(start.copy(), (axis,), positions, "band", note), converged


def collective_variable(frames: Sequence[Atoms], text: str) -> Array:
    """Return a bond (Å), angle or dihedral (degrees, -180 to 180) along a trajectory.

    Args:
        frames: of one molecule.
        text: such as ``dihedral 0 1 2 3``, atoms counted from 0.

    Raises:
        ConfigError: anything else, or atoms that are not there.
    """
    words = text.split()
    kind = words[0] if words else ""
    if kind not in _KINDS or len(words) != _KINDS[kind] + 1 or not all(w.isdigit() for w in words[1:]):
        raise ConfigError(f"{text!r}: give 'bond I J', 'angle I J K' or 'dihedral I J K L'")
    atoms = [int(word) for word in words[1:]]
    if frames and max(atoms) >= len(frames[0]):
        raise ConfigError(f"{text!r}: the frames have atoms 0 to {len(frames[0]) - 1}")
    name = "get_distance" if kind == "bond" else f"get_{kind}"
    values = np.array([float(getattr(frame, name)(*atoms)) for frame in frames])
    return (values + 180.0) % 360.0 - 180.0 if kind == "dihedral" else values


def free_energy(values: Array, temperature: float, bins: int = 36) -> tuple[list[Array], Array]:
    """Return ``F = -kT ln h`` of one or two collective variables, its lowest value zero.

    The frames must sample equilibrium: thermostatted, the start left out, long enough to come back often.

    Args:
        values: ``[T]`` or ``[T, 2]``.
        temperature: K.
        bins: along each variable.

    Returns:
        The bins' centres of each variable, and F in eV, NaN where nothing was sampled.

    Raises:
        ConfigError: a temperature or number of bins not above zero.
        DataError: no values, or values that are not finite.
    """
    points = np.asarray(values, dtype=np.float64)
    points = points.reshape(len(points), -1)
    if not temperature > 0 or bins < 1:
        raise ConfigError(f"temperature={temperature}, bins={bins}: both must be above zero")
    if len(points) == 0 or points.shape[1] > 2 or not np.isfinite(points).all():
        raise DataError("a free energy needs finite values of one or two variables, and at least one frame")
    counts, edges = np.histogramdd(points, bins=bins)
    centres = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
    with np.errstate(divide="ignore"):
        energies = -units.KB * temperature * np.log(counts / counts.max())
    return centres, np.where(counts > 0, energies, np.nan)


def free_energy_landscape(
    frames: Sequence[Atoms], variables: Sequence[str], temperature: float, bins: int = 36
) -> Landscape:
    """Return the free energy of a long run as a landscape of one or two collective variables.

    Each bin shows the frame nearest to its middle. Where nothing was sampled the energy is NaN.

    Args:
        frames: of one molecule, sampling equilibrium; see :func:`free_energy`.
        variables: one or two, as :func:`collective_variable` takes them.
        temperature: K.
        bins: along each variable.

    Raises:
        ConfigError: not one or two variables, or one that is none; temperature or bins out of range.
        DataError: no frames, or of different molecules.
    """
    if not 1 <= len(variables) <= 2:
        raise ConfigError(f"{len(variables)} collective variables; give one or two")
    if not frames or any(frame.numbers.tolist() != frames[0].numbers.tolist() for frame in frames):
        raise DataError("a free energy needs frames of one molecule, atoms in the same order")
    values = np.column_stack([collective_variable(frames, text) for text in variables])
    centres, energies = free_energy(values, temperature, bins)
    names = [text.split() for text in variables]
    axes = tuple(
        Axis(f"{name[0]} {'-'.join(name[1:])}", "Å" if name[0] == "bond" else "°", centre)
        for name, centre in zip(names, centres, strict=True)
    )
    width = np.array([max(axis.values[-1] - axis.values[0], 1e-9) for axis in axes])
    nodes = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, len(axes))
    nearest = [int(np.argmin(np.square((values - node) / width).sum(1))) for node in nodes]
    positions = np.array([frames[k].positions for k in nearest]).reshape(*energies.shape, len(frames[0]), 3)
    note = f"free energy from {len(frames)} frames at {temperature:g} K; empty where nothing was sampled"
    geometries = Geometries(frames[0], axes, positions, "free energy", note)
    return Landscape(geometries, f"free energy, {temperature:g} K", energies)
