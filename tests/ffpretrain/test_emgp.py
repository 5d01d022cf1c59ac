"""3D-EMGP: the Riemann-Gaussian score in closed form, its symmetries and limits, sampling, both losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, batch_graphs
from ffpretrain.noise import (
    riemann_gaussian_log_density,
    riemann_gaussian_noise,
    riemann_gaussian_sample,
    riemann_gaussian_score,
    riemann_gaussian_slope,
    riemann_gaussian_target,
)
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.emgp import EMGP
from ffpretrain.testing import (
    check_batching,
    check_forces,
    check_permutation,
    check_rotation,
    random_molecule,
    random_rotation,
    randomize,
)

CUTOFF = 5.0
BATCH = torch.tensor([0] * 7 + [1] * 4)
SIGMA = torch.tensor([0.3, 0.8], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def pair() -> tuple[Tensor, Tensor]:
    clean = normal(11, 3)
    return clean + 0.4 * normal(11, 3, seed=1), clean


def log_density(noisy: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
    """Eq. 9-10, written with the Gram matrices themselves."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(sigma)):
        y, x = noisy[b == BATCH], clean[b == BATCH]
        y, x = y - y.mean(0), x - x.mean(0)
        total = total - (y @ y.T - x @ x.T).square().sum() / (4 * sigma[b] ** 2)
    return total


# ---------------------------------------------------------------- the score (METHODS 4.5, 1-2)


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    noisy, clean = pair()
    noisy.requires_grad_(True)
    (wanted,) = torch.autograd.grad(log_density(noisy, clean, SIGMA), noisy)
    score = riemann_gaussian_score(noisy.detach(), clean, SIGMA, BATCH)
    assert float((score - wanted).norm() / wanted.norm()) < 1e-13
    step = 1e-5 * normal(11, 3, seed=2)
    with torch.no_grad():
        up, down = (log_density(noisy + s * step, clean, SIGMA) for s in (1, -1))
    assert float(up - down) == pytest.approx(2 * float((score * step).sum()), rel=1e-6)


def test_the_log_density_is_that_of_the_gram_matrices() -> None:
    noisy, clean = pair()
    found = riemann_gaussian_log_density(noisy, clean, SIGMA, BATCH)
    assert found.shape == (2,)
    torch.testing.assert_close(found.sum(), log_density(noisy, clean, SIGMA))
    moved = riemann_gaussian_log_density(noisy @ random_rotation(seeded(1)).T, -clean + 3.0, SIGMA, BATCH)
    torch.testing.assert_close(moved, found)
    noisy.requires_grad_(True)
    (gradient,) = torch.autograd.grad(riemann_gaussian_log_density(noisy, clean, SIGMA, BATCH).sum(), noisy)
    torch.testing.assert_close(gradient, riemann_gaussian_score(noisy.detach(), clean, SIGMA, BATCH))
    assert float(riemann_gaussian_log_density(clean, clean, SIGMA, BATCH).abs().max()) < 1e-12


@pytest.mark.parametrize("mirrors", [(1, 1), (-1, 1), (1, -1)])
def test_the_score_turns_with_the_noisy_structure_and_ignores_turns_of_the_clean_one(
    mirrors: tuple[int, int],
) -> None:
    noisy, clean = pair()
    first, second = (m * random_rotation(seeded(i)) for i, m in enumerate(mirrors))
    for function in (riemann_gaussian_score, riemann_gaussian_target):
        plain = function(noisy, clean, SIGMA, BATCH)
        moved = function(noisy @ first.T + 2.0, clean @ second.T - 1.0, SIGMA, BATCH)
        torch.testing.assert_close(moved, plain @ first.T, rtol=0, atol=1e-10)


def test_the_score_has_no_net_force_or_torque() -> None:
    noisy, clean = pair()
    score = riemann_gaussian_score(noisy, clean, SIGMA, BATCH)
    for b in range(2):
        s, y = score[b == BATCH], noisy[b == BATCH]
        assert float(s.sum(0).abs().max()) < 1e-11 * float(s.abs().max())
        torque = torch.linalg.cross(y - y.mean(0), s).sum(0)
        assert float(torque.abs().max()) < 1e-11 * float(s.abs().max())


def test_the_score_of_the_same_geometry_is_zero() -> None:
    _, clean = pair()
    turned = clean @ random_rotation(seeded(3)).T + 4.0
    for noisy in (clean, turned):
        assert float(riemann_gaussian_score(noisy, clean, SIGMA, BATCH).abs().max()) < 1e-11
        assert float(riemann_gaussian_target(noisy, clean, SIGMA, BATCH).abs().max()) < 1e-11


