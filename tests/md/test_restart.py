"""Runs that are interrupted and continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms

from ffpretrain.artifacts import make_card
from ffpretrain.errors import DataError
from ffpretrain.md import simulate
from ffpretrain.md.integrators import ENSEMBLES
from ffpretrain.md.output import rows
from ffpretrain.md.stability import SimulationError, StabilityCheck
from ffpretrain.potential import Potential

Build = Callable[..., Potential]
FILES = ("trajectory.traj", "log.csv", "restart.npz", "last_frame.extxyz", "md.json")


def same(one: Atoms, other: Atoms) -> bool:
    return np.array_equal(one.positions, other.positions) and np.array_equal(
        one.get_momenta(), other.get_momenta()
    )


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("format", ["traj", "extxyz"])
def test_a_continued_run_equals_an_uninterrupted_one(
    potential: Potential, ethanol: Atoms, tmp_path: Path, ensemble: str, format: str
) -> None:
    options: dict[str, Any] = {
        "ensemble": ensemble,
        "temperature": 30.0,
        "timestep": 0.25,
        "interval": 3,
        "log_interval": 2,
        "device": "cpu",
        "format": format,
    }
    whole = simulate(ethanol, potential, steps=20, out=tmp_path / "whole", restart_interval=7, **options)
    simulate(ethanol, potential, steps=11, out=tmp_path / "parts", **options)
    parts = simulate(None, potential, steps=20, out=tmp_path / "parts", resume=True, **options)
    assert same(whole.atoms, parts.atoms)
    assert whole.paths["log"].read_bytes() == parts.paths["log"].read_bytes()
    frames = [ase.io.read(result.paths["trajectory"], ":") for result in (whole, parts)]
    assert [frame.info["step"] for frame in frames[1]] == list(range(0, 20, 3))
    assert all(same(one, other) for one, other in zip(*frames, strict=True))
    for key in ("temperature", "conserved", "steps", "time"):
        assert whole.summary[key] == parts.summary[key]
    assert parts.summary["speed"]["steps"] == 9


@pytest.mark.parametrize("format", ["traj", "extxyz"])
def test_a_killed_run_continues_from_its_restart_file(
    crystal: Atoms, potential: Potential, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written after the restart file is cut off and comes again, once."""
    options: dict[str, Any] = {
        "ensemble": "nvt-bussi",
        "temperature": 30.0,
        "timestep": 0.25,
        "interval": 2,
        "log_interval": 1,
        "restart_interval": 5,
        "device": "cpu",
        "format": format,
    }
    whole = simulate(crystal, potential, steps=16, out=tmp_path / "whole", **options)
    record = StabilityCheck.check_step

    def interrupt(self: StabilityCheck, atoms: Atoms, step: int) -> None:
        if step == 14:
            raise KeyboardInterrupt
        record(self, atoms, step)

    with monkeypatch.context() as patch:
        patch.setattr(StabilityCheck, "check_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            simulate(crystal, potential, steps=16, out=tmp_path / "killed", **options)
    steps = [frame.info["step"] for frame in ase.io.read(tmp_path / "killed" / f"trajectory.{format}", ":")]
    assert steps[-1] == 12
    parts = simulate(crystal, potential, steps=16, out=tmp_path / "killed", resume=True, **options)
    assert same(whole.atoms, parts.atoms)
    assert whole.paths["log"].read_bytes() == parts.paths["log"].read_bytes()
    steps = [frame.info["step"] for frame in ase.io.read(parts.paths["trajectory"], ":")]
    assert steps == list(range(0, 17, 2))
    assert parts.summary["backend"].startswith(("edges", "native"))  # the width of the machine decides


def stop_at(monkeypatch: pytest.MonkeyPatch, stop: int, error: type[BaseException]) -> None:
    """Let something happen in the step of that number."""
    check = StabilityCheck.check_step

    def checked(self: StabilityCheck, atoms: Atoms, step: int) -> None:
        if step == stop:
            raise error("stopped by the test")
        check(self, atoms, step)

    monkeypatch.setattr(StabilityCheck, "check_step", checked)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SimulationError])
def test_a_run_stopped_before_its_first_interval_goes_on_from_its_start(
    potential: Potential,
    ethanol: Atoms,
    tmp_path: Path,
    ensemble: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"ensemble": ensemble, "temperature": 30.0, "timestep": 0.25, "device": "cpu"}
    options |= {"steps": 6, "interval": 2, "log_interval": 1}
    whole = simulate(ethanol, potential, out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, 1 if error is SimulationError else 4, error)
        with pytest.raises(error):
            simulate(ethanol, potential, out=tmp_path / "parts", **options)
    parts = simulate(None, potential, out=tmp_path / "parts", resume=True, **options)
    assert same(whole.atoms, parts.atoms)
    assert whole.paths["log"].read_bytes() == parts.paths["log"].read_bytes()
    assert len(ase.io.read(parts.paths["trajectory"], ":")) == 4


