"""The learned noise of each atom on the molecule, as in figure 5 of DenoiseVAE (Liu et al. 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ffpretrain.errors import ConfigError
from ffpretrain.md.landscapes.surface import Array
from ffpretrain.molecules import find_bonds
from ffpretrain.plots import new_figure

if TYPE_CHECKING:
    from ase import Atoms
    from matplotlib.figure import Figure

#: degrees, smallest first
_TILTS = (0, 10, -10, 20, -20, 30, -30, 40, -40)
_LABEL = "standard deviation of the learned noise (Å)"


def draw_noise(atoms: Atoms, sigma: Array) -> Figure:
    """Return a picture of a molecule whose atoms have the colour of their noise.

    It is seen along the direction in which it is thinnest, tilted where atoms would hide others; atoms are
    numbered from 0, nearer ones on top.

    Args:
        atoms: the structure.
        sigma: Å ``[N]``.

    Raises:
        ConfigError: not one number for each atom.
    """
    from ase.data import covalent_radii
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Circle

    if sigma.shape != (len(atoms),):
        raise ConfigError(f"sigma of shape {sigma.shape} for {len(atoms)} atoms; give one number for each")
    flat, depth = seen_flat(atoms.positions)
    scale = Normalize(*noise_range(sigma))
    colours = colormaps["viridis"]
    figure = new_figure(6.4, 4.8)
    axis = figure.subplots()
    for i, j, *_ in find_bonds(atoms.numbers, atoms.positions):
        axis.plot(*flat[[i, j]].T, color="0.45", lw=3, zorder=1)
    order = np.argsort(depth)
    for rank, i in enumerate(order):
        colour = colours(scale(sigma[i]))
        radius = 0.45 * float(covalent_radii[atoms.numbers[i]]) + 0.08
        spot = Circle((flat[i, 0], flat[i, 1]), radius, fc=colour, ec="0.2", lw=0.8, zorder=2 + rank)
        axis.add_patch(spot)
        light = float(np.dot(colour[:3], (0.299, 0.587, 0.114))) > 0.5
        name = f"{atoms.symbols[i]}{i}"
        axis.text(
            flat[i, 0],
            flat[i, 1],
            name,
            ha="center",
            va="center",
            fontsize=6,
            color="black" if light else "white",
            zorder=2 + rank,
        )
    axis.set_aspect("equal")
    axis.set_axis_off()
    axis.autoscale_view()
    from matplotlib.cm import ScalarMappable

    figure.colorbar(ScalarMappable(scale, colours), ax=axis, label=_LABEL)
    return figure


def noise_range(sigma: Array) -> tuple[float, float]:
    """Return the ends of the scale in Å; noise equal to 1e-6 Å has one colour, not a scale of rounding."""
    low, high = float(sigma.min()), float(sigma.max())
    return low, high if high - low > 1e-6 else low + 1e-6


def noise_colours(sigma: Array) -> list[str]:
    """Return the colour of each atom in the picture, as ``#rrggbb``."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, to_hex

    scale = Normalize(*noise_range(sigma))
    return [to_hex(colormaps["viridis"](scale(value))) for value in sigma]


def seen_flat(positions: Array) -> tuple[Array, Array]:
    """Return coordinates in a plane that shows as many atoms as can be ``[N, 2]``, and heights ``[N]``, in Å.

    Of the plane of largest extent, and others tilted by up to 40 degrees, it is the one in which the two
    nearest atoms are farthest apart.

    Args:
        positions: Å ``[N, 3]``.
    """
    off = positions - positions.mean(0)
    _, _, axes = np.linalg.svd(off, full_matrices=True)
    # the sign of each axis is free: the farthest atom decides, so that the picture is always the same
    for axis in axes:
        along = off @ axis
        axis *= np.sign(along[np.argmax(np.abs(along))]) or 1.0
    turned = off @ axes.T
    best, most = turned, -1.0
    for one in np.deg2rad(_TILTS):
        for other in np.deg2rad(_TILTS):
            tilted = turned @ _about(0, float(one)).T @ _about(1, float(other)).T
            apart = np.linalg.norm(tilted[:, None, :2] - tilted[:, :2], axis=-1)
            least = float(apart[~np.eye(len(apart), dtype=bool)].min()) if len(apart) > 1 else 0.0
            # a small tilt is kept unless a larger one shows clearly more
            if least > most + 0.05:
                best, most = tilted, least
    return best[:, :2], best[:, 2]


def _about(axis: int, angle: float) -> Array:
    """Return the rotation matrix about a coordinate axis."""
    i, j = [k for k in range(3) if k != axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix
