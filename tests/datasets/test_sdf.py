"""SDF geometries."""

from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from ffpretrain.datasets import open_dataset
from ffpretrain.errors import DataError


def record(smiles: str, three_d: bool = True) -> str:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if three_d:
        AllChem.EmbedMolecule(molecule, randomSeed=7)
    else:
        AllChem.Compute2DCoords(molecule)
    return Chem.MolToMolBlock(molecule)


def write(tmp_path: Path, *records: str) -> Path:
    file = tmp_path / "molecules.sdf"
    file.write_text("".join(text + "$$$$\n" for text in records))
    return file


def test_geometries_are_rdkits(tmp_path: Path) -> None:
    blocks = [record("CCO"), record("c1ccccc1")]
    dataset = open_dataset(write(tmp_path, *blocks))
    assert len(dataset) == 2
    for frame, block in zip(dataset, blocks, strict=True):
        molecule = Chem.MolFromMolBlock(block, removeHs=False)
        assert frame.numbers.tolist() == [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
        np.testing.assert_array_equal(frame.positions, molecule.GetConformer().GetPositions())
        assert (frame.energy, frame.forces, frame.charge, frame.spin) == (None, None, 0, 1)


def test_bonds_are_rdkits(tmp_path: Path) -> None:
    blocks = [record("CC#CC(=O)N"), record("c1ccccc1O")]
    dataset = open_dataset(write(tmp_path, *blocks))
    for frame, block in zip(dataset, blocks, strict=True):
        bonds = Chem.MolFromMolBlock(block, removeHs=False, sanitize=False).GetBonds()
        expected = [[b.GetBeginAtomIdx(), b.GetEndAtomIdx(), int(b.GetBondTypeAsDouble())] for b in bonds]
        assert frame.properties["bonds"].tolist() == expected
    assert dataset.metadata.properties == {"bonds": "atom, atom, order"}
    atom = "    0.0000    0.0000    0.0000 Ne  0  0\n"
    lone = open_dataset(write(tmp_path, f"neon\n\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n{atom}M  END\n"))
    assert lone[0].properties == {}
    assert lone.metadata.properties == {}


@pytest.mark.parametrize("row", ["  1  9  1  0", "  0  1  1  0", "  1  1  1  0", "  1  x  1  0"])
def test_wrong_bonds_are_refused(tmp_path: Path, row: str) -> None:
    lines = record("C").splitlines()
    lines[9] = row
    with pytest.raises(DataError, match=r"record 0: a bond .*; repair the file"):
        open_dataset(write(tmp_path, "\n".join(lines) + "\n"))


@pytest.mark.parametrize(
    ("smiles", "charge", "spin"),
    [("CC(=O)[O-]", -1, 1), ("[NH3+]CC(=O)[O-]", 0, 1), ("C[NH3+]", 1, 1), ("[CH3]", 0, 2)],
)
def test_charge_and_spin(tmp_path: Path, smiles: str, charge: int, spin: int) -> None:
    frame = open_dataset(write(tmp_path, record(smiles)))[0]
    assert (frame.charge, frame.spin) == (charge, spin)


def test_charge_codes_of_the_atom_block(tmp_path: Path) -> None:
    atom = "    0.0000    0.0000    0.0000 Na  0  3  0  0  0  0  0  0  0  0  0  0\n"
    text = f"sodium\n\n\n  1  0  0  0  0  0  0  0  0  0999 V2000\n{atom}M  END\n"
    assert open_dataset(write(tmp_path, text))[0].charge == 1


def test_single_molecule_without_separator(tmp_path: Path) -> None:
    (tmp_path / "one.mol").write_text(record("C"))
    assert len(open_dataset(tmp_path / "one.mol")[0]) == 5


def test_large_molecules_without_spaces_between_counts(tmp_path: Path) -> None:
    rows = "".join(f"{i:10.4f}{0:10.4f}{0:10.4f} C   0  0\n" for i in range(120))
    text = f"chain\n\n\n120  0  0  0  0  0  0  0  0  0999 V2000\n{rows}M  END\n"
    assert len(open_dataset(write(tmp_path, text))[0]) == 120


def test_drawings_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, record("CCO", three_d=False))
    with pytest.raises(DataError, match=r"record 0: is a drawing \(2D\)"):
        open_dataset(file)
    assert len(open_dataset(file, allow_2d=True)) == 1


METHANE = record("C")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(METHANE.splitlines()[:6]) + "\n", "record 1: is truncated"),
        (METHANE.replace("V2000", "V3000"), "record 1: is of version V3000"),
        (METHANE.replace(" C   0", " Qq  0"), "record 1: unknown element 'Qq'"),
        (METHANE.replace(" C   0", " *   0"), "record 1: unknown element"),
        (METHANE.replace("  5  4", "  x  4", 1), "no V2000 counts line"),
        (METHANE.replace("  5  4", "  0  0", 1), "record 1: has no atoms"),
        (METHANE.replace("    0.0000", "    0.00x0", 1), "record 1: a coordinate is no number"),
        ("one line\n", "no V2000 counts line"),
    ],
)
def test_bad_records(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, METHANE, text)
    if text.count("    0.00x0") == 0 and "coordinate" in message:
        lines = METHANE.splitlines()
        lines[4] = "    0.00x0" + lines[4][10:]
        file = write(tmp_path, METHANE, "\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        open_dataset(file)


def test_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.sdf").write_text("\n\n")
    with pytest.raises(DataError, match="has no records"):
        open_dataset(tmp_path / "a.sdf")
