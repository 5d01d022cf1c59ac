"""Is the energy smooth where a bond is stretched until its atoms leave each other's cutoff?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffpretrain.graphs import batch_graphs
from ffpretrain.md.validation.bonds import bonds_of, pieces_of
from ffpretrain.md.validation.result import Check, verdict
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.symmetry import Interactions
from ffpretrain.md.validation.thresholds import SMOOTHNESS

#: points of the curve
POINTS = 80
#: crossings of the cutoff that are looked at; more are thinned out evenly
CROSSINGS = 24
#: Å beside a crossing
WIDE, NARROW = 1e-4, 1e-6
#: structures evaluated at once
_AT_ONCE = 16

Array = NDArray[np.float64]


class Stretch(NamedTuple):
    """A bond whose removal divides the molecule.

    Attributes:
        first: the atom whose side stays.
        second: the atom whose side moves.
        moving: bool ``[N]``.
        direction: unit vector from first to second.
        length: Å.
    """

    first: int
    second: int
    moving: NDArray[np.bool_]
    direction: Array
    length: float


def check_stretch(subject: Subject) -> Check:
    """Pull a molecule apart along one bond and look at every pair that passes the cutoff.

    At each passage the jump of energy and forces is what remains of their difference across the cutoff when
    the distance to it goes to zero (as :func:`ffpretrain.testing.check_smoothness`).
    """
    stretch = None if subject.periodic else dividing_bond(subject)
    if stretch is None:
        return Check("stretch", "not run", "no bond divides the structure in two")
    end = subject.cutoff + 0.5
    shifts = np.linspace(-0.1 * stretch.length, end - stretch.length, POINTS)
    energy = _evaluate(subject, stretch, shifts)[0]
    passages = crossings(subject, stretch, shifts[0], shifts[-1])
    jump, worst = _largest_jump(subject, stretch, passages)
    symbols = subject.atoms.get_chemical_symbols()
    bond = f"{symbols[stretch.first]}{stretch.first}-{symbols[stretch.second]}{stretch.second}"
    finite = bool(np.isfinite(energy).all() and np.isfinite(jump))
    summary = f"not finite where {bond} is stretched"
    if finite:
        summary = f"{bond} stretched to {end:.1f} Å: {len(passages)} passages of the cutoff, "
        summary += f"largest jump {jump:.1e} of the largest force"
    measured = {
        "bond": [stretch.first, stretch.second],
        "bond_name": bond,
        "passages": len(passages),
        "jump": jump if finite else None,
        "at_length": worst,
    }
    curve = {"length": (shifts + stretch.length).tolist(), "energy": (energy - energy.min()).tolist()}
    return Check(
        "stretch", verdict(finite and jump <= SMOOTHNESS), summary, measured, curve if finite else {}
    )


def _largest_jump(subject: Subject, stretch: Stretch, passages: Array) -> tuple[float, float | None]:
    """Return the largest jump over the largest force, infinite where not finite, and the length there."""
    if not len(passages):
        return 0.0, None
    offsets = np.array([-WIDE, WIDE, -NARROW, NARROW])
    energy, forces = _evaluate(subject, stretch, (passages[:, None] + offsets).ravel())
    if not (np.isfinite(energy).all() and np.isfinite(forces).all()):
        return float("inf"), None
    jumps = [_jump(values.reshape(len(passages), 4, -1)) for values in (energy, forces)]
    largest = np.maximum(*jumps) / max(float(np.abs(forces).max()), 1e-6)
    return float(largest.max()), float(passages[largest.argmax()] + stretch.length)


def dividing_bond(subject: Subject) -> Stretch | None:
    """Return the bond that divides the molecule most evenly; None where none does."""
    atoms = subject.atoms
    bonds, best = bonds_of(atoms), None
    for place, (first, second) in enumerate(bonds):
        label = pieces_of(len(atoms), np.delete(bonds, place, axis=0))
        moving = label == label[second]
        if moving[first]:
            continue
        even = min(int(moving.sum()), int((label == label[first]).sum()))
        if best is None or even > best[0]:
            best = (even, int(first), int(second), moving)
    if best is None:
        return None
    _, first, second, moving = best
    vector = atoms.positions[second] - atoms.positions[first]
    length = float(np.linalg.norm(vector))
    return Stretch(first, second, moving, vector / length, length)


def crossings(subject: Subject, stretch: Stretch, low: float, high: float) -> Array:
    """Return the shifts in Å at which a pair passes the cutoff, ascending, at most :data:`CROSSINGS`."""
    pos = subject.atoms.positions
    vector = (pos[stretch.moving][None] - pos[~stretch.moving][:, None]).reshape(-1, 3)
    along = vector @ stretch.direction
    inside = along**2 - (vector**2).sum(1) + subject.cutoff**2
    root = np.sqrt(inside[inside > 0])
    shifts = np.concatenate([-along[inside > 0] - root, -along[inside > 0] + root])
    found = np.unique(shifts[(shifts > low) & (shifts < high)].round(9))
    if len(found) > CROSSINGS:
        found = found[np.linspace(0, len(found) - 1, CROSSINGS).round().astype(int)]
    return found


def _evaluate(subject: Subject, stretch: Stretch, shifts: Array) -> tuple[Array, Array]:
    """Return the network's energies ``[P]`` eV and forces ``[P, N, 3]`` eV/Å along the path."""
    model = Interactions(subject)
    energies, forces = [], []
    for start in range(0, len(shifts), _AT_ONCE):
        graphs = []
        for shift in shifts[start : start + _AT_ONCE]:
            moved = subject.atoms.copy()
            moved.positions[stretch.moving] += shift * stretch.direction
            graphs.append(subject.graph(moved))
        out = model(batch_graphs(graphs))
        energies.append(out["energy"].numpy())
        forces.append(out["forces"].numpy().reshape(len(graphs), -1, 3))
    return np.concatenate(energies), np.concatenate(forces)


def _jump(values: Array) -> Array:
    """Return the jump at each passage, ``[P]``, from values ``[P, 4, K]`` at -wide, wide, -narrow, narrow."""
    wide, narrow = values[:, 1] - values[:, 0], values[:, 3] - values[:, 2]
    ratio = NARROW / WIDE
    return np.asarray(np.abs(narrow - ratio * wide).max(axis=1) / (1 - ratio))
