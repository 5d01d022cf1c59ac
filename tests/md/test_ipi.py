"""The i-PI driver."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.units import Bohr, Hartree

from ffpretrain import FFCalculator, list_models, load_potential
from ffpretrain.artifacts import make_card, save_potential
from ffpretrain.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    MissingDependencyError,
    UnsupportedInputError,
    UserError,
)
from ffpretrain.potential import Potential

pytest.importorskip("ipi", reason="needs i-PI: pip install 'ffpretrain[ipi]'")

from ffpretrain.md import ipi_driver
from ffpretrain.md.ipi_driver import FFDriver

EXAMPLES = Path(__file__).parents[2] / "examples"
BOX = np.eye(3) * 40.0


def by_ipis_ase_driver(model: Any, atoms: Atoms, folder: Path) -> Any:
    """The same structure by the driver that i-PI ships for ASE calculators."""
    from ipi.pes._ase import ASEDriver

    ase.io.write(folder / "template.extxyz", atoms)
    driver = ASEDriver(str(folder / "template.extxyz"))
    driver.ase_calculator = FFCalculator(model, device="cpu", dtype="float64", on_unfamiliar="ignore")
    energy, forces, virial, _ = driver(atoms.cell.array.T / Bohr, atoms.positions / Bohr)
    return float(energy), forces, virial.reshape(3, 3)


@pytest.mark.parametrize("name", ["ndem-aspirin", "ndem-ethanol"])
def test_beads_of_the_named_models_agree_with_ase(name: str) -> None:
    if name not in list_models():
        pytest.skip(f"{name} is not in this package")
    atoms = load_potential(name).card.reference_geometry.to_atoms()
    rng = np.random.default_rng(0)
    beads = [atoms.positions + rng.normal(0, 0.05, atoms.positions.shape) for _ in range(3)]
    answers = FFDriver(name, device="cpu", dtype="float64")([BOX] * 3, [bead / Bohr for bead in beads])
    for bead, (energy, forces, virial, extras) in zip(beads, answers, strict=True):
        atoms.positions = bead
        atoms.calc = FFCalculator(name, device="cpu", dtype="float64")
        assert energy * Hartree == pytest.approx(atoms.get_potential_energy(), abs=1e-5, rel=0)
        np.testing.assert_allclose(forces * Hartree / Bohr, atoms.get_forces(), rtol=0, atol=1e-4)
        assert not virial.any() and extras == ""


def test_a_skewed_crystal_and_its_virial(potential: Potential, crystal: Atoms, tmp_path: Path) -> None:
    card = make_card(potential, "crystal")
    path = save_potential(potential, tmp_path / "crystal.safetensors", card)
    wanted = by_ipis_ase_driver(str(path), crystal, tmp_path)
    driver = FFDriver(str(path), str(tmp_path / "template.extxyz"), "True", device="cpu", dtype="float64")
    cell, pos = crystal.cell.array.T / Bohr, crystal.positions / Bohr
    for energy, forces, virial, _ in [driver(cell, pos), *driver([cell] * 2, [pos] * 2)]:
        assert energy == pytest.approx(wanted[0], rel=1e-7)  # i-PI's constants are of another year
        np.testing.assert_allclose(forces, wanted[1], rtol=0, atol=1e-7)
        np.testing.assert_allclose(virial, wanted[2], rtol=0, atol=1e-7)
        assert np.abs(virial).max() > 1e-3


def test_ipi_finds_the_driver_by_its_file(model_file: Path) -> None:
    from ipi.pes import load_pes

    loaded = load_pes("custom", ipi_driver.__file__)
    assert loaded.__name__ == "FFDriver" and sys.modules["ipi"].__name__ == "ipi"
    assert len(loaded(model=str(model_file), verbosity=1).numbers) == 9


def without_geometry(potential: Potential, folder: Path) -> str:
    return str(save_potential(potential, folder / "bare.safetensors", make_card(potential, "bare")))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "ndem-asprin"}, ArtifactError, "ndem-asprin"),
        ({"template": "missing.xyz"}, DataError, "missing.xyz: no such structure file"),
        (
            {"template": "water.xyz"},
            UnsupportedInputError,
            "the atoms are H2O, but 'tiny' was trained on C2H6O",
        ),
        ({"template": "mercury.xyz"}, UnsupportedInputError, "not trained on Hg"),
        (
            {"model": "bare"},
            ConfigError,
            "no reference geometry of its own; name a structure file as template",
        ),
        ({"periodic": "maybe"}, ConfigError, "periodic must be True or False, not 'maybe'"),
        ({"templat": "x"}, ConfigError, "unknown parameter 'templat'.*did you mean 'template'"),
        ({"device": "cuda:77"}, ConfigError, "'cuda:77' is absent"),
        ({"dtype": "half"}, ConfigError, "unknown dtype 'half'"),
    ],
)
def test_what_cannot_be_built_is_refused(
    model_file: Path,
    potential: Potential,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("water.xyz").write_text("3\n\nO 0 0 0\nH 0 0 0.96\nH 0.9 0 -0.2\n")
    Path("mercury.xyz").write_text("2\n\nHg 0 0 0\nH 0 0 1.7\n")
    given = {"model": str(model_file), "device": "cpu", **options}
    if given["model"] == "bare":
        given["model"] = without_geometry(potential, tmp_path)
    with pytest.raises(error, match=message) as caught:
        FFDriver(**given)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cell, pos: (cell, pos[:8]), r"positions of shape \(8, 3\), the template has 9 atoms"),
        (lambda cell, pos: (cell, pos * np.nan), "structure 0: the position of atom 0 is not finite"),
        (lambda cell, pos: ([cell] * 2, [pos, pos * 0]), "structure 1: .*at the same place"),
        (
            lambda cell, pos: (cell * [1, 1, 0], pos),
            "structure 0: direction 2 is periodic but its cell vector",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    model_file: Path, ethanol: Atoms, change: Callable[..., Any], message: str
) -> None:
    driver = FFDriver(str(model_file), periodic=True, device="cpu")
    driver(BOX, ethanol.positions / Bohr)
    with pytest.raises(UnsupportedInputError, match=message) as caught:
        driver(*change(BOX, ethanol.positions / Bohr))
    assert "\n" not in str(caught.value)


FAILING_RUN = """
import sys
from ase.build import molecule
from ipi.scripting import InteractiveSimulation, motion_nvt_xml, simulation_xml

