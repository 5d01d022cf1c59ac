"""Label frames of a model's own trajectory with PBE/def2-SVP by PySCF and print the model's errors on them.

ffpretrain validate ndem-aspirin --out validation
python examples/relabel_with_pyscf.py validation/frames.extxyz [how many]

For models of the revised MD17 datasets, whose labels are PBE/def2-SVP. A frame of aspirin takes minutes.
"""

from __future__ import annotations

import sys

import ase.io
import numpy as np
from ase import Atoms, units

try:
    from pyscf import dft, gto
except ImportError:
    print("error: this example needs PySCF, which is not installed: pip install pyscf", file=sys.stderr)
    sys.exit(2)


def label(atoms: Atoms) -> tuple[float, np.ndarray]:
    """Return the energy in eV and the forces in eV/Å."""
    geometry = list(zip(atoms.get_chemical_symbols(), atoms.positions.tolist(), strict=True))
    molecule = gto.M(atom=geometry, basis="def2-svp", unit="Angstrom", verbose=0)
    method = dft.RKS(molecule, xc="pbe").density_fit()
    method.conv_tol = 1e-10
    method.grids.level = 5
    energy = method.kernel()
    if not method.converged:
        raise RuntimeError("the self-consistent field did not converge")
    gradient = method.nuc_grad_method()
    gradient.grid_response = True  # the derivative of the energy on this very grid
    return energy * units.Hartree, -gradient.kernel() * units.Hartree / units.Bohr


path = sys.argv[1] if len(sys.argv) > 1 else "validation/frames.extxyz"
frames = ase.io.read(path, ":")
count = min(len(frames), int(sys.argv[2])) if len(sys.argv) > 2 else len(frames)
chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, count).round().astype(int)]

energies, forces = [], []
for number, frame in enumerate(chosen, 1):
    energy, force = label(frame)
    energies.append(frame.get_potential_energy() - energy)
    forces.append(frame.get_forces() - force)
    when = f"{frame.info['temperature']:.0f} K  {frame.info['time_ps']:.2f} ps"
    print(f"{number}/{count}  {when}  {1000 * np.abs(forces[-1]).mean():.1f} meV/Å")

mae = np.abs(forces).mean()
print(f"force MAE {1000 * mae:.1f} meV/Å = {mae * units.mol / units.kcal:.3f} kcal/mol/Å on {count} frames")
offset = np.mean(energies)
error = 1000 * np.abs(np.array(energies) - offset).mean()
print(f"energy MAE {error:.1f} meV, without the mean difference of {offset:+.4f} eV")
