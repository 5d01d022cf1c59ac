"""The pretraining recipes, made small: on any file, and better than nothing on unseen molecules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.collections import g2
from ase.io import write

from ffpretrain import cli
from ffpretrain.artifacts import read_card
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.convert import write_dataset
from ffpretrain.errors import DataError
from ffpretrain.objectives import list_objectives, objective_class
from ffpretrain.objectives.floors import describe
from ffpretrain.recipes import list_recipes, load_recipe
from ffpretrain.training.checkpoints import read_checkpoint
from ffpretrain.training.config import Recipe
from ffpretrain.training.data import SampleDataset
from ffpretrain.training.finish import load_weights
from ffpretrain.training.run import Run, prepare, train
from ffpretrain.training.terms import mean_terms

LABEL_FREE = [name for name in list_objectives() if not objective_class(name).needs_labels]
PAINN = {"name": "painn", "options": {"hidden": 24, "layers": 2, "rbf": 16, "cutoff": 5.0}}
TINY = {
    "model.backbone": PAINN,
    "data.train": 40,
    "data.val": 5,
    "data.test": 10,
    "trainer.max_steps": 100,
    "trainer.val_every_steps": 100,
    "trainer.ema_decay": 0.9,
    "schedule.warmup_steps": 10,
    "optimizer.lr": 6e-3,
}
#: what a few seconds of training need beside that: larger noise, fewer layers and terms
EASIER: dict[str, dict[str, Any]] = {
    "coord": {"objective.options.sigma": 0.1},
    "frad": {"objective.options.sigma": 0.1},
    "georecon": {
        "objective.options.sigma": 0.1,
        "objective.options.decoder_layers": 1,
        "objective.options.clean_weight": 1.0,
    },
    "denoisevae": {"objective.options.generator_layers": 1},
    "dens": {
        "objective.options.main_head": "direct",
        "objective.options.sigma_max": 0.1,
        "objective.options.mask_ratio": 0.5,
        "objective.options.probability": 1.0,
        "objective.options.dens_weight": 1.0,
        "objective.options.linear_decay": False,
        "data.train": 200,
        "trainer.max_steps": 300,
        "trainer.val_every_steps": 300,
    },
    "ndem": {"trainer.max_steps": 140, "trainer.val_every_steps": 140},
    "slide": {"trainer.max_steps": 140, "trainer.val_every_steps": 140},
}


def small_molecules() -> list[Atoms]:
    """ASE's G2 collection, of which the molecules of H, C, N and O with five atoms and more: 55."""
    found = [g2[name] for name in g2.names]
    return [a for a in found if len(a) >= 5 and set(a.get_chemical_symbols()) <= set("HCNO")]


@pytest.fixture(scope="module")
def molecules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "molecules.xyz"
    write(path, small_molecules(), format="extxyz")
    return path


def recipe(name: str, data: Path | None, **changes: Any) -> Recipe:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(f"pretrain-{name}", {**TINY, **EASIER.get(name, {}), **dotted}, data)


# ---------------------------------------------------------------- unseen molecules


def test_every_objective_that_draws_noise_has_a_recipe() -> None:
    assert {f"pretrain-{name}" for name in (*LABEL_FREE, "ndem", "dens")} <= set(list_recipes())


def trained(chosen: Recipe, out: Path) -> tuple[Run, dict[str, float]]:
    """Train; return the run with its best weights, and its terms on the test frames with fresh noise."""
    train(chosen, out, progress=False)
    run = prepare(chosen)
    load_weights(run, read_checkpoint(out / "checkpoints" / "best.ckpt"), out)
    objective = run.module.objective
    unseen = SampleDataset(run.dataset[run.splits.test], objective.network.cutoff, ids=run.splits.test)
    draws = [mean_terms(objective, unseen, seed=1000 + k) for k in range(6)]
    return run, {key: sum(draw[key] for draw in draws) / len(draws) for key in draws[0]}


@pytest.mark.parametrize("name", LABEL_FREE)
def test_unseen_molecules_cost_a_fifth_less_than_predicting_nothing(
    name: str, molecules: Path, tmp_path: Path
) -> None:
    run, terms = trained(recipe(name, molecules), tmp_path)
    assert terms["loss"] < 0.8 * terms["zero"], describe(terms)
    assert terms["loss"] > terms.get("floor", 0.0), describe(terms)
    # the card says of the validation frames what a validation with these weights measures
    said = read_card(tmp_path / "model.safetensors").errors["validation"].quantities
    objective = run.module.objective
    val = SampleDataset(run.dataset[run.splits.val], objective.network.cutoff, ids=run.splits.val)
    assert {key: q.value for key, q in said.items()} == pytest.approx(mean_terms(objective, val, seed=0))


