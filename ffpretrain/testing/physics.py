"""Checks of the energy surface: forces, smoothness, atoms alone, parts far apart, layouts, derivatives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffpretrain.graphs import Graph, batch_graphs, build_graph
from ffpretrain.pairs import DensePairs
from ffpretrain.potential import Potential
from ffpretrain.testing.outputs import (
    STENCIL,
    Model,
    SymmetryError,
    compare,
    cutoff_of,
    evaluate,
    require_double,
    tolerance_for,
)

#: displaced copies that :func:`check_forces` evaluates at once, so that large networks fit into memory
_COPIES = 24


def check_forces(model: Model, graph: Graph, *, step: float = 5e-4, tolerance: float = 1e-6) -> float:
    """Check forces against finite differences of the energy.

    Args:
        model: in float64.
        graph: one structure; its edges are kept.
        step: Å.
        tolerance: relative to the largest force.

    Returns:
        The largest difference found, relative to the largest force.

    Raises:
        SymmetryError: forces are not the negative gradient of the energy, or all are zero.
        ValueError: the model is in single precision.
    """
    require_double(model, "check_forces")
    forces = evaluate(model, graph)["forces"]
    if len(graph.z) > 1 and not bool(forces.abs().max() > 0):
        raise SymmetryError("all forces are zero: the energy does not depend on the positions")
    copies, weights = [], []
    for coordinate in range(graph.pos.numel()):
        for k, weight in STENCIL:
            pos = graph.pos.clone()
            pos.view(-1)[coordinate] += k * step
            copies.append(graph._replace(pos=pos))
            weights.append(weight / step)
    batches = [batch_graphs(copies[i : i + _COPIES]) for i in range(0, len(copies), _COPIES)]
    energy = torch.cat([model(batch)["energy"].detach().double() for batch in batches])
    slope = (energy * energy.new_tensor(weights)).view(-1, len(STENCIL)).sum(1).view_as(forces)
    return compare(
        "forces against finite differences", {"forces": forces}, {"forces": -slope}, tolerance, floor=1e-6
    )


def check_smoothness(model: Model, elements: Sequence[int], *, tolerance: float = 1e-6) -> float:
    """Check that energy and forces do not jump where an atom crosses the cutoff.

    An atom leaves a diatomic: first the far atom's sphere, then, as its last neighbour, the near atom's. The
    jump is what is left of the difference across the cutoff when the distance to it goes to zero.

    Args:
        model: has an attribute ``cutoff``; in float64.
        elements: atomic numbers to use, at least one.
        tolerance: relative to the largest force met.

    Returns:
        The largest jump, relative to the largest force met.

    Raises:
        SymmetryError: energy (in eV per Å of force scale) or forces jump.
        ValueError: the model is in single precision.
    """
    require_double(model, "check_smoothness")
    cutoff = cutoff_of(model)
    a, b, c = (elements[i % len(elements)] for i in range(3))
    direction = torch.tensor([0.8, 0.36, 0.48], dtype=torch.float64)
    far, near = torch.zeros(3, dtype=torch.float64), torch.tensor([0.9, 0.5, -0.3], dtype=torch.float64)
    z = torch.tensor([a, b, c])
    largest = 0.0
    for left in (far, near):
        results = []
        for offset in (-1e-4, 1e-4, -1e-6, 1e-6):
            pos = torch.stack([far, near, left + direction * (cutoff + offset)])
            results.append(evaluate(model, build_graph(z, pos, cutoff)))
        scale = max(float(out["forces"].abs().max()) for out in results)
        for name in ("energy", "forces"):
            wide, narrow = (results[i + 1][name] - results[i][name] for i in (0, 2))
            # the part that shrinks with the offset cancels
            jump = float((narrow - wide * 1e-2).abs().max()) / (1 - 1e-2)
            if not jump <= tolerance * scale:
                raise SymmetryError(
                    f"smoothness at the cutoff: {name} jumps by {jump:.3e} where an atom passes {cutoff} Å; "
                    f"the largest force is {scale:.3e}, the tolerance {tolerance:.0e} of it"
                )
            largest = max(largest, jump / max(scale, 1e-12))
    return largest


def check_isolated_atoms(model: Model, elements: Sequence[int], *, tolerance: float | None = None) -> None:
    """Check atoms without neighbours: finite energy, no force, and two out of reach add up.

    Args:
        model: has an attribute ``cutoff``.
        elements: atomic numbers to try.
        tolerance: relative; None takes 1e-9 in float64, else 1e-4.

    Raises:
        SymmetryError: an energy is not finite, a force is not zero, or atoms out of reach interact.
    """
    cutoff = cutoff_of(model)
    origin = torch.zeros(1, 3, dtype=torch.float64)
    alone = [build_graph(torch.tensor([z]), origin, cutoff) for z in elements]
    single = [evaluate(model, graph) for graph in alone]
    limit = tolerance_for(model, alone[0], tolerance)
    for z, out in zip(elements, single, strict=True):
        if not bool(torch.isfinite(out["energy"]).all()):
            raise SymmetryError(f"isolated atoms: the energy of element {z} alone is not finite")
        still = {k: torch.zeros_like(v) for k, v in out.items() if k in ("forces", "vectors")}
        compare(f"isolated atoms: element {z} alone", out, still, limit)
    line = torch.arange(len(elements)).unsqueeze(1) * torch.tensor([[0.0, 0.0, cutoff * (1 + 1e-6)]])
    apart = evaluate(model, build_graph(torch.tensor(list(elements)), line.double(), cutoff))
    want = {name: torch.cat([out[name] for out in single]) for name in single[0]}
    want["energy"] = want["energy"].sum(0, keepdim=True)
    compare("isolated atoms out of reach", apart, want, limit)


def check_size_consistency(
    model: Model, first: Graph, second: Graph, *, tolerance: float | None = None
) -> None:
    """Check that molecules out of each other's reach have the sum of their energies, and their own forces.

    Args:
        model: has an attribute ``cutoff``.
        first: one molecule.
        second: another.
        tolerance: as :func:`check_isolated_atoms`.

    Raises:
        SymmetryError: the molecules interact, or the energy has a part that does not grow with size.
    """
    cutoff = cutoff_of(model)
    away = second.pos - second.pos.min(0).values + first.pos.max(0).values + cutoff
    both = build_graph(torch.cat([first.z, second.z]), torch.cat([first.pos, away]), cutoff)
    parts = [evaluate(model, graph) for graph in (first, second)]
    want = {name: torch.cat([out[name] for out in parts]) for name in parts[0]}
    want["energy"] = want["energy"].sum(0, keepdim=True)
    limit = tolerance_for(model, first, tolerance)
    compare("size consistency", evaluate(model, both), want, limit)


class DenseModel(nn.Module):
    """A potential's network evaluated with every pair kept (:class:`~ffpretrain.pairs.DensePairs`).

    Args:
        potential: its backbone must send nothing beyond the cutoff.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        """Return energies, forces and features of a batch of equally large molecules."""
        potential = self.potential
        with torch.enable_grad():
            pos = graph.pos if graph.pos.requires_grad else graph.pos.detach().requires_grad_(True)
            pairs = DensePairs(pos, graph.n_graphs, potential.dtype)
            features = potential.backbone.encode(graph.z, pairs)
            energies = potential.atomic_energies(features, graph.z)
            energy = energies.view(graph.n_graphs, -1).sum(1) + potential.shift
            forces = -torch.autograd.grad(
                energy.sum(), pos, create_graph=self.training, retain_graph=True, materialize_grads=True
            )[0]
        out = {"energy": energy, "energies": energies, "forces": forces, "scalars": features.scalars}
        return out if features.vectors is None else {**out, "vectors": features.vectors}


