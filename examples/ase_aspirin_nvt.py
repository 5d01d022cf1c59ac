"""Aspirin at 300 K with ndem-aspirin and ASE's own Langevin dynamics: two picoseconds, a frame every 10 fs.

python examples/ase_aspirin_nvt.py [steps]
"""

from __future__ import annotations

import sys

import numpy as np
from ase import units
from ase.constraints import FixCom
from ase.io.trajectory import Trajectory
from ase.md.langevin import Langevin

from ffpretrain import FFCalculator, load_potential

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 4000

# the model's file carries a geometry of the molecule it is for
atoms = load_potential("ndem-aspirin").card.reference_geometry.to_atoms()
atoms.calc = FFCalculator("ndem-aspirin")
atoms.set_constraint(FixCom())

rng = np.random.default_rng(0)
momenta = rng.standard_normal((len(atoms), 3)) * np.sqrt(atoms.get_masses() * units.kB * 300.0)[:, None]
atoms.set_momenta(momenta)

dynamics = Langevin(
    atoms, timestep=0.5 * units.fs, temperature_K=300.0, friction=0.01 / units.fs, fixcm=False, rng=rng
)
with Trajectory("aspirin.traj", "w", atoms) as trajectory:
    dynamics.attach(trajectory, interval=20)
    for _ in range(10):
        dynamics.run(max(1, steps // 10))
        picoseconds = dynamics.get_time() / (1000.0 * units.fs)
        kelvin, energy = atoms.get_temperature(), atoms.get_potential_energy()
        print(f"{picoseconds:6.3f} ps   {kelvin:5.0f} K   {energy:.4f} eV")
print("aspirin.traj written; look at it with: ase gui aspirin.traj")
