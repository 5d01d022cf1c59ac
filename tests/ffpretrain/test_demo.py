"""The demonstration at a fraction of its length: every step and every file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ase.io import read

from ffpretrain.cli import main
from ffpretrain.demo import run_demo
from ffpretrain.demo.run import prepare_folder
from ffpretrain.errors import DataError


def test_every_file_is_made_and_the_numbers_are_the_files_own(tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "demo"
    results = run_demo(out, said.append, progress=False, scale=0.005)
    stored = json.loads((out / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert stored["held_out"]["n_frames"] == 300
    mae = stored["held_out"]["errors"]["forces_kcal_mae"]
    assert mae["unit"] == "kcal/mol/angstrom"
    assert any(f"{mae['value']:.3f} kcal/mol/Å" in line for line in said)
    for name in ("loss.png", "force-parity.png", "energy-conservation.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for run, n_atoms in (("ethanol-nvt", 9), ("ethanol-nve", 9), ("aspirin-nvt", 21), ("aspirin-nve", 21)):
        frames = read(out / run / "trajectory.traj", ":")
        assert len(frames) == stored["dynamics"][run]["steps"] // 10 + 1
        assert len(frames[0]) == n_atoms
    assert sum(line.startswith("  ffpretrain ") for line in said) == 3
    # a second demo would replace the first
    prepare_folder(out)
    assert [path.name for path in out.iterdir()] == [".demo"]


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("do not delete")
    with pytest.raises(DataError, match="not an earlier demo"):
        run_demo(tmp_path, progress=False)
    assert precious.read_text() == "do not delete"


def test_an_unwritable_folder_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as left:
        main(["demo", "--out", str(tmp_path / "file" / "inside")])
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
