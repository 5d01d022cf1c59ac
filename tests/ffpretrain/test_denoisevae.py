"""DenoiseVAE: the KL in closed form, both forms of the loss, its optimum, symmetry, gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ffpretrain.artifacts import load_potential, make_card, save_potential
from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, Sample, batch_graphs
from ffpretrain.noise import gaussian_noise
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.denoisevae import (
    DenoiseVAE,
    correlation_matrix,
    covariance_divergence,
    denoising_term,
    kl_divergence,
)
from ffpretrain.objectives.fields import DenoisingField
from ffpretrain.objectives.noise_generator import FieldWithNoise
from ffpretrain.testing import (
    check_permutation,
    check_reflection,
    check_rotation,
    check_translation,
    random_molecule,
    random_rotation,
    randomize,
)

CUTOFF = 5.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def fresh(**options: object) -> DenoiseVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=2, heads=2, rbf=8, cutoff=CUTOFF).double()
        objective = create_objective("denoisevae", backbone=backbone, generator_layers=1, **options)
    assert isinstance(objective, DenoiseVAE)
    return objective


def make(**options: object) -> DenoiseVAE:
    objective = fresh(**options)
    randomize(objective, size=0.05)
    return objective


def graph() -> Graph:
    generator = seeded(1)
    return batch_graphs([random_molecule([6, 1, 8, 7], n, CUTOFF, generator) for n in (5, 9)])


# ---------------------------------------------------------------- the KL (METHODS 3.5.1, 3.5.6)


@pytest.mark.parametrize(
    ("sigma", "one", "three"),
    [
        (0.1, 0.0, 0.0),
        (0.05, 0.318147, 0.954442),
        (0.2, 0.806853, 2.420558),
        (0.4, 6.113706, 18.341117),
        (0.01, 1.807585, 5.422755),
    ],
)
def test_values_of_the_divergence(sigma: float, one: float, three: float) -> None:
    value = torch.tensor([sigma], dtype=torch.float64)
    assert float(kl_divergence(value, 0.1, 1)) == pytest.approx(one, abs=1e-6)
    assert float(kl_divergence(value, 0.1, 3)) == pytest.approx(three, abs=1e-6)


def test_the_divergence_is_smallest_at_the_prior() -> None:
    sigma = torch.tensor([0.1, 0.05, 0.3], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kl_divergence(sigma, 0.1, 1).sum(), sigma)
    torch.testing.assert_close(slope, (-1 / sigma + sigma / 0.01).detach(), rtol=1e-12, atol=1e-12)
    assert abs(float(slope[0])) < 1e-12


@pytest.mark.parametrize("dims", [1, 3])
def test_a_diagonal_covariance_has_the_sum_of_the_divergences(dims: int) -> None:
    sigma = torch.tensor([0.05, 0.2, 0.13], dtype=torch.float64)
    full = covariance_divergence(torch.diag(sigma.square()), 0.1, dims)
    torch.testing.assert_close(full, kl_divergence(sigma, 0.1, dims).sum())


def test_the_divergence_of_a_covariance_is_that_of_torch() -> None:
    root = torch.tril(normal(4, 4)) + 2 * torch.eye(4, dtype=torch.float64)
    covariance = 0.01 * root @ root.T
    zero = torch.zeros(4, dtype=torch.float64)
    one, prior = (
        torch.distributions.MultivariateNormal(zero, matrix)
        for matrix in (covariance, 0.3**2 * torch.eye(4, dtype=torch.float64))
    )
    wanted = torch.distributions.kl_divergence(one, prior)
    torch.testing.assert_close(covariance_divergence(covariance, 0.3, 1), wanted)
    torch.testing.assert_close(covariance_divergence(covariance, 0.3), 3 * wanted)


# ---------------------------------------------------------------- atoms that move together (appendix A.13)


def test_a_full_covariance_by_hand() -> None:
    objective, clean = make(covariance="full", rank=2, kl_weight=0.7), graph()
    sigma, vectors = (part.detach() for part in objective.noise_generator.correlated(clean))
    assert vectors.shape == (14, 2)
    kl = []
    for part in (slice(0, 5), slice(5, 14)):
        u, level = vectors[part], sigma[part]
        shared = torch.eye(len(u), dtype=torch.float64) + u @ u.T
        size = shared.diagonal().sqrt()
        matrix = torch.diag(level / size) @ shared @ torch.diag(level / size)
        torch.testing.assert_close(matrix.diagonal(), level.square())
        kl.append(1.5 * (matrix.trace() / 0.01 - len(u) + len(u) * math.log(0.01) - matrix.logdet()) / len(u))
    terms = {key: value.detach() for key, value in objective(clean, seeded()).items()}
    torch.testing.assert_close(terms["kl"], (kl[0] + kl[1]) / 2)
    torch.testing.assert_close(terms["loss"], terms["denoise"] + 0.7 * terms["kl"])
    assert float(terms["zero"]) == 21.0
    assert "floor" not in terms
    mean = make(covariance="full", rank=2, reduction="mean")(clean, seeded())
    torch.testing.assert_close(mean["kl"].detach(), (5 * kl[0] + 9 * kl[1]) / 14)


def test_draws_have_the_correlation_that_the_divergence_is_of() -> None:
    objective, n = make(covariance="full", rank=2), 4000
    clean, vectors = batch_graphs([graph()] * n), normal(14, 2, seed=5)
    unit, shared = normal(14 * n, 3), normal(2 * 2 * n, 3, seed=1)
    drawn = objective.correlated(unit, vectors.repeat(n, 1), shared, clean).view(n, 14, 3)
    found = torch.einsum("nid,njd->ij", drawn, drawn) / (3 * n)
    wanted = torch.zeros(14, 14, dtype=torch.float64)
    for part in (slice(0, 5), slice(5, 14)):  # structures do not move with each other
        wanted[part, part] = correlation_matrix(vectors[part])
    assert float((found - wanted).abs().max()) < 6 / math.sqrt(3 * n)
    assert float(wanted[0, 1].abs()) > 0.1


def test_without_correlation_it_is_the_independent_one() -> None:
    full, plain, clean = make(covariance="full"), make(), graph()
    plain.load_state_dict(full.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in full.noise_generator.correlation.parameters():
            parameter.zero_()
    one, other = (o(clean, seeded()) for o in (full, plain))
    for key in ("loss", "denoise", "kl", "sigma"):
        torch.testing.assert_close(one[key].detach(), other[key].detach())


def test_a_full_covariance_is_learned_and_keeps_the_symmetry() -> None:
    objective, clean = make(covariance="full"), graph()
    terms = objective(clean, seeded())
    terms["denoise"].backward(retain_graph=True)
    correlation = objective.noise_generator.correlation
    assert bool(correlation.weight.grad.any())
    correlation.zero_grad()
    terms["kl"].backward()
    assert bool(correlation.weight.grad.any())

    def model(g: Graph) -> dict[str, Tensor]:
        return {"vectors": objective.noise_generator.correlated(g)[1][:, 0]}

    turned = clean._replace(pos=-clean.pos @ random_rotation(seeded(4)).T + 1.0)
    torch.testing.assert_close(model(turned)["vectors"], model(clean)["vectors"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["log-variance", "softplus"])
def test_either_form_of_sigma_starts_at_the_prior_and_stays_above_zero(form: str) -> None:
    start = fresh(sigma_form=form, prior_sigma=0.07).noise_generator(graph())
    torch.testing.assert_close(start, torch.full_like(start, 0.07), rtol=1e-6, atol=0)
    objective = fresh(sigma_form=form)
    randomize(objective, size=2.0)
    found = objective.noise_generator(graph()).detach()
    assert bool((found > 0).all()) and float(found.std()) > 0


# ---------------------------------------------------------------- the denoising term (3.5.2, 3, 5, 7)


def test_both_forms_of_the_loss() -> None:
    objective, clean = make(), graph()
    sigma = 0.02 + 0.2 * torch.rand(14, generator=seeded(), dtype=torch.float64)
    unit = normal(14, 3)
    error = objective.denoising_error(clean, sigma, unit)
    pos = clean.pos + sigma.unsqueeze(1) * unit
    score = objective.score(clean._replace(pos=pos))
    torch.testing.assert_close(error, denoising_term(score, unit, sigma))
    variance = sigma.square()
    as_written = variance * (score - (clean.pos - pos) / variance.unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(error, as_written, rtol=1e-10, atol=0)


class Scalar(nn.Module):
    """``-k x``, the linear score; the features are the graph itself."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, graph: Graph) -> Tensor:
        return -self.slope * graph.pos