def test_permuted_atoms_have_permuted_scores() -> None:
    noisy, clean = pair()
    order = torch.cat([torch.randperm(7, generator=seeded()), 7 + torch.randperm(4, generator=seeded())])
    score = riemann_gaussian_score(noisy, clean, SIGMA, BATCH)
    torch.testing.assert_close(riemann_gaussian_score(noisy[order], clean[order], SIGMA, BATCH), score[order])


def test_structures_do_not_see_each_other() -> None:
    noisy, clean = pair()
    whole = riemann_gaussian_target(noisy, clean, SIGMA, BATCH)
    alone = riemann_gaussian_target(noisy[7:], clean[7:], SIGMA[1:], torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(whole[7:], alone)


def test_the_target_is_the_score_over_its_normaliser() -> None:
    noisy, clean = pair()
    score = riemann_gaussian_score(noisy, clean, SIGMA, BATCH)
    target = riemann_gaussian_target(noisy, clean, SIGMA, BATCH)
    for b in range(2):
        y, x = noisy[b == BATCH], clean[b == BATCH]
        y, x = y - y.mean(0), x - x.mean(0)
        alpha = (torch.linalg.norm(y.T @ y) + torch.linalg.norm(y.T @ x)) / 2
        torch.testing.assert_close(target[b == BATCH], SIGMA[b] * score[b == BATCH] / alpha)
        # both forms of eq. 12
        force = normal(*x.shape, seed=4)
        left = SIGMA[b] ** 2 * (force / SIGMA[b] - score[b == BATCH] / alpha).square().sum()
        torch.testing.assert_close(left, (force - target[b == BATCH]).square().sum())


def test_a_single_atom_has_no_target() -> None:
    one = torch.zeros(1, dtype=torch.long)
    target = riemann_gaussian_target(normal(1, 3), normal(1, 3, seed=1), SIGMA[:1], one)
    assert target.tolist() == [[0.0, 0.0, 0.0]]


# ---------------------------------------------------------------- limits (METHODS 4.3, 4.5.5, 4.5.9)


def mean_square_target(clean: Tensor, sigma: float, n: int) -> float:
    pos = clean.repeat(n, 1)
    batch = torch.repeat_interleave(torch.arange(n), len(clean))
    levels = torch.full((n,), sigma, dtype=torch.float64)
    noisy = pos + sigma * normal(*pos.shape, seed=6)
    return float(riemann_gaussian_target(noisy, pos, levels, batch).square().sum()) / n


def test_the_size_of_the_target_at_small_noise() -> None:
    clean = normal(21, 3, seed=5) * torch.tensor([3.0, 1.5, 0.8], dtype=torch.float64)
    y = clean - clean.mean(0)
    m = y.T @ y
    wanted = 21 + 1 + float(m.trace() ** 2 / m.square().sum())
    assert mean_square_target(clean, 1e-4, 4000) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("kind", ["cloud", "plane", "rod", "pair"])
def test_the_best_number_between_target_and_score(kind: str) -> None:
    n, draws, sigma = (2, 3000, 1e-4) if kind == "pair" else (9, 3000, 1e-4)
    x = torch.randn(n, 3, generator=seeded(4), dtype=torch.float64)
    x = x * torch.tensor({"plane": [1.0, 1.0, 0.0], "rod": [1.0, 0.0, 0.0]}.get(kind, [1.0] * 3))
    x = x - x.mean(0)
    moments = x.T @ x
    shape = float(moments.trace() ** 2 / moments.square().sum())
    clean, batch = x.repeat(draws, 1), torch.arange(draws).repeat_interleave(n)
    unit = torch.randn(n * draws, 3, generator=seeded(5), dtype=torch.float64)
    sigmas = torch.full((draws,), sigma, dtype=torch.float64)
    target = riemann_gaussian_target(clean + sigma * unit, clean, sigmas, batch)
    found = float((target * -unit).sum() / target.square().sum())
    slope = riemann_gaussian_slope(torch.tensor([n]), shape)
    assert found == pytest.approx(float(slope), rel=0.02)
    assert torch.equal(slope, riemann_gaussian_slope(torch.tensor([n]), torch.tensor(shape).double()))
    if kind == "pair":
        assert float(riemann_gaussian_slope(torch.tensor([2]), 2.1)) == 0.5
    assert float(riemann_gaussian_slope(torch.tensor([1]), 2.1)) == 0.0


def test_the_size_of_the_target_at_large_noise() -> None:
    # the direction of plain noise: 4 (N - 1), METHODS: 96 at N = 21 and 10 Å
    assert mean_square_target(normal(21, 3, seed=5), 10.0, 2000) == pytest.approx(96, rel=0.1)


def test_the_target_does_not_see_planar_molecules_bend() -> None:
    flat = normal(8, 3, seed=7) * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    zeros, sigma = torch.zeros(8, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    out = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) * normal(8, 1, seed=8)
    sizes = [
        float(riemann_gaussian_target(flat + d * out, flat, sigma, zeros).norm()) / d for d in (1e-3, 1e-4)
    ]
    # of second order: ten times smaller a step, ten times smaller a slope
    assert sizes[1] == pytest.approx(sizes[0] / 10, rel=0.1)


def test_the_cost_grows_with_the_number_of_atoms() -> None:
    # a matrix between atoms would take 20 GB
    n = 50_000
    clean = normal(n, 3)
    zeros = torch.zeros(n, dtype=torch.long)
    score = riemann_gaussian_score(clean + 0.1 * normal(n, 3, seed=1), clean, SIGMA[:1], zeros)
    assert bool(torch.isfinite(score).all())


# ---------------------------------------------------------------- sampling (4.5.3)


def test_one_step_is_gaussian_noise_exactly() -> None:
    _, clean = pair()
    unit = normal(11, 3, seed=9)
    noisy = riemann_gaussian_noise(clean, BATCH, SIGMA, [unit])
    assert torch.equal(noisy, clean + SIGMA[BATCH].unsqueeze(1) * unit)


def test_samples_come_from_the_generator_and_the_index() -> None:
    _, clean = pair()
    drawn = riemann_gaussian_sample(clean, SIGMA, BATCH, seeded(5), steps=2)
    assert torch.equal(drawn, riemann_gaussian_sample(clean, SIGMA, BATCH, seeded(5), steps=2))
    assert not torch.equal(drawn, riemann_gaussian_sample(clean, SIGMA, BATCH, seeded(6), steps=2))
    index = torch.tensor([4, 9])
    whole = riemann_gaussian_sample(clean, SIGMA, BATCH, seeded(5), index=index)
    zeros = torch.zeros(4, dtype=torch.long)
    alone = riemann_gaussian_sample(clean[7:], SIGMA[1:], zeros, seeded(5), index=index[1:])
    assert torch.equal(whole[7:], alone)
    many, n = clean[7:].repeat(3000, 1), 3000
    batch = torch.repeat_interleave(torch.arange(n), 4)
    noise = riemann_gaussian_sample(many, torch.full((n,), 0.3).double(), batch, seeded()) - many
    assert float(noise.std()) == pytest.approx(0.3, rel=5 / math.sqrt(2 * noise.numel()))
    with pytest.raises(ConfigError, match="steps=0"):
        riemann_gaussian_sample(clean, SIGMA, BATCH, seeded(), steps=0)


def test_the_second_step_drifts_back() -> None:
    _, clean = pair()
    first, zero = normal(11, 3, seed=9), torch.zeros(11, 3, dtype=torch.float64)
    one = riemann_gaussian_noise(clean, BATCH, SIGMA, [first])
    two = riemann_gaussian_noise(clean, BATCH, SIGMA, [first, zero])
    level = SIGMA[BATCH].unsqueeze(1)
    drift = level**2 / 4 * riemann_gaussian_target(one, clean, SIGMA, BATCH) / level
    torch.testing.assert_close(two, one + drift)
    assert float(log_density(two, clean, SIGMA)) > float(log_density(one, clean, SIGMA))


# ---------------------------------------------------------------- the objective


def make(**options: object) -> EMGP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=2, heads=2, rbf=8, cutoff=CUTOFF).double()
        objective = create_objective("3d-emgp", backbone=backbone, **options)
    randomize(objective)
    assert isinstance(objective, EMGP)
    return objective


