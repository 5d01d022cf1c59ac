"""SE(3)-DDM: losses in closed form, pairs, the chain rule from distances to positions, symmetry."""

from __future__ import annotations

import math

import pytest
import torch
from ase.build import molecule as named_molecule
from torch import Tensor, nn

from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, Sample, batch_graphs, build_graph, graph_from_atoms
from ffpretrain.molecules import find_bonds, neighbour_lists
from ffpretrain.noise import noise_levels
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.se3_ddm import (
    SE3DDM,
    all_pairs,
    distance_score_loss,
    distances,
    pair_forces,
    unknown_level_floor,
)
from ffpretrain.objectives.subgraphs import connected_part, part_of
from ffpretrain.testing import (
    check_batching,
    check_permutation,
    check_reflection,
    check_rotation,
    check_translation,
    crystal,
    random_molecule,
    random_rotation,
    randomize,
)

CUTOFF = 5.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def make(**options: object) -> SE3DDM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=2, heads=2, rbf=8, cutoff=CUTOFF).double()
        objective = create_objective("se3-ddm", backbone=backbone, **options)
    randomize(objective)
    assert isinstance(objective, SE3DDM)
    return objective


def molecule(n: int, seed: int = 1) -> Graph:
    return random_molecule([6, 1, 8, 7], n, CUTOFF, seeded(seed))


