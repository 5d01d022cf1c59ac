"""Properties of frames as labels: units, values, and what the training frames are standardised by."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffpretrain.artifacts import Quantity
from ffpretrain.datasets.frames import Dataset, Frame
from ffpretrain.errors import ConfigError, DataError, nearest
from ffpretrain.units import ENERGY_UNITS, energy_unit


@dataclass(frozen=True)
class PropertyReader:
    """Reads one property of frames; energies in eV, everything else in the unit of the data.

    Attributes:
        dataset: name, for messages.
        name: of the property.
        unit: of the values given.
        factor: by which stored values are multiplied.
    """

    dataset: str
    name: str
    unit: str
    factor: float

    @classmethod
    def of(cls, frames: Dataset, name: str) -> PropertyReader:
        """Return the reader of a property.

        Raises:
            ConfigError: the data have no such property; the nearest are named.
        """
        metadata = frames.metadata
        known = [key for key in metadata.properties if key != "index"]
        if name not in known:
            hint = nearest(name, known) if known else "; it has none"
            raise ConfigError(f"{metadata.name} has no property {name!r}{hint}")
        unit = metadata.properties[name]
        if unit.lower() in ENERGY_UNITS:
            return cls(metadata.name, name, "eV", energy_unit(unit))
        return cls(metadata.name, name, unit, 1.0)

    def __call__(self, frame: Frame, number: int) -> float:
        """Return the value of a frame.

        Raises:
            DataError: it is not there, not one number, or not finite; names the frame by ``number``.
        """
        value: Any = frame.properties.get(self.name)
        if value is None or np.ndim(value) != 0 or not math.isfinite(value):
            said = "no" if value is None else "not one finite number as"
            raise DataError(
                f"frame {number} of {self.dataset} has {said} property {self.name!r}; leave it out"
            )
        return float(value) * self.factor


@dataclass(frozen=True)
class PropertyStatistics:
    """Numbers of the training frames alone; validation and test frames are never looked at.

    Attributes:
        name: of the property.
        unit: of the numbers.
        scale: standard deviation of what shift and references leave.
        shift: for each structure.
        reference: for each atom, by atomic number.
    """

    name: str
    unit: str
    scale: float
    shift: float
    reference: dict[int, float]

    def quantities(self) -> dict[str, Quantity]:
        """Return what a card keeps of them."""
        return {f"{self.name}_std": Quantity(value=self.scale, unit=self.unit)}


def property_statistics(frames: Dataset, name: str, readout: str) -> PropertyStatistics:
    """Return mean and deviation, or for the readout ``sum`` a fit of one number for each element.

    The fit is by least squares; for frames of one composition the solution of least norm.

    Args:
        frames: the training frames.
        name: of the property.
        readout: ``mean`` or ``sum``.

    Raises:
        ConfigError: the data have no such property.
        DataError: no frames, a frame without it, or values that are all alike.
    """
    read = PropertyReader.of(frames, name)
    if len(frames) == 0:
        raise DataError("the training split is empty; give at least one frame")
    values = np.array([read(frame, i) for i, frame in enumerate(frames)])
    shift, reference = float(values.mean()), {}
    rest = values - shift
    if readout == "sum":
        counts = [Counter(frame.numbers.tolist()) for frame in frames]
        elements = sorted(set().union(*counts))
        matrix = np.array([[c[z] for z in elements] for c in counts], dtype=np.float64)
        solution, *_ = np.linalg.lstsq(matrix, values, rcond=None)
        rest = values - matrix @ solution
        shift, reference = 0.0, dict(zip(elements, solution.tolist(), strict=True))
    scale = float(np.std(rest))
    if not scale > 1e-9 * float(np.abs(values).max()):
        raise DataError(
            f"{name} of the {len(frames)} training frames of {read.dataset} holds nothing to learn beyond "
            "their composition; train on more frames, or check the data"
        )
    return PropertyStatistics(name, read.unit, scale, shift, reference)
