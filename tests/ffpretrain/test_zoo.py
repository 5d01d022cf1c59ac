"""Named models: the registry, checksums, and that what ships is whole and says what it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from ffpretrain import list_models, load_potential, zoo
from ffpretrain.artifacts import make_card, read_card, save_potential
from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ArtifactError
from ffpretrain.graphs import graph_from_atoms
from ffpretrain.potential import Potential
from ffpretrain.zoo import __main__ as command

MAX_BYTES = 6_000_000


def model_file(path: Path, name: str = "tiny-water", seed: int = 1) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        potential = Potential(create_backbone("torchmd-et", hidden=16, layers=1, heads=2), elements=[1, 8])
    return save_potential(potential, path, make_card(potential, name, description="random"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of its own with one model."""
    path = tmp_path / "zoo"
    path.mkdir()
    (path / "registry.json").write_text("{}\n")
    monkeypatch.setattr(zoo, "_FOLDER", path)
    zoo.register_model("tiny-water", model_file(tmp_path / "made.safetensors"))
    return path


def test_named_model_is_listed_read_and_loaded(folder: Path) -> None:
    assert list_models() == ["tiny-water"]
    assert zoo.model_path("tiny-water") == folder / "tiny-water.safetensors"
    assert zoo.model_card("tiny-water") == read_card("tiny-water")
    assert load_potential("tiny-water").card == read_card("tiny-water")
    entry = json.loads((folder / "registry.json").read_text())["tiny-water"]
    content = (folder / "tiny-water.safetensors").read_bytes()
    assert entry == {
        "file": "tiny-water.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "description": "random",
    }


def test_a_name_comes_before_a_file_of_that_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny-water").mkdir()
    assert load_potential("tiny-water").card is not None
    with pytest.raises(ArtifactError, match="is a folder"):
        load_potential("./tiny-water")


def test_unknown_name_offers_the_nearest(folder: Path) -> None:
    for use in (load_potential, read_card, zoo.model_path, zoo.model_card):
        with pytest.raises(ArtifactError, match=r"'tiny-watr'.*did you mean 'tiny-water'"):
            use("tiny-watr")


def test_exchanged_file_is_refused_everywhere(folder: Path) -> None:
    file = model_file(folder / "tiny-water.safetensors", seed=2)
    for use in (load_potential, read_card, zoo.model_path, zoo.model_card):
        with pytest.raises(ArtifactError, match=r"'tiny-water' is damaged \(SHA-256 .*reinstall"):
            use("tiny-water")
    # by path it is a file like any other
    assert load_potential(file).card is not None


def test_missing_file_is_refused(folder: Path) -> None:
    (folder / "tiny-water.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"tiny-water\.safetensors: no such model file"):
        load_potential("tiny-water")


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"file": "x"}}'])
def test_damaged_registry_is_refused(content: str, folder: Path) -> None:
    (folder / "registry.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"registry\.json: .*reinstall ffpretrain"):
        list_models()


def test_registering_replaces_and_keeps_the_others(folder: Path, tmp_path: Path) -> None:
    zoo.register_model("another", model_file(tmp_path / "another.safetensors", "another"))
    before = zoo.model_path("tiny-water").read_bytes()
    zoo.register_model("tiny-water", model_file(tmp_path / "new.safetensors", seed=2))
    assert list_models() == ["another", "tiny-water"]
    assert zoo.model_path("tiny-water").read_bytes() != before
    assert sorted(p.name for p in folder.iterdir()) == [
        "another.safetensors",
        "registry.json",
        "tiny-water.safetensors",
    ]


def test_what_does_not_load_is_not_registered(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = (folder / "registry.json").read_text()
    good, bad = model_file(tmp_path / "a.safetensors", "other-name"), tmp_path / "bad.safetensors"
    bad.write_bytes(good.read_bytes()[:-5])
    for name, file, words in [
        ("Tiny Water", good, "lower-case letters"),
        ("../escape", good, "lower-case letters"),
        ("new-one", good, "its card calls the model 'other-name'"),
        ("other-name", bad, "truncated"),
        ("other-name", tmp_path / "none", "no such model file"),
    ]:
        assert command.main(["add", name, str(file)]) == 2
        assert words in capsys.readouterr().err
    assert (folder / "registry.json").read_text() == registry
    assert command.main(["add", "other-name", str(good)]) == 0
    assert "SHA-256" in capsys.readouterr().out
    assert list_models() == ["other-name", "tiny-water"]


def test_files_and_registry_of_the_package_agree() -> None:
    shipped = {entry.file for entry in zoo.read_registry().values()}
    assert shipped == {path.name for path in zoo._FOLDER.glob("*.safetensors")}


def test_every_shipped_model_is_whole_small_and_documented() -> None:
    for name in list_models():
        potential = load_potential(name)
        card = potential.card
        assert card is not None and card.name == name
        assert zoo.model_path(name).stat().st_size <= MAX_BYTES
        for field in ("description", "level_of_theory", "energy_zero", "licence", "citation", "objective"):
            assert getattr(card, field), f"{name}: {field}"
        for field in ("recipe", "errors", "compositions", "min_distance", "reference_geometry"):
            assert getattr(card, field), f"{name}: {field}"
        for data in card.training_data:
            assert data.sha256 and data.n_train and data.n_val and data.licence, name
        assert card.training_data and card.training.hardware and card.training.wall_seconds, name
        assert card.reference_geometry is not None
        out = potential(graph_from_atoms(card.reference_geometry.to_atoms(), potential.cutoff))
        assert bool(torch.isfinite(out["energy"]).all()) and bool(torch.isfinite(out["forces"]).all())