class Answer(nn.Module):
    """A head that gives the same answer whatever it is asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, distance: Tensor, scalars: Tensor, pairs: Tensor) -> Tensor:
        return self.answer.expand(len(distance))


class Linear(nn.Module):
    """``-k sigma (d~ - m)``: the score of a Gaussian in the units of the head."""

    def __init__(self, slope: float, mean: float) -> None:
        super().__init__()
        self.slope, self.mean = slope, mean

    def forward(self, distance: Tensor, scalars: Tensor, pairs: Tensor) -> Tensor:
        return -self.slope * (distance - self.mean)


# ---------------------------------------------------------------- losses (METHODS 5.3, 1-2, 6-7)


@pytest.mark.parametrize("beta", [0.05, 2.0, 5.0])
def test_the_perfect_and_the_empty_answer(beta: float) -> None:
    objective = make(beta=beta)
    graph = molecule(9)
    pairs = all_pairs(graph)
    xi = normal(36)
    for sigma in (0.01, 0.3, 10.0):
        level = torch.tensor([sigma], dtype=torch.float64)
        perfect = objective.direction(Answer(-xi), graph, graph, pairs, level.unsqueeze(1), xi.unsqueeze(1))
        assert float(perfect) == 0
        empty = objective.direction(
            Answer(torch.zeros(1)), graph, graph, pairs, level.unsqueeze(1), xi.unsqueeze(1)
        )
        assert float(empty) == pytest.approx(0.5 * float(xi.square().sum()) * sigma ** (beta - 2))


@pytest.mark.parametrize("beta", [0.05, 2.0, 5.0])
def test_the_loss_of_a_pair_in_both_forms(beta: float) -> None:
    score, xi, gap = normal(20), normal(20, seed=1), 1.0 + normal(20, seed=2).abs()
    sigma = 0.01 + torch.rand(20, generator=seeded(3), dtype=torch.float64)
    disturbed = gap + sigma * xi
    as_written = sigma.pow(beta) * (score / sigma - (gap - disturbed) / sigma.square()).square() / 2
    torch.testing.assert_close(distance_score_loss(score, xi, sigma, beta), as_written)
    assert not bool(distance_score_loss(-xi, xi, sigma, beta).any())


def test_all_levels_are_what_one_level_is_on_average() -> None:
    graph = batch_graphs([molecule(9)] * 40)
    every, one = make(all_levels=True, levels=6), make(levels=6)
    terms = every(graph, seeded())
    again = torch.stack([one(graph, seeded(s))["loss"].detach() for s in range(30)])
    # the spread of both is that of xi^2 and of the levels drawn
    assert float(terms["loss"].detach()) == pytest.approx(float(again.mean()), rel=0.05)
    every.score_clean = every.score_noisy = Answer(torch.zeros(1))  # type: ignore[assignment]
    found = float(every(graph, seeded())["loss"])
    assert found == pytest.approx(18.0, rel=5 * math.sqrt(2 / (36 * 40 * 2 * 6)))
    # each level has its own draw and counts alike
    pairs, levels = all_pairs(molecule(9)), torch.tensor([[0.1, 0.7]], dtype=torch.float64)
    xi = normal(36, 2)
    both = every.direction(one.score_clean, molecule(9), molecule(9), pairs, levels, xi)
    parts = [
        every.direction(one.score_clean, molecule(9), molecule(9), pairs, levels[:, [k]], xi[:, [k]])
        for k in range(2)
    ]
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)


def test_predicting_nothing_costs_half_a_pair_at_every_level() -> None:
    objective = make()
    objective.score_clean = objective.score_noisy = Answer(torch.zeros(1))  # type: ignore[assignment]
    terms = objective(batch_graphs([molecule(9)] * 400), seeded())
    for name in ("loss", "clean", "noisy"):
        assert float(terms[name]) == pytest.approx(18.0, rel=5 * math.sqrt(2 / (36 * 400)))


def test_the_best_score_of_gaussian_distances() -> None:
    # distances from N(m, s^2): score -(d~ - m) / (s^2 + sigma^2), loss 1/2 (1 - sigma^2 / (s^2 + sigma^2))
    s, sigma, n = 0.1, 0.3, 20_000
    two = molecule(2)
    graph = batch_graphs([two] * n)
    gaps = 1.5 + s * normal(n, seed=2)
    pos = torch.zeros(2 * n, 3, dtype=torch.float64)
    pos[1::2, 0] = gaps
    graph = graph._replace(pos=pos)
    objective, level = make(rebuild_edges=False), torch.full((n,), sigma, dtype=torch.float64)
    objective.network.backbone = nn.Identity()  # type: ignore[assignment]
    objective.network.features = lambda g: _Scalars(g)  # type: ignore[method-assign, assignment]
    pairs, xi = all_pairs(graph), normal(n, seed=3)
    best = sigma / (s**2 + sigma**2)

    def loss(slope: float) -> float:
        return float(
            objective.direction(
                Linear(slope, 1.5), graph, graph, pairs, level.unsqueeze(1), xi.unsqueeze(1)
            ).mean()
        )

    assert 0.5 * (1 - sigma**2 / (s**2 + sigma**2)) == pytest.approx(0.05)
    assert loss(best) == pytest.approx(0.05, rel=5 * math.sqrt(2 / n))
    assert loss(0.9 * best) > loss(best) < loss(1.1 * best)


def test_a_trained_head_learns_the_score_of_gaussian_distances() -> None:
    # -(d~ - m) / (s^2 + sigma^2), in units of 1 / sigma; linear least squares are a whole training
    s, sigma, n, mean = 0.1, 0.3, 20_000, 1.5
    graph = batch_graphs([molecule(2)] * n)
    pos = torch.zeros(2 * n, 3, dtype=torch.float64)
    pos[1::2, 0] = mean + s * normal(n, seed=2)
    graph = graph._replace(pos=pos)
    objective, level = make(rebuild_edges=False), torch.full((n,), sigma, dtype=torch.float64)
    objective.network.backbone = nn.Identity()  # type: ignore[assignment]
    objective.network.features = lambda g: _Scalars(g)  # type: ignore[method-assign, assignment]
    head = nn.Linear(1, 1).double()
    wrapped = Wrapped(head)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")
    pairs, xi = all_pairs(graph), normal(n, seed=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective.direction(wrapped, graph, graph, pairs, level.unsqueeze(1), xi.unsqueeze(1)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    slope, at_mean = float(head.weight.detach()), float(head(torch.tensor([[mean]]).double()).detach())
    assert slope == pytest.approx(-sigma / (s**2 + sigma**2), rel=5 / math.sqrt(n))
    assert at_mean == pytest.approx(0.0, abs=5 / math.sqrt(n))


class Wrapped(nn.Module):
    """A head that sees the disturbed distance alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, distance: Tensor, scalars: Tensor, pairs: Tensor) -> Tensor:
        return self.inner(distance.unsqueeze(1)).squeeze(1)


class _Scalars:
    def __init__(self, graph: Graph) -> None:
        self.scalars = graph.pos


