"""Ethanol at 300 K as a path integral of eight beads, moved by i-PI; the beads are one batch of the model.

python examples/ipi_path_integral.py [steps] [beads]
"""

from __future__ import annotations

import sys

import ase.units
from ipi.scripting import InteractiveSimulation, motion_nvt_xml, simulation_xml

from ffpretrain import load_potential
from ffpretrain.md import ipi_driver

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
beads = int(sys.argv[2]) if len(sys.argv) > 2 else 8

ethanol = load_potential("ndem-ethanol").card.reference_geometry.to_atoms()
ethanol.set_cell([50.0, 50.0, 50.0])  # i-PI wants a cell; the model does not look at it

forcefield = f"""
<ffdirect name='ff'>
  <pes>custom</pes>
  <pes_path>{ipi_driver.__file__}</pes_path>
  <batch_size>{beads}</batch_size>
  <parameters>{{model: ndem-ethanol, periodic: False}}</parameters>
</ffdirect>
"""
motion = motion_nvt_xml(timestep=0.5 * ase.units.fs, path_integrals=True)
simulation = InteractiveSimulation(
    simulation_xml([ethanol.copy() for _ in range(beads)], forcefield, motion, 300.0, prefix="ethanol")
)
classical = 1.5 * len(ethanol) * ase.units.kB * 300.0
for _ in range(5):
    simulation.run(max(1, steps // 5))
    # the virial estimator: all beads start at one place, and spread to the zero-point motion in some 100 fs
    quantum = simulation.properties("kinetic_cv")
    mean = simulation.properties("potential")
    print(f"potential {mean:.3f} eV   kinetic {quantum:.3f} eV (classical nuclei: {classical:.3f} eV)")
print("ethanol.out and ethanol.pos_*.xyz written")
