"""rMD17, MD17, sGDML and padded files: real statistics, and every way such a file can be wrong."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.rmd17 import MOLECULES
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.units import BOHR, HARTREE, KCAL_PER_MOL

FORCE_RMS = {
    "aspirin": 29.4,
    "benzene": 20.9,
    "ethanol": 27.5,
    "malonaldehyde": 30.1,
    "naphthalene": 30.3,
    "salicylic": 30.1,
    "toluene": 28.7,
    "uracil": 31.6,
}
ENERGY_MEAN = {"aspirin": -406274.40, "benzene": -145431.32, "ethanol": -97076.12, "uracil": -259813.30}


def efrz(n_frames: int = 4, **changes: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    arrays = {
        "E": random.normal(size=(n_frames, 1)),
        "F": random.normal(size=(n_frames, 3, 3)),
        "R": random.normal(size=(n_frames, 3, 3)),
        "z": np.array([8, 1, 1], dtype=np.uint8),
    }
    arrays.update(changes)
    return arrays


def rmd17(n_frames: int = 6, **changes: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    arrays = {
        "nuclear_charges": np.array([8, 1, 1], dtype=np.uint8),
        "coords": random.normal(size=(n_frames, 3, 3)),
        "energies": random.normal(size=n_frames),
        "forces": random.normal(size=(n_frames, 3, 3)),
        "old_indices": np.arange(n_frames) * 7,
        "old_energies": random.normal(size=n_frames),
        "old_forces": random.normal(size=(n_frames, 3, 3)),
    }
    arrays.update(changes)
    return arrays


@pytest.mark.parametrize("molecule", sorted(FORCE_RMS))
def test_rmd17_statistics(shared_data: Path, molecule: str) -> None:
    dataset = open_dataset("rmd17", molecule, split=1, root=shared_data / "rmd17")
    frames = list(dataset)
    forces = np.array([frame.forces for frame in frames]) / KCAL_PER_MOL
    assert len(frames) == 2000
    assert np.sqrt((forces**2).mean()) == pytest.approx(FORCE_RMS[molecule], rel=0.01)
    if molecule in ENERGY_MEAN:
        energies = np.array([frame.energy for frame in frames]) / KCAL_PER_MOL
        assert energies.mean() == pytest.approx(ENERGY_MEAN[molecule], abs=0.3)
    assert dataset.metadata.level_of_theory == "PBE/def2-SVP"
    assert dataset.metadata.licence == "CC0-1.0"


def test_rmd17_says_what_its_frames_were_sampled_with(tmp_path: Path) -> None:
    arrays = rmd17()
    np.savez(tmp_path / "rmd17_ethanol.npz", **arrays)
    path = tmp_path / "rmd17_ethanol.npz"
    dataset = open_dataset("rmd17", path)
    energies = [frame.properties["sampling_energy"] for frame in dataset]
    assert energies == pytest.approx(arrays["old_energies"] * KCAL_PER_MOL)
    assert dataset.metadata.properties["sampling_energy"] == "eV"
    # the original labels are those of the dynamics
    assert "sampling_energy" not in open_dataset("rmd17", path, labels="original")[0].properties
    del arrays["old_energies"]
    np.savez(path, **arrays)
    assert "sampling_energy" not in open_dataset("rmd17", path)[0].properties


def test_rmd17_pair_keeps_the_published_split_apart(shared_data: Path) -> None:
    dataset = open_dataset("rmd17", "Salicylic acid", root=shared_data / "rmd17")
    train, test = dataset.metadata.splits["train"], dataset.metadata.splits["test"]
    old = np.array([frame.properties["old_index"] for frame in dataset])
    assert (len(train), len(test)) == (1000, 1000)
    assert not set(old[train]) & set(old[test])
    part = open_dataset("rmd17", "salicylic", split=1, part="test", root=shared_data / "rmd17")
    assert [frame.properties["old_index"] for frame in part] == list(old[test])


def test_rmd17_file_labels_and_checksum(shared_data: Path) -> None:
    file = shared_data / "rmd17" / "rmd17_ethanol_train_01.npz"
    listed = dict(line.split()[::-1] for line in (shared_data / "SHA256SUMS").read_text().splitlines())
    revised = open_dataset(file)
    original = open_dataset("rmd17", file, labels="original")
    expected = next(value for name, value in listed.items() if name.endswith(file.name))
    assert revised.metadata.sha256 == {file.name: expected}
    assert revised[0].energy == pytest.approx(-97079.92222179 * KCAL_PER_MOL, abs=1e-9)
    assert original[0].energy == pytest.approx(-97198.78429048 * KCAL_PER_MOL, abs=1e-9)
    assert original[0].forces[0, 0] == pytest.approx(-32.51094264 * KCAL_PER_MOL, abs=1e-9)
    assert original.metadata.level_of_theory == "PBE+vdW-TS"
    assert original.metadata.name != revised.metadata.name
    np.testing.assert_array_equal(original[5].positions, revised[5].positions)


def test_frames_are_copies(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "rmd17" / "rmd17_ethanol_train_01.npz")
    first = dataset[0].positions.copy()
    dataset[0].positions[:] = 0
    np.testing.assert_array_equal(dataset[0].positions, first)


def test_mask_selects_frames(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **rmd17(4))
    dataset = open_dataset(tmp_path / "a.npz")
    chosen = dataset[np.array([False, True, False, True])]
    assert [frame.properties["old_index"] for frame in chosen] == [7, 21]
    with pytest.raises(IndexError, match="mask"):
        dataset[np.array([True])]
    with pytest.raises(IndexError, match="frame 9 of a dataset of 4"):
        dataset[[0, 9]]


def archive(tmp_path: Path, n_frames: int = 6) -> Path:
    """Lay out the published archive with two splits."""
    (tmp_path / "rmd17" / "npz_data").mkdir(parents=True)
    (tmp_path / "rmd17" / "splits").mkdir()
    np.savez(tmp_path / "rmd17" / "npz_data" / "rmd17_ethanol.npz", **rmd17(n_frames))
    for number, (train, test) in enumerate([([3, 1], [0, 5]), ([0, 2], [4])], start=1):
        for part, indices in (("train", train), ("test", test)):
            table = tmp_path / "rmd17" / "splits" / f"index_{part}_{number:02d}.csv"
            table.write_text("".join(f"{index}\n" for index in indices))
    return tmp_path


def test_rmd17_archive_uses_the_published_tables(tmp_path: Path) -> None:
    root = archive(tmp_path)
    dataset = open_dataset("rmd17", "ethanol", root=root)
    assert {k: list(v) for k, v in dataset.metadata.splits.items()} == {
        "train_01": [3, 1],
        "test_01": [0, 5],
        "train_02": [0, 2],
        "test_02": [4],
    }
    second = open_dataset("rmd17", "ethanol", split=2, root=root)
    assert {k: list(v) for k, v in second.metadata.splits.items()} == {"train": [0, 2], "test": [4]}
    train = open_dataset("rmd17", "ethanol", split=1, part="train", root=root)
    assert [frame.properties["old_index"] for frame in train] == [21, 7]


def test_rmd17_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFPRETRAIN_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="ffpretrain data download rmd17"):
        open_dataset("rmd17", "ethanol")
    archive(tmp_path / "rmd17")
    assert len(open_dataset("rmd17", "ethanol")) == 6


def test_rmd17_split_table_beyond_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the whole archive file"):
        open_dataset("rmd17", "ethanol", root=archive(tmp_path, n_frames=5))


@pytest.mark.parametrize("text", ["1\n1\n", "1\n-2\n", "1\nx\n"])
def test_rmd17_split_table_damaged(tmp_path: Path, text: str) -> None:
    root = archive(tmp_path)
    (root / "rmd17" / "splits" / "index_train_01.csv").write_text(text)
    with pytest.raises(DataError, match=r"index_train_01\.csv"):
        open_dataset("rmd17", "ethanol", root=root)


def test_rmd17_parts_that_overlap_are_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        np.savez(tmp_path / f"rmd17_uracil_{part}_01.npz", **rmd17())
    with pytest.raises(DataError, match="shares frames"):
        open_dataset("rmd17", "uracil", root=tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": "revized"}, ConfigError, "did you mean 'revised'"),
        ({"split": 6}, ConfigError, "1 to 5"),
        ({"part": "val"}, ConfigError, "part='val'"),
        ({"part": "test"}, DataError, r"no split file index_test_01\.csv"),
    ],
)
def test_rmd17_options(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    np.savez(tmp_path / "rmd17_ethanol.npz", **rmd17())
    with pytest.raises(error, match=message):
        open_dataset("rmd17", tmp_path / "rmd17_ethanol.npz", **options)


def test_rmd17_one_part_is_not_the_other(tmp_path: Path) -> None:
    np.savez(tmp_path / "rmd17_ethanol_train_02.npz", **rmd17())
    with pytest.raises(DataError, match="is the train part of split 2"):
        open_dataset("rmd17", tmp_path / "rmd17_ethanol_train_02.npz", part="test")


def test_sgdml_ccsd_of_the_md17_page(shared_data: Path) -> None:
    file = shared_data / "sgdml" / "ethanol_ccsd_t-train.npz"
    dataset = open_dataset("md17", file)
    raw = np.load(file, allow_pickle=False)
    assert len(dataset) == 1000
    assert dataset.metadata.name == "md17-ethanol-ccsd-t"
    assert dataset.metadata.level_of_theory == "CCSD(T)/cc-pVTZ"
    energies = np.array([frame.energy for frame in dataset])
    np.testing.assert_allclose(energies, raw["E"][:, 0] * KCAL_PER_MOL, rtol=1e-14)
    np.testing.assert_allclose(dataset[7].forces, raw["F"][7] * KCAL_PER_MOL, rtol=1e-14)
    assert dataset[0].numbers.tolist() == [6, 6, 8, 1, 1, 1, 1, 1, 1]


def test_units_are_never_guessed(shared_data: Path) -> None:
    file = shared_data / "sgdml" / "ethanol_ccsd_t-train.npz"
    with pytest.raises(DataError, match="does not say its units"):
        open_dataset(file)
    given = open_dataset(file, units={"energy": "kcal/mol", "length": "angstrom"})
    assert given[3].energy == open_dataset("md17", file)[3].energy
    assert given.metadata.level_of_theory == "Psi4: CCSD(T), cc-pVTZ"


def test_qm7x_padding(shared_data: Path) -> None:
    dataset = open_dataset("qm7x", shared_data / "qm7x" / "qm7x_250_small.npz")
    sizes = np.array([len(frame) for frame in dataset])
    assert (len(dataset), sizes.min(), sizes.max()) == (2500, 4, 23)
    assert dataset[0].energy == -8891.92929
    for frame in dataset[:50]:
        assert (frame.numbers > 0).all()
        assert frame.forces.shape == frame.positions.shape == (len(frame), 3)
    assert dataset.metadata.level_of_theory == "PBE0+MBD"


def test_md17_by_name_finds_either_file_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "aspirin_dft.npz", **efrz())
    dataset = open_dataset("md17", "aspirin", root=tmp_path)
    assert dataset.metadata.name == "md17-aspirin"
    assert dataset.metadata.level_of_theory == "PBE+vdW-TS"
    with pytest.raises(DataError, match="ffpretrain data download md17-uracil"):
        open_dataset("md17", "uracil", root=tmp_path)


def test_md17_coupled_cluster_pair(tmp_path: Path) -> None:
    np.savez(tmp_path / "ethanol_ccsd_t-train.npz", **efrz(4))
    with pytest.raises(DataError, match="does not hold"):
        open_dataset("md17", "ethanol CCSD(T)", root=tmp_path)
    np.savez(tmp_path / "ethanol_ccsd_t-test.npz", **efrz(3))
    dataset = open_dataset("md17", "ethanol CCSD(T)", root=tmp_path)
    assert {k: list(v) for k, v in dataset.metadata.splits.items()} == {
        "train": [0, 1, 2, 3],
        "test": [4, 5, 6],
    }


def test_units_in_the_file_are_used(tmp_path: Path) -> None:
    arrays = efrz(r_unit=np.array("bohr"), e_unit=np.array(b"Hartree"))
    np.savez(tmp_path / "a.npz", **arrays)
    frame = open_dataset(tmp_path / "a.npz")[1]
    assert frame.energy == pytest.approx(arrays["E"][1, 0] * HARTREE, rel=1e-14)
    np.testing.assert_allclose(frame.positions, arrays["R"][1] * BOHR, rtol=1e-14)
    np.testing.assert_allclose(frame.forces, arrays["F"][1] * HARTREE / BOHR, rtol=1e-14)
    with pytest.raises(DataError, match="says its units are hartree and bohr"):
        open_dataset("md17", tmp_path / "a.npz")
    with pytest.raises(DataError, match="says its units"):
        open_dataset(tmp_path / "a.npz", units={"energy": "ev", "length": "angstrom"})


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        ({"energy": "ev"}, ConfigError, "lacks 'length'"),
        ({"energy": "ev", "length": "angstrom", "charge": "e"}, ConfigError, "no quantity 'charge'"),
        ({"energy": "evolt", "length": "angstrom"}, DataError, "unknown energy unit"),
        ({"energy": "ev", "length": "furlong"}, DataError, "unknown length unit"),
        ({"energy": "ev", "length": "angstrom", "force": "newton"}, DataError, "force unit"),
    ],
)
def test_wrong_units(tmp_path: Path, units: dict[str, str], error: type[Exception], message: str) -> None:
    np.savez(tmp_path / "a.npz", **efrz())
    with pytest.raises(error, match=message):
        open_dataset(tmp_path / "a.npz", units=units)


def test_force_unit_of_its_own(tmp_path: Path) -> None:
    arrays = efrz()
    np.savez(tmp_path / "a.npz", **arrays)
    units = {"energy": "hartree", "length": "angstrom", "force": "hartree/bohr"}
    frame = open_dataset(tmp_path / "a.npz", units=units)[0]
    np.testing.assert_allclose(frame.forces, arrays["F"][0] * HARTREE / BOHR, rtol=1e-14)


def test_lattice_orientation_is_asked_for(tmp_path: Path) -> None:
    cell = np.array([[5.0, 0, 0], [1.0, 6.0, 0], [0, 0, 7.0]])
    units = {"energy": "ev", "length": "angstrom"}
    np.savez(tmp_path / "tilted.npz", **efrz(lattice=cell))
    with pytest.raises(DataError, match="lattice='rows' or 'columns'"):
        open_dataset(tmp_path / "tilted.npz", units=units)
    rows = open_dataset(tmp_path / "tilted.npz", units=units, lattice="rows")[0]
    columns = open_dataset(tmp_path / "tilted.npz", units=units, lattice="columns")[0]
    np.testing.assert_array_equal(rows.cell, cell)
    np.testing.assert_array_equal(columns.cell, cell.T)
    assert rows.pbc == (True, True, True)
    np.savez(tmp_path / "box.npz", **efrz(lattice=np.diag([5.0, 6.0, 7.0])))
    assert open_dataset(tmp_path / "box.npz", units=units)[0].cell[2, 2] == 7.0


def changed(key: str, at: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    arrays = rmd17()
    array = arrays[key].copy()
    array[at] = value
    return {**arrays, key: array}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (changed("energies", (3,), np.nan), "frame 3: the energy is not finite"),
        (changed("forces", (2, 0, 1), np.inf), "frame 2: a force is not finite"),
        (changed("coords", (4, 2, 2), np.nan), "frame 4: a position is not finite"),
        (rmd17(forces=np.zeros((6, 2, 3))), r"forces have shape \(6, 2, 3\)"),
        (rmd17(energies=np.zeros(5)), r"energies have shape \(5,\)"),
        (rmd17(coords=np.zeros((6, 3))), r"positions have shape \(6, 3\)"),
        (rmd17(coords=np.zeros((0, 3, 3))), "has no frames"),
        (rmd17(nuclear_charges=np.array([8, 1])), r"atomic numbers have shape \(2,\)"),
        (rmd17(nuclear_charges=np.array([8, 1, 119])), "unknown element Z=119"),
        (rmd17(nuclear_charges=np.array([8, 1, 0])), "unknown element Z=0"),
        (rmd17(nuclear_charges=np.array([8.0, 1.0, 1.0])), "expected integers"),
        (rmd17(nuclear_charges=np.zeros(0, int), coords=np.zeros((6, 0, 3))), "has no atoms"),
        (rmd17(energies=np.array(["low"] * 6)), "'energies' is <U3, expected numbers"),
        (rmd17(old_indices=np.arange(4)), "'old_index' has 4 entries"),
        ({"nuclear_charges": np.array([1]), "coords": np.zeros((1, 1, 3))}, "fit no known layout"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    file = tmp_path / "bad.npz"
    np.savez(file, **arrays)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": np.array([[8, 1, 1], [8, 1, 0], [0, 0, 0], [1, 1, 0]])}, "frame 2: has no atoms"),
        ({"z": np.array([[8, 1, 1], [8, -1, 0], [1, 0, 0], [1, 1, 0]])}, "frame 1: unknown element Z=-1"),
        ({"R": np.array(["a"])}, "expected numbers"),
    ],
)
def test_bad_padded_arrays(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **efrz(**changes))
    with pytest.raises(DataError, match=message):
        open_dataset("qm7x", tmp_path / "bad.npz")


def test_nan_in_padding_is_no_error(tmp_path: Path) -> None:
    arrays = efrz(z=np.array([[8, 1, 0]] * 4))
    arrays["R"][:, 2] = np.nan
    np.savez(tmp_path / "a.npz", **arrays)
    assert len(open_dataset("qm7x", tmp_path / "a.npz")[0]) == 2


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.98])
def test_truncated_npz(tmp_path: Path, kept: float) -> None:
    file = tmp_path / "rmd17_ethanol_train_01.npz"
    np.savez(file, **rmd17(40))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"(truncated or damaged|not an \.npz archive).*again"):
        open_dataset(file)


def test_flipped_bits_in_npz(tmp_path: Path) -> None:
    file = tmp_path / "rmd17_ethanol_train_01.npz"
    np.savez(file, **rmd17(40))
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as listing:
        start = listing.getinfo("coords.npy").header_offset
    content[start + 400] ^= 0xFF
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"'coords'.*damaged"):
        open_dataset(file)


class Trap:
    """Leaves a trace when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


def test_pickles_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", **rmd17(energies=np.array([Trap()] * 6, dtype=object)))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(DataError, match="pickled Python objects"):
            open_dataset("rmd17", tmp_path / name)
    assert not (tmp_path / "unpickled").exists()
    pickle.loads((tmp_path / "b.npz").read_bytes())
    assert (tmp_path / "unpickled").exists(), "the trap itself must work, or the test proves nothing"


def test_not_an_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text(json.dumps({"a": 1}))
    with pytest.raises(DataError, match=r"not an \.npz archive"):
        open_dataset(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(DataError, match=r"single \.npy array"):
        open_dataset(tmp_path / "b.npz")


def test_unreadable_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        open_dataset("rmd17", tmp_path)
    assert len(MOLECULES) == 10
