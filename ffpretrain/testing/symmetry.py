"""Checks that hold exactly: rotations, reflections, translations, permutations, independence of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ffpretrain.graphs import Graph, batch_graphs
from ffpretrain.testing.outputs import KINDS, Kind, Model, compare, evaluate, rotated, tolerance_for
from ffpretrain.testing.structures import random_rotation


def check_rotation(
    model: Model,
    graph: Graph,
    *,
    seed: int = 0,
    tolerance: float | None = None,
    kinds: Mapping[str, Kind] = KINDS,
) -> float:
    """Check that outputs rotate with the structure.

    Args:
        model: a potential, or a function from a graph to named outputs.
        graph: one or more structures, periodic or not.
        seed: of the random rotation.
        tolerance: relative to the largest entry of each output; None takes 1e-9 in float64, else 1e-4.
        kinds: how each output transforms.

    Returns:
        The largest difference found, relative as the tolerance is.

    Raises:
        SymmetryError: an output does not rotate as its kind says.
        KeyError: an output's kind is not given.
    """
    rotation = random_rotation(torch.Generator().manual_seed(seed))
    return _check_orthogonal("rotation", model, graph, rotation, tolerance, kinds)


def check_reflection(
    model: Model,
    graph: Graph,
    *,
    seed: int = 0,
    tolerance: float | None = None,
    kinds: Mapping[str, Kind] = KINDS,
) -> float:
    """Check that outputs are mirrored with the structure; all else as in :func:`check_rotation`."""
    normal = torch.randn(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    normal = normal / normal.norm()
    mirror = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    return _check_orthogonal("reflection", model, graph, mirror, tolerance, kinds)


def _check_orthogonal(
    what: str,
    model: Model,
    graph: Graph,
    matrix: Tensor,
    tolerance: float | None,
    kinds: Mapping[str, Kind],
) -> float:
    m = matrix.to(graph.pos)
    turned = graph._replace(pos=graph.pos @ m.T, edge_shift=graph.edge_shift @ m.T, cell=graph.cell @ m.T)
    want = {name: rotated(name, value, matrix, kinds) for name, value in evaluate(model, graph).items()}
    return compare(what, evaluate(model, turned), want, tolerance_for(model, graph, tolerance))


def check_translation(model: Model, graph: Graph, *, seed: int = 0, tolerance: float | None = None) -> float:
    """Check that moving a structure changes nothing; all else as in :func:`check_rotation`."""
    generator = torch.Generator().manual_seed(seed)
    step = 5 * torch.randn(graph.n_graphs, 3, generator=generator, dtype=torch.float64).to(graph.pos)
    moved = graph._replace(pos=graph.pos + step[graph.batch])
    return compare(
        "translation",
        evaluate(model, moved),
        evaluate(model, graph),
        tolerance_for(model, graph, tolerance),
    )


def check_permutation(
    model: Model,
    graph: Graph,
    *,
    seed: int = 0,
    tolerance: float | None = None,
    kinds: Mapping[str, Kind] = KINDS,
) -> float:
    """Check that outputs follow their atoms when these and the edges come in another order.

    Arguments, result and errors as :func:`check_rotation`.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(graph.z)
    # a stable sort by structure after a shuffle permutes within structures only
    shuffled = torch.randperm(n, generator=generator).to(graph.z.device)
    order = shuffled[torch.sort(graph.batch[shuffled], stable=True).indices]
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=order.device)
    edges = torch.randperm(graph.edge_index.shape[1], generator=generator).to(order.device)
    permuted = graph._replace(
        z=graph.z[order],
        pos=graph.pos[order],
        edge_index=place[graph.edge_index[:, edges]],
        edge_shift=graph.edge_shift[edges],
    )
    want = {
        name: value[order] if kinds[name].per == "atom" else value
        for name, value in evaluate(model, graph).items()
    }
    return compare("permutation", evaluate(model, permuted), want, tolerance_for(model, graph, tolerance))


def check_batching(model: Model, graphs: Sequence[Graph], *, tolerance: float | None = None) -> float:
    """Check that structures evaluated together give what each gives alone.

    Args:
        model: as :func:`check_rotation`.
        graphs: at least two, best of different sizes, all periodic or none.
        tolerance: as :func:`check_rotation`.

    Returns:
        The largest difference found, relative as the tolerance is.

    Raises:
        SymmetryError: an output depends on what else is in the batch.
    """
    alone = [evaluate(model, graph) for graph in graphs]
    want = {name: torch.cat([out[name] for out in alone]) for name in alone[0]}
    together = evaluate(model, batch_graphs(graphs))
    return compare("batch independence", together, want, tolerance_for(model, graphs[0], tolerance))
