"""Collective variables along a trajectory, and free energies from their histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ffpretrain import units
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.md.landscapes.surface import Array, Axis, Geometries, Landscape

if TYPE_CHECKING:
    from ase import Atoms

_KINDS = {"bond": 2, "angle": 3, "dihedral": 4}


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