def test_files_without_a_restart_file_are_no_run_to_go_on_with(
    methane: tuple[Atoms, Calculator], tmp_path: Path
) -> None:
    (tmp_path / "trajectory.traj").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"without the restart file of a run.*replace it \(--overwrite"):
        simulate(*methane, steps=2, out=tmp_path)
    with pytest.raises(DataError, match=r"no restart file to go on from.*start again \(--overwrite"):
        simulate(*methane, steps=2, out=tmp_path, resume=True)
    assert simulate(*methane, steps=2, out=tmp_path, overwrite=True).summary["steps"] == 2


def test_the_same_seed_gives_the_same_run(potential: Potential, ethanol: Atoms) -> None:
    runs = [simulate(ethanol, potential, steps=5, seed=seed, device="cpu").atoms for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_an_earlier_run_is_not_lost(methane: tuple[Atoms, Calculator], tmp_path: Path) -> None:
    simulate(*methane, steps=2, out=tmp_path)
    with pytest.raises(DataError, match="an earlier run is here"):
        simulate(*methane, steps=2, out=tmp_path)
    simulate(*methane, steps=4, out=tmp_path, overwrite=True, log_interval=1)
    assert rows(tmp_path / "log.csv")["step"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_fixed_atoms_stay(methane: tuple[Atoms, Calculator], tmp_path: Path, ensemble: str) -> None:
    atoms, calculator = methane
    atoms.set_constraint(FixAtoms(indices=[0, 2]))
    options: dict[str, Any] = {"ensemble": ensemble, "out": tmp_path / "run"}
    simulate(atoms, calculator, steps=20, **options)
    result = simulate(None, calculator, steps=40, resume=True, **options)
    np.testing.assert_array_equal(result.atoms.positions[[0, 2]], atoms.positions[[0, 2]])
    assert np.abs(result.atoms.positions[[1, 3, 4]] - atoms.positions[[1, 3, 4]]).min() > 1e-3
    assert result.summary["degrees_of_freedom"] == 9
    assert [type(c) for c in ase.io.read(result.paths["trajectory"], 0).constraints] == [FixAtoms]


def test_resuming_something_else_is_refused(
    methane: tuple[Atoms, Calculator],
    potential: Potential,
    build_potential: Build,
    tmp_path: Path,
) -> None:
    other = build_potential(9)
    named = Potential(other.backbone, other.head, card=make_card(other, "tiny"))
    ethanol = molecule("CH3CH2OH")
    options: dict[str, Any] = {"temperature": 30.0, "device": "cpu"}
    simulate(ethanol, potential, steps=4, out=tmp_path, **options)
    again: dict[str, Any] = {"steps": 8, "out": tmp_path, "resume": True, **options}
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (None, potential, {"timestep": 0.25}, "that run had timestep=0.5, now it is 0.25"),
        (None, potential, {"temperature": 40.0}, "that run had temperature=30.0"),
        (None, potential, {"ensemble": "nve"}, "that run had ensemble=nvt-langevin"),
        (None, potential, {"dtype": "float64"}, "other weights of the name .*, or another dtype"),
        (None, build_potential(9), {}, "other weights of the name"),
        (None, named, {}, "that run was of .*, now it is tiny"),
        (molecule("CH4"), potential, {}, "is of C2H6O, the structure given is CH4"),
        (None, potential, {"steps": 3}, "has done 4 steps, more than the 3 wanted"),
        (None, potential, {"out": tmp_path / "other"}, "no restart file to go on from"),
    ]
    for structure, model, change, message in cases:
        with pytest.raises(DataError, match=message):
            simulate(structure, model, **{**again, **change})
    assert simulate(None, potential, **again).summary["steps"] == 8


def test_damaged_files_are_not_continued(methane: tuple[Atoms, Calculator], tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path, "interval": 1}
    simulate(*methane, steps=4, **options)
    kept = {name: (tmp_path / name).read_bytes() for name in FILES}
    for name, content, message in [
        ("restart.npz", kept["restart.npz"][:200], "truncated or damaged"),
        ("restart.npz", b"", "empty"),
        ("log.csv", b"step\n", "shorter than the restart file says"),
        ("trajectory.traj", b"", "trajectory.traj"),
        ("trajectory.traj", kept["trajectory.traj"][:500], "trajectory.traj"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            simulate(None, methane[1], steps=8, resume=True, **options)
        (tmp_path / name).write_bytes(kept[name])
    np.savez(tmp_path / "restart.npz", a=np.zeros(3))
    with pytest.raises(DataError, match="is not a restart file"):
        simulate(None, methane[1], steps=8, resume=True, **options)
