"""Extra input features: added to the embeddings, equivariant, and absent unless they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ffpretrain.artifacts import load_potential, make_card, save_potential
from ffpretrain.backbones import Backbone, Features, create_backbone, list_backbones
from ffpretrain.backbones.painn import Interaction, PaiNN
from ffpretrain.backbones.torchmd_et import EquivariantAttention, TorchMDET
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph
from ffpretrain.pairs import DensePairs, EdgeList, Pairs
from ffpretrain.potential import Potential
from ffpretrain.testing import random_molecule, random_rotation

F, CUTOFF = 16, 4.0
WITH_VECTORS = ["egnn", "painn", "torchmd-et"]


def build(name: str, seed: int = 0, **options: object) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_backbone(name, hidden=F, layers=2, cutoff=CUTOFF, max_z=10, **options).double()


def molecule(seed: int = 0) -> Graph:
    return random_molecule([6, 1, 8], 7, CUTOFF, torch.Generator().manual_seed(seed))


def extra(graph: Graph, vectors: bool = True) -> Features:
    generator = torch.Generator().manual_seed(5)
    n = len(graph.z)
    scalars = torch.randn(n, F, generator=generator, dtype=torch.float64)
    arrows = torch.randn(n, 3, F, generator=generator, dtype=torch.float64) if vectors else None
    return Features(scalars, arrows)


def close(got: Tensor | None, want: Tensor | None, tolerance: float = 1e-12) -> bool:
    assert got is not None and want is not None
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


# ---------------------------------------------------------------- what does not change


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_the_weights_for_vectors_change_nothing_while_none_are_given(name: str) -> None:
    graph, plain = molecule(), build(name)
    ready = build(name, seed=1, vector_input=True)
    missing, unexpected = ready.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all("vec" in key for key in missing)
    for got, want in zip(ready(graph), plain(graph), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_accepting_vectors_later_keeps_all_other_weights(name: str) -> None:
    backbone = build(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    assert not backbone.vector_input and backbone.config["vector_input"] is False
    backbone.accept_vectors()
    drawn = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.accept_vectors()
    after = backbone.state_dict()
    assert backbone.vector_input and backbone.config["vector_input"] is True
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert drawn.keys() == after.keys() > before.keys()
    assert all(
        torch.equal(after[key], value) and value.dtype == torch.float64 for key, value in drawn.items()
    )
    create_backbone(name, **backbone.config).double().load_state_dict(after)


@pytest.mark.parametrize("name", sorted(list_backbones()))
def test_zero_features_are_none(name: str) -> None:
    graph, backbone = molecule(), build(name)
    n = len(graph.z)
    scalars = torch.zeros(n, F, dtype=torch.float64)
    assert torch.equal(backbone(graph, Features(scalars, None)).scalars, backbone(graph).scalars)
    if name in WITH_VECTORS:
        backbone.accept_vectors()
        zero = Features(scalars, torch.zeros(n, 3, F, dtype=torch.float64))
        for got, want in zip(backbone(graph, zero), backbone(graph), strict=True):
            assert close(got, want)


@pytest.mark.parametrize("name", sorted(list_backbones()))
def test_scalars_are_added_to_the_embeddings(name: str) -> None:
    """Features that are a function of the element are the same as other embeddings."""
    graph, backbone = molecule(), build(name)
    shift = torch.randn(10, F, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = backbone(graph, Features(shift[graph.z], None)).scalars
    with torch.no_grad():
        backbone.embedding.weight += shift
    assert close(got, backbone(graph).scalars)


# ---------------------------------------------------------------- the first layer as any other


def test_painn_reads_vectors_as_its_later_layers_do() -> None:
    graph, backbone = molecule(), build("painn", vector_input=True)
    assert isinstance(backbone, PaiNN)
    first, initial, pairs = backbone.layers[0], extra(graph), EdgeList(graph)
    whole = Interaction(F, 1e-8, first=False).double()
    state = {k: v for k, v in first.state_dict().items() if "vector_context" not in k}
    for kind in ("weight", "bias"):
        part = getattr(first.vector_context, kind)
        state[f"context_out.{kind}"] = torch.cat([state[f"context_out.{kind}"], part])
    whole.load_state_dict(state)
    seen: list[tuple[Tensor, ...]] = []
    first.register_forward_hook(lambda _, inputs, out: seen.append((*inputs, *out)))
    backbone(graph, initial)
    x, vec, _, filters, direction, new_x, new_vec = seen[0]
    assert torch.equal(x, backbone.embedding(graph.z) + initial.scalars)
    assert vec is initial.vectors and filters.shape[-1] == 3 * F
    got = whole(x, vec, pairs, filters, direction)
    assert close(got[0], new_x) and close(got[1], new_vec)


def test_torchmd_et_reads_vectors_as_its_later_layers_do() -> None:
    graph, backbone = molecule(), build("torchmd-et", vector_input=True)
    assert isinstance(backbone, TorchMDET)
    first, initial = backbone.layers[0], extra(graph)
    whole = EquivariantAttention(F, 32, 8, True, first=False).double()
    state = {k: v for k, v in first.state_dict().items() if not k.startswith("vector_")}
    for kind in ("weight", "bias"):
        for name, order in (("mix", 1), ("filters", 1), ("out", -1)):
            part = {"mix": first.vector_value, "filters": first.vector_filters, "out": first.vector_out}[name]
            pieces = [state[f"{name}.{kind}"], getattr(part, kind)][::order]
            state[f"{name}.{kind}"] = torch.cat(pieces)
    whole.load_state_dict(state)
    seen: list[tuple[Tensor, ...]] = []
    first.register_forward_hook(lambda _, inputs, out: seen.append((*inputs, *out)))
    backbone(graph, initial)
    *inputs, new_x, new_vec = seen[0]
    assert inputs[1] is initial.vectors
    got = whole(*inputs)
    assert close(got[0], new_x) and close(got[1], new_vec)


@pytest.mark.parametrize(
    ("name", "options"), [*((n, {}) for n in WITH_VECTORS), ("painn", {"shared_filters": True})]
)
def test_every_added_weight_matters(name: str, options: dict[str, object]) -> None:
    graph, backbone = molecule(), build(name, vector_input=True, **options)
    features = backbone(graph, extra(graph))
    assert features.vectors is not None
    total = features.scalars.square().sum() + features.vectors.square().sum()
    old = build(name, **options).state_dict()
    added = {key: p for key, p in backbone.named_parameters() if key not in old}
    grads = torch.autograd.grad(total, list(added.values()))
    assert all(bool((g != 0).any()) for g in grads)


# ---------------------------------------------------------------- symmetry and layouts


@pytest.mark.parametrize("mirror", [1.0, -1.0])
@pytest.mark.parametrize("name", WITH_VECTORS)
def test_outputs_turn_with_structure_and_input_vectors(name: str, mirror: float) -> None:
    graph, backbone = molecule(), build(name, vector_input=True)
    rotation = mirror * random_rotation(torch.Generator().manual_seed(1))
    initial = extra(graph)
    assert initial.vectors is not None
    plain = backbone(graph, initial)
    turned_graph = graph._replace(pos=graph.pos @ rotation.T)
    turned_input = Features(initial.scalars, torch.einsum("ij,njf->nif", rotation, initial.vectors))
    turned = backbone(turned_graph, turned_input)
    assert plain.vectors is not None
    assert close(turned.scalars, plain.scalars, 1e-10)
    assert close(turned.vectors, torch.einsum("ij,njf->nif", rotation, plain.vectors), 1e-10)
    # the input vectors have a direction of their own: turning the structure alone changes the scalars
    assert not close(backbone(turned_graph, initial).scalars, plain.scalars, 1e-6)


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_both_layouts_agree(name: str) -> None:
    graph, backbone = molecule(), build(name, vector_input=True)
    dense = backbone.encode(graph.z, DensePairs(graph.pos, 1), extra(graph))
    for got, want in zip(dense, backbone(graph, extra(graph)), strict=True):
        assert close(got, want, 1e-10)


# ---------------------------------------------------------------- refusals, files, plug-ins


@pytest.mark.parametrize("name", sorted(list_backbones()))
def test_vectors_without_weights_for_them_are_refused(name: str) -> None:
    graph, backbone = molecule(), build(name)
    if backbone.vector_input:
        return
    with pytest.raises(ConfigError, match=r"takes no vectors as extra input; (build|give)"):
        backbone(graph, extra(graph))


def test_a_backbone_that_cannot_take_vectors_says_so() -> None:
    with pytest.raises(ConfigError, match="'plain' cannot take vectors as input; use one that can"):
        Plain().accept_vectors()


class Plain(Backbone):
    """As a plug-in written before there were extra features."""

    name, has_vectors = "plain", False

    def __init__(self) -> None:
        super().__init__(CUTOFF, F, 10, {})
        self.embedding = nn.Embedding(10, F)

    def encode(self, z: Tensor, pairs: Pairs) -> Features:  # type: ignore[override]
        return Features(self.embedding(z), None)


def test_a_plug_in_without_extra_features_still_works() -> None:
    assert Plain()(molecule()).scalars.shape == (7, F)


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_a_file_keeps_the_weights_for_vectors(name: str, tmp_path: Path) -> None:
    graph, potential = molecule(), Potential(build(name, vector_input=True), elements=[1, 6, 8])
    potential.double()
    save_potential(potential, tmp_path / "m.safetensors", make_card(potential, "m"))
    again = load_potential(tmp_path / "m.safetensors")
    assert torch.equal(
        again.backbone(graph, extra(graph)).scalars, potential.backbone(graph, extra(graph)).scalars
    )
