"""Training on one property of each structure: readouts, units, standardised labels, files, evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.calculators.calculator import PropertyNotImplementedError

from ffpretrain import FFCalculator, cli, load_potential, units
from ffpretrain.artifacts import make_card, read_card, save_potential
from ffpretrain.artifacts.networks import rebuild
from ffpretrain.backbones import create_backbone
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.frames import DatasetMetadata, Frame, InMemoryDataset
from ffpretrain.datasets.store_writer import write_store
from ffpretrain.errors import ArtifactError, ConfigError, DataError, UnsupportedInputError
from ffpretrain.evaluation import measure
from ffpretrain.graphs import Graph, Sample, batch_graphs, build_graph, graph_from_frame
from ffpretrain.objectives import create_objective, objective_class
from ffpretrain.objectives.property import SupervisedProperty
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.property import PropertyModel
from ffpretrain.recipes import load_recipe
from ffpretrain.testing import Kind, check_reflection, check_rotation, random_molecule
from ffpretrain.training.properties import PropertyReader, property_statistics
from ffpretrain.training.run import fit, prepare, train

CUTOFF = 5.0
OPTIONS = {"hidden": 8, "layers": 1, "rbf": 6, "cutoff": CUTOFF, "max_z": 10}
UNITS = {"homo": "Hartree", "mu": "D", "size": "bohr^2", "bonds": "pairs", "index": "number"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def command(*words: str) -> int | str | None:
    """Run the command and return its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    return left.value.code


def objective(**options: Any) -> SupervisedProperty:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("painn", **OPTIONS)
        made = create_objective("supervised", backbone=backbone, **{"property": "homo", **options})
    assert isinstance(made, SupervisedProperty)
    return made.double()


def frames(count: int = 12, **changes: Any) -> InMemoryDataset:
    """Molecules with a property of their size and one of their shape."""
    made = []
    for i in range(count):
        graph = random_molecule([6, 1, 8], 3 + i % 4, CUTOFF, seeded(i))
        numbers = graph.z.numpy()
        values: dict[str, Any] = {
            "homo": -0.2 - 0.01 * float(graph.pos.norm()),
            "mu": 1.0 + 0.1 * i,
            "size": float(3.0 * (numbers == 6).sum() - 0.5 * (numbers == 1).sum()) + 0.01 * i,
            "bonds": np.zeros((2, 3)),
            "index": i,
        }
        made.append(Frame(numbers, graph.pos.numpy(), properties={**values, **changes}))
    metadata = DatasetMetadata("toy", properties=UNITS, level_of_theory="made up")
    return InMemoryDataset(made, metadata)


def sample(values: Sequence[float] = (1.0, -2.0)) -> Sample:
    graph = batch_graphs([random_molecule([6, 1, 8], n, CUTOFF, seeded(n)) for n in (4, 7)])
    return Sample(graph, {"homo": torch.tensor(values, dtype=torch.float64)}, {"index": torch.arange(2)})


# ---------------------------------------------------------------- the model


def test_readouts_by_hand() -> None:
    mean, total = objective().network, objective(readout="sum").network
    total.head.load_state_dict(mean.head.state_dict())
    for model in (mean, total):
        model.standardise("eV", 0.5, 2.0, {1: -3.0, 6: 7.0})
    graph = sample().graph
    each = mean.head.atoms(mean.features(graph)).detach()
    for b in range(2):
        own, z = each[graph.batch == b], graph.z[graph.batch == b]
        rest = 2.0 - 3.0 * int((z == 1).sum()) + 7.0 * int((z == 6).sum())
        assert float(mean(graph)["homo"][b].detach()) == pytest.approx(0.5 * float(own.mean()) + rest)
        assert float(total(graph)["homo"][b].detach()) == pytest.approx(0.5 * float(own.sum()) + rest)


def far_apart(a: Graph, b: Graph) -> Graph:
    return build_graph(torch.cat([a.z, b.z]), torch.cat([a.pos, b.pos + 100.0]), CUTOFF)


def test_a_sum_is_additive_and_a_mean_is_not() -> None:
    one, two = (random_molecule([6, 1, 8], n, CUTOFF, seeded(n)) for n in (4, 7))
    for readout in ("sum", "mean"):
        model = objective(readout=readout).network
        model.standardise("eV", 0.5, 0.0, {1: -3.0})
        parts = float((model(one)["homo"] + model(two)["homo"]).detach())
        whole = float(model(far_apart(one, two))["homo"].detach())
        assert (whole == pytest.approx(parts)) is (readout == "sum")


def test_symmetry() -> None:
    model, kinds = objective().network.eval(), {"homo": Kind("structure", "scalar")}
    for check in (check_rotation, check_reflection):
        check(lambda graph: model(graph), sample().graph, kinds=kinds)


