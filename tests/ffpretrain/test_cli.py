"""The command line's frame: lazy, one line and exit code 2 on bad input, help that fits a screen."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ffpretrain
from ffpretrain import cli
from ffpretrain.artifacts import Component, MeasuredErrors, ModelCard, Quantity
from ffpretrain.cli import app as frame
from ffpretrain.cli import doctor, models
from ffpretrain.cli._imports import Imports
from ffpretrain.errors import ArtifactError, DataError, MissingDependencyError, NonFiniteError

# What must not be loaded before a verb needs it.
HEAVY = ("torch", "ase", "matplotlib", "lightning", "numpy", "h5py", "scipy", "torch_geometric", "pydantic")


def ffpretrain_command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own on a screen of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "LINES": "40", **env}
    command = [sys.executable, "-m", "ffpretrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def leave(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, *words: str) -> int | str | None:
    """Run main() with a verb `fail` that raises the error; return the exit code."""

    def fail(count: int = 1) -> None:
        """Fail."""
        if error is not None:
            raise error

    module = type(sys)("failing_verb")
    module.fail = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "failing_verb", module)
    monkeypatch.setitem(frame.VERBS, "fail", frame.Verb("failing_verb", "fail", "Fail."))
    with pytest.raises(SystemExit) as caught:
        cli.main(["fail", *words])
    return caught.value.code


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ffpretrain.cli import main\ntry: main(['--help'])\n"
        f"except SystemExit: pass\nprint('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "LOADED []"


def test_every_module_of_the_table_exists_and_every_verb_module_is_in_it() -> None:
    for name, verb in frame.VERBS.items():
        assert importlib.util.find_spec(verb.module) is not None, name
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    assert modules - {"app", "progress"} <= {verb.module.rpartition(".")[2] for verb in frame.VERBS.values()}


@pytest.mark.parametrize("verb", [None, *frame.VERBS])
def test_help_fits_a_screen(verb: str | None) -> None:
    result = ffpretrain_command(*([verb] if verb else []), "--help")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "Usage: ffpretrain" in result.stdout
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    if verb is None:
        assert all(f" {name} " in result.stdout for name in frame.VERBS)


def test_help_of_the_data_commands_fits_a_screen() -> None:
    group = frame.LazyVerb("data", frame.VERBS["data"]).load()
    assert group.commands
    for name in group.commands:
        result = ffpretrain_command("data", name, "--help")
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) <= 40, name
        assert max(map(len, result.stdout.splitlines())) <= 80, name


def test_version() -> None:
    result = ffpretrain_command("--version")
    assert (result.returncode, result.stdout) == (0, f"ffpretrain {ffpretrain.__version__}\n")


@pytest.mark.parametrize("words", [["modles"], ["--nonsense"], ["models", "--nonsense"]])
def test_usage_errors_exit_2(words: list[str]) -> None:
    result = ffpretrain_command(*words)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert words[-1] in result.stderr
    if words == ["modles"]:
        assert "'models'" in result.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("a.npz, frame 3: NaN\nin forces; mend"), "error: a.npz, frame 3: NaN in forces; mend"),
        (ArtifactError("model.safetensors: truncated"), "error: model.safetensors: truncated"),
        (MissingDependencyError("tblite is absent; pip ..."), "error: tblite is absent; pip ..."),
        (NonFiniteError("loss is not finite at step 3"), "error: loss is not finite at step 3"),
        (FileNotFoundError(2, "No such file", "a.xyz"), "error: a.xyz: no such file; check the spelling"),
        (FileNotFoundError("unable to open 'a.h5'"), "error: unable to open 'a.h5'"),
        (PermissionError(13, "Permission denied", "/out"), "error: /out: permission denied; choose"),
        (IsADirectoryError(21, "Is a directory", "runs"), "error: runs: is a directory; give"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    assert leave(monkeypatch, error) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        leave(monkeypatch, ZeroDivisionError())


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert leave(monkeypatch, KeyboardInterrupt()) == 130


def test_the_program_leaves_at_once_after_an_interrupt() -> None:
    """Nothing is taken apart any more, but what was registered for the end is done and output is written."""
    lines = [
        "import atexit, sys",
        "from ffpretrain import cli",
        "class Slow:",
        "    def __del__(self): print('taken apart')",
        "keep = Slow()",
        "atexit.register(lambda: print('registered'))",
        "def main(): print('said', end=' '); sys.exit(int(sys.argv[1]))",
        "cli.main = main",
        "cli.run()",
    ]
    for code, said in ((cli.INTERRUPTED, "said registered\n"), (2, "said registered\ntaken apart\n")):
        command = [sys.executable, "-c", "\n".join(lines), str(code)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (code, said, "")


def test_verbs_parse_their_own_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave(monkeypatch, None, "--count", "3") == 0
    assert leave(monkeypatch, None, "--count", "three") == 2
    assert "Invalid value for '--count'" in capsys.readouterr().err


def test_doctor_reports_as_json() -> None:
    result = ffpretrain_command("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["schema"] == 1
    assert report["units"] == {"memory": "GiB", "seconds": "s"}
    assert report["problems"] == []
    assert result.returncode == 0
    assert Path(report["location"]).resolve() == Path(ffpretrain.__file__).resolve().parent
    assert report["required"]["torch"]
    assert {model["name"] for model in report["models"]} == set(ffpretrain.list_models())
    assert all(model["verified"] for model in report["models"])
    assert sum(device["chosen"] for device in report["devices"]) == 1


def test_doctor_names_a_compiler_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = doctor.check_compiler()
    assert found["works"] is False
    assert "no-such-compiler" in found["error"]
    monkeypatch.setenv("CXX", "false")
    assert doctor.check_compiler()["error"] == "exit code 1"


def test_doctor_names_the_extra_that_installs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name, package in doctor.OPTIONAL.items():
        if name == "tensorboard":  # logs of training alone, which no extra is for
            continue
        extra = package.install.removeprefix('"ffpretrain[').removesuffix(']"')
        assert any(line.startswith(name) for line in extras[extra]), name


def test_doctor_tells_what_is_installed_from_what_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in {
        "broken_one": "raise ImportError('libnone.so.1: cannot open')",
        "crashing_one": "import os; os._exit(9)",
        "talking_one": "print('hello')",
        "starting_one": "def start(): raise OSError('libmpi.so.12: cannot open')",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    modules = ["json", "crashing_one", "talking_one", "broken_one", "starting_one", "starting_one:start"]
    assert Imports(modules).errors() == {
        "crashing_one": "the interpreter crashes",
        "broken_one": "libnone.so.1: cannot open",
        "starting_one:start": "libmpi.so.12: cannot open",
    }
    monkeypatch.setattr(doctor, "REQUIRED", {"h5py": "broken_one"})
    monkeypatch.setattr(doctor, "OPTIONAL", {"numpy": doctor.Optional("broken_one", "numpy", "sums")})
    monkeypatch.setattr(doctor, "check_models", list)
    report = doctor.collect()
    assert report["problems"] == ["h5py cannot be imported: libnone.so.1: cannot open"]
    text = "\n".join(doctor.format_report(report))
    assert "installed, but cannot be imported: libnone.so.1: cannot open" in text


def test_doctor_tries_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    places = {"/proc/nope": False, str(tmp_path / "file"): False, str(tmp_path / "file" / "below"): False}
    for place, writable in {**places, str(tmp_path / "new" / "folder"): True}.items():
        monkeypatch.setenv("FFPRETRAIN_CACHE", place)
        assert doctor.check_cache()["writable"] is writable, place
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_doctor_promises_no_build_by_a_compiler_that_does_not_work(tmp_path: Path) -> None:
    result = ffpretrain_command("doctor", CXX="/bin/false", FFPRETRAIN_CACHE=str(tmp_path))
    assert "does not work: exit code 1" in result.stdout and "needs a compiler that works" in result.stdout
    assert "background" not in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


def test_doctor_exits_1_on_a_damaged_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [{"name": "m", "verified": False, "path": None, "error": "m.safetensors: checksum differs"}]
    monkeypatch.setattr(doctor, "check_models", lambda: broken)
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor"])
    assert caught.value.code == 1
    assert "checksum differs" in capsys.readouterr().out


def test_models_lists_the_named_models() -> None:
    text = ffpretrain_command("models")
    assert text.returncode == 0, text.stderr
    answer = json.loads(ffpretrain_command("models", "--json").stdout)
    assert answer["schema"] == 1
    assert [model["name"] for model in answer["models"]] == ffpretrain.list_models()
    assert {"ndem-aspirin", "ndem-ethanol"} <= set(ffpretrain.list_models())
    for model in answer["models"]:
        assert model["name"] in text.stdout
        assert model["level_of_theory"] in text.stdout
        assert model["elements"]
        assert model["licence"]
        assert 0 < model["size"] <= 6e6
        assert model["force_mae"]


def test_models_converts_errors_and_says_what_is_unknown() -> None:
    card = ModelCard(
        name="m",
        backbone=Component(name="painn"),
        elements=[1, 8],
        cutoff=5.0,
        compositions=["H2O"],
        errors={
            "test": MeasuredErrors(
                dataset="water, test",
                n_frames=10,
                quantities={
                    "forces_mae": Quantity(value=0.2, unit="kcal/mol/angstrom"),
                    "energy_mae": Quantity(value=3.0, unit="meV"),
                },
            )
        },
    )
    model = {**models.summarize(card), "size": 1_500_000}
    assert model["elements"] == ["H", "O"]
    assert model["force_mae"]["water, test"] == pytest.approx(0.2 * 0.0433641, rel=1e-5)
    assert model["energy_mae"] == {"water, test": pytest.approx(0.003)}
    text = "\n".join(models.format_model(model))
    assert "8.7 meV/Å = 0.200 kcal/mol/Å on water, test" in text
    assert "1.5 MB, licence not stated" in text
    assert "H O in H2O" in text


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("h5py", ["label", "water.xyz", "--engine", "emt"]),
        ("matplotlib", ["landscape", "ndem-ethanol", "--points", "3", "--out", "drawn"]),
        ("matplotlib", ["validate", "ndem-ethanol", "--out", "examined"]),
    ],
)
def test_a_package_that_cannot_be_loaded_is_one_line_before_any_work(
    tmp_path: Path, package: str, words: list[str]
) -> None:
    broken, here = tmp_path / "broken" / package, tmp_path / "here"
    broken.mkdir(parents=True)
    here.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libnone.so.1: cannot open shared object file')\n")
    (here / "water.xyz").write_text("3\n\nO 0 0 0.12\nH 0 0.76 -0.48\nH 0 -0.76 -0.48\n")
    path = os.pathsep.join([str(broken.parent), str(Path(ffpretrain.__file__).parents[1])])
    command = [sys.executable, "-m", "ffpretrain", *words]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=here, check=False, timeout=120
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert package in result.stderr and "libnone.so.1" in result.stderr
    assert [path.name for path in here.iterdir()] == ["water.xyz"]


def test_an_import_error_of_this_package_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError):
        leave(monkeypatch, ImportError("cannot import name", name="ffpretrain.md"))
