"""A hundred molecules of ethanol at 300 K, moved by torch-sim as one batch.

python examples/torch_sim_batch.py [steps] [molecules]
"""

from __future__ import annotations

import sys

import numpy as np
import torch_sim
from torch_sim.quantities import calc_temperature

from ffpretrain import load_potential
from ffpretrain.md.torchsim import FFModel

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
n_molecules = int(sys.argv[2]) if len(sys.argv) > 2 else 100

model = FFModel("ndem-ethanol", compute_stress=False)
ethanol = load_potential("ndem-ethanol").card.reference_geometry.to_atoms()
rng = np.random.default_rng(0)
molecules = []
for _ in range(n_molecules):
    molecules.append(ethanol.copy())
    molecules[-1].positions += rng.normal(0.0, 0.02, ethanol.positions.shape)

final = torch_sim.integrate(
    molecules,
    model,
    integrator=torch_sim.nvt_langevin,
    n_steps=steps,
    temperature=300.0,
    timestep=0.0005,  # ps
    seed=0,
)
kelvin = calc_temperature(masses=final.masses, momenta=final.momenta, system_idx=final.system_idx)
print(f"{final.n_systems} molecules, {final.n_atoms} atoms, {steps} steps of 0.5 fs")
print(
    f"temperature {float(kelvin.mean()):.0f} K, from {float(kelvin.min()):.0f} to {float(kelvin.max()):.0f}"
)
print(f"energies from {float(final.energy.min()):.3f} to {float(final.energy.max()):.3f} eV")
