"""GeoRecon: invariance of the graph-level vector, shared noise, losses in closed form, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, batch_graphs, build_graph
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.georecon import GeoRecon
from ffpretrain.testing import random_molecule, random_rotation, randomize

CUTOFF = 5.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**options: object) -> GeoRecon:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=2, heads=2, rbf=8, cutoff=CUTOFF).double()
        objective = create_objective("georecon", backbone=backbone, **options)
    randomize(objective)
    assert isinstance(objective, GeoRecon)
    return objective


def batch() -> Graph:
    generator = seeded(1)
    return batch_graphs([random_molecule([6, 1, 8, 7], n, CUTOFF, generator) for n in (5, 9)])


def turned(graph: Graph, seed: int, mirror: float = 1.0) -> Graph:
    rotation = mirror * random_rotation(seeded(seed))
    return graph._replace(pos=graph.pos @ rotation.T + seed)


def seen_by(objective: GeoRecon, graph: Graph) -> list[Graph]:
    seen: list[Graph] = []
    hook = objective.network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective(graph, seeded())
    hook.remove()
    return seen


def test_the_graph_level_vector_is_invariant() -> None:
    objective, graph = make(), batch()
    plain = objective.embedding(objective.network.backbone(graph), graph)
    assert plain.shape == (2, 16)
    for mirror in (1.0, -1.0):
        other = turned(graph, 3, mirror)
        moved = objective.embedding(objective.network.backbone(other), other)
        torch.testing.assert_close(moved, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_the_clean_and_the_noisy_copy_may_turn_independently(mirror: float) -> None:
    objective, graph = make(), batch()
    noise = 0.04 * torch.randn(14, 3, generator=seeded(), dtype=torch.float64)
    rotation = mirror * random_rotation(seeded(4))
    backbone = objective.network.backbone
    plain = objective.reconstruct(backbone(graph), backbone(objective.moved(graph, noise)), graph)
    noisy = objective.moved(graph, noise)
    noisy = noisy._replace(pos=noisy.pos @ rotation.T)
    other = objective.reconstruct(backbone(turned(graph, 5)), backbone(noisy), graph)
    torch.testing.assert_close(other, plain @ rotation.T, rtol=0, atol=1e-10)


def test_one_draw_of_noise_makes_all_inputs() -> None:
    graph = batch()
    clean, noisy = seen_by(make(), graph)
    assert torch.equal(clean.pos, graph.pos)
    assert not torch.equal(noisy.pos, graph.pos)
    _, same, wide = seen_by(make(noise_scale_factor=1.5), graph)
    assert torch.equal(same.pos, noisy.pos)
    torch.testing.assert_close(wide.pos - graph.pos, 1.5 * (same.pos - graph.pos), rtol=0, atol=1e-14)


class Zero(nn.Module):
    def forward(self, *inputs: object) -> Tensor:
        return torch.zeros(1, 3, dtype=torch.float64)


class Empty(nn.Module):
    dtype, cutoff = torch.float64, CUTOFF

    def forward(self, graph: Graph) -> Graph:
        return graph


@pytest.mark.parametrize(("factor", "total"), [(1.0, 7.2e-3), (1.5, 1.02e-2)])
@pytest.mark.parametrize("normalize", [False, True])
def test_predicting_nothing_costs_what_the_noise_holds(factor: float, total: float, normalize: bool) -> None:
    objective = make(noise_scale_factor=factor, normalize=normalize, rebuild_edges=False)
    objective.network.backbone = Empty()  # type: ignore[assignment]
    objective.noise_head = objective.decoder = Zero()  # type: ignore[assignment]
    objective.reconstruct = lambda *_: torch.zeros(1, 3, dtype=torch.float64)  # type: ignore[method-assign]
    graph = batch_graphs([batch()] * 300)
    terms = {key: float(value) for key, value in objective(graph, seeded()).items()}
    unit = 0.04**2 if normalize else 1.0
    error = 5 * math.sqrt(2 / (3 * len(graph.z)))
    assert terms["denoise"] * unit == pytest.approx(4.8e-3, rel=error)
    assert terms["rec"] * unit == pytest.approx(4.8e-3 * factor**2, rel=error)
    assert terms["clean"] == 0
    assert terms["loss"] * unit == pytest.approx(total, rel=error)


def gradient(value: Tensor, module: nn.Module) -> float:
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True)
    return sum(float(g.abs().sum()) for g in found if g is not None)


def test_a_head_that_starts_at_zero_has_no_clean_loss_and_sends_no_gradient() -> None:
    objective = make()
    for parameter in (objective.noise_head.second.out.weight, objective.noise_head.second.out.bias):
        nn.init.zeros_(parameter)
    terms = objective(batch(), seeded())
    assert float(terms["clean"].detach()) == 0
    assert gradient(terms["clean"], objective.network.backbone) == 0
    assert float(make()(batch(), seeded())["clean"].detach()) > 0


def test_the_graph_level_vector_is_trained() -> None:
    objective, graph = make(), batch()
    backbone = objective.network.backbone
    clean = backbone(graph)
    # only the clean pass has a gradient
    noisy = backbone(turned(graph, 1))
    noisy = type(noisy)(noisy.scalars.detach(), noisy.vectors.detach())
    loss = objective.reconstruct(clean, noisy, graph).square().sum()
    assert gradient(loss, backbone) > 0
    with torch.no_grad():
        objective.decoder.join.weight[:, :16] = 0
    loss = objective.reconstruct(clean, noisy, graph).square().sum()
    assert gradient(loss, backbone) == 0


class Slope(nn.Module):
    """``k (x - x0)`` in Å; the features are the graph itself."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0
        self.slope = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, graph: Graph) -> Tensor:
        return self.slope * (graph.pos.view(-1, *self.x0.shape) - self.x0).reshape(-1, 3)


