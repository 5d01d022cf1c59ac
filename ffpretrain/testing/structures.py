"""Small structures that bring out errors: random, planar, linear, tetrahedral, crowded crystals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffpretrain.graphs import Graph, build_graph


def random_rotation(generator: torch.Generator) -> Tensor:
    """Return a proper rotation, uniform over all, float64 ``[3, 3]``."""
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    return q * torch.linalg.det(q)


def random_molecule(
    elements: Sequence[int], n_atoms: int, cutoff: float, generator: torch.Generator
) -> Graph:
    """Return a molecule without symmetry: each atom 1.0 to 1.5 Å from an earlier one, none closer than 0.9 Å.

    Args:
        elements: atomic numbers to take in turn.
        n_atoms: number of atoms.
        cutoff: of the graph, Å.
        generator: draws the positions.
    """
    pos = torch.zeros(1, 3, dtype=torch.float64)
    while len(pos) < n_atoms:
        parent = int(torch.randint(len(pos), (1,), generator=generator))
        step = torch.randn(3, generator=generator, dtype=torch.float64)
        length = 1.0 + 0.5 * float(torch.rand(1, generator=generator, dtype=torch.float64))
        new = pos[parent] + length * step / step.norm()
        if (pos - new).norm(dim=1).min() > 0.9:
            pos = torch.cat([pos, new[None]])
    z = torch.tensor([elements[i % len(elements)] for i in range(n_atoms)])
    return build_graph(z, pos, cutoff)


def symmetric_molecules(elements: Sequence[int], cutoff: float) -> dict[str, Graph]:
    """Return structures on which sums of vectors vanish: an atom, a diatomic, linear, planar, tetrahedral.

    Args:
        elements: at least one atomic number; the first two are used.
        cutoff: of the graphs, Å.
    """
    a, b = elements[0], elements[1 % len(elements)]
    hexagon = torch.arange(6, dtype=torch.float64) * (torch.pi / 3)
    ring = torch.stack([hexagon.cos(), hexagon.sin(), torch.zeros_like(hexagon)], dim=1)
    corners = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    line = torch.tensor([[-1.2, 0, 0], [0, 0, 0], [1.2, 0, 0]], dtype=torch.float64)
    parts = {
        "atom": ([a], torch.zeros(1, 3, dtype=torch.float64)),
        "diatomic": ([a, a], line[:2]),
        "linear": ([b, a, b], line),
        "planar": ([a] * 6 + [b] * 6, torch.cat([1.4 * ring, 2.5 * ring])),
        "tetrahedral": ([a, b, b, b, b], torch.cat([torch.zeros(1, 3, dtype=torch.float64), 0.63 * corners])),
    }
    return {name: build_graph(torch.tensor(z), pos, cutoff) for name, (z, pos) in parts.items()}


def crystal(elements: Sequence[int], cutoff: float) -> Graph:
    """Return a skewed cell of three atoms, so small that every atom sees its own images.

    Args:
        elements: atomic numbers to take in turn.
        cutoff: of the graph, Å.
    """
    cell = torch.tensor([[2.9, 0.0, 0.0], [0.7, 3.1, 0.0], [-0.5, 0.4, 3.4]], dtype=torch.float64)
    inside = torch.tensor([[0.05, 0.1, 0.1], [0.55, 0.45, 0.2], [0.3, 0.7, 0.7]], dtype=torch.float64)
    z = torch.tensor([elements[i % len(elements)] for i in range(3)])
    return build_graph(z, inside @ cell, cutoff, cell, (True, True, True))


def stretched(graph: Graph, cutoff: float) -> Graph:
    """Return a molecule scaled until its largest distance is 1.3 cutoffs: not all atoms are neighbours."""
    largest = torch.cdist(graph.pos, graph.pos).max()
    return rebuilt(graph, cutoff, graph.pos * (1.3 * cutoff / largest))


def rebuilt(graph: Graph, cutoff: float, pos: Tensor | None = None, cell: Tensor | None = None) -> Graph:
    """Return the graph of a single structure with its edges built anew.

    Args:
        graph: one structure; one with a cell repeats in all three directions.
        cutoff: Å.
        pos: new positions; None keeps them.
        cell: new cell ``[3, 3]``; None keeps it.
    """
    cell = graph.cell[0] if cell is None else cell
    periodic = bool((cell != 0).any())
    return build_graph(graph.z, graph.pos if pos is None else pos, cutoff, cell, (periodic,) * 3)
