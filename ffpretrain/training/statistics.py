"""What is read off the training labels: reference energies, force scale, what the frames are made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ffpretrain.artifacts import Quantity
from ffpretrain.datasets.frames import Dataset
from ffpretrain.errors import DataError


@dataclass(frozen=True)
class LabelStatistics:
    """Numbers of the training frames alone; validation and test frames are never looked at.

    Attributes:
        reference_energies: eV by atomic number, least squares over the frames; for one composition only their
            sum matters and the solution of least norm is taken.
        force_rms: root mean square of force components, eV/Å.
        energy_std: standard deviation of the energy that the references leave, eV.
    """

    reference_energies: dict[int, float]
    force_rms: float
    energy_std: float

    def quantities(self) -> dict[str, Quantity]:
        """Return what a card keeps of them."""
        return {
            "forces_rms": Quantity(value=self.force_rms, unit="eV/angstrom"),
            "energy_std": Quantity(value=self.energy_std, unit="eV"),
        }


def label_statistics(frames: Dataset) -> LabelStatistics:
    """Fit reference energies and measure the spread of labels.

    Args:
        frames: all with energies and forces.

    Raises:
        DataError: no frames, or a frame without energy or forces.
    """
    if len(frames) == 0:
        raise DataError("the training split is empty; give at least one frame")
    squares, components = 0.0, 0
    for i, frame in enumerate(frames):
        if frame.energy is None or frame.forces is None:
            raise DataError(
                f"frame {i} of {frames.metadata.name} has no energy or no forces; label it (ffpretrain label)"
            )
        squares += float(np.square(frame.forces).sum())
        components += frame.forces.size
    references, spread = reference_energies(frames)
    force_rms = float(np.sqrt(squares / components))
    if not force_rms > 0:
        raise DataError(f"all forces of {frames.metadata.name} are zero; check the labels")
    return LabelStatistics(references, force_rms, spread)


def reference_energies(frames: Dataset) -> tuple[dict[int, float], float]:
    """Return reference energies by atomic number and the standard deviation they leave, both in eV.

    Args:
        frames: all with energies.
    """
    counts = [Counter(frame.numbers.tolist()) for frame in frames]
    elements = sorted(set().union(*counts))
    matrix = np.array([[c[z] for z in elements] for c in counts], dtype=np.float64)
    target = np.array([frame.energy for frame in frames], dtype=np.float64)
    solution, *_ = np.linalg.lstsq(matrix, target, rcond=None)
    return dict(zip(elements, solution.tolist(), strict=True)), float(np.std(target - matrix @ solution))


def elements_of(frames: Dataset) -> list[int]:
    """Return the atomic numbers that occur in frames, ascending.

    Raises:
        DataError: no frames.
    """
    if len(frames) == 0:
        raise DataError("the training split is empty; give at least one frame")
    return sorted({int(z) for frame in frames for z in set(frame.numbers.tolist())})
