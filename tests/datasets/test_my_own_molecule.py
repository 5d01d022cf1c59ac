"""The example of docs/my-own-molecule.md runs: xyz file, labels, training, evaluation, dynamics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_my_own_molecule(tmp_path: Path) -> None:
    pytest.importorskip("tblite")
    command = [sys.executable, str(EXAMPLES / "my_own_molecule.py")]
    words = [str(EXAMPLES / "methanol.xyz"), "20", "20", "20"]
    result = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "forces_kcal_mae: " in result.stdout and "kcal/mol/angstrom" in result.stdout
    run = tmp_path / "my-molecule"
    assert {path.name for path in run.iterdir()} == {"labels.h5", "training", "dynamics"}
    frames = ase.io.read(run / "dynamics" / "trajectory.traj", ":")
    assert len(frames) == 3 and str(frames[-1].symbols) == "COH4"


def test_without_the_engine_it_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken" / "tblite").mkdir(parents=True)
    (tmp_path / "broken" / "tblite" / "__init__.py").write_text("raise ModuleNotFoundError('tblite')")
    place = tmp_path / "here"
    place.mkdir()
    paths = [str(tmp_path / "broken"), str(EXAMPLES.parent)]
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "my_own_molecule.py")],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert 'pip install "ffpretrain[label]"' in result.stderr and list(place.iterdir()) == []
