"""What a model must reach to pass. Constants of the package: no option and no model file changes them."""

from __future__ import annotations

#: eV and eV/Å: largest difference of an engine from ASE on the same frames, both in float64
ENGINE_ENERGY = 1e-5
ENGINE_FORCES = 1e-4
#: largest difference under rotation, reflection, translation, permutation and batching, in float64, relative
#: to the largest entry
SYMMETRY = 1e-9
#: largest difference of forces from finite differences of the energy, relative to the largest force
FORCES = 1e-6
#: largest jump of energy or forces where a pair passes the cutoff, relative to the largest force
SMOOTHNESS = 1e-6
#: meV/atom/ps: slope of the total energy in NVE
NVE_SLOPE = 0.05
#: drift of the total energy over the whole run, in standard deviations of the kinetic energy
NVE_DRIFT = 1.0
#: a bond is broken beyond this multiple of its largest length in training
BROKEN_BOND = 2.0
#: two atoms are too close below this fraction of the smallest distance of their elements in training
TOO_CLOSE = 0.5
#: integral over r of the absolute difference of two distributions of interatomic distances
HR_MAE = 0.05
#: 1/cm: an imaginary wavenumber below this is within what a relaxation leaves
IMAGINARY = 5.0
#: eV/Å: where the relaxation before the vibrations stops
RELAXED = 1e-4
#: largest difference of the Hessian from its transpose, relative to its largest entry
ASYMMETRY = 1e-6

#: unit of each, for reports
TABLE: dict[str, tuple[float, str]] = {
    "engine_energy": (ENGINE_ENERGY, "eV"),
    "engine_forces": (ENGINE_FORCES, "eV/angstrom"),
    "symmetry": (SYMMETRY, "relative"),
    "forces": (FORCES, "relative"),
    "smoothness": (SMOOTHNESS, "relative"),
    "nve_slope": (NVE_SLOPE, "meV/atom/ps"),
    "nve_drift": (NVE_DRIFT, "std of the kinetic energy"),
    "broken_bond": (BROKEN_BOND, "largest length in training"),
    "too_close": (TOO_CLOSE, "smallest distance in training"),
    "hr_mae": (HR_MAE, "1"),
    "imaginary": (IMAGINARY, "1/cm"),
    "relaxed": (RELAXED, "eV/angstrom"),
    "asymmetry": (ASYMMETRY, "relative"),
}