def graph() -> Graph:
    generator = seeded(1)
    return batch_graphs([random_molecule([6, 1, 8, 7], n, CUTOFF, generator) for n in (5, 9)])


def test_levels_are_the_papers() -> None:
    levels = make().sigmas
    assert levels[0] == 10.0
    assert levels[-1] == 0.01
    assert float(levels[1] / levels[0]) == pytest.approx(0.868511, abs=5e-7)


def test_both_terms_by_hand() -> None:
    objective, clean = make(), graph()
    noisy, level = objective.draw(clean, seeded(2))
    assert len(set(level.tolist())) == 2
    terms = {key: value.detach() for key, value in objective(clean, seeded(2)).items()}
    _, _, force = objective.energy_head(objective.network, noisy)
    target = riemann_gaussian_target(noisy.pos, clean.pos, objective.sigmas[level], clean.batch)
    torch.testing.assert_close(terms["efp"], (force - target).square().sum().detach() / 2)
    pooled = [objective.energy_head.pool(objective.network.features(g), g) for g in (clean, noisy)]
    chance = objective.logits(*pooled).log_softmax(-1)
    torch.testing.assert_close(terms["inp"], -chance[torch.arange(2), level].mean().detach())
    torch.testing.assert_close(terms["loss"], terms["efp"] + 0.2 * terms["inp"])


