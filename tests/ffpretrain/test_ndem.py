"""NDeM: identities of harmonic potentials, signs, symmetry, where gradients go, a weight of zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import Graph, Sample, batch_graphs
from ffpretrain.noise import masked_multiscale_noise
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.ndem import NDeM, ndem_loss
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.potential import Potential
from ffpretrain.testing import random_molecule, random_rotation, randomize

CUTOFF = 5.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def make(cls: str = "ndem", seed: int = 0, **options: object) -> Supervised:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone("torchmd-et", hidden=16, layers=2, heads=2, rbf=8, cutoff=CUTOFF)
        objective = create_objective(cls, potential=Potential(backbone, scale=1.7), **options)
    assert isinstance(objective, Supervised)
    return objective.double()


def make_ndem(**options: object) -> NDeM:
    objective = make(**options)
    randomize(objective)
    assert isinstance(objective, NDeM)
    return objective


def labelled(sizes: tuple[int, ...] = (5, 9, 7), seed: int = 3) -> Sample:
    generator = seeded(seed)
    graph = batch_graphs([random_molecule([6, 1, 8, 7], n, CUTOFF, generator) for n in sizes])
    targets = {"energy": normal(len(sizes), seed=seed + 1), "forces": normal(len(graph.z), 3, seed=seed + 2)}
    return Sample(graph, targets, {"index": torch.arange(len(sizes)) + 10})


def noise_of(objective: NDeM, sample: Sample, seed: int) -> tuple[Tensor, Tensor]:
    """Return displacement and mask the objective draws from ``seeded(seed)``."""
    graph = sample.graph
    noise = masked_multiscale_noise(
        graph.batch,
        graph.n_graphs,
        objective.sigmas,
        objective.mask_ratio,
        seeded(seed),
        per_structure=objective.per_structure,
        index=sample.extras["index"],
    )
    return noise.displacement, noise.mask


class Planted(nn.Module):
    """A head that answers what it was given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, features: object) -> Tensor:
        return self.answer


class Spring(Potential):
    """``E = c / 2 |x - x0|^2``, the isotropic potential of the paper's assumption ``H = c I``."""

    stiffness = 3.0
    origin: Tensor

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool | None = None) -> dict[str, Tensor]:
        off = graph.pos - self.origin
        energies = 0.5 * self.stiffness * off.square().sum(-1)
        energy = energies.new_zeros(graph.n_graphs).index_add(0, graph.batch, energies)
        return {"energy": energy, "energies": energies, "forces": -self.stiffness * off}


class PassGraph(nn.Module):
    cutoff, dtype = CUTOFF, torch.float64

    def forward(self, graph: Graph) -> Graph:
        return graph


class SpringHead(nn.Module):
    """The spring's force on the noisy structure in units of the scale."""

    def __init__(self, origin: Tensor, stiffness: float, scale: float) -> None:
        super().__init__()
        self.origin, self.stiffness, self.scale = origin, stiffness, scale

    def forward(self, graph: Graph) -> Tensor:
        return -self.stiffness * (graph.pos - self.origin) / self.scale


# ---------------------------------------------------------------- the loss in closed form (METHODS 6.5, 1-2)


def test_the_loss_is_the_mean_over_atoms_of_the_squared_norm() -> None:
    force = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    noisy = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    noise = torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.0, 0.2]])
    # rows: (1 - 1, 0, -1) and (0, 2, -2), with the noise over 0.1
    assert float(ndem_loss(force, noisy, noise, 0.1)) == pytest.approx((1 + 8) / 2)
    mask = torch.tensor([False, True])
    assert float(ndem_loss(force, noisy, noise, torch.tensor(0.1), mask)) == pytest.approx(8.0)


def test_no_noise_and_equal_forces_give_zero() -> None:
    force, noise = normal(7, 3), 0.05 * normal(7, 3, seed=1)
    assert float(ndem_loss(force, force, torch.zeros(7, 3), 0.05)) == 0
    assert float(ndem_loss(force, force, noise, 0.05, torch.zeros(7, dtype=torch.bool))) == 0


