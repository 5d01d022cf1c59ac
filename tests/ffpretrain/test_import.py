"""Checkpoints of TorchMD-Net and its forks become models; no code from them runs, no weight is lost silently.

``et_lightning.ckpt`` was written by TorchMD-Net 3.1 itself; ``et_denoiser`` holds weights and outputs in the
layout of "pre-training via denoising", which the tests write as Lightning 1.3 did. Both come from
benchmarks/peers/make_fixtures.py.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from ffpretrain import FFCalculator, cli, units
from ffpretrain.artifacts import file_sha256, load_potential, read_card
from ffpretrain.backbones import create_backbone
from ffpretrain.backbones.torchmd_et import TorchMDET
from ffpretrain.errors import ArtifactError, ConfigError, DataError, UserError
from ffpretrain.graphs import Graph, batch_graphs, build_graph
from ffpretrain.importing import Imported, import_torchmd_net
from ffpretrain.lightning_file import CALLBACKS, read_lightning_checkpoint
from ffpretrain.objectives.fields import DenoisingField
from ffpretrain.recipes import load_recipe
from ffpretrain.testing import random_molecule, randomize
from ffpretrain.training.run import prepare

DATA = Path(__file__).parent / "data"
REAL = DATA / "et_lightning.ckpt"
ELEMENTS = [1, 6, 7, 8, 9]


def fixture(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any], Graph]:
    """Return weights, recorded outputs, hyper-parameters and structures of a file in data/."""
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        hparams = json.loads(file.metadata()["fixture"])["hparams"]
    batch = tensors["batch"]
    members = [batch == b for b in batch.unique().tolist()]
    graphs = [build_graph(tensors["z"][m], tensors["pos"][m], 4.0) for m in members]
    weights = {key[8:]: value for key, value in tensors.items() if key.startswith("weights.")}
    outputs = {key[4:]: value for key, value in tensors.items() if key.startswith("out.")}
    return weights, outputs, hparams, batch_graphs(graphs)


@pytest.fixture
def lightning_1_3(monkeypatch: pytest.MonkeyPatch) -> dict[type, dict[str, Any]]:
    """Callbacks' states as Lightning 1.3 wrote them: the keys are its classes."""
    states = {}
    for name in CALLBACKS:
        path, _, cls = name.rpartition(".")
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        states[type(cls, (), {"__module__": path})] = {"best_score": torch.tensor(0.5), "patience": 150}
        setattr(sys.modules[path], cls, next(reversed(states)))
    return states


def old_names(weights: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Rename as TorchMD-Net before 2.0 and its forks did, and add Lightning's prefix."""
    old = {key: key.replace("update_net.layers.", "update_net.") for key in weights}
    return OrderedDict((f"model.{old[key]}", value) for key, value in weights.items())


def write(path: Path, weights: dict[str, Tensor], hparams: Any, **more: Any) -> Path:
    """Write a checkpoint with all that Lightning 1.3 puts into one."""
    content = {
        "epoch": 7,
        "global_step": 400,
        "pytorch-lightning_version": "1.3.8",
        "state_dict": old_names(weights),
        "optimizer_states": [{"state": {0: {"step": 400, "exp_avg": torch.ones(2)}}, "param_groups": []}],
        "lr_schedulers": [{"T_max": 400000, "base_lrs": [0.0004], "_last_lr": [0.0004]}],
        "hparams_name": "hparams",
        "hyper_parameters": hparams,
        **more,
    }
    torch.save(content, path)
    return path


def denoiser(path: Path, change: dict[str, Any] | None = None, **hparams: Any) -> Path:
    """Write the denoising checkpoint; ``change`` replaces weights, None drops one."""
    weights, _, found, _ = fixture("et_denoiser")
    weights = {k: v for k, v in {**weights, **(change or {})}.items() if v is not None}
    return write(path, weights, {**found, **hparams})


def imported(path: Path, **options: Any) -> Imported:
    return import_torchmd_net(read_lightning_checkpoint(path), **{"length": "angstrom", **options})


def close(got: Tensor, want: Tensor, rtol: float = 1e-10) -> bool:
    return bool((got - want).abs().max() <= rtol * want.abs().max())


def command(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["import", *words])
    return caught.value.code


# ---------------------------------------------------------------- energies


def test_a_checkpoint_of_torchmd_net_gives_its_energies_and_forces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.safetensors"
    words = ["--length-unit", "angstrom", "--energy-unit", "eV", "--elements", "H,C,N,O,F", "--json"]
    assert command(str(REAL), "--out", str(out), *words) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["schema"], said["version"], said["kind"]) == ("ffpretrain-import", 1, "potential")
    assert said["source"] == {
        "name": REAL.name, "sha256": file_sha256(REAL), "units": {"length": "angstrom", "energy": "eV"}
    }  # fmt: skip
    assert (said["left_out"], said["unmatched"], said["elements"]) == ([], [], ELEMENTS)
    assert said["cutoff"] == {"value": 4.0, "unit": "angstrom"}
    potential = load_potential(out, dtype="float64")
    assert said["weights"] == sum(p.numel() for p in potential.parameters())
    _, recorded, _, graph = fixture("et_lightning")
    found = potential(graph)
    assert close(found["energy"], recorded["energy"], rtol=1e-9)
    assert close(found["forces"], recorded["forces"], rtol=1e-9)
    card = read_card(out)
    assert (card.name, card.kind, card.training.steps) == ("et_lightning", "potential", 2)
    assert card.parents[0].sha256 == file_sha256(REAL)
    assert (card.training_data[0].name, card.energy_zero, card.level_of_theory) == ("Custom", None, None)


