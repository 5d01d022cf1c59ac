"""Are positions in Å? Bond lengths tell; energies and forces cannot, a wrong length cancels in their work."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets.frames import Frame
from ffpretrain.units import BOHR

_TOLERANCE = 0.15
# distance to the nearest atom over the sum of covalent radii, where the unit is wrong; 1 where it is right
_TOO_SHORT = {
    BOHR: "positions were in Å but were read as Bohr",
    0.1: "positions are in nm but were read as Å",
}
_TOO_LONG = {
    1 / BOHR: "positions are in Bohr but were read as Å",
    10.0: "positions were in Å but were read as nm",
}


def wrong_length_unit(frames: list[Frame]) -> str | None:
    """Return which unit the positions seem to be in, or None where nothing speaks against Å.

    Any atom can be too near to its neighbours; too far counts for hydrogen only, which is always bound to
    something, while noble gases and ions are not. Single atoms tell nothing.

    Args:
        frames: a few frames, in what should be Å.
    """
    ratios = [_contact_ratios(frame) for frame in frames if len(frame) > 1]
    if not ratios:
        return None
    every = float(np.median(np.concatenate([ratio for ratio, _ in ratios])))
    of_hydrogen = np.concatenate([ratio[hydrogen] for ratio, hydrogen in ratios])
    for expected, message in _TOO_SHORT.items():
        if abs(np.log(every / expected)) < _TOLERANCE:
            return message
    if len(of_hydrogen):
        for expected, message in _TOO_LONG.items():
            if abs(np.log(float(np.median(of_hydrogen)) / expected)) < _TOLERANCE:
                return message
    return None


def _contact_ratios(frame: Frame) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return each atom's smallest distance over the sum of covalent radii, and which atoms are hydrogen."""
    from ase.data import covalent_radii
    from ase.geometry import get_distances

    pbc = None if frame.cell is None else frame.pbc
    _, distances = get_distances(frame.positions, cell=frame.cell, pbc=pbc)
    radii = covalent_radii[frame.numbers]
    np.fill_diagonal(distances, np.inf)
    ratios: NDArray[np.float64] = (distances / (radii[:, None] + radii[None, :])).min(axis=1)
    return np.maximum(ratios, 1e-12), frame.numbers == 1
