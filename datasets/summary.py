"""What is in a dataset: sizes, elements, energies and forces in both usual units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets.frames import Dataset, Frame
from ffpretrain.units import KCAL_PER_MOL

SCHEMA = "ffpretrain-data-info"
SCHEMA_VERSION = 1


@dataclass
class _Totals:
    """Sums over the frames of a dataset, in eV and Å."""

    sizes: list[int] = field(default_factory=list)
    formulas: Counter[str] = field(default_factory=Counter)
    elements: set[str] = field(default_factory=set)
    energies: list[float] = field(default_factory=list)
    with_forces: int = 0
    force_components: int = 0
    squared_force: float = 0.0
    largest_force: float = 0.0
    with_stress: int = 0
    periodic: int = 0
    fixed: int = 0
    charges: set[int] = field(default_factory=set)
    spins: set[int] = field(default_factory=set)

    def add(self, frame: Frame) -> None:
        """Count one frame."""
        self.sizes.append(len(frame))
        formula, symbols = _formula(frame.numbers)
        self.formulas[formula] += 1
        self.elements |= symbols
        self.charges.add(frame.charge)
        self.spins.add(frame.spin)
        self.periodic += any(frame.pbc)
        self.fixed += frame.fixed is not None
        self.with_stress += frame.stress is not None
        if frame.energy is not None:
            self.energies.append(frame.energy)
        if frame.forces is not None:
            self.with_forces += 1
            self.force_components += frame.forces.size
            self.squared_force += float((frame.forces**2).sum())
            self.largest_force = max(self.largest_force, float(np.linalg.norm(frame.forces, axis=1).max()))


def describe(dataset: Dataset, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Return what a dataset holds, ready for JSON; every frame is read once.

    Args:
        dataset: any.
        progress: told of the number of frames read.

    Returns:
        Sizes, elements, formulas, energies in eV and kcal/mol, forces in eV/Å and kcal/mol/Å, metadata.

    Raises:
        DataError: a frame is damaged.
    """
    totals = _Totals()
    for index in range(len(dataset)):
        totals.add(dataset[index])
        if progress is not None:
            progress(index + 1)
    metadata = dataset.metadata
    formulas = totals.formulas.most_common()
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "name": metadata.name,
        "source": metadata.source,
        "frames": len(dataset),
        "atoms": {"smallest": min(totals.sizes, default=0), "largest": max(totals.sizes, default=0)},
        "elements": sorted(totals.elements),
        "compositions": len(formulas),
        "most_common_composition": formulas[0][0] if formulas else None,
        "energy": _energy(totals),
        "forces": _forces(totals),
        "frames_with_stress": totals.with_stress,
        "periodic_frames": totals.periodic,
        "frames_with_fixed_atoms": totals.fixed,
        "charges": sorted(totals.charges),
        "spins": sorted(totals.spins),
        "level_of_theory": metadata.level_of_theory,
        "energy_zero": metadata.energy_zero,
        "licence": metadata.licence,
        "units_in_file": dict(metadata.units),
        "properties": dict(metadata.properties),
        "splits": {name: len(indices) for name, indices in metadata.splits.items()},
        "sha256": dict(metadata.sha256),
    }


def _energy(totals: _Totals) -> dict[str, Any]:
    values = np.array(totals.energies)
    result: dict[str, Any] = {"frames": len(values)}
    if len(values):
        for unit, factor in (("eV", 1.0), ("kcal/mol", KCAL_PER_MOL)):
            result[f"mean ({unit})"] = float(values.mean()) / factor
            result[f"std ({unit})"] = float(values.std()) / factor
    return result


def _forces(totals: _Totals) -> dict[str, Any]:
    result: dict[str, Any] = {"frames": totals.with_forces}
    if totals.force_components:
        rms = (totals.squared_force / totals.force_components) ** 0.5
        for unit, factor in (("eV/Å", 1.0), ("kcal/mol/Å", KCAL_PER_MOL)):
            result[f"component RMS ({unit})"] = rms / factor
            result[f"largest ({unit})"] = totals.largest_force / factor
    return result


def _formula(numbers: NDArray[np.int64]) -> tuple[str, set[str]]:
    """Return the formula in Hill order, and the symbols."""
    from ase.data import chemical_symbols

    values, counts = np.unique(numbers, return_counts=True)
    atoms = {chemical_symbols[int(z)]: int(n) for z, n in zip(values, counts, strict=True)}
    first = [s for s in ("C", "H") if s in atoms] if "C" in atoms else []
    order = first + sorted(s for s in atoms if s not in first)
    return "".join(s + (str(atoms[s]) if atoms[s] > 1 else "") for s in order), set(atoms)