class Passing(nn.Module):
    cutoff, dtype = CUTOFF, torch.float64

    def forward(self, graph: Graph) -> Graph:
        return graph


def toy(slope: float, n: int, s: float) -> tuple[DenoiseVAE, Graph]:
    """Return the objective with score ``-slope x`` and n atoms of one structure drawn from N(0, s^2)."""
    objective = fresh(prior_sigma=1.0, rebuild_edges=False)
    objective.network.backbone = Passing()  # type: ignore[assignment]
    objective.noise_head = Scalar(slope)  # type: ignore[assignment]
    empty = torch.zeros(0, 3, dtype=torch.float64)
    batch = torch.zeros(n, dtype=torch.long)
    cell = torch.zeros(1, 3, 3, dtype=torch.float64)
    z = torch.ones(n, dtype=torch.long)
    return objective, Graph(z, s * normal(n, 3, seed=3), empty.T[:2].long(), empty, batch, cell, 1)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.3])
def test_predicting_nothing_costs_three_an_atom_whatever_the_noise(sigma: float) -> None:
    objective, clean = toy(0.0, 4000, 0.1)
    error = objective.denoising_error(clean, torch.full((4000,), sigma, dtype=torch.float64), normal(4000, 3))
    assert float(error.mean()) == pytest.approx(3.0, rel=5 * math.sqrt(2 / 12000))


