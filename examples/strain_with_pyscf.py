"""How strongly do strained bonds and angles come back? PBE/def2-SVP by PySCF, for each of ethanol's.

python examples/strain_with_pyscf.py [points along each]

The training option ``strain_force`` is a lower bound of what is printed (docs/objectives.md). Ten minutes.
"""

from __future__ import annotations

import sys

import numpy as np
from ase import units
from ase.data import chemical_symbols

from ffpretrain.artifacts import read_card
from ffpretrain.objectives.strained import STRAINS, every_strain

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
points = int(sys.argv[1]) if len(sys.argv) > 1 else 4
weakest = np.inf
for kind in STRAINS:
    for site, strains in every_strain(kind, numbers, positions, np.linspace(0, 1, points)):
        row = [float((forces(numbers, strain.pos) * strain.back).sum()) for strain in strains]
        weakest = min([weakest, *row])
        what = "-".join(f"{chemical_symbols[numbers[atom]]}{atom}" for atom in site.atoms)
        print(f"{kind} {what}: " + " ".join(f"{force:.2f}" for force in row) + " eV/Å", flush=True)
print(f"weakest: {weakest:.2f} eV/Å")
