"""What all objectives share: the registry, displaced graphs, losses, labels; and supervised training."""

from __future__ import annotations

import math
from typing import get_type_hints

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import Graph, Sample, batch_graphs, build_graph
from ffpretrain.objectives import Objective, create_objective, list_objectives, objective_class
from ffpretrain.objectives.base import displaced, mean_over, regression_loss
from ffpretrain.potential import Potential
from ffpretrain.testing import check_rotation, crystal, random_molecule

CUTOFF = 5.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def potential(scale: float = 1.0) -> Potential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=1, heads=2, rbf=8, cutoff=CUTOFF)
    return Potential(backbone, scale=scale).double()


def labelled() -> Sample:
    generator = seeded(1)
    graph = batch_graphs([random_molecule([6, 1, 8, 7], n, CUTOFF, generator) for n in (4, 7)])
    targets = {
        "energy": torch.randn(2, generator=generator, dtype=torch.float64),
        "forces": torch.randn(11, 3, generator=generator, dtype=torch.float64),
    }
    return Sample(graph, targets, {"index": torch.tensor([3, 8])})


# ---------------------------------------------------------------- registry


@pytest.mark.parametrize("name", list_objectives())
def test_every_objective_builds_and_gives_a_finite_loss(name: str) -> None:
    objective = create_objective(name, potential=potential())
    assert isinstance(objective, objective_class(name))
    assert objective.name == name
    terms = objective(labelled(), seeded())
    assert terms["loss"].dim() == 0
    assert all(bool(torch.isfinite(value)) for value in terms.values())
    terms["loss"].backward()
    moved = [p for p in objective.network.backbone.parameters() if p.grad is not None and bool(p.grad.any())]
    assert moved
    learned = objective.potential()
    forces = learned(labelled().graph)["forces"]
    assert forces.shape == (11, 3)
    check_rotation(learned.eval(), labelled().graph, tolerance=1e-8)


@pytest.mark.parametrize("name", list_objectives())
def test_labels_are_asked_for_where_they_are_needed(name: str) -> None:
    objective = create_objective(name, potential=potential())
    graph = labelled().graph
    if objective.needs_labels:
        with pytest.raises(DataError, match="needs the label 'energy'"):
            objective(graph, seeded())
    else:
        assert bool(torch.isfinite(objective(graph, seeded())["loss"]))


@pytest.mark.parametrize("name", list_objectives())
def test_the_same_seed_gives_the_same_loss_in_float32(name: str) -> None:
    objective = create_objective(name, potential=potential().float()).float()
    losses = [float(objective(labelled(), seeded(s))["loss"].detach()) for s in (0, 0)]
    assert losses[0] == losses[1]


def test_unknown_names_and_options_offer_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown objective 'nedm'; did you mean 'ndem'"):
        create_objective("nedm", potential=potential())
    with pytest.raises(ConfigError, match="'coord' has no option 'sigmas'; did you mean 'sigma'"):
        create_objective("coord", potential=potential(), sigmas=0.1)


def test_a_backbone_or_a_potential() -> None:
    network = potential()
    with pytest.raises(ConfigError, match="exactly one of backbone= and potential="):
        create_objective("supervised")
    with pytest.raises(ConfigError, match="exactly one of backbone= and potential="):
        create_objective("supervised", backbone=network.backbone, potential=network)
    assert create_objective("supervised", potential=network).network is network
    assert create_objective("supervised", backbone=network.backbone).network.backbone is network.backbone


def test_an_objective_without_a_compiled_path_says_so() -> None:
    class Plain(Objective):
        name, needs_labels = "plain", False

        def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
            return {}

        def potential(self, kT: float | None = None, sigma: float | None = None) -> Potential:
            return self.network

    with pytest.raises(ConfigError, match="'plain' has no compiled path; set compile: false"):
        Plain(potential()).accelerate()


# ---------------------------------------------------------------- shared parts


