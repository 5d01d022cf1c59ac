"""Writing datasets, and summing them up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ffpretrain.datasets import InMemoryDataset, open_dataset
from ffpretrain.datasets.convert import write_dataset
from ffpretrain.datasets.frames import Dataset, DatasetMetadata, Frame
from ffpretrain.datasets.summary import describe
from ffpretrain.errors import DataError
from ffpretrain.units import KCAL_PER_MOL


def frames() -> Dataset:
    random = np.random.default_rng(0)
    water = Frame(
        numbers=np.array([8, 1, 1]),
        positions=random.normal(size=(3, 3)),
        energy=-76.123456789,
        forces=random.normal(size=(3, 3)),
        charge=-1,
        spin=2,
        properties={"dipole": 1.25},
    )
    copper = Frame(
        numbers=np.array([29, 29]),
        positions=random.normal(size=(2, 3)),
        cell=np.diag([3.0, 4.0, 5.0]),
        pbc=(True, False, True),
        energy=-5.0,
        forces=random.normal(size=(2, 3)),
        stress=np.diag([0.1, 0.2, 0.3]),
        fixed=np.array([True, False]),
        properties={"dipole": 0.5},
    )
    metadata = DatasetMetadata(name="two", properties={"dipole": "D"}, level_of_theory="PBE")
    return InMemoryDataset([water, copper, replace(water, energy=None, forces=None)], metadata)


@pytest.mark.parametrize(("ending", "tolerance"), [("h5", 0.0), ("extxyz", 1e-8)])
def test_everything_comes_back(tmp_path: Path, ending: str, tolerance: float) -> None:
    target = tmp_path / f"two.{ending}"
    seen: list[int] = []
    write_dataset(frames(), target, progress=seen.append)
    assert seen == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    for one, other in zip(frames(), open_dataset(target), strict=True):
        np.testing.assert_array_equal(one.numbers, other.numbers)
        np.testing.assert_allclose(other.positions, one.positions, atol=tolerance, rtol=0)
        assert (one.pbc, one.charge, one.spin, one.energy) == (
            other.pbc,
            other.charge,
            other.spin,
            other.energy,
        )
        for name in ("cell", "forces", "stress", "fixed"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                np.testing.assert_allclose(theirs, mine, atol=tolerance, rtol=0, err_msg=name)


def test_store_keeps_metadata_and_properties(tmp_path: Path) -> None:
    write_dataset(frames(), tmp_path / "two.h5")
    again = open_dataset(tmp_path / "two.h5")
    assert again.metadata.level_of_theory == "PBE"
    assert again.metadata.properties == {"dipole": "D"}
    assert [frame.properties["dipole"] for frame in again] == [1.25, 0.5, 1.25]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="change the ending"):
        write_dataset(frames(), tmp_path / "two.pdb")
    write_dataset(frames(), tmp_path / "two.extxyz")
    before = (tmp_path / "two.extxyz").read_bytes()
    with pytest.raises(DataError, match="exists"):
        write_dataset(frames()[:1], tmp_path / "two.extxyz")
    assert (tmp_path / "two.extxyz").read_bytes() == before
    write_dataset(frames()[:1], tmp_path / "two.extxyz", overwrite=True)
    assert len(open_dataset(tmp_path / "two.extxyz")) == 1


class Broken(Dataset):
    metadata = DatasetMetadata(name="broken")

    def __len__(self) -> int:
        return 5

    def _frame(self, index: int) -> Frame:
        if index == 3:
            raise DataError("frame 3: is damaged")
        return frames()[0]


@pytest.mark.parametrize("ending", ["h5", "extxyz"])
def test_nothing_half_written(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DataError, match="frame 3: is damaged"):
        write_dataset(Broken(), tmp_path / f"a.{ending}")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for ending in ("h5", "extxyz"):
        with pytest.raises(DataError, match=r"file"):
            write_dataset(frames(), tmp_path / "file" / f"a.{ending}")


def test_summary_of_a_mixture() -> None:
    summary = describe(frames())
    assert (summary["frames"], summary["compositions"]) == (3, 2)
    assert summary["atoms"] == {"smallest": 2, "largest": 3}
    assert summary["elements"] == ["Cu", "H", "O"]
    assert summary["most_common_composition"] == "H2O"
    assert summary["energy"]["frames"] == 2
    assert summary["energy"]["mean (eV)"] == pytest.approx((-76.123456789 - 5) / 2)
    assert (summary["charges"], summary["spins"]) == ([-1, 0], [1, 2])
    assert (
        summary["periodic_frames"],
        summary["frames_with_stress"],
        summary["frames_with_fixed_atoms"],
    ) == (1, 1, 1)
    squares = np.concatenate([frame.forces.ravel() ** 2 for frame in frames()[:2]])
    assert summary["forces"]["component RMS (eV/Å)"] == pytest.approx(np.sqrt(squares.mean()))


def test_summary_of_rmd17(shared_data: Path) -> None:
    summary = describe(open_dataset("rmd17", "uracil", split=1, root=shared_data / "rmd17"))
    assert summary["most_common_composition"] == "C4H4N2O2"
    assert summary["forces"]["component RMS (kcal/mol/Å)"] == pytest.approx(31.6, rel=0.01)
    assert summary["energy"]["mean (kcal/mol)"] == pytest.approx(-259813.30, abs=0.3)
    assert summary["energy"]["mean (eV)"] == pytest.approx(-259813.30 * KCAL_PER_MOL, abs=0.02)
    assert summary["splits"] == {"train": 1000, "test": 1000}