@pytest.mark.parametrize(("sigma", "least"), [(0.05, 0.80), (0.1, 0.50), (0.3, 0.10)])
def test_the_smallest_loss_falls_with_the_noise(sigma: float, least: float) -> None:
    s, n = 0.1, 4000
    # the best slope is 1 / (s^2 + sigma^2); the loss 1 / (1 + sigma^2 / s^2)
    assert 1 / (1 + sigma**2 / s**2) == pytest.approx(least, abs=1e-12)
    objective, clean = toy(1 / (s**2 + sigma**2), n, s)
    levels = torch.full((n,), sigma, dtype=torch.float64)
    at_best = float(objective.denoising_error(clean, levels, normal(n, 3)).mean()) / 3
    assert at_best == pytest.approx(least, rel=5 * math.sqrt(2 / (3 * n)))
    for factor in (0.9, 1.1):
        objective.noise_head = Scalar(factor / (s**2 + sigma**2))  # type: ignore[assignment]
        assert float(objective.denoising_error(clean, levels, normal(n, 3)).mean()) / 3 > at_best


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_a_trained_slope_is_the_best_one(sigma: float) -> None:
    # the loss is quadratic in the slope: its derivative at two slopes gives the minimum, one step of Newton
    s, n = 0.1, 4000
    objective, clean = toy(0.0, n, s)
    head = objective.noise_head
    head.slope = nn.Parameter(torch.zeros((), dtype=torch.float64))
    levels = torch.full((n,), sigma, dtype=torch.float64)
    ends = []
    for value in (0.0, 100.0):
        with torch.no_grad():
            head.slope.fill_(value)
        loss = objective.denoising_error(clean, levels, normal(n, 3)).mean() / 3
        ends.append(float(torch.autograd.grad(loss, head.slope)[0]))
    best = 100 * ends[0] / (ends[0] - ends[1])
    assert best == pytest.approx(1 / (s**2 + sigma**2), rel=5 * math.sqrt(2 / (3 * n)))
    with torch.no_grad():
        head.slope.fill_(best)
    least = float(objective.denoising_error(clean, levels, normal(n, 3)).mean().detach()) / 3
    assert least == pytest.approx(1 / (1 + sigma**2 / s**2), rel=5 * math.sqrt(2 / (3 * n)))


