"""How rough a landscape is, in numbers that need no reference.

Each line of the grid, along either axis, is a path with energies ``E_0 … E_n``. Definitions:

* ``tortuosity``: the sum of ``|E_{i+1} - E_i|`` over what a path without detours needs, down to its lowest
  point and up again, ``|E_0 - E_min| + |E_n - E_min|`` (after MLIP Arena, Chiang et al. 2025, for diatomics);
  1 for any single well. The mean over the lines is given.
* ``energy_jump``: the sum of ``|E_{i+1} - E_i|`` over steps against both the step before and the step after,
  the mean over the lines, eV (after the same source): zero on a smooth surface with a fine enough grid.
* ``force_flips``: how often the slope along the line changes sign, per line; 1 for a single well.
* ``force_consistency``: RMS difference between the forces along the line and minus the energy's slope by
  central differences, eV/Å RMS; needs forces. It holds the error of the differences, of second order in the
  step: what counts is the comparison of models on one grid.
* ``minimum_offset``: distance of the lowest point from the centre of the grid, in units of the axes.
* ``curvature``: mean of the second differences at the lowest point, eV per unit of the axes squared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ffpretrain.md.landscapes.surface import Array, Landscape


def roughness(landscape: Landscape) -> dict[str, float]:
    """Return the numbers defined above; ``force_consistency`` only where there are forces.

    Args:
        landscape: whose energies are all finite; lines with fewer than three points count for nothing.
    """
    lines = [energies for energies, _, _ in _lines(landscape)]
    found = {
        "tortuosity": float(np.mean([tortuosity(line) for line in lines])),
        "energy_jump": float(np.mean([energy_jump(line) for line in lines])),
        "force_flips": float(np.mean([slope_changes(line) for line in lines])),
        "minimum_offset": minimum_offset(landscape),
        "curvature": curvature(landscape),
    }
    if landscape.forces is not None:
        found["force_consistency"] = force_consistency(landscape)
    return found


def roughness_numbers(landscape: Landscape) -> dict[str, float | None]:
    """Return the numbers of a landscape for a table: those that need forces are None where there are none."""
    if not landscape.roughness or landscape.forces is not None:
        return dict(landscape.roughness)
    return {**landscape.roughness, "force_consistency": None}


def tortuosity(energies: Array) -> float:
    """Return the path's total variation over that of a single well with the same ends and minimum."""
    lowest = energies.min()
    least = abs(energies[0] - lowest) + abs(energies[-1] - lowest)
    variation = float(np.abs(np.diff(energies)).sum())
    return variation / least if least > 0 else (1.0 if variation == 0 else float("inf"))


def energy_jump(energies: Array) -> float:
    """Return the sum of the steps at which the slope turns round and back again."""
    steps = np.diff(energies)
    turned = (np.sign(steps[1:-1]) != np.sign(steps[:-2])) & (np.sign(steps[1:-1]) != np.sign(steps[2:]))
    return float(np.abs(steps[1:-1])[turned].sum())


def slope_changes(energies: Array) -> int:
    """Return how often the slope changes sign."""
    signs = np.sign(np.diff(energies))
    signs = signs[signs != 0]
    return int((signs[1:] != signs[:-1]).sum())


def force_consistency(landscape: Landscape) -> float:
    """Return the RMS difference between forces along the lines and the energy's slope, eV per unit."""
    squares = []
    for energies, values, along in _lines(landscape):
        slope = (energies[2:] - energies[:-2]) / (values[2:] - values[:-2])
        squares.append(np.square(-slope - along[1:-1]))
    return float(np.sqrt(np.mean(np.concatenate(squares))))


def minimum_offset(landscape: Landscape) -> float:
    """Return how far the lowest point lies from the middle of the axes."""
    place = np.unravel_index(np.argmin(landscape.energies), landscape.energies.shape)
    offsets = [
        axis.values[i] - 0.5 * (axis.values[0] + axis.values[-1])
        for axis, i in zip(landscape.axes, place, strict=True)
    ]
    return float(np.linalg.norm(offsets))


def curvature(landscape: Landscape) -> float:
    """Return the mean second difference at the lowest point that is not on the edge of its line."""
    place = np.unravel_index(np.argmin(landscape.energies), landscape.energies.shape)
    found = []
    for k, axis in enumerate(landscape.axes):
        i = int(np.clip(place[k], 1, len(axis.values) - 2))
        line = np.moveaxis(landscape.energies, k, 0)[(slice(None), *np.delete(place, k))]
        left, right = axis.values[i] - axis.values[i - 1], axis.values[i + 1] - axis.values[i]
        slopes = (line[i + 1] - line[i]) / right, (line[i] - line[i - 1]) / left
        found.append(2 * (slopes[0] - slopes[1]) / (left + right))
    return float(np.mean(found))


def _lines(landscape: Landscape) -> Iterator[tuple[Array, Array, Array]]:
    """Yield energies, coordinates and forces along each line of the grid.

    The force along a line is ``sum F . dx/dq``, dx/dq by differences of the grid's own positions.
    """
    positions, forces = landscape.geometries.positions, landscape.forces
    for k, axis in enumerate(landscape.axes):
        energies = np.moveaxis(landscape.energies, k, -1).reshape(-1, len(axis.values))
        if len(axis.values) < 3:
            continue
        along = np.zeros_like(energies)
        if forces is not None:
            tangent = np.gradient(positions, axis.values, axis=k)
            work = (forces * tangent).sum((-1, -2))
            along = np.moveaxis(work, k, -1).reshape(-1, len(axis.values))
        for row, line in enumerate(energies):
            yield line, axis.values, along[row]
