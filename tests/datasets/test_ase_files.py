"""Extended xyz, ASE trajectories and databases."""

import lzma
import pickle
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCartesian
from ase.db import connect

from ffpretrain.datasets import open_dataset
from ffpretrain.errors import DataError
from ffpretrain.units import KCAL_PER_MOL

HEADER = 'Properties=species:S:1:pos:R:3:{forces}:R:3 {energy}=-1.5 pbc="F F F"'
ROWS = "O 0 0 0 0.1 0.2 0.3\nH 0 0 1 -0.1 -0.2 -0.3\n"


def xyz(forces: str = "forces", energy: str = "energy", rows: str = ROWS, more: str = "") -> str:
    return f"2\n{HEADER.format(forces=forces, energy=energy)} {more}\n{rows}"


def slab() -> Atoms:
    atoms = Atoms(
        "Cu2H", positions=[[0, 0, 0], [1, 1, 1], [1, 1, 3]], cell=[4, 5, 9], pbc=(True, True, False)
    )
    atoms.set_constraint(FixAtoms([0]))
    atoms.calc = SinglePointCalculator(
        atoms, energy=-7.25, free_energy=-7.5, forces=np.arange(9.0).reshape(3, 3), stress=np.arange(6.0)
    )
    return atoms


@pytest.mark.parametrize(
    ("name", "energy", "rms"), [("train_300K", -17660.4324, 0.94798), ("train_mixedT", -17659.1177, 1.42127)]
)
def test_3bpa(shared_data: Path, name: str, energy: float, rms: float) -> None:
    dataset = open_dataset(shared_data / "3bpa" / f"{name}.xyz", level_of_theory="wB97X/6-31G(d)")
    frames = list(dataset)
    assert len(frames) == 500
    assert {len(frame) for frame in frames} == {27}
    assert np.mean([frame.energy for frame in frames]) == pytest.approx(energy, abs=1e-3)
    forces = np.array([frame.forces for frame in frames])
    assert np.sqrt((forces**2).mean()) == pytest.approx(rms, abs=1e-4)
    # the file has a 50 Å box that repeats in no direction
    assert frames[0].pbc == (False, False, False)
    assert frames[0].cell is None
    assert dataset.metadata.level_of_theory == "wB97X/6-31G(d)"


def test_3bpa_first_frame_is_what_the_file_says(shared_data: Path) -> None:
    file = shared_data / "3bpa" / "train_300K.xyz"
    row = [float(value) for value in file.read_text().splitlines()[2].split()[1:]]
    frame = open_dataset(file)[0]
    np.testing.assert_array_equal(frame.positions[0], row[:3])
    np.testing.assert_array_equal(frame.forces[0], row[3:])
    assert frame.energy == -17660.461737861464


def test_isolated_atoms(shared_data: Path) -> None:
    frames = list(open_dataset(shared_data / "3bpa" / "iso_atoms.xyz"))
    assert {int(f.numbers[0]): f.energy for f in frames}[8] == -2041.9816003861047
    assert all(frame.forces is None for frame in frames)


def test_compressed_xyz(shared_data: Path, tmp_path: Path) -> None:
    plain = (shared_data / "3bpa" / "train_300K.xyz").read_bytes()[:20000].rsplit(b"\n27\n", 1)[0] + b"\n"
    (tmp_path / "a.xyz").write_bytes(plain)
    (tmp_path / "a.xyz.xz").write_bytes(lzma.compress(plain))
    one, other = open_dataset(tmp_path / "a.xyz"), open_dataset(tmp_path / "a.xyz.xz")
    assert len(one) == len(other) > 3
    assert one[2].energy == other[2].energy
    (tmp_path / "b.xyz.xz").write_bytes(lzma.compress(plain)[:-40])
    with pytest.raises(DataError, match="truncated or damaged"):
        open_dataset(tmp_path / "b.xyz.xz")


def test_oc20_trajectories(shared_data: Path) -> None:
    files = sorted((shared_data / "oc20").glob("*.traj"))
    sizes = set()
    assert len(files) == 17
    for file in files:
        dataset = open_dataset(file)
        frame = dataset[len(dataset) - 1]
        sizes.add(len(frame))
        assert frame.fixed is not None
        assert 0 < frame.fixed.sum() < len(frame)
        assert frame.pbc == (True, True, True)
        assert frame.cell is not None
        assert frame.energy is not None
        assert np.isfinite(frame.forces).all()
    assert (min(sizes), max(sizes)) == (33, 160)


