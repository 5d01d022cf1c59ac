"""Labelled frames on the coordinates of a landscape, and the error of a model on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ffpretrain.datasets.frames import Dataset
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.md.landscapes.evaluate import Evaluator
from ffpretrain.md.landscapes.histograms import collective_variable
from ffpretrain.md.landscapes.planes import superimposed
from ffpretrain.md.landscapes.surface import Array, Geometries

if TYPE_CHECKING:
    from ase import Atoms


class Labels(NamedTuple):
    """Labelled frames, where they lie on the axes, and what a model says of the same frames.

    Attributes:
        name: of the data, with their level of theory.
        points: coordinates ``[T, axes]`` in the axes' units.
        reference: energies of the labels, eV ``[T]``.
        predicted: energies of the model at the frames themselves, eV ``[T]``.
    """

    name: str
    points: Array
    reference: Array
    predicted: Array

    def rms(self) -> float:
        """Return the RMS error in eV, energies counted from the frame whose label is lowest."""
        k = int(np.argmin(self.reference))
        off = (self.predicted - self.predicted[k]) - (self.reference - self.reference[k])
        return float(np.sqrt(np.mean(np.square(off))))


def label_frames(
    frames: Dataset,
    geometries: Geometries,
    model: Evaluator,
    progress: Callable[[int], object] | None = None,
) -> Labels:
    """Return labelled frames on a landscape's axes and the model's energies of them.

    On a scan a frame's place is its own bond, angle or dihedral; on a plane it is turned onto the structure
    in the middle and projected. Energies are compared at the frames themselves, on or off the plane.

    Args:
        frames: of the same molecule, atoms in the same order, with energies.
        geometries: the grid.
        model: evaluates the frames.
        progress: called with the number of frames evaluated.

    Raises:
        DataError: no frames, of another molecule, or without energies.
        ConfigError: a path between minima, on which other frames have no place.
        UserError: of the model.
    """
    name = frames.metadata.name
    structures, energies = [], []
    for i, frame in enumerate(frames):
        if frame.energy is None:
            raise DataError(f"{name}: frame {i} has no energy; label it (ffpretrain label)")
        if frame.numbers.tolist() != geometries.atoms.numbers.tolist():
            formula = geometries.atoms.get_chemical_formula()
            raise DataError(f"{name}: frame {i} is not {formula} with atoms in the landscape's order")
        structures.append(frame.to_atoms())
        energies.append(frame.energy)
    if not structures:
        raise DataError(f"{name}: has no frames")
    level = frames.metadata.level_of_theory
    return Labels(
        f"{name} ({level})" if level else name,
        coordinates_of(structures, geometries),
        np.array(energies),
        model.energies(structures, progress),
    )


def coordinates_of(structures: list[Atoms], geometries: Geometries) -> Array:
    """Return where structures lie on the axes of a grid ``[T, axes]``.

    Raises:
        ConfigError: a grid on which other structures have no place.
    """
    if geometries.kind == "scan":
        found = []
        for axis in geometries.axes:
            values = collective_variable(structures, axis.name.replace("-", " "))
            if axis.unit == "°" and axis.name.startswith("dihedral"):
                values = (values - axis.values[0]) % 360.0 + axis.values[0]
            found.append(values)
        return np.column_stack(found)
    if geometries.kind == "band":
        raise ConfigError("labelled frames have no place on a path between minima; use a scan or plane")
    base = geometries.atoms
    off = np.array([superimposed(one, base) for one in structures]) - base.positions
    steps = np.column_stack([_step(geometries, k).ravel() for k in range(len(geometries.axes))])
    # least squares: directions such as normal modes need not be at right angles
    return np.asarray(np.linalg.lstsq(steps, off.reshape(len(off), -1).T, rcond=None)[0].T)


def _step(geometries: Geometries, k: int) -> Array:
    """Return the displacement per unit of an axis of a plane ``[N, 3]``."""
    values = geometries.axes[k].values
    moved = np.moveaxis(geometries.positions, k, 0)
    ends = [moved[i].reshape(-1, len(geometries.atoms), 3)[0] for i in (0, -1)]
    return np.asarray((ends[1] - ends[0]) / (values[-1] - values[0]))
