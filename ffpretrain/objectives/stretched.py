"""Stretched bonds must pull back: what frames of a few hundred kelvin never show a network.

The data end where the hottest frame ends, at a bond some 15 % longer than at rest. Beyond, a network of atoms
within a cutoff takes bonded atoms for what it has seen at that distance, atoms that are not bonded; the force
fades within a few tenths of an Å, and at a temperature above that of the data a replica now and then
goes through. A denoiser's first duty is the sign of its answer: a structure with one bond pulled out must be
pulled back. How strongly depends on the bond; a lower bound does not. So the loss is one-sided: with s the
length of the bond and the smaller side of the molecule moved along it,

    mean over structures of max(0, least_force - dE/ds) / scale

and it is zero, gradient included, wherever the network pulls back at least as strongly. It asks for no label
and does not pretend to know one.

The default bound, 1 eV/Å, is below what a closed-shell density functional gives: PBE/def2-SVP pulls back each
kind of bond of ethanol with 1.6 to 5.4 eV/Å between 1.2 and 2 times the sum of the covalent radii
(``examples/stretch_with_pyscf.py``). It is a statement about molecules that stay whole: leave it out where
bonds break, and for solids.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import Graph
from ffpretrain.molecules import find_bonds, neighbour_lists, side_of
from ffpretrain.noise import FrameGenerators

__all__ = ["Stretched", "check_stretch", "stretch_bonds", "stretch_loss"]

#: lengths drawn, in sums of covalent radii; hardly a frame at a few hundred kelvin reaches the first
SHORTEST, LONGEST = 1.2, 2.0
#: a bond is left alone where stretching it brings atoms of its two sides together, closer than so many sums
#: of their radii: a hydrogen bond may well pass its proton on
CONTACT = 1.5


class Stretched(NamedTuple):
    """Structures with one bond of each pulled out.

    Attributes:
        pos: Å ``[N, 3]``.
        direction: by how much an atom moves as the bond grows ``[N, 3]``: a unit vector, or zero.
        valid: structures that have such a bond, bool ``[B]``; the others are as they were.
    """

    pos: Tensor
    direction: Tensor
    valid: Tensor


def stretch_bonds(graph: Graph, generator: torch.Generator, index: Tensor | None = None) -> Stretched:
    """Pull out one bond of each structure, drawn with equal chance, to a length drawn evenly.

    Only bonds that part a molecule are drawn; the smaller side moves, along the bond.

    Args:
        graph: molecules; its edges are not read.
        generator: source of every draw, advanced by one.
        index: identifies each structure, see :class:`~ffpretrain.noise.FrameGenerators`.

    Raises:
        DataError: a structure is periodic.
    """
    if bool((graph.cell != 0).any()):
        raise DataError("stretch_weight is for molecules, and a structure is periodic; set it to 0")
    pos = graph.pos.detach().double().cpu().numpy()
    z = graph.z.cpu().numpy()
    ends = np.cumsum(np.bincount(graph.batch.cpu().numpy(), minlength=graph.n_graphs))
    draws = FrameGenerators(generator, index, graph.n_graphs).uniform([2] * graph.n_graphs)
    moved, direction = pos.copy(), np.zeros_like(pos)
    valid = np.zeros(graph.n_graphs, dtype=np.bool_)
    for b, (end, draw) in enumerate(zip(ends, draws, strict=True)):
        here = slice(ends[b - 1] if b else 0, end)
        found = _stretch(z[here], pos[here], *draw.tolist())
        if found is not None:
            moved[here], direction[here], valid[b] = *found, True
    return Stretched(
        torch.as_tensor(moved).to(graph.pos),
        torch.as_tensor(direction).to(graph.pos),
        torch.as_tensor(valid, device=graph.pos.device),
    )


def stretch_loss(forces: Tensor, stretched: Stretched, batch: Tensor, least_force: float) -> Tensor:
    """Return by how much each structure falls short of pulling back, eV/Å ``[B]``; 0 where it does not.

    Args:
        forces: on the stretched structures, eV/Å ``[N, 3]``.
        stretched: of :func:`stretch_bonds`.
        batch: structure of each atom ``[N]``.
        least_force: eV/Å.
    """
    outward = (forces * stretched.direction.to(forces)).sum(-1)
    pulled = forces.new_zeros(len(stretched.valid)).index_add(0, batch, -outward)
    return (least_force - pulled).clamp_min(0) * stretched.valid


def check_stretch(weight: float, probability: float, least_force: float, direct: bool) -> None:
    """Check the options.

    Raises:
        ConfigError: one is out of range, or forces are no gradient of an energy.
    """
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"stretch_weight={weight} must be finite and not negative")
    if not 0 < probability <= 1:
        raise ConfigError(f"stretch_probability={probability} must lie above 0 and not exceed 1")
    if not 0 < least_force < float("inf"):
        raise ConfigError(f"stretch_force={least_force} must be positive and finite; give it in eV/Å")
    if weight and direct:
        raise ConfigError("stretch_weight asks for forces that are a gradient: main_head: energy-gradient")


def _stretch(
    z: NDArray[np.int64], pos: NDArray[np.float64], which: float, how_far: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return positions and direction of one molecule with a bond pulled out, or None where none can be."""
    from ase.data import covalent_radii

    bonds = find_bonds(z, pos)
    lists = neighbour_lists(len(z), bonds)
    sides = [(a, b, side_of(lists, a, b)) for a, b in bonds[:, :2].tolist()]
    parting = [(a, b, side) for a, b, side in sides if a not in side]
    if not parting:
        return None
    a, b, side = parting[int(which * len(parting))]
    if 2 * len(side) > len(z):
        a, b, side = b, a, set(range(len(z))) - side
    radii = covalent_radii[z]
    axis = pos[b] - pos[a]
    length = np.linalg.norm(axis)
    target = (SHORTEST + how_far * (LONGEST - SHORTEST)) * (radii[a] + radii[b])
    if target <= length:
        return None
    direction = np.zeros_like(pos)
    direction[sorted(side)] = axis / length
    moved = pos + (target - length) * direction
    return None if _in_contact(radii, pos, moved, (a, b), sorted(side)) else (moved, direction)


def _in_contact(
    radii: NDArray[np.float64],
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    bond: tuple[int, int],
    side: list[int],
) -> bool:
    """Say whether atoms of the two sides came together, other than those of the bond."""
    others = np.setdiff1d(np.arange(len(radii)), side)
    old, new = (np.linalg.norm(p[others, None] - p[side], axis=-1) for p in (before, after))
    close = (new < old) & (new < CONTACT * (radii[others, None] + radii[side]))
    close[np.ix_(others == bond[0], np.array(side) == bond[1])] = False
    return bool(close.any())