@pytest.mark.parametrize(("clean_weight", "wanted"), [(0.0, 1 / 2), (10.0, 1 / 12), (1.0, 1 / 3)])
def test_the_clean_term_flattens_the_denoiser(clean_weight: float, wanted: float) -> None:
    # slope sigma^2 / (s^2 + sigma^2 + w s^2), here with s = sigma
    sigma, n = 0.1, 3000
    x0 = random_molecule([6, 1], 4, CUTOFF, seeded()).pos
    one = build_graph(torch.tensor([6, 1, 6, 1]), x0, CUTOFF)
    graph = batch_graphs([one] * n)
    thermal = sigma * torch.randn(4 * n, 3, generator=seeded(1), dtype=torch.float64)
    graph = graph._replace(pos=graph.pos + thermal)
    objective = make(
        sigma=sigma, clean_weight=clean_weight, rec_weight=0.0, normalize=False, rebuild_edges=False
    )
    head = Slope(x0)
    objective.network.backbone = Empty()  # type: ignore[assignment]
    objective.noise_head = head  # type: ignore[assignment]
    objective.reconstruct = lambda *_: torch.zeros(1, 3, dtype=torch.float64)  # type: ignore[method-assign]
    # quadratic in the slope: its derivative at 0 and at 1 gives the minimum
    ends = []
    for value in (0.0, 1.0):
        with torch.no_grad():
            head.slope.fill_(value)
        (found,) = torch.autograd.grad(objective(graph, seeded(2))["loss"], head.slope)
        ends.append(float(found))
    assert ends[0] / (ends[0] - ends[1]) == pytest.approx(wanted, abs=5 / math.sqrt(12 * n))


def test_the_loss_falls_on_a_fixed_batch() -> None:
    objective, graph = make(decoder_layers=2), batch()
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(graph, seeded())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_the_field_is_that_of_the_denoising_head() -> None:
    graph = batch()
    for normalize, unit in ((True, 0.04), (False, 1.0)):
        objective = make(normalize=normalize).eval()
        noise = objective.noise_head(objective.network.backbone(graph)).detach() * unit
        forces = objective.potential(kT=0.02)(graph)["forces"]
        torch.testing.assert_close(forces, -(0.02 / 0.04**2) * noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"noise_scale_factor": -1.0}, "noise_scale_factor=-1.0"),
        ({"decoder_layers": 0}, "decoder_layers=0"),
        ({"decoder": "mlp"}, "unknown decoder 'mlp'; known: gated, message-passing"),
        ({"clean_weight": -1.0}, "not negative"),
        ({"clean_weight": math.nan}, "not negative"),
        ({"denoise_weight": 0, "rec_weight": 0, "clean_weight": 0}, "nor all zero"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


# ---------------------------------------------------------------- the message-passing decoder


@pytest.mark.parametrize("kind", ["painn", "torchmd-et"])
def test_the_message_passing_decoder_is_equivariant_and_sees_neighbours(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone(kind, hidden=16, layers=1, cutoff=2.5).double()
        objective = create_objective(
            "georecon", backbone=backbone, decoder="message-passing", decoder_layers=2
        )
    randomize(objective)
    graph, rotation = random_molecule([6, 1, 8], 9, 2.5, seeded(1)), random_rotation(seeded(4))
    features, layers = objective.network.backbone, objective.decoder.layers
    clean, noisy = features(graph), features(graph)
    plain = objective.reconstruct(clean, noisy, graph)
    moved = graph._replace(pos=graph.pos @ rotation.T + 1.0)
    torch.testing.assert_close(
        objective.reconstruct(clean, features(moved), moved), plain @ rotation.T, rtol=0, atol=1e-10
    )
    # its layers are its own, and carry what one atom's features say to the others
    assert len(layers.layers) == 2
    assert not {id(p) for p in layers.parameters()} & {id(p) for p in features.parameters()}
    scalars = noisy.scalars.clone()
    scalars[0] += 1.0
    change = (objective.reconstruct(clean, type(noisy)(scalars, noisy.vectors), graph) - plain).norm(dim=1)
    near = graph.edge_index[0][graph.edge_index[1] == 0]
    assert len(near)
    assert bool((change[near] > 1e-6).all())
    gated = make(decoder_layers=2)
    clean = gated.network.backbone(graph)
    plain = gated.reconstruct(clean, noisy, graph)
    change = gated.reconstruct(clean, type(noisy)(scalars, noisy.vectors), graph) - plain
    assert not bool(change[1:].any())


def test_the_loss_of_either_decoder_falls_on_a_fixed_batch() -> None:
    objective, graph = make(decoder_layers=1, decoder="message-passing", clean_weight=1.0), batch()
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        terms = objective(graph, seeded())
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["rec"].detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert all(bool(p.grad.any()) for p in objective.decoder.join.parameters())


def test_references_are_those_of_the_weights() -> None:
    graph = batch()
    for options, zero in (
        ({}, 4.5),
        ({"noise_scale_factor": 2.0, "rec_weight": 0.25, "denoise_weight": 2.0}, 9.0),
        ({"normalize": False}, 4.5 * 0.04**2),
    ):
        terms = make(**options)(graph, seeded())
        assert float(terms["zero"]) == pytest.approx(zero)
        assert float(terms["floor"]) == pytest.approx(zero * 12 / (3 * 14))
    assert make().unit_of("loss") == "1"
    assert make(normalize=False).unit_of("loss") == "angstrom^2"
