"""Eight replicas of aspirin at 300 K, moved by TorchMD; the forces of all come from one batch.

python examples/torchmd_replicas.py [steps] [replicas]
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from torchmd.forces import Forces
from torchmd.integrator import Integrator, maxwell_boltzmann
from torchmd.systems import System

from ffpretrain import load_potential
from ffpretrain.md.torchmd import External

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
replicas = int(sys.argv[2]) if len(sys.argv) > 2 else 8
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

atoms = load_potential("ndem-aspirin").card.reference_geometry.to_atoms()
numbers = torch.tensor(atoms.numbers).repeat(replicas, 1)
masses = torch.tensor(atoms.get_masses())

torch.manual_seed(0)  # TorchMD draws from torch's own generator
system = System(len(atoms), replicas, torch.float64, device)
system.set_positions(atoms.positions)
system.set_masses(masses)
system.set_velocities(maxwell_boltzmann(masses[:, None], 300.0, replicas))

# no terms of a force field: all forces are the model's
forces = Forces(
    SimpleNamespace(masses=masses, nonbonded_params=None),
    terms=[],
    external=External("ndem-aspirin", numbers, device),
)
forces.compute(system.pos, system.box, system.forces)
dynamics = Integrator(system, forces, timestep=0.5, device=device, gamma=10.0, T=300.0)
for _ in range(10):
    kinetic, potential, kelvin = dynamics.step(niter=max(1, steps // 10))
    print("   ".join(f"{value:4.0f} K" for value in kelvin))
spread = max(potential) - min(potential)
print(f"potential energies within {spread:.2f} kcal/mol of each other")