def test_units_of_the_source_are_converted() -> None:
    _, recorded, _, graph = fixture("et_lightning")
    model = imported(REAL, energy="kcal/mol").model.double()
    assert close(model(graph)["energy"], recorded["energy"] * units.KCAL_PER_MOL, rtol=1e-9)
    wide = imported(REAL, length="nm", energy="eV").model
    assert wide.cutoff == 40.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": None}, "give --length-unit and --energy-unit"),
        ({"length": "angstrom"}, "give --energy-unit"),
        ({"length": None, "energy": "eV"}, "give --length-unit of"),
        ({"energy": "eV", "temperature": 300.0}, "--temperature is of fields only"),
    ],
)
def test_units_are_asked_for_and_never_guessed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        imported(REAL, **options)


def test_unknown_units_elements_and_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").write_text("mine")
    known = ["--length-unit", "angstrom", "--energy-unit", "eV"]
    for words, message in (
        ([str(REAL), "--length-unit", "angstrom", "--energy-unit", "kcals"], "unknown energy unit 'kcals'"),
        ([str(REAL), *known, "--elements", "H,Xx"], "'Xx' is no element"),
        ([str(REAL), *known, "--elements", ","], "--elements names none"),
        ([str(REAL), *known, "--elements", "U"], "no embedding for atomic number 92"),
        ([str(REAL), *known, "--out", "there.safetensors"], "there.safetensors: exists"),
        ([str(REAL), *known, "--out", "model.pt"], "ends in .safetensors"),
        (["none.ckpt", *known], "none.ckpt: no such model file"),
        ([".", *known], "is a folder"),
    ):
        assert command(*words) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_the_default_name_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = ["--length-unit", "angstrom", "--energy-unit", "eV"]
    assert command(str(REAL), *known, "--level-of-theory", "PBE") == 0
    assert read_card("et_lightning.safetensors").level_of_theory == "PBE"
    assert command(str(REAL), *known, "--name", "mine") == 0
    assert read_card("mine.safetensors").name == "mine"
    assert command(str(REAL), *known, "--name", "mine", "--overwrite") == 0


def test_half_precision_is_read_as_single(tmp_path: Path) -> None:
    content = torch.load(REAL, weights_only=True)
    content["state_dict"] = {key: value.half() for key, value in content["state_dict"].items()}
    torch.save(content, tmp_path / "half.ckpt")
    assert imported(tmp_path / "half.ckpt", energy="eV").model.dtype == torch.float32


# ---------------------------------------------------------------- denoisers


