"""Aspirin at 300 K, moved by LAMMPS with the forces of ndem-aspirin through its fix external.

python examples/lammps_aspirin.py [steps]
"""

from __future__ import annotations

import sys

from ase.io import write

from ffpretrain import load_potential
from ffpretrain.md.lammps import FFFix, start_lammps

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000

aspirin = load_potential("ndem-aspirin").card.reference_geometry.to_atoms()
aspirin.center(vacuum=15.0)
elements = ["C", "H", "O"]
write("aspirin.data", aspirin, format="lammps-data", specorder=elements, masses=True, atom_style="atomic")

lmp = start_lammps()
lmp.commands_string("""
units metal
atom_style atomic
boundary f f f
read_data aspirin.data
pair_style none
comm_modify cutoff 5.0
""")
potential = FFFix(lmp, "ndem-aspirin", elements)
lmp.commands_string("""
velocity all create 300.0 1 mom yes rot yes
timestep 0.0005
fix move all nve
fix bath all langevin 300.0 300.0 0.1 1 zero yes
""")
for _ in range(10):
    potential.command(f"run {max(1, steps // 10)}")
    step, kelvin, energy = (lmp.get_thermo(name) for name in ("step", "temp", "pe"))
    print(f"{0.0005 * step:7.4f} ps   {kelvin:5.0f} K   {energy:.4f} eV")
lmp.close()
