"""EGNN is the published network where it should be, its vectors and edge types are what they say."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from scipy.sparse.csgraph import shortest_path
from torch import Tensor, nn

from ffpretrain import testing
from ffpretrain.artifacts import load_potential, make_card, save_potential
from ffpretrain.backbones import Features, create_backbone
from ffpretrain.backbones.egnn import EGNN, EquivariantLayer
from ffpretrain.backbones.topology import find_bonds, hop_classes
from ffpretrain.compiled import CompiledForces
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, Sample, batch_graphs, build_graph, graph_from_atoms
from ffpretrain.heads import VectorHead
from ffpretrain.objectives import create_objective
from ffpretrain.pairs import DensePairs
from ffpretrain.potential import Potential

F, CUTOFF, FAR = 8, 4.0, 100.0
ETHANOL = molecule("CH3CH2OH")
TYPED = {"numbers": ETHANOL.numbers.tolist(), "bonds": find_bonds(ETHANOL)}


def build(seed: int = 0, **options: Any) -> EGNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone("egnn", **{"hidden": F, "layers": 2, "cutoff": CUTOFF, **options}).double()
    assert isinstance(backbone, EGNN)
    testing.randomize(backbone, seed)
    return backbone


def ethanol(cutoff: float = CUTOFF, seed: int = 0) -> Graph:
    """Ethanol, its atoms displaced so that nothing is symmetric."""
    generator = torch.Generator().manual_seed(seed)
    graph = graph_from_atoms(ETHANOL, cutoff)
    noise = 0.1 * torch.randn(graph.pos.shape, generator=generator, dtype=torch.float64)
    return build_graph(graph.z, graph.pos + noise, cutoff)


def close(got: Tensor | None, want: Tensor | None, tolerance: float = 1e-11) -> bool:
    assert got is not None and want is not None
    return bool((got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-3))


# ---------------------------------------------------------------- the published equations, written out


def phi_e(layer: EquivariantLayer, *parts: Tensor, inner: Tensor | float = 0.0) -> Tensor:
    silu = nn.functional.silu
    return silu(layer.edge_out(silu(layer.edge_in(torch.cat(parts)) + inner)))


def written_out(
    backbone: EGNN, graph: Graph, classes: Tensor | None, smooth: bool, initial: Features | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, the vectors without displacement, and the displacement: eq. 3 to 6 and 8, pair by pair."""
    n = len(graph.z)
    h = [backbone.embedding.weight[z] for z in graph.z]
    start = x = list(graph.pos)
    v = [torch.zeros(3, F, dtype=torch.float64) for _ in range(n)]
    a = b = list(v)
    if initial is not None and initial.vectors is not None and backbone.vec_input is not None:
        h = [own + more for own, more in zip(h, initial.scalars, strict=True)]
        of_center, of_neighbor, kept = backbone.vec_input.weight.split(F)
        a, b, v = ([given @ m.T for given in initial.vectors] for m in (of_center, of_neighbor, kept))
    scale = 1 / (n - 1)  # C
    for number, layer in enumerate(backbone.layers):
        m_sum = [torch.zeros(F, dtype=torch.float64) for _ in range(n)]
        move = [torch.zeros(3, dtype=torch.float64) for _ in range(n)]
        for i in range(n):
            for j in range(n):
                away = (start[i] - start[j]).norm() if i != j else torch.tensor(0.0)
                if i == j or away >= backbone.cutoff:
                    continue
                w = (torch.cos(math.pi * away / backbone.cutoff) + 1) / 2 if smooth else 1.0
                parts = [h[i], h[j], (x[i] - x[j]).square().sum().reshape(1)]
                if classes is not None:
                    parts.append(torch.eye(4, dtype=torch.float64)[classes[i, j]])
                inner = (x[j] - x[i]) @ (a[i] + b[j]) if number == 0 else 0.0
                m = phi_e(layer, *parts, inner=inner)
                if layer.attention is not None:
                    m = torch.sigmoid(layer.attention(m)) * m
                m_sum[i] = m_sum[i] + w * m
                v[i] = v[i] + w * w * torch.outer(x[j] - x[i], layer.vec_out(m))
                if layer.step is not None:
                    first, activate, last = layer.step
                    # the published weights are ours over C
                    published = (last.weight / scale) @ activate(first(m))
                    move[i] = move[i] + scale * w * w * (x[i] - x[j]) * published
        x = [a + b for a, b in zip(x, move, strict=True)]
        update = [torch.cat(pair) for pair in zip(h, m_sum, strict=True)]
        h = [a + layer.node_out(nn.functional.silu(layer.node_in(b))) for a, b in zip(h, update, strict=True)]
    return torch.stack(h), torch.stack(v), torch.stack(x) - graph.pos


