"""How rough a landscape is, in numbers that need no reference.

Each line of the grid, along either axis, is a path with energies ``E_0 … E_n``. Definitions:

* ``tortuosity``: the sum of ``|E_{i+1} - E_i|`` over what a path without detours needs, down to its lowest
  point and up again, ``|E_0 - E_min| + |E_n - E_min|`` (after MLIP Arena, Chiang et al. 2025, for diatomics);
  1 for any single well. The mean over the lines is given.
* ``energy_jump``: the sum of ``|E_{i+1} - E_i|`` over steps against both the step before and the step after,
  the mean over the lines, eV (after the same source): zero on a smooth surface with a fine enough grid.
* ``force_flips``: how often the slope along the line changes sign, per line; 1 for a single well.
* ``force_consistency``: RMS difference between the forces along the line and minus the energy's slope by
  central differences, eV per unit of the axis; needs forces. It holds the error of the differences, which
  grows with the square of the grid's spacing: on a coarse grid it is large for any model.
* ``difference_error``: how much of that the spacing alone explains: a third of the RMS change of the
  difference when every second point is left out (Richardson), which makes an error of second order four times
  as large and leaves one of the forces as it is; taken where both are known, two points from the ends of a
  line, and scaled to all. Needs forces and five points in a line.
* ``difference_error_coarse``: the same once more with every second point left out, which needs nine points in
  a line. Where differences of second order have settled it is four times ``difference_error``. Where it is
  not even three times as large, the grid is too coarse for the estimate, and ``force_consistency`` says
  nothing of the forces; nor does one of up to three times ``difference_error``. What is above it they, or the
  rounding of the energies, must explain.
* ``minimum_offset``: distance of the lowest point from the centre of the grid, in units of the axes.
* ``curvature``: mean of the second differences at the lowest point, eV per unit of the axes squared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ffpretrain.md.landscapes.surface import Array, Landscape


def roughness(landscape: Landscape) -> dict[str, float]:
    """Return the numbers defined above; those that need forces only where there are some.

    Args:
        landscape: whose energies are all finite; lines with fewer than three points count for nothing, and
            where no others are there is nothing to return.
    """
    lines = list(_lines(landscape))
    if not lines:
        return {}
    found = {
        "tortuosity": float(np.mean([tortuosity(line) for line in lines])),
        "energy_jump": float(np.mean([energy_jump(line) for line in lines])),
        "force_flips": float(np.mean([slope_changes(line) for line in lines])),
        "minimum_offset": minimum_offset(landscape),
        "curvature": curvature(landscape),
    }
    if landscape.forces is not None:
        found["force_consistency"] = force_consistency(landscape)
    if (own := difference_error(landscape)) is not None:
        found["difference_error"] = own
        if (coarse := _coarse_error(landscape, own)) is not None:
            found["difference_error_coarse"] = coarse
    return found


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
    return _rms([off[1:-1] for off in _differences(landscape, 1)])


def difference_error(landscape: Landscape) -> float | None:
    """Return how much of :func:`force_consistency` the spacing explains, eV per unit.

    None where no line has five points, or there are no forces.
    """
    if landscape.forces is None or not any(len(axis.values) >= 5 for axis in landscape.axes):
        return None
    pairs = zip(_differences(landscape, 1), _differences(landscape, 2), strict=True)
    inner = [(fine[2:-2], coarse[2:-2]) for fine, coarse in pairs if len(fine) >= 5]
    here = _rms([fine for fine, _ in inner])
    if here == 0:
        return 0.0
    explained = _rms([(coarse - fine) / 3 for fine, coarse in inner])
    return force_consistency(landscape) * explained / here


def _coarse_error(landscape: Landscape, own: float) -> float | None:
    """Return what :func:`difference_error` would be on the grid without every second point, eV per unit.

    Args:
        landscape: with forces.
        own: its difference error.
    """
    every = zip(*(_differences(landscape, step) for step in (1, 2, 4)), strict=True)
    inner = [[off[4:-4] for off in line] for line in every if len(line[0]) >= 9]
    if not inner:
        return None
    fine = _rms([(two - one) / 3 for one, two, _ in inner])
    coarse = _rms([(four - two) / 3 for _, two, four in inner])
    return own * coarse / fine if fine > 0 else coarse


def _rms(lines: list[Array]) -> float:
    return float(np.sqrt(np.mean(np.square(np.concatenate(lines)))))


def _differences(landscape: Landscape, step: int) -> Iterator[Array]:
    """Yield, along each line, minus the energy's slope less the force, with neighbours ``step`` points away.

    Of a line's points the first and last ``step`` are of no use. The force along a line is ``sum F . dx/dq``,
    dx/dq by differences of the grid's own positions, so that its error is of the same kind.
    """
    positions, forces = landscape.geometries.positions, landscape.forces
    for k, axis in enumerate(landscape.axes):
        n = len(axis.values)
        if n < 3 or forces is None:
            continue
        values = np.moveaxis(landscape.energies, k, -1).reshape(-1, n)
        moved = np.moveaxis(positions, k, 0).reshape(n, len(values), -1)
        pushed = np.moveaxis(forces, k, 0).reshape(n, len(values), -1)
        for row, line in enumerate(values):
            found = np.zeros(n)
            if n > 2 * step:
                inner = slice(step, -step)
                slope = _slope(line[:, None], axis.values, step)[:, 0]
                tangent = _slope(moved[:, row], axis.values, step)
                found[inner] = -slope - (pushed[inner, row] * tangent).sum(-1)
            yield found


def _slope(values: Array, at: Array, step: int) -> Array:
    """Return slopes ``[n - 2 step, m]`` of ``values [n, m]``, of second order on uneven spacing too."""
    left, right = (at[step:-step] - at[: -2 * step])[:, None], (at[2 * step :] - at[step:-step])[:, None]
    before, here, after = values[: -2 * step], values[step:-step], values[2 * step :]
    return np.asarray(
        (after - here) / right * (left / (left + right)) + (here - before) / left * (right / (left + right))
    )


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


def _lines(landscape: Landscape) -> Iterator[Array]:
    """Yield the energies along each line of the grid that has three points or more."""
    for k, axis in enumerate(landscape.axes):
        if len(axis.values) >= 3:
            yield from np.moveaxis(landscape.energies, k, -1).reshape(-1, len(axis.values))
