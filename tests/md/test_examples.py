"""The example scripts of dynamics run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest

from ffpretrain import list_models

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, folder: Path, *words: str) -> list[str]:
    # what a script itself calls must not be deprecated, for it is there to be copied
    strict = ["-W", "error::DeprecationWarning:__main__", "-W", "error::FutureWarning:__main__"]
    command = [sys.executable, *strict, str(EXAMPLES / script), *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.skipif("ndem-aspirin" not in list_models(), reason="ndem-aspirin is not in this package")
def test_aspirin_nvt(tmp_path: Path) -> None:
    lines = run("ase_aspirin_nvt.py", tmp_path, "40")
    assert len(lines) == 11
    assert len(ase.io.read(tmp_path / "aspirin.traj", ":")) == 3


@pytest.mark.skipif("ndem-ethanol" not in list_models(), reason="ndem-ethanol is not in this package")
def test_relax_and_vibrations(tmp_path: Path) -> None:
    lines = run("relax_and_vibrations.py", tmp_path)
    wavenumbers = [float(line.split()[0]) for line in lines if line.endswith("1/cm")]
    assert len(wavenumbers) == 21
    # C-H and O-H stretches of ethanol
    assert 2700 < wavenumbers[-2] < 3300 and 3300 < wavenumbers[-1] < 4100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("ndem-ethanol" not in list_models(), reason="ndem-ethanol is not in this package")
def test_power_spectrum(tmp_path: Path) -> None:
    lines = run("power_spectrum.py", tmp_path, "400", "1")
    peaks = [float(line.split(" highest at ")[1].split()[0]) for line in lines[:3]]
    assert peaks[0] < 1700 and 2700 < peaks[1] < 3300 < peaks[2] < 4100
    wavenumber, density = np.loadtxt(tmp_path / "spectrum.dat").T
    # 1 / (2 c timestep), and about kT for each of 21 vibrations
    assert wavenumber[-1] == pytest.approx(1 / (2 * 0.5 * 2.99792458e-5), rel=0.01)
    assert 0.3 < density.sum() * wavenumber[1] / (21 * 300.0 * 8.617333e-5) < 3


@pytest.mark.skipif("ndem-aspirin" not in list_models(), reason="ndem-aspirin is not in this package")
def test_openmm_aspirin_langevin(tmp_path: Path) -> None:
    pytest.importorskip("openmm")
    lines = run("openmm_aspirin_langevin.py", tmp_path, "20")
    energies = [float(line.split(",")[1]) for line in lines[1:]]
    assert len(energies) == 10 and max(energies) - min(energies) < 200  # kJ/mol
    assert (tmp_path / "aspirin.dcd").stat().st_size > 0


@pytest.mark.skipif("ndem-aspirin" not in list_models(), reason="ndem-aspirin is not in this package")
def test_openmm_aspirin_in_water(tmp_path: Path) -> None:
    pytest.importorskip("openmmml")
    lines = run("openmm_aspirin_in_water.py", tmp_path, "10", "2.0")
    density = [float(line.split(",")[3]) for line in lines[1:]]
    assert len(density) == 10 and all(0.8 < value < 1.1 for value in density)  # g/mL
    assert (tmp_path / "aspirin_in_water.dcd").stat().st_size > 0


@pytest.mark.parametrize("script", ["relabel_with_pyscf.py", "strain_with_pyscf.py"])
def test_examples_with_pyscf_say_what_to_install(script: str, tmp_path: Path) -> None:
    """PySCF may be there or not: here it is not."""
    (tmp_path / "pyscf.py").write_text("raise ImportError('absent')\n")
    command = [sys.executable, str(EXAMPLES / script)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and "pip install pyscf" in result.stderr