def test_the_gaussian_target_is_the_plain_score() -> None:
    objective, clean = make(target="gaussian", inp_weight=0.0), graph()
    noisy, level = objective.draw(clean, seeded(2))
    terms = {key: value.detach() for key, value in objective(clean, seeded(2)).items()}
    _, _, force = objective.energy_head(objective.network, noisy)
    eps = (noisy.pos - clean.pos) / objective.sigmas[level][clean.batch].unsqueeze(1)
    torch.testing.assert_close(terms["efp"], (force + eps).square().sum().detach() / 2)
    torch.testing.assert_close(terms["zero"], eps.square().sum() / 2)
    assert float(terms["floor"]) == 3.0
    assert "floor" not in make()(clean, seeded())


def test_no_gradient_follows_the_noise_that_moves_the_whole() -> None:
    # the best force without a net one is eps less its mean, which leaves 3 of 3N
    one = random_molecule([6, 1], 6, CUTOFF, seeded(1))
    clean, objective = batch_graphs([one] * 800), make(target="gaussian", inp_weight=0.0, sigma_max=0.5)
    noisy, level = objective.draw(clean, seeded(3))
    eps = (noisy.pos - clean.pos) / objective.sigmas[level][clean.batch].unsqueeze(1)
    mean = eps.view(800, 6, 3).mean(1, keepdim=True).expand(-1, 6, -1).reshape(-1, 3)
    objective.energy_head = Planted(mean - eps)  # type: ignore[assignment]
    terms = objective(clean, seeded(3))
    assert float(terms["efp"]) == pytest.approx(3.0, rel=5 * math.sqrt(2 / 2400))
    assert float(terms["floor"]) == 3.0


