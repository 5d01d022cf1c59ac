"""The units a file's labels are in: declared by its format, written in the file, or given by the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.errors import ConfigError, nearest
from ffpretrain.units import energy_unit, force_unit, length_unit


@dataclass(frozen=True)
class LabelUnits:
    """Units of energies, lengths and forces, by the names that ``ffpretrain.units`` knows.

    Attributes:
        energy: such as ``kcal/mol``.
        length: such as ``angstrom``.
        force: such as ``kcal/mol/angstrom``; energy over length where not said otherwise.
    """

    energy: str
    length: str
    force: str = ""

    def __post_init__(self) -> None:
        """Fill in the force unit and refuse unknown names.

        Raises:
            DataError: a unit is not known.
        """
        if not self.force:
            object.__setattr__(self, "force", f"{self.energy}/{self.length}")
        energy_unit(self.energy), length_unit(self.length), force_unit(self.force)

    def energies(self, values: Any) -> NDArray[np.float64]:
        """Convert energies to eV."""
        return np.asarray(values, dtype=np.float64) * energy_unit(self.energy)

    def lengths(self, values: Any) -> NDArray[np.float64]:
        """Convert lengths to Å."""
        return np.asarray(values, dtype=np.float64) * length_unit(self.length)

    def forces(self, values: Any) -> NDArray[np.float64]:
        """Convert forces to eV/Å."""
        return np.asarray(values, dtype=np.float64) * force_unit(self.force)

    def stresses(self, values: Any) -> NDArray[np.float64]:
        """Convert stresses, in the energy unit over the length unit cubed, to eV/Å³."""
        factor = energy_unit(self.energy) / length_unit(self.length) ** 3
        return np.asarray(values, dtype=np.float64) * factor

    def as_dict(self) -> dict[str, str]:
        """Return the three names by quantity, as ``DatasetMetadata.units`` holds them."""
        return {"length": self.length, "energy": self.energy, "force": self.force}


EV_ANGSTROM = LabelUnits("ev", "angstrom")
KCAL_ANGSTROM = LabelUnits("kcal/mol", "angstrom")


def given_units(units: Mapping[str, str]) -> LabelUnits:
    """Check and return the units a user gave as ``{"energy": ..., "length": ..., "force": ...}``.

    Args:
        units: ``energy`` and ``length`` are required; ``force`` is energy over length where absent.

    Raises:
        ConfigError: a quantity is missing or unknown.
        DataError: a unit is not known.
    """
    known = ("energy", "length", "force")
    for quantity in units:
        if quantity not in known:
            raise ConfigError(f"units= has no quantity {quantity!r}{nearest(quantity, known)}")
    for quantity in known[:2]:
        if quantity not in units:
            raise ConfigError(
                f"units= lacks {quantity!r}; give units={{'energy': 'ev', 'length': 'angstrom'}}"
            )
    return LabelUnits(units["energy"], units["length"], units.get("force", ""))
