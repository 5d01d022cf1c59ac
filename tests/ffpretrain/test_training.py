"""From recipe to model file: cards, folders, fine-tuning, early stops, values that are not finite."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from ffpretrain import cli, load_potential, units
from ffpretrain.artifacts import file_sha256, read_card
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.frames import Frame, InMemoryDataset
from ffpretrain.errors import ArtifactError, ConfigError, DataError, NonFiniteError
from ffpretrain.evaluation import error_table, predict
from ffpretrain.objectives.fields import DenoisingField
from ffpretrain.recipes import load_recipe
from ffpretrain.training import run as run_module
from ffpretrain.training.checkpoints import AtomicCheckpointIO, is_complete, read_checkpoint
from ffpretrain.training.config import Recipe
from ffpretrain.training.finish import build_card, finish
from ffpretrain.training.logs import Table
from ffpretrain.training.pretrained import open_pretrained
from ffpretrain.training.process import borrowed_process, user_error_of
from ffpretrain.training.progress import Progress
from ffpretrain.training.run import Run, fit, prepare, train
from ffpretrain.training.survey import survey_frames

SIZE = {"hidden": 8, "layers": 1, "heads": 2, "rbf": 4, "max_z": 9}
TINY = {
    "model.backbone": {"name": "torchmd-et", "options": SIZE},
    "data.train": 10,
    "data.val": 4,
    "data.test": 3,
    "trainer.max_steps": 4,
    "trainer.batch_size": 4,
    "trainer.val_every_steps": 2,
    "trainer.ema_decay": 0.5,
    "trainer.threads": 1,
    "schedule.warmup_steps": 1,
}


def recipe(name: str = "demo-finetune", **changes: Any) -> Recipe:
    """A run of a second on the bundled data; ``__`` stands for a dot."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(name, {**TINY, **dotted})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a supervised run that has ended."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe(licence="MIT", citation=["a paper"]), out, progress=False)
    return out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model file of a run without labels."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    return train(recipe("demo-pretrain"), out, progress=False)


# ---------------------------------------------------------------- the card


def test_the_card_says_what_was_done(finished: Path) -> None:
    card = read_card(finished / "model.safetensors")
    frames = open_dataset("ethanol-gfn2")
    data = card.training_data[0]
    assert (card.name, card.kind, card.licence, card.citation) == (
        "demo-ethanol",
        "potential",
        "MIT",
        ["a paper"],
    )
    assert (data.name, data.sha256) == (frames.metadata.name, dict(frames.metadata.sha256))
    assert (data.split_seed, data.n_train, data.n_val, data.n_test) == (0, 10, 4, 3)
    assert data.level_of_theory == card.level_of_theory == frames.metadata.level_of_theory
    assert card.energy_zero == frames.metadata.energy_zero
    assert (card.elements, card.compositions, card.charges, card.spins) == ([1, 6, 8], ["C2H6O"], [0], [1])
    assert card.recipe is not None
    assert Recipe.model_validate(card.recipe) == recipe(licence="MIT", citation=["a paper"])
    assert card.objective is not None
    assert card.objective.name == "ndem"
    assert card.objective.options["ndem_weight"] == 0.01
    assert card.objective.options["levels"] == 50  # a default, written out
    run = card.training
    assert (run.steps, run.seed, run.torch) == (4, 0, str(torch.__version__))
    assert run.selected_step in (2, 4)
    assert run.wall_seconds is not None
    assert 0 < run.wall_seconds < 600
    assert run.hardware is not None
    assert run.hardware.endswith("1 thread")
    assert os.uname().nodename not in card.to_json().split()
    assert card.parents == []