@pytest.mark.parametrize(("levels", "beta"), [((10.0, 0.01, 50), 2.0), ((1.0, 0.05, 10), 5.0)])
def test_the_floor_of_unknown_levels_is_the_best_regression(
    levels: tuple[float, float, int], beta: float
) -> None:
    sigmas, n = noise_levels(*levels), 400_000
    sigma = sigmas[torch.randint(len(sigmas), (n,), generator=seeded())]
    xi = normal(n)
    weight = sigma.pow(beta - 2)
    # the mean within narrow bins of u = sigma xi is the best answer to u
    bins = 2 * ((sigma * xi).abs().log() * 20).round().long() + (xi > 0)
    bins = bins - bins.min()
    top, bottom = (torch.zeros(int(bins.max()) + 1, dtype=torch.float64) for _ in range(2))
    top.index_add_(0, bins, weight * xi)
    bottom.index_add_(0, bins, weight)
    least = 0.5 * float((weight * (xi - (top / bottom)[bins]).square()).mean())
    assert unknown_level_floor(sigmas, beta) == pytest.approx(least, rel=0.02)
    assert least < 0.4 * 0.5 * float(sigmas.pow(beta - 2).mean())


def test_a_known_level_has_no_floor() -> None:
    assert unknown_level_floor(noise_levels(0.3, 0.3, 1), 2.0) < 1e-9
    terms = make(sigma_max=0.3, sigma_min=0.3, levels=1, beta=4.0)(molecule(9), seeded())
    assert float(terms["zero"]) == pytest.approx(18 * 0.3**2)
    assert float(terms["floor"]) < 1e-8
    assert make(beta=4.0).unit_of("loss") == "angstrom^2"
    assert make().unit_of("loss") == "1"


def test_levels_are_the_papers() -> None:
    for n, ratio in ((50, 0.868511), (30, 0.788046)):
        levels = make(levels=n).sigmas
        assert levels[0] == 10.0
        assert levels[-1] == 0.01
        assert float(levels[1] / levels[0]) == pytest.approx(ratio, abs=5e-7)


def test_the_spread_of_distances_between_the_views() -> None:
    far = molecule(2)._replace(pos=torch.tensor([[0.0, 0, 0], [40.0, 0, 0]], dtype=torch.float64))
    graph = batch_graphs([far] * 4000)
    pairs = all_pairs(graph)
    moved = graph.pos + 0.3 * normal(8000, 3)
    spread = float((distances(moved, pairs) - distances(graph.pos, pairs)).std())
    assert spread == pytest.approx(0.4243, rel=5 / math.sqrt(2 * 4000))


# ---------------------------------------------------------------- pairs and forces (5.3, 3 and 5)


def test_all_pairs_once_within_structures() -> None:
    graph = batch_graphs([molecule(n) for n in (4, 1, 9)])
    pairs = all_pairs(graph)
    assert pairs.shape == (2, 6 + 0 + 36)
    assert bool((pairs[0] < pairs[1]).all())
    assert torch.equal(graph.batch[pairs[0]], graph.batch[pairs[1]])
    assert len({tuple(p) for p in pairs.T.tolist()}) == 42
    apart = molecule(4)._replace(pos=100 * normal(4, 3))
    assert all_pairs(apart).shape == (2, 6)
    with pytest.raises(UnsupportedInputError, match="periodic"):
        all_pairs(crystal([6, 1], CUTOFF))


def test_forces_from_distances_are_the_chain_rule() -> None:
    graph = molecule(6)
    pairs = all_pairs(graph)
    pos = graph.pos.clone().requires_grad_(True)
    weight = normal(15, seed=4)
    value = (weight * distances(pos, pairs).square().sin()).sum()
    (wanted,) = torch.autograd.grad(value, pos)
    d = distances(graph.pos, pairs)
    forces = pair_forces(weight * 2 * d * d.square().cos(), graph.pos, pairs)
    torch.testing.assert_close(forces, wanted)
    free = pair_forces(normal(15, seed=5), graph.pos, pairs)
    assert float(free.sum(0).abs().max()) < 1e-13
    assert float(torch.linalg.cross(graph.pos, free).sum(0).abs().max()) < 1e-12