@pytest.mark.parametrize("name", ["ndem", "dens"])
def test_unseen_frames_cost_a_fifth_less_than_predicting_no_noise(name: str, tmp_path: Path) -> None:
    _, terms = trained(recipe(name, None), tmp_path)
    assert terms[name] < 0.8 * terms[f"{name}_zero"], describe(terms)
    said = read_card(tmp_path / "model.safetensors").errors["validation"].quantities
    assert {"forces_mae", name, f"{name}_zero"} <= said.keys()


# ---------------------------------------------------------------- data of a user


@pytest.mark.parametrize("ending", ["xyz", "sdf", "h5"])
def test_pretraining_runs_on_any_file(ending: str, molecules: Path, tmp_path: Path) -> None:
    path = molecules
    if ending == "sdf":
        path = tmp_path / "molecules.sdf"
        path.write_text("".join(mol_block(atoms) for atoms in small_molecules()))
    elif ending == "h5":
        path = tmp_path / "molecules.h5"
        write_dataset(open_dataset(molecules), path)
    model = train(
        recipe("coord", path, trainer__max_steps=2, trainer__val_every_steps=2),
        tmp_path / "run",
        progress=False,
    )
    card = read_card(model)
    assert path.name in card.training_data[0].sha256
    assert (card.elements, card.training_data[0].n_train) == ([1, 6, 7, 8], 40)


def mol_block(atoms: Atoms) -> str:
    """One molecule as an SDF entry without bonds."""
    rows = [
        f"{x:10.4f}{y:10.4f}{z:10.4f} {symbol:<3} 0  0"
        for symbol, (x, y, z) in zip(atoms.get_chemical_symbols(), atoms.positions, strict=True)
    ]
    return "\n".join(
        ["", "", "", f"{len(atoms):3d}  0  0  0  0  0  0  0  0  0999 V2000", *rows, "M  END", "$$$$", ""]
    )


def test_a_part_of_the_frames_is_taken_at_random(molecules: Path) -> None:
    shares: dict[str, Any] = {"data__train": 0.7, "data__val": 0.2, "data__test": None}
    run = prepare(recipe("coord", molecules, data__max_frames=20, **shares))
    assert run.splits.sizes() == {"train": 14, "val": 4, "test": 2}
    everything = [*run.splits.train, *run.splits.val, *run.splits.test]
    assert len(set(everything)) == 20
    assert max(everything) > 30
    more = prepare(recipe("coord", molecules, data__max_frames=1000, **shares))
    assert more.splits.sizes() == {"train": 38, "val": 11, "test": 6}
    with pytest.raises(DataError, match="has 55 frames, of which 20 are taken, too few for train 40"):
        prepare(recipe("coord", molecules, data__max_frames=20))


def test_qm9_is_the_default(shared_data: Path) -> None:
    changes = {"data.options.path": str(shared_data / "qm9" / "qm9.npz"), "data.max_frames": 50}
    run = prepare(load_recipe("pretrain-coord", changes))
    assert run.dataset.metadata.name == "qm9"
    assert run.splits.sizes() == {"train": 40, "val": 5, "test": 5}


# ---------------------------------------------------------------- what a user reads


def test_the_command_says_what_the_loss_is_read_against(
    molecules: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {**TINY, "trainer.max_steps": 2, "trainer.val_every_steps": 1}
    words = [f"{key}={json.dumps(value)}" for key, value in tiny.items()]
    given = ["train", "pretrain-3d-emgp", *words, "--data", str(molecules), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as caught:
        cli.main(given)
    assert caught.value.code == 0
    output = capsys.readouterr()
    said = next(line for line in output.out.splitlines() if line.startswith("validation: "))
    assert "loss " in said and "(zero predictor " in said and "(chance 3.91) on 5 frames" in said
    assert "val loss" in output.err and "(zero predictor" in output.err
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "run"), "--out", str(tmp_path / "run"), "--resume", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["validation"]["zero"]["unit"] == "1"
    assert result["validation"]["inp_chance"]["value"] == pytest.approx(3.912, abs=1e-3)
    rows = (tmp_path / "run" / "logs" / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/zero", "val/loss", "val/zero", "val/efp_zero"} <= set(rows[0].split(","))
