"""Closed forms that losses are read against: what no equivariant network can take from noise.

Terms of an objective that are called ``zero``, ``floor`` and ``chance``, alone or after the name of another
term, are such references; :func:`describe` prints them beside what they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, atoms_per_graph

#: kinds of references and what they are called: the cost of predicting nothing, the least an equivariant
#: network pays, the cost of guessing
REFERENCES = {"zero": "zero predictor", "floor": "floor", "chance": "chance"}

#: Å, root mean square distance from its axis below which a molecule counts as linear
_LINEAR = 0.01


def rigid_body_floor(n_atoms: int, linear: bool = False) -> float:
    """Return the smallest loss any E(3)-equivariant denoiser reaches on a molecule in vacuum.

    Displacements along rigid motions cannot be told from the noisy structure, so their share of the noise
    stays as error: ``6 / (3 N)`` per component in units of the noise variance, ``5 / (3 N)`` for a linear
    molecule, ``3 / 3`` for an atom. Holds for small noise that is neither centred nor aligned, whatever its
    size on each atom. A loss below it over many structures is a leak or an error.

    Args:
        n_atoms: number of atoms N.
        linear: all atoms on a line; two atoms always are.

    Raises:
        ConfigError: no atoms.
    """
    if n_atoms < 1:
        raise ConfigError(f"rigid_body_floor: n_atoms={n_atoms}; give at least 1")
    modes = 3 if n_atoms == 1 else 5 if linear or n_atoms == 2 else 6
    return modes / (3 * n_atoms)


def rigid_modes(graph: Graph) -> Tensor:
    """Return the number of rigid motions of each structure, int64 ``[B]``.

    A lattice vector keeps the structure from turning, but for turns about the vector itself where it is the
    only one.
    """
    count = atoms_per_graph(graph)
    pos = graph.pos.to(torch.float64)
    mean = pos.new_zeros(graph.n_graphs, 3).index_add(0, graph.batch, pos) / count.unsqueeze(1)
    off = pos - mean[graph.batch]
    outer = off.unsqueeze(2) * off.unsqueeze(1)
    gyration = pos.new_zeros(graph.n_graphs, 3, 3).index_add(0, graph.batch, outer) / count.view(-1, 1, 1)
    spread = torch.linalg.eigvalsh(gyration)
    # distance from the axis takes the two smaller moments, from the centre all three
    turns = torch.full_like(count, 3)
    turns[spread[:, :2].sum(1) < _LINEAR**2] = 2
    turns[spread.sum(1) < _LINEAR**2] = 0
    vectors = (graph.cell != 0).any(2).sum(1)
    return 3 + torch.where(vectors == 0, turns, (vectors == 1).to(turns))


def batch_floor(graph: Graph) -> Tensor:
    """Return the rigid modes of a batch over its number of components: the floor of its mean loss."""
    return rigid_modes(graph).sum() / (3 * len(graph.z))


def is_reference(name: str) -> bool:
    """Whether a term is not part of the loss but something to read a term against."""
    return name.rpartition("_")[2] in REFERENCES


def describe(terms: Mapping[str, float]) -> str:
    """Return terms and what they are read against, such as ``loss 0.31 (zero predictor 1, floor 0.11)``.

    Args:
        terms: of an objective, ``loss`` among them; terms without a reference are left out.
    """
    shown = []
    for name in ("loss", *(name for name in terms if name != "loss" and not is_reference(name))):
        prefix = "" if name == "loss" else f"{name}_"
        found = {said: terms[prefix + kind] for kind, said in REFERENCES.items() if prefix + kind in terms}
        if name == "loss" or found:
            beside = ", ".join(f"{said} {value:.3g}" for said, value in found.items())
            shown.append(f"{name} {terms[name]:.4g}" + (f" ({beside})" if beside else ""))
    return "; ".join(shown)
