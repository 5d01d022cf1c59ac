"""Native messages against the plain network: values, forces, the gradient that training takes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffpretrain.backbones import create_backbone
from ffpretrain.backbones.base import Backbone, Features
from ffpretrain.backbones.torchmd_et import TorchMDET
from ffpretrain.graphs import Graph, batch_graphs
from ffpretrain.native import messages as native
from ffpretrain.native.build import NativeUnavailable, find_compiler
from ffpretrain.native.messages import LIBRARY, Shape, messages, painn_messages
from ffpretrain.pairs import EdgeList, HalfPairs
from ffpretrain.testing.structures import crystal, random_molecule
from ffpretrain.testing.suite import potential_of, randomize

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

CUTOFF = 3.0
#: channels of a head, or of PaiNN: whole vectors of any machine, of four, and one by one
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "torchmd-et vectors": ("torchmd-et", {"hidden": 32, "heads": 2}),
    "torchmd-et fours": ("torchmd-et", {"hidden": 24, "heads": 2}),
    "torchmd-et single": ("torchmd-et", {"hidden": 18, "heads": 3}),
    "painn vectors": ("painn", {"hidden": 32}),
    "painn fours": ("painn", {"hidden": 12}),
    "painn single": ("painn", {"hidden": 9}),
    "painn shared": ("painn", {"hidden": 12, "shared_filters": True}),
    "painn trainable": ("painn", {"hidden": 12, "trainable_rbf": True}),
    "painn one layer": ("painn", {"hidden": 12, "layers": 1}),
}
SMALL = {"torchmd-et": {"hidden": 16, "heads": 2}, "painn": {"hidden": 16}}


def molecules() -> Graph:
    generator = torch.Generator().manual_seed(1)
    return batch_graphs([random_molecule([8, 1, 6], n, CUTOFF, generator) for n in (7, 1, 4)])


def graphs() -> dict[str, Graph]:
    # the cell is shorter than the cutoff: atoms meet their own images, and pairs stand several times
    return {"molecules": molecules(), "crystal": crystal([8, 1], CUTOFF)}


def far_apart() -> Graph:
    generator = torch.Generator().manual_seed(1)
    return batch_graphs([random_molecule([8, 1, 6], 1, CUTOFF, generator) for _ in range(3)])


def network(name: str, **options: Any) -> Backbone:
    torch.manual_seed(0)
    backbone = create_backbone(name, **{"layers": 3, "rbf": 8, "cutoff": CUTOFF, "max_z": 10} | options)
    randomize(backbone, seed=3)
    return backbone.double()


def trained(
    backbone: Backbone, graph: Graph, native_messages: bool, dtype: torch.dtype = torch.float64
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
    weights = [p for p in potential.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return out["energy"].detach(), out["forces"].detach(), torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("name", ["molecules", "crystal"])
@pytest.mark.parametrize("case", NETWORKS)
def test_energies_forces_and_gradients_are_those_of_the_plain_network(case: str, name: str) -> None:
    kind, options = NETWORKS[case]
    backbone, graph = network(kind, **options), graphs()[name]
    assert name == "molecules" or bool((graph.edge_index[0] == graph.edge_index[1]).any())
    plain, fast = trained(backbone, graph, False), trained(backbone, graph, True)
    for expected, found in zip(plain, fast, strict=True):
        assert expected.abs().max() > 1e-3
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_atoms_without_neighbours(name: str) -> None:
    graph, backbone = far_apart(), network(name, **SMALL[name])
    assert graph.edge_index.shape[1] == 0
    plain, fast = trained(backbone, graph, False), trained(backbone, graph, True)
    assert not fast[1].any()
    for expected, found in zip(plain, fast, strict=True):
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_float32_agrees_to_its_precision(name: str) -> None:
    graph, backbone = molecules(), network(name, **SMALL[name])
    exact = trained(backbone, graph, False)
    found = trained(backbone, graph, True, torch.float32)
    for expected, value in zip(exact, found, strict=True):
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [("torchmd-et", {}), ("painn", {}), ("painn", {"shared_filters": True})],
    ids=["torchmd-et", "painn", "painn shared"],
)
def test_vectors_as_input_go_through_the_first_layer(name: str, options: dict[str, bool]) -> None:
    graph, backbone = molecules(), network(name, **SMALL[name], **options)
    backbone.accept_vectors()
    randomize(backbone, seed=4)
    generator = torch.Generator().manual_seed(5)
    n = len(graph.z)
    initial = Features(
        torch.randn(n, 16, generator=generator, dtype=torch.float64),
        torch.randn(n, 3, 16, generator=generator, dtype=torch.float64),
    )

    def read() -> list[torch.Tensor]:
        features = backbone(graph, initial)
        assert features.vectors is not None
        loss = features.scalars.square().sum() + features.vectors.square().sum()
        weights = [p for p in backbone.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        return [features.scalars, features.vectors, torch.cat([g.flatten() for g in gradient])]

    plain = read()
    backbone.use_native_messages()
    for expected, found in zip(plain, read(), strict=True):
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


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


@pytest.mark.parametrize("features", [4, 3])
@pytest.mark.parametrize("vectors", [True, False])
def test_both_derivatives_of_painn_match_finite_differences(vectors: bool, features: int) -> None:
    n, blocks = 3, 3 if vectors else 2
    # a pair that stands twice, as with images, and an atom beside its own image
    first, second = torch.tensor([0, 0, 0, 2]), torch.tensor([1, 2, 1, 2])
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = [
        drawn(n, blocks * features),
        drawn(n, 3, features) if vectors else None,
        drawn(len(first), blocks * features),
        drawn(len(first)),
        drawn(len(first), 3),
    ]
    shape = Shape(first, second)
    assert torch.autograd.gradcheck(lambda *given: painn_messages(*given, shape), tensors)
    assert torch.autograd.gradgradcheck(lambda *given: painn_messages(*given, shape), tensors)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("name", SMALL)
def test_threads_change_nothing(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = {"heads": 6} if name == "torchmd-et" else {}
    backbone, graph = network(name, hidden=48, **heads), molecules()
    alone = trained(backbone, graph, True)
    monkeypatch.setattr(native, "_threads", lambda *_: threads)
    for expected, found in zip(alone, trained(backbone, graph, True), strict=True):
        assert (found - expected).abs().max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize("name", ["molecules", "crystal"])
def test_half_pairs_are_the_edges_once(name: str) -> None:
    graph = graphs()[name]
    half, every = HalfPairs(graph), EdgeList(graph)
    selves = HalfPairs(graph, self_pairs=True)
    assert half.other is None and selves.other is not None
    assert bool(selves.other[:-1].all()) and not selves.other[-1]
    assert torch.equal(selves.vector[:-1], half.vector) and not selves.vector[-1].any()
    both = torch.cat([half.vector, -half.vector])
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


def test_painn_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(LIBRARY, "_loaded", None)
    backbone = network("painn", **SMALL["painn"])
    with pytest.raises(NativeUnavailable, match="no C\\+\\+ compiler found"):
        backbone.use_native_messages()
    assert not backbone.native_messages