def test_oc20_values(shared_data: Path) -> None:
    file = shared_data / "oc20" / "random1000100.traj"
    dataset = open_dataset(file)
    assert len(dataset) == 126
    assert dataset[0].energy == -57.74908337
    assert dataset[-1].energy == -60.58567902
    assert dataset[0].fixed.sum() == 17
    free = open_dataset(file, energy_key="free_energy")
    assert 0 < abs(free[3].energy - dataset[3].energy) < 0.01
    assert open_dataset(file, energy_key="")[0].energy is None


def test_trajectory_survives_pickling_for_workers(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "oc20" / "random1000163.traj")
    before = dataset[4].energy
    again = pickle.loads(pickle.dumps(dataset))
    assert again[4].energy == before


@pytest.mark.parametrize("ending", ["extxyz", "traj", "db"])
def test_everything_a_slab_has_is_kept(tmp_path: Path, ending: str) -> None:
    atoms = slab()
    atoms.info.update(charge=-1, spin=2)
    file = tmp_path / f"slab.{ending}"
    if ending == "db":
        with connect(file) as database:
            database.write(atoms, charge=-1, spin=2)
    else:
        ase.io.write(file, atoms)
    frame = open_dataset(file)[0]
    np.testing.assert_array_equal(frame.numbers, [29, 29, 1])
    np.testing.assert_allclose(frame.positions, atoms.positions)
    np.testing.assert_allclose(frame.cell, atoms.cell)
    assert frame.pbc == (True, True, False)
    assert frame.energy == -7.25
    np.testing.assert_allclose(frame.forces, np.arange(9.0).reshape(3, 3))
    np.testing.assert_allclose(frame.stress, [[0, 5, 4], [5, 1, 3], [4, 3, 2]])
    assert frame.fixed.tolist() == [True, False, False]
    assert (frame.charge, frame.spin) == (-1, 2)


@pytest.mark.parametrize("ending", ["extxyz", "traj", "db"])
def test_frames_without_labels(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"bare.{ending}"
    if ending == "db":
        with connect(file) as database:
            database.write(Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]]))
    else:
        ase.io.write(file, [Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]])] * 2)
    frame = open_dataset(file)[0]
    assert (frame.energy, frame.forces, frame.stress, frame.fixed) == (None, None, None, None)


@pytest.mark.parametrize(
    ("forces", "energy"),
    [("forces", "energy"), ("REF_forces", "REF_energy"), ("dft_forces", "dft_energy"), ("force", "Energy")],
)
def test_usual_names_are_found(tmp_path: Path, forces: str, energy: str) -> None:
    (tmp_path / "a.extxyz").write_text(xyz(forces, energy))
    frame = open_dataset(tmp_path / "a.extxyz")[0]
    assert frame.energy == -1.5
    assert frame.forces[1, 2] == -0.3


def test_names_that_disagree_must_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text(xyz(more="REF_energy=-2.5"))
    with pytest.raises(DataError, match="'energy' and 'REF_energy'; choose with energy_key="):
        open_dataset(tmp_path / "a.extxyz")[0]
    assert open_dataset(tmp_path / "a.extxyz", energy_key="REF_energy")[0].energy == -2.5
    assert open_dataset(tmp_path / "a.extxyz", energy_key="energy")[0].energy == -1.5
    with pytest.raises(DataError, match=r"no energy 'mp2'; its labels: .*REF_energy"):
        open_dataset(tmp_path / "a.extxyz", energy_key="mp2")[0]


def test_free_energy_alone_is_not_taken_for_the_energy(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text(xyz(energy="free_energy"))
    with pytest.raises(DataError, match="energy_key='free_energy'"):
        open_dataset(tmp_path / "a.extxyz")[0]
    assert open_dataset(tmp_path / "a.extxyz", energy_key="free_energy")[0].energy == -1.5


def test_given_units(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text(xyz())
    frame = open_dataset(tmp_path / "a.extxyz", units={"energy": "kcal/mol", "length": "nm"})[0]
    assert frame.energy == pytest.approx(-1.5 * KCAL_PER_MOL)
    assert frame.positions[1, 2] == 10.0
    assert frame.forces[0, 0] == pytest.approx(0.1 * KCAL_PER_MOL / 10)


def test_virial_becomes_stress(tmp_path: Path) -> None:
    lattice = (
        'Lattice="2 0 0 0 3 0 0 0 4" Properties=species:S:1:pos:R:3 virial="24 0 0 0 48 0 0 0 72" pbc="T T T"'
    )
    (tmp_path / "a.extxyz").write_text(f"1\n{lattice}\nCu 0 0 0\n")
    np.testing.assert_allclose(open_dataset(tmp_path / "a.extxyz")[0].stress, np.diag([-1.0, -2.0, -3.0]))


def test_partial_constraints_are_announced(tmp_path: Path) -> None:
    atoms = slab()
    atoms.set_constraint([FixCartesian(1, mask=(True, True, True)), FixBondLength(0, 1)])
    ase.io.write(tmp_path / "a.traj", atoms)
    with pytest.warns(UserWarning, match="FixBondLength"):
        frame = open_dataset(tmp_path / "a.traj")[0]
    assert frame.fixed.tolist() == [False, True, False]


def test_schnetpack_units_in_the_database(tmp_path: Path) -> None:
    with connect(tmp_path / "a.db") as database:
        database.metadata = {
            "_property_unit_dict": {"energy": "kcal/mol", "forces": "kcal/mol/Ang"},
            "_distance_unit": "Ang",
        }
        atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]])
        database.write(atoms, data={"energy": np.array([2.0]), "forces": np.ones((2, 3))})
    frame = open_dataset(tmp_path / "a.db")[0]
    assert frame.energy == pytest.approx(2 * KCAL_PER_MOL)
    assert frame.forces[0, 0] == pytest.approx(KCAL_PER_MOL)


