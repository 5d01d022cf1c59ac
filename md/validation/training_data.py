"""What training data say of a molecule: how its distances are distributed and how long its bonds get."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets import open_dataset
from ffpretrain.errors import DataError
from ffpretrain.evaluation import check_level_of_theory
from ffpretrain.md.validation.bonds import bonds_of
from ffpretrain.md.validation.distances import distances_of
from ffpretrain.md.validation.subject import Subject

#: frames looked at; of more, as many are taken evenly
MOST = 10_000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TrainingFrames:
    """Frames of the structure's molecule.

    Attributes:
        name: of the dataset.
        positions: ``[F, N, 3]`` Å, atoms in the structure's order where ``ordered``.
        ordered: whether the frames list the atoms as the structure does.
        counts: of interatomic distances, ``[2, bins]``; see :mod:`ffpretrain.md.validation.distances`.
        longest: largest length of each bond of the structure, ``[B]`` Å; None where not ``ordered``.
    """

    name: str
    positions: Array
    ordered: bool
    counts: NDArray[np.int64]
    longest: Array | None


def read_frames(source: str | os.PathLike[str], subject: Subject) -> TrainingFrames:
    """Read the frames of a dataset that are of the structure's molecule.

    Raises:
        DataError: no such dataset, none of its frames is of this molecule, the structure is periodic, or the
            labels are of another level of theory than the model's.
    """
    if subject.periodic:
        raise DataError("distances are compared with data for molecules only; leave the data out")
    frames = open_dataset(source)
    if subject.card is not None:
        check_level_of_theory(subject.potential, frames)  # type: ignore[arg-type]
    numbers = subject.atoms.numbers
    wanted = np.sort(numbers)
    chosen = range(len(frames))
    if len(frames) > MOST:
        chosen = np.linspace(0, len(frames) - 1, MOST).round().astype(int).tolist()
    own = [frame for i in chosen if np.array_equal(np.sort((frame := frames[i]).numbers), wanted)]
    if not own:
        formula = subject.atoms.get_chemical_formula(mode="hill")
        raise DataError(f"{source}: no frame is of {formula}; give data of the structure's molecule")
    positions = np.array([frame.positions for frame in own])
    ordered = all(np.array_equal(frame.numbers, numbers) for frame in own)
    longest = None
    if ordered:
        first, second = bonds_of(subject.atoms).T
        longest = np.linalg.norm(positions[:, first] - positions[:, second], axis=2).max(axis=0)
    counts = distances_of(positions, len(numbers))
    return TrainingFrames(frames.metadata.name, positions, ordered, counts, longest)