def check_layouts(potential: Potential, graphs: Sequence[Graph], *, tolerance: float | None = None) -> None:
    """Check that a list of edges and the matrix of all pairs give the same result.

    Args:
        potential: any.
        graphs: molecules of one size, best with pairs beyond the cutoff.
        tolerance: as :func:`check_isolated_atoms`.

    Raises:
        SymmetryError: the two layouts differ: a pair beyond the cutoff or of an atom with itself counts.
    """
    batch = batch_graphs(graphs)
    limit = tolerance_for(potential, batch, tolerance)
    dense = evaluate(DenseModel(potential).eval(), batch)
    compare("dense layout", dense, evaluate(potential, batch), limit)


def check_precision(potential: Potential, graph: Graph, *, tolerance: float = 1e-4) -> None:
    """Check that float32 weights give the forces and energy differences of float64 ones.

    Args:
        potential: any precision; copies are cast.
        graph: one structure in float64.
        tolerance: relative to the largest force, and to the largest energy without reference energies.

    Raises:
        SymmetryError: single precision is worse than the tolerance.
    """
    results = []
    # start from float32 values, so that both copies have the very same weights
    single = copy.deepcopy(potential).float()
    for model in (single, copy.deepcopy(single).double()):
        out = evaluate(model, graph)
        network = out["energies"] - potential.reference[graph.z]
        results.append({"forces": out["forces"], "network energies": network})
    compare("float32 against float64", results[0], results[1], tolerance)


def check_second_derivatives(model: nn.Module, graph: Graph) -> None:
    """Check that what training on forces differentiates is finite.

    Takes the gradient of ``energy + |forces|²`` by every parameter and by the positions, in training mode.

    Args:
        model: a potential or :class:`DenseModel`; its mode is put back.
        graph: best one where vectors vanish: an atom alone, a linear, planar or tetrahedral molecule.

    Raises:
        SymmetryError: a derivative is not finite; the message names the parameter.
    """
    mode = model.training
    model.train()
    try:
        pos = graph.pos.detach().clone().requires_grad_(True)
        out: dict[str, Any] = model(graph._replace(pos=pos))
        loss = out["energy"].sum() + out["forces"].square().sum()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"positions": pos}
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    finally:
        model.train(mode)
    bad = [name for name, grad in zip(named, grads, strict=True) if grad is not None and not _finite(grad)]
    if bad or not _finite(loss):
        raise SymmetryError(f"second derivatives: not finite for {', '.join(bad) or 'the loss'}")


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