atoms = molecule("CH3CH2OH")
atoms.set_cell([40.0, 40.0, 40.0])
driver, model = sys.argv[1:]
forcefield = (
    f"<ffdirect name='ff'><pes>custom</pes><pes_path>{driver}</pes_path>"
    f"<parameters>{{model: {model}}}</parameters></ffdirect>"
)
run = InteractiveSimulation(simulation_xml(atoms[:8], forcefield, motion_nvt_xml(timestep=0.05), 300.0))
run.run(2)
print("went on")
"""


def test_an_error_ends_ipis_run(model_file: Path, tmp_path: Path) -> None:
    """i-PI must not integrate on after the driver has failed; in a process of its own for i-PI's signals."""
    command = [sys.executable, "-c", FAILING_RUN, ipi_driver.__file__, str(model_file)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "went on" not in result.stdout
    assert "UnsupportedInputError: i-PI has positions of shape (8, 3)" in result.stderr


def test_without_ipi_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    right = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "ipi":
            raise ModuleNotFoundError("No module named 'ipi'")
        return right(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(sys.modules, "ffpretrain.md.ipi_driver")
    with pytest.raises(MissingDependencyError) as caught:
        importlib.import_module("ffpretrain.md.ipi_driver")
    assert 'pip install "ffpretrain[ipi]"' in str(caught.value)


@pytest.mark.skipif("ndem-ethanol" not in list_models(), reason="ndem-ethanol is not in this package")
def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "ipi_path_integral.py"), "5", "4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 6 and all(float(line.split()[4]) > 0 for line in lines[:5])
    assert (tmp_path / "ethanol.out").exists() and (tmp_path / "ethanol.pos_3.xyz").exists()