# ---------------------------------------------------------------- symmetry, batches (5.3, 4 and 8)


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_each_view_may_turn_by_itself(mirror: float) -> None:
    objective, first, second = make(), molecule(9), molecule(9, seed=2)
    pairs, level, xi = all_pairs(first), torch.tensor([0.3], dtype=torch.float64), normal(36)

    def turned(graph: Graph, seed: int, sign: float) -> Graph:
        return graph._replace(pos=sign * graph.pos @ random_rotation(seeded(seed)).T + seed)

    plain = objective.direction(
        objective.score_clean, first, second, pairs, level.unsqueeze(1), xi.unsqueeze(1)
    )
    moved = objective.direction(
        objective.score_clean,
        turned(first, 3, mirror),
        turned(second, 4, -mirror),
        pairs,
        level.unsqueeze(1),
        xi.unsqueeze(1),
    )
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=0)


def test_the_order_of_atoms_changes_nothing() -> None:
    objective, first, second = make(), molecule(9), molecule(9, seed=2)
    order = torch.randperm(9, generator=seeded(4))
    pairs, level, xi = all_pairs(first), torch.tensor([0.3], dtype=torch.float64), normal(36)
    number = {tuple(pair): k for k, pair in enumerate(pairs.T.tolist())}
    moved = [number[min(a, b), max(a, b)] for a, b in order[pairs].T.tolist()]

    def shuffled(graph: Graph) -> Graph:
        return build_graph(graph.z[order], graph.pos[order], CUTOFF)

    plain = objective.direction(
        objective.score_clean, first, second, pairs, level.unsqueeze(1), xi.unsqueeze(1)
    )
    other = objective.direction(
        objective.score_clean,
        shuffled(first),
        shuffled(second),
        pairs,
        level.unsqueeze(1),
        xi[moved].unsqueeze(1),
    )
    torch.testing.assert_close(other, plain, rtol=1e-10, atol=0)


def test_swapping_views_and_heads_changes_nothing() -> None:
    objective, first, second = make(), molecule(9), molecule(9, seed=2)
    pairs, levels, xi = all_pairs(first), torch.tensor([[0.3], [2.0]], dtype=torch.float64), normal(36, 2)

    def total(heads: list[nn.Module], views: list[Graph], draws: list[int]) -> Tensor:
        return sum(
            objective.direction(
                heads[i], views[1 - i], views[i], pairs, levels[draws[i]].unsqueeze(1), xi[:, draws[i], None]
            )
            for i in range(2)
        )

    heads = [objective.score_clean, objective.score_noisy]
    torch.testing.assert_close(
        total(heads, [first, second], [0, 1]), total(heads[::-1], [second, first], [1, 0])
    )


def test_the_loss_of_a_structure_does_not_depend_on_its_batch() -> None:
    objective, graphs = make(), [molecule(5), molecule(9)]
    alone = [
        objective(Sample(g, {}, {"index": torch.tensor([i])}), seeded())["loss"].detach()
        for i, g in enumerate(graphs)
    ]
    both = objective(Sample(batch_graphs(graphs), {}, {"index": torch.tensor([0, 1])}), seeded())["loss"]
    torch.testing.assert_close(both.detach(), (alone[0] + alone[1]) / 2)


def test_the_loss_falls_on_a_fixed_batch() -> None:
    objective, graph = make(sigma_max=1.0), batch_graphs([molecule(5), molecule(9)])
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective(graph, seeded())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------- leaving atoms out


def bonded(graph: Graph) -> list[list[int]]:
    return neighbour_lists(len(graph.z), find_bonds(graph.z.numpy(), graph.pos.numpy()))


def connected(graph: Graph, chosen: Tensor) -> bool:
    """Whether every two chosen atoms are joined by bonds between chosen atoms: powers of a matrix."""
    n = len(graph.z)
    adjacent = torch.eye(n)
    for atom, others in enumerate(bonded(graph)):
        adjacent[atom, others] = 1
    adjacent = adjacent[chosen][:, chosen]
    return bool((torch.linalg.matrix_power(adjacent.double(), n) > 0).all())


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_a_part_is_connected_and_of_the_size_asked_for(ratio: float) -> None:
    graphs = [graph_from_atoms(named_molecule(n), CUTOFF) for n in ("trans-butane", "C5H5N", "CH4", "H2O")]
    graph, starts = batch_graphs(graphs), set()
    for seed in range(12):
        draws = [torch.rand(len(g.z), generator=seeded(seed), dtype=torch.float64) for g in graphs]
        chosen = connected_part(graph, 1 - ratio, draws, [bonded(g) for g in graphs])
        for g, part in zip(graphs, chosen.split([14, 11, 5, 3]), strict=True):
            assert int(part.sum()) == max(2, round((1 - ratio) * len(g.z)))
            assert connected(g, part)
        starts.add(tuple(chosen[:14].tolist()))
    assert len(starts) > 3
    again = connected_part(graph, 1 - ratio, draws, [bonded(g) for g in graphs])
    assert torch.equal(again, chosen)


