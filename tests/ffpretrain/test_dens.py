"""DeNS: what is displaced and told, what is learned from it, symmetry, gradients, and runs without it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffpretrain import load_potential
from ffpretrain.artifacts import read_card
from ffpretrain.backbones import Backbone, Features, create_backbone
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.evaluation import error_table, predict
from ffpretrain.graphs import Graph, Sample, batch_graphs
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.dens import DeNS
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.pairs import Pairs
from ffpretrain.potential import Potential
from ffpretrain.recipes import load_recipe
from ffpretrain.testing import Kind, check_rotation, random_molecule, random_rotation, randomize
from ffpretrain.training.finish import finish
from ffpretrain.training.run import fit, prepare

CUTOFF = 5.0
BACKBONES: dict[str, dict[str, Any]] = {
    "torchmd-et": {"hidden": 16, "layers": 2, "heads": 2, "rbf": 8},
    "painn": {"hidden": 16, "layers": 2, "rbf": 8},
    "egnn": {"hidden": 16, "layers": 2},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def make(name: str = "dens", backbone: str = "torchmd-et", **options: object) -> Supervised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_backbone(backbone, cutoff=CUTOFF, **BACKBONES[backbone])
        objective = create_objective(name, potential=Potential(network, scale=1.7), **options)
    assert isinstance(objective, Supervised)
    return objective.double()


def make_dens(backbone: str = "torchmd-et", **options: object) -> DeNS:
    objective = make("dens", backbone, **{"probability": 1.0, "mask_ratio": 0.5, **options})
    randomize(objective)
    assert isinstance(objective, DeNS)
    return objective


def labelled(sizes: tuple[int, ...] = (5, 9, 7), seed: int = 3) -> Sample:
    generator = seeded(seed)
    graph = batch_graphs([random_molecule([6, 1, 8, 7], n, CUTOFF, generator) for n in sizes])
    targets = {"energy": normal(len(sizes), seed=seed + 1), "forces": normal(len(graph.z), 3, seed=seed + 2)}
    return Sample(graph, targets, {"index": torch.arange(len(sizes)) + 10})


def drawn(objective: DeNS, sample: Sample, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return displacement and mask that the objective draws from ``seeded(seed)``."""
    noise = objective._draw(sample.graph, sample.extras["index"], seeded(seed))
    return noise.displacement, noise.mask


class Seen:
    """Records graph and extra input of each call of a backbone."""

    def __init__(self, backbone: Backbone) -> None:
        self.calls: list[tuple[Any, ...]] = []
        backbone.register_forward_pre_hook(lambda _, inputs: self.calls.append(inputs))

    @property
    def initial(self) -> Features:
        return self.calls[-1][1]


# ---------------------------------------------------------------- without displaced structures


@pytest.mark.parametrize("main_head", ["energy-gradient", "direct"])
def test_a_probability_of_zero_is_the_supervised_run_bit_for_bit(main_head: str) -> None:
    sample = labelled()
    runs = {}
    for name, options in (("supervised", {}), ("dens", {"probability": 0.0})):
        objective = make(name, main_head=main_head, **options)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
        generator = seeded()
        for _ in range(4):
            optimizer.zero_grad()
            objective(sample, generator)["loss"].backward()
            optimizer.step()
        runs[name] = objective.state_dict()
        assert torch.equal(generator.get_state(), seeded().get_state())
    assert runs["supervised"].keys() < runs["dens"].keys()
    for key, value in runs["supervised"].items():
        assert torch.equal(value, runs["dens"][key]), key


def test_a_step_that_displaces_nothing_is_a_supervised_step() -> None:
    sample, objective = labelled((4,)), make_dens(probability=0.3)
    quiet = next(s for s in range(20) if not bool(drawn(objective, sample, s)[1].any()))
    terms, plain = objective(sample, seeded(quiet)), Supervised.forward(objective, sample, seeded())
    assert terms.keys() == plain.keys() == {"loss", "energy", "forces"}
    assert all(torch.equal(terms[key], plain[key]) for key in terms)


