"""Neighbour lists: all pairs for small molecules, matscipy's cell list for everything else.

matscipy was the fastest of the lists compared that needs no compiler and handles every cell; below about 200
atoms in vacuum a plain all-pairs distance matrix beats it and needs no copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.errors import UnsupportedInputError

#: above this number of atoms the all-pairs matrix is slower than a cell list, and its memory grows as N²
DENSE_LIMIT = 200
#: Å between an atom and its own image: no two atoms but those of H2 come as close
IMAGE_DISTANCE = 1.0
#: Å³ for each atom of a cell that repeats in all directions: diamond has 5.7, hydrogen at 500 GPa still 1.3
VOLUME_PER_ATOM = 1.0


def neighbor_list(
    pos: Tensor, cutoff: float, cell: Tensor | None = None, pbc: Sequence[bool] = (False, False, False)
) -> tuple[Tensor, Tensor]:
    """Return all ordered pairs closer than the cutoff, sorted by centre.

    Args:
        pos: positions ``[N, 3]`` Å.
        cutoff: Å; pairs at exactly this distance are left out.
        cell: lattice vectors in rows ``[3, 3]`` Å; only read where ``pbc`` is set.
        pbc: which directions repeat.

    Returns:
        ``edge_index [2, E]`` (neighbour, centre) and ``edge_shift [E, 3]`` in Å, on the device of ``pos``.

    Raises:
        UnsupportedInputError: a periodic direction has no cell vector, the cell has no volume or is too small
            for atoms, or two atoms are at the same place, where a pair has no direction.
    """
    if not any(pbc) and len(pos) <= DENSE_LIMIT:
        return _all_pairs(pos, cutoff)
    return _cell_list(pos, cutoff, cell, pbc)


def _all_pairs(pos: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        delta = pos.unsqueeze(0) - pos.unsqueeze(1)
        squared = (delta * delta).sum(-1)
        near = squared < cutoff * cutoff
        near.fill_diagonal_(False)
        center, neighbor = near.nonzero(as_tuple=True)
        _check_apart(squared[center, neighbor], center, neighbor)
        return torch.stack([neighbor, center]), pos.new_zeros(len(center), 3)


def _cell_list(pos: Tensor, cutoff: float, cell: Tensor | None, pbc: Sequence[bool]) -> tuple[Tensor, Tensor]:
    from matscipy.neighbours import neighbour_list

    xyz = pos.detach().to("cpu", torch.float64).numpy()
    if any(pbc):
        box = _checked_cell(cell, pbc)
        refuse_crowded(box, pbc, len(xyz))
    else:
        # matscipy wants a cell that holds the atoms; without periodicity its shape does not matter
        box = np.diag(np.ptp(xyz, axis=0) + 2 * cutoff)
        xyz = xyz - xyz.min(axis=0) + cutoff
    center, neighbor, shift, distance = neighbour_list(
        "ijSd", positions=xyz, cell=box, pbc=list(pbc), cutoff=float(cutoff)
    )
    _check_apart(torch.from_numpy(distance), center, neighbor)
    edge_index = torch.from_numpy(np.stack([neighbor, center]).astype(np.int64))
    edge_shift = torch.from_numpy(shift.astype(np.float64) @ box)
    return edge_index.to(pos.device), edge_shift.to(pos)


def _check_apart(
    distance: Tensor, center: Tensor | NDArray[np.int32], neighbor: Tensor | NDArray[np.int32]
) -> None:
    together = distance == 0
    if bool(together.any()):
        first = int(together.nonzero()[0])
        raise UnsupportedInputError(
            f"atoms {int(center[first])} and {int(neighbor[first])} are at the same place; move or remove one"
        )


def _checked_cell(cell: Tensor | None, pbc: Sequence[bool]) -> NDArray[np.float64]:
    from ase.geometry import complete_cell

    if cell is None:
        raise UnsupportedInputError(
            "the structure is periodic but has no cell; set atoms.cell or atoms.pbc=False"
        )
    raw = cell.detach().to("cpu", torch.float64).numpy()
    missing = [axis for axis in range(3) if pbc[axis] and not np.any(raw[axis])]
    if missing:
        raise UnsupportedInputError(
            f"direction {missing[0]} is periodic but its cell vector is zero; set the cell or switch pbc off"
        )
    box = np.asarray(complete_cell(raw))
    if abs(np.linalg.det(box)) < 1e-6:
        raise UnsupportedInputError("the cell has no volume; its vectors must be linearly independent")
    return box


def refuse_crowded(cell: NDArray[np.float64], pbc: Sequence[bool], n_atoms: int) -> None:
    """Refuse a cell that is too small for any matter, before its images fill the memory.

    It is a slip in the units as a rule. The bounds are those of atoms, not of a cutoff: primitive cells of
    metals repeat within 2.5 Å, a chain of carbon within 1.3 Å.

    Args:
        cell: lattice vectors in rows ``[3, 3]`` Å, which span a volume.
        pbc: which directions repeat; at least one.
        n_atoms: in the cell.

    Raises:
        UnsupportedInputError: an atom would be closer than :data:`IMAGE_DISTANCE` to its own image, or the
            atoms of a crystal would have less than :data:`VOLUME_PER_ATOM` each.
    """
    mend = "check the units: these are Å, OpenMM and GROMACS write nm"
    distance = _image_distance(cell, pbc)
    if distance < IMAGE_DISTANCE:
        raise UnsupportedInputError(
            f"in this cell an atom is {distance:.3g} Å from its own image, closer than atoms come "
            f"({IMAGE_DISTANCE:g} Å); {mend}"
        )
    volume = abs(float(np.linalg.det(cell)))
    if all(pbc) and volume < VOLUME_PER_ATOM * n_atoms:
        raise UnsupportedInputError(
            f"the cell has {volume:.3g} Å³ for {n_atoms} atoms, less than the {VOLUME_PER_ATOM:g} Å³ that an "
            f"atom takes under any pressure; {mend}"
        )


def _image_distance(cell: NDArray[np.float64], pbc: Sequence[bool]) -> float:
    """Return a lower bound in Å of the distance between images; it is exact where it is below the limit."""
    from ase.geometry import minkowski_reduce

    vectors = cell[np.asarray(pbc, dtype=bool)]
    # heights are quick to find, but a skewed choice of vectors has small ones on any lattice
    heights = 1.0 / np.sqrt(np.diag(np.linalg.inv(vectors @ vectors.T)))
    if heights.min() >= IMAGE_DISTANCE:
        return float(heights.min())
    reduced = minkowski_reduce(cell, [bool(p) for p in pbc])[0][np.asarray(pbc, dtype=bool)]
    return float(np.linalg.norm(reduced, axis=1).min())
