"""SchNet is the function that PyTorch Geometric's is, and scalar features serve what they can."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffpretrain import testing, units
from ffpretrain.artifacts import load_potential, make_card, save_potential
from ffpretrain.backbones import Features, create_backbone
from ffpretrain.backbones.schnet import SchNet, ShiftedSoftplusHead, from_pyg, shifted_softplus
from ffpretrain.compiled import CompiledForces
from ffpretrain.errors import ArtifactError, ConfigError, DataError
from ffpretrain.graphs import Graph, Sample, batch_graphs
from ffpretrain.objectives import create_objective
from ffpretrain.testing import random_molecule

CUTOFF = 4.0


def graphs(cutoff: float = CUTOFF) -> Graph:
    """Two molecules, one of them larger than the cutoff."""
    generator = torch.Generator().manual_seed(0)
    small, large = (random_molecule([6, 1, 8, 7], n, cutoff, generator) for n in (4, 9))
    return batch_graphs([small, testing.structures.stretched(large, cutoff)])


class Theirs:
    """PyTorch Geometric's model, which is given edges: its own search needs a package that is absent."""

    def __init__(self, graph: Graph, **options: Any) -> None:
        from torch_geometric.nn.models import SchNet as PyGSchNet

        def edges(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
            row, col = graph.edge_index
            return graph.edge_index, (pos[row] - pos[col]).norm(dim=-1)

        sizes = {"hidden_channels": 12, "num_filters": 10, "num_interactions": 3, "num_gaussians": 8}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = PyGSchNet(**{**sizes, "cutoff": CUTOFF, "interaction_graph": edges, **options})
        self.model.double()
        testing.randomize(self.model)
        self.graph = graph

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return energies ``[B]`` and forces ``[N, 3]``."""
        pos = self.graph.pos.clone().requires_grad_(True)
        energy = self.model(self.graph.z, pos, self.graph.batch).squeeze(-1)
        (gradient,) = torch.autograd.grad(energy.sum(), pos)
        return energy.detach(), -gradient


def agree(got: Tensor, want: Tensor, rtol: float = 1e-10) -> bool:
    return bool((got - want).abs().max() <= rtol * want.abs().max())


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_interactions": 1, "num_gaussians": 20},
        {"mean": -3.5, "std": 2.25},
        {"atomref": torch.linspace(-200.0, 0.0, 100, dtype=torch.float64).view(-1, 1)},
        {"mean": 1.5, "std": 0.5, "atomref": torch.linspace(-20.0, 0.0, 100).view(-1, 1)},
    ],
)
def test_energies_and_forces_are_those_of_pytorch_geometric(options: dict[str, Any]) -> None:
    theirs = Theirs(graphs(), **options)
    potential = from_pyg(theirs.model)
    assert potential.dtype == torch.float64 and not potential.training
    energy, forces = theirs()
    out = potential(theirs.graph)
    assert float(forces.abs().max()) > 1e-3
    assert agree(out["energy"], energy)
    assert agree(out["forces"], forces)


def test_every_weight_of_theirs_is_read() -> None:
    theirs = Theirs(graphs())
    before = from_pyg(theirs.model)(theirs.graph)["energy"]
    generator = torch.Generator().manual_seed(1)
    for name, weight in theirs.model.named_parameters():
        if ".conv.nn." in name:  # the same weights as .mlp., under another name
            continue
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        energy, _ = theirs()
        assert agree(from_pyg(theirs.model)(theirs.graph)["energy"], energy), name
        assert not agree(energy, before, rtol=1e-9), name
        with torch.no_grad():
            weight.copy_(kept)


def test_units_and_elements() -> None:
    """Weights of a program that works in nm and kcal/mol: same structure, numbers in other units."""
    theirs = Theirs(graphs(), mean=1.5, std=0.5)
    plain = from_pyg(theirs.model)
    theirs.model.scale = 3.0
    other = from_pyg(theirs.model, energy_unit="kcal/mol", length_unit="nm", elements=[1, 6, 7, 8])
    assert other.cutoff == pytest.approx(10 * CUTOFF) and other.elements == [1, 6, 7, 8]
    graph = theirs.graph
    far = graph._replace(pos=10 * graph.pos)
    energy, forces = (plain(graph)[key] * 3 * units.KCAL_PER_MOL for key in ("energy", "forces"))
    out = other(far)
    assert agree(out["energy"], energy) and agree(out["forces"], forces / 10)
    with pytest.raises(DataError, match="unknown energy unit 'kcals'"):
        from_pyg(theirs.model, energy_unit="kcals")


def test_what_is_no_sum_of_energies_is_refused() -> None:
    for options in ({"dipole": True}, {"readout": "mean"}):
        with pytest.raises(ArtifactError, match="predicts a dipole or a mean"):
            from_pyg(Theirs(graphs(), **options).model)
    with pytest.raises(ArtifactError, match="a Linear is not PyTorch Geometric's SchNet"):
        from_pyg(nn.Linear(2, 2))


def test_a_file_keeps_what_was_read(tmp_path: Path) -> None:
    theirs = Theirs(graphs(), mean=-3.5, std=2.25)
    potential = from_pyg(theirs.model)
    save_potential(potential, tmp_path / "m.safetensors", make_card(potential, "m"))
    again = load_potential(tmp_path / "m.safetensors")
    assert isinstance(again.head, ShiftedSoftplusHead)
    assert torch.equal(again(theirs.graph)["forces"], potential(theirs.graph)["forces"])


def test_shifted_softplus_in_closed_form() -> None:
    x = torch.linspace(-15.0, 15.0, 61, dtype=torch.float64)
    expected = [math.log(0.5 * math.exp(v) + 0.5) for v in x.tolist()]
    torch.testing.assert_close(shifted_softplus(x), torch.tensor(expected, dtype=torch.float64))
    assert float(shifted_softplus(torch.zeros(()))) == pytest.approx(0.0, abs=1e-7)


# ---------------------------------------------------------------- training


def build() -> SchNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("schnet", hidden=8, layers=2, filters=8, rbf=8, cutoff=CUTOFF).double()
    assert isinstance(backbone, SchNet)
    return backbone


def test_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces and the gradients that training takes of them, traced to plain operations: no compiler runs."""
    monkeypatch.setattr(torch, "compile", lambda traced, **options: traced)
    potential = testing.potential_of(build()).train()
    function = CompiledForces(potential)
    generator = torch.Generator().manual_seed(0)
    function(batch_graphs([random_molecule([6, 1, 8], 5, CUTOFF, generator) for _ in range(2)]))
    assert function.agreement[2, 5] < 1e-12
    assert function.gradient_agreement[2, 5] < 1e-12


def test_input_vectors_are_refused() -> None:
    graph, backbone = graphs(), build()
    n = len(graph.z)
    with pytest.raises(ConfigError, match="takes no vectors as extra input; give scalars only"):
        backbone(graph, Features(torch.zeros(n, 8), torch.zeros(n, 3, 8)))
    with pytest.raises(ConfigError, match="cannot take vectors as input"):
        backbone.accept_vectors()
    with pytest.raises(ConfigError, match="reads no vector features"):
        ShiftedSoftplusHead(8, has_vectors=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("3d-emgp", {}), ("se3-ddm", {}), ("coord", {"head": "energy-gradient"}), ("supervised", {})],
)
def test_objectives_that_scalars_serve(name: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    graph = graphs()
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    sample = Sample(graph, {"energy": draw(2), "forces": draw(13, 3)}, {"index": torch.tensor([0, 1])})
    objective = create_objective(name, backbone=build(), **options)
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = objective(sample, torch.Generator().manual_seed(1))["loss"]
        loss.backward()
        gradients = [p.grad for p in objective.network.backbone.parameters() if p.grad is not None]
        assert all(bool(torch.isfinite(g).all()) for g in gradients)
        assert sum(float(g.abs().sum()) for g in gradients) > 0
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [("coord", {"head": "vector"}), ("georecon", {}), ("denoisevae", {}), ("ndem", {})],
)
def test_direct_vectors_are_refused_with_the_reason(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"needs (a backbone with )?vector features") as error:
        create_objective(name, backbone=build(), **options)
    assert "\n" not in str(error.value)