def test_a_part_goes_on_in_the_nearest_fragment() -> None:
    water = graph_from_atoms(named_molecule("H2O"), 20.0)
    pos = torch.cat([water.pos, water.pos + 4.0, water.pos + 9.0])
    graph = build_graph(water.z.repeat(3), pos, 20.0)
    draw, lists = torch.arange(9, dtype=torch.float64), [bonded(graph)]
    chosen = connected_part(graph, 5 / 9, [draw], lists)
    assert chosen.nonzero().flatten().tolist()[:3] == [0, 1, 2]
    assert int(chosen[3:6].sum()) == 2
    assert bool(connected_part(graph, 1.0, [draw], lists).all())
    alone = graph_from_atoms(named_molecule("H2O")[:1], CUTOFF)
    assert connected_part(alone, 0.5, [draw[:1]], [[[]]]).tolist() == [True]


def test_the_graph_of_a_part_is_that_of_its_atoms() -> None:
    graphs = [molecule(7), molecule(9, seed=2)]
    graph = batch_graphs(graphs)
    chosen = torch.rand(16, generator=seeded()) < 0.6
    wanted = batch_graphs(
        [build_graph(g.z[c], g.pos[c], CUTOFF) for g, c in zip(graphs, chosen.split([7, 9]), strict=True)]
    )
    for got, want in zip(part_of(graph, chosen)[:6], wanted[:6], strict=True):
        assert torch.equal(got, want)


def test_both_views_leave_out_the_same_atoms() -> None:
    graph = batch_graphs([graph_from_atoms(named_molecule(n), CUTOFF) for n in ("trans-butane", "C5H5N")])
    objective, seen = make(mask_ratio=0.3, view_sigma=1e-6), []
    objective.network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = objective(graph, seeded())
    first, second = seen
    assert torch.bincount(first.batch).tolist() == [10, 8]
    assert torch.equal(first.z, second.z)
    assert float((first.pos - second.pos).abs().max()) < 1e-5
    assert float(terms["zero"]) == pytest.approx((45 + 28) / 4)
    # what is left out follows from the structure's index, not from its batch
    alone = objective(Sample(graph, {}, {"index": torch.tensor([4, 9])}), seeded())["loss"].detach()
    parts = [
        objective(
            Sample(graph_from_atoms(named_molecule(n), CUTOFF), {}, {"index": torch.tensor([i])}), seeded()
        )
        for n, i in (("trans-butane", 4), ("C5H5N", 9))
    ]
    torch.testing.assert_close(alone, sum(p["loss"].detach() for p in parts) / 2)


# ---------------------------------------------------------------- as a potential


def test_the_field_has_the_symmetries_of_forces_and_no_energy() -> None:
    field, graph = make().potential(kT=0.02, sigma=0.4), batch_graphs([molecule(5), molecule(9)])
    out = field(graph)
    assert set(out) == {"forces"}
    assert field.conservative is False
    check_rotation(field, graph)
    check_reflection(field, graph)
    check_translation(field, graph)
    check_permutation(field, graph)
    check_batching(field, [molecule(5), molecule(9)])
    objective, pairs = make(), all_pairs(graph)
    score = objective.score_clean(
        distances(graph.pos, pairs), objective.network.backbone(graph).scalars, pairs
    ).detach()
    torch.testing.assert_close(out["forces"], (0.02 / 0.4) * pair_forces(score, graph.pos, pairs))
    default = objective.potential(kT=0.02)(graph)["forces"]
    torch.testing.assert_close(default, out["forces"] * 0.4 / (0.3 * math.sqrt(2)))
    with pytest.raises(ConfigError, match="no stress"):
        field(graph, stress=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view_sigma": 0.0}, "view_sigma=0.0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"levels": 0}, "noise levels"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"mask_ratio": -0.1}, "mask_ratio=-0.1"),
        ({"sigma_min": 20.0}, "noise levels"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)
