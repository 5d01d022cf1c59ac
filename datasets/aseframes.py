"""Turning ``ase.Atoms`` into frames: where energies, forces and stresses hide, and what may not be lost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets._units import EV_ANGSTROM, LabelUnits
from ffpretrain.datasets.arrays import check_finite, check_numbers
from ffpretrain.datasets.frames import Frame
from ffpretrain.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

ENERGY_KEYS = ("energy", "REF_energy", "ref_energy", "dft_energy", "DFT_energy", "Energy", "total_energy")
FORCES_KEYS = (
    "forces",
    "REF_forces",
    "ref_forces",
    "dft_forces",
    "DFT_forces",
    "Forces",
    "force",
    "dft_force",
)
STRESS_KEYS = ("stress", "REF_stress", "ref_stress", "dft_stress", "DFT_stress")
VIRIAL_KEYS = ("virial", "REF_virial", "ref_virial", "dft_virial", "DFT_virial", "virials")
_CHARGE_KEYS = ("charge", "total_charge")
_SPIN_KEYS = ("spin", "spin_multiplicity", "multiplicity")
# ASE's order of the six components of a symmetric tensor: xx, yy, zz, yz, xz, xy
_VOIGT = ([0, 5, 4], [5, 1, 3], [4, 3, 2])


@dataclass(frozen=True)
class LabelKeys:
    """Which keys of a file are the labels.

    Attributes:
        energy: name of the energy; None looks for the usual names, ``""`` reads none.
        forces: name of the forces, likewise.
        stress: name of the stress (ASE's sign), likewise; with None a virial is read as well.
        units: of the labels and positions; eV and Å is ASE's convention.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    units: LabelUnits = EV_ANGSTROM


def frame_from_atoms(
    atoms: Atoms, where: str, keys: LabelKeys, extra: Mapping[str, Any] | None = None
) -> Frame:
    """Return one structure as a frame in eV and Å.

    ASE's readers move ``energy``, ``forces`` and ``stress`` from ``info`` and ``arrays`` to the attached
    calculator's results (all formats since ASE 3.23), other names stay where they were: both places are
    looked at. A lattice that repeats in no direction is left out.

    Args:
        atoms: the structure with its labels.
        where: file and frame, for messages.
        keys: which labels to read.
        extra: further places for labels, such as a database row's key-value pairs.

    Raises:
        DataError: no atoms, an unknown element, a label that is not finite, of the wrong shape or ambiguous.
    """
    numbers = np.asarray(atoms.numbers, dtype=np.int64)
    check_numbers(where, numbers)
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    labels = {**(extra or {}), **atoms.arrays, **atoms.info, **results}
    energy = _scalar(labels, keys.energy, ENERGY_KEYS, "energy", where)
    forces = _forces(labels, keys.forces, len(numbers), where)
    positions = keys.units.lengths(atoms.positions)
    if energy is not None:
        energy = float(keys.units.energies(energy))
    if forces is not None:
        forces = keys.units.forces(forces)
    check_finite(
        lambda _: where,
        np.ones((1, len(numbers)), dtype=bool),
        positions[None],
        None if energy is None else np.array([energy]),
        None if forces is None else forces[None],
    )
    periodic = bool(atoms.pbc.any())
    return Frame(
        numbers=numbers,
        positions=positions,
        cell=_cell(atoms, keys.units, where) if periodic else None,
        pbc=(bool(atoms.pbc[0]), bool(atoms.pbc[1]), bool(atoms.pbc[2])),
        energy=energy,
        forces=forces,
        stress=_stress(labels, keys, abs(float(atoms.cell.volume)), where) if periodic else None,
        charge=_integer(labels, _CHARGE_KEYS, 0, where),
        spin=_spin(labels, where),
        fixed=_fixed(atoms, where),
    )


def _found(labels: Mapping[str, Any], key: str | None, usual: tuple[str, ...], what: str, where: str) -> Any:
    """Return the label called ``key``, or the one under any of its usual names; None where there is none."""
    if key == "":
        return None
    if key is not None:
        if labels.get(key) is None:
            known = ", ".join(sorted(k for k in labels if k not in ("numbers", "positions"))) or "none"
            raise DataError(f"{where}: has no {what} {key!r}; its labels: {known}")
        return labels[key]
    present = [name for name in usual if labels.get(name) is not None]
    for other in present[1:]:
        if not np.array_equal(np.asarray(labels[other]), np.asarray(labels[present[0]])):
            raise DataError(
                f"{where}: holds different values in {present[0]!r} and {other!r}; choose with {what}_key="
            )
    return labels[present[0]] if present else None


def _scalar(
    labels: Mapping[str, Any], key: str | None, usual: tuple[str, ...], what: str, where: str
) -> float | None:
    value = _found(labels, key, usual, what, where)
    if value is None:
        if key is None and what == "energy" and labels.get("free_energy") is not None:
            raise DataError(
                f"{where}: holds only a free energy; read it with energy_key='free_energy' or '' for none"
            )
        return None
    array = _numeric(value, what, where)
    if array.size != 1:
        raise DataError(f"{where}: its {what} has shape {array.shape}, expected one number")
    return float(array.reshape(()))


def _forces(
    labels: Mapping[str, Any], key: str | None, n_atoms: int, where: str
) -> NDArray[np.float64] | None:
    value = _found(labels, key, FORCES_KEYS, "forces", where)
    if value is None:
        return None
    forces = _numeric(value, "forces", where)
    if forces.shape != (n_atoms, 3):
        raise DataError(f"{where}: its forces have shape {forces.shape}, expected ({n_atoms}, 3)")
    return forces


def _numeric(value: Any, what: str, where: str) -> NDArray[np.float64]:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: its {what} is no number ({value!r:.40}); repair the file") from error


def _stress(
    labels: Mapping[str, Any], keys: LabelKeys, volume: float, where: str
) -> NDArray[np.float64] | None:
    value = _found(labels, keys.stress, STRESS_KEYS, "stress", where)
    if value is None:
        virial = None if keys.stress == "" else _found(labels, None, VIRIAL_KEYS, "stress", where)
        if virial is None:
            return None
        # the virial of the extended-xyz convention is -volume * stress
        value = -_tensor(virial, where) / volume
    stress = keys.units.stresses(_tensor(value, where))
    if not np.isfinite(stress).all():
        raise DataError(f"{where}: the stress is not finite (NaN or inf); remove or recompute that frame")
    return stress


def _tensor(value: Any, where: str) -> NDArray[np.float64]:
    tensor = _numeric(value, "stress", where)
    if tensor.shape == (6,):
        return tensor[np.array(_VOIGT)]
    if tensor.size != 9:
        raise DataError(f"{where}: its stress has shape {tensor.shape}, expected (6,) or (3, 3)")
    return tensor.reshape(3, 3)


def _cell(atoms: Atoms, units: LabelUnits, where: str) -> NDArray[np.float64]:
    cell = units.lengths(np.array(atoms.cell))
    lengths = np.linalg.norm(cell, axis=1)
    if not np.isfinite(cell).all() or (lengths[atoms.pbc] == 0).any():
        raise DataError(
            f"{where}: repeats in a direction without a lattice vector; set its cell or pbc=False"
        )
    return cell


def _integer(labels: Mapping[str, Any], usual: tuple[str, ...], default: int, where: str) -> int:
    value = _scalar(labels, None, usual, usual[0], where)
    if value is None:
        return default
    if not np.isfinite(value) or value != round(value):
        raise DataError(f"{where}: its {usual[0]} is {value:g}, expected an integer")
    return int(value)


def _spin(labels: Mapping[str, Any], where: str) -> int:
    spin = _integer(labels, _SPIN_KEYS, 1, where)
    if spin < 1:
        raise DataError(f"{where}: its spin is {spin}; a multiplicity 2S + 1 of at least 1 is expected")
    return spin


def _fixed(atoms: Atoms, where: str) -> NDArray[np.bool_] | None:
    """Return the mask of fixed atoms; warn of constraints that a frame cannot keep."""
    from ase.constraints import FixAtoms, FixCartesian

    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms) or (
            isinstance(constraint, FixCartesian) and bool(np.all(constraint.mask))
        ):
            fixed[constraint.index] = True
        else:
            file = where.rpartition(" frame ")[0] or where
            kind = type(constraint).__name__
            warnings.warn(
                f"{file}: constraints {kind} are left out: a frame keeps only fixed atoms", stacklevel=2
            )
    return fixed if fixed.any() else None