class Planted(torch.nn.Module):
    """An energy head with given forces."""

    def __init__(self, force: Tensor) -> None:
        super().__init__()
        self.force = force

    def forward(self, network: object, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        return self.pool(None, graph), torch.zeros(graph.n_graphs).double(), self.force

    def pool(self, features: object, graph: Graph) -> Tensor:
        return torch.zeros(graph.n_graphs, 16, dtype=torch.float64)


def test_the_distance_target_is_the_change_of_each_distance() -> None:
    objective, clean = make(target="distance", inp_weight=0.0), graph()
    noisy, level = objective.draw(clean, seeded(2))
    terms = {key: value.detach() for key, value in objective(clean, seeded(2)).items()}
    scalars, wanted, zero = objective.network.features(noisy).scalars, [], []
    for b, (start, n) in enumerate(((0, 5), (5, 9))):
        pairs = torch.combinations(torch.arange(start, start + n)).T
        before, after = ((g.pos[pairs[0]] - g.pos[pairs[1]]).norm(dim=1) for g in (clean, noisy))
        change = (after - before) / objective.sigmas[level[b]]
        predicted = objective.distance_head(after, scalars, pairs)  # type: ignore[misc]
        wanted.append((predicted - change).square().mean())
        zero.append(change.square().mean())
    torch.testing.assert_close(terms["efp"], (sum(wanted) / 2).detach())
    torch.testing.assert_close(terms["efp_zero"], sum(zero) / 2)
    # a predicted stretch pulls back along the line between two atoms
    two = random_molecule([6], 2, CUTOFF, seeded(3))
    field = objective.potential(kT=0.02, sigma=0.1)
    line = two.pos[1] - two.pos[0]
    stretch = objective.distance_head(  # type: ignore[misc]
        line.norm().view(1), objective.network.features(two).scalars, torch.tensor([[0], [1]])
    ).detach()
    wanted_force = (0.02 / 0.1) * stretch * line / line.norm()
    torch.testing.assert_close(field(two)["forces"], torch.stack([wanted_force, -wanted_force]))


def test_guessing_the_level_costs_its_logarithm() -> None:
    objective = make(inp_weight=1.0)
    with torch.no_grad():
        for parameter in objective.level_head.parameters():
            parameter.zero_()
    assert float(objective(graph(), seeded())["inp"].detach()) == pytest.approx(math.log(50))


def test_the_level_does_not_depend_on_how_the_copies_are_turned() -> None:
    objective, clean = make(), graph()
    noisy, _ = objective.draw(clean, seeded())

    def logits(first: Tensor, second: Tensor) -> Tensor:
        graphs = [g._replace(pos=g.pos @ m.T + 1.0) for g, m in ((clean, first), (noisy, second))]
        return objective.logits(
            *(objective.energy_head.pool(objective.network.features(g), g) for g in graphs)
        )

    eye = torch.eye(3, dtype=torch.float64)
    turned = logits(random_rotation(seeded(1)), -random_rotation(seeded(2)))
    torch.testing.assert_close(turned, logits(eye, eye), rtol=0, atol=1e-9)


def test_forces_are_a_gradient_without_net_force_or_torque() -> None:
    objective = make()
    potential = objective.potential(kT=0.02, sigma=0.1)
    clean = graph()
    out = potential(clean)
    assert set(out) == {"energy", "forces"}
    check_forces(potential, random_molecule([6, 1], 6, CUTOFF, seeded(4)))
    check_rotation(potential, clean)
    check_permutation(potential, clean)
    check_batching(potential, [random_molecule([6, 1], n, CUTOFF, seeded(n)) for n in (3, 7)])
    for b in range(2):
        f, x = out["forces"][clean.batch == b], clean.pos[clean.batch == b]
        assert float(f.sum(0).abs().max()) < 1e-9 * float(f.abs().max())
        assert float(torch.linalg.cross(x, f).sum(0).abs().max()) < 1e-9 * float(f.abs().max())
    _, _, force = objective.energy_head(objective.network, clean)
    slope = riemann_gaussian_slope(torch.bincount(clean.batch), 2.1)[clean.batch].unsqueeze(1)
    torch.testing.assert_close(out["forces"], slope * (0.02 / 0.1) * force.detach())
    plain = make(target="gaussian")
    _, _, force = plain.energy_head(plain.network, clean)
    read = plain.potential(kT=0.02, sigma=0.1)(clean)["forces"]
    torch.testing.assert_close(read, (0.02 / 0.1) * force.detach())
    with pytest.raises(ConfigError, match="no stress"):
        potential(clean, stress=True)


def test_forces_have_no_curl_whatever_the_weights() -> None:
    one = random_molecule([6, 1, 8], 4, CUTOFF, seeded(2))
    for seed in range(2):
        objective = make()
        randomize(objective, seed=seed)

        def force(pos: Tensor, objective: EMGP = objective) -> Tensor:
            pooled = objective.energy_head.pool(objective.network.features(one._replace(pos=pos)), one)
            energy = objective.energy_head.project(pooled).sum()
            return -torch.autograd.grad(energy, pos, create_graph=True)[0]

        start = one.pos.clone().requires_grad_(True)
        _, _, wanted = objective.energy_head(objective.network, one)
        torch.testing.assert_close(force(start), wanted)
        jacobian = torch.autograd.functional.jacobian(force, start).reshape(12, 12)
        assert float(jacobian.abs().max()) > 1e-6
        torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-10 * float(jacobian.abs().max()))


@pytest.mark.parametrize("target", ["riemann", "gaussian", "distance"])
def test_the_loss_falls_on_a_fixed_batch(target: str) -> None:
    objective, clean = make(sigma_max=0.5, target=target), graph()
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(clean, seeded())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"langevin_steps": 0}, "langevin_steps=0"),
        ({"efp_weight": -1.0}, "not negative"),
        ({"efp_weight": 0.0, "inp_weight": 0.0}, "nor both zero"),
        ({"levels": 0}, "noise levels"),
        ({"sigma_min": 0.0}, "noise levels"),
        ({"shape": 0.5}, "shape=0.5 must lie between 1"),
        ({"target": "metric"}, "unknown target 'metric'; known: riemann, gaussian, distance"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)