CASES = [
    pytest.param({"attention": attention, "update_positions": update, **typed}, id=name)
    for name, attention, update, typed in [
        ("plain", False, False, {}),
        ("attention", True, False, {}),
        ("positions", False, True, {}),
        ("attention and positions", True, True, {}),
        ("3d-emgp", True, False, TYPED),
        ("all", True, True, TYPED),
    ]
]


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("options", CASES)
def test_the_network_is_the_published_one(options: dict[str, Any], smooth: bool) -> None:
    """Without cutoff to the letter; with it times one factor, the vectors times its square."""
    cutoff = 3.0 if smooth else FAR
    backbone = build(cutoff=cutoff, smooth_cutoff=smooth, **options)
    classes = None
    if "bonds" in options:
        classes = hop_classes(len(ETHANOL), TYPED["bonds"])
    graph = ethanol(cutoff)
    assert (graph.edge_index.shape[1] == 9 * 8) != smooth
    graph = graph._replace(pos=graph.pos.requires_grad_(True))
    scalars, vectors = backbone(graph)
    h, v, u = written_out(backbone, graph, classes, smooth)
    assert close(scalars, h)
    if options["update_positions"]:
        assert backbone.displacement is not None and float(u.detach().abs().max()) > 1e-3
        v = v + u.unsqueeze(-1) * backbone.displacement
    assert close(vectors, v)
    assert vectors is not None
    gradients = [
        torch.autograd.grad(a.square().sum() + b.square().sum(), graph.pos)[0]
        for a, b in ((scalars, vectors), (h, v))
    ]
    assert close(*gradients)


def test_the_published_displacement_is_a_channel() -> None:
    backbone = build(update_positions=True, smooth_cutoff=False, cutoff=FAR)
    graph = ethanol(FAR)
    with torch.no_grad():
        for layer in backbone.layers:
            layer.vec_out.weight.zero_()
        assert backbone.displacement is not None
        backbone.displacement.copy_(torch.arange(F))
    vectors = backbone(graph).vectors
    _, _, u = written_out(backbone, graph, None, smooth=False)
    assert vectors is not None and not vectors[..., 0].any()
    assert close(vectors[..., 1], u) and close(vectors[..., 5], 5 * u)


# ---------------------------------------------------------------- cutoff


def test_without_the_factor_the_energy_jumps_and_nothing_else_breaks() -> None:
    backbone = build(smooth_cutoff=False, max_z=10)
    potential = testing.potential_of(backbone)
    for name, check in testing.checks(potential).items():
        if name == "smoothness":
            with pytest.raises(testing.SymmetryError, match="energy jumps"):
                check()
        else:
            check()
    assert not backbone.smooth
    with pytest.raises(ConfigError, match="smooth at the cutoff"):
        CompiledForces(potential)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"update_positions": True}, {"attention": False, "layers": 1}])
def test_smooth_for_any_weights(options: dict[str, Any], seed: int) -> None:
    testing.run_check("smoothness", build(seed, max_z=10, **options), seed)


# ---------------------------------------------------------------- vectors


def test_vectors_give_a_direct_head_what_it_needs() -> None:
    """Equivariant, and not bound to be the gradient of an energy or to sum to zero."""
    backbone, graph = build(), ethanol()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = VectorHead(F).double()
    kinds = {"force": testing.Kind("atom", "vector")}

    def force(graph: Graph) -> dict[str, Tensor]:
        return {"force": head(backbone(graph))}

    testing.check_rotation(force, graph, kinds=kinds)
    testing.check_reflection(force, graph, kinds=kinds)
    testing.check_permutation(force, graph, kinds=kinds)
    found = force(graph)["force"].detach()
    assert float(found.norm(dim=1).min()) > 1e-6
    assert float(found.sum(0).norm()) > 1e-3 * float(found.norm())


def extra(n: int) -> Features:
    generator = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return Features(draw(n, F), draw(n, 3, F))


