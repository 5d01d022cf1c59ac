"""Direct forces beside an energy: supervised and NDeM with ``main_head="direct"``, training, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffpretrain import FFCalculator, load_potential
from ffpretrain.artifacts import make_card, read_card, save_potential
from ffpretrain.artifacts.networks import rebuild
from ffpretrain.backbones import Backbone, Features, create_backbone
from ffpretrain.datasets import open_dataset
from ffpretrain.direct import DirectPotential
from ffpretrain.errors import ArtifactError, ConfigError
from ffpretrain.evaluation import error_table, predict
from ffpretrain.graphs import Graph, Sample, batch_graphs, graph_from_atoms
from ffpretrain.md import simulate
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.ndem import ndem_loss
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.pairs import Pairs
from ffpretrain.potential import Potential
from ffpretrain.recipes import load_recipe
from ffpretrain.testing import check_reflection, check_rotation, random_molecule, randomize
from ffpretrain.training.run import fit, prepare, train

CUTOFF, SCALE = 5.0, 1.7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> Potential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=2, heads=2, rbf=8, cutoff=CUTOFF)
        return Potential(backbone, scale=SCALE, shift=0.3, reference_energies={1: -1.0, 6: -30.0, 8: -70.0})


def make(name: str = "ndem", **options: object) -> Supervised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        objective = create_objective(name, potential=network(), **{"main_head": "direct", **options})
    objective = objective.double()
    randomize(objective)
    assert isinstance(objective, Supervised)
    return objective


def labelled(sizes: tuple[int, ...] = (5, 9)) -> Sample:
    generator = seeded(3)
    graph = batch_graphs([random_molecule([6, 1, 8], n, CUTOFF, generator) for n in sizes])
    targets = {
        "energy": torch.randn(len(sizes), generator=generator, dtype=torch.float64),
        "forces": torch.randn(len(graph.z), 3, generator=generator, dtype=torch.float64),
    }
    return Sample(graph, targets, {"index": torch.arange(len(sizes))})


# ---------------------------------------------------------------- the model


def test_energy_of_one_head_and_forces_of_the_other() -> None:
    objective, graph = make(), labelled().graph
    learned = objective.potential().eval()
    assert isinstance(learned, DirectPotential) and learned.has_energy and not learned.conservative
    out, energies = learned(graph), objective.network.eval()(graph, forces=False)
    assert torch.equal(out["energy"], energies["energy"])
    assert torch.equal(out["energies"], energies["energies"])
    assert objective.force_head is not None
    torch.testing.assert_close(out["forces"], objective.force_head(learned.features(graph)) * SCALE)
    assert out.keys() == {"energy", "energies", "forces"}
    assert learned(graph, forces=False).keys() == {"energy", "energies"}
    assert not any(value.requires_grad for value in out.values())
    with pytest.raises(ConfigError, match="direct forces has no stress"):
        learned(graph, stress=True)


def jacobian(model: nn.Module, graph: Graph) -> Tensor:
    """Return derivatives of forces by positions ``[3N, 3N]``, from central differences."""
    columns, step = [], 1e-4
    for i in range(graph.pos.numel()):
        out = []
        for sign in (1, -1):
            pos = graph.pos.clone()
            pos.view(-1)[i] += sign * step
            out.append(model(graph._replace(pos=pos))["forces"].flatten().detach())
        columns.append((out[0] - out[1]) / (2 * step))
    return torch.stack(columns, dim=1)


def test_direct_forces_are_no_gradient_and_the_others_are() -> None:
    objective, graph = make().eval(), labelled((5,)).graph
    curls = []
    for model in (objective.potential(), objective.network):
        matrix = jacobian(model, graph)
        curls.append(float((matrix - matrix.T).abs().max() / matrix.abs().max()))
    assert curls[0] > 0.01
    assert curls[1] < 1e-6


def test_symmetry() -> None:
    learned, graph = make().potential().eval(), labelled().graph
    check_rotation(learned, graph)
    check_reflection(learned, graph)


def test_scale_and_references_stay_exact() -> None:
    learned = make().float().potential().float()
    assert learned.dtype == torch.float32
    assert all(getattr(learned, name).dtype == torch.float64 for name in ("scale", "shift", "reference"))
    assert learned(labelled().graph)["energy"].dtype == torch.float64


# ---------------------------------------------------------------- what trains what


def reached(value: Tensor, module: nn.Module) -> bool:
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True)
    return any(g is not None and bool(g.any()) for g in found)


def test_the_supervised_terms_are_those_of_the_direct_forces() -> None:
    objective, sample = make("supervised"), labelled()
    terms = objective(sample, seeded())
    out = objective.potential()(sample.graph)
    off = (out["forces"] - sample.targets["forces"]).square().sum(-1).sqrt().mean() / SCALE
    torch.testing.assert_close(terms["forces"], off)
    assert objective.force_head is not None
    for name in ("energy", "forces"):
        assert reached(terms[name], objective.network.backbone)
        assert reached(terms[name], objective.force_head) is (name == "forces")
        assert reached(terms[name], objective.network.head) is (name == "energy")


@pytest.mark.parametrize("detach", [True, False])
def test_ndem_subtracts_the_direct_forces(detach: bool) -> None:
    objective, sample = make(detach_main=detach), labelled()
    noisy: list[Graph] = []
    objective.network.backbone.register_forward_pre_hook(lambda _, inputs: noisy.append(inputs[0]))
    terms = objective(sample, seeded())
    assert len(noisy) == 2
    shift = noisy[1].pos - sample.graph.pos
    force = objective.potential()(sample.graph)["forces"] / SCALE
    expected = ndem_loss(force, objective.noise_head(objective.network.backbone(noisy[1])), shift, 0.05)
    torch.testing.assert_close(terms["ndem"], expected)
    assert objective.force_head is not None
    assert reached(terms["ndem"], objective.force_head) is not detach
    assert not reached(terms["ndem"], objective.network.head)


def test_a_weight_of_zero_is_the_supervised_run_bit_for_bit() -> None:
    sample, runs = labelled(), []
    for name, options in (("supervised", {}), ("ndem", {"ndem_weight": 0.0})):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            objective = create_objective(name, potential=network(), main_head="direct", **options).double()
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            objective(sample, seeded())["loss"].backward()
            optimizer.step()
        runs.append(objective.state_dict())
    assert "force_head.first.hidden.weight" in runs[0]
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


# ---------------------------------------------------------------- refusals


class Scalars(Backbone):
    """A backbone without vector features."""

    name, has_vectors = "scalars", False

    def __init__(self) -> None:
        super().__init__(CUTOFF, 8, 10, {})
        self.embedding = nn.Embedding(10, 8)

    def encode(self, z: Tensor, pairs: Pairs, initial: Features | None = None) -> Features:
        return Features(self.embedding(z), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"main_head": "vector"}, "unknown main_head 'vector'; known: energy-gradient, direct"),
        ({"forces_weight": 0.0}, "learns nothing with forces_weight=0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("supervised", **options)


def test_a_backbone_without_vectors_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs vector features, which backbone 'scalars' lacks"):
        create_objective("supervised", backbone=Scalars(), main_head="direct")


def test_there_is_no_compiled_step() -> None:
    with pytest.raises(ConfigError, match="main_head='direct' has no compiled path; set compile: false"):
        make().accelerate()


# ---------------------------------------------------------------- training and files

TINY: dict[str, Any] = {
    "model.backbone": {
        "name": "torchmd-et",
        "options": {"hidden": 8, "layers": 1, "heads": 2, "rbf": 4, "max_z": 9},
    },
    "data.train": 10,
    "data.val": 4,
    "data.test": 3,
    "trainer.max_steps": 2,
    "trainer.batch_size": 4,
    "trainer.val_every_steps": 2,
    "trainer.ema_decay": None,
    "trainer.threads": 1,
    "schedule.warmup_steps": 1,
}
DIRECT = {"objective": {"name": "ndem", "options": {"main_head": "direct", "ndem_weight": 0.01}}}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model file of two steps of ``coord``, without labels."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    return train(load_recipe("demo-pretrain", TINY), out, progress=False)


def test_ndem_with_direct_forces_starts_from_coord(pretrained: Path, tmp_path: Path) -> None:
    assert read_card(pretrained).objective.name == "coord"  # type: ignore[union-attr]
    parent = load_potential(pretrained, trainable=True)
    start = {**TINY, **DIRECT, "model.backbone": None, "model.pretrained": str(pretrained)}
    run = prepare(load_recipe("demo-finetune", start))
    for key, value in parent.backbone.state_dict().items():
        assert torch.equal(run.module.objective.network.backbone.state_dict()[key], value), key
    path = train(load_recipe("demo-finetune", start), tmp_path / "out", progress=False)
    card, learned = read_card(path), load_potential(path)
    assert (card.kind, card.head.name) == ("direct", "energy+vector")
    assert [p.name for p in card.parents] == ["demo-pretrain"]
    assert card.energy_zero is not None
    assert isinstance(learned, DirectPotential) and not learned.training
    # what validation measured is what the file gives
    frames = open_dataset("ethanol-gfn2")
    held = frames[run.splits.val]
    errors = error_table(predict(learned, held))
    for key in ("forces_mae", "energy_mae"):
        assert card.errors["validation"].quantities[key].value == pytest.approx(errors[key].value, rel=1e-4)


def test_validation_during_training_reads_the_direct_forces(tmp_path: Path) -> None:
    run = prepare(load_recipe("demo-finetune", {**TINY, **DIRECT}))
    fit(run, tmp_path)
    held = run.dataset[run.splits.val]
    errors = error_table(predict(run.module.objective.potential().eval(), held))
    assert run.module.errors["val/forces_mae"] == pytest.approx(errors["forces_mae"].value, rel=1e-5)
    gradient = error_table(predict(run.module.objective.network.eval(), held))
    assert gradient["forces_mae"].value != pytest.approx(errors["forces_mae"].value, rel=1e-3)


def test_a_file_gives_the_model_back(tmp_path: Path) -> None:
    model = make().potential().eval()
    path = save_potential(model, tmp_path / "m.safetensors", make_card(model, "m"))
    again, graph = load_potential(path), labelled().graph
    assert isinstance(again, DirectPotential) and again.elements == [1, 6, 8]
    for key, value in model(graph).items():
        assert torch.equal(again(graph)[key], value), key


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    model = make().potential().eval()
    card = make_card(model, "m")
    assert card.kind == "direct"
    with pytest.raises(ArtifactError, match=r"kind 'potential' and head 'energy\+vector'"):
        rebuild(card.model_copy(update={"kind": "potential"}), "m")


@pytest.mark.parametrize("part", ["head", "force_head"])
def test_a_head_of_another_class_is_not_saved(part: str) -> None:
    model = make().potential()
    setattr(model, part, nn.Linear(1, 1))
    with pytest.raises(ArtifactError, match=r"a Linear cannot be saved; known heads: energy\+vector"):
        make_card(model, "m")


def test_the_calculator_gives_both_and_dynamics_warn(tmp_path: Path) -> None:
    from ase.build import molecule

    model, atoms = make().potential().eval(), molecule("CH3OH")
    atoms.calc = FFCalculator(model, "cpu", dtype="float64")
    out = model(graph_from_atoms(atoms, CUTOFF))
    assert atoms.get_potential_energy() == pytest.approx(float(out["energy"]), abs=1e-9)
    assert torch.allclose(torch.from_numpy(atoms.get_forces()), out["forces"], atol=1e-9)
    assert not atoms.calc.conservative and FFCalculator(make().network.eval()).conservative
    with pytest.warns(UserWarning, match="forces are not the gradient of its energy"):
        simulate(atoms, model, steps=2, timestep=0.1, out=None, progress=False)