GOOD = xyz()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + GOOD[:-30], "frame 1"),
        (GOOD + "2\ncomment\n", "frame 1: is truncated, 2 atoms were announced"),
        (GOOD + "two\ncomment\n", "frame 1: begins with 'two', expected the number of atoms"),
        (GOOD + "0\ncomment\n", "frame 1: has 0 atoms; remove the empty frame"),
        (GOOD.replace("O 0", "Qq 0"), "frame 0: unknown element"),
        (GOOD.replace("O 0", "X 0"), "frame 0: unknown element Z=0"),
        (GOOD.replace("-1.5", "nan"), "frame 0: the energy is not finite"),
        (GOOD.replace("-1.5", "1e999"), "frame 0: the energy is not finite"),
        (GOOD.replace("0.2", "nan"), "frame 0: a force is not finite"),
        (GOOD.replace("0.2", "zero"), "frame 0: cannot be read as extended xyz"),
        (GOOD.replace("-1.5", "low"), "frame 0: its energy is no number"),
        (GOOD.replace("H 0 0 1 -", "H 0 0 1e999 -"), "frame 0: a position is not finite"),
        (GOOD.replace("pbc", "charge=0.5 pbc"), "frame 0: its charge is 0.5, expected an integer"),
        (GOOD.replace("pbc", "spin=0 pbc"), "frame 0: its spin is 0"),
        (GOOD.replace('pbc="F F F"', 'pbc="T F F"'), "frame 0: repeats in a direction without a lattice"),
        ("\n\n", "has no frames"),
        ("5\ngdb 1\t157.7\nC 0 0 0 0\n" + "H 0 0 0 0\n" * 4, r"QM9's own xyz format"),
    ],
)
def test_bad_xyz(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.xyz"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        list(open_dataset(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_shape_of_forces(tmp_path: Path) -> None:
    text = xyz().replace("forces:R:3", "forces:R:2:tag:R:1")
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(DataError, match=r"forces have shape \(2, 2\)"):
        open_dataset(tmp_path / "a.xyz")[0]


class Trap:
    """Leaves a trace when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize("ending", ["traj", "db"])
@pytest.mark.parametrize("start", [b"", b"PickleTrajectory"])
def test_pickles_are_refused_unread(
    tmp_path: Path, ending: str, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"trap.{ending}").write_bytes(start + pickle.dumps(Trap()))
    with pytest.raises(DataError, match="is a pickle, which runs code"):
        open_dataset(tmp_path / f"trap.{ending}")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("ending", ["traj", "db"])
def test_damaged_containers(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    if ending == "db":
        with connect(file) as database:
            for _ in range(20):
                database.write(slab())
    else:
        ase.io.write(file, [slab()] * 20)
    content = file.read_bytes()
    for kept in (20, 200, len(content) // 2):
        file.write_bytes(content[:kept])
        with pytest.raises(DataError, match=r"damaged|is not an ASE") as caught:
            list(open_dataset(file))
        assert "\n" not in str(caught.value)
    file.write_text("no such thing, only words in a file")
    with pytest.raises(DataError, match="is not an ASE"):
        open_dataset(file)


def test_empty_containers(tmp_path: Path) -> None:
    with connect(tmp_path / "a.db") as database:
        database.write(slab())
        database.delete([1])
    with pytest.raises(DataError, match="has no rows"):
        open_dataset(tmp_path / "a.db")
    ase.io.write(tmp_path / "b.traj", Atoms())
    with pytest.raises(DataError, match="frame 0: has no atoms"):
        open_dataset(tmp_path / "b.traj")[0]