def test_signs_of_the_loss() -> None:
    force, noise = normal(500, 3), 0.05 * normal(500, 3, seed=1)
    unit = noise / 0.05
    assert float(ndem_loss(force, force - unit, noise, 0.05)) < 1e-28
    wrong = float(ndem_loss(force, force + unit, noise, 0.05))
    assert wrong == pytest.approx(4 * float(unit.square().sum(-1).mean()))


def test_forces_of_an_isotropic_potential_fulfil_the_relation_everywhere() -> None:
    sample = labelled()
    origin = normal(len(sample.graph.z), 3, seed=9)
    backbone = create_backbone("torchmd-et", hidden=16, layers=1, heads=2, rbf=8, cutoff=CUTOFF)
    spring = Spring(backbone, scale=3.0 * 0.05).double()
    spring.origin = origin
    objective = NDeM(spring, per_structure=True)
    # eps* = c eps / scale holds for sigma_max = 0.05 Å and scale = c sigma_max
    objective.network.backbone = PassGraph()  # type: ignore[assignment]
    objective.noise_head = SpringHead(origin, 3.0, 3.0 * 0.05)  # type: ignore[assignment]
    for seed in range(5):
        assert float(objective(sample, seeded(seed))["ndem"].detach()) < 1e-24
    # any other normaliser breaks it: the constant is the curvature
    objective.sigma_max = 0.06
    assert float(objective(sample, seeded())["ndem"].detach()) > 1e-4


@pytest.mark.parametrize("per_structure", [False, True])
def test_signs_of_the_objective(per_structure: bool) -> None:
    sample, objective = labelled(), make_ndem(per_structure=per_structure)
    force = objective.network(sample.graph)["forces"].detach() / objective.network.scale
    shift, mask = noise_of(objective, sample, 4)
    unit = shift / objective.sigma_max
    assert bool(mask.any())
    objective.noise_head = Planted(force - unit)  # type: ignore[assignment]
    assert float(objective(sample, seeded(4))["ndem"].detach()) < 1e-26
    objective.noise_head = Planted(force + unit)  # type: ignore[assignment]
    wrong = 4 * float(unit.square().sum(-1).mean())
    assert float(objective(sample, seeded(4))["ndem"].detach()) == pytest.approx(wrong, rel=1e-12)


def test_without_displaced_atoms_the_loss_compares_the_heads() -> None:
    sample, objective = labelled(), make_ndem(mask_ratio=0.0)
    force = objective.network(sample.graph)["forces"].detach() / objective.network.scale
    objective.noise_head = Planted(force)  # type: ignore[assignment]
    assert float(objective(sample, seeded())["ndem"].detach()) < 1e-28
    only = make_ndem(mask_ratio=0.0, only_corrupted=True)
    assert float(only(sample, seeded())["ndem"].detach()) == 0


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_predicting_nothing_costs_the_mean_square_of_the_target(ratio: float) -> None:
    # E L = 3 r E[sigma^2] / sigma_max^2 with f = f' = 0; 10 atoms each, so that r is exact
    graph = batch_graphs([random_molecule([6, 1], 10, CUTOFF, seeded(1))] * 1500)
    levels = NDeM(make().network, mask_ratio=ratio).sigmas
    noise = masked_multiscale_noise(graph.batch, 1500, levels, ratio, seeded(2), per_structure=True)
    zero = torch.zeros(len(graph.z), 3, dtype=torch.float64)
    loss = float(ndem_loss(zero, zero, noise.displacement, 0.05))
    wanted = 3 * ratio * float(levels.square().mean()) / 0.05**2
    # levels vary from structure to structure: the spread of sigma^2 decides the error
    spread = float(levels.square().std() / levels.square().mean())
    assert loss == pytest.approx(wanted, rel=4 * math.sqrt((spread**2 + 0.1) / 1500))


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("per_structure", [False, True])
def test_the_reference_is_the_expected_cost_of_a_head_that_predicts_nothing(
    only: bool, per_structure: bool
) -> None:
    graph = batch_graphs([random_molecule([6, 1], 10, CUTOFF, seeded(1))] * 60)
    zeros = {"energy": torch.zeros(60).double(), "forces": torch.zeros(600, 3).double()}
    objective = make_ndem(only_corrupted=only, per_structure=per_structure, mask_ratio=0.3)
    sample = Sample(graph, zeros, {"index": torch.arange(60)})
    force = objective.network(graph)["forces"].detach() / objective.network.scale
    objective.noise_head = Planted(torch.zeros_like(force))  # type: ignore[assignment]
    terms = {key: float(value.detach()) for key, value in objective(sample, seeded()).items()}
    noise = masked_multiscale_noise(
        graph.batch, 60, objective.sigmas, 0.3, seeded(), per_structure=per_structure, index=torch.arange(60)
    )
    sizes = (noise.sigma / 0.05)[graph.batch] * noise.mask
    expected = force.square().sum(-1) + 3 * sizes.square()
    expected = expected[noise.mask] if only else expected
    assert terms["ndem_zero"] == pytest.approx(float(expected.mean()), rel=1e-9)
    # what it costs on these draws: the square of each component spreads by the root of two of its mean
    spread = 5 * math.sqrt(6 * float(sizes.pow(4).sum())) / len(expected)
    assert terms["ndem"] == pytest.approx(terms["ndem_zero"], abs=1.5 * spread)
    assert 1.5 * spread < 0.8 * terms["ndem_zero"]