def test_the_gradient_to_sigma_is_that_of_the_reparametrised_loss() -> None:
    # L = (1 - k sigma^2)^2 + k^2 sigma^2 s^2, dL/dsigma = -4 k sigma (1 - k sigma^2) + 2 k^2 sigma s^2
    s, k, sigma, n = 0.1, 30.0, 0.12, 4000
    objective, clean = toy(k, n, s)
    # draws with exact second moments, so that the average is the expectation
    draws = torch.stack([clean.pos, normal(n, 3, seed=4)], -1).view(-1, 2)
    draws = draws - draws.mean(0)
    white = torch.linalg.inv(torch.linalg.cholesky(draws.T @ draws / len(draws)))
    x, unit = (draws @ white.T).view(n, 3, 2).unbind(-1)
    level = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    loss = objective.denoising_error(clean._replace(pos=s * x), level.expand(n), unit).mean() / 3
    (slope,) = torch.autograd.grad(loss, level)
    assert float(loss.detach()) == pytest.approx((1 - k * sigma**2) ** 2 + (k * sigma * s) ** 2, rel=1e-10)
    wanted = -4 * k * sigma * (1 - k * sigma**2) + 2 * k**2 * sigma * s**2
    assert float(slope) == pytest.approx(wanted, rel=1e-10)


def test_with_constant_noise_and_no_divergence_it_is_coordinate_denoising() -> None:
    objective, clean = fresh(kl_weight=0.0, reduction="mean", prior_sigma=0.04), graph()
    coord = create_objective("coord", potential=objective.network, sigma=0.04)
    # D = -eps_hat / sigma: the same network with the sign of its last layer turned
    coord.noise_head.load_state_dict(objective.noise_head.state_dict())
    with torch.no_grad():
        coord.noise_head.second.vec_proj.weight.neg_()
    mine, other = (float(o(clean, seeded())["loss"].detach()) for o in (objective, coord))
    # sigma starts as the exponential of a float32 number
    assert mine == pytest.approx(3 * other, rel=1e-6)


# ---------------------------------------------------------------- symmetry (3.5.4)


def test_sigma_is_invariant() -> None:
    objective = make()

    def model(g: Graph) -> dict[str, Tensor]:
        return {"energies": objective.noise_generator(g)}

    assert float(objective.noise_generator(graph()).detach().std()) > 1e-4
    check_rotation(model, graph())
    check_reflection(model, graph())
    check_translation(model, graph())
    check_permutation(model, graph())


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_the_loss_does_not_change_when_structure_and_noise_turn_together(mirror: float) -> None:
    objective, clean, unit = make(), graph(), normal(14, 3)
    rotation = mirror * random_rotation(seeded(2))
    turned = clean._replace(pos=clean.pos @ rotation.T + 1.0)
    errors = [
        objective.denoising_error(g, objective.noise_generator(g), u)
        for g, u in ((clean, unit), (turned, unit @ rotation.T))
    ]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- the objective


def test_it_starts_at_the_prior() -> None:
    terms = fresh()(graph(), seeded())
    assert abs(float(terms["kl"].detach())) < 1e-12
    assert float(terms["sigma"]) == pytest.approx(0.1)


@pytest.mark.parametrize("kl_dims", [1, 3])
def test_reductions_by_hand(kl_dims: int) -> None:
    clean = graph()
    paper, mean = (make(reduction=r, kl_dims=kl_dims, kl_weight=0.7) for r in ("paper", "mean"))
    sigma = paper.noise_generator(clean).detach()
    unit = gaussian_noise(clean.batch, 2, 1.0, seeded()).displacement
    error = paper.denoising_error(clean, sigma, unit).detach()
    kl = kl_divergence(sigma, 0.1, kl_dims)
    terms = {key: value.detach() for key, value in paper(clean, seeded()).items()}
    torch.testing.assert_close(terms["denoise"], error.sum() / 2)
    torch.testing.assert_close(terms["kl"], (kl[:5].mean() + kl[5:].mean()) / 2)
    torch.testing.assert_close(terms["loss"], terms["denoise"] + 0.7 * terms["kl"])
    terms = {key: value.detach() for key, value in mean(clean, seeded()).items()}
    torch.testing.assert_close(terms["denoise"], error.mean())
    torch.testing.assert_close(terms["kl"], kl.mean())