def test_making_the_objective_leaves_the_global_generator_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        potential = make("supervised").network
        torch.manual_seed(3)
        before = torch.get_rng_state()
        DeNS(potential)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_without_forces_as_input_the_result_is_the_potential_itself(backbone: str) -> None:
    objective, graph = make_dens(backbone).eval(), labelled().graph
    learned = objective.potential()
    assert learned is objective.network
    plain = make("supervised", backbone).network
    missing, unexpected = plain.load_state_dict(learned.state_dict(), strict=False)
    assert not missing and unexpected
    out, same = learned(graph), plain.eval()(graph)
    assert all(torch.equal(out[key], same[key]) for key in same)


# ---------------------------------------------------------------- what is displaced and told


def test_forces_are_told_of_displaced_atoms_alone() -> None:
    objective, sample = make_dens(), labelled()
    seen = Seen(objective.network.backbone)
    objective(sample, seeded())
    shift, moved = drawn(objective, sample)
    assert 0 < int(moved.sum()) < len(moved)
    graph, initial = seen.calls[-1]
    torch.testing.assert_close(graph.pos, sample.graph.pos + shift)
    assert bool((shift[moved] != 0).all()) and not bool(shift[~moved].any())
    assert not bool(initial.scalars[~moved].any()) and not bool(initial.vectors[~moved].any())
    forces = sample.targets["forces"][moved] / 1.7
    length = forces.square().sum(-1, keepdim=True).sqrt()
    scalars = length * objective.encoding.length.weight.flatten()
    vectors = forces.unsqueeze(-1) * objective.encoding.vector.weight.flatten()
    torch.testing.assert_close(initial.scalars[moved], scalars)
    torch.testing.assert_close(initial.vectors[moved], vectors)


def test_structures_left_alone_are_told_nothing() -> None:
    objective, sample = make_dens(probability=0.5), labelled((5,) * 6)
    seen = Seen(objective.network.backbone)
    seed = next(
        s for s in range(20) if 0 < len(sample.graph.batch[drawn(objective, sample, s)[1]].unique()) < 6
    )
    objective(sample, seeded(seed))
    _, moved = drawn(objective, sample, seed)
    counts = torch.bincount(sample.graph.batch[moved], minlength=6)
    assert set(counts.tolist()) == {0, 2}
    still = counts[sample.graph.batch] == 0
    assert torch.equal(seen.calls[-1][0].pos[still], sample.graph.pos[still])
    assert not bool(seen.initial.vectors[still].any())


@pytest.mark.parametrize("draw", ["structure", "batch"])
def test_the_probability_is_kept(draw: str) -> None:
    objective, sample = make_dens(probability=0.25, draw=draw), labelled((3,) * 8)
    parts = []
    for seed in range(60):
        _, moved = drawn(objective, sample, seed)
        parts.append(len(sample.graph.batch[moved].unique()) / 8)
    assert (set(parts) == {0.0, 1.0}) is (draw == "batch")
    draws = 60 if draw == "batch" else 480
    assert abs(sum(parts) / 60 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / draws)


def test_noise_has_the_standard_deviations_asked_for() -> None:
    sample = labelled((40,) * 10)
    shift, moved = drawn(make_dens(sigma_max=0.07), sample)
    assert int(moved.sum()) == 200
    assert float(shift[moved].std()) == pytest.approx(0.07, rel=0.1)
    several = make_dens(sigma_max=0.3, sigma_min=0.003, levels=2)
    shift, moved = drawn(several, sample)
    sizes = [float(shift[moved & (sample.graph.batch == b)].std()) for b in range(10)]
    assert {round(math.log10(s / 0.3)) for s in sizes} == {0, -2}


# ---------------------------------------------------------------- the loss by hand


