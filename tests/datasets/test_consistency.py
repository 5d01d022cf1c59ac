"""The check of energies against forces, on real labels and on labels damaged on purpose."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ffpretrain.datasets import InMemoryDataset, open_dataset
from ffpretrain.datasets.consistency import check_labels
from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.errors import DataError
from ffpretrain.units import BOHR, HARTREE, KCAL_PER_MOL

OPEN: dict[str, Callable[[Path], Dataset]] = {
    "rmd17-ethanol": lambda data: open_dataset("rmd17", "ethanol", root=data / "rmd17"),
    "rmd17-aspirin": lambda data: open_dataset("rmd17", "aspirin", root=data / "rmd17"),
    "sgdml": lambda data: open_dataset("md17", data / "sgdml" / "ethanol_ccsd_t-train.npz"),
    "3bpa": lambda data: open_dataset(data / "3bpa" / "train_300K.xyz"),
}


def damaged(dataset: Dataset, energy: float = 1.0, forces: float = 1.0, length: float = 1.0) -> Dataset:
    """Return the frames with every label times a factor, as a wrong unit would have it."""
    frames = [
        replace(f, energy=f.energy * energy, forces=f.forces * forces, positions=f.positions * length)
        for f in dataset
    ]
    return InMemoryDataset(frames, dataset.metadata)


@pytest.mark.parametrize("labels", ["revised", "original"])
@pytest.mark.parametrize(
    "molecule",
    ["aspirin", "benzene", "ethanol", "malonaldehyde", "naphthalene", "salicylic", "toluene", "uracil"],
)
def test_rmd17_slope_is_one(shared_data: Path, molecule: str, labels: str) -> None:
    report = check_labels(open_dataset("rmd17", molecule, root=shared_data / "rmd17", labels=labels))
    assert report.verdict == "consistent"
    assert report.slope == pytest.approx(1.0, abs=0.03)
    assert report.correlation > 0.97
    assert report.n_pairs == 300


@pytest.mark.parametrize(("name", "within"), [("sgdml", 0.02), ("3bpa", 0.15)])
def test_other_molecules(shared_data: Path, name: str, within: float) -> None:
    report = check_labels(OPEN[name](shared_data))
    assert report.verdict == "consistent"
    assert report.slope == pytest.approx(1.0, abs=within)


def test_many_molecules_in_one_file(shared_data: Path) -> None:
    report = check_labels(open_dataset("qm7x", shared_data / "qm7x" / "qm7x_250_small.npz"))
    assert report.verdict == "consistent"
    assert report.slope == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", ["random1000100", "random1000126", "random1000164", "random1000194"])
def test_periodic_slabs(shared_data: Path, name: str) -> None:
    # in two of these files atoms jump across the cell between frames
    report = check_labels(open_dataset(shared_data / "oc20" / f"{name}.traj"))
    assert report.verdict == "consistent"
    assert report.slope == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", sorted(OPEN))
@pytest.mark.parametrize(
    ("damage", "verdict", "cause", "slope"),
    [
        ({"energy": 1000.0}, "wrong scale", "energies are in meV", 1000),
        ({"forces": BOHR / HARTREE}, "wrong scale", "forces are in Hartree/Bohr", 51.42),
        ({"forces": -1.0}, "wrong sign", "wrong sign", -1),
        ({"forces": -BOHR / HARTREE}, "wrong sign", "forces are in Hartree/Bohr", -51.42),
        ({"energy": 1 / KCAL_PER_MOL}, "wrong scale", "energies are in kcal/mol", 23.06),
        ({"energy": 1 / HARTREE}, "wrong scale", "energies are in Hartree", 0.03675),
        ({"energy": 3.3}, "wrong scale", "no known unit", 3.3),
        ({"length": BOHR, "forces": 1 / BOHR}, "wrong lengths", "were in Å but were read as Bohr", None),
        ({"length": 1 / BOHR, "forces": BOHR}, "wrong lengths", "are in Bohr but were read as Å", None),
    ],
)
def test_damage_is_found_and_named(
    shared_data: Path, name: str, damage: dict[str, float], verdict: str, cause: str, slope: float | None
) -> None:
    report = check_labels(damaged(OPEN[name](shared_data), **damage))
    assert (report.verdict, report.ok) == (verdict, False)
    assert cause in report.message
    assert "\n" not in report.message
    if slope is not None:
        assert report.slope == pytest.approx(slope, rel=0.15)


@pytest.mark.parametrize("name", sorted(OPEN))
def test_shuffled_energies_are_found(shared_data: Path, name: str) -> None:
    dataset = OPEN[name](shared_data)
    order = np.random.default_rng(0).permutation(len(dataset))
    frames = [replace(f, energy=dataset[int(j)].energy) for f, j in zip(dataset, order, strict=True)]
    report = check_labels(InMemoryDataset(frames, dataset.metadata))
    assert (report.verdict, report.ok) == ("unrelated", False)


def test_few_far_frames_are_not_judged(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "rmd17" / "rmd17_aspirin_train_01.npz")[:20]
    report = check_labels(dataset)
    assert (report.verdict, report.ok) == ("not enough near pairs", True)
    assert np.isnan(report.slope)


def test_frames_without_labels(shared_data: Path) -> None:
    report = check_labels(open_dataset(shared_data / "3bpa" / "iso_atoms.xyz"))
    assert (report.verdict, report.n_pairs) == ("no labels", 0)


def harmonic(n_frames: int = 40, seed: int = 0, turn: bool = True) -> Dataset:
    """Return a water molecule on springs, thrown about and turned at random."""
    random = np.random.default_rng(seed)
    rest = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    frames = []
    for _ in range(n_frames):
        step = random.normal(scale=0.03, size=(3, 3))
        rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]
        rotation *= np.sign(np.linalg.det(rotation)) if turn else 1
        positions = rest + step
        bonds = [(0, 1), (0, 2), (1, 2)]
        energy, forces = 0.0, np.zeros((3, 3))
        for i, j in bonds:
            vector = positions[i] - positions[j]
            stretch = np.linalg.norm(vector) - np.linalg.norm(rest[i] - rest[j])
            energy += 10 * stretch**2
            pull = -20 * stretch * vector / np.linalg.norm(vector)
            forces[i] += pull
            forces[j] -= pull
        frames.append(
            Frame(
                np.array([8, 1, 1]),
                positions @ rotation + random.normal(size=3),
                energy=energy,
                forces=forces @ rotation,
            )
        )
    return InMemoryDataset(frames, DatasetMetadata(name="springs"))


def test_rotated_frames_are_turned_onto_each_other() -> None:
    report = check_labels(harmonic())
    assert report.slope == pytest.approx(1.0, abs=0.01)
    assert report.correlation > 0.999


def test_energy_per_atom_is_named() -> None:
    report = check_labels(damaged(harmonic(), energy=1 / 3))
    assert "per atom (of 3 atoms)" in report.message


def test_constant_energies() -> None:
    report = check_labels(damaged(harmonic(), energy=0.0))
    assert report.verdict == "unrelated"
    report = check_labels(damaged(harmonic(), forces=0.0))
    assert report.verdict == "unrelated"


def test_sample_is_seeded() -> None:
    many = InMemoryDataset(list(harmonic(60)) * 40, DatasetMetadata(name="many"))
    assert check_labels(many, seed=1) == check_labels(many, seed=1)


def test_too_few_pairs_asked_for() -> None:
    with pytest.raises(DataError, match="at least 10"):
        check_labels(harmonic(), max_pairs=3)
