"""``ffpretrain data`` as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ffpretrain.cli import main
from ffpretrain.datasets import open_dataset

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command and return its exit code, output and errors."""

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["data", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.parametrize("verb", ["list", "info", "check", "convert", "split", "download"])
def test_help_fits_a_screen(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 24


def test_list(run: Run) -> None:
    code, out, _ = run("list")
    assert code == 0
    for word in ("ethanol-gfn2", "rmd17", "md17-aspirin", "extxyz"):
        assert word in out
    listed = json.loads(run("list", "--json")[1])
    assert (listed["schema"], listed["version"]) == ("ffpretrain-data-list", 1)
    assert listed["downloads"]["rmd17"]["licence"] == "CC0-1.0"


def test_info(run: Run, shared_data: Path) -> None:
    words = ("info", "rmd17", "ethanol", "-o", f"root={shared_data / 'rmd17'}", "-o", "split=1")
    code, out, _ = run(*words)
    assert code == 0
    for word in ("2000 of 9 atoms, C2H6O", "27.5", "kcal/mol/Å", "PBE/def2-SVP", "CC0-1.0", "train: 1000"):
        assert word in out
    summary = json.loads(run(*words, "--json")[1])
    assert (summary["schema"], summary["version"]) == ("ffpretrain-data-info", 1)
    assert summary["forces"]["component RMS (kcal/mol/Å)"] == pytest.approx(27.5, rel=0.01)


def test_check(run: Run, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "sgdml" / "ethanol_ccsd_t-train.npz"
    code, out, _ = run("check", "md17", source)
    assert (code, out.split(":")[0]) == (0, "consistent")
    with np.load(source, allow_pickle=False) as arrays:
        np.savez(tmp_path / "bad.npz", E=arrays["E"], F=-arrays["F"], R=arrays["R"], z=arrays["z"])
    options = ("-o", "units.energy=kcal/mol", "-o", "units.length=angstrom")
    code, out, _ = run("check", tmp_path / "bad.npz", *options, "--json")
    report = json.loads(out)
    assert code == 1
    assert (report["ok"], report["verdict"]) == (False, "wrong sign")
    assert report["slope"] == pytest.approx(-1, abs=0.03)


def test_check_without_labels_is_valid_json(run: Run, shared_data: Path) -> None:
    code, out, _ = run("check", shared_data / "3bpa" / "iso_atoms.xyz", "--json")
    report = json.loads(out)
    assert (code, report["verdict"], report["slope"]) == (0, "no labels", None)


def test_convert_and_split(run: Run, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "oc20" / "random1000163.traj"
    store, text, saved = tmp_path / "slab.h5", tmp_path / "slab.extxyz", tmp_path / "split.json"
    assert run("convert", source, store)[0] == 0
    assert run("convert", store, text)[0] == 0
    original, converted = open_dataset(source), open_dataset(text)
    assert len(converted) == len(original) == 27
    assert converted[9].energy == original[9].energy
    np.testing.assert_array_equal(converted[9].fixed, original[9].fixed)
    code, out, _ = run("split", store, "--train", 20, "--val", 5, "--seed", 3, "--out", saved)
    assert (code, "20 train, 5 val, 0 test of 27 frames" in out) == (0, True)
    assert len(json.loads(saved.read_text())["train"]) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("info", "missing.extxyz"), "no such xyz file"),
        (("info", "rmd17", "asprin"), "did you mean 'aspirin'"),
        (("info", "ethanol-gfn2", "-o", "split"), "not of the form key=value"),
        (("info", "ethanol-gfn2", "-o", "spilt=1"), "has no option 'spilt'"),
        (("check", "ethanol-gfn2", "--pairs", "1"), "at least 10"),
        (("convert", "ethanol-gfn2", "out.pdb"), "change the ending"),
        (("download", "rdm17"), "did you mean 'rmd17'"),
        (("split", "ethanol-gfn2", "--train", "5000", "--val", "1", "--out", "s.json"), "ask for fewer"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run: Run, words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_download_without_a_network(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffpretrain.datasets import catalog
    from ffpretrain.datasets.catalog import Download, RemoteFile

    nowhere = RemoteFile("file.bin", ("http://127.0.0.1:9/file.bin",))
    monkeypatch.setitem(catalog.CATALOG, "qm9", Download("", "qm9", (nowhere,)))
    monkeypatch.setenv("FFPRETRAIN_CACHE", str(tmp_path / "cache"))
    code, _, err = run("download", "qm9")
    assert code == 2
    assert "check the network" in err
    assert len(err.strip().splitlines()) == 1