@pytest.mark.parametrize("main_head", ["energy-gradient", "direct"])
@pytest.mark.parametrize("sigma_min", [None, 0.01])
def test_terms_by_hand(main_head: str, sigma_min: float | None) -> None:
    objective = make_dens(main_head=main_head, dens_weight=0.3, sigma_max=0.2, sigma_min=sigma_min)
    sample = labelled()
    terms = {key: float(value.detach()) for key, value in objective(sample, seeded()).items()}
    seen = Seen(objective.network.backbone)
    objective(sample, seeded())
    noisy, initial = seen.calls[-1]
    shift, moved = drawn(objective, sample)
    features = objective.network.backbone(noisy, initial)
    energies = objective.network.head(features).detach() * 1.7
    energy = torch.stack([energies[noisy.batch == b].sum() for b in range(3)])
    assert terms["energy"] == pytest.approx(float((energy - sample.targets["energy"]).abs().mean()) / 1.7)
    if main_head == "direct":
        forces = objective.force_head(features).detach() * 1.7  # type: ignore[misc]
    else:
        forces = differences(objective, noisy, initial)
    off = (forces - sample.targets["forces"])[~moved].square().sum(-1).sqrt() / 1.7
    assert terms["forces"] == pytest.approx(float(off.mean()), rel=1e-6)
    rest = (objective.noise_head(features).detach() - shift / 0.2)[moved].square().sum(-1).sqrt()
    assert terms["dens"] == pytest.approx(float(rest.mean()), rel=1e-9)
    total = 0.05 * terms["energy"] + terms["forces"] + 0.3 * terms["dens"]
    assert terms["loss"] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("sigma_min", [None, 0.01])
def test_predicting_no_noise_costs_the_mean_length_of_the_target(sigma_min: float | None) -> None:
    objective, sample = make_dens(sigma_min=sigma_min, probability=1.0, mask_ratio=0.5), labelled((20,) * 60)
    with torch.no_grad():
        for parameter in objective.noise_head.parameters():
            parameter.zero_()
    terms = objective(sample, seeded())
    cost, zero = float(terms["dens"].detach()), float(terms["dens_zero"])
    assert cost == pytest.approx(zero, rel=5 * 0.42 / math.sqrt(600))  # lengths spread by 0.42 of their mean
    if sigma_min is None:
        assert zero == pytest.approx(math.sqrt(8 / math.pi))


def differences(objective: DeNS, noisy: Graph, initial: Features, step: float = 1e-4) -> Tensor:
    """Return forces from central differences of the energy, the extra input held fixed."""
    forces = torch.zeros_like(noisy.pos)
    for i in range(noisy.pos.numel()):
        energies = []
        for sign in (1, -1):
            pos = noisy.pos.clone()
            pos.view(-1)[i] += sign * step
            features = objective.network.backbone(noisy._replace(pos=pos), initial)
            energies.append(float(objective.network.head(features).sum().detach()) * 1.7)
        forces.view(-1)[i] = (energies[1] - energies[0]) / (2 * step)
    return forces


def test_displaced_atoms_have_no_force_loss() -> None:
    objective, sample = make_dens(), labelled()
    _, moved = drawn(objective, sample)
    plain = objective(sample, seeded())
    out, _ = objective.evaluate_noisy(sample.graph, Features(torch.zeros(21, 16).double(), None))
    for atoms, changes in ((moved, False), (~moved, True)):
        pushed = {key: value.clone() for key, value in out.items()}
        pushed["forces"][atoms] += 5.0
        terms = [objective.supervised_terms(sample, o, ~moved)["forces"].detach() for o in (out, pushed)]
        assert (float(terms[0]) != float(terms[1])) is changes
    assert bool(torch.isfinite(plain["forces"]))


def test_all_atoms_displaced_leaves_no_force_term() -> None:
    objective = make_dens(mask_ratio=1.0)
    terms = objective(labelled(), seeded())
    assert float(terms["forces"].detach()) == 0 and float(terms["energy"].detach()) > 0


