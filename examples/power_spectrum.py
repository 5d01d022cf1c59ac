"""The vibrations of ethanol in motion at 300 K: the power spectrum of its velocities.

python examples/power_spectrum.py [steps] [runs]

Bands stand where they do in an infrared spectrum, anharmonic shifts included. Heights are kinetic energy:
intensities would need dipoles, which the model does not have.
"""

from __future__ import annotations

import sys

import numpy as np
from ase import units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet

from ffpretrain import FFCalculator, load_potential
from ffpretrain.md import velocity_spectrum
from ffpretrain.md.velocities import draw_momenta

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
runs = int(sys.argv[2]) if len(sys.argv) > 2 else 4
timestep = 0.5  # fs

rng = np.random.default_rng(0)
atoms = load_potential("ndem-ethanol").card.reference_geometry.to_atoms()
atoms.calc = FFCalculator("ndem-ethanol")

spectra = []
for _ in range(runs):
    atoms.set_momenta(draw_momenta(atoms, 300.0, rng))
    start = Langevin(
        atoms, timestep * units.fs, temperature_K=300.0, friction=0.02 / units.fs, fixcm=False, rng=rng
    )
    start.run(max(1, steps // 4))
    Stationary(atoms)
    ZeroRotation(atoms)
    motion = VelocityVerlet(atoms, timestep * units.fs)  # a thermostat would broaden the bands
    velocities = [atoms.get_velocities() * units.fs for _ in motion.irun(steps)]  # Å/fs
    spectra.append(velocity_spectrum(np.array(velocities), atoms.get_masses(), timestep))

wavenumber = spectra[0].wavenumber
if wavenumber[1] > 600.0:
    spacing = f"a line every {wavenumber[1]:.0f} 1/cm"
    raise SystemExit(f"{steps} steps give {spacing}, wider than a band; take 150 or more")
density = np.mean([s.density for s in spectra], axis=0)
np.savetxt("spectrum.dat", np.column_stack([wavenumber, density]), header="1/cm   eV cm")
bands = {"C-C, C-O, bends": (200, 1700), "C-H stretches": (2700, 3300), "O-H stretch": (3300, 4200)}
for name, (low, high) in bands.items():
    band = (wavenumber >= low) & (wavenumber < high)
    peak = wavenumber[band][density[band].argmax()]
    vibrations = density[band].sum() * wavenumber[1] / (units.kB * 300.0)
    print(f"{name:16s} highest at {peak:5.0f} 1/cm, the energy of {vibrations:4.1f} vibrations")
print(f"spectrum.dat written, a line every {wavenumber[1]:.1f} 1/cm")