def test_numbers_of_the_card_are_those_of_the_training_frames(finished: Path) -> None:
    card = read_card(finished / "model.safetensors")
    splits = json.loads((finished / "splits.json").read_text())
    frames = [open_dataset("ethanol-gfn2")[i] for i in splits["train"]]
    lowest = min(frames, key=lambda frame: frame.energy or 0.0)
    geometry = card.reference_geometry
    assert geometry is not None
    assert np.array_equal(geometry.positions, lowest.positions)
    assert geometry.numbers == lowest.numbers.tolist()
    distances = [
        np.linalg.norm(frame.positions[:, None] - frame.positions, axis=-1)[np.triu_indices(9, 1)]
        for frame in frames
    ]
    assert card.min_distance == pytest.approx(min(d.min() for d in distances), rel=1e-12)
    rms = float(np.sqrt(np.mean([np.square(frame.forces) for frame in frames])))
    assert card.training_data[0].statistics["forces_rms"].value == pytest.approx(rms, rel=1e-12)
    assert card.energy_scale == pytest.approx(rms, rel=1e-12)


def test_the_file_holds_the_best_weights_and_their_errors(finished: Path) -> None:
    model = load_potential(finished / "model.safetensors")
    best = read_checkpoint(finished / "checkpoints" / "best.ckpt")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, best["state_dict"][f"objective.network.{name}"])
    assert model.card is not None
    splits = json.loads((finished / "splits.json").read_text())
    errors = error_table(predict(model, open_dataset("ethanol-gfn2")[splits["val"]]))
    said = model.card.errors["validation"]
    assert said.n_frames == 4
    assert said.quantities["forces_mae"].value == pytest.approx(errors["forces_mae"].value, rel=1e-6)
    scores = [s["best_model_score"] for k, s in best["callbacks"].items() if k.startswith("ModelCheckpoint")]
    assert float(scores[0]) == pytest.approx(errors["forces_mae"].value, rel=1e-5)
    assert said.quantities["forces_mae"].unit == "eV/angstrom"


def test_no_folder_of_this_machine_stands_in_the_card(shared_data: Path) -> None:
    """The named models' data come from a folder; the card has the file's name and checksum alone."""
    root = shared_data / "rmd17"
    changes = {"data.options.root": str(root), "data.options.split": 1, "model.backbone.options": SIZE}
    run = prepare(load_recipe("ndem-aspirin", {**changes, "trainer.compile": False}))
    card = build_card(run, run.module.objective.network.eval(), survey_frames(run.dataset[:20], 5.0))
    name = "rmd17_aspirin_train_01.npz"
    assert card.training_data[0].sha256 == {name: file_sha256(root / name)}
    assert (card.training_data[0].n_train, card.training_data[0].n_val) == (950, 50)
    assert (card.level_of_theory, card.compositions) == ("PBE/def2-SVP", ["C9H8O4"])
    assert str(shared_data) not in card.to_json()
    assert card.recipe is not None
    assert card.recipe["data"]["options"] == {"part": "train", "split": 1}  # type: ignore[index,call-overload]


def test_paths_in_a_recipe_become_names(tmp_path: Path, finished: Path) -> None:
    copied = tmp_path / "splits.json"
    copied.write_bytes((finished / "splits.json").read_bytes())
    run = prepare(recipe(data__split_file=str(copied)))
    card = build_card(run, run.module.objective.network.eval(), survey_frames(run.dataset[:3], 5.0))
    assert str(tmp_path) not in card.to_json()
    assert card.training_data[0].split.endswith("as in the split file splits.json")


def frame(symbols: str, positions: Any, **fields: Any) -> Frame:
    from ase import Atoms

    return Frame(Atoms(symbols).numbers, np.array(positions, float), **fields)


def test_a_survey_by_hand() -> None:
    water = frame("OHH", [[0, 0, 0], [0, 0, 1.0], [0, 1.2, 0]], energy=-1.0)
    stretched = frame("HOH", [[0, 0, 2.0], [0, 0, 0], [0, 0.9, 0]], energy=-2.0, charge=1, spin=2)
    chain = frame("He", [[0, 0, 0]], cell=np.diag([9.0, 9.0, 3.0]), pbc=(False, False, True), energy=5.0)
    found = survey_frames([water, stretched, chain], 4.0)
    assert found.elements == [1, 2, 8]
    assert found.compositions == ["H2O", "He"]
    assert (found.charges, found.spins) == ([0, 1], [1, 2])
    assert found.pair_distances["H-O"] == pytest.approx((0.9, 2.0))
    assert found.pair_distances["H-H"] == pytest.approx((np.hypot(1, 1.2), np.hypot(2, 0.9)))
    assert found.pair_distances["He-He"] == pytest.approx((3.0, 3.0))
    assert found.min_distance == pytest.approx(0.9)
    assert found.lowest is stretched
    assert survey_frames([frame("He", [[0, 0, 0]])], 4.0).min_distance is None
    with pytest.raises(DataError, match="empty"):
        survey_frames([], 4.0)


