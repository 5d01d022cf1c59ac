"""``ffpretrain md``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.io
import pytest
from ase.build import molecule

from ffpretrain import cli
from ffpretrain.md.stability import StabilityCheck


def command(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["md", *map(str, words)])
    return caught.value.code


SHORT = ("--steps", 4, "--interval", 2, "--temperature", 30, "--device", "cpu")


def test_a_run_and_its_continuation(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert command(model_file, "--out", out, *SHORT) == 0
    text = capsys.readouterr().out
    assert "C2H6O, 9 atoms" in text and "4 steps, 0.002 ps" in text and str(out / "trajectory.traj") in text
    words = (*SHORT[2:], "--steps", 8, "--resume", "--json")
    assert command(model_file, "--out", out, *words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["version"], answer["steps"]) == ("ffpretrain-md", 1, 8)
    assert answer == json.loads((out / "md.json").read_text())
    assert len(ase.io.read(out / "trajectory.traj", ":")) == 5


@pytest.mark.parametrize("ensemble", ["nve", "nvt-bussi", "nvt-nose-hoover"])
def test_ensembles_and_a_structure_file(model_file: Path, tmp_path: Path, ensemble: str) -> None:
    ase.io.write(tmp_path / "start.xyz", molecule("CH3CH2OH"))
    out = tmp_path / "run.extxyz"
    words = ("--ensemble", ensemble, "--out", out, "--minimize", "--time", 0.002, "--timestep", 0.5)
    assert command(model_file, tmp_path / "start.xyz", *words, "--temperature", 30, "--interval", 1) == 0
    assert len(ase.io.read(out, ":")) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ndem-asprin"], "ndem-asprin"),
        (["{model}", "missing.xyz"], "missing.xyz: no such structure file"),
        (["{model}", "broken.xyz"], "broken.xyz: cannot be read as a structure"),
        (["{model}", "empty.xyz"], "empty.xyz: is empty"),
        (["{model}", "mercury.xyz"], "not trained on Hg"),
        (["{model}", "huge.xyz"], "huge.xyz"),
        (["{model}", "--out", "file/run"], "file/run: cannot be made (Not a directory)"),
        (["{model}", "--steps", "3", "--time", "1"], "either the number of steps or the time"),
        (["{model}", "--timestep", "-1", "--steps", "1"], "timestep must be a positive number"),
        (["{model}", "--dtype", "half"], "unknown dtype 'half'"),
        (["{model}", "--resume"], "no restart file to go on from"),
        (["{model}", "start.foo"], "start.foo: unknown format"),
        (["{model}", "--engine", "gromacs"], "error: Invalid value for '--engine': 'gromacs' is not one of"),
        (["{model}", "--engin", "ase"], "see ffpretrain md --help"),
        ([], "see ffpretrain md --help"),
        (["{model}", "--ensemble", "npt"], "npt"),
        (["{model}", "--device", "tpu"], "tpu"),
    ],
)
def test_bad_input_exits_2_and_leaves_nothing(
    model_file: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "file").write_text("")
    (folder / "empty.xyz").write_text("")
    (folder / "start.foo").write_text("3\nwater\n")
    (folder / "broken.xyz").write_text("3\nwater\nO 0 0 0\nH 0 zero 1\n")
    (folder / "mercury.xyz").write_text("2\n\nHg 0 0 0\nH 0 0 1.7\n")
    (folder / "huge.xyz").write_text("2\n\nC 0 0 1e999\nH 0 0 1.7\n")
    before = sorted(folder.iterdir())
    assert command(*[word.format(model=model_file) for word in words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert "Traceback" not in output.err
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert "Value error" not in output.err
    assert sorted(folder.iterdir()) == before


def test_a_run_that_breaks_exits_2(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "--ensemble",
        "nve",
        "--temperature",
        1e6,
        "--timestep",
        2,
        "--steps",
        500,
        "--out",
        tmp_path / "run",
    )
    assert command(model_file, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: atoms fly apart at step ") and "last_frame.extxyz" in error
    assert (tmp_path / "run" / "last_frame.extxyz").exists()


@pytest.mark.parametrize("stop", [0, 3])
def test_after_ctrl_c_it_says_what_works(
    model_file: Path,
    tmp_path: Path,
    stop: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped while the run is prepared, or at step 3, long before the first interval of restart files."""

    def interrupt(*arguments: Any) -> None:
        if not stop or arguments[-1] == stop:
            raise KeyboardInterrupt

    words = (model_file, "--out", tmp_path / "run", *SHORT)
    with monkeypatch.context() as patch:
        if stop:
            patch.setattr(StabilityCheck, "check_step", interrupt)
        else:
            patch.setattr("ffpretrain.md.run.make_integrator", interrupt)
        assert command(*words) == 130
    error = capsys.readouterr().err
    assert ("the same command with --resume" in error) == bool(stop)
    assert ("nothing was saved" in error and "the same command starts again" in error) == (not stop)
    assert command(*words, *(["--resume"] if stop else [])) == 0


def test_ctrl_c_while_an_earlier_run_still_stands_promises_no_restart(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    words = (model_file, "--out", tmp_path / "run", *SHORT)
    assert command(*words) == 0
    with monkeypatch.context() as patch:
        patch.setattr("ffpretrain.md.run.make_integrator", interrupt)
        assert command(*words, "--overwrite") == 130
    assert "nothing was saved" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(StabilityCheck, "check_step", interrupt)
        assert command(*words, "--overwrite") == 130
    assert "--resume in place of --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "format"), [("run.traj", "traj"), ("run.xyz", "extxyz"), ("run", "extxyz")])
def test_the_format_recorded_is_the_one_written(
    model_file: Path, tmp_path: Path, name: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--format", format] if "." not in name else []
    assert command(model_file, "--out", tmp_path / name, *words, *SHORT, "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["format"] == format
    other = "traj" if format == "extxyz" else "extxyz"
    if words:
        return
    assert command(model_file, "--out", tmp_path / f"b{name}", "--format", other, *SHORT) == 2
    assert f"is written as {format}, not {other}" in capsys.readouterr().err


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
def test_the_structure_is_not_written_over(
    model_file: Path, tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "start.xyz"
    ase.io.write(start, molecule("CH3CH2OH"))
    content = start.read_bytes()
    for structure in (start, f"{start}@0"):
        assert command(model_file, structure, "--out", start, *SHORT, *option) == 2
        assert "start.xyz: is the structure to start from" in capsys.readouterr().err
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [start]
    assert start.read_bytes() == content
