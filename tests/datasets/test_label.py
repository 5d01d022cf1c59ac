"""Labelling: right labels, resumed runs equal to uninterrupted ones, nothing silent, nothing left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import CalculationFailed
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import write

from ffpretrain.cli import main
from ffpretrain.datasets.engines import Engine, create_engine, one_thread, open_engine
from ffpretrain.datasets.journal import Journal
from ffpretrain.datasets.label import label_dataset
from ffpretrain.datasets.store import FrameStore, write_store
from ffpretrain.errors import ConfigError, DataError, MissingDependencyError, UserError

QUICK: dict[str, Any] = {
    "engine": "emt",
    "n": 6,
    "equilibration": 20.0,
    "spacing": 5.0,
    "report": lambda line: None,
}


class Sometimes(EMT):
    """EMT whose energy fails at some calls."""

    fail_at: ClassVar[set[int]] = set()
    calls = 0

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        type(self).calls += 1
        if type(self).calls in self.fail_at:
            raise CalculationFailed("SCF not converged\nin 250 cycles")
        super().calculate(*args, **kwargs)


def sometimes(*fail_at: int) -> Engine:
    Sometimes.fail_at, Sometimes.calls = set(fail_at), 0
    return Engine("sometimes", Sometimes(), "EMT", "bulk metal")


def water() -> Atoms:
    return molecule("H2O")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_frame_carries_the_engines_answer(tmp_path: Path) -> None:
    store = label_dataset(water(), tmp_path / "a.h5", **QUICK)
    assert len(store) == 6 and files(tmp_path) == ["a.h5"]
    for frame in store:
        assert frame.numbers.tolist() == [8, 1, 1] and frame.cell is None and frame.pbc == (False,) * 3
        np.testing.assert_array_equal(frame.positions, frame.positions.astype(np.float32))
        atoms = Atoms(frame.numbers, frame.positions, calculator=EMT())
        assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        np.testing.assert_allclose(frame.forces, atoms.get_forces(), atol=1e-5)
    assert len({frame.energy for frame in store}) == 6


def test_metadata_say_how_the_data_were_made(tmp_path: Path) -> None:
    settings = {**QUICK, "n": 2, "name": "water", "licence": "CC0-1.0", "seed": 3}
    store = label_dataset(water(), tmp_path / "a.h5", **settings)
    metadata, notes = store.metadata, store.notes["label"]
    assert (metadata.name, metadata.level_of_theory, metadata.licence) == ("water", "EMT", "CC0-1.0")
    assert metadata.energy_zero == "bulk fcc metal at its equilibrium"
    assert (
        "ffpretrain label STRUCTURE --engine emt --n 2" in metadata.source and "--seed 3" in metadata.source
    )
    assert notes["recipe"]["package"].startswith("ase 3.") and notes["replaced"] == []
    assert set(notes["versions"]) == {"ffpretrain", "ase", "numpy"}


def test_periodic_structure_with_fixed_atoms_and_double_precision(tmp_path: Path) -> None:
    copper = bulk("Cu", cubic=True)
    copper.set_constraint(FixAtoms([0]))
    store = label_dataset(copper, tmp_path / "a.h5", method="gaussian", precision="float64", **QUICK)
    for frame in store:
        np.testing.assert_array_equal(frame.cell, copper.cell)
        assert frame.pbc == (True, True, True) and frame.fixed is not None
        assert frame.fixed.tolist() == [True, False, False, False]
        free = frame.to_atoms()
        free.set_constraint()
        free.calc = EMT()
        np.testing.assert_allclose(frame.forces, free.get_forces(), atol=1e-10)
        np.testing.assert_allclose(frame.stress, free.get_stress(voigt=False), atol=1e-10)
        assert frame.forces is not None and np.abs(frame.forces[0]).max() > 1e-3


@pytest.mark.parametrize("method", ["dynamics", "normal-modes", "gaussian"])
def test_an_interrupted_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole = label_dataset(water(), tmp_path / "whole.h5", method=method, name="w", **QUICK)
    real = Journal.append

    def append(self: Journal, entry: dict[str, Any]) -> None:
        if len(self.entries) == 3:
            raise KeyboardInterrupt
        real(self, entry)

    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "whole.h5"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "append", append)
        label_dataset(water(), target, method=method, name="w", **QUICK)
    assert files(target.parent) == ["whole.h5.part"]
    said: list[str] = []
    label_dataset(water(), target, method=method, name="w", **{**QUICK, "report": said.append})
    assert any("3 frames are there already" in line for line in said)
    assert files(target.parent) == ["whole.h5"]
    assert target.read_bytes() == whole.path.read_bytes()


def test_a_partly_written_frame_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = label_dataset(water(), tmp_path / "whole.h5", **QUICK)
    part = tmp_path / "a.h5.part"
    monkeypatch.setattr("ffpretrain.datasets.label.StoreWriter", None)  # stop before the journal is used up
    with pytest.raises(TypeError):
        label_dataset(water(), tmp_path / "a.h5", **QUICK)
    monkeypatch.undo()
    text = part.read_bytes()
    part.write_bytes(text[: len(text) - 40])
    said: list[str] = []
    store = label_dataset(water(), tmp_path / "a.h5", **{**QUICK, "report": said.append})
    assert said == [f"{tmp_path / 'a.h5'}: 5 frames are there already"]
    assert [frame.energy for frame in store] == [frame.energy for frame in whole]
    lines = text.splitlines(keepends=True)
    part.write_bytes(b"".join([lines[0], lines[1][:-30] + b"\n", *lines[2:]]))
    (tmp_path / "a.h5").unlink()
    with pytest.raises(DataError, match=r"a\.h5\.part: line 2 is damaged; delete the file"):
        label_dataset(water(), tmp_path / "a.h5", **QUICK)


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    write(tmp_path / "water.xyz", water())
    words = ["label", "water.xyz", "--engine", "emt", "--n", "3000", "--spacing", "5", "--equilibration", "5"]
    command = [sys.executable, "-c", "from ffpretrain.cli import main; main()", *words, "--out", "a.h5"]
    part = tmp_path / "a.h5.part"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 20_000):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and files(tmp_path) == ["a.h5.part", "water.xyz"]
    kept = len(part.read_bytes().splitlines()) - 2  # the header, and perhaps half a line
    assert kept > 3
    settings = {**QUICK, "n": kept + 3, "spacing": 5.0, "equilibration": 5.0}
    resumed = label_dataset(tmp_path / "water.xyz", tmp_path / "a.h5", **settings)
    whole = label_dataset(tmp_path / "water.xyz", tmp_path / "b.h5", **settings)
    assert len(resumed) in (kept + 3, kept + 4)
    for one, other in zip(whole, resumed, strict=False):
        assert one.energy == other.energy
        np.testing.assert_array_equal(one.positions, other.positions)


def test_a_larger_n_extends_a_finished_store(tmp_path: Path) -> None:
    long = label_dataset(water(), tmp_path / "long.h5", **{**QUICK, "n": 9})
    label_dataset(water(), tmp_path / "a.h5", **QUICK)
    store = label_dataset(water(), tmp_path / "a.h5", **{**QUICK, "n": 9})
    assert [frame.energy for frame in store] == [frame.energy for frame in long]
    before = store.path.read_bytes()
    said: list[str] = []
    assert len(label_dataset(water(), tmp_path / "a.h5", **{**QUICK, "report": said.append})) == 9
    assert said and store.path.read_bytes() == before and files(tmp_path) == ["a.h5", "long.h5"]


def test_stopped_between_the_store_and_the_journals_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        label_dataset(water(), tmp_path / "a.h5", **QUICK)
    assert files(tmp_path) == ["a.h5", "a.h5.part"]
    assert len(label_dataset(water(), tmp_path / "a.h5", **{**QUICK, "n": 8})) == 8
    assert files(tmp_path) == ["a.h5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"temperature": 300.0}, r"temperature 500\.0, not 300\.0"),
        ({"method": "gaussian"}, "method 'dynamics', not 'gaussian'"),
        ({"precision": "float64"}, "precision 'float32', not 'float64'"),
        ({"structure": molecule("CH4")}, "another structure"),
        ({"engine": "lj"}, "engine 'emt', not 'lj'"),
    ],
)
def test_another_command_on_the_same_file_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    store = label_dataset(water(), tmp_path / "a.h5", **{**QUICK, "n": 2})
    before = store.path.read_bytes()
    with pytest.raises(DataError, match=f"a.h5: was begun with {message}; repeat that command or choose"):
        label_dataset(**{"structure": water(), "out": tmp_path / "a.h5", **QUICK, **change})
    assert store.path.read_bytes() == before and files(tmp_path) == ["a.h5"]


def test_frames_of_another_origin_are_not_touched(tmp_path: Path) -> None:
    store = label_dataset(water(), tmp_path / "a.h5", **{**QUICK, "n": 2})
    write_store(tmp_path / "b.h5", store)
    with pytest.raises(DataError, match=r"b\.h5: holds frames that were not made by labelling"):
        label_dataset(water(), tmp_path / "b.h5", **QUICK)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.h5.part", {"recipe": {}, "base": 0})
    with pytest.raises(DataError, match="another process is writing it"):
        label_dataset(water(), tmp_path / "a.h5", **QUICK)
    journal.close()


def test_a_failed_geometry_is_reported_and_replaced(tmp_path: Path) -> None:
    said: list[str] = []
    settings = {**QUICK, "engine": sometimes(3, 5), "report": said.append, "method": "gaussian"}
    store = label_dataset(water(), tmp_path / "a.h5", **settings)
    assert len(store) == 6 and len(said) == 2
    assert said[0] == "frame 1: the engine failed (SCF not converged); sampling another geometry"
    reasons = [(entry["frame"], entry["reason"]) for entry in store.notes["label"]["replaced"]]
    assert reasons == [(1, "SCF not converged"), (2, "SCF not converged")]
    clean = label_dataset(water(), tmp_path / "b.h5", **{**settings, "engine": sometimes(), "n": 8})
    expected = [frame.energy for index, frame in enumerate(clean) if index not in (1, 3)]
    assert [frame.energy for frame in store] == expected


def test_ten_failures_in_a_row_are_an_error(tmp_path: Path) -> None:
    engine = sometimes(*range(4, 100))
    with pytest.raises(DataError, match=r"failed 10 times in a row, last: SCF not converged; try a lower"):
        label_dataset(water(), tmp_path / "a.h5", **{**QUICK, "engine": engine, "method": "gaussian"})
    assert files(tmp_path) == ["a.h5.part"]  # two frames are worth keeping


def bad_file(folder: Path, kind: str) -> Path:
    path = folder / "in.xyz"
    if kind == "broken":
        path.write_text("3\nwater\nO 0 0 zero\n")
    elif kind == "no atoms":
        path.write_text("0\nnothing\n")
    elif kind == "several":
        write(path, [water(), water()])
    elif kind == "nan":
        path.write_text("1\n\nO nan 0 0\n")
    elif kind == "spin":
        atoms = water()
        atoms.info["spin"] = 0
        write(path, atoms)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"in\.xyz: no such structure file"),
        ("broken", r"in\.xyz: cannot be read as a structure"),
        ("no atoms", r"in\.xyz: holds no"),
        ("several", r"in\.xyz: holds 2 structures; choose one, such as in\.xyz@0"),
        ("nan", r"in\.xyz: a position is not finite"),
        ("spin", "spin at least 1"),
    ],
)
def test_bad_structures(tmp_path: Path, kind: str, message: str) -> None:
    path = bad_file(tmp_path, kind)
    before = files(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        label_dataset(path, tmp_path / "a.h5", **QUICK)
    assert "\n" not in str(caught.value) and files(tmp_path) == before


def test_one_structure_of_several_can_be_chosen(tmp_path: Path) -> None:
    write(tmp_path / "in.xyz", [water(), molecule("CH4")])
    store = label_dataset(f"{tmp_path / 'in.xyz'}@1", tmp_path / "a.h5", **{**QUICK, "n": 1})
    assert len(store[0]) == 5 and "in.xyz@1" in store.metadata.source
    with pytest.raises(DataError, match="there is no number 2"):
        label_dataset(f"{tmp_path / 'in.xyz'}@2", tmp_path / "b.h5", **QUICK)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"n": 0}, ConfigError, "n must be at least 1"),
        ({"precision": "half"}, ConfigError, "precision must be"),
        ({"method": "normal"}, ConfigError, "did you mean 'normal-modes'"),
        ({"spacings": 3.0}, ConfigError, "did you mean 'spacing'"),
        ({"engine": "gfn3"}, ConfigError, "unknown engine 'gfn3'; did you mean"),
        ({"engine": "no_such_module:Class"}, UserError, "no_such_module"),
        ({"engine": "ase.calculators.emt:EMTT"}, ConfigError, "unknown engine"),
        ({"engine": "gpaw"}, MissingDependencyError, "pip install"),
        ({"engine_options": {"sigm": 1.0}}, UserError, "sigm"),
        ({"engine": "emt", "charge": 1}, ConfigError, "knows no charge"),
        ({"engine": "ase.calculators.emt:EMT", "spin": 2}, ConfigError, "use 'gfn2'"),
        ({"structure": Atoms("U", [[0, 0, 0]])}, DataError, "'emt' fails on the structure given"),
        ({"structure": Atoms()}, DataError, "holds no atoms"),
        ({"out": "no/such/folder/a.h5"}, DataError, "cannot be written"),
    ],
)
def test_bad_requests(tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    settings = {"structure": water(), "out": "a.h5", **QUICK, **change}
    settings["out"] = tmp_path / settings["out"]
    with pytest.raises(kind, match=message) as caught:
        label_dataset(**settings)
    assert "\n" not in str(caught.value) and files(tmp_path) == []


def test_engines_by_name() -> None:
    assert isinstance(create_engine("emt"), EMT)
    assert isinstance(create_engine("ase.calculators.emt:EMT"), EMT)
    engine = open_engine("lj", sigma=2.0)
    assert (
        engine.level_of_theory == "Lennard-Jones (sigma=2.0)" and engine.calculator.parameters["sigma"] == 2.0
    )
    morse = open_engine("morse", r0=1.2)
    assert morse.level_of_theory == "morse (r0=1.2)" and morse.package.startswith("ase ")


def test_a_missing_package_names_its_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tblite", None)
    monkeypatch.setitem(sys.modules, "tblite.ase", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "ffpretrain\[label\]"'):
        open_engine("gfn2")


def test_a_package_that_cannot_be_loaded_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rdkit"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "rdkit").mkdir()
    (tmp_path / "rdkit" / "__init__.py").write_text("raise ImportError('libXrender.so.1: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"is there but cannot be loaded \(libXrender.so.1"):
        open_engine("mmff")


def test_gfn2_forces_are_the_derivative_of_its_energies(tmp_path: Path) -> None:
    pytest.importorskip("tblite")
    store = label_dataset(
        molecule("CH3OH"), tmp_path / "a.h5", n=2, method="gaussian", std=0.1, precision="float64"
    )
    assert store.metadata.level_of_theory == "GFN2-xTB"
    frame, h = store[1], 1e-3
    assert frame.energy is not None and frame.forces is not None
    atoms = Atoms(frame.numbers, frame.positions, calculator=create_engine("gfn2"))
    with one_thread():
        assert atoms.get_potential_energy() == pytest.approx(frame.energy, abs=1e-8)
        for atom, axis in ((0, 0), (1, 2), (4, 1)):
            ends = []
            for sign in (1, -1):
                atoms.positions = frame.positions
                atoms.positions[atom, axis] += sign * h
                ends.append(atoms.get_potential_energy())
            assert -(ends[0] - ends[1]) / (2 * h) == pytest.approx(frame.forces[atom, axis], abs=2e-4)


def test_gfn2_reference_value_charge_and_options() -> None:
    """The published GFN2-xTB energy of water in tblite's own documentation is -137.9678 eV."""
    pytest.importorskip("tblite")
    atoms = water()
    atoms.calc = create_engine("gfn2")
    with one_thread():
        neutral = atoms.get_potential_energy()
        atoms.calc = create_engine("gfn2", charge=1, spin=2)
        assert atoms.get_potential_energy() > neutral + 5.0
    assert neutral == pytest.approx(-137.96777, abs=1e-4)
    with pytest.raises(ConfigError, match="unknown option 'acuracy'; did you mean 'accuracy'"):
        open_engine("gfn2", acuracy=1.0)