class Planted(nn.Module):
    """A head that answers what it was given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, features: object) -> Tensor:
        return self.answer


def test_the_target_is_plus_the_noise_over_sigma_max() -> None:
    objective, sample = make_dens(sigma_max=0.2, sigma_min=0.01), labelled()
    shift, moved = drawn(objective, sample)
    losses = {}
    for sign in (1, 0, -1):
        objective.noise_head = Planted(sign * shift / 0.2)  # type: ignore[assignment]
        losses[sign] = float(objective(sample, seeded())["dens"].detach())
    assert losses[1] < 1e-7
    assert losses[0] == pytest.approx(float((shift[moved] / 0.2).square().sum(-1).sqrt().mean()))
    assert losses[-1] == pytest.approx(2 * losses[0])


# ---------------------------------------------------------------- symmetry


@pytest.mark.parametrize("mirror", [1.0, -1.0])
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_structure_and_forces_turn_together(backbone: str, mirror: float) -> None:
    objective, sample = make_dens(backbone), labelled()
    rotation = mirror * random_rotation(seeded(8))
    shift, moved = drawn(objective, sample)

    def predict(turn: Tensor, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noisy = sample.graph._replace(pos=(sample.graph.pos + shift) @ turn.T + 2.0)
        out, noise = objective.evaluate_noisy(noisy, objective.encode(told, moved))
        return out["energy"].detach(), out["forces"].detach(), noise.detach()

    forces = sample.targets["forces"]
    energy, push, noise = predict(torch.eye(3).double(), forces)
    turned = predict(rotation, forces @ rotation.T)
    torch.testing.assert_close(turned[0], energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turned[1], push @ rotation.T, rtol=0, atol=1e-9 * float(push.abs().max()))
    torch.testing.assert_close(turned[2], noise @ rotation.T, rtol=0, atol=1e-9 * float(noise.abs().max()))
    # forces that do not turn with the structure say something else
    assert not torch.allclose(predict(rotation, forces)[2], noise @ rotation.T, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- gradients


def reached(value: Tensor, module: nn.Module) -> bool:
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True)
    return any(g is not None and bool(g.any()) for g in found)


def test_each_term_trains_what_it_should() -> None:
    objective = make_dens()
    terms, network = objective(labelled(), seeded()), objective.network
    for name in ("energy", "forces", "dens"):
        assert reached(terms[name], network.backbone)
        assert reached(terms[name], objective.encoding)
        assert reached(terms[name], objective.noise_head) is (name == "dens")
        assert reached(terms[name], network.head) is (name != "dens")


def test_every_weight_is_trained() -> None:
    objective = make_dens("painn")
    objective(labelled(), seeded())["loss"].backward()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not bool(p.grad.any())] == []


def test_training_drives_the_denoising_loss_down() -> None:
    objective, sample = make("dens", probability=1.0, dens_weight=1.0), labelled((6,))
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        terms = objective(sample, seeded(1))
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["dens"].detach()))
    assert losses[-1] < 0.3 * losses[0]


# ---------------------------------------------------------------- seeds, weight over the run, processes


def test_seeds_decide() -> None:
    objective, sample = make_dens(probability=0.8), labelled()
    losses = [float(objective(sample, seeded(s))["loss"].detach()) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_noise_of_a_structure_does_not_depend_on_its_batch() -> None:
    objective = make_dens(probability=0.5)
    whole = labelled((5,) * 6)
    shift, _ = drawn(objective, whole)
    part = whole._replace(graph=labelled((5,) * 2).graph, extras={"index": whole.extras["index"][[4, 1]]})
    alone, _ = drawn(objective, part)
    assert torch.equal(alone, torch.cat([shift[20:25], shift[5:10]]))


@pytest.mark.parametrize("decay", [True, False])
def test_the_weight_falls_linearly_over_the_run(decay: bool) -> None:
    objective, sample = make_dens(dens_weight=0.4, linear_decay=decay), labelled()
    for step, expected in ((0, 0.4), (250, 0.3), (1000, 0.0), (1500, 0.0)):
        objective.at_step(step, 1000)
        weight = expected if decay else 0.4
        assert objective.current_weight == pytest.approx(weight)
        terms = {key: float(value.detach()) for key, value in objective(sample, seeded()).items()}
        plain = 0.05 * terms["energy"] + terms["forces"]
        assert terms["loss"] - plain == pytest.approx(weight * terms["dens"], abs=1e-12)


def test_several_processes_are_refused_where_atoms_move() -> None:
    assert "train with one device" in str(make("dens").not_parallel())
    assert make("dens", probability=0.0).not_parallel() is None


def test_there_is_no_compiled_step() -> None:
    with pytest.raises(ConfigError, match="'dens' has no compiled path; set compile: false"):
        make("dens").accelerate()


# ---------------------------------------------------------------- refusals


class Scalars(Backbone):
    """A backbone without vector features."""

    name, has_vectors = "scalars", False

    def __init__(self) -> None:
        super().__init__(CUTOFF, 8, 10, {})
        self.embedding = nn.Embedding(10, 8)

    def encode(self, z: Tensor, pairs: Pairs, initial: Features | None = None) -> Features:
        return Features(self.with_initial(self.embedding(z), initial)[0], None)


def test_a_backbone_without_vectors_is_refused_with_the_reason() -> None:
    message = "dens tells the network the forces.*'scalars' cannot take vectors as input; use one that can"
    with pytest.raises(ConfigError, match=message) as error:
        create_objective("dens", backbone=Scalars())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dens_weight": -1.0}, "dens_weight"),
        ({"dens_weight": math.inf}, "dens_weight"),
        ({"probability": 1.1}, "probability"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"draw": "atom"}, "unknown draw 'atom'; known: structure, batch"),
        ({"sigma_max": 0.0}, "noise levels"),
        ({"sigma_min": 0.0}, "noise levels"),
        ({"sigma_min": 0.1}, "noise levels"),
        ({"main_head": "gradient"}, "unknown main_head 'gradient'"),
        ({"prob": 0.5}, "did you mean 'probability'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("dens", **options)


def test_labels_are_asked_for() -> None:
    with pytest.raises(DataError, match="forces"):
        make_dens()(labelled().graph, seeded())


def test_the_objective_can_be_copied() -> None:
    objective, sample = make_dens(), labelled()
    again = copy.deepcopy(objective)
    assert torch.equal(again(sample, seeded())["loss"], objective(sample, seeded())["loss"])


def test_the_predicted_noise_passes_the_kit() -> None:
    objective, graph = make_dens().eval(), labelled().graph
    nothing = Features(torch.zeros(21, 16).double(), None)
    check_rotation(
        lambda g: {"noise": objective.evaluate_noisy(g, nothing)[1].detach()},
        graph,
        kinds={"noise": Kind("atom", "vector")},
        tolerance=1e-8,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_loss_of_the_cpu() -> None:
    objective, sample = make_dens(), labelled()
    here = objective(sample, seeded())["loss"].detach()
    there = objective.cuda()(sample.to("cuda"), seeded())["loss"]
    there.backward()
    torch.testing.assert_close(there.detach().cpu(), here, rtol=1e-9, atol=0)


def test_the_trainer_tells_the_step(tmp_path: Path) -> None:
    changes = {
        "objective": {"name": "dens", "options": {"probability": 1.0, "dens_weight": 0.4}},
        "model.backbone": {
            "name": "torchmd-et",
            "options": {"hidden": 8, "layers": 1, "heads": 2, "rbf": 4, "max_z": 9},
        },
        "data.train": 8,
        "data.val": 2,
        "data.test": 2,
        "trainer.max_steps": 4,
        "trainer.batch_size": 2,
        "trainer.val_every_steps": 2,
        "trainer.threads": 1,
        "trainer.compile": False,  # else the first batch is seen twice more, to compare
        "schedule.warmup_steps": 1,
    }
    run = prepare(load_recipe("demo-finetune", changes))
    objective, seen = run.module.objective, []
    assert isinstance(objective, DeNS)
    objective.encoding.register_forward_hook(
        lambda *_: seen.append((objective.training, objective.current_weight))
    )
    fit(run, tmp_path)
    assert [weight for training, weight in seen if training] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    card = read_card(finish(run, tmp_path))
    assert (card.kind, card.backbone.options["vector_input"]) == ("potential", True)
    assert card.objective is not None and card.objective.options["mask_ratio"] == 0.25
    predictions = predict(load_potential(tmp_path / "model.safetensors"), run.dataset[run.splits.val])
    measured = card.errors["validation"].quantities["forces_mae"].value
    assert error_table(predictions)["forces_mae"].value == pytest.approx(measured, rel=1e-5)
