"""Grids along directions of all atoms at once: random planes, normal modes, planes through conformations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.md.landscapes.surface import Array, Axis, Geometries, refuse_large

if TYPE_CHECKING:
    from ase import Atoms


def without_rigid_motion(directions: Array, atoms: Atoms) -> Array:
    """Return directions without their share in translations and, of a molecule, rotations.

    Args:
        directions: ``[K, N, 3]``, any unit.
        atoms: at which the rotations are taken, to first order. Atoms count alike, masses do not enter.
    """
    basis = rigid_motions(atoms)
    flat = directions.reshape(len(directions), -1)
    return (flat - (flat @ basis.T) @ basis).reshape(directions.shape)


def rigid_motions(atoms: Atoms) -> Array:
    """Return orthonormal translations and, where nothing is periodic, rotations ``[3 to 6, 3N]``."""
    n = len(atoms)
    moves = [np.tile(axis, n) for axis in np.eye(3)]
    if not atoms.pbc.any():
        off = atoms.positions - atoms.positions.mean(0)
        moves += [np.cross(axis, off).ravel() for axis in np.eye(3)]
    _, s, vt = np.linalg.svd(np.array(moves), full_matrices=False)
    return vt[s > 1e-8 * s[0]]


def random_plane(atoms: Atoms, points: int = 41, extent: float = 0.15, seed: int = 0) -> Geometries:
    """Return the plane ``X + i D1 + j D2`` along two random directions (3D-EMGP, Jiao et al. 2023, 4.4).

    The directions are drawn from a normal distribution, freed of rigid motions and made orthonormal, and then
    scaled such that a coordinate is the root mean square displacement of an atom. The same seed gives the
    same plane, so models can be compared on it.

    Args:
        atoms: the conformation X.
        points: along each axis; an odd number has X itself in the middle.
        extent: Å, largest coordinate.
        seed: of the directions.

    Raises:
        ConfigError: fewer than 3 points, or an extent not above zero.
        UnsupportedInputError: fewer than 3 atoms: no plane is left beside rigid motions.
    """
    if len(atoms) < 3:
        raise UnsupportedInputError("a plane needs at least 3 atoms: rigid motions leave no two directions")
    drawn = np.random.default_rng(seed).normal(size=(2, len(atoms), 3))
    first, second = orthonormal(without_rigid_motion(drawn, atoms))
    values = axis_values(points, extent)
    axes = (Axis("direction 1", "Å RMS", values), Axis("direction 2", "Å RMS", values))
    note = f"random plane, seed {seed}, rigid motions removed"
    return make_plane(atoms, axes, np.array([first, second]) * np.sqrt(len(atoms)), "plane", note)


def modes_plane(
    atoms: Atoms, modes: Array, which: Sequence[int], points: int = 41, extent: float = 0.15
) -> Geometries:
    """Return a line or plane along one or two normal modes.

    Args:
        atoms: the minimum.
        modes: displacements ``[K, N, 3]``, from the softest on.
        which: one or two numbers into ``modes``.
        points: along each axis.
        extent: Å, root mean square displacement of an atom.

    Raises:
        ConfigError: no such mode, or not one or two.
    """
    if not 1 <= len(which) <= 2 or any(not 0 <= k < len(modes) for k in which):
        raise ConfigError(f"modes {list(which)}: give one or two numbers from 0 to {len(modes) - 1}")
    unit = [modes[k] / np.linalg.norm(modes[k]) for k in which]
    values = axis_values(points, extent)
    axes = tuple(Axis(f"mode {k}", "Å RMS", values) for k in which)
    return make_plane(atoms, axes, np.array(unit) * np.sqrt(len(atoms)), "modes", "along normal modes")


def plane_through(structures: Sequence[Atoms], points: int = 41, margin: float = 0.25) -> Geometries:
    """Return the plane through three conformations of one molecule, turned onto the first.

    Args:
        structures: three, with the same elements in the same order.
        points: along each axis.
        margin: how far the grid reaches beyond the triangle, as a fraction of its sides.

    Raises:
        ConfigError: not three, of different elements, or on one line.
    """
    if len(structures) != 3 or any(list(s.numbers) != list(structures[0].numbers) for s in structures[1:]):
        raise ConfigError("give three conformations with the same elements in the same order")
    sides = [superimposed(s, structures[0]) - structures[0].positions for s in structures[1:]]
    lengths = [float(np.linalg.norm(side)) for side in sides]
    cosine = float(np.sum(sides[0] * sides[1])) / max(lengths[0] * lengths[1], 1e-300)
    if min(lengths) < 1e-6 or abs(cosine) > 1 - 1e-6:
        raise ConfigError("the three conformations are equal or lie on a line; give others")
    d1, d2 = orthonormal(np.array(sides))
    corner = np.array([[0.0, 0.0], [lengths[0], 0.0], [lengths[1] * cosine, float(np.sum(sides[1] * d2))]])
    low, high = corner.min(0), corner.max(0)
    reach = margin * (high - low).max()
    scale = np.sqrt(len(structures[0]))
    axes = tuple(
        Axis(f"direction {i + 1}", "Å RMS", np.linspace(low[i] - reach, high[i] + reach, points) / scale)
        for i in range(2)
    )
    note = "plane through three conformations, the first at zero"
    return make_plane(structures[0], axes, np.array([d1, d2]) * scale, "conformations", note)


def principal_plane(
    frames: Sequence[Atoms], points: int = 41, margin: float = 0.15
) -> tuple[Geometries, Array]:
    """Return the plane of the first two principal components of a trajectory, and the trajectory in it.

    Args:
        frames: of one molecule, at least three; each is turned onto the first, then onto their mean.
        points: along each axis.
        margin: how far the grid reaches beyond the trajectory, as a fraction of its width.

    Returns:
        The grid about the mean structure, and the frames' coordinates ``[T, 2]`` in Å RMS.

    Raises:
        ConfigError: fewer than three frames, or of different elements.
    """
    if len(frames) < 3 or any(list(f.numbers) != list(frames[0].numbers) for f in frames):
        raise ConfigError("principal components need at least three frames of one molecule")
    aligned = np.array([superimposed(frame, frames[0]) for frame in frames])
    mean = frames[0].copy()
    mean.positions = aligned.mean(0)
    aligned = np.array([superimposed(frame, mean) for frame in frames])
    mean.positions = aligned.mean(0)
    off = (aligned - mean.positions).reshape(len(frames), -1)
    _, _, vt = np.linalg.svd(off, full_matrices=False)
    scale = np.sqrt(len(mean))
    path = off @ vt[:2].T / scale
    low, high = path.min(0), path.max(0)
    reach = margin * (high - low).max()
    axes = tuple(
        Axis(f"component {i + 1}", "Å RMS", np.linspace(low[i] - reach, high[i] + reach, points))
        for i in range(2)
    )
    share = np.square(path).sum() * len(mean) / max(float(np.square(off).sum()), 1e-300)
    note = f"first two principal components of {len(frames)} frames, {share:.0%} of their motion"
    grid = make_plane(mean, axes, vt[:2].reshape(2, -1, 3) * scale, "principal components", note)
    return grid, path


def superimposed(moving: Atoms, onto: Atoms) -> Array:
    """Return positions turned and shifted onto another structure's, least squares (Kabsch 1976).

    Args:
        moving: ``N`` atoms.
        onto: the same atoms.
    """
    if onto.pbc.any():
        return moving.positions + (onto.positions - moving.positions).mean(0)
    a = moving.positions - moving.positions.mean(0)
    b = onto.positions - onto.positions.mean(0)
    u, _, vt = np.linalg.svd(a.T @ b)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return a @ (u @ flip @ vt) + onto.positions.mean(0)


def orthonormal(directions: Array) -> Array:
    """Return directions ``[K, N, 3]`` made orthonormal one after the other (Gram and Schmidt)."""
    found: list[Array] = []
    for direction in directions:
        rest = direction - sum((np.sum(direction * one) * one for one in found), np.zeros_like(direction))
        found.append(rest / np.linalg.norm(rest))
    return np.array(found)


def axis_values(points: int, extent: float) -> Array:
    """Return ``points`` values from ``-extent`` to ``extent``.

    Raises:
        ConfigError: fewer than 3 points, or an extent not above zero.
    """
    if points < 3:
        raise ConfigError(f"points={points}: give at least 3")
    if not 0 < extent < np.inf:
        raise ConfigError(f"extent={extent}: give a displacement above zero, in Å")
    return np.linspace(-extent, extent, points)


def make_plane(
    atoms: Atoms, axes: tuple[Axis, ...], steps: Array, kind: str, note: str, noise: Array | None = None
) -> Geometries:
    """Return ``X + sum_k value_k * steps[k]`` for all values of the axes.

    Args:
        atoms: the structure X.
        axes: one or two.
        steps: displacement per unit of each axis ``[K, N, 3]``.
        kind: as in :class:`Geometries`.
        note: likewise.
        noise: likewise.
    """
    refuse_large(tuple(len(axis.values) for axis in axes), len(atoms))
    positions = atoms.positions
    for k in reversed(range(len(axes))):
        move = axes[k].values.reshape(-1, *[1] * (len(axes) - 1 - k), 1, 1) * steps[k]
        positions = positions + move
    return Geometries(atoms, axes, positions, kind, note, noise)