def run_cli(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["label", *words])
    return int(caught.value.code or 0)


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write("water.xyz", water())
    words = [
        "water.xyz",
        "--engine",
        "lj",
        "--engine-option",
        "sigma=0.8",
        "--n",
        "4",
        "--method",
        "gaussian",
    ]
    assert run_cli(*words, "--out", "a.h5", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    store = FrameStore("a.h5")
    assert (result["schema"], result["version"]) == ("ffpretrain-label", 1)
    assert result["frames"] == len(store) == 4
    assert result["level_of_theory"] == "Lennard-Jones (sigma=0.8)"
    assert result["units"]["forces"] == "eV/angstrom"
    forces = np.array([frame.forces for frame in store])
    assert result["force_rms"] == pytest.approx(np.sqrt((forces**2).mean()))
    first = store[0].energy
    # the command kept with the data makes them again
    words = result["command"].split()[2:]
    words[words.index("a.h5")] = "b.h5"
    assert run_cli(*words) == 0
    assert "b.h5: 4 frames of 3 atoms" in capsys.readouterr().out
    assert FrameStore("b.h5")[0].energy == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nope.xyz",), "no such structure file"),
        (("water.xyz", "--engine", "emtt"), "did you mean 'emt'"),
        (("water.xyz", "--engine", "emt", "--engine-option", "fake"), "not of the form key=value"),
        (("water.xyz", "--engine", "emt", "--out", "no/a.h5"), "cannot be written"),
    ],
)
def test_command_line_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write("water.xyz", water())
    assert run_cli(*words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert files(tmp_path) == ["water.xyz"]