def test_both_networks_learn() -> None:
    objective, clean = make(), graph()
    objective(clean, seeded())["denoise"].backward()
    for module in (objective.noise_generator, objective.network.backbone, objective.noise_head):
        assert sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None) > 0
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(clean, seeded())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_of_a_structure_does_not_depend_on_its_batch() -> None:
    objective = make()
    graphs = [random_molecule([6, 1, 8], n, CUTOFF, seeded(n)) for n in (5, 9)]
    alone = [
        objective(Sample(g, {}, {"index": torch.tensor([i])}), seeded())["loss"].detach()
        for i, g in enumerate(graphs)
    ]
    both = objective(Sample(batch_graphs(graphs), {}, {"index": torch.tensor([0, 1])}), seeded())["loss"]
    torch.testing.assert_close(both.detach(), (alone[0] + alone[1]) / 2)


def test_the_field_is_the_temperature_times_the_score() -> None:
    objective, clean = make().eval(), graph()
    forces = objective.potential(kT=0.02)(clean)["forces"]
    torch.testing.assert_close(forces, 0.02 * objective.score(clean).detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_sigma": 0.0}, "prior_sigma=0.0"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
        ({"kl_dims": 2}, "kl_dims=2"),
        ({"reduction": "sum"}, "unknown reduction 'sum'"),
        ({"sigma_form": "exp"}, "unknown sigma_form 'exp'; known: log-variance, softplus"),
        ({"covariance": "diagonal"}, "unknown covariance 'diagonal'; known: independent, full"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fresh(**options)


# ---------------------------------------------------------------- the generator, kept or dropped


@pytest.mark.parametrize("options", [{}, {"covariance": "full", "rank": 3}, {"sigma_form": "softplus"}])
def test_the_generator_is_kept_in_the_file(options: dict[str, object], tmp_path: Path) -> None:
    objective, clean = make(**options), graph()
    wanted = objective.noise_generator(clean).detach()
    path = tmp_path / "m.safetensors"
    field = objective.potential()
    save_potential(field, path, make_card(field, "m"))
    kept = load_potential(path)
    assert isinstance(kept, FieldWithNoise)
    assert torch.equal(kept.noise_scale(clean), wanted)
    assert float(wanted.std()) > 1e-4
    draws = [kept.draw_noise(clean, seeded(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])
    assert torch.equal(draws[0], field.draw_noise(clean, seeded(3)))


@pytest.mark.parametrize("options", [{}, {"covariance": "full", "rank": 3}])
def test_draws_have_the_learned_size(options: dict[str, object]) -> None:
    field, clean = make(**options).potential(), graph()
    assert isinstance(field, FieldWithNoise)
    generator, sigma = seeded(5), field.noise_scale(clean)
    draws = torch.stack([field.draw_noise(clean, generator) for _ in range(2000)])
    # 6000 components an atom: their variance is known to 2 %
    torch.testing.assert_close(draws.square().mean((0, 2)).sqrt(), sigma, rtol=0.05, atol=0)


def test_the_generator_can_be_dropped(tmp_path: Path) -> None:
    field = make(keep_generator=False).potential()
    assert type(field) is DenoisingField
    assert make_card(field, "m").head.name == "vector"
    with_it = make().potential()
    torch.testing.assert_close(field(graph())["forces"], with_it(graph())["forces"])


def test_a_generator_refuses_elements_it_never_saw() -> None:
    objective = make()
    objective.network.known[8] = False
    field = objective.potential()
    assert isinstance(field, FieldWithNoise)
    for ask in (field.noise_scale, lambda g: field.draw_noise(g, seeded())):
        with pytest.raises(UnsupportedInputError, match="not trained on O"):
            ask(graph())