def test_small_differences_survive_large_references_in_float32() -> None:
    model = objective(readout="sum").network.float()
    model.standardise("eV", 1e-6, 0.0, {1: -13.6, 6: -1029.0, 8: -2042.0})
    assert model.scale.dtype == model.reference.dtype == torch.float64
    graph = sample().graph
    rest = model(graph)["homo"].detach() - torch.zeros(2).double().index_add(
        0, graph.batch, model.reference[graph.z]
    )
    assert bool((rest != 0).all()) and float(rest.abs().max()) < 1e-4


def test_it_gives_nothing_else_and_refuses_unknown_elements() -> None:
    model = objective().network.eval()
    with pytest.raises(ConfigError, match="predicts homo alone, no energy, forces or stress"):
        model(sample().graph, forces=True)
    assert model(sample().graph).keys() == {"homo"}
    assert not model(sample().graph)["homo"].requires_grad
    model.known[8] = False
    with pytest.raises(UnsupportedInputError, match="not trained on O"):
        model(sample().graph)


# ---------------------------------------------------------------- the objective


def test_the_property_option_chooses_the_class() -> None:
    assert objective_class("supervised") is Supervised
    assert objective_class("supervised", {"property": None}) is Supervised
    assert objective_class("supervised", {"property": "mu"}) is SupervisedProperty
    assert SupervisedProperty.labels({"property": "mu"}) == ("mu",)
    with pytest.raises(ConfigError, match="has no option 'energy_weight'"):
        objective(energy_weight=1.0)
    with pytest.raises(ConfigError, match="'ndem' has no option 'property'"):
        create_objective("ndem", backbone=create_backbone("painn", **OPTIONS), property="mu")


@pytest.mark.parametrize(
    ("loss", "values"), [("l1", (0.5, 2.0)), ("mse", (0.25, 4.0)), ("huber", (0.4, 1.9))]
)
def test_the_loss_by_hand(loss: str, values: tuple[float, float]) -> None:
    made = objective(loss=loss, huber_delta=0.2)
    made.network.standardise("eV", 3.0, 0.0, {})
    batch = sample()
    found = made.network(batch.graph)["homo"].detach()
    batch.targets["homo"] = found + 3.0 * torch.tensor([0.5, -2.0])
    terms = made(batch, seeded())
    assert float(terms["loss"].detach()) == pytest.approx(sum(values) / 2)
    shared = batch._replace(extras={"n_graphs": torch.tensor(4.0)})
    assert float(made(shared, seeded())["loss"].detach()) == pytest.approx(sum(values) / 4)
    errors = made.validation_errors(batch)
    assert errors["homo_mae"] == (pytest.approx(7.5), 2)
    assert errors["homo_mse"] == (pytest.approx(1.5**2 + 6.0**2), 2)
    assert made.monitor == "homo_mae"