# ---------------------------------------------------------------- the folder


def test_a_complete_run_is_finished_again_without_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a run that only prepare() and fit() made: there is no recipe file to compare then."""
    chosen = recipe(licence="MIT", citation=["a paper"])
    before = (finished / "model.safetensors").read_bytes()
    monkeypatch.setattr(run_module, "fit", None)
    train(chosen, finished, resume=True, progress=False)
    assert (finished / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    plain = recipe(trainer__max_steps=2)
    fit(prepare(plain), tmp_path)
    path = train(plain, tmp_path, resume=True, progress=False)
    assert read_card(path).training.steps == 2
    assert finish(prepare(plain), tmp_path) == path


def test_a_folder_with_a_run_is_not_touched(finished: Path, tmp_path: Path) -> None:
    same = {"licence": "MIT", "citation": ["a paper"]}
    for chosen, flags, message in (
        (recipe(**same), {}, "already holds a run; go on with --resume, replace it with --overwrite"),
        (recipe(**same), {"resume": True, "overwrite": True}, "exclude each other"),
        (recipe(optimizer__lr=0.5), {"resume": True}, r"started with optimizer.lr=0.0015, not 0.5; resume"),
        (recipe(trainer__seed=5, trainer__max_steps=9), {"resume": True}, r"max_steps=4, not 9 and 1 more"),
    ):
        before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
        with pytest.raises(ConfigError, match=message):
            train(chosen, finished, progress=False, **flags)
        assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    with pytest.raises(DataError, match="holds no checkpoint to resume from"):
        train(recipe(), tmp_path / "nothing", resume=True, progress=False)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").touch()
    with pytest.raises(DataError, match="start again with --overwrite"):
        train(recipe(), tmp_path / "begun", resume=True, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        train(recipe(), tmp_path / "file", progress=False)


def test_overwriting_replaces_the_run_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe(trainer__max_steps=2), out, progress=False)
    (out / "notes.txt").write_text("mine")
    train(recipe(trainer__max_steps=3, trainer__seed=1), out, overwrite=True, progress=False)
    assert (out / "notes.txt").read_text() == "mine"
    card = read_card(out / "model.safetensors")
    assert (card.training.steps, card.training.seed) == (3, 1)
    rows = (out / "logs" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "2", "2", "3", "3"]


def test_resuming_with_other_frames_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe(trainer__max_steps=2), out, progress=False)
    saved = json.loads((out / "splits.json").read_text())
    for key, value, message in (
        ("train", saved["train"][::-1], "the train frames of the run are others"),
        ("sha256", {"other.h5": "0" * 64}, "started with other data files"),
    ):
        (out / "splits.json").write_text(json.dumps({**saved, key: value}))
        with pytest.raises(DataError, match=message):
            train(recipe(trainer__max_steps=2), out, resume=True, progress=False)


def test_a_run_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for changes, message in (
        ({"data__train": 5000}, "has 1200 frames, too few for train 5000"),
        ({"data__train": 0.0001}, "too few for train 0.0001"),
        ({"data__source": "absent.h5"}, "absent.h5"),
        ({"objective__name": "ndm"}, "unknown objective 'ndm'; did you mean 'ndem'"),
        ({"objective__options": {"ndem_wieght": 1}}, "no option 'ndem_wieght'; did you mean 'ndem_weight'"),
        ({"objective__options": {"ndem_weight": "much"}}, "ndem_weight='much' is no valid value: input"),
        ({"objective__options": {"strains": 5}}, "strains=5 is no valid value: give a list"),
        ({"model__backbone": {"options": {**SIZE, "layers": "two"}}}, "layers='two' is no valid value"),
        ({"model__pretrained_head": True}, "needs model.pretrained"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            train(recipe(**changes), out, progress=False)
        assert not out.exists()


def test_fractions_of_the_data() -> None:
    run = prepare(recipe(data__train=0.05, data__val=0.01, data__test=None))
    assert run.splits.sizes() == {"train": 60, "val": 12, "test": 1128}
    assert prepare(recipe(data__train=0.1, data__val=3)).splits.sizes() == {"train": 120, "val": 3, "test": 3}


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(DataError, match=r"last\.ckpt: cannot be read"):
        read_checkpoint(tmp_path / "last.ckpt")
    torch.save({"state_dict": {}, "global_step": 1, "code": Path("x")}, tmp_path / "code.ckpt")
    with pytest.raises(DataError, match="cannot be read"):  # anything but tensors and plain values
        read_checkpoint(tmp_path / "code.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(DataError, match="is no checkpoint of a training run"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_a_checkpoint_of_another_network_is_refused(finished: Path) -> None:
    with pytest.raises(DataError, match="does not fit the recipe's network"):
        finish(prepare(recipe(model__backbone={"options": {**SIZE, "hidden": 16}})), finished)


def test_checkpoints_are_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 1}, path)

    def fail(*args: Any) -> None:
        args[1].write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 2}, path)
    assert read_checkpoint(path)["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


# ---------------------------------------------------------------- starting from another model


def test_pretraining_gives_a_field_that_never_saw_a_label(pretrained: Path) -> None:
    card = read_card(pretrained)
    assert (card.kind, card.head.name) == ("field", "vector")
    assert (card.level_of_theory, card.energy_zero) == (None, None)
    said = card.errors["validation"]
    assert (set(said.quantities), said.n_frames) == ({"loss", "zero", "floor"}, 4)
    best = read_checkpoint(pretrained.parent / "checkpoints" / "best.ckpt")["callbacks"]
    score = next(float(state["best_model_score"]) for state in best.values() if "best_model_score" in state)
    assert said.quantities["loss"].value == pytest.approx(score, rel=1e-5)
    assert (card.elements, card.compositions) == ([1, 6, 8], ["C2H6O"])
    # kT / sigma, since the head predicts noise in units of sigma
    assert card.temperature == 500.0
    assert card.force_scale == pytest.approx(units.KB * 500 / 0.04)
    field = load_potential(pretrained)
    assert isinstance(field, DenoisingField)


def test_noise_that_taught_an_energy_gives_a_potential(tmp_path: Path) -> None:
    path = train(
        recipe("demo-pretrain", objective__options={"head": "energy-gradient"}), tmp_path, progress=False
    )
    model = load_potential(path)
    assert model.card is not None
    assert (model.card.kind, model.card.energy_zero) == ("potential", "arbitrary: learned without energies")


def test_fine_tuning_starts_from_the_backbone(pretrained: Path, tmp_path: Path) -> None:
    run = prepare(recipe(model__backbone=None, model__pretrained=str(pretrained), trainer__seed=1))
    parent = load_potential(pretrained, trainable=True)
    network = run.module.objective.network
    for name, weight in parent.backbone.named_parameters():
        assert torch.equal(weight, dict(network.backbone.named_parameters())[name])
    assert not torch.equal(network.head.first.hidden.weight, parent.head.first.hidden.weight)
    assert run.notes == []
    out = tmp_path / "run"
    card = read_card(train(run.recipe, out, progress=False))
    assert [(p.name, p.sha256) for p in card.parents] == [("demo-pretrain", file_sha256(pretrained))]
    assert str(pretrained) not in card.to_json()
    started = prepare(recipe(model__backbone=None))
    assert network.backbone.n_features == 8 != started.module.objective.network.backbone.n_features


def test_weights_that_do_not_match_are_listed_or_refused(pretrained: Path) -> None:
    path = str(pretrained)
    other = {"name": "torchmd-et", "options": {**SIZE, "layers": 2}}
    run = prepare(recipe(model__backbone=other, model__pretrained=path))
    assert len(run.notes) == 1
    assert run.notes[0].startswith("not in demo-pretrain, left as drawn: backbone.layers.1.")
    wider = {"name": "torchmd-et", "options": {**SIZE, "hidden": 16}}
    with pytest.raises(ConfigError, match=r"embedding.weight is \[9, 8\] in demo-pretrain and \[9, 16\]"):
        prepare(recipe(model__backbone=wider, model__pretrained=path))
    painn = {"name": "painn", "options": {"hidden": 8, "layers": 1}}
    with pytest.raises(ConfigError, match=r"no weight in common|is \["):
        prepare(recipe(model__backbone=painn, model__pretrained=path))
    with pytest.raises(ConfigError, match="is a field with head 'vector', it has learned no energy head"):
        prepare(recipe(model__pretrained=path, model__pretrained_head=True))
    with pytest.raises(ArtifactError, match="no model is called 'ndem-asprin'"):
        prepare(recipe(model__pretrained="ndem-asprin"))


def test_a_head_is_taken_over_with_its_unit(finished: Path, tmp_path: Path) -> None:
    path = str(finished / "model.safetensors")
    run = prepare(
        recipe(model__backbone=None, model__pretrained=path, model__pretrained_head=True, data__train=30)
    )
    parent, network = load_potential(path), run.module.objective.network
    assert torch.equal(network.scale, parent.scale)
    assert not torch.equal(network.reference, parent.reference)
    graph = run_module._feed(run)._val[0].graph
    torch.testing.assert_close(network.eval()(graph)["forces"], parent(graph)["forces"])


def test_going_on_with_other_data_is_doubted(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "model__backbone": None,
        "model__pretrained": str(finished / "model.safetensors"),
        "model__pretrained_head": True,
    }
    assert prepare(recipe(**changes)).notes == []
    (same_file,) = prepare(recipe(**changes, data__split_seed=3)).notes
    assert "split with data.split_seed=0: validation frames may be among them" in same_file
    assert prepare(recipe(**{**changes, "model__pretrained_head": False}, data__split_seed=3)).notes == []
    parent = open_pretrained(recipe(**changes).model)
    assert parent is not None and parent.potential.card is not None
    update = {"compositions": ["CH4O"], "level_of_theory": "PBE/def2-SVP"}
    card = parent.potential.card.model_copy(update=update)
    parent.potential.card = card
    monkeypatch.setattr(run_module, "open_pretrained", lambda _: parent)
    level, composition = prepare(recipe(**changes)).notes
    assert level.startswith("demo-ethanol learned PBE/def2-SVP, these labels are GFN2-xTB")
    assert (
        composition.startswith("demo-ethanol: ")
        and "have composition C2H6O, which the model was not" in composition
    )


def test_elements_the_parent_never_saw(finished: Path, tmp_path: Path) -> None:
    from ase.build import molecule
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    frames = []
    for k in range(6):
        atoms = molecule("NH3")
        atoms.rattle(0.05, seed=k)
        atoms.calc = SinglePointCalculator(atoms, energy=float(k), forces=atoms.positions)
        frames.append(atoms)
    write(tmp_path / "ammonia.extxyz", frames)
    changes = {
        "data__source": str(tmp_path / "ammonia.extxyz"), "data__train": 4, "data__val": 2, "data__test": 0,
        "model__backbone": None, "model__pretrained": str(finished / "model.safetensors"),
    }  # fmt: skip
    assert prepare(recipe(**changes)).notes == ["new elements, whose embeddings are untrained: N"]
    with pytest.raises(ConfigError, match="demo-ethanol never saw N"):
        prepare(recipe(**changes, model__pretrained_head=True))


# ---------------------------------------------------------------- stopping


class Frames(InMemoryDataset):
    """Frames with a value planted after the labels were read."""


def planted(run: Run, part: str, position: int) -> int:
    """Make a force of a frame NaN; return the frame's number."""
    number = int(run.splits[part][position])
    frames = [run.dataset[i] for i in range(len(run.dataset))]
    forces = frames[number].forces
    assert forces is not None
    bad = forces.copy()
    bad[0, 0] = np.nan
    frames[number] = Frame(frames[number].numbers, frames[number].positions, energy=0.0, forces=bad)
    run.dataset = Frames(frames, run.dataset.metadata)
    return number