def test_displaced_rebuilds_the_edges_of_every_structure() -> None:
    graphs = [random_molecule([6, 1], n, 1.6, seeded(n)) for n in (5, 8)]
    batch = batch_graphs(graphs)
    shift = 0.3 * torch.randn(13, 3, generator=seeded(), dtype=torch.float64)
    moved = displaced(batch, shift, 1.6)
    parts = torch.split(batch.pos + shift, [5, 8])
    expected = batch_graphs([build_graph(g.z, p, 1.6) for g, p in zip(graphs, parts, strict=True)])
    for got, want in zip(moved[:6], expected[:6], strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(moved.edge_index, batch.edge_index)


def test_displaced_keeps_the_images_of_a_crystal() -> None:
    solid = crystal([6, 1, 8], 4.0)
    same = displaced(solid, torch.zeros_like(solid.pos), 4.0)
    assert torch.equal(same.edge_index, solid.edge_index)
    assert torch.equal(same.edge_shift, solid.edge_shift)


def test_mean_over_counts_what_the_trainer_says() -> None:
    values, sample = torch.tensor([1.0, 2.0, 6.0]), labelled()
    assert float(mean_over(values, sample, "n_atoms")) == 3.0
    spread = sample._replace(extras={"n_atoms": torch.tensor(4.5)})
    assert float(mean_over(values, spread, "n_atoms")) == 2.0
    assert float(mean_over(values, sample.graph, "n_atoms")) == 3.0


def test_losses_in_closed_form() -> None:
    rows = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 0.05]])
    assert regression_loss("l1", rows).tolist() == pytest.approx([7.0, 0.05])
    assert regression_loss("l2", rows).tolist() == pytest.approx([5.0, 0.05])
    assert regression_loss("mse", rows).tolist() == pytest.approx([25.0, 0.0025])
    # (|x| - delta / 2) beyond delta, x^2 / (2 delta) below
    assert regression_loss("huber", rows, 0.1).tolist() == pytest.approx([6.9, 0.0125])
    assert regression_loss("l1", torch.tensor([-2.0, 3.0])).tolist() == [2.0, 3.0]
    with pytest.raises(ConfigError, match="unknown loss 'l0'"):
        regression_loss("l0", rows)


def test_the_length_has_a_finite_derivative_at_zero() -> None:
    rows = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    regression_loss("l2", rows).sum().backward()
    assert rows.grad is not None
    assert bool(torch.isfinite(rows.grad).all())


# ---------------------------------------------------------------- supervised


def test_supervised_terms_by_hand() -> None:
    sample, network = labelled(), potential(scale=2.5)
    out = {key: value.detach() for key, value in network(sample.graph).items()}
    energy = ((out["energy"] - sample.targets["energy"]) / 2.5).abs().mean()
    forces = ((out["forces"] - sample.targets["forces"]) / 2.5).square().sum(-1)
    objective = create_objective(
        "supervised", potential=network, energy_weight=0.2, forces_weight=3.0, forces_loss="mse"
    )
    terms = {key: value.detach() for key, value in objective(sample, seeded()).items()}
    torch.testing.assert_close(terms["energy"], energy)
    torch.testing.assert_close(terms["forces"], forces.mean())
    torch.testing.assert_close(terms["loss"], 0.2 * energy + 3.0 * forces.mean())
    each = create_objective("supervised", potential=network, energy_per_atom=True, forces_weight=0.0)
    residual = (out["energy"] - sample.targets["energy"]) / 2.5 / torch.tensor([4.0, 7.0])
    torch.testing.assert_close(each(sample, seeded())["energy"].detach(), residual.abs().mean())
    assert "forces" not in each(sample, seeded())


def test_small_energy_differences_survive_large_totals_in_float32() -> None:
    network = potential().float()
    with torch.no_grad():
        network.reference.fill_(-4000.0)
    sample = labelled()
    exact = network(sample.graph)["energy"].detach() + torch.tensor([1e-5, -1e-5])
    close = sample._replace(targets={**sample.targets, "energy": exact})
    objective = create_objective("supervised", potential=network, forces_weight=0.0)
    assert float(objective(close, seeded())["energy"].detach()) == pytest.approx(1e-5, rel=1e-3)


def test_supervised_training_draws_no_random_numbers() -> None:
    generator = seeded()
    create_objective("supervised", potential=potential())(labelled(), generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy_weight": 0.0, "forces_weight": 0.0}, "nor both zero"),
        ({"energy_weight": -1.0}, "not negative"),
        ({"energy_loss": "rmse"}, "unknown loss 'rmse'"),
        ({"energy_weight": math.nan}, "not negative"),
    ],
)
def test_bad_supervised_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_objective("supervised", potential=potential(), **options)


def test_a_missing_label_is_named() -> None:
    sample = labelled()
    unforced = sample._replace(targets={"energy": sample.targets["energy"]})
    with pytest.raises(DataError, match="needs the label 'forces'"):
        create_objective("supervised", potential=potential())(unforced, seeded())


@pytest.mark.parametrize("name", list_objectives())
def test_annotations_of_options_can_be_checked(name: str) -> None:
    hints = get_type_hints(objective_class(name).__init__)
    assert hints and all(
        TypeAdapter(hint) for key, hint in hints.items() if key not in ("potential", "return")
    )
