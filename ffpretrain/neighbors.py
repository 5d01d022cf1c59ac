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
        UnsupportedInputError: a periodic direction has no cell vector, the cell has no volume, or two atoms
            are at the same place, where a pair has no direction.
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