# ---------------------------------------------------------------- harmonic optimum (METHODS 6.3, 6.5.3)


def whitened(n: int, dims: int, seed: int) -> Tensor:
    """Return samples whose mean is zero and whose covariance is the identity to rounding."""
    x = normal(n, dims, seed=seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n)).T


def harmonic(seed: int = 5, dims: int = 6) -> tuple[Tensor, Tensor]:
    a = normal(dims, dims, seed=seed)
    hessian = a @ a.T + 2 * torch.eye(dims, dtype=torch.float64)
    return hessian, torch.linalg.inv(hessian)


def best_head(hessian: Tensor, kT: float, sigma: float, scale: float, noise_scale: float) -> Tensor:
    """Train a linear auxiliary head with :func:`ndem_loss`; return its matrix."""
    dims, n = len(hessian), 200
    root = torch.linalg.cholesky(kT * torch.linalg.inv(hessian))
    draws = whitened(n, 2 * dims, seed=7)
    clean, noise = draws[:, :dims] @ root.T, sigma * draws[:, dims:]
    noisy, force = clean + noise, -clean @ hessian / scale
    weight = torch.zeros(dims, dims, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ndem_loss(
            force.reshape(-1, 3), (noisy @ weight.T).reshape(-1, 3), noise.reshape(-1, 3), noise_scale
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def test_a_trained_linear_head_is_a_multiple_of_the_smoothed_score() -> None:
    kT, sigma, scale, noise_scale = 0.3, 0.25, 1.3, 0.4
    hessian, inverse = harmonic()
    found = best_head(hessian, kT, sigma, scale, noise_scale)
    smoothed = torch.linalg.inv(kT * inverse + sigma**2 * torch.eye(6, dtype=torch.float64))
    wanted = -(kT / scale + sigma**2 / noise_scale) * smoothed
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_the_auxiliary_head_tends_to_the_force_as_the_noise_vanishes() -> None:
    kT, scale, noise_scale = 0.3, 1.3, 0.4
    hessian, _ = harmonic()
    force = -hessian / scale
    errors = [
        float((best_head(hessian, kT, sigma, scale, noise_scale) - force).norm() / force.norm())
        for sigma in (0.1, 0.01)
    ]
    assert errors[1] < 0.02 * errors[0]
    assert errors[1] < 5e-3


def test_what_remains_of_the_loss_off_the_isotropic_case() -> None:
    # METHODS 6.3: with f' the true force the loss is sigma^2 |H / s - I / n|_F^2 / N
    sigma, scale, noise_scale = 0.05, 1.3, 0.4
    hessian, _ = harmonic()
    noise = sigma * whitened(200, 6, seed=1)
    clean = normal(200, 6, seed=2)
    force, noisy_force = -clean @ hessian / scale, -(clean + noise) @ hessian / scale
    loss = ndem_loss(force.reshape(-1, 3), noisy_force.reshape(-1, 3), noise.reshape(-1, 3), noise_scale)
    off = hessian / scale - torch.eye(6, dtype=torch.float64) / noise_scale
    assert float(loss) == pytest.approx(sigma**2 * float(off.square().sum()) / 2, rel=1e-10)


def test_at_equilibrium_the_head_learns_minus_the_noise() -> None:
    zero, noise = torch.zeros(40, 3), 0.05 * normal(40, 3).float()
    assert float(ndem_loss(zero, -noise / 0.05, noise, 0.05)) < 1e-12
    assert float(ndem_loss(zero, noise / 0.05, noise, 0.05)) > 1


# ---------------------------------------------------------------- symmetry (6.5.4)


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_the_loss_does_not_change_when_structure_and_noise_turn_together(mirror: float) -> None:
    sample, objective = labelled(), make_ndem()
    rotation = mirror * random_rotation(seeded(8))
    shift, _ = noise_of(objective, sample, 0)

    def loss(turn: Tensor, move: float) -> Tensor:
        graph = sample.graph._replace(pos=sample.graph.pos @ turn.T + move)
        noisy = graph._replace(pos=graph.pos + shift @ turn.T)
        force = objective.network(graph)["forces"] / objective.network.scale
        return ndem_loss(force, objective.noisy_force(noisy), shift @ turn.T, 0.05).detach()

    plain = loss(torch.eye(3, dtype=torch.float64), 0.0)
    torch.testing.assert_close(loss(rotation, 0.0), plain, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss(rotation, 2.0), plain, rtol=1e-9, atol=0)


def test_the_auxiliary_force_turns_with_the_structure() -> None:
    graph, objective = labelled().graph, make_ndem()
    rotation = random_rotation(seeded(8))
    plain = objective.noisy_force(graph).detach()
    turned = objective.noisy_force(graph._replace(pos=graph.pos @ rotation.T)).detach()
    torch.testing.assert_close(turned, plain @ rotation.T, rtol=0, atol=1e-10 * float(plain.abs().max()))


# ---------------------------------------------------------------- gradients (6.5.5)


def grads(value: Tensor, module: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("detach", [False, True])
def test_detaching_keeps_the_auxiliary_loss_from_the_main_head(detach: bool) -> None:
    objective = make_ndem(detach_main=detach)
    terms = objective(labelled(), seeded())
    main = grads(terms["ndem"], objective.network.head)
    assert any(bool(g.any()) for g in main) is not detach
    assert any(bool(g.any()) for g in grads(terms["ndem"], objective.network.backbone))
    assert any(bool(g.any()) for g in grads(terms["ndem"], objective.noise_head))


def test_the_auxiliary_head_never_learns_from_labels() -> None:
    objective = make_ndem()
    terms = objective(labelled(), seeded())
    assert grads(terms["energy"] + terms["forces"], objective.noise_head) == []


def test_removing_the_auxiliary_head_changes_no_prediction() -> None:
    objective, graph = make_ndem().eval(), labelled().graph
    before = objective.potential()(graph)
    del objective.noise_head
    after = objective.potential()(graph)
    assert objective.potential() is objective.network
    for key, value in before.items():
        assert torch.equal(value, after[key])


def test_the_total_is_the_weighted_sum() -> None:
    objective = make_ndem(ndem_weight=0.3, energy_weight=0.2, forces_weight=0.7)
    terms = {key: float(value.detach()) for key, value in objective(labelled(), seeded()).items()}
    assert set(terms) == {"loss", "energy", "forces", "ndem", "ndem_zero"}
    wanted = 0.2 * terms["energy"] + 0.7 * terms["forces"] + 0.3 * terms["ndem"]
    assert terms["loss"] == pytest.approx(wanted, rel=1e-12)


# ---------------------------------------------------------------- a weight of zero (6.5.6), batches, options


def test_a_weight_of_zero_is_the_supervised_run_bit_for_bit() -> None:
    sample = labelled()
    runs = {}
    for name, options in (("supervised", {}), ("ndem", {"ndem_weight": 0.0})):
        objective = make(name, **options)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
        generator = seeded()
        for _ in range(4):
            optimizer.zero_grad()
            objective(sample, generator)["loss"].backward()
            optimizer.step()
        runs[name] = objective.network.state_dict()
        assert torch.equal(generator.get_state(), seeded().get_state())
    for key, value in runs["supervised"].items():
        assert torch.equal(value, runs["ndem"][key]), key


def test_making_the_objective_leaves_the_global_generator_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        potential = make("supervised").network
        torch.manual_seed(3)
        before = torch.get_rng_state()
        NDeM(potential)
        assert torch.equal(torch.get_rng_state(), before)


def test_seeds_decide() -> None:
    objective, sample = make_ndem(), labelled()
    losses = [float(objective(sample, seeded(s))["loss"].detach()) for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_auxiliary_loss_of_a_batch_is_that_of_its_parts() -> None:
    objective = make_ndem(per_structure=True)
    parts = [labelled((n,), seed=n) for n in (5, 9)]
    parts = [p._replace(extras={"index": torch.tensor([i])}) for i, p in enumerate(parts)]
    targets = {key: torch.cat([p.targets[key] for p in parts]) for key in ("energy", "forces")}
    whole = Sample(batch_graphs([p.graph for p in parts]), targets, {"index": torch.tensor([0, 1])})
    together = objective(whole, seeded())["ndem"].detach()
    alone = [objective(p, seeded())["ndem"].detach() for p in parts]
    torch.testing.assert_close(together, (5 * alone[0] + 9 * alone[1]) / 14)
    # over two processes, each with its part and the global count: the mean of their gradients' losses
    share = {"n_atoms": torch.tensor(7.0), "n_graphs": torch.tensor(1.0)}
    spread = [objective(p._replace(extras={**p.extras, **share}), seeded())["ndem"].detach() for p in parts]
    torch.testing.assert_close((spread[0] + spread[1]) / 2, together, check_dtype=False)


def test_a_share_of_the_structures_takes_part() -> None:
    sample = labelled((5, 5, 5, 5))
    objective = make_ndem(structure_ratio=0.5)
    seen: list[Graph] = []
    objective.network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = objective(sample, seeded())
    assert [g.n_graphs for g in seen] == [4, 2]
    # the same noise as with all of them
    full = make_ndem()
    shift, _ = noise_of(full, sample, 0)
    torch.testing.assert_close(seen[1].pos, (sample.graph.pos + shift)[:10])
    assert bool(torch.isfinite(terms["loss"]))


def test_a_share_of_the_batches_takes_part() -> None:
    objective, sample = make_ndem(batch_probability=0.4), labelled((4,))
    taken = ["ndem" in objective(sample, seeded(s)) for s in range(60)]
    assert 0.4 * 60 - 4 * math.sqrt(60 * 0.24) < sum(taken) < 0.4 * 60 + 4 * math.sqrt(60 * 0.24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ndem_weight": -1.0}, "ndem_weight"),
        ({"ndem_weight": math.nan}, "ndem_weight"),
        ({"structure_ratio": 0.0}, "structure_ratio"),
        ({"batch_probability": 1.5}, "batch_probability"),
        ({"sigma_max": -0.1}, "noise levels"),
        ({"levels": 0}, "noise levels"),
        ({"sigma_max": 0.01, "sigma_min": 0.02}, "noise levels"),
        ({"mask": 0.5}, "did you mean 'mask_ratio'"),
        ({"forces_loss": "l3"}, "unknown loss 'l3'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_a_mask_ratio_out_of_range_is_refused_when_built() -> None:
    with pytest.raises(ConfigError, match="mask_ratio"):
        make(mask_ratio=1.5)


def test_labels_are_asked_for() -> None:
    with pytest.raises(DataError, match="energy"):
        make_ndem()(labelled().graph, seeded())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_loss_of_the_cpu() -> None:
    objective, sample = make_ndem(), labelled()
    here = objective(sample, seeded())["loss"].detach()
    there = objective.cuda()(sample.to("cuda"), seeded())["loss"]
    there.backward()
    torch.testing.assert_close(there.detach().cpu(), here, rtol=1e-9, atol=0)