def test_a_denoising_checkpoint_becomes_a_field(
    tmp_path: Path, lightning_1_3: dict[type, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, recorded, hparams, graph = fixture("et_denoiser")
    path = write(tmp_path / "denoised.ckpt", weights, hparams, callbacks=lightning_1_3)
    out = tmp_path / "m.safetensors"
    assert command(str(path), "--out", str(out), "--length-unit", "angstrom") == 0
    said = capsys.readouterr().out
    for key in weights:
        belongs = key.startswith(("output_model.", "mean", "std"))
        assert (key in said) is belongs, key
    field = load_potential(out, dtype="float64")
    assert isinstance(field, DenoisingField)
    # noise = std * head + mean for each axis; forces are -(kT / sigma^2) times it, the mean left out
    total, squares = (weights[f"pos_normalizer.{k}"].double() for k in ("acc_sum", "acc_squared_sum"))
    std = (squares / 5000 - (total / 5000).square()).sqrt()
    unit = float(std.square().mean().sqrt())
    assert unit == pytest.approx(0.04, rel=0.02)
    noise = unit * recorded["noise"]
    assert close(field(graph)["forces"], -(units.KB * 300 / 0.04**2) * noise)
    assert close(noise, std * recorded["noise"], rtol=0.02)
    card = read_card(out)
    assert (card.kind, card.temperature, card.training.steps) == ("field", 300.0, 400)
    assert card.objective is not None
    assert (card.objective.name, card.objective.options) == ("coord", {"sigma": 0.04})
    assert card.training_data[0].name == "PCQM4MV2"


def test_the_scale_of_a_field_follows_units_and_temperature(tmp_path: Path) -> None:
    path = denoiser(tmp_path / "d.ckpt")
    cold, hot = imported(path), imported(path, temperature=600.0)
    assert hot.card.force_scale == pytest.approx(2 * cold.card.force_scale)
    # nm: the head's unit and sigma are ten times longer, and the force per Å ten times smaller
    wide = imported(path, length="nm")
    assert wide.card.force_scale == pytest.approx(cold.card.force_scale / 10)
    assert (wide.model.cutoff, wide.card.objective.options["sigma"]) == (40.0, pytest.approx(0.4))
    for option in ("energy", "level_of_theory"):
        with pytest.raises(ConfigError, match="becomes a field, which has no energy; leave out --"):
            imported(path, **{option: "eV"})
    with pytest.raises(ConfigError, match=r"kT=0\.0 must be above zero"):
        imported(path, temperature=0.0)


def test_a_field_serves_forces_and_starts_a_training(tmp_path: Path) -> None:
    path, out = denoiser(tmp_path / "d.ckpt"), tmp_path / "m.safetensors"
    assert command(str(path), "--out", str(out), "--length-unit", "angstrom") == 0
    graph = random_molecule([6, 1, 8], 6, 4.0, torch.Generator().manual_seed(1))
    atoms = Atoms(numbers=graph.z.numpy(), positions=graph.pos.numpy())
    atoms.calc = FFCalculator(out, device="cpu", dtype="float64")
    wanted = load_potential(out, dtype="float64")(graph)["forces"].numpy()
    np.testing.assert_allclose(atoms.get_forces(), wanted, atol=1e-10)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_potential_energy()
    changes = {"model.backbone": None, "model.pretrained": str(out), "data.train": 10, "data.val": 4}
    run = prepare(load_recipe("demo-finetune", {**changes, "data.test": 3, "schedule.warmup_steps": 1}))
    parent = load_potential(out, trainable=True).backbone.state_dict()
    network = run.module.objective.network.backbone.state_dict()
    assert parent.keys() == network.keys()
    assert all(torch.equal(network[key], value) for key, value in parent.items())


def test_a_model_fine_tuned_with_noise_beside_labels_is_a_potential(tmp_path: Path) -> None:
    labelled = {"denoising_only": False, "energy_weight": 0.2, "derivative": True, "dataset": "MD17"}
    path = denoiser(tmp_path / "d.ckpt", **labelled)
    found = imported(path, energy="kcal/mol")
    assert found.card.kind == "potential"
    parts = {key.partition(".")[0] for key in found.left_out}
    assert parts == {"output_model_noise", "pos_normalizer"}
    assert set(found.left_out.values()) == {"belongs to the noise head, which is not taken over"}
    # the energy head is that of the checkpoint without any noise head
    weights, _, hparams, graph = fixture("et_denoiser")
    plain = {k: v for k, v in weights.items() if not k.startswith(("output_model_noise.", "pos_normalizer."))}
    alone = imported(
        write(tmp_path / "p.ckpt", plain, {**hparams, **labelled, "output_model_noise": None}),
        energy="kcal/mol",
    )
    assert alone.left_out == {}
    assert torch.equal(alone.model(graph)["energy"], found.model(graph)["energy"])
    assert imported(path, kind="field").card.kind == "field"


def test_a_property_is_no_potential_but_its_backbone_can_be_trained_further(tmp_path: Path) -> None:
    homo = {"denoising_only": False, "energy_weight": 1.0, "dataset": "QM9", "dataset_arg": "homo"}
    path = denoiser(tmp_path / "d.ckpt", **homo)
    with pytest.raises(ArtifactError, match=r"predicts 'homo' of QM9.*--kind pretrained"):
        imported(path, energy="eV")
    assert imported(denoiser(tmp_path / "u.ckpt", **{**homo, "dataset_arg": "energy_U0"}), energy="eV")
    found = imported(path, kind="pretrained")
    assert (found.card.kind, found.card.head.name) == ("pretrained", "energy")
    assert {key.partition(".")[0] for key in found.left_out} == {
        "output_model", "output_model_noise", "pos_normalizer", "mean", "std"
    }  # fmt: skip
    graph = fixture("et_denoiser")[3]
    features, noise = found.model.features(graph), imported(path, kind="field").model.features(graph)
    assert torch.equal(features.scalars, noise.scalars)


# ---------------------------------------------------------------- Frad


def test_norms_between_the_layers_are_what_they_say() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"hidden": 8, "layers": 2, "heads": 2, "rbf": 4, "cutoff": 4.0}
        backbone = create_backbone("torchmd-et", **options, layer_norms=True).double()
    randomize(backbone)
    assert isinstance(backbone, TorchMDET)
    graph = random_molecule([6, 1, 8], 6, 4.0, torch.Generator().manual_seed(1))
    found = backbone(graph)
    # by hand: after each layer, scalars to mean 0 and variance 1, vectors to a covariance of nearly 1
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in backbone.layers:
        layer.register_forward_hook(lambda _, inputs, out: seen.append((*out, *inputs[:2])))
    backbone(graph)
    (x0, v0, _, _), (x1, v1, into_x, into_v) = seen
    mean, variance = x0.mean(1, keepdim=True), x0.var(1, correction=0, keepdim=True)
    torch.testing.assert_close(into_x, (x0 - mean) / (variance + 1e-5).sqrt())
    for x_in, v_in, norm in ((into_v, v0, backbone.vec_norms[0]), (found.vectors, v1, backbone.vec_norms[1])):
        centred = v_in - v_in.mean(-1, keepdim=True)
        covariance = (centred @ centred.mT / 8).detach().numpy() + 1e-5 * np.diag([1.0, 2.0, 3.0])
        size, axes = np.linalg.eigh(covariance + 1e-5 * np.eye(3))
        root = torch.tensor(axes @ (size[..., None] ** -0.5 * np.swapaxes(axes, 1, 2)))
        torch.testing.assert_close(x_in, root @ centred * norm.weight)
    torch.testing.assert_close(found.scalars, backbone.out_norm(functional.layer_norm(x1, (8,))))


def test_frads_norms_are_read_or_missed(tmp_path: Path) -> None:
    norms = {f"representation_model.vec_norms.{i}.weight": 1.0 + 0.1 * torch.rand(16) for i in range(3)}
    frad = {"md17": False, "seperate_noise": False, "dihedral_angle_noise_scale": 2}
    found = imported(denoiser(tmp_path / "q.ckpt", norms, **frad))
    backbone = found.model.backbone
    assert isinstance(backbone, TorchMDET)
    assert backbone.config["layer_norms"] is True
    for i, norm in enumerate(backbone.vec_norms):
        assert torch.equal(norm.weight, norms[f"representation_model.vec_norms.{i}.weight"])
    assert found.card.objective.model_dump() == {
        "name": "frad", "options": {"sigma": 0.04, "dihedral_sigma_degrees": 2.0}
    }  # fmt: skip
    assert any("orientation" in note for note in found.notes)
    with pytest.raises(ArtifactError, match=r"lacks representation_model\.vec_norms\.0\.weight"):
        imported(denoiser(tmp_path / "r.ckpt", **frad))
    # Coord's code has neither, and weights it does not know are no norms of its own
    with pytest.raises(ArtifactError, match=r"no place here: representation_model\.vec_norms\.0\.weight"):
        imported(denoiser(tmp_path / "s.ckpt", norms))


def test_frads_separate_norm_is_read_by_the_noise_head_alone(tmp_path: Path) -> None:
    norm = {"representation_model.out_norm_vec.weight": 1.0 + 0.1 * torch.rand(16)}
    frad = {"md17": True, "seperate_noise": True, "denoising_only": False, "energy_weight": 0.2}
    path = denoiser(tmp_path / "m.ckpt", norm, **frad)
    potential, field = imported(path, energy="kcal/mol"), imported(path, kind="field")
    assert potential.model.backbone.config["vec_norm"] == "none"
    assert "representation_model.out_norm_vec.weight" in potential.left_out
    assert field.model.backbone.config["vec_norm"] == "whitened"
    graph = fixture("et_denoiser")[3]
    bare, normed = potential.model.features(graph).vectors, field.model.features(graph).vectors
    assert not torch.allclose(bare, normed)
    torch.testing.assert_close(field.model.backbone.out_norm_vec(bare), normed)


# ---------------------------------------------------------------- what does not fit


def test_every_weight_is_read_or_listed(tmp_path: Path) -> None:
    graph = fixture("et_denoiser")[3]
    whole = read_lightning_checkpoint(denoiser(tmp_path / "d.ckpt"))
    plain = import_torchmd_net(whole, length="angstrom")
    forces = plain.model(graph)["forces"]
    for key, value in whole.state_dict.items():
        # the box is a case of its own, and the third layer is read as the second
        if key.endswith("distance.box") or "attention_layers.2." in key:
            continue
        changed = replace(whole, state_dict={**whole.state_dict, key: 1.01 * value + 0.01})
        same = torch.equal(import_torchmd_net(changed, length="angstrom").model(graph)["forces"], forces)
        unused = key.removeprefix("model.").replace("update_net.", "update_net.layers.") in plain.left_out
        unused = unused or key.endswith(("layers.0.vec_proj.weight", "num_accumulations"))
        assert same is unused, key
    cell = {"model.representation_model.distance.box": torch.eye(3)}
    box = replace(whole, state_dict={**whole.state_dict, **cell})
    with pytest.raises(ArtifactError, match="holds a periodic box"):
        import_torchmd_net(box, length="angstrom")


def test_unmatched_weights_are_an_error_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"output_model_mask_atom.weight": torch.ones(3), "representation_model.new.bias": torch.ones(2)}
    path, out = denoiser(tmp_path / "d.ckpt", extra), tmp_path / "m.safetensors"
    words = [str(path), "--out", str(out), "--length-unit", "angstrom"]
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert all(key in said for key in extra)
    assert not out.exists()
    assert command(*words, "--allow-unmatched", "--json") == 0
    assert json.loads(capsys.readouterr().out)["unmatched"] == sorted(extra)
    graph = fixture("et_denoiser")[3]
    assert torch.equal(
        load_potential(out)(graph)["forces"], imported(denoiser(tmp_path / "p.ckpt")).model(graph)["forces"]
    )
    # the same of an energy, whose reference energies have a place
    prior = {f"prior_model.0.{key}": torch.ones(10, 1) for key in ("atomref.weight", "initial_atomref")}
    labelled = {"denoising_only": False, "energy_weight": 1.0, "prior_model": {"Atomref": {"max_z": 10}}}
    path = denoiser(tmp_path / "e.ckpt", {**extra, **prior}, **labelled)
    found = imported(path, energy="eV", allow_unmatched=True)
    assert found.unmatched == sorted(extra)
    assert found.card.reference_energies[6] == 1.0


