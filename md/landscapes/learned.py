"""Directions, and noise of each atom, from a DenoiseVAE model's generator (Liu et al. 2025, A.11)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ffpretrain.artifacts import load_potential
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import graph_from_atoms
from ffpretrain.md.landscapes.planes import axis_values, make_plane, orthonormal, without_rigid_motion
from ffpretrain.md.landscapes.surface import Array, Axis, Geometries
from ffpretrain.objectives.noise_generator import FieldWithNoise

if TYPE_CHECKING:
    from ase import Atoms


def open_generator(model: Any) -> FieldWithNoise:
    """Return a model that holds a noise generator.

    Args:
        model: the name or file of a DenoiseVAE model, or what its ``potential()`` gives.

    Raises:
        ArtifactError: no such model.
        ConfigError: it holds no generator.
    """
    found = load_potential(model)
    if isinstance(found, FieldWithNoise):
        return found
    name = found.card.name if found.card is not None else type(found).__name__
    raise ConfigError(
        f"{name}: holds no noise generator to draw directions from; give a model that was pretrained with "
        "denoisevae and objective.options.keep_generator: true"
    )


def noise_scale(model: Any, atoms: Atoms) -> Array:
    """Return the standard deviation of the learned noise of each atom in Å ``[N]`` (eq. 4).

    Args:
        model: of :func:`open_generator`.
        atoms: a structure, best at rest: the generator was trained on clean ones.

    Raises:
        ArtifactError, ConfigError: as :func:`open_generator`.
        UnsupportedInputError: an element the generator never saw.
    """
    generator = open_generator(model)
    sigma = generator.noise_scale(graph_from_atoms(atoms, generator.cutoff))
    return np.asarray(sigma.double().numpy())


def learned_plane(
    atoms: Atoms, model: Any, points: int = 41, extent: float = 0.15, seed: int = 0
) -> Geometries:
    """Return the plane ``X + i G1 + j G2`` along two draws of the learned noise (DenoiseVAE, A.11).

    As for :func:`~ffpretrain.md.landscapes.random_plane` the draws are freed of rigid motions, made
    orthonormal and scaled such that a coordinate is the root mean square displacement of an atom; what is
    learned is how that is shared among the atoms. The grid keeps the noise of each atom.

    Args:
        atoms: the conformation X.
        model: of :func:`open_generator`; need not be the model whose energies are drawn.
        points: along each axis; an odd number has X itself in the middle.
        extent: Å, largest coordinate.
        seed: of the draws.

    Raises:
        ArtifactError, ConfigError: as :func:`open_generator`; fewer than 3 points, or an extent not above 0.
        UnsupportedInputError: fewer than 3 atoms, or an element the generator never saw.
    """
    if len(atoms) < 3:
        raise UnsupportedInputError("a plane needs at least 3 atoms: rigid motions leave no two directions")
    values = axis_values(points, extent)
    field = open_generator(model)
    graph = graph_from_atoms(atoms, field.cutoff)
    stream = torch.Generator().manual_seed(seed)
    drawn = np.array([field.draw_noise(graph, stream).double().numpy() for _ in range(2)])
    first, second = orthonormal(without_rigid_motion(drawn, atoms))
    sigma = noise_scale(field, atoms)
    name = field.card.name if field.card is not None else "a noise generator"
    note = (
        f"directions drawn from the noise of {name}, seed {seed}, rigid motions removed; "
        f"noise of an atom {sigma.min():.3f} to {sigma.max():.3f} Å"
    )
    axes = tuple(Axis(f"learned direction {k}", "Å RMS", values) for k in (1, 2))
    steps = np.array([first, second]) * np.sqrt(len(atoms))
    return make_plane(atoms, axes, steps, "learned plane", note, sigma)


def energy_response(compute: Any, atoms: Atoms, step: float, draws: int = 4, seed: int = 0) -> Array:
    """Return how much the energy rises when one atom alone is displaced, eV ``[N]`` (tables of figure 5).

    The mean over random directions, each taken forward and backward, so that the force drops out.

    Args:
        compute: from structures to energies in eV and forces, as
            :attr:`~ffpretrain.md.landscapes.evaluate.Evaluator.compute`.
        atoms: the structure, best at rest.
        step: Å, length of the displacement, the same for every atom.
        draws: directions for each atom.
        seed: of the directions.
    """
    directions = np.random.default_rng(seed).normal(size=(len(atoms), draws, 3))
    directions *= step / np.linalg.norm(directions, axis=-1, keepdims=True)
    moved = []
    for i in range(len(atoms)):
        for direction in directions[i]:
            for sign in (1, -1):
                copy = atoms.copy()
                copy.positions[i] += sign * direction
                moved.append(copy)
    rest = compute([atoms])[0][0]
    energies = np.array(compute(moved)[0]).reshape(len(atoms), 2 * draws)
    return np.asarray(energies.mean(1) - rest)