def test_a_loss_that_is_not_finite_names_its_frames(tmp_path: Path) -> None:
    run = prepare(recipe(trainer__max_steps=9))
    number = planted(run, "train", 4)
    with pytest.raises(NonFiniteError, match=rf"the loss is not finite at step \d; frames.*\b{number}\b"):
        fit(run, tmp_path)


def test_a_validation_error_that_is_not_finite_names_its_frames(tmp_path: Path) -> None:
    run = prepare(recipe(trainer__early_stopping=1))
    number = planted(run, "val", 2)
    with pytest.raises(NonFiniteError, match=rf"validation error forces_mae is not finite.*\b{number}\b"):
        fit(run, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path: Path) -> None:
    run = prepare(recipe())
    weight = run.module.objective.network.head.second.out.weight
    before = weight.detach().clone()
    weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        NonFiniteError, match=r"the gradient of objective\.network\.head\.second\.out\.weight"
    ) as e:
        fit(run, tmp_path)
    frames = [int(x) for x in str(e.value).split("[")[1].split("]")[0].split(",")]
    assert len(frames) == 4
    assert set(frames) <= set(run.splits.train.tolist())
    assert torch.equal(weight, before)


def test_errors_of_child_processes_keep_their_kind() -> None:
    text = 'Traceback\n  File "x"\nffpretrain.errors.NonFiniteError: the loss is not finite; frames: [1]\n'
    error = user_error_of(RuntimeError(text))
    assert isinstance(error, NonFiniteError)
    assert str(error) == "the loss is not finite; frames: [1]"
    other = RuntimeError("Traceback\nKeyError: 'x'")
    assert user_error_of(other) is other


