"""MMFF94 (Halgren 1996) as an ASE calculator, by RDKit: the energy DenoiseVAE draws its landscapes of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from ase.calculators.calculator import Calculator, CalculatorSetupError, all_changes

from ffpretrain.errors import MissingDependencyError
from ffpretrain.units import KCAL_PER_MOL

if TYPE_CHECKING:
    from ase import Atoms


class MMFF(Calculator):
    """MMFF94 energies and forces of a molecule.

    Bonds, their orders and charges are read off the first geometry it sees of a molecule, which should be
    near rest, and stay for all later ones: a force field of this kind breaks no bonds.

    Args:
        charge: of the molecule, e.
        **options: as for every ASE calculator.

    Raises:
        MissingDependencyError: RDKit is not installed or cannot be loaded.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces"]  # type: ignore[misc]
    default_parameters: ClassVar[dict[str, Any]] = {"charge": 0}  # type: ignore[misc]
    name = "mmff"

    def __init__(self, **options: Any) -> None:
        try:
            from rdkit import Chem  # noqa: F401
            from rdkit.Chem import rdDetermineBonds, rdForceFieldHelpers  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                'mmff needs RDKit, which is not installed: pip install "ffpretrain[label]"'
            ) from error
        except ImportError as error:
            raise MissingDependencyError(
                f"mmff needs RDKit, which is there but cannot be loaded ({error}); install what is "
                "missing, or RDKit anew: pip install --force-reinstall rdkit"
            ) from error
        super().__init__(**options)
        self._numbers: list[int] = []
        self._field: Any = None

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        """See ``ase.calculators.calculator.Calculator``.

        Raises:
            CalculatorSetupError: a periodic structure, or a molecule unknown to RDKit or MMFF94.
        """
        super().calculate(atoms, properties, system_changes)
        structure: Any = self.atoms
        if structure.pbc.any():
            raise CalculatorSetupError("MMFF94 is for molecules; set pbc to False")
        numbers = structure.numbers.tolist()
        if numbers != self._numbers:
            self._field, self._numbers = _force_field(structure, int(self.parameters["charge"])), numbers
        place = structure.positions.ravel().tolist()
        energy = self._field.CalcEnergy(place) * KCAL_PER_MOL
        forces = -np.array(self._field.CalcGrad(place)).reshape(-1, 3) * KCAL_PER_MOL
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}


def _force_field(atoms: Atoms, charge: int) -> Any:
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdDetermineBonds, rdForceFieldHelpers

    formula = atoms.get_chemical_formula()
    lines = [
        f"{s} {x:.9f} {y:.9f} {z:.9f}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)
    ]
    log: Any = RDLogger
    log.DisableLog("rdApp.*")  # what it would print comes back as an error
    try:
        molecule = Chem.MolFromXYZBlock("\n".join([str(len(atoms)), "", *lines]) + "\n")
        rdDetermineBonds.DetermineBonds(molecule, charge=charge)
        Chem.SanitizeMol(molecule)
        known = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    except (ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise CalculatorSetupError(f"RDKit finds no bonds in {formula} of charge {charge}: {said}") from error
    finally:
        log.EnableLog("rdApp.*")
    if known is None:
        raise CalculatorSetupError(f"MMFF94 has no parameters for {formula}")
    field = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, known)
    field.Initialize()
    return field
