"""Checks on periodic structures: supercells, stress, invariance to wrapping."""

from __future__ import annotations

import itertools

import torch

from ffpretrain.graphs import Graph, batch_graphs, build_graph
from ffpretrain.testing.outputs import (
    STENCIL,
    Model,
    compare,
    cutoff_of,
    evaluate,
    require_double,
    tolerance_for,
)
from ffpretrain.testing.structures import rebuilt


def check_supercell(
    model: Model,
    graph: Graph,
    *,
    repeats: tuple[int, int, int] = (2, 1, 3),
    tolerance: float | None = None,
) -> None:
    """Check that n cells have n times the energy of one, the same forces and the same stress.

    Args:
        model: has an attribute ``cutoff``.
        graph: one structure, periodic in all directions.
        repeats: number of cells in each direction.
        tolerance: relative to the largest entry of each output; None takes 1e-9 in float64, else 1e-4.

    Raises:
        SymmetryError: the supercell is not a multiple of the cell.
    """
    cell, n = graph.cell[0], len(graph.z)
    places = torch.tensor(list(itertools.product(*map(range, repeats)))).to(graph.pos)
    pos = (graph.pos + (places @ cell).unsqueeze(1)).reshape(-1, 3)
    larger = build_graph(
        graph.z.repeat(len(places)),
        pos,
        cutoff_of(model),
        cell * torch.tensor(repeats).to(cell).unsqueeze(1),
        (True, True, True),
    )
    one = evaluate(model, graph)
    want = {name: value.repeat(len(places), *[1] * (value.dim() - 1)) for name, value in one.items()}
    want["energy"] = one["energy"] * len(places)
    if "stress" in one:
        want["stress"] = one["stress"]
    compare(f"supercell of {n} atoms", evaluate(model, larger), want, tolerance_for(model, graph, tolerance))


def check_wrapping(model: Model, graph: Graph, *, seed: int = 0, tolerance: float | None = None) -> float:
    """Check that atoms moved by whole lattice vectors change nothing.

    Args:
        model: has an attribute ``cutoff``.
        graph: one structure, periodic in all directions.
        seed: of the random lattice vectors.
        tolerance: as :func:`check_supercell`.

    Returns:
        The largest difference found, relative as the tolerance is.

    Raises:
        SymmetryError: an output changes.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-2, 3, (len(graph.z), 3), generator=generator).to(graph.pos)
    moved = rebuilt(graph, cutoff_of(model), graph.pos + whole @ graph.cell[0])
    return compare(
        "wrapping",
        evaluate(model, moved),
        evaluate(model, graph),
        tolerance_for(model, graph, tolerance),
    )


def check_stress(model: Model, graph: Graph, *, step: float = 5e-4, tolerance: float = 1e-6) -> None:
    """Check the stress against finite differences of the energy by strain.

    Args:
        model: has an attribute ``cutoff``; in float64.
        graph: one structure, periodic in all directions.
        step: strain.
        tolerance: relative to the largest entry of the stress.

    Raises:
        SymmetryError: the stress is not the derivative of the energy by strain over the volume.
        ValueError: the model is in single precision.
    """
    require_double(model, "check_stress")
    cell, cutoff = graph.cell[0], cutoff_of(model)
    components = list(itertools.combinations_with_replacement(range(3), 2))
    copies = []
    for (i, j), (k, _) in itertools.product(components, STENCIL):
        deform = torch.eye(3, dtype=torch.float64)
        deform[i, j] += 0.5 * k * step
        deform[j, i] += 0.5 * k * step
        copies.append(rebuilt(graph, cutoff, graph.pos @ deform, cell @ deform))
    energy = model(batch_graphs(copies))["energy"].detach().double().view(-1, len(STENCIL))
    slope = energy @ torch.tensor([weight for _, weight in STENCIL], dtype=torch.float64) / step
    stress = torch.zeros(1, 3, 3, dtype=torch.float64)
    for (i, j), value in zip(components, slope.tolist(), strict=True):
        stress[0, i, j] = stress[0, j, i] = value / float(torch.linalg.det(cell).abs())
    got = evaluate(model, graph)
    compare("stress against finite differences", got, {"stress": stress}, tolerance, floor=1e-6)
