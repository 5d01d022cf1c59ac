"""How strongly do stretched bonds pull back? PBE/def2-SVP by PySCF, for each kind of bond of ethanol.

python examples/stretch_with_pyscf.py [points along each bond]

The training option ``stretch_force`` is a lower bound of what is printed (docs/training.md). Some minutes.
"""

from __future__ import annotations

import sys

import numpy as np
from ase import units
from ase.data import covalent_radii

from ffpretrain.artifacts import read_card
from ffpretrain.molecules import find_bonds, neighbour_lists, side_of
from ffpretrain.objectives.stretched import LONGEST, SHORTEST

try:
    from pyscf import dft, gto
except ImportError:
    print("error: this example needs PySCF, which is not installed: pip install pyscf", file=sys.stderr)
    sys.exit(2)


def forces(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the forces in eV/Å of closed-shell PBE/def2-SVP."""
    geometry = [(int(z), x.tolist()) for z, x in zip(numbers, positions, strict=True)]
    molecule = gto.M(atom=geometry, basis="def2-svp", unit="Angstrom", verbose=0)
    method = dft.RKS(molecule, xc="pbe").density_fit()
    method.kernel()
    if not method.converged:
        method = method.newton()
        method.kernel()
    if not method.converged:
        raise RuntimeError("the self-consistent field did not converge")
    return -method.nuc_grad_method().kernel() * units.Hartree / units.Bohr


reference = read_card("ndem-ethanol").reference_geometry
numbers, positions = np.array(reference.numbers), np.array(reference.positions)
points = int(sys.argv[1]) if len(sys.argv) > 1 else 5
bonds = find_bonds(numbers, positions)[:, :2].tolist()
lists = neighbour_lists(len(numbers), np.array(bonds))
weakest = np.inf
seen = set()
for a, b in bonds:
    kind = tuple(sorted((tuple(sorted(numbers[[*lists[i], i]])) for i in (a, b)), key=len))
    if kind in seen:
        continue
    seen.add(kind)
    side = sorted(side_of(lists, a, b))
    axis = positions[b] - positions[a]
    axis /= np.linalg.norm(axis)
    radii = covalent_radii[numbers[[a, b]]].sum()
    row = []
    for ratio in np.linspace(SHORTEST, LONGEST, points):
        moved = positions.copy()
        moved[side] += axis * (ratio * radii - np.linalg.norm(positions[b] - positions[a]))
        row.append(-(forces(numbers, moved)[side] @ axis).sum())
    weakest = min(weakest, *row)
    print(
        f"atoms {a} and {b}, elements {numbers[a]} and {numbers[b]}, "
        f"{SHORTEST * radii:.2f} to {LONGEST * radii:.2f} Å: " + " ".join(f"{f:.2f}" for f in row) + " eV/Å"
    )
print(f"weakest: {weakest:.2f} eV/Å")
