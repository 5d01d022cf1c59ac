"""Collective variables along a trajectory, and free energies from their histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ffpretrain import units
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.md.landscapes.surface import FREE_ENERGY, Array, Axis, Geometries, Landscape

if TYPE_CHECKING:
    from ase import Atoms

#: blocks from which an error is told; of eight it is known to a quarter
LEAST_BLOCKS = 8
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


class FreeEnergy(NamedTuple):
    """A free energy on the bins of a histogram.

    Attributes:
        centres: of the bins of each variable.
        energies: F in eV, its lowest value zero, NaN where nothing was sampled; as many axes as variables.
        errors: one standard error of the difference of F to the lowest bin, eV, of the same shape; NaN where
            nothing was sampled or the run is too short to tell.
    """

    centres: list[Array]
    energies: Array
    errors: Array


def free_energy(values: Array, temperature: float, bins: int = 36) -> FreeEnergy:
    """Return ``F = -kT ln h`` of one or two collective variables, with the error of each bin.

    The frames must sample equilibrium: thermostatted, the start left out, long enough to come back often.

    With ``1_b(t)`` one while frame t is in bin b, ``p_b`` its mean and 0 the bin visited most, the error of
    ``F_b - F_0`` is to first order ``kT`` times that of the mean of ``1_b(t) / p_b - 1_0(t) / p_0``, a series
    whose values follow each other in time and are correlated: see :func:`standard_error`.

    Args:
        values: ``[T]`` or ``[T, 2]``, evenly spaced in time.
        temperature: K.
        bins: along each variable.

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
    kT = units.KB * temperature
    counts, edges = np.histogramdd(points, bins=bins)
    centres = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
    with np.errstate(divide="ignore"):
        energies = -kT * np.log(counts / counts.max())
    energies = np.where(counts > 0, energies, np.nan)
    return FreeEnergy(centres, energies, kT * _errors(points, edges, counts))


def _errors(points: Array, edges: Sequence[Array], counts: Array) -> Array:
    """Return the standard error of ``ln(p_b / p_0)`` of each bin."""
    inside = [
        np.clip(np.searchsorted(edge, column, side="right") - 1, 0, len(edge) - 2)
        for edge, column in zip(edges, points.T, strict=True)
    ]
    place = np.ravel_multi_index(inside, counts.shape)
    share, most = counts.ravel() / len(points), int(counts.argmax())
    reference = (place == most) / share[most]
    found = np.full(counts.size, np.nan)
    for b in np.flatnonzero(share):
        found[b] = standard_error((place == b) / share[b] - reference)
    return found.reshape(counts.shape)


def standard_error(series: Array) -> float:
    """Return the standard error of the mean of a correlated series, or NaN where it is too short to tell.

    By blocking (Flyvbjerg and Petersen 1989, J. Chem. Phys. 91, 461): neighbours are averaged in pairs, again
    and again, until blocks are longer than the correlation; then ``s^2 / B`` of ``B`` blocks is the squared
    error. Blocks of length ``L`` are long enough when ``L^3 > 2 n (e_L / e_1)^4``, with ``e_L`` the error
    from blocks of that length and ``n`` the length of the series (Lee et al. 2011, Phys. Rev. E 83, 066706);
    at least :data:`LEAST_BLOCKS` of them must be left.

    Args:
        series: ``[n]``, evenly spaced in time.
    """
    blocks = np.asarray(series, dtype=np.float64) - np.mean(series)
    n, length = len(blocks), 1
    if not blocks.any():
        return 0.0
    alone = float(blocks.var(ddof=1)) / n
    while len(blocks) >= LEAST_BLOCKS:
        squared = float(blocks.var(ddof=1)) / len(blocks)
        if length**3 > 2 * n * (squared / alone) ** 2:
            return float(np.sqrt(squared))
        even = len(blocks) // 2 * 2
        blocks, length = 0.5 * (blocks[0:even:2] + blocks[1:even:2]), 2 * length
    return float("nan")


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
    centres, energies, errors = free_energy(values, temperature, bins)
    names = [text.split() for text in variables]
    axes = tuple(
        Axis(f"{name[0]} {'-'.join(name[1:])}", "Å" if name[0] == "bond" else "°", centre)
        for name, centre in zip(names, centres, strict=True)
    )
    width = np.array([max(axis.values[-1] - axis.values[0], 1e-9) for axis in axes])
    nodes = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, len(axes))
    nearest = [int(np.argmin(np.square((values - node) / width).sum(1))) for node in nodes]
    positions = np.array([frames[k].positions for k in nearest]).reshape(*energies.shape, len(frames[0]), 3)
    without = int((np.isfinite(energies) & ~np.isfinite(errors)).sum())
    note = (
        f"free energy from {len(frames)} frames at {temperature:g} K; empty where nothing was sampled; error "
        "bars: one standard error of the difference to the lowest bin, by blocking (Flyvbjerg and Petersen "
        "1989)"
    )
    if without:
        note += f"; the run is too short to give one for {without} of {int(np.isfinite(energies).sum())} bins"
    geometries = Geometries(frames[0], axes, positions, FREE_ENERGY, note)
    return Landscape(geometries, f"free energy, {temperature:g} K", energies, uncertainty=errors)
