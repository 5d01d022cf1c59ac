"""The example scripts of dynamics run as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ase.io
import pytest

from ffpretrain import list_models

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, folder: Path, *words: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / script), *words]
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