def test_missing_weights_are_an_error_even_then(tmp_path: Path) -> None:
    path = denoiser(tmp_path / "d.ckpt", {"representation_model.out_norm.bias": None})
    for allow in (False, True):
        with pytest.raises(ArtifactError, match=r"lacks representation_model\.out_norm\.bias"):
            imported(path, allow_unmatched=allow)


@pytest.mark.parametrize(
    ("change", "hparams", "words"),
    [
        ({"pos_normalizer.acc_count": torch.zeros(1)}, {}, "has seen no noise"),
        ({"pos_normalizer.acc_squared_sum": torch.tensor([8.0, 8.0, 16.0])}, {}, "differs between the axes"),
        ({"pos_normalizer.acc_sum": None}, {}, r"lacks pos_normalizer\.acc_sum"),
        ({}, {"position_noise_scale": 0.0}, "says no size of the noise"),
        ({}, {"output_model_noise": "VectorOutput2"}, "only noise that gated blocks predict"),
        ({}, {"bond_length_scale": 0.1}, "bonds, angles and torsions"),
        ({}, {"model": "graph-network"}, "only the equivariant transformer"),
        ({}, {"distance_influence": "keys"}, "only filters on both keys and values"),
        ({}, {"layernorm_on_vec": "rms"}, "only the whitened vector norm"),
        ({}, {"atom_filter": 1}, "leaving atoms out"),
        ({}, {"num_layers": 2}, "no place here: representation_model.attention_layers.2"),
        ({}, {"embedding_dimension": 8}, "has shape"),
    ],
)
def test_denoisers_that_cannot_be_represented(
    change: dict[str, Any], hparams: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=words):
        imported(denoiser(tmp_path / "d.ckpt", change, **hparams))


