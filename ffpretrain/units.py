"""The project's units and the only conversion factors in it.

Inside the package everything is in eV, Å, eV/Å, eV/Å³, fs, K and amu. A reader or writer of another unit
converts at its own edge with the factors below, which come from ``ase.units`` (CODATA).
"""

from __future__ import annotations

import ase.units as _ase

from ffpretrain.errors import DataError, nearest

KCAL_PER_MOL: float = _ase.kcal / _ase.mol
KJ_PER_MOL: float = _ase.kJ / _ase.mol
HARTREE: float = _ase.Hartree
BOHR: float = _ase.Bohr
KB: float = _ase.kB
FS: float = _ase.fs
#: energy in eV of a wavenumber of 1/cm
INVERSE_CM: float = _ase.invcm
#: cm/fs: what turns a frequency in 1/fs into a wavenumber in 1/cm
SPEED_OF_LIGHT: float = _ase._c * 1e-13

ENERGY_UNITS: dict[str, float] = {
    "ev": 1.0,
    "mev": 1e-3,
    "kcal/mol": KCAL_PER_MOL,
    "kj/mol": KJ_PER_MOL,
    "hartree": HARTREE,
    "rydberg": _ase.Rydberg,
}
LENGTH_UNITS: dict[str, float] = {"angstrom": 1.0, "bohr": BOHR, "nm": 10.0}
_ALIASES = {
    "å": "angstrom",
    "ang": "angstrom",
    "a": "angstrom",
    "ha": "hartree",
    "ry": "rydberg",
    "eh": "hartree",
}


def energy_unit(name: str) -> float:
    """Return the size of an energy unit in eV.

    Args:
        name: one of ``ENERGY_UNITS`` (case-insensitive; ``Ha`` is accepted).

    Raises:
        DataError: the unit is not known.
    """
    return _lookup(name, ENERGY_UNITS, "energy unit")


def length_unit(name: str) -> float:
    """Return the size of a length unit in Å.

    Raises:
        DataError: the unit is not known.
    """
    return _lookup(name, LENGTH_UNITS, "length unit")


def force_unit(name: str) -> float:
    """Return the size of a force unit, written ``energy/length`` such as ``kcal/mol/angstrom``, in eV/Å.

    Raises:
        DataError: the unit is not known or is not of that form.
    """
    energy, _, length = name.rpartition("/")
    if not energy:
        raise DataError(f"force unit {name!r} is not of the form energy/length, such as 'kcal/mol/angstrom'")
    return energy_unit(energy) / length_unit(length)


def _lookup(name: str, table: dict[str, float], what: str) -> float:
    key = name.strip().lower()
    key = _ALIASES.get(key, key)
    if key not in table:
        raise DataError(f"unknown {what} {name!r}{nearest(name, table)}")
    return table[key]