@pytest.mark.parametrize("options", [{}, {"update_positions": True}, TYPED])
def test_input_vectors(options: dict[str, Any]) -> None:
    graph, initial = ethanol(), extra(9)
    backbone = build(**options)
    plain = backbone(graph)
    with pytest.raises(ConfigError, match="takes no vectors as extra input; build it with vector_input=true"):
        backbone(graph, initial)
    backbone.accept_vectors()
    assert create_backbone("egnn", **backbone.config).vector_input
    for got, want in zip(backbone(graph), plain, strict=True):
        assert torch.equal(got, want)
    with_vectors = backbone(graph, initial)
    classes = hop_classes(9, TYPED["bonds"]) if "bonds" in options else None
    h, v, u = written_out(backbone, graph, classes, True, initial)
    if backbone.displacement is not None:
        v = v + u.unsqueeze(-1) * backbone.displacement
    assert close(with_vectors.scalars, h) and close(with_vectors.vectors, v)
    scalars_only = backbone(graph, Features(initial.scalars, None))
    assert not close(with_vectors.scalars, scalars_only.scalars, 1e-3)
    rotation = -testing.random_rotation(torch.Generator().manual_seed(1))
    assert initial.vectors is not None and with_vectors.vectors is not None
    turned = backbone(
        graph._replace(pos=graph.pos @ rotation.T),
        Features(initial.scalars, torch.einsum("ij,njf->nif", rotation, initial.vectors)),
    )
    assert close(turned.scalars, with_vectors.scalars, 1e-10)
    assert close(turned.vectors, torch.einsum("ij,njf->nif", rotation, with_vectors.vectors), 1e-10)
    dense = backbone.encode(graph.z, DensePairs(graph.pos, 1), initial)
    for got, want in zip(dense, with_vectors, strict=True):
        assert close(got, want)


# ---------------------------------------------------------------- edge types


@pytest.mark.parametrize("name", ["CH3CH2OH", "C6H6", "CH3COOH", "H2O"])
def test_bonds_and_hops(name: str) -> None:
    atoms = molecule(name)
    bonds = find_bonds(atoms)
    count = np.bincount(np.ravel(bonds), minlength=len(atoms))
    # neighbours an atom has in these molecules; sp2 carbon has 3, the O of C=O has 1
    allowed = {1: {1}, 6: {3, 4}, 8: {1, 2}}
    assert all(c in allowed[z] for z, c in zip(atoms.numbers, count, strict=True))
    matrix = np.zeros((len(atoms), len(atoms)))
    for i, j in bonds:
        matrix[i, j] = 1
    hops = shortest_path(matrix, directed=False, unweighted=True)
    expected = np.where((hops >= 1) & (hops <= 3), hops - 1, 3)
    assert np.array_equal(hop_classes(len(atoms), bonds).numpy(), expected)


def test_parts_without_a_bond_between_them_are_other() -> None:
    classes = hop_classes(4, [[0, 1], [3, 2]])
    assert classes.tolist() == [[3, 0, 3, 3], [0, 3, 3, 3], [3, 3, 3, 0], [3, 3, 0, 3]]


@pytest.mark.parametrize("update", [False, True])
def test_symmetries_with_edge_types(update: bool) -> None:
    potential = testing.potential_of(build(update_positions=update, **TYPED))
    graph, other = ethanol(), ethanol(seed=1)
    testing.check_rotation(potential, graph)
    testing.check_reflection(potential, graph)
    testing.check_translation(potential, graph)
    testing.check_batching(potential, [graph, other])
    testing.check_forces(potential, graph)
    testing.check_layouts(potential, [graph, other])
    testing.check_precision(potential, graph)
    # two molecules in one structure, first out of reach of each other, then within it
    testing.check_size_consistency(potential, graph, other)
    near = build_graph(graph.z.repeat(2), torch.cat([graph.pos, other.pos + 2.5]), CUTOFF)
    testing.check_layouts(potential, [near])
    testing.check_second_derivatives(potential, near)
    testing.check_forces(potential, near)


def test_atoms_of_two_molecules_are_never_bonded() -> None:
    """Two molecules in one structure are one molecule with two parts."""
    both = [*TYPED["bonds"], *([i + 9, j + 9] for i, j in TYPED["bonds"])]
    plain, double = build(**TYPED), build(numbers=2 * TYPED["numbers"], bonds=both)
    double.load_state_dict(plain.state_dict())
    first, second = ethanol(), ethanol(seed=1)
    near = build_graph(first.z.repeat(2), torch.cat([first.pos, second.pos + 2.0]), CUTOFF)
    for got, want in zip(plain(near), double(near), strict=True):
        assert torch.equal(got, want)
    dense = [b.encode(near.z, DensePairs(near.pos, 1)).scalars for b in (plain, double)]
    assert torch.equal(*dense)


