"""Native messages against the plain network: values, forces, the gradient that training takes of them."""

from __future__ import annotations

import pytest
import torch

from ffpretrain.backbones import create_backbone
from ffpretrain.backbones.base import Features
from ffpretrain.backbones.torchmd_et import TorchMDET
from ffpretrain.graphs import Graph, batch_graphs
from ffpretrain.native import messages as native
from ffpretrain.native.build import NativeUnavailable, find_compiler
from ffpretrain.native.messages import Shape, messages
from ffpretrain.pairs import EdgeList, HalfPairs
from ffpretrain.testing.structures import crystal, random_molecule
from ffpretrain.testing.suite import potential_of, randomize

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

CUTOFF = 3.0
#: channels in a head: whole vectors of any machine, of four, and one by one
SIZES = {"vectors": (32, 2), "fours": (24, 2), "single": (18, 3)}


def molecules() -> Graph:
    generator = torch.Generator().manual_seed(1)
    return batch_graphs([random_molecule([8, 1, 6], n, CUTOFF, generator) for n in (7, 1, 4)])


def graphs() -> dict[str, Graph]:
    # the cell is shorter than the cutoff: atoms meet their own images, and pairs stand several times
    return {"molecules": molecules(), "crystal": crystal([8, 1], CUTOFF)}


def network(hidden: int, heads: int) -> TorchMDET:
    torch.manual_seed(0)
    backbone = TorchMDET(hidden=hidden, layers=3, heads=heads, rbf=8, cutoff=CUTOFF, max_z=10)
    randomize(backbone, seed=3)
    return backbone.double()


def trained(
    backbone: TorchMDET, graph: Graph, native_messages: bool, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Energies, forces, and the gradient of a loss of both, of a potential with this backbone."""
    potential = potential_of(backbone).train()
    potential.backbone.to(dtype)
    potential.head.to(dtype)
    potential.backbone.native_messages = False
    if native_messages:
        potential.backbone.use_native_messages()
    out = potential(graph)
    loss = out["energy"].square().sum() + (out["forces"].square().sum(-1) + 1.0).sqrt().sum()
    gradient = torch.autograd.grad(
        loss, list(potential.parameters()), allow_unused=True, materialize_grads=True
    )
    return out["energy"].detach(), out["forces"].detach(), torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("name", ["molecules", "crystal"])
@pytest.mark.parametrize("size", SIZES)
def test_energies_forces_and_gradients_are_those_of_the_plain_network(size: str, name: str) -> None:
    backbone, graph = network(*SIZES[size]), graphs()[name]
    assert name == "molecules" or bool((graph.edge_index[0] == graph.edge_index[1]).any())
    plain, fast = trained(backbone, graph, False), trained(backbone, graph, True)
    for expected, found in zip(plain, fast, strict=True):
        assert expected.abs().max() > 1e-3
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_float32_agrees_to_its_precision() -> None:
    graph, backbone = molecules(), network(32, 2)
    exact = trained(backbone, graph, False)
    found = trained(backbone, graph, True, torch.float32)
    for expected, value in zip(exact, found, strict=True):
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_vectors_as_input_go_through_the_first_layer() -> None:
    graph, backbone = molecules(), network(16, 2)
    backbone.accept_vectors()
    randomize(backbone, seed=4)
    generator = torch.Generator().manual_seed(5)
    n = len(graph.z)
    initial = Features(
        torch.randn(n, 16, generator=generator, dtype=torch.float64),
        torch.randn(n, 3, 16, generator=generator, dtype=torch.float64),
    )
    plain = backbone(graph, initial)
    backbone.use_native_messages()
    found = backbone(graph, initial)
    assert (found.scalars - plain.scalars).abs().max() < 1e-11
    assert plain.vectors is not None and found.vectors is not None
    assert (found.vectors - plain.vectors).abs().max() < 1e-11 * plain.vectors.abs().max()


def arguments(vectors: bool, selves: bool) -> list[torch.Tensor | Shape | None]:
    n, f, heads = 4, 8, 2
    first, second = torch.triu_indices(n, n, 1)
    generator = torch.Generator().manual_seed(6)
    rows = len(first) + int(selves)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [
        drawn(n, (5 if vectors else 4) * f),
        drawn(n, 3, f) if vectors else None,
        drawn(rows, (4 if vectors else 3) * f),
        drawn(rows),
        drawn(rows, 3),
        Shape(first, second, heads, selves),
    ]


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("selves", [True, False])
def test_both_derivatives_match_finite_differences(vectors: bool, selves: bool) -> None:
    *tensors, shape = arguments(vectors, selves)
    assert torch.autograd.gradcheck(lambda *given: messages(*given, shape), tensors)
    assert torch.autograd.gradgradcheck(lambda *given: messages(*given, shape), tensors)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, graph = network(48, 6), molecules()
    alone = trained(backbone, graph, True)
    monkeypatch.setattr(native, "_threads", lambda *_: threads)
    for expected, found in zip(alone, trained(backbone, graph, True), strict=True):
        assert (found - expected).abs().max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize("name", ["molecules", "crystal"])
def test_half_pairs_are_the_edges_once(name: str) -> None:
    graph = graphs()[name]
    half, every = HalfPairs(graph), EdgeList(graph)
    both = torch.cat([half.vector[:-1], -half.vector[:-1]])
    assert len(both) == len(every.vector)
    ends = torch.cat([torch.stack([half.first, half.second]), torch.stack([half.second, half.first])], dim=1)
    centre, neighbour = graph.edge_index[1], graph.edge_index[0]

    def rows(a: torch.Tensor, b: torch.Tensor, vector: torch.Tensor) -> list[tuple[float, ...]]:
        return sorted(
            (int(i), int(j), *(round(float(x), 9) + 0.0 for x in v))
            for i, j, v in zip(a, b, vector, strict=True)
        )

    assert rows(ends[0], ends[1], both) == rows(centre, neighbour, every.vector)


def test_what_has_no_native_messages_says_so() -> None:
    with pytest.raises(NativeUnavailable, match="'schnet' has no native messages"):
        create_backbone("schnet", hidden=8, layers=1).use_native_messages()
    with pytest.raises(NativeUnavailable, match="vector_cutoff"):
        TorchMDET(hidden=8, layers=1, heads=2, vector_cutoff=False).use_native_messages()
    with pytest.raises(NativeUnavailable, match="channels in a head"):
        TorchMDET(hidden=130, layers=1, heads=2).use_native_messages()
