"""The temperature at which frames were sampled, from their forces and the curvature of the surface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.errors import DataError
from ffpretrain.md.runtime import Runtime

#: frames the curvature is taken at, and random directions at each
FRAMES, PROBES = 300, 2
#: Å, displacement of every coordinate
STEP = 0.005
#: K, to which a temperature is rounded
ROUND = 10.0
#: a temperature as near as this to one at which replicas run anyway is that one: no better is it known, since
#: the curvature is the model's
NEAR = 0.05

Array = NDArray[np.float64]


class Measured(NamedTuple):
    """A configurational temperature in K and its statistical error."""

    kelvin: float
    error: float


def configurational_temperature(
    runtime: Runtime, numbers: NDArray[np.int64], positions: Array, forces: Array, seed: int
) -> Measured:
    """Return ``<|F|^2> / (kB <laplacian of U>)``, the temperature of a canonical ensemble of geometries.

    It holds for any potential, harmonic or not, and asks nothing of velocities (Rugh 1997, Phys. Rev. Lett.
    78, 772; Butler et al. 1998, J. Chem. Phys. 109, 6519). The forces are those of the potential that the
    frames were sampled on; the Laplacian is the model's, from differences of its forces along random
    directions of +1 and -1 (Hutchinson's estimator of a trace).

    Args:
        runtime: of the model.
        numbers: atomic numbers ``[N]``.
        positions: ``[F, N, 3]`` Å.
        forces: ``[F, N, 3]`` eV/Å.
        seed: of the directions.

    Raises:
        DataError: the mean curvature is not positive, so that there is no temperature.
    """
    chosen = np.linspace(0, len(positions) - 1, min(FRAMES, len(positions))).round().astype(int)
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (len(chosen), PROBES, len(numbers), 3))
    moved = [
        Atoms(numbers, positions[frame] + sign * STEP * direction)
        for frame, directions in zip(chosen, signs, strict=True)
        for direction in directions
        for sign in (1, -1)
    ]
    found = np.array([one.forces for one in runtime.evaluate_batch(moved)])
    ahead, behind = found.reshape(len(chosen), PROBES, 2, len(numbers), 3).swapaxes(0, 2).swapaxes(1, 2)
    curvature = -((ahead - behind) * signs).sum((2, 3)).mean(1) / (2 * STEP)
    square = np.square(forces).sum((1, 2))
    if not curvature.mean() > 0:
        raise DataError(
            "the data's temperature cannot be measured: the model's mean curvature there is not positive; "
            "give --data-temperature"
        )
    kelvin = float(square.mean() / curvature.mean() / units.KB)
    relative = np.hypot(_error_of_mean(square), _error_of_mean(curvature))
    return Measured(kelvin, kelvin * float(relative))


def settled(kelvin: float, others: Sequence[float]) -> float:
    """Return a measured temperature as it is used: one of ``others`` where it is near, else rounded, in K."""
    nearest = min(others, key=lambda other: abs(other - kelvin), default=None)
    if nearest is not None and abs(nearest - kelvin) <= NEAR * nearest:
        return float(nearest)
    return max(ROUND, ROUND * round(kelvin / ROUND))


def _error_of_mean(values: Array) -> float:
    """Relative to the mean, for values that are independent of each other."""
    return float(values.std() / np.sqrt(len(values)) / abs(values.mean()))
