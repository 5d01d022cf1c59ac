"""Relax ethanol with ndem-ethanol and print its vibrational wavenumbers.

python examples/relax_and_vibrations.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from ase.build import molecule
from ase.optimize import BFGS
from ase.vibrations import Vibrations

from ffpretrain import FFCalculator

atoms = molecule("CH3CH2OH")
# float64: second derivatives from differences of forces deserve all digits
atoms.calc = FFCalculator("ndem-ethanol", dtype="float64")

BFGS(atoms).run(fmax=1e-4, steps=300)
energy, largest = atoms.get_potential_energy(), np.abs(atoms.get_forces()).max()
print(f"relaxed: {energy:.5f} eV, largest force {largest:.1e} eV/Å")

with tempfile.TemporaryDirectory() as folder:
    vibrations = Vibrations(atoms, name=str(Path(folder) / "vib"), delta=0.005)
    vibrations.run()
    wavenumbers = vibrations.get_frequencies()

# the first six are translations and rotations
for number in wavenumbers[6:]:
    print(f"{number.real:8.1f} 1/cm" + (f"  (imaginary: {number.imag:.1f}i)" if number.imag else ""))