def test_atoms_move_smoothly_through_bond_lengths() -> None:
    """A bond that is stretched far beyond any radius keeps its type: no jump on the way."""
    potential, graph = testing.potential_of(build(**TYPED)), ethanol()
    bond = (graph.pos[8] - graph.pos[2]) / (graph.pos[8] - graph.pos[2]).norm()
    energies = []
    for step in torch.linspace(0, 1.5, 301):
        pos = graph.pos.clone()
        pos[8] += step * bond
        energies.append(potential(build_graph(graph.z, pos, CUTOFF), forces=False)["energy"])
    second = torch.cat(energies).diff(n=2).abs()
    first = torch.cat(energies).diff().abs().max()
    assert float(second.max()) < 0.1 * float(first)


def test_reordered_atoms_with_reordered_bonds() -> None:
    order = torch.tensor([4, 2, 8, 0, 6, 1, 7, 3, 5])
    place = order.argsort().tolist()
    renamed = [[place[i], place[j]] for i, j in TYPED["bonds"]]
    graph, plain = ethanol(), build(**TYPED)
    moved = build(numbers=graph.z[order].tolist(), bonds=renamed)
    moved.load_state_dict(plain.state_dict())
    shuffled = build_graph(graph.z[order], graph.pos[order], CUTOFF)
    assert close(moved(shuffled).scalars, plain(graph).scalars[order])
    untyped = build(numbers=graph.z.tolist(), bonds=[])
    untyped.load_state_dict(plain.state_dict())
    assert not close(untyped(graph).scalars, plain(graph).scalars, 1e-3)


def test_other_structures_are_refused() -> None:
    backbone, graph = build(**TYPED), ethanol()
    swapped = graph._replace(z=graph.z.flip(0))
    shared = batch_graphs([graph, graph])._replace(batch=torch.tensor([0] * 4 + [1] * 14))
    water = graph_from_atoms(molecule("H2O"), CUTOFF)
    for wrong in (swapped, shared, water, batch_graphs([graph, water])):
        with pytest.raises(UnsupportedInputError, match="bonds are those of C2H6O with its 9 atoms") as error:
            backbone(wrong)
        assert "\n" not in str(error.value)
    boxed = graph_from_atoms(Atoms(ETHANOL, cell=[9.0] * 3, pbc=True), CUTOFF)
    with pytest.raises(UnsupportedInputError, match="in vacuum; leave out bonds"):
        backbone(boxed)
    with pytest.raises(UnsupportedInputError, match="bonds are for 9 atoms, the structure has 3"):
        backbone.encode(water.z, DensePairs(water.pos, 1))
    # where nothing can be raised, because a compiled function has no such place, there is no number
    dense = backbone.encode(swapped.z, DensePairs(swapped.pos, 1))
    assert bool(torch.isnan(dense.scalars).all())


def test_a_file_keeps_the_bonds(tmp_path: Path) -> None:
    potential = Potential(build(**TYPED), elements=[1, 6, 8]).double().eval()
    save_potential(potential, tmp_path / "m.safetensors", make_card(potential, "m"))
    again = load_potential(tmp_path / "m.safetensors")
    graph = ethanol()
    assert torch.equal(again(graph)["energy"], potential(graph)["energy"])
    assert again.backbone.config == potential.backbone.config


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"update_positions": True}, TYPED])
def test_the_compiled_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces and the gradients that training takes of them, traced to plain operations: no compiler runs."""
    monkeypatch.setattr(torch, "compile", lambda traced, **options: traced)
    potential = testing.potential_of(build(**options)).train()
    function = CompiledForces(potential)
    batch = batch_graphs([ethanol(), ethanol(seed=1)])
    function(batch)
    assert function.agreement[2, 9] < 1e-12
    assert function.gradient_agreement[2, 9] < 1e-12


OBJECTIVES = ["ndem", "dens", "coord", "georecon", "3d-emgp", "denoisevae", "se3-ddm", "supervised"]


@pytest.mark.parametrize("options", [{}, {"update_positions": True, **TYPED}])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_a_step(name: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    graph = batch_graphs([ethanol(), ethanol(seed=1)])
    targets = {
        "energy": torch.randn(2, generator=generator, dtype=torch.float64),
        "forces": torch.randn(18, 3, generator=generator, dtype=torch.float64),
    }
    sample = Sample(graph, targets, {"index": torch.tensor([0, 1])})
    objective = create_objective(name, backbone=build(**options))
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
