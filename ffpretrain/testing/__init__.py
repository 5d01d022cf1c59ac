"""Checks that every backbone and potential must pass, for tests inside and outside this package.

``docs/backbones.md`` shows how a new backbone is tested with them.
"""

from ffpretrain.testing.outputs import KINDS, Kind, Model, SymmetryError, evaluate
from ffpretrain.testing.periodic import check_stress, check_supercell, check_wrapping
from ffpretrain.testing.physics import (
    DenseModel,
    check_forces,
    check_isolated_atoms,
    check_layouts,
    check_precision,
    check_second_derivatives,
    check_size_consistency,
    check_smoothness,
)
from ffpretrain.testing.structures import crystal, random_molecule, random_rotation, symmetric_molecules
from ffpretrain.testing.suite import CHECK_NAMES, check_all, checks, potential_of, randomize, run_check
from ffpretrain.testing.symmetry import (
    check_batching,
    check_permutation,
    check_reflection,
    check_rotation,
    check_translation,
)

__all__ = [
    "CHECK_NAMES",
    "KINDS",
    "DenseModel",
    "Kind",
    "Model",
    "SymmetryError",
    "check_all",
    "check_batching",
    "check_forces",
    "check_isolated_atoms",
    "check_layouts",
    "check_permutation",
    "check_precision",
    "check_reflection",
    "check_rotation",
    "check_second_derivatives",
    "check_size_consistency",
    "check_smoothness",
    "check_stress",
    "check_supercell",
    "check_translation",
    "check_wrapping",
    "checks",
    "crystal",
    "evaluate",
    "potential_of",
    "random_molecule",
    "random_rotation",
    "randomize",
    "run_check",
    "symmetric_molecules",
]