# ---------------------------------------------------------------- no code from the file


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("place", ["hyper_parameters", "callbacks", "state_dict", "datamodule"])
def test_pickled_code_is_refused_and_not_run(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, _, hparams, _ = fixture("et_denoiser")
    mark, path = tmp_path / "mark", tmp_path / "d.ckpt"
    if place == "hyper_parameters":
        write(path, weights, {**hparams, "prior": Payload(mark)})
    elif place == "state_dict":
        write(path, weights, hparams, state_dict={"model.x": Payload(mark)})
    else:
        write(path, weights, hparams, **{place: {"a": Payload(mark)}})
    out = tmp_path / "m.safetensors"
    assert command(str(path), "--out", str(out), "--length-unit", "angstrom") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "which only code from the file could restore, so it is refused" in said
    assert not mark.exists() and not out.exists()


def test_only_two_names_beside_plain_values_are_read(
    tmp_path: Path, lightning_1_3: dict[type, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _, hparams, _ = fixture("et_denoiser")
    before = set(torch.serialization.get_safe_globals())
    found = read_lightning_checkpoint(write(tmp_path / "a.ckpt", weights, hparams, callbacks=lightning_1_3))
    assert (found.version, found.step, found.hparams) == ("1.3.8", 400, hparams)
    # torch adds names of its own when a part of it is first imported
    added = set(torch.serialization.get_safe_globals()) - before
    assert not [name for name in added if "lightning" in getattr(name, "__module__", "")]
    module = "pytorch_lightning.callbacks.model_checkpoint"
    other = type("Other", (), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], "Other", other, raising=False)
    path = write(tmp_path / "b.ckpt", weights, hparams, callbacks={other: {}})
    with pytest.raises(ArtifactError, match=f"an object of {module}.Other, which only code"):
        read_lightning_checkpoint(path)
    path = write(tmp_path / "c.ckpt", weights, argparse.Namespace(**hparams))
    with pytest.raises(ArtifactError, match=r"an object of argparse\.Namespace, which only code"):
        read_lightning_checkpoint(path)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    weights, _, hparams, _ = fixture("et_denoiser")
    whole = write(tmp_path / "w.ckpt", weights, hparams).read_bytes()
    path = tmp_path / "d.ckpt"
    for content in (b"", b"text", whole[:1000], whole[:-100], pickle.dumps({"state_dict": {}}), whole[::-1]):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"d\.ckpt: is damaged or no checkpoint"):
            read_lightning_checkpoint(path)
    with pytest.raises(ArtifactError, match="is damaged or no checkpoint"):
        read_lightning_checkpoint(DATA / "format1.safetensors")
    for content, words in (
        ([1, 2], "is no Lightning checkpoint"),
        ({"model": {}}, "it has no state_dict"),
        ({"state_dict": [1]}, "something other than tensors"),
        ({"state_dict": {"a": 1}}, "something other than tensors"),
        ({"state_dict": weights}, "has no hyper_parameters"),
        ({"state_dict": weights, "hyper_parameters": {"lr": torch.ones(1)}}, "'lr' is a Tensor"),
        ({"state_dict": weights, "hyper_parameters": {}}, "hparams lack model"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=words):
            imported(path, energy="eV")
    with pytest.raises(DataError, match="unknown length unit"):
        imported(denoiser(path), length="feet")