def test_all_weights_are_trained() -> None:
    made = objective()
    made(sample(), seeded())["loss"].backward()
    assert not any("energy" in name for name, _ in made.named_parameters())
    idle = [
        n
        for n, p in made.named_parameters()
        if p.requires_grad and (p.grad is None or not bool(p.grad.any()))
    ]
    assert idle == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "max"}, "unknown readout 'max'; known: mean, sum"),
        ({"loss": "l2"}, "unknown loss 'l2'; known: l1, mse, huber"),
        ({"readouts": "sum"}, "did you mean 'readout'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(**options)


def test_the_label_is_asked_for() -> None:
    with pytest.raises(DataError, match="needs the label 'homo'"):
        objective()(sample().graph, seeded())


# ---------------------------------------------------------------- labels and what they are standardised by


def test_energies_are_read_in_ev_and_the_rest_as_it_is() -> None:
    data = frames()
    read = PropertyReader.of(data, "homo")
    assert read.unit == "eV"
    assert read(data[3], 3) == pytest.approx(data[3].properties["homo"] * 27.211386, rel=1e-7)
    assert PropertyReader.of(data, "mu").unit == "D"
    assert PropertyReader.of(data, "mu")(data[3], 3) == data[3].properties["mu"]


def test_mean_and_deviation() -> None:
    data = frames()
    values = np.array([f.properties["mu"] for f in data])
    found = property_statistics(data, "mu", "mean")
    assert (found.shift, found.scale) == (pytest.approx(values.mean()), pytest.approx(values.std()))
    assert found.reference == {}


def test_a_sum_takes_off_a_number_for_each_element() -> None:
    exact = 0.01 * np.arange(12)
    found = property_statistics(frames(), "size", "sum")
    # least squares by the normal equations
    counts = np.array([[(f.numbers == z).sum() for z in (1, 6, 8)] for f in frames()], dtype=float)
    wanted = np.linalg.solve(counts.T @ counts, counts.T @ (counts @ [-0.5, 3.0, 0.0] + exact))
    assert [found.reference[z] for z in (1, 6, 8)] == pytest.approx(list(wanted))
    assert found.scale == pytest.approx(np.std(counts @ ([-0.5, 3.0, 0.0] - wanted) + exact))
    assert found.shift == 0.0


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("humo", {}, ConfigError, "toy has no property 'humo'; did you mean 'homo'"),
        ("index", {}, ConfigError, "toy has no property 'index'"),
        ("bonds", {}, DataError, "frame 0 of toy has not one finite number as property 'bonds'"),
        ("mu", {"mu": float("nan")}, DataError, "not one finite number as property 'mu'"),
        ("mu", {"mu": None}, DataError, "frame 0 of toy has no property 'mu'; leave it out"),
        ("mu", {"mu": 1.5}, DataError, "mu of the 12 training frames of toy holds nothing to learn"),
    ],
)
def test_labels_that_do_not_serve(name: str, changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        property_statistics(frames(**changes), name, "mean")


# ---------------------------------------------------------------- training, files, evaluation


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frames as a file."""
    path = tmp_path_factory.mktemp("data") / "toy.h5"
    kept = [
        Frame(f.numbers, f.positions, properties={k: f.properties[k] for k in ("homo", "mu")})
        for f in frames(20)
    ]
    write_store(path, InMemoryDataset(kept, frames(1).metadata))
    return path


def changes(store: Path, **more: Any) -> dict[str, Any]:
    return {
        "objective": {"name": "supervised", "options": {"property": "homo"}},
        "model.backbone": {"name": "painn", "options": OPTIONS},
        "data.source": str(store),
        "data.molecule": None,
        "data.options": {},
        "data.train": 12,
        "data.val": 4,
        "data.test": 4,
        "trainer.max_steps": 4,
        "trainer.batch_size": 4,
        "trainer.val_every_steps": 2,
        "trainer.threads": 1,
        "schedule.warmup_steps": 1,
        **more,
    }


@pytest.fixture(scope="module")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model file of a short run."""
    return train(
        load_recipe("demo-finetune", changes(store)), tmp_path_factory.mktemp("run") / "out", progress=False
    )


def test_the_file_says_what_it_predicts(trained: Path, store: Path) -> None:
    card, model = read_card(trained), load_potential(trained)
    assert isinstance(model, PropertyModel)
    assert (card.kind, card.head.name) == ("property", "property")
    assert (card.head.options["name"], card.head.options["unit"]) == ("homo", "eV")
    assert (card.energy_zero, card.level_of_theory) == (None, "made up")
    assert card.objective is not None
    assert card.objective.options == {"property": "homo", "readout": "mean", "loss": "l1", "huber_delta": 0.1}
    splits = json.loads((trained.parent / "splits.json").read_text())
    data = open_dataset(store)
    values = np.array([data[i].properties["homo"] for i in splits["train"]]) * units.HARTREE
    assert float(model.shift) == pytest.approx(values.mean())
    assert float(model.scale) == pytest.approx(values.std())
    assert card.training_data[0].statistics["homo_std"].unit == "eV"
    held = data[np.array(splits["val"])]
    errors = card.errors["validation"].quantities
    graphs = batch_graphs([graph_from_frame(f, CUTOFF) for f in held])
    off = model(graphs)["homo"].numpy() - np.array([f.properties["homo"] for f in held]) * units.HARTREE
    assert errors["homo_mae"].value == pytest.approx(np.abs(off).mean(), rel=1e-4)
    assert errors["homo_rmse"].value == pytest.approx(np.sqrt((off**2).mean()), rel=1e-4)
    assert errors["homo_mae"].unit == "eV"


def test_training_learns_the_labels(store: Path, tmp_path: Path) -> None:
    longer = {"trainer.max_steps": 80, "trainer.val_every_steps": 40, "optimizer.lr": 0.02}
    run = prepare(load_recipe("demo-finetune", changes(store, **longer, **{"trainer.ema_decay": None})))
    fit(run, tmp_path)
    errors = measure(run.module.objective.network.eval(), run.dataset[run.splits.train])
    assert errors["homo_mae"].value < 0.3 * errors["homo_label_std"].value


@pytest.mark.parametrize("readout", ["mean", "sum"])
def test_a_file_gives_the_model_back(readout: str, tmp_path: Path) -> None:
    model = objective(readout=readout).network.eval()
    model.standardise("D", 0.1 + 0.2, 1 / 3, {1: -1 / 7, 8: 2 / 3})
    path = save_potential(model, tmp_path / "m.safetensors", make_card(model, "m"))
    again = load_potential(path)
    assert isinstance(again, PropertyModel)
    assert (again.name, again.unit, again.head.readout) == ("homo", "D", readout)
    assert torch.equal(again(sample().graph)["homo"], model(sample().graph)["homo"])
    card = read_card(path)
    with pytest.raises(ArtifactError, match="kind 'potential' and head 'property'"):
        rebuild(card.model_copy(update={"kind": "potential"}), "m")
    broken = card.model_copy(update={"head": card.head.model_copy(update={"options": {}})})
    with pytest.raises(ArtifactError, match="cannot be built: unknown readout 'none'"):
        rebuild(broken, "m")


def test_it_starts_from_pretrained_weights_and_gives_its_own(
    trained: Path, store: Path, tmp_path: Path
) -> None:
    start = changes(store, **{"objective": {"name": "coord", "options": {}}, "trainer.max_steps": 2})
    coord = train(load_recipe("demo-finetune", start), tmp_path / "coord", progress=False)
    for parent in (coord, trained):
        more = {"model.backbone": None, "model.pretrained": str(parent)}
        run = prepare(load_recipe("demo-finetune", changes(store, **more)))
        own = run.module.objective.network.backbone.state_dict()
        theirs = load_potential(parent, trainable=True).backbone.state_dict()
        assert all(torch.equal(own[key], theirs[key]) for key in theirs)
    with pytest.raises(ConfigError, match="no energy head"):
        prepare(load_recipe("demo-finetune", changes(store, **more, **{"model.pretrained_head": True})))


def test_evaluate_prints_the_errors_with_their_unit(
    trained: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = str(trained.parent / "splits.json")
    assert command("evaluate", str(trained), str(store), "--split", split, "--part", "val", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["errors"].keys() == {"homo_mae", "homo_rmse", "homo_label_std"}
    recorded = read_card(trained).errors["validation"].quantities["homo_mae"]
    assert said["errors"]["homo_mae"]["unit"] == recorded.unit == "eV"
    assert said["errors"]["homo_mae"]["value"] == pytest.approx(recorded.value, rel=1e-4)
    assert command("evaluate", str(trained), str(store)) == 0
    shown = capsys.readouterr().out
    assert "homo_mae" in shown and "eV" in shown


def test_evaluate_refuses_other_data(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", str(trained), "ethanol-gfn2") == 2
    assert "has no property 'homo'; it has none" in capsys.readouterr().err
    model = load_potential(trained)
    assert isinstance(model, PropertyModel)
    model.unit = "D"
    with pytest.raises(DataError, match="toy has homo in eV, the model in D"):
        measure(model, frames())


def test_the_command_line_trains_it(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "homo.yaml"
    recipe.write_text(
        "name: homo\nobjective: {name: supervised, options: {property: homo}}\n"
        "model: {backbone: {name: painn, options: {hidden: 8, layers: 1, rbf: 6}}}\n"
        f"data: {{source: {store}, train: 12, val: 4}}\n"
        "trainer: {max_steps: 2, batch_size: 4, threads: 1}\n"
    )
    assert command("train", str(recipe), "--out", str(tmp_path / "out")) == 0
    shown = capsys.readouterr()
    assert "validation: homo MAE" in shown.out and "eV on 4 frames" in shown.out
    assert "homo" in shown.err
    assert command("train", str(recipe), "objective.options.property=gap", "--out", str(tmp_path / "no")) == 2
    assert "has no property 'gap'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_calculator_says_that_there_is_no_energy(trained: Path) -> None:
    from ase.build import molecule

    atoms = molecule("CH4")
    atoms.calc = FFCalculator(trained, "cpu", on_unfamiliar="ignore")
    assert atoms.calc.implemented_properties == []
    for ask in (atoms.get_potential_energy, atoms.get_forces):
        with pytest.raises(PropertyNotImplementedError, match=r"predicts homo.*no (energy|forces)"):
            ask()


def test_a_molecule_of_qm9(shared_data: Path, tmp_path: Path) -> None:
    """Energies, which are fitted by element, and orbital energies of the real data."""
    data = open_dataset(
        "qm9", shared_data / "qm9" / "dsgdb9nsd_first2000.xyz.tar.bz2", include_uncharacterized=True
    )
    energies = property_statistics(data[:500], "U0", "sum")
    assert energies.unit == "eV"
    # free atoms at this level: H -13.6, C -1029.9, N -1485.3, O -2042.6 eV; atoms in molecules lie lower
    assert energies.reference[6] == pytest.approx(-1029.9 - 5.0, abs=5.0)
    assert energies.scale < 2.0
    orbital = property_statistics(data[:500], "homo", "mean")
    assert -8.0 < orbital.shift < -5.0
    assert PropertyReader.of(data, "mu").unit == "D"
