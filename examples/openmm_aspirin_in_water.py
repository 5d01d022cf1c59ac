"""One aspirin under ndem-aspirin in a box of TIP3P water, at 300 K and 1 bar: openmm-ml's mixed system.

What aspirin and the water do to each other comes from openmm/aspirin_in_water.xml (example quality).

python examples/openmm_aspirin_in_water.py [steps [width of the box in nm]]
"""

from __future__ import annotations

import sys
from pathlib import Path

import openmm
from openmm import app, unit
from openmmml import MLPotential

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
width = float(sys.argv[2]) if len(sys.argv) > 2 else 2.6
data = Path(__file__).parent / "openmm"

pdb = app.PDBFile(str(data / "aspirin.pdb"))
forcefield = app.ForceField(str(data / "aspirin_in_water.xml"), "amber14/tip3p.xml")
model = app.Modeller(pdb.topology, pdb.positions)
model.addSolvent(forcefield, model="tip3p", boxSize=openmm.Vec3(width, width, width) * unit.nanometer)

# the force field moves everything, then the model takes over what happens inside aspirin
mm = forcefield.createSystem(
    model.topology, nonbondedMethod=app.PME, nonbondedCutoff=min(1.0, 0.45 * width) * unit.nanometer
)
aspirin = [atom.index for atom in model.topology.atoms() if atom.residue.name == "AIN"]
system = MLPotential("ffpretrain-ndem-aspirin").createMixedSystem(model.topology, mm, aspirin)
barostat = openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin)
barostat.setRandomNumberSeed(1)
system.addForce(barostat)

integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtosecond)
integrator.setRandomNumberSeed(1)
simulation = app.Simulation(model.topology, system, integrator)
simulation.context.setPositions(model.positions)
simulation.minimizeEnergy(maxIterations=min(200, steps))
simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)

every = max(1, steps // 10)
# without this, each atom of aspirin is put into the box by itself: no force of OpenMM bonds them
simulation.reporters.append(app.DCDReporter("aspirin_in_water.dcd", every, enforcePeriodicBox=False))
simulation.reporters.append(
    app.StateDataReporter(sys.stdout, every, time=True, potentialEnergy=True, temperature=True, density=True)
)
simulation.step(steps)
