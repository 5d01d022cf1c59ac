"""Strained molecules must come back: what frames of a few hundred kelvin never show a network.

The data end where the hottest frame ends: at a bond some 15 % longer than at rest, at two hydrogens of one
carbon 1.45 Å apart. Beyond, a network makes something up. It takes bonded atoms that part for what it has
seen at that distance, atoms without a bond, and the force fades within a few tenths of an Å; two neighbours
of one atom that are pressed together attract each other below some distance. A hot replica now and then goes
through. A denoiser's first duty is the sign of its answer: a structure with one bond or angle far from rest
must come back. How strongly depends on the bond; a lower bound does not. So the loss is one-sided: with s the
length of the bond, or the distance across the angle, along the motion that strained it,

    mean over structures of max(0, least_force - (restoring force along s)) / scale

and it is zero, gradient included, wherever the network restores at least as strongly. It asks for no label
and does not pretend to know one.

The default bound, 1 eV/Å, is below what a closed-shell density functional gives: over the ranges that are
drawn from, PBE/def2-SVP restores every kind of bond and angle of ethanol with at least 1.6 eV/Å
(``examples/strain_with_pyscf.py``). It is a statement about molecules that stay whole: leave it out where
bonds break, and for solids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import Graph
from ffpretrain.molecules import find_bonds, neighbour_lists, side_of
from ffpretrain.noise import FrameGenerators

__all__ = ["STRAINS", "Strained", "check_strain", "every_strain", "strain", "strain_loss"]

#: ranges of strain, from the end next to what frames show: stretched bonds, in sums of covalent radii
STRETCHED = (1.2, 2.0)
#: lengths of compressed bonds, in lengths that they had
COMPRESSED = (0.8, 0.6)
#: closed angles, in angles that they had
CLOSED = (0.75, 0.35)
#: a structure is left alone where straining it brings atoms more than two bonds apart together, closer
#: than so many sums of their covalent radii: a hydrogen bond may well pass its proton on
CONTACT = 1.5

Array = NDArray[np.float64]


class Strained(NamedTuple):
    """Structures with one bond or angle of each far from rest.

    Attributes:
        pos: Å ``[N, 3]``.
        back: how atoms move on the way back, by Å of the bond or of the distance across the angle ``[N, 3]``.
        valid: structures that are strained, bool ``[B]``; the others are as they were.
    """

    pos: Tensor
    back: Tensor
    valid: Tensor


class Bonded(NamedTuple):
    """One molecule.

    Attributes:
        pos: Å ``[N, 3]``.
        radii: covalent radii in Å ``[N]``.
        bonds: pairs of atoms.
        lists: neighbours of each atom.
    """

    pos: Array
    radii: Array
    bonds: list[tuple[int, int]]
    lists: list[list[int]]


class Site(NamedTuple):
    """What can be strained.

    Attributes:
        atoms: the two of a bond, of which the second one moves, or the three of an angle, apex in the middle.
        sides: atoms that move as one, with the bond's second atom, or with either end of the angle.
    """

    atoms: tuple[int, ...]
    sides: tuple[list[int], ...]


class Strain(NamedTuple):
    """One molecule strained.

    Attributes:
        pos: Å ``[N, 3]``.
        back: as in :class:`Strained`.
    """

    pos: Array
    back: Array


class Kind(NamedTuple):
    """A kind of strain.

    Attributes:
        sites: finds where a molecule can be strained.
        strain: strains it there, as far as a number from 0 to 1 says; None where it is that far already.
    """

    sites: Callable[[Bonded], list[Site]]
    strain: Callable[[Bonded, Site, float], Strain | None]


def strain(
    graph: Graph, generator: torch.Generator, index: Tensor | None = None, kinds: Sequence[str] | None = None
) -> Strained:
    """Strain one bond or angle of each structure.

    Its kind is drawn with equal chance, then it itself among those of its kind, then how far, evenly.

    Args:
        graph: molecules; its edges are not read.
        generator: source of every draw, advanced by one.
        index: identifies each structure, see :class:`~ffpretrain.noise.FrameGenerators`.
        kinds: of :data:`STRAINS`; None takes all.

    Raises:
        DataError: a structure is periodic.
    """
    if bool((graph.cell != 0).any()):
        raise DataError(
            "only molecules are strained, and a structure is periodic; set objective.options.strain_weight=0"
        )
    chosen = [STRAINS[kind] for kind in (STRAINS if kinds is None else kinds)]
    pos = graph.pos.detach().double().cpu().numpy()
    z = graph.z.cpu().numpy()
    ends = np.cumsum(np.bincount(graph.batch.cpu().numpy(), minlength=graph.n_graphs))
    draws = FrameGenerators(generator, index, graph.n_graphs).uniform([2] * graph.n_graphs)
    moved, back = pos.copy(), np.zeros_like(pos)
    valid = np.zeros(graph.n_graphs, dtype=np.bool_)
    for b, (end, draw) in enumerate(zip(ends, draws, strict=True)):
        here = slice(ends[b - 1] if b else 0, end)
        which, how_far = draw.tolist()
        kind = int(which * len(chosen))
        molecule = _bonded(z[here], pos[here])
        sites = chosen[kind].sites(molecule)
        place = int((which * len(chosen) - kind) * len(sites))
        found = _strained(chosen[kind], molecule, sites[place], how_far) if sites else None
        if found is not None:
            moved[here], back[here], valid[b] = *found, True
    return Strained(
        torch.as_tensor(moved).to(graph.pos),
        torch.as_tensor(back).to(graph.pos),
        torch.as_tensor(valid, device=graph.pos.device),
    )


def strain_loss(forces: Tensor, strained: Strained, batch: Tensor, least_force: float) -> Tensor:
    """Return by how much each structure falls short of restoring, eV/Å ``[B]``; 0 where it does not.

    Args:
        forces: on the strained structures, eV/Å ``[N, 3]``.
        strained: of :func:`strain`.
        batch: structure of each atom ``[N]``.
        least_force: eV/Å.
    """
    along = (forces * strained.back.to(forces)).sum(-1)
    restoring = forces.new_zeros(len(strained.valid)).index_add(0, batch, along)
    return (least_force - restoring).clamp_min(0) * strained.valid


def check_strain(
    weight: float, probability: float, least_force: float, kinds: Sequence[str] | None, direct: bool
) -> None:
    """Check the options.

    Raises:
        ConfigError: one is out of range, or forces are no gradient of an energy.
    """
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"strain_weight={weight} must be finite and not negative")
    if not 0 < probability <= 1:
        raise ConfigError(f"strain_probability={probability} must lie above 0 and not exceed 1")
    if not 0 < least_force < float("inf"):
        raise ConfigError(f"strain_force={least_force} must be positive and finite; give it in eV/Å")
    if kinds is not None and (isinstance(kinds, str) or not kinds or not set(kinds) <= set(STRAINS)):
        raise ConfigError(f"strains={kinds!r} must be a list of some of: {', '.join(STRAINS)}")
    if weight and direct:
        raise ConfigError("strain_weight asks for forces that are a gradient: main_head: energy-gradient")


def every_strain(
    kind: str, numbers: Sequence[int], positions: Array, how_far: Sequence[float]
) -> Iterator[tuple[Site, list[Strain]]]:
    """Yield each bond or angle of a molecule with the structures in which it is strained.

    Args:
        kind: of :data:`STRAINS`.
        numbers: ``[N]``.
        positions: Å ``[N, 3]``.
        how_far: from 0, the nearer end of the range that is drawn from, to 1.
    """
    molecule = _bonded(np.asarray(numbers), np.asarray(positions, dtype=np.float64))
    for site in STRAINS[kind].sites(molecule):
        found = [_strained(STRAINS[kind], molecule, site, each) for each in how_far]
        yield site, [each for each in found if each is not None]


def parting_bonds(molecule: Bonded) -> list[Site]:
    """Find the bonds that part the molecule; the smaller side moves."""
    found = []
    everything = set(range(len(molecule.pos)))
    for a, b in molecule.bonds:
        side = side_of(molecule.lists, a, b)
        if a in side:
            continue
        if 2 * len(side) > len(everything):
            found.append(Site((b, a), (sorted(everything - side),)))
        else:
            found.append(Site((a, b), (sorted(side),)))
    return found


def parting_angles(molecule: Bonded) -> list[Site]:
    """Find the angles of which one bond at least parts the molecule; a side that does not move is empty."""
    found = []
    for apex, neighbours in enumerate(molecule.lists):
        hanging = [side_of(molecule.lists, apex, each) for each in neighbours]
        sides = [[] if apex in side else sorted(side) for side in hanging]
        for i, j in combinations(range(len(neighbours)), 2):
            if sides[i] or sides[j]:
                found.append(Site((neighbours[i], apex, neighbours[j]), (sides[i], sides[j])))
    return found


def stretched_bond(molecule: Bonded, site: Site, how_far: float) -> Strain | None:
    """Pull out a bond."""
    length = _between(STRETCHED, how_far) * molecule.radii[list(site.atoms)].sum()
    return _with_length(molecule, site, length, 1)


def compressed_bond(molecule: Bonded, site: Site, how_far: float) -> Strain | None:
    """Push in a bond."""
    a, b = site.atoms
    length = _between(COMPRESSED, how_far) * float(np.linalg.norm(molecule.pos[b] - molecule.pos[a]))
    return _with_length(molecule, site, length, -1)


def closed_angle(molecule: Bonded, site: Site, how_far: float) -> Strain | None:
    """Close an angle: what hangs on its ends turns around its apex, either side half of the way.

    Where one of the bonds is in a ring, the other one's side turns all the way; nothing else changes.
    """
    pos, apex = molecule.pos, molecule.pos[site.atoms[1]]
    arms = pos[[site.atoms[0], site.atoms[2]]] - apex
    lengths, normal = np.linalg.norm(arms, axis=1), np.cross(*arms)
    before = np.arctan2(np.linalg.norm(normal), arms[0] @ arms[1])
    after = _between(CLOSED, how_far) * before
    if not normal.any():
        return None
    normal /= np.linalg.norm(normal)
    apart = np.sqrt(lengths @ lengths - 2 * lengths.prod() * np.cos(after))
    by_distance = apart / (lengths.prod() * np.sin(after))  # change of the angle with the ends' distance
    share = 1 / sum(bool(side) for side in site.sides)
    moved, back = pos.copy(), np.zeros_like(pos)
    for side, turn in zip(site.sides, (share, -share), strict=True):
        moved[side] = apex + _turned(pos[side] - apex, normal, turn * (before - after))
        back[side] = -turn * by_distance * np.cross(normal, moved[side] - apex)
    return Strain(moved, back)


#: kinds of strain by their names in recipes
STRAINS = {
    "stretched-bonds": Kind(parting_bonds, stretched_bond),
    "compressed-bonds": Kind(parting_bonds, compressed_bond),
    "closed-angles": Kind(parting_angles, closed_angle),
}


def _bonded(z: NDArray[np.int64], pos: Array) -> Bonded:
    from ase.data import covalent_radii

    bonds = find_bonds(z, pos)
    pairs = [(a, b) for a, b, _ in bonds.tolist()]
    return Bonded(pos, covalent_radii[z], pairs, neighbour_lists(len(z), bonds))


def _strained(kind: Kind, molecule: Bonded, site: Site, how_far: float) -> Strain | None:
    found = kind.strain(molecule, site, how_far)
    return None if found is None or _in_contact(molecule, found) else found


def _between(ends: tuple[float, float], how_far: float) -> float:
    return ends[0] + how_far * (ends[1] - ends[0])


def _with_length(molecule: Bonded, site: Site, length: float, sign: int) -> Strain | None:
    """Return the molecule with a bond made longer (sign 1) or shorter (-1); None where it already is."""
    a, b = site.atoms
    axis = molecule.pos[b] - molecule.pos[a]
    change = length - np.linalg.norm(axis)
    if sign * change <= 0:
        return None
    direction = np.zeros_like(molecule.pos)
    direction[site.sides[0]] = axis / np.linalg.norm(axis)
    return Strain(molecule.pos + change * direction, -sign * direction)


def _turned(arms: Array, axis: Array, angle: float) -> Array:
    """Return vectors ``[n, 3]`` turned around a unit vector."""
    across = np.cross(axis, arms)
    return arms + np.sin(angle) * across + (1 - np.cos(angle)) * np.cross(axis, across)


def _in_contact(molecule: Bonded, strained: Strain) -> bool:
    """Say whether atoms came together that are more than two bonds apart; nearer ones only repel."""
    pos, radii = (molecule.pos, strained.pos), molecule.radii
    old, new = (np.linalg.norm(p[:, None] - p, axis=-1) for p in pos)
    close = (new < old - 1e-9) & (new < CONTACT * (radii[:, None] + radii))
    bonded = np.eye(len(radii), dtype=np.int64)
    for a, b in molecule.bonds:
        bonded[a, b] = bonded[b, a] = 1
    return bool((close & (bonded @ bonded == 0)).any())
