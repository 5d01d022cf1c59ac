"""The bundled ethanol dataset: what it says of itself is true and can be made again."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read

import ffpretrain.datasets
from ffpretrain.cli import main
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.engines import create_engine, one_thread
from ffpretrain.datasets.store import FrameStore

DATA = Path(ffpretrain.datasets.__file__).parent / "data"


@pytest.fixture(scope="module")
def ethanol() -> FrameStore:
    store = open_dataset("ethanol-gfn2")
    assert isinstance(store, FrameStore)
    return store


def test_size_and_metadata(ethanol: FrameStore) -> None:
    assert (DATA / "ethanol_gfn2.h5").stat().st_size <= 1_500_000
    assert len(ethanol) == 1200 and set(ethanol.n_atoms) == {9}
    metadata = ethanol.metadata
    assert metadata.level_of_theory == "GFN2-xTB" and metadata.licence == "CC0-1.0"
    assert metadata.energy_zero == "GFN2-xTB total energy (not relative to free atoms)"
    assert ethanol.notes["label"]["replaced"] == []


def test_frames_are_those_of_a_hot_flexible_molecule(ethanol: FrameStore) -> None:
    energies = np.array([frame.energy for frame in ethanol])
    forces = np.array([frame.forces for frame in ethanol])
    # 21 classical vibrations at 500 K spread by sqrt(21 / 2) kT = 0.14 eV
    assert 0.11 < energies.std() < 0.18
    assert 0.8 < np.sqrt((forces**2).mean()) < 1.2
    assert np.abs(forces.sum(axis=1)).max() < 1e-4
    hydroxyl = [frame.to_atoms().get_dihedral(0, 1, 2, 3) for frame in ethanol]
    assert min(np.histogram(hydroxyl, [0, 120, 240, 360])[0]) > 100  # gauche, trans, gauche
    assert abs(np.corrcoef(energies[:-10], energies[10:])[0, 1]) < 0.2


def test_it_is_the_molecule_of_the_structure_file(ethanol: FrameStore) -> None:
    start = read(DATA / "ethanol.xyz")
    assert isinstance(start, Atoms)
    assert ethanol[0].numbers.tolist() == start.numbers.tolist()


def test_labels_belong_to_the_stored_positions(ethanol: FrameStore) -> None:
    pytest.importorskip("tblite")
    atoms = Atoms(ethanol[0].numbers, calculator=create_engine("gfn2"))
    with one_thread():
        for index in (0, 1, 2, 600, 1199):
            frame = ethanol[index]
            atoms.positions = frame.positions
            assert atoms.get_potential_energy() == pytest.approx(frame.energy, abs=1e-6)
            np.testing.assert_allclose(atoms.get_forces(), frame.forces, atol=1e-5)


def test_the_command_in_its_metadata_makes_it(
    ethanol: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tblite")
    words = shlex.split(ethanol.metadata.source)
    assert words[:2] == ["ffpretrain", "label"]
    words[words.index("--n") + 1] = "3"
    words[words.index("--out") + 1] = str(tmp_path / "again.h5")
    monkeypatch.chdir(DATA)
    with pytest.raises(SystemExit) as caught:
        main(words[1:])
    assert not caught.value.code
    again = FrameStore(tmp_path / "again.h5")
    for index in range(3):
        assert again[index].energy == pytest.approx(ethanol[index].energy, abs=1e-5)
        np.testing.assert_allclose(again[index].positions, ethanol[index].positions, atol=2e-5)
        np.testing.assert_allclose(again[index].forces, ethanol[index].forces, atol=2e-4)
