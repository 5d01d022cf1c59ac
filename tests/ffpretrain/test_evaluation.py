"""Errors against hand-computed ones, and what cannot be evaluated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule

from ffpretrain.backbones import create_backbone
from ffpretrain.cli import main
from ffpretrain.datasets import DatasetMetadata, Frame, InMemoryDataset
from ffpretrain.errors import DataError, NonFiniteError
from ffpretrain.evaluation import Predictions, error_table, predict
from ffpretrain.graphs import graph_from_frame
from ffpretrain.potential import Potential

KCAL = 0.0433641


@pytest.fixture(scope="module")
def potential() -> Potential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone = create_backbone("torchmd-et", hidden=16, layers=1, heads=2)
        return Potential(backbone, reference_energies={1: -13.0, 6: -1000.0, 8: -2000.0}).eval()


def frames(n: int = 5, **changes: object) -> InMemoryDataset:
    rng = np.random.default_rng(1)
    atoms = molecule("CH3CH2OH")
    made = [
        Frame(
            np.array(atoms.numbers, dtype=np.int64),
            atoms.positions + 0.05 * rng.normal(size=(9, 3)),
            energy=float(-4000 + rng.normal()),
            forces=rng.normal(size=(9, 3)),
        )
        for _ in range(n)
    ]
    return InMemoryDataset([replace(f, **changes) for f in made], DatasetMetadata("made-up"))


def test_predictions_are_the_potentials_own(potential: Potential) -> None:
    data = frames()
    predicted = predict(potential, data)
    for i, frame in enumerate(data):
        out = potential(graph_from_frame(frame, 5.0))
        assert predicted.energy[i] == pytest.approx(float(out["energy"]), abs=1e-5)
        own = predicted.forces[9 * i : 9 * (i + 1)]
        assert np.abs(own - out["forces"].numpy()).max() < 1e-5


def test_error_table_against_numbers_worked_out_by_hand() -> None:
    table = error_table(
        Predictions(
            energy=np.array([1.0, 2.0]),
            energy_label=np.array([1.5, 1.0]),
            forces=np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 2.0]]),
            forces_label=np.array([[0.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]]),
            numbers=np.array([1, 8, 1]),
            n_atoms=np.array([1, 2]),
        )
    )
    value = {name: quantity.value for name, quantity in table.items()}
    assert value["energy_mae"] == pytest.approx(0.75)
    assert value["energy_rmse"] == pytest.approx(np.sqrt((0.25 + 1.0) / 2))
    assert value["energy_per_atom_mae"] == pytest.approx((0.5 + 0.5) / 2)
    assert value["forces_mae"] == pytest.approx(3 / 9)
    assert value["forces_rmse"] == pytest.approx(np.sqrt(5 / 9))
    assert value["forces_kcal_mae"] == pytest.approx(3 / 9 / KCAL, rel=1e-5)
    assert value["forces_label_rms"] == pytest.approx(np.sqrt(8 / 9))
    assert value["forces_mae_H"] == pytest.approx(1 / 6)
    assert value["forces_mae_O"] == pytest.approx(2 / 3)
    assert table["forces_kcal_mae"].unit == "kcal/mol/angstrom"


def test_energies_alone_give_energy_errors_alone(potential: Potential) -> None:
    table = error_table(predict(potential, frames(forces=None)))
    assert "energy_mae" in table
    assert not any(name.startswith("forces") for name in table)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (frames(0), "no frames"),
        (frames(2, energy=None, forces=None), "neither energies nor forces"),
    ],
)
def test_data_that_cannot_be_evaluated(potential: Potential, data: InMemoryDataset, words: str) -> None:
    with pytest.raises(DataError, match=words):
        predict(potential, data)


def test_frames_labelled_unlike_each_other(potential: Potential) -> None:
    mixed = InMemoryDataset([*frames(1), *frames(1, forces=None)], DatasetMetadata("mixed"))
    with pytest.raises(DataError, match="frame 1 of mixed"):
        predict(potential, mixed)


def test_a_model_that_gives_nan_is_named(potential: Potential) -> None:
    broken = Potential(create_backbone("torchmd-et", hidden=16, layers=1, heads=2)).eval()
    with torch.no_grad():
        broken.head.second.out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="made-up"):
        predict(broken, frames(1))


def test_another_level_of_theory_is_refused(
    tmp_path: Path, potential: Potential, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffpretrain.artifacts import make_card, save_potential
    from ffpretrain.datasets.store import write_store

    card = make_card(potential, "mine", level_of_theory="PBE/def2-SVP")
    save_potential(potential, tmp_path / "mine.safetensors", card)
    data = InMemoryDataset(list(frames(2)), DatasetMetadata("theirs", level_of_theory="GFN2-xTB"))
    write_store(tmp_path / "theirs.h5", data)
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(tmp_path / "mine.safetensors"), str(tmp_path / "theirs.h5")])
    assert left.value.code == 2
    assert "PBE/def2-SVP" in capsys.readouterr().err


def test_the_command_prints_units(
    tmp_path: Path, potential: Potential, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffpretrain.artifacts import make_card, save_potential
    from ffpretrain.datasets.store import write_store

    save_potential(potential, tmp_path / "mine.safetensors", make_card(potential, "mine"))
    write_store(tmp_path / "data.h5", frames(4))
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(tmp_path / "mine.safetensors"), str(tmp_path / "data.h5"), "--json"])
    assert left.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "ffpretrain-evaluate"
    assert result["n_frames"] == 4
    assert result["errors"]["forces_mae"]["unit"] == "eV/angstrom"
    expected = error_table(predict(potential, frames(4)))["forces_mae"].value
    assert result["errors"]["forces_mae"]["value"] == pytest.approx(expected, rel=1e-4)


def test_what_the_model_was_not_trained_on_is_said(
    tmp_path: Path, potential: Potential, capsys: pytest.CaptureFixture[str]
) -> None:
    from ffpretrain.artifacts import make_card, save_potential
    from ffpretrain.datasets.store import write_store

    path, water = tmp_path / "mine.safetensors", molecule("H2O")
    save_potential(potential, path, make_card(potential, "mine", compositions=["C2H6O"]))
    other = Frame(np.array(water.numbers), water.positions, energy=-2026.0, forces=np.zeros((3, 3)), charge=1)
    write_store(tmp_path / "mixed.h5", InMemoryDataset([*frames(3), other], DatasetMetadata("mixed")))
    words = ["evaluate", str(path), str(tmp_path / "mixed.h5"), "--json"]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    out, err = capsys.readouterr()
    lines = [
        "1 of 4 frames have composition H2O, which the model was not trained on (C2H6O)",
        "1 of 4 frames have charge 1, which the model was not trained on (0)",
    ]
    assert json.loads(out)["unfamiliar"] == lines
    assert [line for line in err.splitlines() if line.startswith("warning: ")] == [
        f"warning: {line}; expect larger errors there" for line in lines
    ]
    # nothing to say of frames as in training, of a model that is tied to no composition, or of none at all
    with pytest.raises(SystemExit):
        main([*words, "--limit", "3"])
    out, err = capsys.readouterr()
    assert json.loads(out)["unfamiliar"] == [] and "warning" not in err
    save_potential(potential, path, make_card(potential, "mine", charges=[0, 1]))
    with pytest.raises(SystemExit):
        main(words)
    assert json.loads(capsys.readouterr().out)["unfamiliar"] == []
