"""What training data say of a molecule: how its distances are distributed and how long its bonds get."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.frames import Frame
from ffpretrain.errors import DataError
from ffpretrain.evaluation import check_level_of_theory
from ffpretrain.md.validation.bonds import bonds_of
from ffpretrain.md.validation.distances import (
    boltzmann_weights,
    distances_of,
    effective_number,
    reweighted_counts,
)
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.temperature import Measured, configurational_temperature, settled

#: property of frames whose geometries were sampled on another potential: their energy on that one, eV
SAMPLING_ENERGY = "sampling_energy"
#: their forces on it, eV/Å
SAMPLING_FORCES = "sampling_forces"
#: frames below which nothing is reweighted, nor a temperature measured: it would say nothing
FEWEST = 20
#: frames looked at; of more, as many are taken evenly
MOST = 10_000

Array = NDArray[np.float64]
Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Ensemble:
    """Interatomic distances in the canonical ensemble of the labels, by reweighting.

    Attributes:
        counts: from all frames ``[bins]``.
        halves: from every second frame each, ``[2, bins]``.
        effective: number of frames of equal weight that would say as much.
    """

    counts: Array
    halves: Array
    effective: float


@dataclass(frozen=True)
class TrainingFrames:
    """Frames of the structure's molecule.

    Attributes:
        name: of the dataset.
        positions: ``[F, N, 3]`` Å, atoms in the structure's order where ``ordered``.
        ordered: whether the frames list the atoms as the structure does.
        kelvin: temperature they are taken to be sampled at.
        counts: of interatomic distances, ``[2, bins]``; see :mod:`ffpretrain.md.validation.distances`.
        longest: largest length of each bond of the structure, ``[B]`` Å; None where not ``ordered``.
        measured: their own temperature, where none was given.
        ensemble: what the distances are in the ensemble of the labels, where the frames are from another
            one and say its energies; else None.
    """

    name: str
    positions: Array
    ordered: bool
    kelvin: float
    counts: NDArray[np.int64]
    longest: Array | None
    measured: Measured | None = None
    ensemble: Ensemble | None = None


def read_frames(
    sources: Sequence[Source], subject: Subject, kelvin: float | None, others: Sequence[float]
) -> TrainingFrames:
    """Read the frames of datasets that are of the structure's molecule.

    Args:
        sources: one or more datasets, all of one ensemble.
        subject: what is examined.
        kelvin: temperature the frames were sampled at; None measures it from their forces.
        others: temperatures at which replicas run anyway, K.

    Raises:
        DataError: no such dataset, one without a frame of this molecule, the structure is periodic, the
            labels are of another level of theory than the model's, or no temperature is given and frames are
            too few or without forces.
    """
    if subject.periodic:
        raise DataError("distances are compared with data for molecules only; leave the data out")
    if not sources:
        raise DataError("there are no data to compare with; give at least one source")
    numbers = subject.atoms.numbers
    names, own = [], []
    for source in sources:
        name, frames = _own_frames(source, subject, MOST // len(sources))
        names.append(name)
        own += frames
    positions = np.array([frame.positions for frame in own])
    ordered = all(np.array_equal(frame.numbers, numbers) for frame in own)
    longest = None
    if ordered:
        first, second = bonds_of(subject.atoms).T
        longest = np.linalg.norm(positions[:, first] - positions[:, second], axis=2).max(axis=0)
    counts = distances_of(positions, len(numbers))
    measured = None
    if kelvin is None:
        measured = _measured(own, subject)
        kelvin = settled(measured.kelvin, others)
    ensemble = _ensemble(own, positions, kelvin)
    name = " + ".join(dict.fromkeys(names))
    return TrainingFrames(name, positions, ordered, kelvin, counts, longest, measured, ensemble)


def _own_frames(source: Source, subject: Subject, most: int) -> tuple[str, list[Frame]]:
    """Return a dataset's name and its frames of the structure's molecule, at most so many, taken evenly.

    Raises:
        DataError: no such dataset, no frame of this molecule, or labels of another level of theory.
    """
    frames = open_dataset(source)
    if subject.card is not None:
        check_level_of_theory(subject.potential, frames)  # type: ignore[arg-type]
    wanted = np.sort(subject.atoms.numbers)
    chosen = range(len(frames))
    if len(frames) > most:
        chosen = np.linspace(0, len(frames) - 1, most).round().astype(int).tolist()
    own = [frame for i in chosen if np.array_equal(np.sort((frame := frames[i]).numbers), wanted)]
    if not own:
        formula = subject.atoms.get_chemical_formula(mode="hill")
        raise DataError(f"{source}: no frame is of {formula}; give data of the structure's molecule")
    return frames.metadata.name, own


def _measured(frames: list[Frame], subject: Subject) -> Measured:
    """Return the temperature of frames from their forces on the potential they were sampled on.

    Raises:
        DataError: there are too few frames, or some without forces.
    """
    forces = [frame.properties.get(SAMPLING_FORCES, frame.forces) for frame in frames]
    if len(frames) < FEWEST or any(one is None for one in forces):
        what = f"only {len(frames)} frames" if len(frames) < FEWEST else "frames without forces"
        raise DataError(f"{what}: the data's temperature cannot be measured; give --data-temperature")
    # frames may list atoms in different orders
    order = [np.argsort(frame.numbers, kind="stable") for frame in frames]
    numbers = np.sort(frames[0].numbers)
    positions = np.array([frame.positions[own] for frame, own in zip(frames, order, strict=True)])
    sorted_forces = np.array([one[own] for one, own in zip(forces, order, strict=True)])
    return configurational_temperature(subject.runtime, numbers, positions, sorted_forces, subject.seed)


def _ensemble(frames: list[Frame], positions: Array, kelvin: float) -> Ensemble | None:
    """Return the ensemble of the labels, None where the frames do not say what they were sampled with."""
    labels = [(frame.energy, frame.properties.get(SAMPLING_ENERGY)) for frame in frames]
    if len(frames) < FEWEST or any(energy is None or sampled is None for energy, sampled in labels):
        return None
    excess = np.array([energy - float(sampled) for energy, sampled in labels])  # type: ignore[operator, arg-type]

    def counted(part: slice) -> Array:
        weights = boltzmann_weights(excess[part], units.KB * kelvin)
        return reweighted_counts(positions[part], weights)

    halves = np.stack([counted(slice(start, None, 2)) for start in (0, 1)])
    effective = effective_number(boltzmann_weights(excess, units.KB * kelvin))
    return Ensemble(counted(slice(None)), halves, effective)