def test_early_stopping_ends_the_run_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate of next to nothing no validation gains: the second one after the first stops."""
    chosen = recipe(
        trainer__max_steps=40, trainer__early_stopping=2, trainer__ema_decay=None, optimizer__lr=1e-30
    )
    path = train(chosen, tmp_path / "run", progress=False)
    assert read_card(path).training.steps == 6
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert is_complete(last, 40)
    monkeypatch.setattr(run_module, "fit", None)
    train(chosen, tmp_path / "run", resume=True, progress=False)
    running = {"global_step": 6, "callbacks": {"EarlyStopping{}": {"wait_count": 1, "patience": 2}}}
    assert not is_complete(running, 40)
    assert is_complete(running, 6)


def test_an_unknown_quantity_to_watch(tmp_path: Path) -> None:
    chosen = recipe("demo-pretrain", schedule__name="plateau", schedule__monitor="val/forces_mae")
    with pytest.raises(ConfigError, match=r"no quantity 'val/forces_mae' is measured; known: val/loss"):
        fit(prepare(chosen), tmp_path)


# ---------------------------------------------------------------- what a run does to the process


def test_double_precision_reaches_the_file(tmp_path: Path) -> None:
    path = train(recipe(trainer__precision="float64", trainer__max_steps=2), tmp_path, progress=False)
    model = load_potential(path)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


class Look(Callback):
    """Notes the state of the process while a run trains."""

    threads: int
    deterministic: bool

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.threads = torch.get_num_threads()
        self.deterministic = torch.are_deterministic_algorithms_enabled()


def state_of_process() -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().sum().item(),
        logging.getLogger("lightning.pytorch").level,
        signal.getsignal(signal.SIGINT),
        dict(os.environ),
        torch.get_default_dtype(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_the_process_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: bool
) -> None:
    before, look = state_of_process(), Look()
    threads = before[0] + 1
    run = prepare(recipe(trainer__threads=threads, trainer__max_steps=2))
    if fails:
        planted(run, "val", 0)
        with pytest.raises(NonFiniteError):
            fit(run, tmp_path, callbacks=[look])
    else:
        fit(run, tmp_path, callbacks=[look])
    assert (look.threads, look.deterministic) == (threads, True)
    assert state_of_process() == before
    output = capfd.readouterr()
    assert output.out == ""
    assert "ightning" not in output.err
    assert not (tmp_path / "lightning_logs").exists()


def test_threads_are_put_back_after_ctrl_c() -> None:
    before = state_of_process()
    with pytest.raises(KeyboardInterrupt), borrowed_process(before[0] + 1):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt
    assert state_of_process() == before


def test_wall_time_adds_up_over_resumes(tmp_path: Path) -> None:
    chosen = recipe(trainer__max_steps=4)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(prepare(chosen), tmp_path, callbacks=[Stop()])
    last = tmp_path / "checkpoints" / "last.ckpt"
    content = read_checkpoint(last)
    content["ffpretrain"]["wall_seconds"] = 1000.0
    torch.save(content, last)
    seconds = read_card(train(chosen, tmp_path, resume=True, progress=False)).training.wall_seconds
    assert seconds is not None
    assert 1000 < seconds < 1100


def test_progress_shows_both_units_and_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(prepare(recipe()), tmp_path, callbacks=[Progress(line_every=0.0)])
    lines = capsys.readouterr().err.splitlines()
    best = read_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["callbacks"]
    score = next(float(s["best_model_score"]) for k, s in best.items() if k.startswith("ModelCheckpoint"))
    last = [line for line in lines if "val force MAE" in line][-1]
    assert last.startswith("step 4/4")
    assert last.endswith(f"best {score / 0.0433641:.3f} kcal/mol/Å ({1000 * score:.1f} meV/Å)")
    steps = [line for line in lines if "steps/s" in line]
    assert len(steps) == 4
    assert all("loss" in line and "forces" in line and "left" in line for line in steps)


def test_a_table_grows_columns_and_forgets_what_lies_ahead(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = Table(path, 0)
    table.add(1, {"a": 0.1})
    table.add(2, {"a": 0.2, "b": 1 / 3})
    table.add(3, {"b": 0.5})
    assert path.read_text().splitlines() == ["step,a,b", "1,0.1,", f"2,0.2,{1 / 3!r}", "3,,0.5"]
    again = Table(path, 2)
    again.add(3, {"a": 7.0})
    assert path.read_text().splitlines() == ["step,a,b", "1,0.1,", f"2,0.2,{1 / 3!r}", "3,7.0,"]
    Table(path, 0)
    assert path.read_text().splitlines() == ["step"]


# ---------------------------------------------------------------- the command


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", *words])
    return caught.value.code


def words(**changes: Any) -> list[str]:
    dotted = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"{key}={json.dumps(value)}" for key, value in dotted.items()]


def test_the_command_trains_and_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["demo-finetune", *words(trainer__max_steps=2), "--out", str(out), "--data", "ethanol-gfn2"]
    assert command(monkeypatch, *given, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["schema"], result["version"], result["steps"]) == ("ffpretrain-train", 1, 2)
    assert result["validation"]["forces_mae"]["unit"] == "eV/angstrom"
    assert Path(result["model"]).is_file()
    assert command(monkeypatch, *given) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert command(monkeypatch, str(out), "--out", str(out), "--resume") == 0
    assert "kcal/mol/Å" in capsys.readouterr().out


def test_the_command_leaves_with_2_where_a_value_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare_with_nan(chosen: Recipe) -> Run:
        run = prepare(chosen)
        planted(run, "train", 0)
        return run

    monkeypatch.setattr(run_module, "prepare", prepare_with_nan)
    assert command(monkeypatch, "demo-finetune", *words(), "--out", str(tmp_path / "run")) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "frames of the batch" in error[0]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(run: Run, out: Path, *args: Any) -> None:
        (out / "checkpoints").mkdir()
        (out / "checkpoints" / "last.ckpt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "fit", interrupted)
    assert command(monkeypatch, "demo-finetune", *words(), "--out", str(tmp_path / "run")) == 130
    assert "--resume goes on" in capsys.readouterr().err
