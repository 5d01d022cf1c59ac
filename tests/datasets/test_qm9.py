"""QM9 from its array file and from the original archive."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.qm9 import PROPERTY_UNITS, parse_qm9_xyz, read_uncharacterized
from ffpretrain.errors import DataError
from ffpretrain.units import HARTREE

METHANE_LIKE = (
    "2\n"
    "gdb 17\t157.7\t157.7\t157.7\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.36\t0.044\t"
    "-40.47\t-40.46\t-40.45\t-40.49\t6.4\n"
    "C\t-0.0126981359\t 1.0858041578\t 2.1997*^-6\t-0.535689\n"
    "H\t 0.002150416\t-6.0313*^-3\t 0.0019761204\t 0.133921\n"
    "1341.307\t1341.3284\n"
    "C\tC\t\n"
    "InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4\n"
)


def flat(**changes: Any) -> dict[str, np.ndarray]:
    """Return two molecules, CH and OHH, in the array layout."""
    arrays: dict[str, np.ndarray] = {
        "index": np.array([1, 2], dtype=np.int32),
        "n_atoms": np.array([2, 3], dtype=np.uint8),
        "Z": np.array([6, 1, 8, 1, 1], dtype=np.uint8),
        "R": np.arange(15, dtype=np.float32).reshape(5, 3),
        "uncharacterized": np.array([True, False]),
        **{name: np.array([1.5, -2.5]) for name in PROPERTY_UNITS},
    }
    arrays.update(changes)
    return arrays


def test_statistics_of_all_molecules(shared_data: Path) -> None:
    dataset = open_dataset("qm9", shared_data / "qm9" / "qm9.npz", include_uncharacterized=True)
    assert len(dataset) == 133_885
    means = {name: dataset.properties[name].mean() for name in ("mu", "alpha", "gap", "U0")}
    assert means == pytest.approx({"mu": 2.7060, "alpha": 75.191, "gap": 0.25110, "U0": -411.544}, rel=1e-4)
    assert dataset.metadata.properties["mu"] == "D"
    assert dataset.metadata.level_of_theory == "B3LYP/6-31G(2df,p)"


def test_uncharacterized_are_left_out(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "qm9" / "qm9.npz")
    assert len(dataset) == 133_885 - 3_054
    frame = dataset[0]
    assert frame.energy == pytest.approx(-40.47893 * HARTREE, abs=1e-9)
    assert frame.forces is None
    assert frame.numbers.tolist() == [6, 1, 1, 1, 1]
    assert set(frame.properties) == {"index", *PROPERTY_UNITS}
    assert dataset[-1].properties["index"] == 133_885


def test_original_archive_agrees_with_the_arrays(shared_data: Path) -> None:
    path = shared_data / "qm9" / "dsgdb9nsd_first2000.xyz.tar.bz2"
    archive = open_dataset(path, include_uncharacterized=True)
    arrays = open_dataset("qm9", shared_data / "qm9" / "qm9.npz", include_uncharacterized=True)
    assert len(archive) == 2000
    for one, other in zip(archive, arrays[:2000], strict=True):
        assert dict(one.properties) == dict(other.properties)
        np.testing.assert_array_equal(one.numbers, other.numbers)
        np.testing.assert_allclose(one.positions, other.positions, atol=3e-7)
    assert archive[211].positions[0, 0] == 2.1997e-6


def test_archive_needs_the_list_of_molecules_to_leave_out(shared_data: Path) -> None:
    with pytest.raises(DataError, match=r"uncharacterized\.txt.*include_uncharacterized=True"):
        open_dataset(shared_data / "qm9" / "dsgdb9nsd_first2000.xyz.tar.bz2")


def uncharacterized_list(folder: Path, first: int = 1, count: int = 3054) -> Path:
    rows = [f"   {number}\tCCO\tC[C]O\tCCO\n" for number in range(first, first + count)]
    file = folder / "uncharacterized.txt"
    file.write_text("".join(["====\n"] * 9 + rows + [f"{count} compounds\n"]))
    return file


def test_list_beside_a_folder_of_files(tmp_path: Path) -> None:
    for number in (17, 4000):
        text = METHANE_LIKE.replace("gdb 17", f"gdb {number}")
        (tmp_path / f"dsgdb9nsd_{number:06d}.xyz").write_text(text)
    uncharacterized_list(tmp_path)
    dataset = open_dataset("qm9", tmp_path)
    assert [frame.properties["index"] for frame in dataset] == [4000]
    both = open_dataset("qm9", tmp_path, include_uncharacterized=True)
    assert [frame.properties["index"] for frame in both] == [17, 4000]


def test_short_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lists 3000 molecules, expected 3054"):
        read_uncharacterized(uncharacterized_list(tmp_path, count=3000))


def test_exponents() -> None:
    index, numbers, positions, values = parse_qm9_xyz(METHANE_LIKE, "here")
    assert (index, numbers.tolist(), len(values)) == (17, [6, 1], 15)
    assert positions[0, 2] == 2.1997e-6
    assert positions[1, 1] == -6.0313e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (METHANE_LIKE[:150], "is truncated"),
        (METHANE_LIKE.replace("gdb 17", "xyz 17"), "not 'gdb'"),
        (METHANE_LIKE.replace("C\t-0", "Qq\t-0"), "unknown element 'Qq'"),
        (METHANE_LIKE.replace("0.044", "abc"), "is truncated or not in QM9's format"),
        ("0\n" + METHANE_LIKE[2:], "is truncated"),
        ("", "is truncated"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_qm9_xyz(text, "archive dsgdb9nsd_000017.xyz")
    assert "dsgdb9nsd_000017.xyz" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"U0": np.array([1.0, np.nan])}, "molecule 2: 'U0' is not finite"),
        ({"Z": np.array([6, 1, 8, 200, 1])}, "molecule 2: unknown element"),
        ({"R": np.full((5, 3), np.inf)}, "molecule 1: a position is not finite"),
        ({"n_atoms": np.array([2, 2])}, "n_atoms asks for 4"),
        ({"n_atoms": np.array([0, 5])}, "molecule 1: has no atoms"),
        ({"mu": np.zeros(3)}, "'mu' has shape"),
    ],
)
def test_bad_arrays(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "qm9.npz", **flat(**changes))
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "qm9.npz")


def test_array_layout(tmp_path: Path) -> None:
    np.savez(tmp_path / "qm9.npz", **flat())
    assert [frame.numbers.tolist() for frame in open_dataset(tmp_path / "qm9.npz")] == [[8, 1, 1]]
    np.savez(tmp_path / "qm9.npz", **{k: v for k, v in flat().items() if k != "uncharacterized"})
    with pytest.raises(DataError, match="no array 'uncharacterized'"):
        open_dataset(tmp_path / "qm9.npz")


def test_truncated_archive(tmp_path: Path) -> None:
    member = tmp_path / "dsgdb9nsd_000017.xyz"
    member.write_text(METHANE_LIKE)
    archive = tmp_path / "some.xyz.tar.bz2"
    with tarfile.open(archive, "w:bz2") as content:
        content.add(member, member.name)
    assert len(open_dataset(archive, include_uncharacterized=True)) == 1
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match="truncated or no tar archive"):
        open_dataset(archive, include_uncharacterized=True)


def test_cache_without_qm9(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFPRETRAIN_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="ffpretrain data download qm9"):
        open_dataset("qm9")
