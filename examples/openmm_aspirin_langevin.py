"""Aspirin in vacuum at 300 K with ndem-aspirin and OpenMM's Langevin integrator: one picosecond.

python examples/openmm_aspirin_langevin.py [steps]
"""

from __future__ import annotations

import sys
from pathlib import Path

import openmm
from openmm import app, unit

from ffpretrain.md.openmm import create_system

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000

pdb = app.PDBFile(str(Path(__file__).parent / "openmm" / "aspirin.pdb"))
system = create_system(pdb.topology, "ndem-aspirin")
integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
integrator.setRandomNumberSeed(1)

simulation = app.Simulation(pdb.topology, system, integrator)
simulation.context.setPositions(pdb.positions)
simulation.minimizeEnergy(maxIterations=min(200, steps))
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)

every = max(1, steps // 10)
simulation.reporters.append(app.DCDReporter("aspirin.dcd", every))
simulation.reporters.append(
    app.StateDataReporter(sys.stdout, every, time=True, potentialEnergy=True, temperature=True)
)
simulation.step(steps)
