"""Values that are finite and cannot be true: refused where a file is read, with file and frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from ffpretrain.cli import main
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.structures import read_structure
from ffpretrain.errors import DataError


@pytest.mark.parametrize(
    ("key", "message"),
    [("E", "the energy is beyond"), ("F", "a force is beyond"), ("R", "a position is beyond")],
)
def test_one_absurd_frame_of_an_npz(key: str, message: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "E": rng.normal(size=5),
        "F": rng.normal(size=(5, 3, 3)),
        "R": rng.normal(size=(5, 3, 3)),
        "z": np.array([8, 1, 1]),
    }
    arrays[key][3] = 1e200
    path = tmp_path / "water.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=rf"water\.npz.*3.*{message}"):
        list(open_dataset(path, units={"energy": "eV", "length": "angstrom"}))


def test_absurd_coordinates_of_a_structure(tmp_path: Path) -> None:
    path = tmp_path / "far.xyz"
    write(path, Atoms("OH", [[0, 0, 0], [1e30, 0, 0]]))
    with pytest.raises(DataError, match=r"far\.xyz: a position is beyond 1e\+06"):
        read_structure(path)


def test_an_unknown_symbol_is_named(tmp_path: Path) -> None:
    path = tmp_path / "what.xyz"
    path.write_text("1\n\nXx 0 0 0\n")
    with pytest.raises(DataError, match="unknown element 'Xx'; use symbols"):
        read_structure(path)


def test_a_run_without_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["md", "ndem-ethanol", "--time", "1e300", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert "would never end" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_warnings_are_one_line_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "water.xyz"
    write(path, Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]))
    with pytest.raises(SystemExit, match="0"):
        main(["md", "ndem-ethanol", str(path), "--steps", "1", "--out", str(tmp_path / "run"), "--json"])
    warned = [line for line in capsys.readouterr().err.splitlines() if "H2O is not what" in line]
    assert len(warned) == 1
    assert warned[0].startswith("warning: ")
