"""What ``landscape`` says of its input and its numbers, and what it leaves in its folder."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms

from ffpretrain.cli import main
from ffpretrain.md import landscape
from ffpretrain.md.landscapes import Axis, Geometries, Landscape, roughness
from ffpretrain.md.landscapes.words import describe
from ffpretrain.md.unfamiliar import UnfamiliarInputWarning


def command(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(["landscape", *map(str, words)])
    return caught.value.code


def test_an_unfamiliar_molecule_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ase.io.write(tmp_path / "methanol.xyz", ase.build.molecule("CH3OH"))
    words = ("ndem-ethanol", "--structure", tmp_path / "methanol.xyz", "--along", "modes 0", "--points", 5)
    assert command(*words, "--out", tmp_path / "drawn") == 0
    error = capsys.readouterr().err
    assert error.count("CH4O is not what the model was trained on") == 1
    assert error.count("warning") == 1


def test_the_molecule_of_the_training_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfamiliarInputWarning)
        landscape("ndem-ethanol", points=3)


@pytest.mark.parametrize(
    "grid",
    [
        {"points": 5, "atoms": ase.build.molecule("CH3OH")},
        {"points": 9, "extent": 0.3},
        {"scan": ["dihedral 1 0 2 8 -180 180 9"]},
    ],
)
@pytest.mark.filterwarnings("ignore:.*not what the model was trained on")
def test_right_forces_are_not_called_wrong_on_a_coarse_grid(grid: dict[str, Any]) -> None:
    (found,) = landscape("ndem-ethanol", **grid)
    said = describe([found], "kcal/mol")[0]
    assert "too coarse to tell" in said or "says nothing against the forces" in said


def along_x(x: Any, energy: Any, force: Any) -> Landscape:
    """Return an atom that moves along x, with energies and forces given."""
    positions, forces = np.zeros((2, len(x), 1, 3))
    positions[:, 0, 0], forces[:, 0, 0] = x, force
    grid = Geometries(Atoms("H", [[0, 0, 0]]), (Axis("x", "Å", x),), positions, "scan", "")
    found = Landscape(grid, "model", energy, forces)
    return replace(found, roughness=roughness(found))


def test_a_wave_between_few_points_is_too_coarse_to_tell() -> None:
    x = np.linspace(-1.0, 1.0, 7)
    found = along_x(x, np.cos(8 * x + 0.3), 8 * np.sin(8 * x + 0.3))
    rough = found.roughness
    assert rough["force_consistency"] > 3 * rough["difference_error"]
    assert "too coarse to tell" in describe([found], "eV")[0]


def test_wrong_forces_are_called_wrong_on_a_grid_that_has_settled() -> None:
    (found,) = landscape("ndem-ethanol", points=13, extent=0.03)
    rough = found.roughness
    assert rough["difference_error_coarse"] == pytest.approx(4 * rough["difference_error"], rel=0.1)
    assert "says nothing against the forces" in describe([found], "eV")[0]
    wrong = replace(found, forces=0.95 * found.forces)
    wrong = replace(wrong, roughness=roughness(wrong))
    assert "the grid's spacing explains about" in describe([wrong], "eV")[0]


def test_differences_that_are_exact_leave_no_doubt_of_wrong_forces() -> None:
    x = np.linspace(-1.0, 1.0, 11)
    assert "explains about" in describe([along_x(x, x**2, -2 * x + 0.5)], "eV")[0]


@pytest.mark.parametrize(
    "words",
    [
        ["--scan", "bond 0 99 1 2 3"],
        ["--along", "spiral"],
        ["--unit", "hartree"],
        ["--along", "trajectory missing.traj"],
    ],
)
def test_bad_input_leaves_no_folder(words: list[str], tmp_path: Path) -> None:
    assert command("ndem-ethanol", *words, "--out", tmp_path / "new" / "drawn") == 2
    assert list(tmp_path.iterdir()) == []


def test_bad_input_of_a_free_energy_leaves_no_folder(tmp_path: Path) -> None:
    words = ("--free-energy", tmp_path / "missing.traj", "--scan", "bond 0 1")
    assert command(*words, "--out", tmp_path / "drawn") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_landscape_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("ndem-ethanol", "--points", 3, "--out", tmp_path / "drawn")
    assert command(*words, "emt") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}
    assert {"landscape-0.npz", "landscape-1.npz"} <= before.keys()
    capsys.readouterr()
    assert command(*words) == 2
    assert "an earlier landscape is here; replace it (--overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()} == before
    assert command(*words, "--overwrite") == 0
    assert [path.name for path in (tmp_path / "drawn").glob("*.npz")] == ["landscape.npz"]
